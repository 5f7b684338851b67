"""Fixtures of model-fetch's own tests. They need nothing but this folder, and say what they skip."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

for _folder in (Path(__file__).parent, Path(__file__).parents[1]):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

from fetchkit.filesystems import Distributed, JuiceFS, SeaweedFS  # noqa: E402
from fetchkit.models import PinnedModel, embedding_model  # noqa: E402
from fetchkit.program import Pod  # noqa: E402


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path / "pod")


@pytest.fixture(scope="session")
def model() -> PinnedModel:
    """A model of 3 MB whose pin has no digests, as that of a fine-tuned model."""
    return PinnedModel(embedding_model(), "mlflow-artifacts:/model")


@pytest.fixture(scope="session")
def mirrored(model: PinnedModel) -> PinnedModel:
    """The same, with the digests that a mirrored snapshot has."""
    return PinnedModel(model.files, model.artifact_uri, sha256=True)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that is its own authority."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", "key.pem", "-out", "cert.pem"),
        ],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return folder


def _running(kind: type[Distributed]) -> Iterator[Distributed]:
    folder = Path(tempfile.mkdtemp(prefix=f"{kind.__name__.lower()}-"))
    folder.chmod(0o755)  # other users' pods look into it, too
    try:
        store = kind(folder)
        try:
            yield store
        finally:
            store.end()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def seaweedfs() -> Iterator[Distributed]:
    """A real SeaweedFS, with S3; started once."""
    yield from _running(SeaweedFS)


@pytest.fixture(scope="session")
def juicefs() -> Iterator[Distributed]:
    """A real JuiceFS, with its S3 gateway; started once."""
    yield from _running(JuiceFS)
