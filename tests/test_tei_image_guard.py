"""The guard at TEI's start, against a driver that answers what the test wants."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "template/images/tei/require-gpu.c"
DOCKERFILE = SOURCE.parent / "Dockerfile.jinja"
DRIVER = Path(__file__).parent / "containers/standin/libcuda.c"

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guard of the GB10 image, beside a stub of the router that tells who it is."""
    folder = tmp_path_factory.mktemp("guard")
    (folder / "driver").mkdir()
    flags = ["-O2", "-Wall", "-Wextra", "-Werror"]
    # As the Dockerfile compiles it.
    line = re.search(r"^RUN gcc (.*?)-DFIRST", DOCKERFILE.read_text(), re.MULTILINE | re.DOTALL)
    assert line is not None
    own = line[1].replace("\\\n", " ").split()
    limits = ["-DFIRST_CAPABILITY=121", "-DLAST_CAPABILITY=121", "-DOLDEST_DRIVER=12090"]
    subprocess.run(["gcc", *own, *limits, "-o", folder / "require-gpu", SOURCE], check=True)
    driver = folder / "driver/libcuda.so.1"
    subprocess.run(["gcc", *flags, "-shared", "-fPIC", "-o", driver, DRIVER], check=True)
    router = folder / "text-embeddings-router"
    router.write_text('#!/bin/sh\necho "router $$ $*"\n')
    router.chmod(0o755)
    return folder


def start(guard: Path, *, driver: bool = True, **settings: object) -> subprocess.Popen[str]:
    environment = {
        "PATH": f"{guard}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": str(guard / "driver") if driver else "/nonexistent",
    } | {name: str(value) for name, value in settings.items()}
    return subprocess.Popen(
        [guard / "require-gpu", "text-embeddings-router", "--port", "8355"],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_the_guard_is_hardened(guard: Path) -> None:
    def shown(what: str) -> str:
        command = ["readelf", "--wide", what, guard / "require-gpu"]
        return subprocess.run(command, text=True, capture_output=True, check=True).stdout

    assert re.search(r"FLAGS_1\).*NOW.*PIE", shown("--dynamic"))
    assert "GNU_RELRO" in shown("--program-headers")
    symbols = shown("--symbols")
    assert "__stack_chk_fail" in symbols
    assert "__vfprintf_chk" in symbols, "-D_FORTIFY_SOURCE"


def test_with_the_right_gpu_the_router_takes_the_guards_place(guard: Path) -> None:
    process = start(guard)
    out, err = process.communicate()

    assert out == f"router {process.pid} --port 8355\n"
    assert err == "require-gpu: Fake GPU 0, compute capability 12.1, driver for CUDA 13.0\n"
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"driver": False}, "no GPU in this container, not even a driver (libcuda.so.1): ask for"),
        (
            {"FAKE_CUDA_ERROR": 100},
            "the GPU cannot be used, cuInit says: no CUDA-capable device is detected (CUDA error 100)",
        ),
        ({"FAKE_CUDA_ERROR": 999}, "the GPU cannot be used, cuInit says: some other error"),
        ({"FAKE_CUDA_DEVICES": 0}, "the driver shows no GPU in this container"),
        (
            {"FAKE_CUDA_CAPABILITY": 120},
            "Fake GPU 0 has compute capability 12.0, this image is for 12.1 to 12.1",
        ),
        ({"FAKE_CUDA_CAPABILITY": 90}, "Fake GPU 0 has compute capability 9.0"),
        ({"FAKE_CUDA_VERSION": 12080}, "the driver is for CUDA 12.8, this image needs 12.9"),
    ],
)
def test_without_a_usable_gpu_the_router_does_not_start(
    guard: Path, settings: dict[str, object], sentence: str
) -> None:
    process = start(guard, **settings)  # type: ignore[arg-type]
    out, err = process.communicate()

    assert out == ""
    assert err.startswith(f"require-gpu: {sentence}")
    assert err.count("\n") == 1
    assert process.returncode == 1


@pytest.mark.parametrize("driver", [True, False])
def test_the_check_can_be_switched_off(guard: Path, driver: bool) -> None:
    process = start(guard, driver=driver, FAKE_CUDA_ERROR=100, TEI_ALLOW_CPU="true")
    out, err = process.communicate()

    assert out == f"router {process.pid} --port 8355\n"
    assert err == "require-gpu: TEI_ALLOW_CPU=true, not looking for a GPU\n"


def test_only_the_word_true_switches_it_off(guard: Path) -> None:
    process = start(guard, FAKE_CUDA_ERROR=100, TEI_ALLOW_CPU="false")
    process.communicate()

    assert process.returncode == 1


def test_a_program_that_is_not_there_is_named(guard: Path) -> None:
    (guard / "elsewhere").mkdir(exist_ok=True)
    done = subprocess.run(
        [guard / "require-gpu", "no-such-program"],
        env={"PATH": str(guard / "elsewhere"), "LD_LIBRARY_PATH": str(guard / "driver")},
        text=True,
        capture_output=True,
    )

    assert done.returncode == 127
    assert done.stderr.splitlines()[-1] == "require-gpu: cannot start no-such-program"
