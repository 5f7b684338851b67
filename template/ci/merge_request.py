"""Opens, refreshes or closes this repository's one merge request for what moved elsewhere.

    merge_request.py model      what `make update-model` changes now: a version, the verdict, the diff
    merge_request.py tei        another answer `tei_ref`: the newest commit of TEI
    merge_request.py images     the digests that `make push` wrote here
    merge_request.py listen     waits for MLflow's webhooks; each that concerns the pin is a `model`

With --dry-run it prints what it would do. It needs Git and Python 3.10; `model` what `make update-model`
needs. GitHub and GitLab set all of these but the token for their jobs; elsewhere set them yourself:

    GitHub   GITHUB_API_URL, GITHUB_SERVER_URL, GITHUB_REPOSITORY, GITHUB_TOKEN
    GitLab   CI_API_V4_URL, CI_PROJECT_ID, CI_PROJECT_URL, GITLAB_TOKEN (scopes api, write_repository)

CHECKS="make parity URL=…" runs that on the new version, and what it prints goes into the merge request.
WEBHOOK_SECRET is what MLflow signs with. Secrets are in the environment alone: in no argument, no address
and no output, and neither Copier nor CHECKS see the forge's token.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BRANCHES = {"model": "update-model", "tei": "update-tei", "images": "update-images"}
TEI = "https://github.com/huggingface/text-embeddings-inference"
FORGE_SECRETS = ("GITHUB_TOKEN", "GITLAB_TOKEN", "CI_JOB_TOKEN", "WEBHOOK_SECRET")
IDENTITY = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "merge_request.py"), ("EMAIL", "merge-request@localhost"))
}
LONGEST_DIFF = 20_000
"""Characters of a diff, and of what CHECKS print, that a merge request shows."""

LARGEST_ANSWER = 8 << 20
LARGEST_EVENT = 64 << 10
OLDEST_EVENT_S = 300
"""MLflow signs the time, so that nobody can send a delivery again later."""


class Stop(Exception):
    """The sentence that ends the run."""


@dataclass(frozen=True)
class Forge:
    """GitHub or GitLab, by its REST API."""

    name: str
    api: str
    remote: str
    """Where Git pushes; without a login."""

    token: str
    user: str
    """As whom Git logs in with the token."""

    @classmethod
    def find(cls) -> Forge:
        """The one that the environment names; raises Stop where none does."""
        known = os.environ
        if project := known.get("CI_PROJECT_ID"):
            _needs("CI_API_V4_URL", "CI_PROJECT_URL")
            api = f"{known['CI_API_V4_URL']}/projects/{urllib.parse.quote(project, safe='')}"
            remote = f"{known['CI_PROJECT_URL']}.git"
            forge = cls("GitLab", api, remote, known.get("GITLAB_TOKEN", ""), "oauth2")
        elif project := known.get("GITHUB_REPOSITORY"):
            api = known.get("GITHUB_API_URL", "https://api.github.com")
            remote = f"{known.get('GITHUB_SERVER_URL', 'https://github.com')}/{project}.git"
            forge = cls(
                *("GitHub", f"{api}/repos/{project}", remote),
                *(known.get("GITHUB_TOKEN", ""), "x-access-token"),
            )
        else:
            raise Stop("neither GITHUB_REPOSITORY nor CI_PROJECT_ID says where this belongs")
        url = urllib.parse.urlsplit(forge.api)
        local = url.hostname in ("127.0.0.1", "::1", "localhost")
        if not (url.scheme == "https" or (url.scheme == "http" and local)):
            raise Stop(f"{forge.name}'s API is not https, and its token would travel in the open")
        return forge

    @property
    def git_login(self) -> dict[str, str]:
        """What lets Git push, as variables: arguments and addresses are seen by others."""
        remote = os.environ.get("GIT_REMOTE") or self.remote
        if not self.token or not remote.startswith("https://"):
            return {}
        login = base64.b64encode(f"{self.user}:{self.token}".encode()).decode()
        return {
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"http.{remote}.extraHeader",
            "GIT_CONFIG_VALUE_0": f"Authorization: Basic {login}",
        }

    def find_open(self, branch: str, base: str) -> dict[str, Any] | None:
        """The open merge request of a branch, as the forge describes it."""
        if self.name == "GitHub":
            owner = self.api.split("/")[-2]
            asked = {"state": "open", "head": f"{owner}:{branch}", "base": base}
            found = self._ask("GET", f"/pulls?{urllib.parse.urlencode(asked)}")
        else:
            asked = {"state": "opened", "source_branch": branch, "target_branch": base}
            found = self._ask("GET", f"/merge_requests?{urllib.parse.urlencode(asked)}")
        number = "number" if self.name == "GitHub" else "iid"
        rows = found if isinstance(found, list) else [None]
        if not all(isinstance(row, dict) and isinstance(row.get(number), int) for row in rows):
            raise Stop(f"{self.name} does not list merge requests as it should")
        return found[0] if found else None

    def open(self, branch: str, base: str, title: str, text: str) -> str:
        """Open a merge request; returns its address."""
        if self.name == "GitHub":
            said = self._ask("POST", "/pulls", title=title, body=text, head=branch, base=base)
        else:
            said = self._ask(
                *("POST", "/merge_requests"),
                **{"title": title, "description": text, "remove_source_branch": True},
                **{"source_branch": branch, "target_branch": base},
            )
        return _address(said)

    def refresh(self, known: Mapping[str, Any], title: str, text: str) -> str:
        """Give an open merge request another title and text."""
        name = "body" if self.name == "GitHub" else "description"
        if known.get("title") == title and known.get(name) == text:
            return _address(known)
        return _address(self._change(known, **{"title": title, name: text}))

    def close(self, known: Mapping[str, Any]) -> str:
        """Close an open merge request."""
        wanted = {"state": "closed"} if self.name == "GitHub" else {"state_event": "close"}
        return _address(self._change(known, **wanted))

    def _change(self, known: Mapping[str, Any], **fields: Any) -> Any:
        if self.name == "GitHub":
            return self._ask("PATCH", f"/pulls/{known['number']}", **fields)
        return self._ask("PUT", f"/merge_requests/{known['iid']}", **fields)

    def _ask(self, method: str, path: str, **body: Any) -> Any:
        login = (
            {"Authorization": f"Bearer {self.token}", "X-GitHub-Api-Version": "2022-11-28"}
            if self.name == "GitHub"
            else {"PRIVATE-TOKEN": self.token}
        )
        headers = {"Content-Type": "application/json", "User-Agent": "merge_request.py", **login}
        data = json.dumps(body).encode() if body else None
        asked = urllib.request.Request(self.api + path, data, headers, method=method)  # noqa: S310
        where = f"{self.name}: {method} {path.partition('?')[0]}"
        try:
            with urllib.request.build_opener(_NoRedirect).open(asked, timeout=60) as answer:
                return json.loads(answer.read(LARGEST_ANSWER))
        except urllib.error.HTTPError as error:
            raise Stop(f"{where} answers {error.code}: {_reason(error)}") from None
        except (OSError, HTTPException, ValueError, RecursionError) as error:
            raise Stop(f"{where} has no right answer ({type(error).__name__})") from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would take the token along to wherever it is sent."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        said = json.loads(error.read(LARGEST_ANSWER))
        told = said.get("message") or said.get("error") if isinstance(said, dict) else None
    except (OSError, HTTPException, ValueError, RecursionError):
        told = None
    return plain(str(told or error.reason))[:200]


def _address(said: Any) -> str:
    known = said if isinstance(said, dict) else {}
    return plain(str(known.get("html_url") or known.get("web_url") or "no address is told"))


def _needs(*names: str) -> None:
    for name in names:
        if not os.environ.get(name):
            raise Stop(f"{name} is not set")


def secrets() -> list[str]:
    """Values of the environment that nobody is to read, longest first."""
    wanted = re.compile(r"TOKEN|PASSWORD|SECRET|(^|_)KEY($|_)|CREDENTIAL")
    values = {v for name, v in os.environ.items() if wanted.search(name) and len(v) >= 6}
    return sorted(values, key=len, reverse=True)


def plain(text: str) -> str:
    """A text without secrets, and without what moves a terminal's cursor."""
    for secret in secrets():
        text = text.replace(secret, "***")
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def fenced(text: str, kind: str = "text") -> str:
    """A block of Markdown in which nothing of the text means anything."""
    text = plain(text.rstrip("\n"))
    if len(text) > LONGEST_DIFF:
        text = text[:LONGEST_DIFF] + "\n… cut here; the rest is in the merge request's changes"
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{kind}\n{text}\n{fence}\n"


