"""The TEI image, built by a real builder: every stage, from mirrors on loopback, and then run.

The base images cannot be had everywhere, so a Debian made on the spot stands in for them, with this
machine's Rust and nvcc from PyPI in it. nvprune, the driver and libcudart are stand-ins, and TEI is a small
project of the same shape.
What is real: the Dockerfile, the builder, git, cargo, APT, nvcc, the linker, and the container in the end.

The first run takes two minutes, most of it for Debian; what it made is kept for the next.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from extensions import tei
from tests.containers.mirrors import Mirrors, mirrors, rust_toolchain

if TYPE_CHECKING:
    from tests.containers.engine import Engine
    from tests.containers.renders import RenderTei

pytest_plugins = ["tests.containers.engine", "tests.containers.renders"]

STANDIN = Path(__file__).parent / "containers/standin"
PACKAGES = "ca-certificates,curl,g++,gcc,git,libc6-dev,libssl-dev,openssl,pkg-config,python3-venv"
ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]

EDITS = {name: ",".join(edit.name for edit in tei.every_edit(name)) for name in ("cpu", "gb10")}
CARGO_CHEF = "0.1.73"

RUNTIME = """\
FROM {debian}
RUN sed -i 's/^deb http/deb [trusted=yes] http/' /etc/apt/sources.list
"""

CUDA = """\
FROM {runtime}
COPY --from={nvcc} / /usr/local/cuda
COPY nvprune /usr/local/bin/nvprune
COPY libcuda.c /tmp/libcuda.c
WORKDIR /usr/local/cuda/lib64
RUN mkdir stubs \\
 && gcc -shared -fPIC -Wl,-soname,libcuda.so.1 -o stubs/libcuda.so /tmp/libcuda.c \\
 && echo 'int cudaRuntimeGetVersion(int *v) {{ *v = 12090; return 0; }}' > /tmp/cudart.c \\
 && gcc -shared -fPIC -Wl,-soname,libcudart.so.12 -o libcudart.so.12.9 /tmp/cudart.c \\
 && ln -s libcudart.so.12.9 libcudart.so.12 && ln -s libcudart.so.12 libcudart.so
