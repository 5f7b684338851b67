"""A server with workspaces: its name is on every request to it, and on none to another host."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fetchkit.models import PinnedModel, embedding_model
from fetchkit.program import Pod, assert_ready

RUN = "0" * 32
HEADER = "X-MLFLOW-WORKSPACE"


class Server:
    """Serves a model's files or says where they are; keeps what it was asked."""

    def __init__(self, files: dict[str, bytes], elsewhere: str = "") -> None:
        seen = self.seen = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                seen.append((self.path, self.headers.get(HEADER)))
                names = [n for n in files if self.path.endswith("/" + n)]
                name = max(names, key=len, default=None)
                if name is None:
                    self._say(404, {}, b"")
                elif elsewhere:
                    self._say(307, {"Location": f"{elsewhere}/{name}"}, b"")
                else:
                    self._say(200, {"ETag": '"x"'}, files[name])

            def _say(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{server.server_port}"


@pytest.mark.parametrize("told_by", ["pin", "environment", "path"])
def test_every_request_names_the_workspace(pod: Pod, told_by: str) -> None:
    model = PinnedModel(embedding_model(), f"mlflow-artifacts:/0/{RUN}/artifacts/model")
    environment = {}
    if told_by == "path":
        model = PinnedModel(
            embedding_model(), f"mlflow-artifacts:/workspaces/team-a/0/{RUN}/artifacts/model"
        )
    pin = model.pin() | ({"workspace": "team-a"} if told_by == "pin" else {})
    if told_by == "environment":
        environment = {"MLFLOW_WORKSPACE": "team-a"}
    store = Server(model.files)
    server = Server(model.files, elsewhere=store.url)

    run = pod.run(pin, server.url, env=environment)

    assert_ready(run, pod, model)
    assert {name for _, name in server.seen} == {"team-a"}
    assert {name for _, name in store.seen} == {None}


def test_a_version_is_looked_up_in_the_pin_s_workspace(pod: Pod) -> None:
    model = PinnedModel(embedding_model(), "unused", version=None)
    server = Server({})
    pin = model.pin() | {"workspace": "team-a", "files": [], "artifact_uri": None}
    pod.run(pin, server.url, env={"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"})
    assert any("model-versions" in path for path, _ in server.seen)
    assert {name for _, name in server.seen} == {"team-a"}
