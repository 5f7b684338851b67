"""`make image`, `make push` and their siblings, with builders that only tell how they were called."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.containers.renders import RenderTei

pytest_plugins = ["tests.containers.renders"]

MOUNTS = (
    "--mount=type=cache,target=/usr/local/cargo/registry "
    "--mount=type=cache,target=/usr/local/cargo/git "
)
NAME = "registry.example.com/text-embeddings-tei"
DIGEST = "sha256:" + "0123456789abcdef" * 4
ALL = ("model-fetch", "smoke", "tei")

# Answers `version` and the like, tells every other call, keeps a Dockerfile that it is given; pushes nothing.
BUILDER = """\
#!/bin/sh
case "$*" in
"version --format {{{{.Server.Arch}}}}"|"info --format {{{{.Host.Arch}}}}") echo {architecture}; exit ;;
version*) exit {engine} ;;
"buildx version") exit {buildx} ;;
"image inspect"*) echo '["other.example.com/x@sha256:00", "{name}@{digest}"]'; exit ;;
esac
echo "$(basename "$0") $*" DOCKER_BUILDKIT=${{DOCKER_BUILDKIT-}} >> {calls}
while [ $# -gt 0 ]; do
    case $1 in
    -f) cat > {stdin} ;;
    --digestfile) echo {digest} > "$2" ;;
    esac
    shift
done
"""


@pytest.fixture
def repository(render_tei: RenderTei, tmp_path: Path) -> Path:
    """The rendered repository, with a Makefile that includes the fragment as the real one does."""
    folder = tmp_path / "repository"
    shutil.copytree(render_tei("gb10"), folder)
    (folder / "Makefile").write_text("include images/images.mk\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "sed", "cat", "make", "basename", "python3"):
        found = shutil.which(tool)
        assert found is not None
        (tools / tool).symlink_to(Path(found).resolve() if tool == "python3" else found)
    return folder


def install(
    repository: Path,
    name: str,
    *,
    engine: bool = True,
    buildx: bool = False,
    architecture: str = "arm64",
    image: str = NAME,
) -> None:
    """Put a builder onto PATH: one whose engine answers or not, and that knows buildx or not."""
    path = repository.parent / "bin" / name
    calls, stdin = repository.parent / "calls", repository.parent / "stdin"
    path.write_text(
        BUILDER.format(
            engine=int(not engine),
            buildx=int(not buildx),
            architecture=architecture,
            name=image,
            digest=DIGEST,
            calls=calls,
            stdin=stdin,
        )
    )
    path.chmod(0o755)


def make(
    repository: Path, *arguments: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run make with the installed builders alone; returns it and how they were called."""
    path = {"PATH": str(repository.parent / "bin"), "HOME": os.environ["HOME"]}
    done = subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=repository,
        env=path | environment,
        text=True,
        capture_output=True,
    )
    calls = repository.parent / "calls"
    return done, calls.read_text().splitlines() if calls.exists() else []


def reference(repository: Path, key: str = "tei") -> str:
    """The image as it is pushed: name and tag, with its content."""
    command = ["python3", "scripts/images.py", "tag", key]
    done = subprocess.run(command, cwd=repository, text=True, capture_output=True, check=True)
    return done.stdout.strip()


def written(repository: Path) -> str:
    path = repository / "k8s/images/kustomization.yaml"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize(
    ("builder", "buildx", "command"),
    [
        ("docker", True, "docker buildx build --load"),
        ("podman", False, "podman build --layers"),
    ],
)
def test_a_builder_with_cache_mounts_gets_them_on_cargo_alone(
    repository: Path, builder: str, buildx: bool, command: str
) -> None:
    install(repository, builder, buildx=buildx)
    given = "TEI_BUILD_ARGS=--build-arg RAYON_NUM_THREADS=2"
    done, calls = make(repository, "tei-image", given)

    assert done.returncode == 0, done.stderr
    options = "--platform linux/arm64 --build-arg RAYON_NUM_THREADS=2"
    tags = f"-t {reference(repository)} -t {NAME}:0d124dc9773b-gb10"
    assert calls == [f"{command} {options} {tags} -f - images/tei DOCKER_BUILDKIT="]
    plain = (repository / "images/tei/Dockerfile").read_text()
    read = (repository.parent / "stdin").read_text()
    assert read.count(MOUNTS) == plain.count("\nRUN cargo ") == 4
    assert read.replace(MOUNTS, "") == plain


