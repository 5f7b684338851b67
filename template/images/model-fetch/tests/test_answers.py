"""Answers by chance: good ones with bytes changed, cut out and put in. Fixed seed.

Whatever comes, reading it ends, and raises nothing but what a worker knows what to do about.
"""

from __future__ import annotations

import http.client
import os
import random
import socket
import threading
from types import SimpleNamespace

from fetchkit.hostile import encoded
from model_fetch import responses
from model_fetch.embedding_model import PinnedFile
from model_fetch.failures import TemplateError, UnreachableError
from model_fetch.receive import ReadFailed, Receiver, Sink
from model_fetch.responses import Again, NoRanges, Wrong
from model_fetch.transport import Answer, Request, redirected

FILE = PinnedFile("model.safetensors", "model.safetensors", 1000)
SOURCE = SimpleNamespace(name="a store", object_store=True, advice="look")
ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "800"))
GOOD = [
    encoded(200, {"ETag": '"x"', "Content-Type": "text/plain"}, b"x" * 1000),
    encoded(206, {"Content-Range": "bytes 0-9/1000", "ETag": '"y"'}, b"0123456789"),
    encoded(302, {"Location": "http://127.0.0.1:9/x?y#z"}, b""),
    encoded(403, {"Date": "Sat, 28 Nov 2026 16:00:00 GMT"}, b"<Code>AccessDenied</Code>"),
    encoded(503, {"Retry-After": "1"}, b"x"),
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX: y\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
]


def changed(chance: random.Random) -> bytes:
    answer = bytearray(chance.choice(GOOD))
    end = answer.index(b"\r\n\r\n") + 8
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(min(end, len(answer)))
        change = chance.choice(["set", "cut", "put", "many", "copy"])
        if change == "set":
            answer[at] = chance.randrange(256)
        elif change == "cut" and len(answer) > 20:
            del answer[at : at + chance.randint(1, 8)]
        elif change == "put":
            answer[at:at] = chance.randbytes(chance.randint(1, 8))
        elif change == "copy":
            answer[at:at] = answer[chance.randrange(len(answer)) :]
        else:
            answer[at:at] = bytes([chance.randrange(256)]) * chance.choice([10, 5_000, 70_000])
    return bytes(answer)


def read(answer: bytes, sink: Sink, receiver: Receiver) -> None:
    """What a worker does with an answer."""
    ours, theirs = socket.socketpair()
    ours.settimeout(5)

    def send() -> None:
        with theirs:
            try:
                theirs.sendall(answer)
            except OSError:
                pass

    sender = threading.Thread(target=send)
    sender.start()
    request = Request("https://127.0.0.1/x", {"Authorization": "5ecret", "Range": "bytes=0-9"})
    response = Answer(ours, method="GET")
    try:
        try:
            response.begin()
        except ValueError:  # the wire makes a failure of it
            return
        moved = redirected(request, response.status, response.headers.get("Location"))
        if moved is not None:
            assert moved.url.startswith("https://")
            assert moved.own or "Authorization" not in moved.headers
        responses.check_status(response, FILE, SOURCE)  # type: ignore[arg-type]
        for header in responses.if_range(responses.validator(response)).values():
            assert header.isprintable()
            assert header.isascii()
        if response.status == 206:
            responses.check_range(response, 0, 10, 1000)
        end = 10 if response.status == 206 else 1000
        responses.check_length(response, end)
        for _ in receiver.receive(response, ours, sink, 0, end):
            pass
    except (Again, Wrong, NoRanges, ReadFailed, TemplateError, OSError, http.client.HTTPException):
        pass
    finally:
        ours.shutdown(socket.SHUT_RDWR)
        response.close()
        ours.close()
        sender.join(10)


def test_no_answer_surprises_the_one_who_reads_it(tmp_path: object) -> None:
    chance = random.Random(13)
    receiver = Receiver(5)
    with open(f"{tmp_path}/file", "w+b") as file:
        sink = Sink(file.fileno())
        for _ in range(ROUNDS):
            read(changed(chance), sink, receiver)
    receiver.close()


def test_no_redirect_surprises() -> None:
    chance = random.Random(14)
    pieces = [
        "http://",
        "https://",
        "//",
        "[",
        "]",
        "::1",
        ":",
        "@",
        "a",
        "\xff",
        "..",
        "/",
        "%",
        "9",
        "\\",
    ]
    request = Request(
        "https://h/x", {"Authorization": "5ecret", "x-amz-a": "5ecret"}, "POST", b"5ecret"
    )
    for _ in range(ROUNDS * 5):
        location = "".join(chance.choices(pieces, k=chance.randint(0, 12)))
        status = chance.choice([200, 301, 302, 303, 307, 308])
        try:
            moved = redirected(request, status, location)
        except UnreachableError:
            continue
        if moved is not None and not moved.url.startswith(
            ("https://h/", "https://h?", "https://h:443/")
        ):
            assert "5ecret" not in str([*moved.headers.values(), moved.body])