def _run(command: list[str], where: Path, **more: str) -> subprocess.CompletedProcess[str]:
    known = {name: v for name, v in os.environ.items() if name not in FORGE_SECRETS}
    return subprocess.run(
        command,
        cwd=where,
        env=known | {"GIT_TERMINAL_PROMPT": "0"} | more,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )


@dataclass(frozen=True)
class Clone:
    """A throw-away clone of the repository, on the branch into which is merged."""

    folder: Path
    forge: Forge
    base: str

    def git(self, *arguments: str) -> str:
        return _git(self.folder, self.forge, *arguments)

    def pin(self, commit: str = "") -> dict[str, Any]:
        """What the repository serves at a commit, or here."""
        for folder in ("k8s", "deploy"):
            path = f"{folder}/base/pin.json"
            if not (self.folder / path).is_file():
                continue
            text = self.git("show", f"{commit}:{path}") if commit else None
            return _pin(text or (self.folder / path).read_text(encoding="utf-8"))
        raise Stop("there is no pin.json")

    def commit(self, title: str) -> bool:
        """Commit what changed here; returns whether something did."""
        if not self.git("status", "--porcelain"):
            return False
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", title)
        return True

    def changes(self) -> str:
        """The diff of the commit."""
        return self.git("diff", "--no-color", "--no-ext-diff", f"origin/{self.base}", "HEAD")

    def withdraw(self, branch: str, dry_run: bool) -> None:
        """Close the merge request that is open though nothing is to be merged."""
        print("Nothing to propose.")
        known = self.forge.find_open(branch, self.base) if self.forge.token else None
        if known and dry_run:
            print(f"Would close {_address(known)}")
        elif known:
            print(f"Closed {self.forge.close(known)}")

    def propose(self, branch: str, title: str, text: str, dry_run: bool) -> None:
        """Push the commit, and have one open merge request for it."""
        known = self.forge.find_open(branch, self.base) if self.forge.token else None
        at = self._theirs(branch)
        if dry_run:
            how = "refresh" if known else "open"
            print(f"Would push {branch} to {self.forge.remote}, and {how} a merge request:\n")
            print(f"{title}\n\n{text}")
            return
        if not at or self.git("diff", "--stat", at, "HEAD") or self._behind(at):
            lease = f"--force-with-lease=refs/heads/{branch}:{at}"
            self.git("push", "--quiet", lease, "origin", f"HEAD:refs/heads/{branch}")
        if known:
            print(f"Refreshed {self.forge.refresh(known, title, text)}")
        else:
            print(f"Opened {self.forge.open(branch, self.base, title, text)}")

    def _theirs(self, branch: str) -> str:
        """The commit of the branch at the forge, empty where there is none.

        Raises: Stop where people have committed to it.
        """
        listed = self.git("ls-remote", "origin", f"refs/heads/{branch}").split()
        if not listed:
            return ""
        self.git("fetch", "--quiet", "origin", f"refs/heads/{branch}")
        whose = self.git("log", "--format=%ce", f"origin/{self.base}..{listed[0]}").split()
        if set(whose) - {IDENTITY["GIT_COMMITTER_EMAIL"]}:
            raise Stop(f"{branch} has commits of others: merge it, or delete it")
        return listed[0]

    def _behind(self, commit: str) -> bool:
        """Whether the branch into which is merged has moved on since."""
        return self.git("rev-parse", f"{commit}^") != self.git("rev-parse", f"origin/{self.base}")


