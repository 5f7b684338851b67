"""Takes over a newer template or model version, and says in words what that means.

`make update`, `make update-model`, `make check-update` and `make pin-digests` call it; it needs Git,
Python 3.10 and Copier, which the variable COPIER names. Copier itself ends with 0 when it leaves
conflicts.

A template is a program, and .copier-answers.yml names it: so only the one that this repository came
from is run, or the one that the variable TEMPLATE names; and of it, what its own branches and tags hold.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COPIER = "uvx --with copier-template-extensions==0.3.4 --with mlflow-skinny==3.17.2 copier@9.19.1"
"""Versions that the template is tested with."""

LONGEST_MARKER = 8 << 20
ANSWERS = ".copier-answers.yml"
HOSTS = {"gh:": "https://github.com/", "gl:": "https://gitlab.com/"}
"""What Copier's short addresses stand for."""

FOLDERS = ("k8s/base", "deploy/base")
UNREADABLE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What comes of a pin or a flag that was edited by hand."""


class Stop(Exception):
    """The sentence that ends the run."""


@dataclass(frozen=True)
class State:
    """What is served at one commit."""

    pin: Mapping[str, Any]
    flags: Mapping[str, str]
    """TEI's flags and their values."""

    @property
    def pooling(self) -> str | None:
        return self.flags.get("--pooling") or self.pin["facts"].get("pooling")

    @property
    def weights(self) -> int:
        """Bytes of all files."""
        return sum(file["size"] for file in self.pin["files"])

    @property
    def undigested(self) -> list[str]:
        """Paths of the files that no start compares with a digest."""
        kinds = ("sha256", "blob_sha1")
        return [f["path"] for f in self.pin["files"] if not any(f.get(k) for k in kinds)]

    def has_files_of(self, other: State) -> bool:
        """Whether nothing shows that the files are others: one pin may know a digest more."""
        files = {f["path"]: f for f in self.pin["files"]}
        others = {f["path"]: f for f in other.pin["files"]}
        if files.keys() != others.keys():
            return False
        for path, file in files.items():
            for kind in ("size", "sha256", "blob_sha1"):
                known = {file.get(kind), others[path].get(kind)} - {None}
                if len(known) > 1:
                    return False
        return True

    @property
    def is_known(self) -> bool:
        """Whether the weights have digests: MLflow gives none where it proxies its store."""
        weights = [f for f in self.pin["files"] if f["path"].endswith((".safetensors", ".bin"))]
        return all(f.get("sha256") or f.get("blob_sha1") for f in weights)


@dataclass(frozen=True)
class Repository:
    """This repository, or a throw-away clone of it."""

    root: Path

    def git(self, *arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments],
            cwd=self.root,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
            raise Stop(f"git {arguments[0]}: {said[-1]}")
        return done.stdout

    def must_know_its_template(self) -> None:
        """Refuse a template that is neither the first one of this repository nor TEMPLATE."""
        now = {source for source, _ in self._named_now()}
        wanted = os.environ.get("TEMPLATE")
        if wanted:
            known = {wanted}
        else:
            if self.git("rev-parse", "--is-shallow-repository").strip() == "true":
                raise Stop(
                    "the first commit is not here, which says what template this came from: clone "
                    "with the whole history, or name the template in the variable TEMPLATE"
                )
            added = (
                "log",
                "--full-history",
                "--diff-filter=A",
                "--format=%H",
                "HEAD",
                "--",
                ANSWERS,
            )
            known = {named(self._text(ANSWERS, c))[0] for c in self.git(*added).split()}
        if now != known:
            raise Stop(
                f"{ANSWERS} names another template than the one that this repository came from, "
                "and a template is a program: if you mean it, name its address in the variable "
                "TEMPLATE"
            )

    def must_know_its_commit(self) -> None:
        """Refuse a commit of the template that is on no branch and has no tag.

        Copier takes all that the server has, and that of a pull request is anybody's.
        """
        for source, commit in self._named_now():
            if not commit or (self.root / Path(source).expanduser()).exists():
                continue
            short, rest = source[:3], source[3:].lstrip("/")
            url = HOSTS[short] + rest if short in HOSTS else source.removeprefix("git+")
            with tempfile.TemporaryDirectory() as folder:
                self.git("clone", "--quiet", "--bare", "--", url, folder)
                try:
                    words = ("--verify", "--quiet", f"{commit}^{{commit}}")
                    Repository(Path(folder)).git("rev-parse", *words)
                except Stop:
                    raise Stop(
                        f"{ANSWERS} names a commit that no branch and no tag of the template leads "
                        "to: restore _commit with git"
                    ) from None

    def _named_now(self) -> set[tuple[str, str]]:
        """Address and commit of the template, as the working tree and HEAD have them."""
        try:
            return {named(self._text(ANSWERS, commit)) for commit in (None, "HEAD")}
        except (OSError, ValueError):
            raise Stop(f"{ANSWERS} is not as Copier wrote it: restore it with git") from None

    def copier(self, *arguments: str) -> int:
        """Copier's exit code; what it prints goes where this program's goes."""
        sys.stdout.flush()
        copier = shlex.split(os.environ.get("COPIER") or COPIER)
        try:
            return subprocess.run([*copier, *arguments], cwd=self.root).returncode
        except OSError:
            raise Stop(
                f"{copier[0]} is not installed: name Copier in the variable COPIER"
            ) from None

    def must_be_clean(self) -> None:
        try:
            changed = self.git("status", "--porcelain").splitlines()
        except Stop:
            raise Stop("this is not a Git repository: commit it first, then update") from None
        if changed:
            names = ", ".join(line[3:] for line in changed[:5]) + (" …" if changed[5:] else "")
            raise Stop(f"uncommitted changes ({names}): commit or stash them, then update")

    def conflicts(self) -> list[str]:
        """Files with conflict markers, and what Copier could not apply (`--conflict rej`)."""
        marked = self.git("diff", "--name-only", "--diff-filter=U").splitlines()
        return sorted({*marked, *(str(p.relative_to(self.root)) for p in self.root.rglob("*.rej"))})

    def lost(self) -> list[str]:
        """Files that are gone though a commit other than an update had changed them.

        Copier removes what the template no longer has, without a word where it was edited.
        """
        gone = self.git("diff", "--name-only", "--diff-filter=D", "-z", "HEAD").split("\0")[:-1]
        updates = set(self.git("log", "--format=%H", "--", ANSWERS).split())
        return [
            name
            for name in gone
            if set(self.git("log", "--format=%H", "--", f":(literal){name}").split()) - updates
        ]

    def state(self, commit: str | None = None) -> State | None:
        """What a commit, or the working tree, serves; None when that cannot be read."""
        for folder in FOLDERS:
            try:
                pin = json.loads(self._text(f"{folder}/pin.json", commit))
                deployment = self._text(f"{folder}/deployment.yaml", commit)
            except (OSError, Stop):
                continue
            except UNREADABLE:
                return None
            found = re.findall(r'^\s+- ("--.+")$', deployment, re.MULTILINE)
            try:
                parts = [json.loads(text).partition("=") for text in found]
                state = State(pin, {name: value for name, _, value in parts})
                list(described(state, state))
            except UNREADABLE:
                return None
            return state
        return None

    def _text(self, path: str, commit: str | None) -> str:
        return self.git("show", f"{commit}:{path}") if commit else (self.root / path).read_text()


