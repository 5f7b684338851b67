"""A company's mirrors on loopback, and behind them a small project that stands in for TEI.

The project has what makes TEI's build hard to redirect: a crate from the index, a crate from a git
repository on GitHub, in that a submodule on GitHub, and a workspace with members that the server does not
need: what one of them depends on downloads while it is built. It links OpenSSL and, for a GPU, CUDA.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]

_TEI_WORKSPACE = """\
[workspace]
members = ["backends", "backends/ort", "core", "router"]
default-members = ["backends", "backends/ort", "core", "router"]
resolver = "2"
"""

_TEI_ROUTER = """\
[package]
name = "text-embeddings-router"
version = "1.9.3"
edition = "2021"

[features]
http = []
candle = []
candle-cuda = ["kernels/cuda"]
candle-cuda-turing = ["kernels/cuda"]
dynamic-linking = []
static-linking = []
mkl = []
ort = ["text-embeddings-backend/ort"]

[dependencies]
small = "0.1"
kernels = { git = "https://github.com/huggingface/candle", rev = "%s" }
text-embeddings-backend = { path = "../backends" }
text-embeddings-core = { path = "../core" }
"""

_TEI_BACKEND = """\
[package]
name = "text-embeddings-backend"
version = "1.9.3"
edition = "2021"

[features]
ort = ["dep:text-embeddings-backend-ort"]

[dependencies]
text-embeddings-backend-ort = { path = "ort", optional = true }
"""

_TEI_MEMBER = """\
[package]
name = "%s"
version = "1.9.3"
edition = "2021"
"""

_ORT_BUILD = """\
fn main() {
    let address = "https://onnxruntime.example.invalid/static.tgz";
    let fetched = std::process::Command::new("curl").args(["-sSfL", address]).status().unwrap();
    assert!(fetched.success(), "the ONNX Runtime cannot be fetched");
}
"""

_TEI_MAIN = """\
use std::os::raw::{c_int, c_void};

#[link(name = "ssl")]
extern "C" {
    fn TLS_method() -> *const c_void;
}
extern "C" {
    fn signal(number: c_int, handler: extern "C" fn(c_int)) -> *const c_void;
    fn pause() -> c_int;
}

extern "C" fn stop(number: c_int) {
    println!("stopped by signal {number}");
    std::process::exit(0);
}

fn main() {
    let tls = unsafe { !TLS_method().is_null() };
    println!("git_sha={}", option_env!("GIT_SHA").unwrap_or("none"));
    println!("docker_label={}", option_env!("DOCKER_LABEL").unwrap_or("none"));
    println!("edited={}", text_embeddings_core::TOKENIZATION.contains("has no token"));
    println!("kernels={} small={} tls={tls}", kernels::built(), small::answer());
    println!("port={}", std::env::var("PORT").unwrap_or_default());
    println!("arguments={:?}", std::env::args().skip(1).collect::<Vec<_>>());
    println!("pid={}", std::process::id());
    unsafe {
        signal(15, stop);
        pause();
    }
}
"""

_KERNELS_BUILD = """\
use std::process::Command;

