"""`make release` tags what is complete, and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_update import IDENTITY

ROOT = Path(__file__).parent.parent
ENTRY = "## 1.2.3 (2026-11-28)\n\nWhat it means.\n\n- A line.\n"
OTHERS = "\n## 1.2.2 (2026-01-01)\n\nBefore.\n"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository that is ready to be released as 1.2.3; its checks pass."""
    folder = tmp_path / "repository"
    (folder / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci/release", folder / ".ci")
    (folder / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "1.2.3"\n')
    (folder / "CHANGELOG.md").write_text(f"# Changelog\n\n{ENTRY}{OTHERS}")
    (folder / ".gitignore").write_text(".cache\n")
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


def git(folder: Path, *arguments: str) -> str:
    own = {"PATH": os.environ["PATH"], "HOME": str(folder.parent), **IDENTITY}
    return subprocess.run(
        ["git", *arguments], cwd=folder, env=own, check=True, capture_output=True, text=True
    ).stdout


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "state")


def release(folder: Path, checks: str = "true") -> subprocess.CompletedProcess[str]:
    own = {"PATH": os.environ["PATH"], "HOME": str(folder.parent), **IDENTITY}
    return subprocess.run(
        [folder / ".ci/release"],
        env=own | {"RELEASE_CHECKS": checks},
        capture_output=True,
        text=True,
    )


def test_a_release_is_an_annotated_tag_with_its_notes(repository: Path) -> None:
    done = release(repository)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Tagged v1.2.3. ")
    assert git(repository, "cat-file", "-t", "v1.2.3") == "tag\n"
    said = git(repository, "for-each-ref", "--format=%(contents)", "refs/tags/v1.2.3")
    assert said.strip() == "Version 1.2.3\n\nWhat it means.\n\n- A line."
    assert (repository / ".cache/release-notes.md").read_text().strip() in said
    assert git(repository, "status", "--porcelain") == ""


def test_it_is_signed_where_git_knows_a_key(repository: Path) -> None:
    key = repository.parent / "key"
    made = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)]
    if not shutil.which("ssh-keygen"):
        pytest.skip("ssh-keygen is not installed (Debian: openssh-client)")
    subprocess.run(made, check=True)
    allowed = repository.parent / "allowed"
    allowed.write_text(f"someone@example.com {key.with_suffix('.pub').read_text()}")
    for name, value in (
        ("gpg.format", "ssh"),
        ("user.signingKey", str(key)),
        ("gpg.ssh.allowedSignersFile", str(allowed)),
    ):
        git(repository, "config", name, value)
    done = release(repository)
    assert done.returncode == 0, done.stderr
    assert "Tagged v1.2.3, signed." in done.stdout
    git(repository, "verify-tag", "v1.2.3")


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def step(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))
        commit(folder)

    return step


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (lambda folder: (folder / "new").touch(), "uncommitted changes"),
        (lambda folder: git(folder, "tag", "v1.2.3"), "v1.2.3 exists already"),
        (edit("CHANGELOG.md", ENTRY, ""), "has no entry '## 1.2.3"),
        (edit("CHANGELOG.md", ENTRY, "## 1.2.3 (2026-11-28)\n\n"), "has no entry '## 1.2.3"),
        (edit("CHANGELOG.md", "1.2.3 (2026-11-28)", "1.2.30 (2026-11-28)"), "has no entry"),
        (edit("CHANGELOG.md", "(2026-11-28)", "(unreleased)"), "does not say when"),
        (edit("pyproject.toml", "1.2.3", "1.2.3rc1"), "is no version like 1.2.3"),
    ],
)
def test_what_is_not_ready_is_not_tagged(
    step: Callable[[Path], object], said: str, repository: Path
) -> None:
    step(repository)
    before = git(repository, "tag")
    done = release(repository)
    assert done.returncode == 1
    assert re.fullmatch(rf"release: .*{re.escape(said)}.*\.\n", done.stderr)
    assert git(repository, "tag") == before


@pytest.mark.parametrize("checks", ["false", "touch left-behind"])
def test_checks_decide(checks: str, repository: Path) -> None:
    assert release(repository, checks).returncode != 0
    assert git(repository, "tag") == ""
