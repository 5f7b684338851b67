"""The chunk planner and the resume state, by properties."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fetch.chunks import Checksums, Journal, Plan, Progress, boot_id, read_journal
from model_fetch.embedding_model import PinnedFile
from model_fetch.follow import Follower, ReadBack, Told
from model_fetch.verify import Digests
from model_fetch.volume import PIECE

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
    st.tuples(st.just("validator"), st.text(st.characters(codec="ascii"), max_size=8)),
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
    journal = Journal(where, PATH, 1000, Progress(100, None, dict.fromkeys(before)))
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
    text = where.read_bytes()
    if any(step == "validator" and not (value and value.isprintable()) for step, value in steps):
        assert read_journal(text, PATH, 1000, boot_id()) is None
        return
    assert read_journal(text, PATH, 1000, boot_id()).done.keys() == states[-1][0]
    header = text.index(b"\n") + 1 + sum(len(f"+{index}\n") for index in before)
    torn = text[: header + int((len(text) - header) * cut)]
    same = read_journal(torn, PATH, 1000, boot_id())
    other = read_journal(torn, PATH, 1000, "another boot")
    assert same.done.keys() in [done for done, _ in states]
    assert other.done.keys() in [durable for _, durable in states]
    assert other.done.keys() <= same.done.keys()
    assert not read_journal(torn, PATH, 1000, None).done, "no chunk has its checksum"


@given(text=st.text(max_size=300))
def test_no_text_breaks_the_reader(text: str) -> None:
    progress = read_journal(text.encode(), PATH, 1000, boot_id())
    assert progress is None or progress.chunk_size >= 1


HEADER = '{"path": "model.safetensors", "size": 1000, "chunk": 100, "boot": "b"}'


@pytest.mark.parametrize(
    "lines",
    [
        [f'{HEADER[:-1]}, "chunk": 4.5}}'],
        [f'{HEADER[:-1]}, "chunk": Infinity}}'],
        [HEADER, '~["a"]'],
        [HEADER, r'~"\"a\r\nX: y\""'],
        [HEADER, r'~"\"\u6f22\""'],
        [HEADER, "~" + "[" * 100_000],
        [HEADER, "+1 zz"],
        [HEADER, "!AB"],
        ["[" * 100_000],
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
    text = "".join(f"{line}\n" for line in lines).encode()
    assert read_journal(text, PATH, 1000, "b") is None


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 5000), chunk_size=st.integers(1, 700), seed=st.integers(0, 1 << 32))
def test_checksums_are_of_what_came_in_however_it_was_cut(
    size: int, chunk_size: int, seed: int
) -> None:
    order = random.Random(seed)
    content = order.randbytes(size)
    plan = Plan(size, chunk_size)
    sums = Checksums(plan)
    for chunk in sorted(plan, key=lambda _: order.random()):
        position = chunk.start
        while position < chunk.end:
            end = min(chunk.end, position + order.randint(1, 200))
            sums.add(memoryview(content)[position:end], position)
            position = end
    expected = {c.index: zlib.crc32(content[c.start : c.end]) for c in plan}
    assert {c.index: sums.of(c.index) for c in plan} == expected
    sums.add(memoryview(content)[1:], 1)  # without its beginning
    assert min(chunk_size, size) == 1 or sums.of(0) is None


@pytest.mark.parametrize("lost", [None, 0, 7, 1999])
@pytest.mark.parametrize("zeros", [1, 4096])
def test_what_a_volume_has_lost_is_seen_when_it_is_read_back(
    tmp_path: Path, lost: int | None, zeros: int
) -> None:
    content = random.Random(7).randbytes(2000)
    plan = Plan(2000, 300)
    sums = Checksums(plan)
    sums.add(memoryview(content), 0)
    path = tmp_path / "file"

    def flush() -> None:
        """As SeaweedFS 4.48 does it: a page of zeros in the place of what was written."""
        held = bytearray(content)
        if lost is not None:
            held[lost : lost + zeros] = bytes(len(held[lost : lost + zeros]))
        path.write_bytes(held)

    told: list[str | None] = []
    digests = Digests(PinnedFile("x", "x", 2000))
    every = range(len(plan))
    failures: list[BaseException] = []
    follower = ReadBack(
        digests, path, plan, every, Told(lambda: None, told.append, failures.append), sums, flush
    )
    follower.start()
    follower.join()
    assert not failures
    if lost is None:
        assert told == [None]
        assert digests.sha256 == hashlib.sha256(content).hexdigest()
    else:
        assert told == [
            f"the volume does not hold what was written to it, from byte {lost - lost % 300:,} on"
        ]


@settings(deadline=None, max_examples=40)
@given(
    size=st.integers(0, 1 << 20) | st.integers(0, 3 * PIECE),
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
        Told(lambda: steps.append(None), lambda lost: ended.set(), errors.append),
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
    nothing = {
        "digested": lambda: None,
        "finished": lambda lost: None,
        "failed": lambda error: None,
    }
    return Follower(digests, fd, Plan(size, 50), done, Told(**{**nothing, **calls}))


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
