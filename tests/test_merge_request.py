"""The registry moves, a merge request appears: a real MLflow, a bare Git remote, GitHub's and GitLab's paths.

The forges are stand-ins with the paths, logins and fields of their REST documentation.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from demo.registry import connect, serve
from tests.conftest import program
from tests.snapshots import register, snapshot
from tests.tei_stub.server import serve_with
from tests.test_ci import every_step
from tests.test_update_matrix import (  # noqa: F401 (a fixture)
    Repository,
    empty,
    new_version,
)

ROOT = Path(__file__).parent.parent
TOKEN = "a-token-of-the-test"
SECRET = "what-mlflow-signs-with"
PROGRAM = "ci/merge_request.py"
MODEL = "acme-followed"


@dataclass
class Forge:
    """What a forge was asked, and its merge requests."""

    kind: str
    base: str = ""
    asked: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Another status and body, by method."""

    @property
    def open(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["state"] in ("open", "opened")]

    @property
    def variables(self) -> dict[str, str]:
        if self.kind == "GitHub":
            own = {"GITHUB_API_URL": self.base, "GITHUB_REPOSITORY": "acme/e5"}
            return own | {"GITHUB_SERVER_URL": self.base, "GITHUB_TOKEN": TOKEN}
        own = {"CI_API_V4_URL": f"{self.base}/api/v4", "CI_PROJECT_ID": "42"}
        return own | {"CI_PROJECT_URL": f"{self.base}/acme/e5", "GITLAB_TOKEN": TOKEN}

    def text(self, row: dict[str, Any]) -> str:
        return str(row["body" if self.kind == "GitHub" else "description"])

    def answer(self, method: str, path: str, headers: Any, body: dict[str, Any]) -> tuple[int, Any]:
        github = self.kind == "GitHub"
        login = headers["Authorization"] if github else headers["PRIVATE-TOKEN"]
        if login != (f"Bearer {TOKEN}" if github else TOKEN):
            return 401, {"message": "Bad credentials"}
        root = "/repos/acme/e5/pulls" if github else "/api/v4/projects/42/merge_requests"
        url = urlsplit(path)
        if not url.path.startswith(root):
            return 404, {"message": "Not Found"}
        number = url.path.removeprefix(root).strip("/")
        source = "head" if github else "source_branch"
        if method == "GET" and not number:
            asked = {name: values[0] for name, values in parse_qs(url.query).items()}
            assert asked["state"] == ("open" if github else "opened")
            branch = asked[source].removeprefix("acme:")
            return 200, [row for row in self.open if row[source] == branch]
        if method == "POST" and not number:
            name = {"number": len(self.rows) + 1} if github else {"iid": len(self.rows) + 1}
            address = {("html_url" if github else "web_url"): f"{self.base}/{len(self.rows) + 1}"}
            state = {"state": "open" if github else "opened"}
            self.rows.append(name | address | state | body)
            return 201, self.rows[-1]
        if method == ("PATCH" if github else "PUT"):
            row = self.rows[int(number) - 1]
            row |= body
            if body.get("state_event") == "close":
                row["state"] = "closed"
            return 200, row
        return 405, {}


