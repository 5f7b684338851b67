"""The rendered Dockerfiles, read: their structure for every accelerator, and what nvcc makes of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from copier.errors import UserMessageError

from extensions import accelerator

if TYPE_CHECKING:
    from tests.containers.renders import RenderTei

pytest_plugins = ["tests.containers.renders"]

EVERY = [(row.name, platform) for row in accelerator.load().values() for platform in row.platforms]
GPUS = [row.name for row in accelerator.load().values() if row.is_gpu]
every = pytest.mark.parametrize(("name", "platform"), EVERY, ids=[f"{n}-{p}" for n, p in EVERY])


@dataclass(slots=True)
class Stage:
    """One stage of a Dockerfile."""

    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def environment(self) -> dict[str, str]:
        """What ENV sets here, with the defaults of the stage's own ARGs put in."""
        known: dict[str, str] = {}
        found: dict[str, str] = {}
        for instruction, rest in self.instructions:
            if instruction == "ARG":
                name, _, value = rest.partition("=")
                known[name] = value
            elif instruction == "ENV":
                for name, quoted, bare in re.findall(r'(\w+)=(?:"([^"]*)"|(\S+))', rest):
                    value = quoted or bare
                    found[name] = re.sub(r"\$\{(\w+)\}", lambda m: known.get(m[1], ""), value)
        return found


def instructions(dockerfile: str) -> Iterator[tuple[str, str]]:
    """Each instruction and what follows it, its lines joined, comments left out."""
    lines = [line for line in dockerfile.splitlines() if not line.startswith("#")]
    for entry in re.split(r"\n(?=[A-Z]+ )", "\n".join(lines)):
        instruction, _, rest = re.sub(r"\\\n\s*", "", entry).strip().partition(" ")
        if instruction:
            yield instruction, rest.strip()


def stages(dockerfile: str) -> tuple[list[str], list[Stage]]:
    """The ARGs before the first FROM, and the stages."""
    before: list[str] = []
    found: list[Stage] = []
    for instruction, rest in instructions(dockerfile):
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            found.append(Stage(name, base))
        elif found:
            found[-1].instructions.append((instruction, rest))
        else:
            assert instruction == "ARG"
            before.append(rest)
    return before, found


def rendered(render_tei: RenderTei, name: str, platform: str | None = None) -> str:
    answers = {"image_platform": platform} if platform else {}
    return (render_tei(name, **answers) / "images/tei/Dockerfile").read_text()


@every
def test_stages_are_there_before_they_are_used(
    render_tei: RenderTei, name: str, platform: str
) -> None:
    before, found = stages(rendered(render_tei, name, platform))
    images = {f"${{{arg.partition('=')[0]}}}" for arg in before}

    known: set[str] = set()
    for stage in found:
        assert stage.base in known | images
        for instruction, rest in stage.instructions:
            if instruction == "COPY" and (source := re.match(r"--from=(\S+)", rest)):
                assert source[1] in known
        known.add(stage.name)
    assert len(known) == len(found), "a stage has no name, or two have the same"
    assert found[-1].name == "tei"


@every
def test_every_image_is_fetched_before_anything_is_compiled(
    render_tei: RenderTei, name: str, platform: str
) -> None:
    _, found = stages(rendered(render_tei, name, platform))
    (cook,) = [i for i, stage in enumerate(found) if "cargo chef cook" in str(stage.instructions)]

    assert not [stage.base for stage in found[cook:] if stage.base.startswith("$")]
    installs = [i for i, stage in enumerate(found) if "apt-get install" in str(stage.instructions)]
    assert installs
    assert max(installs) < cook


@every
def test_every_variable_is_declared_where_it_is_used(
    render_tei: RenderTei, name: str, platform: str
) -> None:
    _, found = stages(rendered(render_tei, name, platform))
    environments: dict[str, set[str]] = {}
    for stage in found:
        # PATH is every image's own.
        known = {"PATH"} | environments.get(stage.base, set())
        inherited = set(known)
        for instruction, rest in stage.instructions:
            own = set()
            if instruction == "RUN":
                own = {*re.findall(r"\b(\w+)=\"?\$\(", rest), *re.findall(r"\bfor (\w+) in ", rest)}
            assert set(re.findall(r"\$\{(\w+)", rest)) <= known | own, rest
            if instruction == "ARG":
                known.add(rest.partition("=")[0])
            if instruction == "ENV":
                names = set(re.findall(r"(\w+)=", rest))
                known |= names
                inherited |= names
        environments[stage.name] = inherited


@every
def test_every_argument_is_used(render_tei: RenderTei, name: str, platform: str) -> None:
    dockerfile = rendered(render_tei, name, platform)
    before, found = stages(dockerfile)

    for arg in before:
        assert f"FROM ${{{arg.partition('=')[0]}}}" in dockerfile
    for stage in found:
        text = "\n".join(rest for _, rest in stage.instructions)
        for instruction, rest in stage.instructions:
            if instruction == "ARG" and not rest.startswith("PIP_"):  # pip reads its environment
                assert f"${{{rest.partition('=')[0]}}}" in text, f"{rest} in {stage.name}"


