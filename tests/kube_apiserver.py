"""A real Kubernetes API server on loopback: kube-apiserver out of the Go module proxy, and etcd.

The module `k8s.io/kubernetes` names the folders of its own repository as replacements, which no module
of the proxy holds; each of them is published as a module too. So its go.mod with those names is all that
is needed. Built once per version (400 CPU seconds), kept in the tests' cache.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

import trustme
import yaml

from demo.registry import free_port

from .containers.engine import CACHE, _locked

CRDS = {
    "sigs.k8s.io/gateway-api@v1.3.0": ("config/crd/standard", ("*_httproutes.yaml",)),
    "github.com/prometheus-operator/prometheus-operator@v0.85.0": (
        "example/prometheus-operator-crd",
        ("*_podmonitors.yaml", "*_prometheusrules.yaml"),
    ),
    "github.com/kedacore/keda/v2@v2.17.0": ("config/crd/bases", ("keda.sh_scaledobjects.yaml",)),
    "github.com/external-secrets/external-secrets@v0.17.0": (
        "config/crds/bases",
        ("external-secrets.io_externalsecrets.yaml",),
    ),
}
"""Modules that hold custom resources, and where."""

GITOPS = {
    "github.com/argoproj/argo-cd/v3@v3.1.0": ("manifests/crds", ("application-crd.yaml",)),
    "github.com/fluxcd/kustomize-controller@v1.7.3": (
        "config/crd/bases",
        ("kustomize.toolkit.fluxcd.io_kustomizations.yaml",),
    ),
    "github.com/fluxcd/source-controller@v1.7.3": (
        "config/crd/bases",
        ("source.toolkit.fluxcd.io_gitrepositories.yaml",),
    ),
}
"""The same of what deploys out of Git."""

USERS = {"admin-token": ("admin", "system:masters"), "tenant-token": ("bob", "")}
"""By token: name and group. bob may do what a RoleBinding says."""


class Missing(Exception):
    """What this machine lacks, as a reason to skip."""


def go() -> str:
    """Go 1.24 or newer, which Debian 12 does not have."""
    found = shutil.which("go")
    if not found:
        raise Missing("Go 1.24 or newer is not installed, which builds kube-apiserver")
    said = subprocess.run([found, "env", "GOVERSION"], capture_output=True, text=True).stdout
    version = re.match(r"go1\.(\d+)", said)
    if not version or int(version[1]) < 24:
        raise Missing(f"{said.strip()} is too old to build kube-apiserver: Go 1.24 or newer")
    return found


def module(name: str) -> Path:
    """The folder of a Go module, fetched through the module proxy."""
    done = subprocess.run([go(), "mod", "download", "-json", name], capture_output=True, text=True)
    found = json.loads(done.stdout or "{}")
    if "Dir" not in found:
        raise Missing(
            f"the Go module proxy does not give {name}: {found.get('Error', done.stderr)}"
        )
    return Path(found["Dir"])


def program(version: str) -> Path:
    """kube-apiserver of a version, as in `v1.33.13`, built where the cache does not have it."""
    built = CACHE / "kubernetes" / version / "kube-apiserver"
    with _locked(CACHE / f"kubernetes-{version}.lock"):
        if not built.exists():
            _build(version, built)
    return built


def _build(version: str, target: Path) -> None:
    source = module(f"k8s.io/kubernetes@{version}")
    _, minor, patch = version.split(".")
    published = (source / "go.mod").read_text()
    # Without the samples, which nothing imports and not every version of which is published.
    lines = [line for line in published.splitlines() if "k8s.io/sample-" not in line]
    own = re.sub(r"=> \./staging/src/(\S+)", rf"=> \1 v0.{minor}.{patch}", "\n".join(lines) + "\n")
    # Without these the server calls itself v0.0.0.
    stamps = " ".join(
        f"-X {package}.{name}={value}"
        for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
        for name, value in (("gitVersion", version), ("gitMajor", "1"), ("gitMinor", minor))
    )
    with TemporaryDirectory() as folder:
        (Path(folder) / "go.mod").write_text(own)
        shutil.copyfile(source / "go.sum", Path(folder) / "go.sum")
        made = Path(folder) / "kube-apiserver"
        done = subprocess.run(
            [
                *(go(), "build", f"-modfile={folder}/go.mod", "-trimpath", "-buildvcs=false"),
                *("-ldflags", f"-s -w {stamps}", "-o", made, "./cmd/kube-apiserver"),
            ],
            cwd=source,
            env=os.environ | {"CGO_ENABLED": "0", "GOWORK": "off", "GOFLAGS": "-mod=mod"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise Missing(f"kube-apiserver {version} could not be built: {done.stderr[-400:]}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, target)


@dataclass(frozen=True, slots=True)
class Cluster:
    """An API server; nothing runs in it."""

    folder: Path

    def config(self, user: str) -> Path:
        """kubectl's configuration of one of USERS, by name."""
        return self.folder / f"{user}.kubeconfig"

    def kubectl(
        self, *arguments: str | Path, user: str = "admin", text: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl, whatever it ends with."""
        return subprocess.run(
            ["kubectl", "--kubeconfig", self.config(user), *map(str, arguments)],
            input=text,
            capture_output=True,
            text=True,
        )

    def done(self, *arguments: str | Path, text: str | None = None) -> str:
        """What kubectl prints, which must succeed and warn of nothing."""
        did = self.kubectl(*arguments, text=text)
        assert did.returncode == 0, f"{arguments}: {did.stderr}"
        assert "Warning" not in did.stderr, did.stderr
        return did.stdout


@contextmanager
def serving(
    version: str, more: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType({})
) -> Iterator[Cluster]:
    """Run an API server with the custom resources of CRDS, and more, until the block ends.

    Raises: Missing.
    """
    for name in ("etcd", "kubectl"):
        if not shutil.which(name):
            raise Missing(f"{name} is not installed (Debian: etcd-server; kubectl of Kubernetes)")
    server = program(version)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        port, etcd_port, peer_port = free_port(), free_port(), free_port()
        authority = trustme.CA()
        certificate = authority.issue_cert("127.0.0.1")
        authority.cert_pem.write_to_path(str(folder / "ca.crt"))
        certificate.cert_chain_pems[0].write_to_path(str(folder / "server.crt"))
        certificate.private_key_pem.write_to_path(str(folder / "server.key"))
        rows = (f'{token},{name},{name},"{group}"' for token, (name, group) in USERS.items())
        (folder / "tokens.csv").write_text("\n".join(rows) + "\n")
        for token, (name, _) in USERS.items():
            _configure(folder / f"{name}.kubeconfig", port, folder / "ca.crt", token)
        etcd = [
            *("etcd", f"--data-dir={folder}/etcd", "--unsafe-no-fsync"),
            *_listening("client", etcd_port),
            *_listening("peer", peer_port),
            f"--initial-advertise-peer-urls=http://127.0.0.1:{peer_port}",
            f"--initial-cluster=default=http://127.0.0.1:{peer_port}",
        ]
        key = folder / "server.key"
        api = [
            *(server, f"--etcd-servers=http://127.0.0.1:{etcd_port}"),
            *("--bind-address=127.0.0.1", f"--secure-port={port}", f"--cert-dir={folder}"),
            *(f"--tls-cert-file={folder}/server.crt", f"--tls-private-key-file={key}"),
            *(f"--service-account-key-file={key}", f"--service-account-signing-key-file={key}"),
            "--service-account-issuer=https://kubernetes.default.svc",
            *("--service-cluster-ip-range=10.96.0.0/16", "--authorization-mode=Node,RBAC"),
            *(f"--token-auth-file={folder}/tokens.csv", "--allow-privileged"),
        ]
        with _running(etcd, folder / "etcd.log"), _running(api, folder / "api.log"):
            cluster = Cluster(folder)
            _wait(cluster)
            for name, (where, patterns) in (CRDS | dict(more)).items():
                for path in (p for one in patterns for p in (module(name) / where).glob(one)):
                    cluster.done("apply", "--server-side", "-f", path)
            cluster.done("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
            yield cluster


def _listening(kind: str, port: int) -> list[str]:
    url = f"http://127.0.0.1:{port}"
    asked = [f"--listen-{kind}-urls={url}"]
    return asked if kind == "peer" else [*asked, f"--advertise-client-urls={url}"]


def _configure(path: Path, port: int, authority: Path, token: str) -> None:
    cluster = {"server": f"https://127.0.0.1:{port}", "certificate-authority": str(authority)}
    context = {"cluster": "test", "user": "test"}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "test", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": context}],
        "current-context": "test",
    }
    path.write_text(yaml.safe_dump(config))


@contextmanager
def _running(command: list[str | Path], log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen([*map(str, command)], stdout=output, stderr=output)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(cluster: Cluster) -> None:
    for _ in range(600):
        if cluster.kubectl("get", "--raw", "/readyz").returncode == 0:
            return
        time.sleep(0.2)
    raise AssertionError((cluster.folder / "api.log").read_text()[-2000:])
