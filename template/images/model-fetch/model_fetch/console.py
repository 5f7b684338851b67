"""What a person or a log collector sees: lines, a progress bar, the termination message."""

from __future__ import annotations

import json
import sys
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

MB = 1_000_000
LONGEST = 500  # characters of a line


class Console:
    """Writes to standard error, as text or as one JSON object per line. Thread-safe."""

    def __init__(self, format: str = "text", stream: TextIO | None = None) -> None:
        """format: `text` or `json`."""
        self._stream = stream or sys.stderr
        self._json = format == "json"
        self._lock = threading.Lock()
        self._bar = ""
        self.interactive = not self._json and self._stream.isatty()

    def info(self, message: str, **fields: Any) -> None:
        self._write("info", message, fields)

    def warning(self, message: str, **fields: Any) -> None:
        self._write("warning", message, fields)

    def error(self, message: str, **fields: Any) -> None:
        self._write("error", message, fields)

    def bar(self, text: str) -> None:
        """Shows a line that the next one overwrites; only on a terminal."""
        with self._lock:
            self._stream.write("\r" + text.ljust(len(self._bar)))
            self._stream.flush()
            self._bar = text

    def _write(self, level: str, message: str, fields: dict[str, Any]) -> None:
        message = one_line(message)
        if self._json:
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            line = json.dumps({"time": now, "level": level, "message": message, **fields})
        else:
            line = message if level == "info" else f"{level}: {message}"
        with self._lock:
            if self._bar:
                self._stream.write("\r" + " " * len(self._bar) + "\r")
                self._bar = ""
            self._stream.write(line + "\n")
            self._stream.flush()


def one_line(text: str) -> str:
    """Text that cannot forge a second log line, move a terminal's cursor, or fill a screen."""
    return "".join(c if c.isprintable() else " " for c in text[:LONGEST])


class Meter:
    """Counts bytes and tells how far things are, every few seconds."""

    def __init__(self, console: Console, total: int, interval: float) -> None:
        """total: bytes of the whole model; interval: seconds between two lines of a log."""
        self._console = console
        self._interval = interval
        self._lock = threading.Lock()
        self._quit = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self.total = total
        self.present = 0
        self.received = 0
        self.started = time.monotonic()

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._quit.set()
        self._thread.join()

    def add(self, count: int) -> None:
        """`count` bytes have come over the wire."""
        with self._lock:
            self.received += count
            self.present += count

    def found(self, count: int) -> None:
        """`count` bytes were there before; negative when bytes are thrown away."""
        with self._lock:
            self.present += count

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def _run(self) -> None:
        interval = 0.2 if self._console.interactive else self._interval
        before, at = self.received, time.monotonic()
        rate = 0.0
        while not self._quit.wait(interval):
            now = time.monotonic()
            speed = (self.received - before) / max(now - at, 1e-6)
            rate = speed if not rate else 0.7 * rate + 0.3 * speed
            before, at = self.received, now
            self._tell(rate)

    def _tell(self, rate: float) -> None:
        share = self.present / self.total if self.total else 1.0
        left = max(self.total - self.present, 0)
        eta = left / rate if rate > 1 else None
        text = (
            f"{self.present / MB:,.0f} of {self.total / MB:,.0f} MB ({share:.0%}), "
            f"{rate / MB:,.0f} MB/s, {duration(eta)} left"
        )
        if self._console.interactive:
            width = 30
            filled = int(share * width)
            self._console.bar(f"[{'#' * filled}{'.' * (width - filled)}] {text}")
        else:
            self._console.info(
                text,
                bytes=self.present,
                total_bytes=self.total,
                bytes_per_second=round(rate),
                eta_seconds=None if eta is None else round(eta),
            )


def duration(seconds: float | None) -> str:
    """`1 h 02 min`, `3 min 05 s`, `7 s`, or `?`."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole} s"


def termination_message(path: Path | None, message: str) -> None:
    """Leaves the last word where Kubernetes shows it (`terminationMessagePath`); never fails."""
    if path is None:
        return
    try:
        with path.open("w") as stream:
            stream.write(one_line(message)[:4096])
    except OSError:
        pass
