"""Real login servers: Keycloak, oauth2-proxy in front of a store, and MLflow with its basic-auth.

Keycloak comes from Maven Central and runs with the Java that is here; oauth2-proxy is built from the
Go module proxy. Both are kept in $XDG_CACHE_HOME/tkt-tests between runs.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import subprocess
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .filesystems import Service, free_ports

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tkt-tests"
KEYCLOAK, OAUTH2_PROXY = "26.5.6", "7.15.6"
MAVEN = "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy"
JAVA = 17  # the oldest that Keycloak 26 runs with

REALM, CLIENT, SECRET = "fetch", "model-fetch", "client-5ecret-of-keycloak"
USER, PASSWORD = "ada", "pa55word-of-ada"
DISABLED = "bob"
BRIEF = "brief"
"""A client whose tokens live for LIFETIME."""
LIFETIME = 4  # seconds

ADMIN, ADMIN_PASSWORD = "admin", "pa55word-of-the-admin"


def _client(name: str, **attributes: str) -> dict[str, Any]:
    """A confidential client with both grants, whose tokens oauth2-proxy takes as its own."""
    audience = {"included.client.audience": CLIENT, "access.token.claim": "true"}
    return {
        "clientId": name,
        "secret": SECRET,
        "serviceAccountsEnabled": True,
        "directAccessGrantsEnabled": True,
        "attributes": attributes,
        "protocolMappers": [
            {
                "name": "audience",
                "protocol": "openid-connect",
                "protocolMapper": "oidc-audience-mapper",
                "config": audience,
            }
        ],
    }


def _user(name: str, enabled: bool) -> dict[str, Any]:
    return {
        "username": name,
        "enabled": enabled,
        "email": f"{name}@example.org",
        "firstName": name,
        "lastName": name,
        "credentials": [{"type": "password", "value": PASSWORD}],
    }


def _realm() -> dict[str, Any]:
    return {
        "realm": REALM,
        "enabled": True,
        "sslRequired": "none",
        "bruteForceProtected": True,
        "clients": [_client(CLIENT), _client(BRIEF, **{"access.token.lifespan": str(LIFETIME)})],
        "users": [_user(USER, True), _user(DISABLED, False)],
    }


@contextmanager
def _once(name: str) -> Iterator[Path]:
    """A folder of the cache that one process at a time fills."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield CACHE / name


def _java() -> None:
    for name in ("java", "mvn"):
        if shutil.which(name) is None:
            pytest.skip(f"no Keycloak without {name}: install a JDK from {JAVA} on, and Maven")
    told = subprocess.run(["java", "-version"], capture_output=True, text=True).stderr
    version = re.search(r'version "(\d+)', told)
    if version is None or int(version[1]) < JAVA:
        pytest.skip(f"Keycloak needs Java {JAVA} or newer: {told.splitlines()[0]}")