@every
def test_old_builders_take_the_file(render_tei: RenderTei, name: str, platform: str) -> None:
    dockerfile = rendered(render_tei, name, platform)

    assert "# syntax=" not in dockerfile
    for instruction, rest in instructions(dockerfile):
        assert "<<" not in rest
        assert instruction != "ADD"
        assert not (instruction == "RUN" and rest.startswith("--"))
        assert not (instruction == "COPY" and re.search(r"--(chmod|link|chown|parents)", rest))
        assert "TARGETARCH" not in rest


@every
def test_nothing_floats_and_nothing_is_secret(
    render_tei: RenderTei, name: str, platform: str
) -> None:
    dockerfile = rendered(render_tei, name, platform)
    before, _ = stages(dockerfile)

    for arg in before:
        assert re.fullmatch(r"\w+=docker\.io/[a-z0-9/-]+:[0-9a-z][0-9a-z.-]+", arg)
    assert "latest" not in dockerfile
    for instruction, rest in instructions(dockerfile):
        if instruction in ("ARG", "ENV"):
            names = " ".join(re.findall(r"(\w+)=", rest))
            assert not re.search(r"PASSWORD|TOKEN|SECRET|_KEY|CREDENTIAL", names, re.IGNORECASE)
        assert not re.search(r"\b(curl|wget) +(-|http|\")", rest), (
            "cargo and git fetch, nothing else"
        )


@every
def test_the_final_stage_is_what_runs(render_tei: RenderTei, name: str, platform: str) -> None:
    row = accelerator.for_name(name)
    _, found = stages(rendered(render_tei, name, platform))
    final = found[-1]
    last = dict(final.instructions)

    user = last["USER"].split(":")
    assert len(user) == 2
    assert all(part.isdigit() and int(part) > 0 for part in user)
    assert last["EXPOSE"] == final.environment()["PORT"] == "8355"
    assert last["ENTRYPOINT"] == (
        '["require-gpu", "text-embeddings-router"]' if row.is_gpu else '["text-embeddings-router"]'
    )
    assert final.environment()["USE_FLASH_ATTENTION"] == str(row.flash_attention)
    assert f'tei.platform="{platform}"' in last["LABEL"]
    for instruction, rest in final.instructions:
        assert not re.search(r"\b(cargo|rustc|gcc|nvcc|git)\b", rest) or instruction == "LABEL"


@every
def test_the_dependencies_and_the_program_are_compiled_alike(
    render_tei: RenderTei, name: str, platform: str
) -> None:
    row = accelerator.for_name(name)
    _, found = stages(rendered(render_tei, name, platform))
    by_name = {stage.name: stage for stage in found}
    dependencies, program = by_name["dependencies"], by_name["program"]
    features = ("ARG", f"CARGO_FEATURES={','.join(row.features(platform))}")

    assert program.base == "dependencies"
    assert features in dependencies.instructions
    assert features in program.instructions
    # Everything else of TEI's workspace stays uncompiled, and what its build scripts fetch unfetched.
    lines = [rest for stage in found for word, rest in stage.instructions if word == "RUN"]
    compiles = [line for line in lines if re.match(r"cargo (chef (prepare|cook)|build) ", line)]
    assert len(compiles) == 3
    assert all(" --bin text-embeddings-router" in line for line in compiles)
    # What the kernels are compiled for is ENV: the program's stage has it from the dependencies'.
    assert not {"CUDA_COMPUTE_CAP", "NVCC_APPEND_FLAGS"} & set(program.environment())
    assert re.fullmatch(r"[0-9a-f]{40}", program.environment()["GIT_SHA"])
    assert program.environment()["DOCKER_LABEL"].startswith(f"{name} edits=queue,")
    if not row.is_gpu:
        mkl = {"MKLROOT"} if "mkl" in row.features(platform) else set()
        assert set(dependencies.environment()) == {"CARGO_BUILD_JOBS"} | mkl
        return
    environment = dependencies.environment()
    assert environment["CUDA_COMPUTE_CAP"] == str(row.compute_cap)
    # Four compilers of 5 GB leave room on every Spark.
    assert int(environment["RAYON_NUM_THREADS"]) * 5 <= row.build_memory_gib
    guard = " ".join(rest for _, rest in by_name["guard"].instructions)
    assert row.runs_on is not None
    assert f"-DFIRST_CAPABILITY={row.runs_on[0]} -DLAST_CAPABILITY={row.runs_on[1]}" in guard


