"""The image of the smoke test, built by a real builder and run as its Job runs it.

The base image is stood in for as in test_model_fetch_image.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.tei_stub.server import Stub, serving
from tests.test_model_fetch_image import HARDENED, PACKAGES

if TYPE_CHECKING:
    from tests.containers.engine import Engine

pytest_plugins = ["tests.containers.engine"]

SOURCES = Path(__file__).parents[1] / "template/smoke"
MODEL = "BAAI/bge-base-en-v1.5"
KEY = "a-key-that-is-right"


@pytest.fixture(scope="module")
def image(engine: Engine) -> str:
    base = f"BASE_IMAGE={engine.debian(PACKAGES)}"
    engine.docker("build", "--network=none", "--tag=test/smoke", f"--build-arg={base}", SOURCES)
    return "test/smoke"


@pytest.fixture
def expected(render: Callable[..., Path], pin_of: Callable[..., dict[str, Any]]) -> Path:
    folder = render(program=False, model_id=MODEL, pin=pin_of(MODEL), components=["api-key"])
    return folder / "smoke/expected.json"


@pytest.mark.parametrize(("fault", "code"), [("", 0), ("not normalised", 1)])
def test_it_runs_with_nothing_that_a_job_may_not_have(
    fault: str, code: int, engine: Engine, image: str, expected: Path
) -> None:
    said = json.loads(expected.read_text())
    stub = Stub(
        model=MODEL,
        max_input_length=said["max_input_tokens"],
        max_client_batch_size=said["max_client_batch_size"],
        pooling="cls",
        key=KEY,
        fault=fault,
    )
    with serving(stub) as url:
        container = engine.client.containers.run(
            image,
            [f"--url={url}", "--expected=/etc/smoke/expected.json"],
            detach=True,
            network_mode="host",
            environment={"API_KEY": KEY},
            volumes={str(expected): {"bind": "/etc/smoke/expected.json", "mode": "ro"}},
            **HARDENED,
        )
        ended = container.wait()["StatusCode"]
        output = container.logs().decode()
        container.remove()
    assert ended == code, output
    assert "  ok    health" in output
    assert ("FAIL" in output) == bool(code)
