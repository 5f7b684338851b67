"""Says what this machine and the cluster lack before `make deploy`, and what mends it; changes nothing.

    python3 scripts/doctor.py OBJECTS

`make doctor` calls it. What is needed is read from what Kustomize makes of the folder OBJECTS.
Ends with 1 when something is missing. Needs Python 3.10, and kubectl.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 10  # for each answer
OLDEST = (1, 30)  # Kubernetes that knows a preStop sleep
VERBS = ("get", "list", "create", "patch", "delete")
DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"

# By their provisioners, as their own documentation says: disks that one node has, and what all can write.
ONE_NODE = re.compile(
    r"local-path|hostpath|no-provisioner|ebs\.csi|pd\.csi|disk\.csi|cinder|\.rbd\.|topolvm"
)
SHARED = re.compile(r"nfs|cephfs|efs\.csi|file\.csi|filestore|longhorn|juicefs|seaweedfs")

# What brings a group of objects, as its own documentation installs it.
RELEASE = "https://github.com/{}/releases/download/{}"
OPERATORS = {
    "gateway.networking.k8s.io": ("kubernetes-sigs/gateway-api", "v1.3.0/standard-install.yaml"),
    "keda.sh": ("kedacore/keda", "v2.17.0/keda-2.17.0.yaml"),
    "monitoring.coreos.com": ("prometheus-operator/prometheus-operator", "v0.85.0/bundle.yaml"),
}
GPU_OPERATOR = (
    "helm install gpu-operator gpu-operator --repo https://helm.ngc.nvidia.com/nvidia "
    "--namespace gpu-operator --create-namespace"
)
# What the Secret of MLflow's login holds, by the answer mlflow_auth.
LOGIN = {
    "token": "MLFLOW_TRACKING_TOKEN",
    "basic": "MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD",
    "keycloak": "MLFLOW_KEYCLOAK_TOKEN_URL MLFLOW_KEYCLOAK_CLIENT_ID MLFLOW_CLIENT_SECRET "
    "MLFLOW_AUTH_USERNAME MLFLOW_AUTH_PASSWORD",
}

Object = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One thing that was looked at."""

    state: str
    text: str
    command: str = ""

    def __str__(self) -> str:
        text = "".join(c if c.isprintable() else " " for c in self.text)  # what others say is in it
        return f"{self.state:15}{text}" + (f"\n{'':15}{self.command}" if self.command else "")


def ok(text: str) -> Line:
    return Line("ok", text)


def missing(text: str, command: str) -> Line:
    """command: what mends it."""
    return Line("missing", text, command)


def unknown(text: str, command: str = "") -> Line:
    """command: what tells whoever may look."""
    return Line("not checkable", text, command)


Done = subprocess.CompletedProcess[str]


def run(*command: str, text: str = "") -> Done:
    try:
        return subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=3 * SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Done(command, 1, "", f"{command[0]}: {type(error).__name__}")


def kubectl(*arguments: str, text: str = "") -> Done:
    return run("kubectl", f"--request-timeout={SECONDS}s", *arguments, text=text)


def why(done: Done) -> str:
    """What a command that failed says, in short."""
    lines = done.stderr.strip().splitlines() or ["it says nothing"]
    return "you may not look" if "Forbidden" in done.stderr else lines[-1][:200]


def there(text: str, create: str, kind: str, name: str, namespace: str = "") -> Line:
    """Whether an object is there. Its name alone is asked for: what a Secret holds stays in the cluster."""
    within = ["--namespace", namespace] if namespace else []
    done = kubectl(*within, "get", kind, name, "--output=name")
    if done.returncode == 0:
        return ok(text)
    if "NotFound" in done.stderr:
        return missing(text, create)
    return unknown(f"{text}: {why(done)}")


def this_machine() -> Iterator[Line]:
    if run("git", "-C", str(ROOT), "rev-parse", "--verify", "HEAD").returncode == 0:
        yield ok("this folder is in Git")
    else:
        yield missing(
            "a commit of this folder, which `make update` starts from",
            'git init && git add --all && git commit --message "As rendered"',
        )
    installed = [name for name in ("docker", "podman", "buildah") if shutil.which(name)]
    builder = next((name for name in installed if run(name, "version").returncode == 0), "")
    if builder:
        yield ok(f"{builder} builds the images")
    else:
        start = f"systemctl start {installed[0]}" if installed else "apt-get install podman"
        yield missing("docker, podman or buildah, which builds the images", f"sudo {start}")
    image = json.loads((ROOT / "images/images.json").read_text())["images"]["model-fetch"]
    yield registry(image["name"].partition("/")[0], builder)


