"""A machine with a real systemd, Docker and Podman: Debian, booted by systemd-nspawn.

It has a network of its own, which outlives its reboots, without a way out of this machine; its kernel is this
one's, whose control groups have no controllers to give it: limits of memory are not what is tried here.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.containers.engine import debian_rootfs

PACKAGES = (
    "systemd,systemd-sysv,dbus,docker.io,docker-cli,docker-compose,podman,crun,netavark,aardvark-dns,"
    "iptables,iproute2,netbase,ca-certificates,curl,python3,make,procps"
)
RELEASE = "trixie"  # the first with Compose v2, and with a Podman that has Quadlet
# Docker writes settings of its own network.
NSPAWN = {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1", "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network"}
CLONE_NEWNET = 0x40000000


def lacking() -> str | None:
    """Why no machine can be booted here."""
    for program, package in {
        "systemd-nspawn": "systemd-container",
        "debootstrap": "debootstrap",
    }.items():
        if not shutil.which(program):
            return f"{program} is not installed (Debian: {package})"
    if os.geteuid() != 0:
        return "booting a machine needs root"
    return None


def quadlet(folder: Path) -> Path:
    """Podman's generator of units, out of that Debian."""
    program = "./usr/libexec/podman/quadlet"
    if not shutil.which("debootstrap"):
        pytest.skip("debootstrap is not installed (Debian: the same)")
    tar = debian_rootfs(PACKAGES, RELEASE)
    subprocess.run(["tar", "-C", folder, "-xf", tar, program], check=True)
    return folder / program


class Machine:
    """One machine; off until it is booted."""

    def __init__(self, folder: Path) -> None:
        self.root, self.log, self._folder = folder / "root", folder / "nspawn.log", folder
        self._network = folder / "network"
        self._process: subprocess.Popen[bytes] | None = None
        self.root.mkdir(parents=True)
        tar = debian_rootfs(PACKAGES, RELEASE)
        subprocess.run(["tar", "-C", self.root, "-xf", tar], check=True)
        self._network.touch()
        subprocess.run(
            ["unshare", f"--net={self._network}", "ip", "link", "set", "lo", "up"], check=True
        )

    @property
    def _init(self) -> int:
        """Its process 1, as this machine counts."""
        assert self._process
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        return int(children.read_text().split()[0])

    def boot(self) -> None:
        """Switch it on; returns when Docker answers."""
        command = [
            *("systemd-nspawn", "--quiet", f"--directory={self.root}", "--boot", "--console=pipe"),
            *("--keep-unit", "--register=no", f"--network-namespace-path={self._network}"),
            # For containers of its own.
            *("--capability=all", "--system-call-filter=@keyring bpf"),
        ]
        # nspawn keeps its state in /run, and wants that to be no disk.
        inside = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /run && exec "$@"', "-"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*inside, *command],
                env=os.environ | NSPAWN,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.until(lambda: self.succeeds("docker version"))

    def cut(self) -> None:
        """As when the power goes: nothing gets to end well."""
        assert self._process
        os.kill(self._init, signal.SIGKILL)
        self._process.wait(timeout=60)

    def reboot(self) -> None:
        self.does("systemctl reboot", check=False)
        assert self._process
        assert self._process.wait(timeout=120) == 133, self.log.read_text()[-2000:]  # nspawn's word
        self.boot()

    def off(self) -> None:
        if self._process and self._process.poll() is None:
            self.cut()
        subprocess.run(["umount", self._network], check=True)
        shutil.rmtree(self.root)

    def does(self, command: str, check: bool = True, timeout: float = 300) -> str:
        """What a shell in it says, errors with the rest."""
        done = self._shell(command, timeout)
        assert not check or done.returncode == 0, f"{command}\n{done.stdout[-3000:]}"
        return done.stdout

    def succeeds(self, command: str) -> bool:
        try:
            return self._shell(command, 60).returncode == 0
        except (OSError, IndexError):  # it boots
            return False

    def _shell(self, command: str, timeout: float) -> subprocess.CompletedProcess[str]:
        enter = ["nsenter", f"--target={self._init}", "--all", "--", "env", "-i"]
        environment = ["HOME=/root", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8"]
        return subprocess.run(
            [*enter, *environment, "sh", "-c", f"cd /root; {command}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    def until(self, what: Callable[[], bool], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while True:
            try:
                if what():
                    return
            except (OSError, IndexError):
                pass
            assert time.monotonic() < end, self.log.read_text()[-2000:]
            time.sleep(0.3)

    @contextmanager
    def reaches(self, url: str, port: int) -> Iterator[None]:
        """Whoever asks this machine at `port` gets to what serves at `url` outside of it."""
        host, _, there = url.removeprefix("http://").partition(":")
        listener = self._listening(port)

        def pump(source: socket.socket, target: socket.socket) -> None:
            try:
                while data := source.recv(65536):
                    target.sendall(data)
            except OSError:
                pass
            for one in (source, target):
                try:
                    one.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

        def accept() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                server = socket.create_connection((host, int(there)))
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def _listening(self, port: int) -> socket.socket:
        """A socket of its network, which a thread may enter."""
        made: list[socket.socket] = []

        def enter() -> None:
            with self._network.open() as network:
                if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            made.append(socket.create_server(("0.0.0.0", port)))

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        return made[0]


def machine(folder: Path) -> Iterator[Machine]:
    """For a fixture."""
    if reason := lacking():
        pytest.skip(reason)
    made = Machine(folder)
    try:
        made.boot()
        yield made
    finally:
        made.off()
