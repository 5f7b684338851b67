"""What all tests share: renders in this process, and pins as a registry would give them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import copier
import pytest

from extensions import catalog
from extensions.embedding_model import PinnedFile
from extensions.registry import registered_name

ROOT = Path(__file__).parent.parent

Render = Callable[..., Path]


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template as a plain folder: Copier then renders it in place, without cloning."""
    folder = tmp_path_factory.mktemp("template")
    for name in ("copier.yml", "extensions", "template"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(autouse=True)
def no_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test meets a registry, or a login, that it has not named itself."""
    import os

    for name in os.environ:
        if name.startswith(
            ("MLFLOW_TRACKING_", "MLFLOW_KEYCLOAK_", "MLFLOW_AUTH_", "MLFLOW_CLIENT_")
        ):
            monkeypatch.delenv(name)


@pytest.fixture
def render(template: Path, tmp_path: Path) -> Render:
    """Render the template with these answers, over the defaults; returns the new repository."""
    count = iter(range(1_000_000))

    def run(destination: Path | None = None, **answers: Any) -> Path:
        target = destination or tmp_path / f"rendered-{next(count)}"
        copier.run_copy(
            str(template),
            target,
            data=answers,
            defaults=True,
            unsafe=True,
            quiet=True,
            overwrite=True,
        )
        return target

    return run


@pytest.fixture
def pin_of() -> Callable[..., dict[str, Any]]:
    """`pin_of(model_id, **changes)`: a pin as a registry would give it."""
    return pinned


def pinned(model_id: str, **changes: Any) -> dict[str, Any]:
    """A pin of a model of the catalogue as a registry would give it, as the answer `pin`."""
    model = catalog.load()[model_id]
    digest = hashlib.sha256(model_id.encode()).hexdigest()
    weights = PinnedFile(
        "model.safetensors", "model.safetensors", model.facts.weights_bytes or 0, digest
    )
    small = ("config.json", "tokenizer.json", "1_Pooling/config.json")
    pin = catalog.resolve(model_id, "latest").to_mapping() | {
        "version": "3",
        "run_id": digest[:32],
        "artifact_uri": f"s3://mlflow/artifacts/1/{digest[:32]}/artifacts/model",
        "revision": digest[:40],
        "registered_model": registered_name(model_id),
        "files": [
            {"path": weights.path, "from": weights.source, "size": weights.size, "sha256": digest},
            *({"path": p, "from": p, "size": 700} for p in small),
        ],
    }
    return pin | changes