def _pin(text: str) -> dict[str, Any]:
    try:
        pin = json.loads(text)
        named = {name: pin[name] for name in ("registered_model", "selector", "version")}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Stop("pin.json is not as it was rendered: restore it with git") from None
    return named


def _git(where: Path, forge: Forge, *arguments: str) -> str:
    done = _run(["git", *arguments], where, **IDENTITY, **forge.git_login)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise Stop(plain(f"git {arguments[0]}: {said[-1]}"))
    return done.stdout.strip()


@contextmanager
def cloned(forge: Forge) -> Iterator[Clone]:
    """Clone the repository, with its whole history: updates compare with it."""
    remote = os.environ.get("GIT_REMOTE") or forge.remote
    with TemporaryDirectory() as temporary:
        folder = Path(temporary, "repository")
        _git(Path(temporary), forge, "clone", "--quiet", remote, str(folder))
        base = _git(folder, forge, "rev-parse", "--abbrev-ref", "HEAD")
        yield Clone(folder, forge, base)


def model(forge: Forge, dry_run: bool) -> None:
    """Propose what the registry has now."""
    with cloned(forge) as clone:
        said = _made(clone, "update-model")
        before, after = clone.pin("HEAD"), clone.pin()
        index = next((line for line in said.splitlines() if line.startswith("RE-INDEX")), "")
        moves = f"{before['version'] or before['selector']} -> {after['version']}"
        title = plain(f"{after['registered_model']} {moves}{' (RE-INDEX)' if index else ''}")
        verdict = (
            f"**{index}**" if index else "What was embedded before need not be embedded again."
        )
        _propose(clone, "model", title, [verdict, "\n`make update-model` says:\n", said], dry_run)


