"""A limit below the container's own: what goes beyond it is then a line, where an OOM kill is none."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path

from . import limits

# Of cgroup v2, and of v1 (kernel documentation, cgroup-v2 and memory).
CGROUP = ("memory.max", "memory/memory.limit_in_bytes")

STACK = (
    2 << 20
)  # bytes of a thread; the usual 8 MiB count against the limit though nobody uses them
BLAS_THREADS = "2"  # what the init container's CPU limit lets run (extensions/sizing.py)


def container_limit(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the container may have; None when it has no limit of its own."""
    for name in CGROUP:
        try:
            text = (root / name).read_text().strip()
        except OSError:
            continue
        if text.isdecimal() and int(text) < 1 << 60:  # v1 writes a huge number for no limit
            return int(text)
    return None


def confine(container: int | None) -> None:
    """Has allocations fail that would lead to an OOM kill.

    RLIMIT_DATA, not RLIMIT_AS: a mapped file of weights, and the address space that malloc reserves
    for each thread, are no memory of the container.
    """
    if container is None:
        return
    most = int(container * limits.MEMORY_SHARE)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    threading.stack_size(STACK)
    # numpy's library reserves memory for as many threads as the machine has cores.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", BLAS_THREADS)
