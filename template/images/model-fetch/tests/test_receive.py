"""A body's way into a file: within the kernel, and by a buffer where that cannot be."""

from __future__ import annotations

import http.client
import itertools
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fetch.receive import PIECE, ReadFailed, Receiver, Sink

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"


@contextmanager
def answer(*parts: bytes | float, hold: bool = False) -> Iterator[socket.socket]:
    """A connection on which these bytes come, with pauses of so many seconds; then its end.

    hold: the connection stays open after them
    """
    here, there = socket.socketpair()
    here.settimeout(10)
    over = threading.Event()

    def send() -> None:
        try:
            for part in parts:
                time.sleep(part) if isinstance(part, float) else there.sendall(part)
            if hold:
                over.wait(30)
        except OSError:
            pass
        finally:
            there.close()

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield here
    finally:
        over.set()
        here.close()
        thread.join()


def response_on(sock: socket.socket) -> http.client.HTTPResponse:
    response = http.client.HTTPResponse(sock, method="GET")
    response.begin()
    return response


@pytest.fixture
def sink(tmp_path: Path) -> Iterator[Sink]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield Sink(fd)
    os.close(fd)


def content_of(sink: Sink, size: int, start: int = 0) -> bytes:
    return os.pread(sink.fd, size, start)


BODY = random.Random(1).randbytes(3 * PIECE + 12_345)


@pytest.mark.parametrize("raw", [True, False], ids=["spliced", "buffered"])
@pytest.mark.parametrize(
    "body", [BODY, BODY[:PIECE], BODY[:3000], b"x", b""], ids=lambda body: str(len(body))
)
def test_a_body_comes_whole_to_its_place(sink: Sink, body: bytes, raw: bool) -> None:
    with answer(HEAD % len(body), body, hold=True) as sock:
        response = response_on(sock)
        receiver = Receiver(10)
        source = sock if raw else None
        counts = list(receiver.receive(response, source, sink, 777, 777 + len(body)))
        receiver.close()
        assert response.isclosed(), "so the connection can serve the next request"
    assert sum(counts) == len(body)
    assert content_of(sink, len(body) + 1, 777) == body


@settings(deadline=None, max_examples=25)
@given(
    cuts=st.lists(st.integers(0, 200_000), max_size=8), pause=st.sampled_from([0.0, 0.001, 0.15])
)
def test_a_body_may_come_in_any_pieces(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], pause: float
) -> None:
    body = BODY[:200_000]
    parts: list[bytes | float] = []
    for start, end in itertools.pairwise(sorted({0, *cuts, len(body)})):
        parts += [body[start:end], pause]
    fd = os.open(tmp_path_factory.mktemp("receive") / "file", os.O_RDWR | os.O_CREAT)
    with answer(HEAD % len(body), *parts, hold=True) as sock:
        counts = list(Receiver(10).receive(response_on(sock), sock, Sink(fd), 0, len(body)))
    assert sum(counts) == len(body)
    assert content_of(Sink(fd), len(body)) == body
    os.close(fd)


@pytest.mark.parametrize("raw", [True, False], ids=["spliced", "buffered"])
def test_what_came_before_a_cut_is_in_the_file(sink: Sink, raw: bool) -> None:
    with answer(HEAD % len(BODY), BODY[:2_000_000]) as sock:
        counts: list[int] = []
        pieces = Receiver(10).receive(response_on(sock), sock if raw else None, sink, 0, len(BODY))
        with pytest.raises(ReadFailed, match="cut"):
            counts.extend(pieces)
    got = sum(counts)
    assert got == 2_000_000
    assert content_of(sink, got) == BODY[:got]


@pytest.mark.parametrize("raw", [True, False], ids=["spliced", "buffered"])
def test_a_connection_that_stands_still_is_given_up(sink: Sink, raw: bool) -> None:
    with answer(HEAD % 100_000, BODY[:50_000], hold=True) as sock:
        response = response_on(sock)
        sock.settimeout(0.3)
        with pytest.raises(ReadFailed, match="no answer in time"):
            list(Receiver(0.3).receive(response, sock if raw else None, sink, 0, 100_000))


@pytest.mark.parametrize("raw", [True, False], ids=["spliced", "buffered"])
def test_a_drip_is_handed_on_while_it_drips(sink: Sink, raw: bool) -> None:
    """So the worker sees how slow it is: no pause is long, and a full piece would take hours."""
    drops = [part for _ in range(60) for part in (b"drop", 0.05)]
    with answer(HEAD % 240, *drops, hold=True) as sock:
        response = response_on(sock)
        counts = list(Receiver(10).receive(response, sock if raw else None, sink, 0, 240))
    assert sum(counts) == 240
    assert len(counts) >= 3
    assert content_of(sink, 240) == b"drop" * 60


def test_a_file_that_takes_no_splice_gets_the_same_bytes(tmp_path: Path) -> None:
    """O_APPEND is what splice(2) refuses on any file system; pwrite appends there, in order."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    receiver = Receiver(10)
    for _ in range(2):
        with answer(HEAD % len(BODY), BODY, hold=True) as sock:
            counts = list(receiver.receive(response_on(sock), sock, Sink(fd), 0, len(BODY)))
        assert sum(counts) == len(BODY)
    os.close(fd)
    assert (tmp_path / "file").read_bytes() == BODY * 2


def test_a_full_disk_is_the_disks_error_and_not_the_connections(sink: Sink) -> None:
    full = Sink(os.open("/dev/full", os.O_WRONLY))
    with answer(HEAD % len(BODY), BODY, hold=True) as sock, pytest.raises(OSError, match="space"):
        list(Receiver(10).receive(response_on(sock), sock, full, 0, len(BODY)))
    os.close(full.fd)