def test_the_classic_docker_builder_gets_the_file_as_it_is(repository: Path) -> None:
    install(repository, "docker")
    done, calls = make(repository, "tei-image")

    assert done.returncode == 0, done.stderr
    tags = f"-t {reference(repository)} -t {NAME}:0d124dc9773b-gb10"
    assert calls == [f"docker build {tags} images/tei DOCKER_BUILDKIT=0"]


def test_all_three_are_built_for_the_nodes_with_what_all_and_each_are_given(
    repository: Path,
) -> None:
    install(repository, "podman")
    proxy = "BUILD_ARGS=--build-arg HTTPS_PROXY=http://proxy.example.com:3128"
    own = [f"{key.upper().replace('-', '_')}_BUILD_ARGS=--build-arg OF={key}" for key in ALL]
    done, calls = make(repository, "image", proxy, *own)

    assert done.returncode == 0, done.stderr
    assert len(calls) == 3
    for key, call in zip(ALL, calls, strict=True):
        assert "podman build --layers --platform linux/arm64 --build-arg HTTPS_PROXY=" in call
        assert f"--build-arg OF={key}" in call
        assert f" -t {reference(repository, key)} " in call
    version = reference(repository, "model-fetch").rpartition("-")
    assert "--build-arg VERSION=1.0.0" in calls[0]
    assert f"--build-arg REVISION={version[2]}" in calls[0]


def test_arguments_may_come_from_the_environment(repository: Path) -> None:
    install(repository, "podman")
    _, calls = make(repository, "smoke-image", BUILD_ARGS="--build-arg PIP_INDEX_URL='a b'")

    assert "--build-arg PIP_INDEX_URL=a b " in calls[0]


@pytest.mark.parametrize("key", ALL)
@pytest.mark.parametrize("builder", ["docker", "podman"])
def test_a_wrong_machine_is_said_before_anything_is_built(
    repository: Path, key: str, builder: str
) -> None:
    install(repository, builder, architecture="amd64", buildx=True)
    done, calls = make(repository, f"{key}-image")

    assert done.returncode != 0
    said = f"images: {key} is for linux/arm64, and {builder} builds on linux/amd64: build on a "
    assert done.stderr.splitlines()[0].startswith(said)
    assert done.stdout == ""
    assert calls == []

    done, calls = make(repository, f"{key}-image", "EMULATE=1")
    assert done.returncode == 0, done.stderr
    assert "--platform linux/arm64" in calls[0]


def test_buildah_builds_on_this_very_machine(repository: Path) -> None:
    install(repository, "buildah")
    done, _ = make(repository, "smoke-image")

    assert (done.returncode == 0) == (platform.machine() in ("aarch64", "arm64"))


def test_docker_without_an_engine_is_passed_over(repository: Path) -> None:
    install(repository, "docker", engine=False)
    install(repository, "podman")
    done, calls = make(repository, "tei-push")

    assert done.returncode == 0, done.stderr
    assert all(call.startswith("podman push --digestfile ") for call in calls)


def test_a_named_builder_is_taken(repository: Path) -> None:
    install(repository, "docker")
    install(repository, "podman")
    _, calls = make(repository, "tei-push", "BUILDER=podman")
    assert calls[0].startswith("podman ")

    done, _ = make(repository, "smoke-push", "BUILDER=buildah")
    assert done.returncode != 0
    assert done.stderr.startswith("images: BUILDER=buildah does not answer")


def test_it_is_said_before_what_it_takes(repository: Path) -> None:
    install(repository, "podman")
    done, _ = make(repository, "tei-image")

    lines = done.stdout.splitlines()
    assert lines[0] == f"Building {reference(repository)}."
    assert lines[1].startswith("Takes: about an hour on a DGX Spark")
    assert lines[2].startswith("Needs: linux/arm64, 24 GiB of memory, 60 GiB of disk, no GPU")


def test_without_a_builder_one_line_says_what_to_do(repository: Path) -> None:
    done, _ = make(repository, "tei-image")

    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == (
        "images: neither docker nor podman nor buildah answers: install or start one of them."
    )


@pytest.mark.parametrize("target", ["tei-image", "tei-push"])
def test_a_builder_that_fails_fails_make_in_one_line(repository: Path, target: str) -> None:
    install(repository, "podman")
    podman = repository.parent / "bin/podman"
    podman.write_text(podman.read_text() + "exit 3\n")
    done, _ = make(repository, target)

    assert done.returncode != 0
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("images: ")]
    assert "podman did not build tei" in said or "registry.example.com did not take" in said
    assert "Traceback" not in done.stderr
    assert written(repository) == ""