def registry(host: str, builder: str) -> Line:
    """Whether the registry takes this machine's login, which the builder keeps."""
    name, mend = f"the registry {host}", f"{builder or 'docker'} login {host}"
    here = re.match(r"(localhost|127\.[\d.]+)(:|$)", host)
    try:
        urllib.request.urlopen(  # noqa: S310 - the scheme is ours
            f"{'http' if here else 'https'}://{host}/v2/", timeout=SECONDS
        ).close()
        return ok(f"{name} asks for no login")
    except urllib.error.HTTPError as error:
        if error.code != 401:
            return unknown(f"{name} answers {error.code}", mend)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        return unknown(f"{name} does not answer as one here ({reason})", mend)
    if not builder:
        return unknown(f"a login to {name}: no builder answers", mend)
    # Tries what is kept; asks nobody, for there is nothing to read.
    done = run(builder, "login", host)
    return (
        ok(f"{name} takes this machine's login")
        if done.returncode == 0
        else missing(f"a login to {name}", mend)
    )


def documents(text: str) -> Iterator[Object]:
    """The objects that kubectl prints as JSON, one after the other or as a List."""
    while text := text.strip():
        item, at = json.JSONDecoder().raw_decode(text)
        yield from item["items"] if item["kind"] == "List" else [item]
        text = text[at:]


class Needs:
    """What the objects need, as they would be applied."""

    def __init__(self, folder: str) -> None:
        """Raises: SystemExit, where Kustomize or the server does not make them out."""
        made = kubectl("kustomize", folder)
        if made.returncode:
            raise SystemExit(f"{folder} holds no set of objects: {why(made)}")
        rows = [row.split() for row in kubectl("api-resources", "--no-headers").stdout.splitlines()]
        known = {(row[-3], row[-1]): row[0] for row in rows if len(row) >= 4}
        self.resources: dict[tuple[str, str], str] = {}
        """By (apiVersion, kind), what rights name; empty where the server does not know it."""
        readable = []
        for text in re.split(r"^---$", made.stdout, flags=re.MULTILINE):
            # Kustomize writes both at the start of a line.
            found = dict(re.findall(r"^(apiVersion|kind): (\S+)$", text, re.MULTILINE))
            key = found["apiVersion"], found["kind"]
            self.resources[key] = known.get(key, "")
            readable += [text] if key in known else []
        reading = (
            "create",
            "--dry-run=client",
            "--validate=false",
            "--output=json",
            "--filename=-",
        )
        printed = kubectl(*reading, text="---\n".join(readable)).stdout
        self.objects = list(documents(printed))
        if not self.of("Deployment"):
            raise SystemExit(f"{folder} holds no Deployment that the server can read")
        deployment = self.of("Deployment")[0]
        self.namespace = deployment["metadata"]["namespace"]
        self.pod: Object = deployment["spec"]["template"]["spec"]
        self.containers: list[Object] = [
            *self.pod.get("initContainers", []),
            *self.pod["containers"],
        ]

    def of(self, kind: str) -> list[Object]:
        return [item for item in self.objects if item["kind"] == kind]

    def by_hand(self) -> Iterator[tuple[str, str, str]]:
        """(kind, name, words that create it) of what is in no file: Secrets, and an authority's file."""
        pulls = list(self.pod.get("imagePullSecrets", []))
        for account in self.of("ServiceAccount"):
            pulls += account.get("imagePullSecrets", [])
        for pull in pulls:
            login = "--docker-server=… --docker-username=… --docker-password=…"
            yield "secret", pull["name"], f"docker-registry {pull['name']} {login}"
        for container in self.containers:
            for source in container.get("envFrom", []):
                if (secret := source.get("secretRef")) and not secret.get("optional"):
                    keys = LOGIN.get(answer("mlflow_auth"), "").split()
                    words = [f'--from-literal={key}="${key}"' for key in keys]
                    yield "secret", secret["name"], " ".join(["generic", secret["name"], *words])
            for variable in container.get("env", []):
                if secret := variable.get("valueFrom", {}).get("secretKeyRef"):
                    value = f'--from-literal={secret["key"]}="$(openssl rand -hex 32)"'
                    yield "secret", secret["name"], f"generic {secret['name']} {value}"
        for ingress in self.of("Ingress"):
            if "cert-manager.io/" not in json.dumps(ingress["metadata"].get("annotations", {})):
                for tls in ingress["spec"].get("tls", []):
                    yield "secret", tls["secretName"], f"tls {tls['secretName']} --cert=… --key=…"
        made = {item["metadata"]["name"] for item in self.of("ConfigMap")}
        for volume in self.pod.get("volumes", []):
            name = volume.get("configMap", {}).get("name")
            if name and name not in made:
                yield "configmap", name, f"{name} --from-file=ca.crt=…"


