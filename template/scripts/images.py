"""Builds, pushes, lists and signs the images of this repository; `make image` and its siblings call it.

An image's tag ends in eight digits of what it is built from: its Dockerfile and what that copies. What
was pushed is written, with its digest, to the file from which Kustomize takes images: another content is
another digest, which rolls out; a revert brings the old one back; the same content changes nothing.

Needs Python 3.10, and docker, podman or buildah.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = {"x86_64": "amd64", "AMD64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
CACHE_MOUNTS = "".join(
    f"--mount=type=cache,target=/usr/local/cargo/{folder} " for folder in ("registry", "git")
)
CAUSES = {
    # The sentences of the Dockerfile and of patches/apply.pl: with a number where the file has a variable.
    r"(This image is for \w+, the builder is \w+: .+)": "{}",
    r"(\S+ \(through \S+\) serves TEI [0-9a-f]{7,}, not .+?)\.?$": "{}",
    r"(TEI [0-9a-f]{7,} wants Rust .+?)\.?$": "{}",
    r"(TEI needs [\w.+-]+, which the image lacks)": "{}",
    r"^patches: (\S+ .+?)\.?$": "{}",  # with the name of a file alone, an edit was made
    # cargo's and git's: what a mirror lacks.
    r"no matching package named `(.+?)` found": "the index of crates lacks {}",
    r"failed to download from `(.+?)`": "{} cannot be downloaded",
    r"repository '(.+?)/?' not found": "there is no git repository {}",
    r"repository not exported: (\S+)": "there is no git repository {}",
    r"unable to access '(.+?)/?': (.+?)\.?$": "{} cannot be had, {}",
    r"(unable to connect to \S+):$": "git is {}",
    r"config.json not found in registry": "CRATES_INDEX is no index of crates: it has no config.json",
    r"^E: Failed to fetch (\S+)": "{} cannot be fetched",
    r"^E: Unable to locate package (\S+)": "APT's mirror lacks the package {}",
    # The builders' own.
    r"Get \"https?://([^/\"]+)/v2/\": (.+?)\.?$": "the registry {} cannot be reached, {}",
    r"(pull access denied for [^\s,]+|manifest for \S+ not found)": "the base image cannot be had, {}",
    r"(?:source metadata for|initializing source docker://)\s?(\S+?):? ": "the base image {} cannot be had",
    r"[Nn]o space left on device": "the builder's disk is full",
    r"signal: 9, SIGKILL|[Ee]xit code: 137|non-zero code: 137": "the machine ended it for want of memory",
}
"""What the lines of a build that failed mean, where they are known."""

WHERE = {
    r"error: failed to run custom build command for `(\S+ v[^\s`]+)": "{} cannot be compiled",
    r"error: could not compile `(\S+?)`": "{} cannot be compiled",
}
"""What they tell of a failure whose cause is not known."""

HEADER = """\
# The images that run, by digest: `make push` writes this file. One that is not here runs by its tag.
apiVersion: kustomize.config.k8s.io/v1alpha1
kind: Component
"""


class Stop(Exception):
    """The sentence that ends the run."""


@dataclass(frozen=True)
class Image:
    """One image, as images/images.json has it."""

    key: str
    folder: str
    name: str
    """Registry and repository."""

    tag: str
    """Without its content: what compose.yaml names."""

    takes: str = ""
    """How long a build takes."""

    needs: str = ""
    otherwise: str = ""
    """What to do where it cannot be built here."""

    @property
    def content(self) -> str:
        """Eight digits of what it is built from."""
        digest = hashlib.sha256()
        for path in self.sources():
            data = path.read_bytes()
            name = path.relative_to(ROOT / self.folder).as_posix()
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
        return digest.hexdigest()[:8]

    def sources(self) -> list[Path]:
        """The Dockerfile, and every file that it copies out of its folder."""
        folder = ROOT / self.folder
        lines = (folder / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
        found = {folder / "Dockerfile"}
        for line in lines:
            words = line.split()
            if words[:1] != ["COPY"] or any(word.startswith("--from") for word in words):
                continue
            for word in [word for word in words[1:-1] if not word.startswith("--")]:
                for source in folder.glob(word):
                    files = source.rglob("*") if source.is_dir() else [source]
                    found |= {f for f in files if f.is_file() and "__pycache__" not in f.parts}
        return sorted(found)

    @property
    def reference(self) -> str:
        return f"{self.name}:{self.tag}-{self.content}"

    @property
    def alias(self) -> str:
        return f"{self.name}:{self.tag}"


@dataclass(frozen=True)
class Pushed:
    """What the registry has of an image."""

    tag: str
    digest: str


@dataclass(frozen=True)
class Builder:
    """docker, podman or buildah."""

    name: str

    @classmethod
    def find(cls) -> Builder:
        """The one that BUILDER names, or the first that answers.

        Raises: Stop, where none does.
        """
        named = os.environ.get("BUILDER")
        for name in [named] if named else ["docker", "podman", "buildah"]:
            if shutil.which(name) and _quiet([name, "version"]).returncode == 0:
                return cls(name)
        if named:
            raise Stop(f"BUILDER={named} does not answer: is it installed and running?")
        raise Stop("neither docker nor podman nor buildah answers: install or start one of them")

    @property
    def architecture(self) -> str:
        """Of the machine that builds, which need not be this one."""
        ask = {
            "docker": ["version", "--format", "{{.Server.Arch}}"],
            "podman": ["info", "--format", "{{.Host.Arch}}"],
        }.get(self.name)
        said = _quiet([self.name, *ask]).stdout.strip() if ask else ""
        return said or ARCHITECTURES.get(platform.machine(), platform.machine())

    @property
    def classic(self) -> bool:
        """Docker without BuildKit: it knows neither cache mounts nor other platforms."""
        return self.name == "docker" and _quiet(["docker", "buildx", "version"]).returncode != 0

    def build(self, image: Image, on: str, arguments: list[str]) -> None:
        """Build it under both its tags.

        Raises: Stop.
        """
        tags = ["-t", image.reference, "-t", image.alias]
        environment, dockerfile = dict(os.environ), None
        if self.classic:
            environment["DOCKER_BUILDKIT"] = "0"
            command = ["docker", "build", *arguments, *tags, image.folder]
        else:
            start = (
                ["buildx", "build", "--load"] if self.name == "docker" else ["build", "--layers"]
            )
            # Crates and git repositories are kept between builds.
            dockerfile = re.sub(
                r"^RUN (?=cargo )",
                f"RUN {CACHE_MOUNTS}",
                (ROOT / image.folder / "Dockerfile").read_text(),
                flags=re.M,
            )
            command = [
                self.name,
                *start,
                "--platform",
                on,
                *arguments,
                *tags,
                "-f",
                "-",
                image.folder,
            ]
        why = where = None
        with tempfile.TemporaryFile("w+") as file:
            file.write(dockerfile or "")
            file.seek(0)
            with subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            ) as running:
                for line in running.stdout or ():
                    print(line, end="", flush=True)
                    why = cause(line, CAUSES) or why
                    where = cause(line, WHERE) or where
        if running.returncode:
            above = f"{f': {where}' if where else ''}; the lines above say why"
            raise Stop(f"{self.name} did not build {image.key}{f': {why}' if why else above}")

    def push(self, image: Image) -> str:
        """Push it under both its tags; returns the digest that the registry knows it by.

        Raises: Stop.
        """
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "digest")
            options = [] if self.name == "docker" else ["--digestfile", str(file)]
            for reference in (image.reference, image.alias):
                done = subprocess.run([self.name, "push", *options, reference], cwd=ROOT)
                if done.returncode:
                    registry = image.name.partition("/")[0]
                    raise Stop(
                        f"{registry} did not take {reference}: is it built (make {image.key}-image), "
                        f"and does '{self.name} login {registry}' work? {COMPONENT} is as it was"
                    )
            if self.name == "docker":
                shown = _quiet(
                    [
                        "docker",
                        "image",
                        "inspect",
                        image.reference,
                        "--format",
                        "{{json .RepoDigests}}",
                    ]
                )
                known = json.loads(shown.stdout or "[]") or []
                said = next(
                    (k.partition("@")[2] for k in known if k.startswith(f"{image.name}@")), ""
                )
            else:
                said = file.read_text().strip()
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", said):
            raise Stop(f"{self.name} does not say under which digest it pushed {image.reference}")
        return said


def _quiet(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)


def cause(line: str, known: dict[str, str]) -> str | None:
    """What a line of a build says of why it failed, if it is one that is known."""
    plain = re.sub(r"\x1b\[[0-9;]*m|^#\d+ +[\d.]+ ", "", line).strip()
    if plain.startswith("warning:"):  # cargo tries a download again
        return None
    for pattern, sentence in known.items():
        if found := re.search(pattern, plain):
            return sentence.format(*found.groups())
    return None


_SETTINGS = json.loads((ROOT / "images/images.json").read_text())
COMPONENT = _SETTINGS["component"]
PLATFORM = _SETTINGS["platform"]
IMAGES = {key: Image(key, **row) for key, row in _SETTINGS["images"].items()}


def pushed() -> dict[str, Pushed]:
    """What was pushed, by name of the image."""
    path = ROOT / COMPONENT
    rows = re.findall(
        r"- name: (\S+)\n\s+newTag: \"?([^\s\"]+)\"?\n\s+digest: (\S+)",
        path.read_text() if path.exists() else "",
    )
    return {name: Pushed(tag, digest) for name, tag, digest in rows}


def record(name: str, new: Pushed) -> None:
    """Have Kustomize take this image from now on."""
    rows = pushed() | {name: new}
    lines = [
        f'  - name: {name}\n    newTag: "{row.tag}"\n    digest: {row.digest}\n'
        for name, row in sorted(rows.items())
    ]
    path = ROOT / COMPONENT
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(HEADER + "images:\n" + "".join(lines))
    part.replace(path)


def is_pushed(image: Image) -> bool:
    """Whether the registry got this very content, as far as is written."""
    known = pushed().get(image.name)
    return known is not None and known.tag == image.reference.rpartition(":")[2]


def build(image: Image) -> None:
    if is_pushed(image) and not os.environ.get("FORCE"):
        print(
            f"{image.key}: unchanged since it was pushed ({image.reference}); FORCE=1 builds it anew."
        )
        return
    builder = Builder.find()
    wanted = PLATFORM.partition("/")[2]
    if builder.architecture != wanted and not os.environ.get("EMULATE"):
        raise Stop(
            f"{image.key} is for {PLATFORM}, and {builder.name} builds on "
            f"linux/{builder.architecture}: build on a {PLATFORM} machine{image.otherwise}, or with "
            "EMULATE=1 where the builder emulates it (slow)"
        )
    print(f"Building {image.reference}.")
    for word, text in (("Takes", image.takes), ("Needs", image.needs)):
        if text:
            print(f"{word}: {text}")
    sys.stdout.flush()
    own = f"{image.key.upper().replace('-', '_')}_BUILD_ARGS"
    arguments = [
        *shlex.split(os.environ.get("BUILD_ARGS", "")),
        *shlex.split(os.environ.get(own, "")),
    ]
    if image.key == "model-fetch":
        arguments += [
            "--build-arg",
            f"VERSION={image.tag}",
            "--build-arg",
            f"REVISION={image.content}",
        ]
    builder.build(image, PLATFORM, arguments)


def push(image: Image) -> None:
    if is_pushed(image) and not os.environ.get("FORCE"):
        print(f"{image.key}: unchanged since it was pushed ({image.reference}).")
        return
    builder = Builder.find()
    new = Pushed(image.reference.rpartition(":")[2], builder.push(image))
    record(image.name, new)
    print(f"{image.key}: pushed as {new.digest}, written to {COMPONENT}.")


def sbom(image: Image) -> None:
    file = f"{image.key}.spdx.json"
    if shutil.which("syft"):
        command = ["syft", "scan", image.reference, "--output", f"spdx-json={file}"]
    elif shutil.which("trivy"):
        command = ["trivy", "image", "--format", "spdx-json", "--output", file, image.reference]
    else:
        raise Stop("neither syft nor trivy is installed: one of them lists what is in the images")
    if subprocess.run(command, cwd=ROOT).returncode:
        raise Stop(f"{command[0]} did not list {image.reference}")
    print(f"Wrote {file}.")


def sign(image: Image) -> None:
    if not (known := pushed().get(image.name)):
        raise Stop(f"{image.key} was not pushed yet: make {image.key}-push")
    if not shutil.which("cosign"):
        raise Stop("cosign is not installed: it signs the images")
    command = [
        "cosign",
        "sign",
        *shlex.split(os.environ.get("COSIGN_ARGS", "")),
        f"{image.name}@{known.digest}",
    ]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise Stop(f"cosign did not sign {image.name}@{known.digest}")


def check(image: Image) -> None:
    """Say which image does not run as it is here."""
    if not is_pushed(image):
        print(
            f"images: {image.folder} is not what was pushed last: "
            f"'make {image.key}-image {image.key}-push' first.",
            file=sys.stderr,
        )


def digest(image: Image) -> None:
    """Write down a digest that came from elsewhere: the Job in the cluster."""
    said = os.environ.get("DIGEST", "").strip()
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", said):
        raise Stop(f"'{said}' is no digest of an image: has the build ended well?")
    record(image.name, Pushed(image.reference.rpartition(":")[2], said))
    print(f"{image.key}: {said}, written to {COMPONENT}.")


def tag(image: Image) -> None:
    print(image.reference)


def source(image: Image) -> None:
    """Say by which digest a registry has this very content; nothing where none has it."""
    if is_pushed(image):
        print(f"{image.name}@{pushed()[image.name].digest}")


COMMANDS = {c.__name__: c for c in (build, push, sbom, sign, check, digest, tag, source)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("images", nargs="*", metavar="image", help=", ".join(IMAGES))
    arguments = parser.parse_args()
    try:
        if unknown := set(arguments.images) - set(IMAGES):
            raise Stop(
                f"there is no image {sorted(unknown)[0]} to {arguments.command} here: {', '.join(IMAGES)}"
            )
        for key in arguments.images or IMAGES:
            COMMANDS[arguments.command](IMAGES[key])
    except Stop as error:
        print(f"images: {error}.", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"images: {error.filename or error}: {error.strerror}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