@pytest.mark.parametrize(
    ("line", "why"),
    [
        # As cargo 1.95, git 2.39, docker 20.10, BuildKit and Buildah 1.28 say it.
        ("error: no matching package named `small` found", "the index of crates lacks small"),
        (
            "error: failed to download from `http://127.0.0.1/dl/anyhow/1.0.75/download`",
            "http://127.0.0.1/dl/anyhow/1.0.75/download cannot be downloaded",
        ),
        (
            "fatal: remote error: access denied or repository not exported: /NVIDIA/cutlass.git",
            "there is no git repository /NVIDIA/cutlass.git",
        ),
        (
            "#9 1.25 fatal: repository 'https://git.example.com/no/such/' not found",
            "there is no git repository https://git.example.com/no/such",
        ),
        (
            "pull access denied for mirror/rust, repository does not exist or may require 'docker login'",
            "the base image cannot be had, pull access denied for mirror/rust",
        ),
        (
            "ERROR: failed to resolve source metadata for a.example/r:1: a.example/r:1: not found",
            "the base image a.example/r:1 cannot be had",
        ),
        (
            "Error: creating build container: initializing source docker://a.example/r:1: reading manifest 1",
            "the base image a.example/r:1 cannot be had",
        ),
        ("write /src/target/x.rlib: no space left on device", "the builder's disk is full"),
        (
            "error: could not write: No space left on device (os error 28)",
            "the builder's disk is full",
        ),
        (
            'Get "http://127.0.0.1:9/v2/": dial tcp 127.0.0.1:9: connect: connection refused',
            "the registry 127.0.0.1:9 cannot be reached, dial tcp 127.0.0.1:9: connect: connection refused",
        ),
        (
            "fatal: unable to access 'http://a.example/x/tei/': Failed to connect to a.example port 80",
            "http://a.example/x/tei cannot be had, Failed to connect to a.example port 80",
        ),
        ("fatal: unable to connect to 127.0.0.1:", "git is unable to connect to 127.0.0.1"),
        (
            "  config.json not found in registry",
            "CRATES_INDEX is no index of crates: it has no config.json",
        ),
        (
            "E: Failed to fetch http://127.0.0.1/apt/debian/pool/o.deb  404  Not Found",
            "http://127.0.0.1/apt/debian/pool/o.deb cannot be fetched",
        ),
        ("E: Unable to locate package openssl", "APT's mirror lacks the package openssl"),
        ("(signal: 9, SIGKILL: kill)", "the machine ended it for want of memory"),
        (
            'TEI 0d124dc9773b wants Rust "1.92.0", not 1.0.0: set RUST_VERSION and RUST_IMAGE.',
            'TEI 0d124dc9773b wants Rust "1.92.0", not 1.0.0: set RUST_VERSION and RUST_IMAGE',
        ),
        ("\x1b[91mpatches: queue: the anchor is not there", "queue: the anchor is not there"),
        # A reason that is not the last line: where it failed comes after it.
        (
            "No space left on device (os error 28)\nerror: could not compile `tokio` (lib)",
            "the builder's disk is full",
        ),
        # Neither the text of a step, nor an edit that was made, nor what is tried again is a reason.
        ("patches: core/src/queue.rs", None),
        ("warning: failed to download from `http://127.0.0.1/x`, 3 tries remaining", None),
        ('Step 9/67 : RUN echo "TEI ${TEI_REF} wants Rust x"', None),
    ],
)
def test_why_a_build_failed_is_in_that_line(repository: Path, line: str, why: str | None) -> None:
    install(repository, "podman")
    podman = repository.parent / "bin/podman"
    log = repository.parent / "log"
    log.write_text(f"STEP 1\n{line}\nError: exit status 1\n")
    podman.write_text(podman.read_text() + f"cat {log} >&2\nexit 1\n")
    done, _ = make(repository, "tei-image")

    (said,) = [line for line in done.stderr.splitlines() if line.startswith("images: ")]
    assert (
        said
        == f"images: podman did not build tei{f': {why}' if why else '; the lines above say why'}."
    )
    assert line in done.stdout


