"""smoke against a stub of TEI: it passes what this repository deploys, and finds each fault.

`make check-smoke` calls it; it needs Python alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stub import FAULTS, Stub, serving

SMOKE = Path(__file__).resolve().parent.parent / "smoke"
KEY = "a-key-of-the-test"
KNOWN = {
    "model": "acme/model",
    "dimensions": 768,
    "max_input_tokens": 1024,
    "max_client_batch_size": 64,
    "dtype": "float16",
    "pooling": "mean",
    "api_key": True,
    "request_seconds": 60,
    "version": "1",
}
"""What each fault differs from."""


def smoke(expected: Path, fault: str = "") -> int:
    """The exit code of smoke.py before a stub that is as expected, but for the fault."""
    said = json.loads(expected.read_text())
    stub = Stub(
        model=said["model"],
        dimensions=said["dimensions"] or 768,
        max_input_length=said["max_input_tokens"],
        max_client_batch_size=said["max_client_batch_size"],
        dtype=said["dtype"],
        pooling=said["pooling"],
        key=KEY if said["api_key"] else None,
        max_batch_tokens=2 * said["max_input_tokens"],
        fault=fault,
    )
    with serving(stub) as url:
        command = [sys.executable, "-B", str(SMOKE / "smoke.py"), "--url", url]
        return subprocess.run(
            [*command, "--expected", str(expected)],
            env=os.environ | {"API_KEY": KEY},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ).returncode


def main() -> int:
    """Returns the exit code: 1 with a line for each run that ended otherwise than it must."""
    with tempfile.TemporaryDirectory() as folder:
        known = Path(folder, "expected.json")
        known.write_text(json.dumps(KNOWN))
        runs = [("none, as smoke/expected.json says", SMOKE / "expected.json", "", 0)]
        runs += [("none", known, "", 0)]
        runs += [(what, known, fault, 1) for fault, what in FAULTS.items()]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ended = list(pool.map(lambda run: smoke(run[1], run[2]), runs))
    wrong = [
        f"fault: {what}; smoke ended with {code}, not with {wanted}"
        for (what, *_, wanted), code in zip(runs, ended, strict=True)
        if code != wanted
    ]
    print("\n".join([*wrong, f"smoke: {len(runs) - len(wrong)} passed, {len(wrong)} failed"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