@contextmanager
def forge(kind: str) -> Iterator[Forge]:
    it = Forge(kind)

    class Handler(BaseHTTPRequestHandler):
        def any(self) -> None:
            it.asked.append(f"{self.command} {self.path}")
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
            if self.command in it.answers:
                status, text = it.answers[self.command]
            else:
                status, said = it.answer(self.command, self.path, self.headers, body)
                text = json.dumps(said)
            self.send_response(status)
            if status in (301, 302, 307):
                self.send_header("Location", text)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = do_PATCH = do_PUT = any

        def log_message(self, *_: Any) -> None:
            pass

    with serve_with(Handler) as it.base:
        yield it


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow, allowed to send webhooks to this machine, which it is not by default."""
    own = {"MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http", "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true"}
    own["MLFLOW_WEBHOOK_CACHE_TTL"] = "1"  # it keeps a list without this webhook for a minute
    with serve(tmp_path_factory.mktemp("webhooks"), environment=own) as uri:
        yield uri


@dataclass
class Followed:
    """A repository that follows an alias, at a bare remote."""

    project: Repository
    remote: Path
    model: str

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-B", str(self.project.folder / PROGRAM), *words]

    def variables(self, at: Forge, **more: str) -> dict[str, str]:
        known = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "LANG": "C.UTF-8"}
        known |= {"HOME": str(self.project.home), "GIT_REMOTE": str(self.remote)}
        known |= {"COPIER": f"{sys.executable} -W ignore -m copier", "WEBHOOK_SECRET": SECRET}
        return known | self.project.variables | at.variables | more

    def run(self, at: Forge, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*words), env=self.variables(at, **more), capture_output=True, text=True
        )
        assert TOKEN not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    def done(self, at: Forge, *words: str, **more: str) -> str:
        done = self.run(at, *words, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def git(self, *arguments: str) -> str:
        return self.project.git(*arguments, where=self.remote)

    @property
    def branches(self) -> list[str]:
        return self.git("branch", "--format=%(refname:short)").split()

    def version(self, branch: str) -> str:
        return str(json.loads(self.git("show", f"{branch}:k8s/base/pin.json"))["version"])

    def moved(self, version: int, alias: str = "champion") -> None:
        client = connect(self.project.variables["MLFLOW_TRACKING_URI"])
        client.set_registered_model_alias(self.model, alias, str(version))


@pytest.fixture
def followed(empty: Repository, mlflow: str, tmp_path: Path) -> Followed:  # noqa: F811
    """Pinned at version 1 of a model; version 2 has other dimensions."""
    model = f"acme-{tmp_path.name.replace('_', '-')}"
    register(mlflow, snapshot(tmp_path / "first"), model)
    it = Followed(empty, tmp_path / "remote.git", model)
    empty.variables["MLFLOW_TRACKING_URI"] = mlflow
    it.moved(1)
    empty.copy(f"model_id={model}", "model_version=@champion", "accelerator=cpu", "ci=github")
    new_version(empty, tmp_path / "second", hidden_size=16)
    empty.git("clone", "--quiet", "--bare", ".", str(it.remote))
    return it


@pytest.mark.parametrize("kind", ["GitHub", "GitLab"])
def test_one_merge_request_is_opened_refreshed_and_closed(
    kind: str, followed: Followed, tmp_path: Path
) -> None:
    with forge(kind) as at:
        assert "Nothing to propose" in followed.done(at, "model")
        followed.moved(2)

        dry = followed.done(at, "model", "--dry-run")
        assert "Would push update-model" in dry
        assert f"{followed.model} 1 -> 2 (RE-INDEX)" in dry
        assert not at.rows
        assert followed.branches == ["main"]

        said = followed.done(at, "model", CHECKS="env; echo found; exit 3")
        assert said == f"Opened {at.base}/1\n"
        [row] = at.open
        text = at.text(row)
        assert row["title"] == f"{followed.model} 1 -> 2 (RE-INDEX)"
        assert text.startswith("**RE-INDEX: another dimensions.")
        changes = text.partition("<details>")[2]
        assert '\n-    "version": "1"' in changes
        assert '\n+    "version": "2"' in changes
        assert "**failed** (3)" in text
        assert "\nfound\n" in text
        assert TOKEN not in text
        assert SECRET not in text
        assert "_TOKEN=" not in text
        assert followed.version("update-model") == "2"
        assert followed.version("main") == "1"
        first = followed.git("rev-parse", "update-model")

        followed.done(at, "model")
        assert followed.git("rev-parse", "update-model") == first  # nothing new, nothing pushed
        new_version(followed.project, tmp_path / "third")
        followed.moved(3)
        assert followed.done(at, "model") == f"Refreshed {at.base}/1\n"
        assert [row["title"] for row in at.open] == [f"{followed.model} 1 -> 3"]
        assert followed.version("update-model") == "3"
        assert followed.git("rev-list", "--count", "main..update-model") == "1\n"

        followed.moved(1)
        assert f"Closed {at.base}/1" in followed.done(at, "model")
        assert not at.open


def test_mlflows_webhook_opens_it(followed: Followed) -> None:
    client = connect(followed.project.variables["MLFLOW_TRACKING_URI"])
    with forge("GitHub") as at:
        listener = subprocess.Popen(
            followed.command("listen", "--port", "0"),
            env=followed.variables(at),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        hook = None
        try:
            assert listener.stdout is not None
            port = re.search(r":(\d+) for", listener.stdout.readline())
            assert port
            url = f"http://127.0.0.1:{port[1]}/"
            hook = client.create_webhook(
                *("follow", url, ["model_version_alias.created"]), secret=SECRET
            )
            for forged in ({}, {"X-MLflow-Signature": "v1,AAAA", "X-MLflow-Timestamp": "1"}):
                asked = urllib.request.Request(url, b"{}", forged)
                with pytest.raises(urllib.error.HTTPError, match="401"):
                    urllib.request.urlopen(asked)
            followed.moved(2, alias="another")  # which nothing here follows
            followed.moved(2)
            for _ in range(1200):
                if at.rows:
                    break
                time.sleep(0.1)
            [row] = at.open
            assert row["title"] == f"{followed.model} 1 -> 2 (RE-INDEX)"
            assert followed.version("update-model") == "2"
        finally:
            if hook:
                client.delete_webhook(hook.webhook_id)
            listener.terminate()
            said = listener.communicate(timeout=20)[0]
        assert said.count('"POST / HTTP/1.1" 202') == 1
        assert said.count('"POST / HTTP/1.1" 204') == 1
        assert TOKEN not in said
        assert SECRET not in said


def test_commits_of_others_are_not_overwritten(followed: Followed) -> None:
    followed.moved(2)
    with forge("GitLab") as at:
        followed.project.git("checkout", "--quiet", "-b", "update-model")
        followed.project.edit("README.md", "## Build\n", "## Building\n")
        followed.project.commit("mine")
        followed.project.git("push", "--quiet", str(followed.remote), "update-model")
        mine = followed.git("rev-parse", "update-model")
        refused = followed.run(at, "model")
        assert refused.returncode == 1
        assert (
            "error: update-model has commits of others: merge it, or delete it." in refused.stderr
        )
        assert followed.git("rev-parse", "update-model") == mine
        assert not at.rows


@pytest.mark.parametrize("kind", ["GitHub", "GitLab"])
def test_what_a_forge_refuses_is_one_line(kind: str, followed: Followed) -> None:
    followed.moved(2)
    with forge(kind) as at, forge(kind) as elsewhere:
        for answers, said in (
            (
                {"POST": (403, '{"message": "no, a-token-of-the-test \\u001b[2J"}')},
                "answers 403: no",
            ),
            ({"GET": (307, f"{elsewhere.base}/away")}, "answers 307"),
            ({"GET": (200, "<html>login</html>")}, "has no right answer"),
            ({"GET": (200, '[{"number": "1; x", "iid": null}]')}, "does not list merge requests"),
        ):
            at.answers = answers
            failed = followed.run(at, "model")
            assert failed.returncode == 1
            [line] = failed.stderr.splitlines()
            assert line.startswith(f"error: {kind}")
            assert said in line
            assert "\x1b" not in line
        assert not elsewhere.asked  # the token goes nowhere else
        far = at.variables | {
            "GITHUB_API_URL": "http://x.example",
            "CI_API_V4_URL": "http://x.example",
        }
        assert "is not https" in followed.run(at, "model", **far).stderr


def test_a_registry_that_does_not_answer_is_one_line(followed: Followed) -> None:
    with forge("GitHub") as at:
        failed = followed.run(at, "model", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
        assert failed.returncode == 1
        assert "error: make update-model: Copier failed" in failed.stderr
        assert followed.branches == ["main"]
        assert not at.rows


def test_teis_newest_commit_is_an_answer(followed: Followed, tmp_path: Path) -> None:
    source = tmp_path / "tei"
    source.mkdir()
    followed.project.git("init", "--quiet", where=source)
    (source / "README.md").touch()
    followed.project.commit("newest", where=source)
    newest = followed.project.git("rev-parse", "HEAD", where=source).strip()
    with forge("GitHub") as at:
        followed.done(at, "tei", TEI_GIT_URL=str(source))
        [row] = at.open
        assert row["title"] == f"TEI {newest[:12]}"
    for name in (".copier-answers.yml", "images/tei/Dockerfile"):
        assert newest in followed.git("show", f"update-tei:{name}")
    assert f"{newest[:12]}-cpu" in followed.git("show", "update-tei:images/images.json")


@pytest.mark.parametrize("kind", ["GitHub", "GitLab"])
def test_the_jobs_steps_run_as_they_are_written(
    kind: str, followed: Followed, tmp_path: Path
) -> None:
    """Those of test_ci, which runs all others, that speak with the forge, the registry or TEI's Git."""
    project = followed.project
    if kind == "GitLab":
        project.updated(arguments="--vcs-ref=:current: --data ci=gitlab")
        project.commit("GitLab")
        project.git("push", "--quiet", str(followed.remote), "main")
    project.git("init", "--quiet", "--bare", str(tmp_path / "tei"))
    project.git("push", "--quiet", str(tmp_path / "tei"), "main")
    lines = [
        (job, line, variables)
        for job in ("model", "images")
        for line, variables in every_step(project.folder, kind.lower(), job)
        if re.search(r"merge_request\.py|check-update", line)
    ]
    assert len(lines) == 4
    followed.moved(2)
    said = {}
    for dry in ("1", "") if kind == "GitHub" else ("",):
        with forge(kind) as at:
            for job, line, variables in lines:
                own = {"FOLLOW_TEI": "1", "TEI_GIT_URL": str(tmp_path / "tei"), "CHECKS": ""}
                own |= {"DRY_RUN": dry} if "DRY_RUN" in variables else {}
                (project.folder / "k8s/images/kustomization.yaml").write_text("# as pushed\n")
                if job == "model":
                    project.git("checkout", "--", "k8s/images")
                command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", line]
                environment = followed.variables(at, **own)
                done = subprocess.run(
                    command, cwd=project.folder, env=environment, capture_output=True, text=True
                )
                assert done.returncode == 0, done.stdout + done.stderr
                assert TOKEN not in done.stdout + done.stderr
                said[line] = done.stdout
            source = "head" if kind == "GitHub" else "source_branch"
            proposed = ["update-images"] if dry else ["update-model", "update-tei", "update-images"]
            assert [row[source] for row in at.open] == proposed
        project.git("checkout", "--", "k8s/images")
    assert "Model: `make update-model` would change" in said["make check-update"]