@every
def test_hadolint_finds_nothing(
    render_tei: RenderTei, name: str, platform: str, tmp_path: Path
) -> None:
    # Beside this Python, where pip puts it, or anywhere on PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if not (hadolint := shutil.which("hadolint", path=path)):
        pytest.skip("hadolint is not installed")
    dockerfile = rendered(render_tei, name, platform)
    (tmp_path / "Dockerfile").write_text(dockerfile)

    done = subprocess.run(
        [hadolint, "--no-color", tmp_path / "Dockerfile"], text=True, capture_output=True
    )

    assert (done.returncode, done.stdout) == (0, "")
    lines = dockerfile.splitlines()
    for number, line in enumerate(lines):
        if "hadolint ignore" in line:
            assert lines[number - 1].startswith("# "), "an ignored rule has its reason above it"


@pytest.fixture(scope="session")
def nvcc() -> str:
    """This machine's nvcc, or the one from PyPI."""
    from tests.containers.nvcc import toolkit  # above, pytest could not rewrite its assertions

    return shutil.which("nvcc") or str(toolkit() / "bin/nvcc")


@pytest.mark.parametrize("name", GPUS)
def test_nvcc_compiles_for_the_very_architecture(
    render_tei: RenderTei, name: str, tmp_path: Path, nvcc: str
) -> None:
    row = accelerator.for_name(name)
    _, found = stages(rendered(render_tei, name))
    environment = next(stage for stage in found if stage.name == "dependencies").environment()
    # bindgen_cuda 0.1.5, lib.rs: the integer must be among these, and becomes the only flag.
    known = subprocess.run([nvcc, "--list-gpu-code"], text=True, capture_output=True, check=True)
    cap = int(environment["CUDA_COMPUTE_CAP"])
    if f"sm_{cap}" not in known.stdout.split():
        pytest.skip(f"this nvcc does not know sm_{cap}")
    (tmp_path / "kernel.cu").write_text(
        'extern "C" __global__ void twice(float *x) { x[threadIdx.x] *= 2.0f; }\n'
    )

    done = subprocess.run(
        [nvcc, f"--gpu-architecture=sm_{cap}", "--ptx", "-o", "kernel.ptx", "kernel.cu"],
        cwd=tmp_path,
        env=os.environ | environment,
        text=True,
        capture_output=True,
    )

    assert done.returncode == 0, done.stderr
    target = re.search(r"^\.target (\S+)", (tmp_path / "kernel.ptx").read_text(), re.MULTILINE)
    assert target is not None
    assert target[1] == row.architecture


@pytest.mark.parametrize("name", ["gb10", "cpu"])
def test_the_job_builds_what_the_dockerfile_needs(render_tei: RenderTei, name: str) -> None:
    if not (kubectl := shutil.which("kubectl")):
        pytest.skip("kubectl is not installed")
    folder = render_tei(name)
    done = subprocess.run(
        [kubectl, "kustomize", folder / "k8s/build"], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    context, job = list(yaml.safe_load_all(done.stdout))

    pod = job["spec"]["template"]["spec"]
    (builder,) = pod["containers"]
    copied = {
        rest.split()[0]
        for instruction, rest in instructions((folder / "images/tei/Dockerfile").read_text())
        if instruction == "COPY" and not rest.startswith("--from")
    }
    sources = [folder / "images/tei" / name for name in {"Dockerfile", *copied}]
    files = {f for s in sources for f in (s.iterdir() if s.is_dir() else [s])}
    assert set(context["data"]) == {file.name for file in files}
    mounted = {m["mountPath"]: m.get("subPath") for m in builder["volumeMounts"]}
    for file in files:
        assert mounted[f"/context/{file.relative_to(folder / 'images/tei')}"] == file.name
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["context"]["configMap"]["name"] == context["metadata"]["name"]
    row = accelerator.for_name(name)
    assert pod["nodeSelector"]["kubernetes.io/arch"] == row.platforms[0].split("/")[1]
    assert builder["resources"]["requests"]["memory"] == f"{row.build_memory_gib}Gi"
    assert int(builder["resources"]["limits"]["memory"].removesuffix("Gi")) > row.build_memory_gib
    # Root in the pod is nobody on the node, and the pod says so itself where that is not so.
    assert pod["hostUsers"] is False
    assert "uid_map" in builder["args"][0]
    assert builder["image"].partition(":")[2] not in ("", "latest")


@pytest.mark.parametrize(
    ("name", "answers", "sentence"),
    [
        (
            "gb10",
            {"image_platform": "linux/amd64"},
            "image_platform: NVIDIA DGX Spark (GB10) does not",
        ),
        ("gh200", {"tei_image": "official"}, "tei_image: Hugging Face publishes no TEI image for"),
        ("l4", {"tei_ref": "0d124dc"}, "tei_ref: '0d124dc' is not a commit of TEI"),
    ],
)
def test_what_cannot_be_built_is_refused_at_render(
    render_tei: RenderTei, name: str, answers: dict[str, str], sentence: str
) -> None:
    with pytest.raises(UserMessageError) as refused:
        render_tei(name, **answers)

    assert str(refused.value).startswith(sentence)
    assert "\n" not in str(refused.value)