def tei(forge: Forge, dry_run: bool) -> None:
    """Propose TEI's newest commit."""
    url = os.environ.get("TEI_GIT_URL") or TEI
    with cloned(forge) as clone:
        found = _run(["git", "ls-remote", url, "refs/heads/main"], clone.folder).stdout.split()
        if not found or not re.fullmatch(r"[0-9a-f]{40}", found[0]):
            raise Stop(f"git ls-remote does not tell the newest commit of {url}")
        said = _made(clone, "update", f"ARGS=--vcs-ref=:current: --data tei_ref={found[0]}")
        advice = (
            "The template was tried with the commit before. The image's build stops where an edit "
            "does not fit; `make smoke` and `make parity` find what is computed otherwise.\n"
        )
        _propose(clone, "tei", f"TEI {found[0][:12]}", [advice, said], dry_run)


def _made(clone: Clone, *target: str) -> str:
    """What `make` says of the model; raises Stop with the line that ended it."""
    done = _run(["make", "--silent", *target], clone.folder)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        ended = [line for line in lines if line.startswith("error: ")] or lines[-1:]
        raise Stop(
            f"make {target[0]}: " + plain(" ".join(ended)).removeprefix("error: ").rstrip(".")[:500]
        )
    return done.stdout.partition(" files changed. ")[0].rpartition("\n")[0]


def _propose(clone: Clone, what: str, title: str, said: list[str], dry_run: bool) -> None:
    if not clone.commit(title):
        return clone.withdraw(BRANCHES[what], dry_run)
    text = [*said[:-1], fenced(said[-1]), *_checked(clone)]
    text += [
        "<details><summary>Changes</summary>\n",
        fenced(clone.changes(), "diff"),
        "</details>\n",
    ]
    text += ["Merged, it still has to be deployed: see README.md, Update."]
    clone.propose(BRANCHES[what], title, "\n".join(text), dry_run)


def _checked(clone: Clone) -> Iterator[str]:
    """What CHECKS find of the new version; what they leave behind is not proposed."""
    if checks := os.environ.get("CHECKS"):
        done = _run(["sh", "-c", checks], clone.folder)
        ended = "passed" if done.returncode == 0 else f"**failed** ({done.returncode})"
        yield f"`CHECKS` {ended}:\n"
        yield fenced(f"$ {checks}\n{done.stdout}{done.stderr}")