def test_digests_that_were_pushed_are_proposed(followed: Followed) -> None:
    name = "k8s/images/kustomization.yaml"
    (followed.project.folder / name).write_text("# as pushed\n")
    with forge("GitHub") as at:
        followed.done(at, "images")
        assert [row["head"] for row in at.open] == ["update-images"]
    assert followed.git("show", f"update-images:{name}") == "# as pushed\n"


@pytest.mark.parametrize(
    ("selector", "event", "wanted"),
    [
        ("@champion", ("model_version_alias", "created", MODEL, "champion"), True),
        ("@champion", ("model_version_alias", "created", MODEL, "other"), False),
        ("@champion", ("model_version_alias", "deleted", MODEL, "champion"), False),
        ("@champion", ("model_version_alias", "created", "acme-other", "champion"), False),
        ("@champion", ("model_version", "created", MODEL, None), False),
        ("latest", ("model_version", "created", MODEL, None), True),
        ("latest", ("model_version_alias", "created", MODEL, "champion"), False),
        ("7", ("model_version", "created", MODEL, None), False),
    ],
)
def test_only_what_the_pin_follows_concerns_it(
    selector: str, event: tuple[Any, ...], wanted: bool
) -> None:
    it = program(ROOT / "template" / PROGRAM)
    pin = {"registered_model": MODEL, "selector": selector}
    entity, action, name, alias = event
    data = {"name": name, "version": "2"} | ({"alias": alias} if alias else {})
    assert it.concerns({"entity": entity, "action": action, "data": data}, pin) is wanted
    for odd in (None, [], {"data": 1}, {"data": {"name": [MODEL]}}, {"entity": {}, "data": {}}):
        assert it.concerns(odd, pin) is False