def named(answers: str) -> tuple[str, str]:
    """Address and commit of the template ('' for none), read so strictly that Copier reads the same.

    Raises: ValueError when a line could mean something else than it seems to.
    """
    found: list[tuple[str, str]] = []
    for line in answers.splitlines():
        if line.startswith(("#", " ", "- ")) or not line:
            continue
        if not (key := re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*):(?: (.*))?", line)):
            raise ValueError(line)
        found.append((key[1], (key[2] or "").strip()))
    sources = [value for name, value in found if name == "_src_path"]
    commits = [value for name, value in found if name == "_commit"]
    if len(sources) != 1 or len(dict(found)) < len(found):
        raise ValueError("_src_path")
    source = sources[0].strip("'\"")
    if not re.fullmatch(r"[A-Za-z0-9./~][^\s&*!|>%`#'\"\\]*", source):
        raise ValueError(source)
    if commits and not re.fullmatch(r"'?[A-Za-z0-9][A-Za-z0-9._/+-]*'?", commits[0]):
        raise ValueError(commits[0])
    return source, (commits[0].strip("'") if commits else "")


def described(before: State, after: State) -> Iterator[str]:
    """What changes for whoever calls the service; one line each, none when nothing does."""
    old, new = before.pin, after.pin
    rows = [
        ("model", old["model_id"], new["model_id"]),
        ("version", old["version"] or old["selector"], new["version"] or new["selector"]),
        ("dimensions", old["facts"].get("dimensions"), new["facts"].get("dimensions")),
        ("pooling", before.pooling, after.pooling),
        (
            *("longest input", old["facts"].get("max_input_tokens")),
            new["facts"].get("max_input_tokens"),
        ),
        ("size", f"{before.weights / 1e6:,.1f} MB", f"{after.weights / 1e6:,.1f} MB"),
    ]
    rows += [
        (name, before.flags.get(name, "not given"), after.flags.get(name, "not given"))
        for name in sorted({*before.flags, *after.flags} - {"--served-model-name", "--pooling"})
    ]
    names = {name for name, was, now in rows if was != now}
    moved = any(old[key] != new[key] for key in ("model_id", "version", "run_id"))
    for name, was, now in rows:
        if name in names:
            yield plain(f"  {name:<26}{was} -> {now}")
        elif moved and name in ("dimensions", "pooling", "size"):
            yield plain(f"  {name:<26}{now}, as before")
    if reasons := names & {"model", "dimensions", "pooling"}:
        changed = ", ".join(sorted(reasons))
        yield f"RE-INDEX: another {changed}. What was embedded before must be embedded again."
    elif not after.has_files_of(before):
        yield "The files changed: unless you know that the vectors are the same, embed again."
    elif moved and not after.is_known:
        yield "The weights have no digest in the registry: if they may be others, embed again."
    if old["facts"].get("prompts") != new["facts"].get("prompts"):
        yield "The prefixes that clients write before their texts changed: see README.md."