def _keycloak_home() -> Path:
    _java()
    with _once(f"keycloak-{KEYCLOAK}") as home:
        if not home.is_dir():
            artifact = f"org.keycloak:keycloak-quarkus-dist:{KEYCLOAK}:zip"
            packed = CACHE / "packed"
            done = subprocess.run(
                ["mvn", "-q", "-B", MAVEN, f"-Dartifact={artifact}", f"-DoutputDirectory={packed}"],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                pytest.skip(f"Maven brings no Keycloak: {done.stdout.strip()[-200:]}")
            with zipfile.ZipFile(packed / f"keycloak-quarkus-dist-{KEYCLOAK}.zip") as archive:
                archive.extractall(packed)
            made = packed / f"keycloak-{KEYCLOAK}"
            # What `start` would do each time, and what takes most of its time.
            build = ["bash", str(made / "bin" / "kc.sh"), "build", "--db=dev-mem", "--cache=local"]
            subprocess.run(build, check=True, capture_output=True)
            made.rename(home)
            shutil.rmtree(packed)
    return home


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@contextmanager
def keycloak(folder: Path) -> Iterator[str]:
    """A running Keycloak with one realm; yields the realm's address."""
    home = folder / "keycloak"
    shutil.copytree(_keycloak_home(), home)
    (home / "data" / "import").mkdir(parents=True)
    (home / "data" / "import" / "realm.json").write_text(json.dumps(_realm()))
    port, management = free_ports(2)
    service = Service.start(
        folder / "keycloak.log",
        *("bash", str(home / "bin" / "kc.sh"), "start", "--optimized", "--import-realm"),
        *("--http-enabled=true", "--hostname-strict=false", "--http-host=127.0.0.1"),
        *(f"--http-port={port}", f"--http-management-port={management}"),
        env={"JAVA_OPTS_KC_HEAP": "-Xms64m -Xmx512m"},
    )
    realm = f"http://127.0.0.1:{port}/realms/{REALM}"
    try:
        service.wait(lambda: answers(realm), 400)
        yield realm
    finally:
        service.end()


def _oauth2_proxy() -> Path:
    if shutil.which("go") is None:
        pytest.skip("no oauth2-proxy without Go: install Go")
    with _once(f"oauth2-proxy-{OAUTH2_PROXY}") as folder:
        program = folder / "oauth2-proxy"
        if not program.exists():
            module = f"github.com/oauth2-proxy/oauth2-proxy/v7@v{OAUTH2_PROXY}"
            done = subprocess.run(
                ["go", "install", module],
                env={**os.environ, "GOBIN": str(folder), "GOFLAGS": "-p=2"},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                pytest.skip(f"Go builds no oauth2-proxy: {done.stderr.strip()[-200:]}")
    return program


@contextmanager
def oauth2_proxy(folder: Path, realm: str, upstream: str) -> Iterator[str]:
    """An oauth2-proxy that lets tokens of the realm through to a server; yields its address."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    service = Service.start(
        folder / "oauth2-proxy.log",
        str(_oauth2_proxy()),
        *("--provider=keycloak-oidc", f"--oidc-issuer-url={realm}", f"--upstream={upstream}/"),
        *(f"--client-id={CLIENT}", f"--client-secret={SECRET}", f"--redirect-url={url}/callback"),
        *(f"--http-address=127.0.0.1:{port}", f"--cookie-secret={secrets.token_hex(16)}"),
        *("--cookie-secure=false", "--email-domain=*", "--skip-jwt-bearer-tokens"),
        # A client's own token has no address that anybody verified.
        *("--oidc-email-claim=preferred_username", "--insecure-oidc-allow-unverified-email=true"),
    )
    try:
        service.wait(lambda: answers(f"{url}/ping"), 60)
        yield url
    finally:
        service.end()


@dataclass(frozen=True)
class BasicAuth:
    """A running MLflow that asks for a user and a password."""

    url: str
    artifacts: Path


@contextmanager
def basic_auth(folder: Path, command: str) -> Iterator[BasicAuth]:
    """command: the `mlflow` of an environment with `mlflow[auth]`."""
    python = Path(command).with_name("python")
    if subprocess.run([python, "-c", "import flask_wtf"], capture_output=True).returncode:
        pytest.skip("no basic-auth in the MLflow that is here: install mlflow[auth]")
    config = folder / "basic_auth.ini"
    config.write_text(
        "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
        f"database_uri = sqlite:///{folder}/users.db\n"
        f"admin_username = {ADMIN}\nadmin_password = {ADMIN_PASSWORD}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    (port,) = free_ports(1)
    url, artifacts = f"http://127.0.0.1:{port}", folder / "artifacts"
    service = Service.start(
        folder / "mlflow.log",
        *(command, "server", "--app-name", "basic-auth", "--host", "127.0.0.1"),
        *("--port", str(port), "--workers", "1", "--serve-artifacts"),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
        *("--artifacts-destination", str(artifacts)),
        env={
            "MLFLOW_AUTH_CONFIG_PATH": str(config),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        },
    )
    try:
        service.wait(lambda: answers(f"{url}/health"), 240)
        yield BasicAuth(url, artifacts)
    finally:
        service.end()
