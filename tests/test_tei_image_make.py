"""`make tei-image` and its siblings, with builders that only tell how they were called."""

from __future__ import annotations

import os
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
IMAGE = "registry.example.com/text-embeddings-tei:0d124dc9773b-gb10"

BUILDER = """\
#!/bin/sh
[ "$1" != version ] || exit {engine}
[ "$1 $2" != "buildx version" ] || exit {buildx}
echo "$(basename "$0") $*" DOCKER_BUILDKIT=${{DOCKER_BUILDKIT-}} >> {calls}
case " $* " in *" -f - "*) cat > {stdin} ;; esac
"""


@pytest.fixture
def repository(render_tei: RenderTei, tmp_path: Path) -> Path:
    """The rendered repository, with a Makefile that includes the fragment as the real one does."""
    folder = tmp_path / "repository"
    shutil.copytree(render_tei("gb10"), folder)
    (folder / "Makefile").write_text("include images/tei/tei.mk\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "sed", "cat", "make", "basename"):
        found = shutil.which(tool)
        assert found is not None
        (tools / tool).symlink_to(found)
    return folder


def install(repository: Path, name: str, *, engine: bool = True, buildx: bool = False) -> None:
    """Put a builder onto PATH: one whose engine answers or not, and that knows buildx or not."""
    path = repository.parent / "bin" / name
    calls, stdin = repository.parent / "calls", repository.parent / "stdin"
    path.write_text(
        BUILDER.format(engine=int(not engine), buildx=int(not buildx), calls=calls, stdin=stdin)
    )
    path.chmod(0o755)


def make(repository: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run make with the installed builders alone; returns it and how they were called."""
    done = subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=repository,
        env={"PATH": str(repository.parent / "bin"), "HOME": os.environ["HOME"]},
        text=True,
        capture_output=True,
    )
    calls = repository.parent / "calls"
    return done, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize(
    ("builder", "buildx", "command"),
    [
        ("docker", True, "docker buildx build --load"),
        ("podman", False, "podman build --layers"),
        ("buildah", False, "buildah build --layers"),
    ],
)
def test_a_builder_with_cache_mounts_gets_them_on_cargo_alone(
    repository: Path, builder: str, buildx: bool, command: str
) -> None:
    install(repository, builder, buildx=buildx)
    done, calls = make(repository, "tei-image", "TEI_BUILD_ARGS=--build-arg RAYON_NUM_THREADS=2")

    assert done.returncode == 0, done.stderr
    options = "--platform linux/arm64 --build-arg RAYON_NUM_THREADS=2"
    assert calls == [f"{command} {options} -t {IMAGE} -f - images/tei DOCKER_BUILDKIT="]
    plain = (repository / "images/tei/Dockerfile").read_text()
    given = (repository.parent / "stdin").read_text()
    assert given.count(MOUNTS) == plain.count("\nRUN cargo ") == 4
    assert given.replace(MOUNTS, "") == plain


def test_the_classic_docker_builder_gets_the_file_as_it_is(repository: Path) -> None:
    install(repository, "docker")
    done, calls = make(repository, "tei-image")

    assert done.returncode == 0, done.stderr
    assert calls == [f"docker build -t {IMAGE} images/tei DOCKER_BUILDKIT=0"]


def test_docker_without_an_engine_is_passed_over(repository: Path) -> None:
    install(repository, "docker", engine=False)
    install(repository, "podman")
    done, calls = make(repository, "tei-push")

    assert done.returncode == 0, done.stderr
    assert calls == [f"podman push {IMAGE} DOCKER_BUILDKIT="]


def test_a_named_builder_is_taken(repository: Path) -> None:
    install(repository, "docker")
    install(repository, "buildah")
    _, calls = make(repository, "tei-push", "BUILDER=buildah")

    assert calls == [f"buildah push {IMAGE} DOCKER_BUILDKIT="]


def test_it_is_said_before_what_it_takes(repository: Path) -> None:
    install(repository, "podman")
    done, _ = make(repository, "tei-image")

    lines = done.stdout.splitlines()
    assert lines[0] == f"Building {IMAGE}."
    assert lines[1].startswith("Takes: About an hour on a DGX Spark")
    assert lines[2].startswith("Needs: linux/arm64, 24 GiB of memory, 60 GiB of disk, no GPU")


def test_without_a_builder_one_line_says_what_to_do(repository: Path) -> None:
    done, _ = make(repository, "tei-image")

    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == (
        "Neither docker nor podman nor buildah answers: install one, "
        "or build TEI in the cluster with 'make tei-image-in-cluster'."
    )


def test_a_failed_build_fails_make(repository: Path) -> None:
    install(repository, "podman")
    podman = repository.parent / "bin/podman"
    podman.write_text(podman.read_text() + 'case "$1" in build) exit 3 ;; esac\n')
    done, _ = make(repository, "tei-image")

    assert done.returncode != 0


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
    assert calls == ["kubectl --namespace text-embeddings get secret text-embeddings-registry"]


def test_the_cluster_gets_a_new_job(repository: Path) -> None:
    install(repository, "kubectl")
    done, calls = make(repository, "tei-image-in-cluster")

    assert done.returncode == 0, done.stderr
    namespace = "kubectl --namespace text-embeddings"
    assert [call.removesuffix(" DOCKER_BUILDKIT=") for call in calls] == [
        f"{namespace} get secret text-embeddings-registry",
        f"{namespace} delete job text-embeddings-tei-build --ignore-not-found",
        "kubectl apply -k k8s/build",
    ]


def test_the_content_is_listed_by_the_tool_that_is_there(repository: Path) -> None:
    done, _ = make(repository, "sbom")
    assert done.returncode != 0
    assert "Neither syft nor trivy is installed" in done.stderr

    install(repository, "trivy")
    done, calls = make(repository, "sbom")
    assert done.returncode == 0, done.stderr
    assert calls == [
        f"trivy image --format spdx-json --output tei.spdx.json {IMAGE} DOCKER_BUILDKIT="
    ]