ENV LIBRARY_PATH=/usr/local/cuda/lib64/stubs PATH=/usr/local/cuda/bin:$PATH
"""

WITHOUT_OPENSSL = """\
FROM {runtime}
RUN rm /usr/lib/*/libssl.so.3
"""


@dataclass(frozen=True, slots=True)
class Bases:
    """Names of the images that stand in for the base images."""

    runtime: str
    rust: str
    cuda: str
    without_openssl: str


def _image(engine: Engine, role: str, dockerfile: str) -> str:
    """Build an image whose name tells what it is made of, unless an earlier run did."""
    content = dockerfile + "".join(path.read_text() for path in sorted(STANDIN.iterdir()))
    name = f"standin/{role}:{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    if not engine.has(name):
        engine.docker("build", "--network=host", "-t", name, "-f", "-", STANDIN, stdin=dockerfile)
    return name


def cargo_chef() -> Path:
    """Folder whose bin/ has the cargo-chef of the Dockerfile, compiled once (a minute on two cores)."""
    from tests.containers.engine import CACHE  # above, pytest could not rewrite its assertions

    folder = CACHE / f"cargo-chef-{CARGO_CHEF}"
    if not (folder / "bin/cargo-chef").exists():
        words = ["install", "cargo-chef", "--version", CARGO_CHEF, "--locked", "--debug"]
        done = subprocess.run(
            [rust_toolchain() / "bin/cargo", *words, "--root", folder],
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
    return folder


def _rust_image(engine: Engine, runtime: str, folder: Path) -> str:
    """This machine's Rust, where the official image has its own."""
    toolchain = rust_toolchain()
    name = f"standin/rust:{toolchain.name}-{CARGO_CHEF}-{runtime.split(':')[1]}".lower()
    if not engine.has(name):
        tar = folder / "rust.tar"
        parts = ["bin/cargo", "bin/rustc", "lib"]
        subprocess.run(
            ["tar", "-cf", tar, "-C", toolchain, "--transform=s,^,usr/local/cargo/,", *parts],
            check=True,
        )
        chef = "--transform=s,^,usr/local/cargo/,"
        subprocess.run(["tar", "-rf", tar, "-C", cargo_chef(), chef, "bin/cargo-chef"], check=True)
        (folder / "context").mkdir()
        tar.rename(folder / "context/rust.tar")
        dockerfile = (
            f"FROM {runtime}\nADD rust.tar /\nRUN mkdir /usr/local/rustup\n"
            "ENV CARGO_HOME=/usr/local/cargo PATH=/usr/local/cargo/bin:$PATH\n"
        )
        engine.docker("build", "-t", name, "-f", "-", folder / "context", stdin=dockerfile)
    return name


def _nvcc_image(engine: Engine) -> str:
    """An image of nothing but CUDA's compiler and its headers."""
    from tests.containers import nvcc  # above, pytest could not rewrite its assertions

    name = f"standin/nvcc:{nvcc.VERSION}"
    if not engine.has(name):
        with tempfile.NamedTemporaryFile(suffix=".tar") as tar:
            parts = ["bin", "include", "nvvm"]
            subprocess.run(["tar", "-cf", tar.name, "-C", nvcc.toolkit(), *parts], check=True)
            engine.docker("import", tar.name, name)
    return name


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mirrors]:
    with mirrors(tmp_path_factory.mktemp("mirrors")) as started:
        yield started


@pytest.fixture(scope="module")
def bases(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Bases:
    runtime = _image(engine, "runtime", RUNTIME.format(debian=engine.debian(PACKAGES)))
    return Bases(
        runtime=runtime,
        rust=_rust_image(engine, runtime, tmp_path_factory.mktemp("rust")),
        cuda=_image(engine, "cuda", CUDA.format(runtime=runtime, nvcc=_nvcc_image(engine))),
        without_openssl=_image(engine, "without-openssl", WITHOUT_OPENSSL.format(runtime=runtime)),
    )


def _arguments(bases: Bases, served: Mirrors, **changes: str) -> list[str]:
    """The build arguments that send every download to a mirror."""
    arguments = {
        "RUST_IMAGE": bases.rust,
        "BUILD_IMAGE": bases.cuda,
        "PYTHON_IMAGE": bases.runtime,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": served.wheels,
        "RUNTIME_IMAGE": bases.runtime,
        "IMAGE_ARCHITECTURE": ARCHITECTURE,
        "GIT_BASE_URL": served.git,
        "CRATES_INDEX": served.crates,
        "APT_MIRROR": served.apt,
        # What is not sent to a mirror fails, at a port where nothing listens.
        "HTTP_PROXY": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "NO_PROXY": "127.0.0.1",
        "TEI_REF": served.tei_ref,
        "RUST_VERSION": served.rust,
        "RAYON_NUM_THREADS": "3",
    } | changes
    return [
        word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")
    ]


def _context(render_tei: RenderTei, served: Mirrors, name: str, **answers: str) -> Path:
    """What is rendered for this machine; where MKL is linked, it is the mirror's."""
    folder = render_tei(name, **answers) / "images/tei"
    if (folder / "mkl.txt").exists():
        (folder / "mkl.txt").write_text(served.mkl)
    return folder


@dataclass(frozen=True, slots=True)
class Built:
    """An image, and what was printed while it was built."""

    accelerator: str
    name: str
    log: str


of_both = pytest.mark.parametrize("built", ["cpu", "gb10"], indirect=True)
of_a_gpu = pytest.mark.parametrize("built", ["gb10"], indirect=True)


@pytest.fixture(scope="module")
def built(
    request: pytest.FixtureRequest,
    engine: Engine,
    render_tei: RenderTei,
    bases: Bases,
    served: Mirrors,
) -> Iterator[Built]:
    name = f"tei-under-test:{request.param}"
    folder = _context(render_tei, served, request.param)
    done = engine.docker("build", "--network=host", "-t", name, *_arguments(bases, served), folder)
    yield Built(request.param, name, done.stdout)
    engine.docker("image", "rm", "--force", name)


@contextmanager
def _running(engine: Engine, image: str, *options: str) -> Iterator[tuple[str, list[str]]]:
    """Start TEI as confined as a pod would be; yields the container and the lines it has printed."""
    container = engine.docker(
        *("run", "--detach", "--network=none", "--read-only", "--cap-drop=ALL"),
        *("--security-opt=no-new-privileges", *options, image, "--model-id", "/model/current"),
    ).stdout.strip()
    try:
        for _ in range(200):
            log = engine.docker("logs", container).stdout
            if "pid=" in log:
                break
            time.sleep(0.05)
        yield container, log.splitlines()
    finally:
        engine.docker("rm", "--force", container)


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The option that puts a driver into the container, where GKE puts its own."""
    folder = tmp_path_factory.mktemp("driver")
    folder.chmod(0o755)
    library = folder / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, STANDIN / "libcuda.c"], check=True)
    return f"--volume={folder}:/usr/local/nvidia/lib64:ro"


@of_both
def test_the_image_says_what_it_is(engine: Engine, built: Built, served: Mirrors) -> None:
    config = json.loads(engine.docker("image", "inspect", built.name).stdout)[0]["Config"]
    environment = dict(entry.split("=", 1) for entry in config["Env"])
    guard = [] if built.accelerator == "cpu" else ["require-gpu"]

    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == [*guard, "text-embeddings-router"]
    assert config["Cmd"] == ["--json-output"]
    assert list(config["ExposedPorts"]) == ["8355/tcp"]
    assert environment["PORT"] == "8355"
    assert config["Labels"]["org.opencontainers.image.revision"] == served.tei_ref
    assert config["Labels"]["tei.accelerator"] == built.accelerator
    assert config["Labels"]["tei.edits"] == EDITS[built.accelerator]
    if built.accelerator == "gb10":
        assert config["Labels"]["tei.cuda.version"] == "12.9.1"
        assert config["Labels"]["tei.cuda.architecture"] == "sm_121a"


@of_both
def test_tei_runs_unprivileged_and_gets_the_signal(
    engine: Engine, built: Built, served: Mirrors, gpu: str
) -> None:
    options = [] if built.accelerator == "cpu" else [gpu]
    with _running(engine, built.name, *options) as (container, lines):
        assert f"git_sha={served.tei_ref}" in lines
        assert f"docker_label={built.accelerator} edits={EDITS[built.accelerator]}" in lines
        assert "edited=true" in lines
        if built.accelerator == "cpu" and ARCHITECTURE == "amd64":
            # The static libraries are there, the shared one is not.
            mkl = "and MKL [(true, false), (true, false)]"
            assert f"kernels=with cutlass {mkl} small=42 tls=true" in lines
        assert "port=8355" in lines
        assert 'arguments=["--model-id", "/model/current"]' in lines
        assert "pid=1" in lines

        engine.docker("stop", "--time=20", container)
        assert engine.docker("wait", container).stdout.strip() == "0"
        assert engine.docker("logs", container).stdout.splitlines()[-1] == "stopped by signal 15"


@of_a_gpu
def test_nvcc_compiles_for_the_architecture_once_for_both_builds(
    engine: Engine, built: Built, gpu: str
) -> None:
    with _running(engine, built.name, gpu) as (_, lines):
        # What the dependency stage compiled; the program stage takes it as it is.
        assert "kernels=with cutlass .target sm_121a (3 at a time) small=42 tls=true" in lines
    assert built.log.count("Compiling kernels v0.8.4") == 1
    pruned = "nvprune --generate-code code=sm_120 --generate-code code=sm_121 "
    assert f"{pruned}/usr/local/cuda/lib64/libcublas_static.a" in built.log


@of_a_gpu
def test_without_a_gpu_the_container_stops_with_one_line(engine: Engine, built: Built) -> None:
    done = engine.docker("run", "--rm", "--network=none", "--read-only", built.name, check=False)

    assert done.returncode == 1
    assert done.stdout.startswith("require-gpu: no GPU in this container, not even a driver")
    assert done.stdout.count("\n") == 1


@pytest.fixture(scope="module")
def buildah(
    engine: Engine, bases: Bases, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """The environment of a Buildah that has the base images."""
    if not shutil.which("buildah"):
        pytest.skip("buildah is not installed")
    folder = tmp_path_factory.mktemp("buildah")
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{engine.store}/buildah"\nrunroot = "{folder}/run"\n'
    )
    environment = os.environ | {
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        "BUILDAH_ISOLATION": "chroot",
        "TMPDIR": str(folder),
    }
    engine.store.mkdir(exist_ok=True)
    for image in (bases.rust, bases.runtime):
        there = subprocess.run(
            ["buildah", "inspect", "--type=image", image], env=environment, capture_output=True
        )
        if there.returncode:
            engine.docker("save", "--output", folder / "image.tar", image)
            archive = f"docker-archive:{folder}/image.tar:{image}"
            subprocess.run(
                ["buildah", "pull", "--quiet", archive],
                env=environment,
                check=True,
                capture_output=True,
            )
            (folder / "image.tar").unlink()
    yield environment
    # Buildah leaves its layers mounted.
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in reversed([m for m in mounts if m.startswith(f"{engine.store}/")]):
        subprocess.run(["umount", mount], check=True)


def test_make_builds_it_with_buildah_and_cache_mounts(
    render_tei: RenderTei, bases: Bases, served: Mirrors, buildah: dict[str, str]
) -> None:
    image = "registry.example.com/text-embeddings-tei:0d124dc9773b-cpu"
    arguments = " ".join(_arguments(bases, served))
    platform = f"linux/{ARCHITECTURE}"
    folder = _context(render_tei, served, "cpu", image_platform=platform).parents[1]
    command = ["make", "-f", "images/images.mk", "tei-image", "BUILDER=buildah"]
    options = [f"TEI_BUILD_ARGS={arguments}"]

    done = subprocess.run(
        [*command, *options], cwd=folder, env=buildah, text=True, capture_output=True
    )

    assert done.returncode == 0, done.stdout[-2000:]
    assert "RUN --mount=type=cache,target=/usr/local/cargo/registry" in done.stdout
    assert "Compiling kernels" in done.stdout
    inspect = ["buildah", "inspect", "--type=image", image]
    shown = subprocess.run(inspect, env=buildah, text=True, capture_output=True, check=True)
    found = json.loads(shown.stdout)
    config = found["OCIv1"]["config"]
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["text-embeddings-router"]
    assert config["Labels"]["org.opencontainers.image.revision"] == served.tei_ref
    for remove in (["--force", found["FromImageID"]], ["--prune", "--force"]):
        subprocess.run(["buildah", "rmi", *remove], env=buildah, check=True, capture_output=True)


def _refused(
    engine: Engine,
    render_tei: RenderTei,
    bases: Bases,
    served: Mirrors,
    **changes: str,
) -> str:
    """The log of a build of the CPU image that must fail."""
    folder = _context(render_tei, served, "cpu")
    arguments = _arguments(bases, served, **changes)
    done = engine.docker("build", "--network=host", *arguments, folder, check=False)
    assert done.returncode != 0, done.stdout[-2000:]
    return done.stdout


def test_a_mirror_with_another_commit_stops_the_build(
    engine: Engine,
    render_tei: RenderTei,
    bases: Bases,
    served: Mirrors,
) -> None:
    log = _refused(
        engine, render_tei, bases, served, TEI_GIT_URL=f"{served.git}/{served.moved_tei}"
    )

    moved = subprocess.run(
        ["git", "ls-remote", f"{served.git}/{served.moved_tei}", "HEAD"],
        text=True,
        capture_output=True,
        check=True,
    ).stdout.split()[0]
    assert f"serves TEI {moved}, not {served.tei_ref}: update the mirror or set TEI_REF." in log


def test_another_rust_than_tei_wants_stops_the_build(
    engine: Engine,
    render_tei: RenderTei,
    bases: Bases,
    served: Mirrors,
) -> None:
    log = _refused(engine, render_tei, bases, served, RUST_VERSION="1.0.0")

    assert f'wants Rust "{served.rust}", not 1.0.0: set RUST_VERSION and RUST_IMAGE.' in log


def test_a_machine_of_another_architecture_stops_the_build(
    engine: Engine,
    render_tei: RenderTei,
    bases: Bases,
    served: Mirrors,
) -> None:
    log = _refused(engine, render_tei, bases, served, IMAGE_ARCHITECTURE="riscv64")

    assert f"This image is for riscv64, the builder is {ARCHITECTURE}" in log


def test_a_missing_library_stops_the_build(
    engine: Engine,
    render_tei: RenderTei,
    bases: Bases,
    served: Mirrors,
) -> None:
    log = _refused(engine, render_tei, bases, served, RUNTIME_IMAGE=bases.without_openssl)

    assert "TEI needs libssl.so.3, which the image lacks." in log


def test_the_whole_workspace_would_be_fetched_for_as_well(
    engine: Engine, render_tei: RenderTei, bases: Bases, served: Mirrors, tmp_path: Path
) -> None:
    folder = tmp_path / "tei"
    shutil.copytree(_context(render_tei, served, "cpu"), folder)
    dockerfile = (folder / "Dockerfile").read_text()
    (folder / "Dockerfile").write_text(dockerfile.replace(" --bin text-embeddings-router", ""))

    arguments = _arguments(bases, served)
    done = engine.docker("build", "--network=host", *arguments, folder, check=False)

    assert done.returncode != 0
    assert "the ONNX Runtime cannot be fetched" in done.stdout
