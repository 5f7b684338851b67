"""The chunk planner and the resume state, by properties."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fetch.chunks import Journal, Plan, Progress, boot_id, read_journal
from model_fetch.embedding_model import PinnedFile
from model_fetch.follow import WINDOW, Follower
from model_fetch.verify import Digests

SIZES = st.integers(0, 1 << 40)
PATH = "model.safetensors"


@given(size=SIZES, chunks=st.integers(1, 300))
def test_the_chunks_are_the_file_without_gap_or_overlap(size: int, chunks: int) -> None:
    plan = Plan(size, max(1, size // chunks))
    position = 0
    for number, chunk in enumerate(plan):
        assert (chunk.index, chunk.start) == (number, position)
        assert 0 < chunk.size <= plan.chunk_size
        position = chunk.end
    assert position == size
    assert [plan[number] for number in range(len(plan))] == list(plan)
    with pytest.raises(IndexError):
        plan[len(plan)]


@given(
    size=st.integers(1, 5000),
    chunk_size=st.integers(1, 700),
    cuts=st.lists(st.integers(0, 5000), max_size=30),
)
def test_a_stream_passes_the_end_of_every_chunk_once(
    size: int, chunk_size: int, cuts: list[int]
) -> None:
    plan = Plan(size, chunk_size)
    stops = sorted({0, size, *(cut for cut in cuts if cut < size)})
    passed = [i for a, b in itertools.pairwise(stops) for i in plan.ends_within(a, b)]
    assert passed == list(range(len(plan)))


@pytest.mark.parametrize(("size", "chunk_size"), [(-1, 1), (1, 0), (1, -5)])
def test_a_plan_that_makes_no_sense_is_refused(size: int, chunk_size: int) -> None:
    with pytest.raises(ValueError, match="no plan"):
        Plan(size, chunk_size)


STEP = st.one_of(
    st.tuples(st.just("done"), st.integers(0, 9)),
    st.tuples(st.just("flush"), st.none()),
    st.tuples(st.just("validator"), st.text(max_size=8)),
    st.tuples(st.just("verified"), st.just("ab" * 32)),
)


@settings(deadline=None, max_examples=60)
@given(
    steps=st.lists(STEP, max_size=30), before=st.frozensets(st.integers(0, 9)), cut=st.floats(0, 1)
)
def test_a_journal_never_claims_what_was_not_there(
    tmp_path_factory: pytest.TempPathFactory, steps: list, before: frozenset[int], cut: float
) -> None:
    """Torn anywhere, it tells a past state; after a power cut, only what was flushed."""
    folder = tmp_path_factory.mktemp("journal")
    where = folder / "j"
    data = os.open(folder / "data", os.O_RDWR | os.O_CREAT)
    journal = Journal(where, PATH, 1000, Progress(100, None, before))
    states = [(set(before), set[int]())]
    for step, value in steps:
        done, durable = states[-1]
        if step == "done":
            journal.done(value)
            done = done | {value}
        elif step == "flush":
            journal.checkpoint(data)
            durable = done
        elif step == "validator":
            journal.validator(value)
        else:
            journal.verified(value)
        states.append((set(done), set(durable)))
    journal.close()
    os.close(data)
    text = where.read_text()
    assert read_journal(text, PATH, 1000, boot_id()).done == states[-1][0]
    header = text.index("\n") + 1 + sum(len(f"+{index}\n") for index in before)
    torn = text[: header + int((len(text) - header) * cut)]
    same = read_journal(torn, PATH, 1000, boot_id())
    other = read_journal(torn, PATH, 1000, "another boot")
    assert same.done in [frozenset(done) for done, _ in states]
    assert other.done in [frozenset(durable) for _, durable in states]
    assert other.done <= same.done


@given(text=st.text(max_size=300))
def test_no_text_breaks_the_reader(text: str) -> None:
    progress = read_journal(text, PATH, 1000, boot_id())
    assert progress is None or progress.chunk_size >= 1


@pytest.mark.parametrize(
    "lines",
    [
        ['{"path": "other", "size": 1000, "chunk": 100, "boot": "b"}'],
        ['{"path": "model.safetensors", "size": 999, "chunk": 100, "boot": "b"}'],
        ['{"path": "model.safetensors", "size": 1000, "chunk": 0, "boot": "b"}'],
        ['{"path": "model.safetensors", "size": 1000, "chunk": 100, "boot": "b"}', "+10"],
        ['{"path": "model.safetensors", "size": 1000, "chunk": 100, "boot": "b"}', "+-1"],
        ['{"path": "model.safetensors", "size": 1000, "chunk": 100, "boot": "b"}', "?"],
        ["null"],
        ["[]"],
        ["{}"],
        [],
    ],
    ids=str,
)
def test_a_journal_of_something_else_is_no_use(lines: list[str]) -> None:
    assert read_journal("".join(f"{line}\n" for line in lines), PATH, 1000, "b") is None


@settings(deadline=None, max_examples=40)
@given(
    size=st.integers(0, 1 << 20) | st.integers(0, 3 * WINDOW),
    share=st.floats(0.01, 1.2),
    seed=st.integers(0, 1 << 32),
    early=st.integers(0, 8),
)
def test_digests_are_the_files_in_whatever_order_it_arrives(
    tmp_path_factory: pytest.TempPathFactory, size: int, share: float, seed: int, early: int
) -> None:
    """Some chunks were there before; chunks begin anywhere in a page and may be longer than a window."""
    order = random.Random(seed)
    content = order.randbytes(size)
    plan = Plan(size, max(1, int(size * share)))
    chunks = list(plan)
    order.shuffle(chunks)
    there, coming = chunks[:early], chunks[early:]
    fd = os.open(tmp_path_factory.mktemp("follow") / "file", os.O_RDWR | os.O_CREAT)
    os.truncate(fd, size)
    for chunk in there:
        os.pwrite(fd, content[chunk.start : chunk.end], chunk.start)
    digests = Digests(PinnedFile("x", "x", size, None, None))
    ended = threading.Event()
    errors: list[BaseException] = []
    steps: list[None] = []
    follower = Follower(
        digests,
        fd,
        plan,
        {chunk.index for chunk in there},
        digested=lambda: steps.append(None),
        finished=ended.set,
        failed=errors.append,
    )
    follower.start()
    for chunk in coming:
        os.pwrite(fd, content[chunk.start : chunk.end], chunk.start)
        follower.arrived(chunk.index)
    assert ended.wait(30)
    follower.join()
    os.close(fd)
    assert not errors
    assert len(steps) == len(plan)
    assert digests.sha256 == hashlib.sha256(content).hexdigest()


def follower_of(fd: int, size: int, done: set[int], **calls: Any) -> Follower:
    """A follower of a file in chunks of 50 bytes."""
    digests = Digests(PinnedFile("x", "x", size, None, None))
    nothing = {"digested": lambda: None, "finished": lambda: None, "failed": lambda error: None}
    return Follower(digests, fd, Plan(size, 50), done, **{**nothing, **calls})


def test_a_follower_that_cannot_read_says_so(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    failed = threading.Event()
    errors: list[BaseException] = []
    follower = follower_of(
        fd, 100, {0, 1}, failed=lambda error: (errors.append(error), failed.set())
    )
    follower.start()
    assert failed.wait(10)
    assert isinstance(errors[0], OSError)
    os.close(fd)


def test_a_digest_is_behind_when_what_came_waits_for_it_in_its_order() -> None:
    follower = follower_of(-1, 500, done={0})
    assert not follower.behind
    follower.arrived(3)
    follower.arrived(4)
    assert not follower.behind, "the chunks between are what it waits for"
    follower.arrived(1)
    assert not follower.behind, "what an earlier run left is no reason to wait"
    fresh = follower_of(-1, 500, done=set())
    fresh.arrived(0)
    assert not fresh.behind
    fresh.arrived(1)
    assert fresh.behind