def answer(name: str) -> str:
    """An answer of one word."""
    found = re.search(rf"^{name}: (\S+)$", (ROOT / ".copier-answers.yml").read_text(), re.MULTILINE)
    return found[1] if found else ""


def cluster(folder: str) -> Iterator[Line]:
    if not shutil.which("kubectl"):
        yield missing(
            "kubectl, without which nothing of the cluster is known",
            "sudo snap install kubectl --classic",
        )
        return
    seen = kubectl(
        "config", "view", "--minify", "--output=jsonpath={.clusters[0].cluster.server}"
    ).stdout
    if not seen:
        yield missing(
            "a cluster in kubectl's context",
            "kubectl config get-contexts; kubectl config use-context …",
        )
        return
    yield ok(f"kubectl's context is {kubectl('config', 'current-context').stdout.strip()}: {seen}")
    done = kubectl("version", "--output=json")
    version = json.loads(done.stdout or "{}").get("serverVersion")
    if not version:
        yield missing(f"an answer of {seen}: {why(done)}", "kubectl cluster-info")
        return
    numbers = int(version["major"]), int(re.sub(r"\D", "", version["minor"]))
    if numbers < OLDEST:
        text = f"Kubernetes {OLDEST[0]}.{OLDEST[1]}: the cluster has {version['gitVersion']}"
        yield missing(text, "https://kubernetes.io/docs/tasks/administer-cluster/cluster-upgrade/")
    else:
        yield ok(f"Kubernetes {version['gitVersion']}")
    needs = Needs(folder)
    name = needs.namespace
    yield there(f"namespace {name}", f"kubectl create namespace {name}", "namespace", name)
    for check in (kinds, rights, storage, runtime_class, nodes, secrets, mlflow):
        yield from check(needs)


def kinds(needs: Needs) -> Iterator[Line]:
    """Of custom resources."""
    for (version, kind), resource in needs.resources.items():
        group = version.partition("/")[0]
        if not resource:
            what = (
                RELEASE.format(*OPERATORS[group]) if group in OPERATORS else f"WHAT-BRINGS-{group}"
            )
            mend = f"kubectl apply --server-side --filename {what}"
            yield missing(f"{kind} of {version}, which the cluster does not know", mend)
        elif group in OPERATORS:
            yield ok(f"{kind} of {version}")


def rights(needs: Needs) -> Iterator[Line]:
    asked = [
        {"namespace": needs.namespace, "group": group, "resource": resource, "verb": verb}
        for (version, _), resource in needs.resources.items()
        for group in ["" if version == "v1" else version.partition("/")[0]]
        for verb in VERBS
        if resource
    ]
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
    items = [review | {"spec": {"resourceAttributes": attributes}} for attributes in asked]
    listed = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    done = kubectl("create", "--output=json", "--filename=-", text=listed)
    if done.returncode:
        yield unknown(f"what you may do in {needs.namespace}: {why(done)}")
        return
    lacking: dict[str, None] = {}
    for item in documents(done.stdout):
        about = item["spec"]["resourceAttributes"]
        if not item["status"].get("allowed"):
            lacking[f"{about['resource']}.{about.get('group', '')}".rstrip(".")] = None
    if not lacking:
        yield ok(f"you may deploy to {needs.namespace}")
        return
    user = kubectl("auth", "whoami", "--output=jsonpath={.status.userInfo.username}").stdout
    named = f"kubectl --namespace {needs.namespace} create"
    role = f"{named} role deployer --verb={','.join(VERBS)} --resource={','.join(lacking)}"
    binding = f"{named} rolebinding deployer --role=deployer --user={shlex.quote(user)}"
    yield missing(
        f"the right to deploy {', '.join(lacking)}", f"{role} && {binding} # as its administrator"
    )


def storage(needs: Needs) -> Iterator[Line]:
    own = {claim["metadata"]["name"]: claim for claim in needs.of("PersistentVolumeClaim")}
    for volume in needs.pod.get("volumes", []):
        name = volume.get("persistentVolumeClaim", {}).get("claimName")
        if name in own:
            yield storage_class(needs, name, own[name]["spec"])
        elif name:
            create = f"kubectl --namespace {needs.namespace} create --filename YOUR-CLAIM.yaml"
            yield there(f"the claim {name} of MLflow's store", create, "pvc", name, needs.namespace)