@pytest.mark.parametrize(
    ("line", "where"),
    [
        (
            "error: failed to run custom build command for `candle-kernels v0.8.4 (/c)`",
            "candle-kernels v0.8.4",
        ),
        ("error: could not compile `text-embeddings-router` (bin)", "text-embeddings-router"),
    ],
)
def test_a_build_that_failed_for_reasons_of_its_own_says_where(
    repository: Path, line: str, where: str
) -> None:
    install(repository, "docker")
    docker = repository.parent / "bin/docker"
    docker.write_text(
        docker.read_text() + f"echo 'patches: core/src/queue.rs'\necho '{line}'\nexit 1\n"
    )
    done, _ = make(repository, "tei-image")

    (said,) = [line for line in done.stderr.splitlines() if line.startswith("images: ")]
    assert (
        said
        == f"images: docker did not build tei: {where} cannot be compiled; the lines above say why."
    )


def test_a_push_without_a_digest_is_not_written(repository: Path) -> None:
    install(repository, "docker", image="registry.example.com/another")
    done, _ = make(repository, "tei-push")

    assert done.returncode != 0
    assert "does not say under which digest" in done.stderr
    assert written(repository) == ""


def test_what_is_pushed_is_what_runs(repository: Path) -> None:
    install(repository, "docker")
    done, calls = make(repository, "tei-push")

    assert done.returncode == 0, done.stderr
    tag = reference(repository).rpartition(":")[2]
    assert [call.split()[2] for call in calls] == [f"{NAME}:{tag}", f"{NAME}:0d124dc9773b-gb10"]
    assert written(repository).endswith(
        f'images:\n  - name: {NAME}\n    newTag: "{tag}"\n    digest: {DIGEST}\n'
    )
    # Once more, and nothing happens; unless it is asked for.
    before = len(calls)
    for target in ("tei-image", "tei-push"):
        done, calls = make(repository, target)
        assert done.stdout.startswith(f"tei: unchanged since it was pushed ({NAME}:{tag})")
    assert len(calls) == before
    done, calls = make(repository, "tei-image", "tei-push", "FORCE=1")
    assert len(calls) == before + 3


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("images/tei/Dockerfile", True),
        ("images/tei/require-gpu.c", True),
        ("images/tei/patches/queue.edit", True),
        ("images/tei/patches/apply.pl", True),
        ("images/tei/README.md", False),
        ("images/model-fetch/model_fetch/__init__.py", False),
        ("smoke/smoke.py", False),
    ],
)
def test_the_tag_of_tei_changes_with_what_it_is_built_from(
    repository: Path, file: str, changes: bool
) -> None:
    before = reference(repository)
    assert re.fullmatch(rf"{NAME}:0d124dc9773b-gb10-[0-9a-f]{{8}}", before)
    with (repository / file).open("a") as opened:
        opened.write("\n")

    assert (reference(repository) != before) == changes


@pytest.mark.parametrize(
    ("key", "file", "changes"),
    [
        ("model-fetch", "images/model-fetch/model_fetch/__init__.py", True),
        ("model-fetch", "images/model-fetch/model_fetch/new.py", True),
        ("model-fetch", "images/model-fetch/requirements.txt", True),
        ("model-fetch", "images/model-fetch/model_fetch/__pycache__/x.pyc", False),
        ("model-fetch", "images/model-fetch/README.md", False),
        ("smoke", "smoke/smoke.py", True),
        ("smoke", "smoke/expected.json", False),
    ],
)
def test_so_do_the_others(repository: Path, key: str, file: str, changes: bool) -> None:
    before = reference(repository, key)
    (repository / file).parent.mkdir(exist_ok=True)
    with (repository / file).open("a") as opened:
        opened.write("\n")

    assert (reference(repository, key) != before) == changes


def test_a_name_counts_as_well(repository: Path) -> None:
    before = reference(repository, "model-fetch")
    package = repository / "images/model-fetch/model_fetch"
    (package / "__init__.py").rename(package / "other.py")

    assert reference(repository, "model-fetch") != before


@pytest.mark.parametrize("digest", ["", "latest", "sha256:0", DIGEST])
def test_what_the_cluster_built_is_written_by_its_digest(repository: Path, digest: str) -> None:
    kubectl = repository.parent / "bin/kubectl"
    kubectl.write_text(f"#!/bin/sh\necho '{digest}'\n")
    kubectl.chmod(0o755)
    done, _ = make(repository, "tei-digest")

    assert (done.returncode == 0) == (digest == DIGEST)
    assert (DIGEST in written(repository)) == (digest == DIGEST)
    if digest != DIGEST:
        assert "is no digest of an image: has the build ended well?" in done.stderr