def plain(text: str) -> str:
    """A line that moves no terminal's cursor and fills no screen."""
    return "".join(c if c.isprintable() else " " for c in text[:500])


def fetched(text: str) -> str:
    """Of what model-fetch left beside a model, what completes the pin's digests; as JSON.

    Raises: Stop when it is something else.
    """
    try:
        marker = json.loads(text)
        return json.dumps({"fetched": {name: marker[name] for name in ("pin", "fetched")}})
    except UNREADABLE:
        raise Stop(
            "that is nothing that model-fetch left beside a model (.model-fetch.json): start the "
            "service first, or name the folder of a fetched model in FROM"
        ) from None


def complete(repository: Repository, words: list[str]) -> None:
    """Write the SHA-256 of what was fetched into the pin; what model-fetch left comes from stdin."""
    data = fetched(sys.stdin.read(LONGEST_MARKER))
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
        file.write(data)
        file.flush()
        update(repository, "digests", ["--vcs-ref=:current:", "--data-file", file.name, *words])


def update(repository: Repository, what: str, words: list[str]) -> None:
    """Run Copier, and say what came of it.

    Raises: Stop when the tree is dirty, Copier fails, or conflicts are left.
    """
    repository.must_be_clean()
    repository.must_know_its_template()
    repository.must_know_its_commit()
    if what == "model":
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise Stop("MLFLOW_TRACKING_URI is not set: name the MLflow server in it")
        words = ["--vcs-ref=:current:", "--data", "refresh=true", *words]
    if repository.copier("update", "--trust", "--defaults", *words):
        changed = repository.git("status", "--porcelain")
        raise Stop(
            "Copier failed, as it says above; "
            + ("`git reset --hard` returns to what was" if changed else "nothing was changed")
        )
    conflicts = repository.conflicts()
    before, after = repository.state("HEAD"), repository.state()
    changed = repository.git("status", "--porcelain").splitlines()
    if before and after:
        lines = list(described(before, after))
        name = f"{after.pin['model_id']}, version {after.pin['version'] or after.pin['selector']}"
        stays = plain(f"The model stays: {name}.")
        print("\n".join(["The model changes:", *lines] if lines else [stays]))
    else:
        print("The model cannot be compared: pin.json is missing or in conflict.")
    if conflicts:
        raise Stop(
            f"conflicts are left in {', '.join(conflicts)}: mend them and `git add` them, or return "
            "to what was with `git reset --hard`"
        )
    if lost := repository.lost():
        raise Stop(
            f"the template no longer has {', '.join(map(plain, lost))}, which you had changed: `git diff "
            "HEAD` shows what goes. Commit, or bring a file back with `git checkout HEAD -- FILE`, or "
            "return to what was with `git reset --hard`"
        )
    if after and after.pin["version"] and what != "template" and after.undigested:
        print(
            plain(
                f"No digest is known of {', '.join(after.undigested)}: `make pin-digests` pins it, "
                "once the version was fetched."
            )
        )
    if not changed:
        print("Nothing else changed.")
        return
    print(f"{len(changed)} files changed. Read `git diff HEAD`, then commit.")
    if any(line[3:].startswith("images/") for line in changed):
        print("Images changed: build and push them before you deploy.")


def check(repository: Repository) -> None:
    """Say what is newer, of the template and of the model; changes nothing."""
    repository.must_know_its_template()
    repository.must_know_its_commit()
    print("Template:")
    if repository.copier("check-update"):
        raise Stop("Copier failed, as it says above")
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        print("Model: not checked, since MLFLOW_TRACKING_URI is not set.")
        return
    with tempfile.TemporaryDirectory() as folder:
        clone = Repository(Path(folder) / repository.root.name)
        repository.git("clone", "--quiet", "--local", str(repository.root), str(clone.root))
        words = ("--quiet", "--vcs-ref=:current:", "--data", "refresh=true")
        if clone.copier("update", "--trust", "--defaults", *words):
            raise Stop("the registry was not read, for the reason above")
        before, after = repository.state("HEAD"), clone.state()
    if before and after and (lines := list(described(before, after))):
        print("\n".join(["Model: `make update-model` would change", *lines]))
    elif before and after:
        print("Model: the pin is the newest version.")
    else:
        print("Model: it cannot be compared, since pin.json or a flag was edited by hand.")


def main() -> int:
    """Returns the exit code: 1 with one line of error, also when conflicts are left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["template", "model", "check", "digests"])
    parser.add_argument("words", nargs=argparse.REMAINDER, help="more words for Copier")
    given = parser.parse_args()
    repository = Repository(Path(__file__).resolve().parent.parent)
    try:
        if given.what == "check":
            check(repository)
        elif given.what == "digests":
            complete(repository, given.words)
        else:
            update(repository, given.what, given.words)
    except Stop as stop:
        sys.stdout.flush()
        print(plain(f"error: {stop}."), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
