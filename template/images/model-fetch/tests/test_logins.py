"""Real login servers: Keycloak, oauth2-proxy before a store, MLflow's basic-auth. Each starts once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fetchkit import logins
from fetchkit.models import PinnedModel, embedding_model, write
from fetchkit.program import Pod, Run, assert_failed, assert_ready
from fetchkit.store import Store, serve
from test_sources import mlflow_command

MODEL = PinnedModel(embedding_model(weights=2 << 20), "mlflow-artifacts:/model", sha256=True)
CLIENT = {
    "MLFLOW_KEYCLOAK_CLIENT_ID": logins.CLIENT,
    "MLFLOW_CLIENT_SECRET": logins.SECRET,
}
PERSON = {
    **CLIENT,
    "MLFLOW_AUTH_USERNAME": logins.USER,
    "MLFLOW_AUTH_PASSWORD": logins.PASSWORD,
}


@pytest.fixture(scope="module")
def realm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with logins.keycloak(tmp_path_factory.mktemp("keycloak")) as realm:
        yield realm


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with serve(MODEL.files) as store:
        yield store


@pytest.fixture(scope="module")
def guarded(realm: str, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the store behind oauth2-proxy."""
    with logins.oauth2_proxy(tmp_path_factory.mktemp("proxy"), realm, store.url) as url:
        yield url


def token_url(realm: str) -> dict[str, str]:
    return {"MLFLOW_KEYCLOAK_TOKEN_URL": f"{realm}/protocol/openid-connect/token"}


def assert_silent(run: Run, pod: Pod) -> None:
    """No secret is told."""
    for secret in (logins.SECRET, logins.PASSWORD, "wr0ng"):
        assert secret not in run.log + pod.termination.read_text()


@pytest.mark.parametrize("login", [CLIENT, PERSON], ids=["client", "person"])
def test_keycloak_and_oauth2_proxy_let_in(
    pod: Pod, realm: str, guarded: str, login: dict[str, str]
) -> None:
    run = pod.run(MODEL, guarded, env={**token_url(realm), **login})
    assert_ready(run, pod, MODEL)
    assert_silent(run, pod)


def test_a_transfer_outlives_its_tokens(pod: Pod, realm: str, guarded: str, store: Store) -> None:
    env = {**token_url(realm), **CLIENT, "MLFLOW_KEYCLOAK_CLIENT_ID": logins.BRIEF}
    store.rate = len(MODEL.files["model.safetensors"]) / (2 * logins.LIFETIME)
    try:
        run = pod.run(MODEL, guarded, "--connections", "1", env=env, timeout=120)
    finally:
        store.rate = None
    assert_ready(run, pod, MODEL)
    assert float(run.last.partition(" MB in ")[2].partition(" s")[0]) > logins.LIFETIME


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"MLFLOW_AUTH_PASSWORD": "wr0ng"}, "invalid_grant: Invalid user credentials"),
        ({"MLFLOW_AUTH_USERNAME": logins.DISABLED}, "invalid_grant: Account disabled"),
        ({"MLFLOW_CLIENT_SECRET": "wr0ng"}, "unauthorized_client: Invalid client"),
        ({"MLFLOW_KEYCLOAK_CLIENT_ID": "nobody"}, "invalid_client: Invalid client"),
        ({"MLFLOW_KEYCLOAK_SCOPE": "nothing"}, "invalid_scope: Invalid scopes"),
    ],
    ids=str,
)
def test_keycloak_says_why_not(
    pod: Pod, realm: str, store: Store, wrong: dict[str, str], said: str
) -> None:
    run = pod.run(MODEL, store.url, env={**token_url(realm), **PERSON, **wrong})
    assert_failed(run, pod, 4)
    assert said in run.last
    assert_silent(run, pod)


@pytest.mark.parametrize("path", ["", "/protocol/openid-connect/tokens", "-other/protocol/x/token"])
def test_an_address_that_gives_no_tokens_is_a_setting(
    pod: Pod, realm: str, store: Store, path: str
) -> None:
    run = pod.run(MODEL, store.url, env={**PERSON, "MLFLOW_KEYCLOAK_TOKEN_URL": f"{realm}{path}"})
    assert_failed(run, pod, 2)
    assert "MLFLOW_KEYCLOAK_TOKEN_URL" in run.last


@pytest.mark.parametrize("token", [None, "t0ken-of-nobody"])
def test_oauth2_proxy_lets_nobody_in_without_a_token_of_its_realm(
    pod: Pod, guarded: str, token: str | None
) -> None:
    run = pod.run(MODEL, guarded, env={"MLFLOW_TRACKING_TOKEN": token} if token else {})
    assert_failed(run, pod, 4)
    assert ("check the credentials" if token else "set MLFLOW_TRACKING_TOKEN") in run.last


@pytest.fixture(scope="module")
def basic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow that asks for a user and a password, and has the model."""
    with logins.basic_auth(tmp_path_factory.mktemp("basic"), mlflow_command()) as server:
        write(MODEL.files, Path(server.artifacts) / "model")
        yield server.url


def test_mlflows_own_users(pod: Pod, basic: str) -> None:
    right = {
        "MLFLOW_TRACKING_USERNAME": logins.ADMIN,
        "MLFLOW_TRACKING_PASSWORD": logins.ADMIN_PASSWORD,
    }
    for wrong in (
        {},
        {**right, "MLFLOW_TRACKING_PASSWORD": "wr0ng"},
        {"MLFLOW_TRACKING_TOKEN": "t"},
    ):
        run = pod.run(MODEL, basic, env=wrong)
        assert_failed(run, pod, 4)
        assert_silent(run, pod)
    assert_ready(pod.run(MODEL, basic, env=right), pod, MODEL)