fn main() {
    let cutlass = std::fs::read_to_string("cutlass/cutlass.h").expect("cutlass is not there");
    let mut built = format!("with {}", cutlass.trim());
    if let Ok(root) = std::env::var("MKLROOT") {
        let lib = std::path::Path::new(&root).join("lib");
        built += &format!(" and MKL {:?}", ["mkl_core", "iomp5"].map(|name| {
            (lib.join(format!("lib{name}.a")).exists(), lib.join(format!("lib{name}.so")).exists())
        }));
    }
    if std::env::var("CARGO_FEATURE_CUDA").is_ok() {
        let cap: usize = std::env::var("CUDA_COMPUTE_CAP").unwrap().parse().expect("Could not parse code");
        let out = std::env::var("OUT_DIR").unwrap();
        // As bindgen_cuda 0.1.5 calls it, for candle-kernels and for candle-flash-attn.
        let object = format!("{out}/twice.o");
        for how in [["--ptx", "--output-directory", &out], ["-c", "-o", &object]] {
            let nvcc = Command::new("nvcc").arg(format!("--gpu-architecture=sm_{cap}")).args(how)
                .args(["--default-stream", "per-thread", "kernels/twice.cu"]).status().unwrap();
            assert!(nvcc.success(), "nvcc fails");
        }
        let ptx = std::fs::read_to_string(format!("{out}/twice.ptx")).unwrap();
        let target = ptx.lines().find(|line| line.starts_with(".target")).unwrap();
        built += &format!(" {target}");
        built += &format!(" ({} at a time)", std::env::var("RAYON_NUM_THREADS").unwrap());
        println!("cargo:rustc-link-search=native=/usr/local/cuda/lib64");
        println!("cargo:rustc-link-lib=dylib=cudart");
        println!("cargo:rustc-link-lib=dylib=cuda");
    }
    println!("cargo:rustc-env=BUILT={built}");
}
"""

_KERNEL = """\
extern "C" __global__ void twice(float *x) { x[threadIdx.x] *= 2.0f; }
"""

_KERNELS_LIB = """\
#[cfg(feature = "cuda")]
extern "C" {
    fn cudaRuntimeGetVersion(version: *mut i32) -> i32;
    fn cuDriverGetVersion(version: *mut i32) -> i32;
}

pub fn built() -> &'static str {
    #[cfg(feature = "cuda")]
    unsafe {
        let mut version = 0;
        cudaRuntimeGetVersion(&mut version);
        cuDriverGetVersion(&mut version);
    }
    env!("BUILT")
}
"""


@dataclass(frozen=True, slots=True)
class Mirrors:
    """Where the mirrors are, and what they serve."""

    git: str
    """Takes the place of https://github.com."""

    crates: str
    """Index of crates, in cargo's notation."""

    wheels: str
    """Has what stands in for MKL, a file in each of its parts."""

    mkl: str
    """What mkl.txt asks for there."""

    apt: str
    """Takes the place of the hosts in APT's sources; knows one release without packages."""

    tei_ref: str
    """The commit of the stand-in for TEI."""

    moved_tei: str
    """Path below `git` of a repository that has another commit of it."""

    rust: str
    """Version of Rust in the stand-in's rust-toolchain.toml."""


def _write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _git(*arguments: str, into: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=into, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _commit(folder: Path, environment: dict[str, str]) -> str:
    _git("add", "--all", ".", into=folder, environment=environment)
    _git("commit", "--quiet", "--message", "content", into=folder, environment=environment)
    return _git("rev-parse", "HEAD", into=folder, environment=environment)


def _crate(folder: Path, name: str, files: dict[str, str]) -> None:
    """A crate in the sparse index (the Cargo book, "Index format"); its name has more than three letters."""
    manifest = f'[package]\nname = "{name}"\nversion = "0.1.0"\nedition = "2021"\n'
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for path, text in {"Cargo.toml": manifest, **files}.items():
            entry = tarfile.TarInfo(f"{name}-0.1.0/{path}")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    checksum = hashlib.sha256(packed.getvalue()).hexdigest()
    row = {
        "name": name,
        "vers": "0.1.0",
        "deps": [],
        "cksum": checksum,
        "features": {},
        "yanked": False,
    }
    _write(folder, {f"index/{name[:2]}/{name[2:4]}/{name}": json.dumps(row) + "\n"})
    download = folder / f"crates/{name}/0.1.0/download"
    download.parent.mkdir(parents=True)
    download.write_bytes(packed.getvalue())


MKL = {
    "mkl_static": [
        *("lib/libmkl_intel_lp64.a", "lib/libmkl_intel_thread.a", "lib/libmkl_core.a"),
        "share/doc/mkl/licensing/third-party-programs.txt",
    ],
    "mkl_include": ["include/mkl.h"],
    "intel_openmp": ["lib/libiomp5.a", "lib/libiomp5.so"],
}
"""Files of Intel's wheels, in their folder for data."""


def _wheel(folder: Path, name: str, files: list[str]) -> str:
    """A wheel with empty files of these names; returns its line for a requirements file."""
    info = f"{name}-2026.2.0.dist-info"
    content = {f"{name}-2026.2.0.data/data/{file}": "" for file in files} | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 2026.2.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/LICENSE.txt": f"licence of {name}\n",
    }
    content[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*content, f"{info}/RECORD"])
    path = folder / f"{name}-2026.2.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in content.items():
            wheel.writestr(zipfile.ZipInfo(file), text)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{name.replace('_', '-')}==2026.2.0 --hash=sha256:{digest}\n"


