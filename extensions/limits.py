"""How much of everything is taken from a server, and how long it is waited for.

docs/limits.md has them in a table, which a test compares with this file. They hold for rendering and
for model-fetch alike.
"""

from __future__ import annotations

KIB, MIB = 1 << 10, 1 << 20

# Seconds

CONNECT_SECONDS = 10.0
"""Until a connection stands, TLS included; a host that drops packets says nothing by itself."""

ANSWER_SECONDS = 30.0
"""Until a small answer (JSON, a token) is there whole, its head included."""

DRAIN_SECONDS = 1.0
"""For the rest of an answer that nobody needs; then its connection is closed instead."""

RETRY_AFTER_SECONDS = 120.0
"""The longest pause that a server may ask for."""

LOOKUP_SECONDS = 600.0
"""For all answers that one look-up of a model takes while rendering."""

STANDSTILL = 20
"""Timeouts (--timeout) without SLOWEST bytes per second in all, until a whole transfer is given up."""

# Amounts

SLOWEST = 1 * KIB
"""Bytes per second, below which a connection, or a whole transfer, counts as stuck."""

REDIRECTS = 5
"""Steps from one address to the next."""

ADDRESSES = 4
"""Addresses of one host name that are tried."""

SETTING_TRIES = 3
"""Of what looks like a wrong setting: a host name that is not found, TLS that is not answered."""

HEAD_BYTES = 256 * KIB
"""Of an answer's head, with all that comes before it (`100 Continue`)."""

FRAMING = 16
"""Bytes that arrive for each byte of a body: chunks of one byte take seven."""

ANSWER_BYTES = 8 * MIB
"""Of a JSON answer, after decompression."""

ERROR_BYTES = 8 * KIB
"""Of an error's text, which is looked through for its reason."""

DRAIN_BYTES = 64 * KIB
"""Of the rest of an answer that nobody needs."""

PAGES = 100
"""Of one listing."""

ENTRIES = 5_000
"""Files and folders of one listing."""

MODELS = 2_000
"""Registered models that are offered."""

MODEL_BYTES = 1 << 53
"""Of all files of a pin; what fits is the volume's business."""

# Memory

MEMORY_SHARE = 7 / 8
"""Of the container's memory that model-fetch may ask for: an error is a line, an OOM kill is none."""