def images(forge: Forge, dry_run: bool) -> None:
    """Propose the digests that were written in this working tree."""
    written = json.loads((ROOT / "images/images.json").read_text())["component"]
    with cloned(forge) as clone:
        (clone.folder / written).write_bytes((ROOT / written).read_bytes())
        title = "Images by digest, as they were pushed"
        if not clone.commit(title):
            return clone.withdraw(BRANCHES["images"], dry_run)
        text = "`make push` pushed these images; merged, they run at the next deploy.\n\n"
        text += fenced(clone.changes(), "diff")
        clone.propose(BRANCHES["images"], title, text, dry_run)


# MLflow's webhooks (mlflow/webhooks/delivery.py, 3.17.2)


def concerns(event: object, pin: Mapping[str, Any]) -> bool:
    """Whether an event moved what the pin follows."""
    if not isinstance(event, dict) or not isinstance(data := event.get("data"), dict):
        return False
    kind = (event.get("entity"), event.get("action"))
    if data.get("name") != pin["registered_model"]:
        return False
    if pin["selector"] == "latest":
        return kind == ("model_version", "created")
    alias = f"@{data.get('alias')}"
    return kind == ("model_version_alias", "created") and alias == pin["selector"]


def signed(headers: Mapping[str, str], body: bytes, secret: str) -> bool:
    """Whether MLflow signed it, just now."""
    delivery, when = headers.get("X-MLflow-Delivery-Id"), headers.get("X-MLflow-Timestamp") or ""
    if not re.fullmatch(r"[0-9]{1,12}", when) or abs(time.time() - int(when)) > OLDEST_EVENT_S:
        return False
    right = hmac.new(secret.encode(), f"{delivery}.{when}.".encode() + body, hashlib.sha256)
    wanted = "v1," + base64.b64encode(right.digest()).decode()
    given = headers.get("X-MLflow-Signature") or ""
    return hmac.compare_digest(given.encode(), wanted.encode())


def listen(forge: Forge, dry_run: bool, host: str, port: int) -> None:
    """Answer MLflow at once, and propose one after the other; many events at a time are one."""
    _needs("WEBHOOK_SECRET", "MLFLOW_TRACKING_URI")
    secret, moved = os.environ["WEBHOOK_SECRET"], threading.Event()
    pin = Clone(ROOT, forge, "").pin()

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length") or ""
            if not re.fullmatch(r"[0-9]{1,6}", length) or int(length) > LARGEST_EVENT:
                return self.answer(413)
            body = self.rfile.read(int(length))
            if not signed(self.headers, body, secret):
                return self.answer(401)
            try:
                event = json.loads(body)
            except (ValueError, RecursionError):
                return self.answer(400)
            if concerns(event, pin):
                moved.set()
                return self.answer(202)
            return self.answer(204)

        def answer(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *given: object) -> None:
            print(plain(format % given), flush=True)

    server = ThreadingHTTPServer((host, port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"Listening on {host}:{server.server_port} for {pin['registered_model']}.", flush=True)
    while moved.wait():
        moved.clear()
        try:
            model(forge, dry_run)
        except Stop as stop:
            print(f"error: {plain(str(stop))}.", file=sys.stderr)
        sys.stdout.flush()


def main() -> int:
    """Returns the exit code: 1 with one line of error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["model", "tei", "images", "listen"])
    parser.add_argument("--dry-run", action="store_true", help="print it, change nothing")
    parser.add_argument("--host", default="127.0.0.1", help="where `listen` listens")
    parser.add_argument("--port", type=int, default=8357)
    given = parser.parse_args()
    try:
        forge = Forge.find()
        if not forge.token and not given.dry_run:
            raise Stop(f"{forge.name.upper()}_TOKEN is not set")
        if given.what == "listen":
            listen(forge, given.dry_run, given.host, given.port)
        else:
            {"model": model, "tei": tei, "images": images}[given.what](forge, given.dry_run)
    except Stop as stop:
        sys.stdout.flush()
        print(f"error: {plain(str(stop))}.", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {plain(str(error.strerror or error))}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