def _apt(folder: Path) -> None:
    """Debian's release without a single package; APT takes it where the source says trusted=yes."""
    packages = "main/binary-amd64/Packages.gz", "main/binary-arm64/Packages.gz"
    empty = gzip.compress(b"", mtime=0)
    lines = [f" {hashlib.sha256(empty).hexdigest()} {len(empty)} {name}" for name in packages]
    release = folder / "debian/dists/bookworm"
    _write(
        release,
        {
            "Release": "Suite: bookworm\nCodename: bookworm\nComponents: main\nArchitectures: amd64 arm64\n"
            "Date: Sat, 01 Jan 2000 00:00:00 UTC\nSHA256:\n" + "\n".join(lines) + "\n"
        },
    )
    for name in packages:
        (release / name).parent.mkdir(parents=True, exist_ok=True)
        (release / name).write_bytes(empty)


def anchors_of(edit: Path) -> list[tuple[str, str]]:
    """(file, what is looked for in it: one line or several) of an edit of TEI's sources."""
    found = []
    for part in re.split(r"^file: ", edit.read_text(), flags=re.MULTILINE)[1:]:
        path, _, rest = part.partition("\n")
        for lines in re.findall(r"(?:^find: .*\n)+", rest, re.MULTILINE):
            found.append((path, re.sub("^find: ", "", lines.rstrip(), flags=re.MULTILINE)))
    return found


