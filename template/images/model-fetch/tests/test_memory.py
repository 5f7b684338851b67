"""Too much memory is an error with a line, not a kill without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fetchkit.program import PACKAGE
from model_fetch.memory import container_limit


@pytest.mark.parametrize(
    ("name", "text", "limit"),
    [
        ("memory.max", "1073741824\n", 1 << 30),
        ("memory.max", "max\n", None),
        ("memory.max", "\n", None),
        ("memory/memory.limit_in_bytes", "2147483648\n", 2 << 30),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", None),
        ("other", "1", None),
    ],
)
def test_the_containers_limit(tmp_path: Path, name: str, text: str, limit: int | None) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    assert container_limit(tmp_path) == limit


OVER = """
import threading
from pathlib import Path
from model_fetch import cli, memory
from model_fetch.console import Console
memory.confine(256 << 20)
threads = [threading.Thread(target=lambda: None) for _ in range(64)]
for thread in threads:
    thread.start()
held = bytearray(100 << 20)
try:
    more = bytearray(200 << 20)
except MemoryError as error:
    raise SystemExit(cli._failed(error, Console(), None))
"""


def test_an_allocation_beyond_it_is_told() -> None:
    run = subprocess.run(
        [sys.executable, "-c", OVER],
        env={"PYTHONPATH": str(PACKAGE)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("error: the memory of this container is not enough")
    assert run.stderr.count("\n") == 1