def storage_class(needs: Needs, claim: str, spec: Object) -> Line:
    wanted, modes = spec.get("storageClassName"), spec["accessModes"]
    phase = "--output=jsonpath={.status.phase}"
    if kubectl("--namespace", needs.namespace, "get", "pvc", claim, phase).stdout == "Bound":
        return ok(f"the volume {claim}")
    done = kubectl("get", "storageclasses", "--output=json")
    if done.returncode:
        return unknown(f"StorageClass {wanted or 'of the cluster'}: {why(done)}")
    classes = {item["metadata"]["name"]: item for item in json.loads(done.stdout)["items"]}
    usual = [
        name
        for name, item in classes.items()
        if item["metadata"].get("annotations", {}).get(DEFAULT_CLASS) == "true"
    ]
    name = wanted or next(iter(usual), "")
    mend = 'make update ARGS="--data storage_class=…"'
    if name not in classes:
        known = ", ".join(classes) or "none"
        return missing(f"StorageClass {name or 'that is the default'}; there are: {known}", mend)
    provisioner = classes[name]["provisioner"]
    text = f"StorageClass {name} ({provisioner}) with {', '.join(modes)}"
    if "ReadWriteMany" not in modes or SHARED.search(provisioner):
        return ok(text)
    if ONE_NODE.search(provisioner):
        return missing(text, mend)
    return unknown(f"{text}: a claim stays Pending where it is not offered")


def runtime_class(needs: Needs) -> Iterator[Line]:
    if name := needs.pod.get("runtimeClassName"):
        made = {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass"}
        made |= {"metadata": {"name": name}, "handler": name}
        create = f"echo '{json.dumps(made)}' | kubectl create --filename -"
        yield there(f"RuntimeClass {name}", create, "runtimeclass", name)


def nodes(needs: Needs) -> Iterator[Line]:
    """Whether some node can take the pod."""
    done = kubectl("get", "nodes", "--output=json")
    if done.returncode:
        yield unknown(f"the nodes: {why(done)}", "kubectl describe nodes")
        return
    selector = needs.pod.get("nodeSelector", {})
    labels = " ".join(f"{key}={value}" for key, value in selector.items())
    found = json.loads(done.stdout)["items"]
    found = [n for n in found if selector.items() <= n["metadata"].get("labels", {}).items()]
    if found:
        yield ok(f"a node with {labels}")
    else:
        yield missing(
            f"a node with {labels}", 'make update ARGS="--data image_platform=…"; make image push'
        )
    limits = [container.get("resources", {}).get("limits", {}) for container in needs.containers]
    for name, amount in {n: int(a) for one in limits for n, a in one.items() if "/" in n}.items():
        offered = [int(node["status"].get("allocatable", {}).get(name, 0)) for node in found]
        enough = any(one >= amount for one in offered)
        text = f"a node that offers {name}: {amount}"
        yield ok(text) if enough else missing(text, GPU_OPERATOR)


def secrets(needs: Needs) -> Iterator[Line]:
    for kind, name, words in dict.fromkeys(needs.by_hand()):
        create = f"kubectl --namespace {needs.namespace} create {kind} {words}"
        yield there(f"{kind} {name}", create, kind, name, needs.namespace)


def mlflow(needs: Needs) -> Iterator[Line]:
    """MLflow from inside: the API server asks its Service."""
    variables = [v for container in needs.containers for v in container.get("env", [])]
    uri = next((v["value"] for v in variables if v["name"] == "MLFLOW_TRACKING_URI"), "").rstrip(
        "/"
    )
    parts = urlsplit(uri)
    ask = shlex.quote(
        f"import urllib.request as r; print(r.urlopen('{uri}/health', timeout=9).status)"
    )
    by_hand = (
        f"kubectl --namespace {needs.namespace} run ask-mlflow --rm --stdin --restart=Never "
        f"--image=docker.io/library/python:3.12-slim-bookworm -- python3 -c {ask}"
    )
    inside = re.fullmatch(r"([a-z0-9-]+)\.([a-z0-9-]+)\.svc(\.[a-z0-9.-]+)?", parts.hostname or "")
    if not inside:
        yield unknown(f"{parts.hostname} from inside: it is no Service of this cluster", by_hand)
        return
    service, where, _ = inside.groups()
    port = parts.port or (443 if parts.scheme == "https" else 80)
    at = f"{parts.scheme}:{service}:{port}/proxy{parts.path}/health"
    done = kubectl("get", "--raw", f"/api/v1/namespaces/{where}/services/{at}")
    text = f"MLflow at {uri} from inside"
    if done.returncode == 0:
        yield ok(text)
    elif "Forbidden" in done.stderr:
        yield unknown(f"{text}: you may not ask through the API server", by_hand)
    else:
        yield missing(
            f"{text}: {why(done)}", f"kubectl --namespace {where} get services,endpointslices,pods"
        )


def main(folder: str) -> int:
    lacking = 0
    for part in (this_machine(), cluster(folder)):
        for line in part:
            print(line, flush=True)
            lacking += line.state == "missing"
    print(f"\n{lacking} missing" if lacking else "\nNothing is missing.")
    return 1 if lacking else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: doctor.py OBJECTS")
    sys.exit(main(sys.argv[1]))