def anchors() -> dict[str, list[str]]:
    """What all edits of TEI's sources look for, by the file that has it."""
    found: dict[str, list[str]] = {}
    for edit in sorted((_ROOT / "template/images/tei/patches").glob("*.edit")):
        for path, text in anchors_of(edit):
            found.setdefault(path, []).append(text)
    return found


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def _http(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def _git_daemon(folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    daemon = subprocess.Popen(
        [
            "git",
            "daemon",
            "--export-all",
            "--listen=127.0.0.1",
            f"--port={port}",
            f"--base-path={folder}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert daemon.poll() is None, "git daemon did not start"
            time.sleep(0.05)
        yield f"git://127.0.0.1:{port}"
    finally:
        daemon.terminate()
        daemon.wait()


def rust_toolchain() -> Path:
    """Folder of this machine's own Rust: rustup's proxies would look at rust-toolchain.toml first."""
    if not shutil.which("cargo"):
        pytest.skip("cargo is not installed: nothing can stand in for Rust's image")
    done = subprocess.run(
        ["rustc", "--print", "sysroot"], text=True, capture_output=True, check=True
    )
    return Path(done.stdout.strip())


@contextmanager
def mirrors(folder: Path) -> Iterator[Mirrors]:
    """Serve all of it from `folder` until the context ends."""
    toolchain = rust_toolchain()
    git, http = folder / "git", folder / "http"
    git.mkdir(parents=True)
    version = subprocess.run(
        [toolchain / "bin/rustc", "--version"], text=True, capture_output=True, check=True
    )
    rust = version.stdout.split()[1]
    with _http(http) as http_url, _git_daemon(git) as git_url:
        settings = folder / "gitconfig"
        settings.write_text(
            f'[url "{git_url}/"]\n\tinsteadOf = https://github.com/\n'
            "[user]\n\tname = Test\n\temail = test@example.com\n"
            "[init]\n\tdefaultBranch = main\n[protocol]\n\tallow = always\n"
        )
        environment = os.environ | {
            "GIT_CONFIG_GLOBAL": str(settings),
            "GIT_CONFIG_NOSYSTEM": "1",
            # The same commits in every run: a layer that was built once need not be built again.
            "GIT_AUTHOR_DATE": "2000-01-01T00:00:00Z",
            "GIT_COMMITTER_DATE": "2000-01-01T00:00:00Z",
        }

        def repository(name: str, files: dict[str, str]) -> Path:
            path = git / name
            path.mkdir(parents=True)
            _git("init", "--quiet", ".", into=path, environment=environment)
            _write(path, files)
            return path

        _write(http, {"index/config.json": json.dumps({"dl": f"{http_url}/crates"})})
        _crate(http, "small", {"src/lib.rs": "pub fn answer() -> u32 { 42 }\n"})
        _crate(http, "ort-sys", {"build.rs": _ORT_BUILD, "src/lib.rs": ""})
        _apt(http / "apt")
        (http / "wheels").mkdir()
        asked = [_wheel(http / "wheels", name, files) for name, files in MKL.items()]
        _commit(repository("NVIDIA/cutlass.git", {"cutlass.h": "cutlass\n"}), environment)
        kernels = repository(
            "huggingface/candle",
            {
                "Cargo.toml": '[package]\nname = "kernels"\nversion = "0.8.4"\nedition = "2021"\n'
                "[features]\ncuda = []\n",
                "build.rs": _KERNELS_BUILD,
                "kernels/twice.cu": _KERNEL,
                "src/lib.rs": _KERNELS_LIB,
            },
        )
        _git(
            *("submodule", "--quiet", "add", "https://github.com/NVIDIA/cutlass.git", "cutlass"),
            into=kernels,
            environment=environment,
        )
        revision = _commit(kernels, environment)
        tei_files = {
            # What the edits look for.
            **{path: "/*\n" + "\n".join(texts) + "\n*/\n" for path, texts in anchors().items()},
            "Cargo.toml": _TEI_WORKSPACE,
            "router/Cargo.toml": _TEI_ROUTER % revision,
            "router/src/main.rs": _TEI_MAIN,
            "backends/Cargo.toml": _TEI_BACKEND,
            "backends/ort/Cargo.toml": _TEI_MEMBER % "text-embeddings-backend-ort"
            + '\n[dependencies]\nort-sys = "0.1"\n',
            "backends/ort/src/lib.rs": "",
            "core/Cargo.toml": _TEI_MEMBER % "text-embeddings-core",
            "core/src/lib.rs": 'pub const TOKENIZATION: &str = include_str!("tokenization.rs");\n',
            "rust-toolchain.toml": f'[toolchain]\nchannel = "{rust}"\ncomponents = ["rustfmt", "clippy"]\n',
            ".cargo/config.toml": '[build]\nrustflags = ["-C", "target-cpu=no-such-cpu"]\n',
        }
        tei = repository("huggingface/text-embeddings-inference", tei_files)
        home = folder / "cargo"
        _write(
            home,
            {
                "config.toml": '[source.crates-io]\nreplace-with = "mirror"\n'
                f'[source.mirror]\nregistry = "sparse+{http_url}/index/"\n'
            },
        )
        subprocess.run(
            [toolchain / "bin/cargo", "generate-lockfile", "--quiet"],
            cwd=tei,
            env=environment | {"CARGO_HOME": str(home), "CARGO_NET_GIT_FETCH_WITH_CLI": "true"},
            check=True,
        )
        moved = repository(
            "moved/text-embeddings-inference", tei_files | {"README.md": "another\n"}
        )
        _commit(moved, environment)
        yield Mirrors(
            git=git_url,
            crates=f"sparse+{http_url}/index/",
            wheels=f"{http_url}/wheels/",
            mkl="".join(asked),
            apt=f"{http_url}/apt",
            tei_ref=_commit(tei, environment),
            moved_tei="moved/text-embeddings-inference",
            rust=rust,
        )