def test_the_cluster_is_not_asked_to_build_without_a_login_to_the_registry(
    repository: Path,
) -> None:
    kubectl = repository.parent / "bin/kubectl"
    kubectl.write_text(
        f'#!/bin/sh\necho "kubectl $*" >> {repository.parent / "calls"}\n'
        'case " $* " in *" get secret "*) exit 1 ;; esac\n'
    )
    kubectl.chmod(0o755)
    done, calls = make(repository, "tei-image-in-cluster")

    assert done.returncode != 0
    assert "create it as images/tei/README.md says" in done.stderr
    assert calls == [
        "kubectl --namespace text-embeddings-build get secret text-embeddings-registry"
    ]


CLUSTER = """\
#!/bin/sh
echo "kubectl $*" >> {calls}
case "$*" in
*status.phase*) echo "{phase}" ;;
*metadata.name*) echo "{pod}" ;;
*"get events"*) echo "FailedCreate: forbidden: violates PodSecurity" ;;
esac
"""


@pytest.mark.parametrize(
    ("phase", "pod", "ends_well", "told"),
    [
        ("Running", "a-pod", True, False),
        ("Pending", "a-pod", True, True),  # it may be pulling its image
        ("", "", False, True),
    ],
)
def test_the_cluster_gets_a_new_job_and_what_keeps_it_is_said(
    repository: Path, phase: str, pod: str, ends_well: bool, told: bool
) -> None:
    kubectl = repository.parent / "bin/kubectl"
    kubectl.write_text(CLUSTER.format(calls=repository.parent / "calls", phase=phase, pod=pod))
    kubectl.chmod(0o755)
    for tool in ("sleep", "tail"):
        (repository.parent / "bin" / tool).symlink_to(str(shutil.which(tool)))
    done, calls = make(repository, "tei-image-in-cluster", JOB_POLL_SECONDS="0")

    assert (done.returncode == 0) == ends_well, done.stderr
    assert ("FailedCreate: forbidden: violates PodSecurity" in done.stderr) == told
    assert ("make tei-digest" in done.stdout) == ends_well
    namespace = "kubectl --namespace text-embeddings-build"
    assert calls[:3] == [
        f"{namespace} get secret text-embeddings-registry",
        f"{namespace} delete job text-embeddings-tei-build --ignore-not-found",
        "kubectl apply -k k8s/build",
    ]


def test_the_content_of_all_is_listed_by_the_tool_that_is_there(repository: Path) -> None:
    done, _ = make(repository, "sbom")
    assert done.returncode != 0
    assert "neither syft nor trivy is installed" in done.stderr

    install(repository, "trivy")
    done, calls = make(repository, "sbom")
    assert done.returncode == 0, done.stderr
    for key, call in zip(ALL, calls, strict=True):
        listed = f"trivy image --format spdx-json --output {key}.spdx.json"
        assert call == f"{listed} {reference(repository, key)} DOCKER_BUILDKIT="


def test_what_was_pushed_is_signed_by_its_digest(repository: Path) -> None:
    install(repository, "cosign")
    done, _ = make(repository, "sign")
    assert done.returncode != 0
    assert "model-fetch was not pushed yet: make model-fetch-push" in done.stderr

    install(repository, "podman")
    make(repository, "push")
    (repository.parent / "calls").unlink()
    done, calls = make(repository, "sign", "COSIGN_ARGS=--key own.key")
    assert done.returncode == 0, done.stderr
    names = [f"registry.example.com/text-embeddings-{key}" for key in ALL]
    assert calls == [
        f"cosign sign --key own.key {name}@{DIGEST} DOCKER_BUILDKIT=" for name in names
    ]


def test_the_official_image_is_neither_built_nor_pushed(
    render_tei: RenderTei, tmp_path: Path
) -> None:
    folder = render_tei("l4", tei_image="official", image_platform="linux/amd64")

    assert list(json.loads((folder / "images/images.json").read_text())["images"]) == [
        "model-fetch",
        "smoke",
    ]
    command = ["make", "-f", "images/images.mk", "tei-image"]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True)
    assert done.stdout.startswith("Nothing to build: ghcr.io/huggingface/")
    assert not (folder / "images/tei").exists()
