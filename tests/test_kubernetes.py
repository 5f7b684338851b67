"""What `kubectl apply -k k8s` would apply, for every two answers that can stand together.

The repositories are rendered and built once; each test then looks at all of them.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import copier
import pytest
import yaml
from copier.errors import UserMessageError

from extensions import accelerator, answers, catalog, egress, sizing
from extensions.errors import TemplateError
from extensions.pin import Pin
from tests.conftest import environment
from tests.pairwise import rows

ROOT = Path(__file__).parent.parent
SCALING = {
    "one": {"replicas": "1"},
    "three": {"replicas": "3"},
    "hpa": {"replicas": "1", "components": ["autoscaling-hpa", "monitoring"]},
    "keda": {"replicas": "2", "components": ["autoscaling-keda", "monitoring"]},
}
AXES: dict[str, tuple[Any, ...]] = {
    "model_id": tuple(catalog.load()),
    "accelerator": accelerator.names(),
    "model_storage": ("pvc", "ephemeral", "mount"),
    "scaling": tuple(SCALING),
    "exposure": ((), ("gateway",), ("ingress",)),
    "options": (
        (),
        ("network-policy",),
        ("api-key", "gpu-toleration"),
        ("monitoring", "network-policy", "api-key"),
    ),
    "mlflow_auth": ("none", "token", "basic", "keycloak"),
    "runtime_class_name": ("", "nvidia"),
    "storage_class": ("", "longhorn"),
    "tei_image": ("build", "official"),
    "mlflow_tracking_uri": (
        "http://mlflow.mlflow.svc.cluster.local:5000",
        "https://mlflow.example.com",
        "http://mlflow:5000",
    ),
    "allowed_namespaces": ("", "apps 2024-01-01"),
    "gateway_listener": ("gateway-system/gateway/https", "infra/shared"),
    "ingress": (("", ""), ("nginx", "letsencrypt"), ("haproxy", "")),
    "edge_namespaces": ("gateway-system", "traefik kube-system"),
    "prometheus": (("monitoring", ""), ("observability", "release=kube-prometheus-stack team=1")),
    "image_pull_secret": ("", "registry"),
    "ca_config_map": ("", "company-ca"),
    "proxy": ("", "http://proxy.example.com:3128", "http://squid.egress.svc:3128"),
    "registry": ("answered", "was not at hand"),
    "names": (("text-embeddings", "text-embeddings"), ("no", "2024-01-01")),
}

Objects = list[dict[str, Any]]
PinOf = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Built:
    """One repository, and what kustomize makes of it."""

    row: dict[str, Any]
    answers: dict[str, Any]
    folder: Path
    objects: Objects

    def of_kind(self, kind: str) -> Objects:
        return [o for o in self.objects if o["kind"] == kind]

    def one(self, kind: str) -> dict[str, Any]:
        [found] = self.of_kind(kind)
        return found

    @property
    def pod(self) -> dict[str, Any]:
        spec: dict[str, Any] = self.one("Deployment")["spec"]["template"]["spec"]
        return spec

    @property
    def tei(self) -> dict[str, Any]:
        [container] = self.pod["containers"]
        return container  # type: ignore[no-any-return]


def answers_of(row: dict[str, Any], pin_of: PinOf) -> dict[str, Any]:
    """The answers of one row of the axes."""
    row = dict(row)
    scaling, exposure, options = row.pop("scaling"), row.pop("exposure"), row.pop("options")
    project_name, namespace = row.pop("names")
    ingress_class, tls_issuer = row.pop("ingress")
    prometheus_namespace, prometheus_labels = row.pop("prometheus")
    pin = pin_of(row["model_id"])
    if row.pop("registry") == "was not at hand":
        pin = catalog.resolve(row["model_id"], "latest").to_mapping()
    chosen = {*SCALING[scaling].get("components", ()), *exposure, *options}
    return {
        **row,
        **SCALING[scaling],
        "components": sorted(chosen),
        "project_name": project_name,
        "namespace": namespace,
        "image_platform": accelerator.for_name(row["accelerator"]).platforms[0],
        "pin": pin,
        "accept_license": True,
        "open_to_everyone": bool(exposure) and "api-key" not in options,
        "ingress_class": ingress_class,
        "tls_issuer": tls_issuer,
        "prometheus_namespace": prometheus_namespace,
        "prometheus_labels": prometheus_labels,
    }


def deployed(given: dict[str, Any]) -> Pin:
    """The pin as the cluster gets it."""
    pin = catalog.deployed(Pin.from_mapping(given["pin"]), DEFAULTS["model_task"])
    return sizing.limited(pin, DEFAULTS | given)


DEFAULTS = {
    "model_version": "latest",
    "environments": "",
    "project_description": "",
    "platform": "kubernetes",
    "domain_name": "example.com",
    "container_registry": "registry.example.com",
    "artifact_store_claim": "mlflow-artifacts",
    "model_task": "retrieval.passage",
    "pooling": "auto",
    "tei_ref": "0" * 40,
}


def _kubectl() -> str:
    """kubectl whose kustomize knows components; Debian's own, 1.20, does not."""
    found = shutil.which("kubectl")
    if not found:
        pytest.skip("kubectl is not installed")
    version = subprocess.run(
        [found, "version", "--client", "--output=json"], capture_output=True, text=True
    )
    try:
        kustomize = json.loads(version.stdout)["kustomizeVersion"]
    except (ValueError, KeyError):
        pytest.skip("kubectl does not say which kustomize it has: it is older than 1.24")
    if int(kustomize.lstrip("v").split(".")[0]) < 5:
        pytest.skip(f"kubectl has kustomize {kustomize}, which is too old for the components")
    return found


def build(folder: Path) -> Objects:
    """What `kubectl kustomize` prints."""
    done = subprocess.run([_kubectl(), "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [o for o in yaml.safe_load_all(done.stdout) if o]


@pytest.fixture(scope="session")
def kept() -> dict[str, list[Built]]:
    return {}


@pytest.fixture
def every(
    kept: dict[str, list[Built]],
    template: Path,
    pin_of: PinOf,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Built]:
    """All repositories of the covering rows."""
    if "built" not in kept:
        _kubectl()

        def allowed(row: dict[str, Any]) -> bool:
            given = answers_of(row, pin_of)
            try:
                answers.check_together(DEFAULTS | given, deployed(given))
            except TemplateError:
                return False
            return True

        folder = tmp_path_factory.mktemp("kubernetes")
        built = []
        for number, row in enumerate(rows(AXES, allowed)):
            given = answers_of(row, pin_of)
            target = folder / str(number)
            copier.run_copy(
                str(template),
                target,
                data={**given, "advanced": True},
                defaults=True,
                unsafe=True,
                quiet=True,
                exclude=["/images", "/monitoring", "/README.md", "/Makefile", "/compose.yaml"],
            )
            objects = build(target / "k8s")
            built.append(Built(row, given, target, objects))
        kept["built"] = built
    return kept["built"]


def problems(every: list[Built], check: Callable[[Built], Iterator[str]]) -> list[str]:
    """What a check says of all repositories, with the answers that led to it."""
    return [f"{text}: {built.row}" for built in every for text in check(built)]


def test_every_value_is_rendered(every: list[Built]) -> None:
    for axis, values in AXES.items():
        assert {built.row[axis] for built in every} == set(values), axis


# Schemas


def test_kubernetes_takes_every_object(every: list[Built]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    utils = validate.utils
    read = functools.cache(utils.schema_contents)
    original, utils.schema_contents = utils.schema_contents, read
    newest = sorted({utils.major_minor(v) for v in utils.all_versions()}, key=_numbers)[-3:]
    seen: dict[str, None] = {}
    wrong = []
    try:
        for built in every:
            for item in built.objects:
                text = json.dumps(item, sort_keys=True)
                if item["apiVersion"].split("/")[0] in CUSTOM or text in seen:
                    continue
                seen[text] = None
                for version in newest:
                    try:
                        validate.validate(item, version, strict=True)
                    except validate.ValidationError as error:
                        wrong.append(f"{version} {item['kind']}: {error.message}: {built.row}")
    finally:
        utils.schema_contents = original
    assert not wrong
    assert len(newest) == 3
    kinds = {json.loads(text)["kind"] for text in seen}
    assert kinds == {
        *("ConfigMap", "Deployment", "HorizontalPodAutoscaler", "Ingress", "NetworkPolicy"),
        *("PersistentVolumeClaim", "PodDisruptionBudget", "Service", "ServiceAccount"),
    }


CUSTOM = {"monitoring.coreos.com", "keda.sh", "gateway.networking.k8s.io"}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


@pytest.fixture(scope="session")
def crd_problems() -> Callable[[Objects], list[str | None]]:
    """Validates custom resources against the schemas that their projects publish, in one process."""
    folder = ROOT / "tests/crd-schemas"
    if not shutil.which("node"):
        pytest.skip("node is not installed")
    if not (folder / "node_modules/@kubernetes-models/keda").is_dir():
        if not shutil.which("npm"):
            pytest.skip("npm is not installed")
        done = subprocess.run(
            ["npm", "ci", "--no-audit", "--no-fund"], cwd=folder, capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip("npm could not fetch the schemas (cd tests/crd-schemas && npm ci)")

    def check(objects: Objects) -> list[str | None]:
        done = subprocess.run(
            ["node", folder / "check.mjs"],
            input=json.dumps(objects),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found: list[str | None] = json.loads(done.stdout)
        return found

    return check


def test_operators_take_every_custom_resource(
    every: list[Built], crd_problems: Callable[[Objects], list[str | None]]
) -> None:
    objects = [o for b in every for o in b.objects if o["apiVersion"].split("/")[0] in CUSTOM]
    unique = list({json.dumps(o, sort_keys=True): o for o in objects}.values())
    assert {o["kind"] for o in unique} == {
        "PodMonitor",
        "PrometheusRule",
        "ScaledObject",
        "HTTPRoute",
    }
    assert [p for p in crd_problems(unique) if p] == []


def test_the_published_schemas_refuse_what_is_wrong(
    every: list[Built], crd_problems: Callable[[Objects], list[str | None]]
) -> None:
    wrong = []
    for kind, change in {
        "PodMonitor": lambda o: o["spec"].pop("selector"),
        "PrometheusRule": lambda o: o["spec"]["groups"][0].pop("name"),
        "ScaledObject": lambda o: o["spec"]["triggers"][0]["metadata"].update(threshold=5),
        "HTTPRoute": lambda o: o["spec"]["rules"][0].update(timeouts={"request": "soon"}),
    }.items():
        broken = deepcopy(next(o for b in every for o in b.of_kind(kind)))
        change(broken)
        wrong.append(broken)
    assert all(crd_problems(wrong))


# Security


def restricted(spec: dict[str, Any]) -> Iterator[str]:
    """What breaks the `restricted` Pod Security Standard in a pod's spec.

    https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
    """
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(name):
            yield name
    allowed = {
        *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral"),
        *("persistentVolumeClaim", "projected", "secret"),
    }
    for volume in spec.get("volumes", ()):
        if kinds := volume.keys() - {"name"} - allowed:
            yield f"volume {volume['name']} is a {kinds}"
    pod = spec.get("securityContext", {})
    if pod.get("sysctls"):
        yield "sysctls"
    for container in (*spec.get("initContainers", ()), *spec["containers"]):
        own = container.get("securityContext", {})
        name = container["name"]
        if own.get("privileged"):
            yield f"{name} is privileged"
        if own.get("allowPrivilegeEscalation") is not False:
            yield f"{name} may escalate its privileges"
        if own.get("capabilities", {}).get("drop") != ["ALL"]:
            yield f"{name} keeps capabilities"
        if set(own.get("capabilities", {}).get("add", ())) - {"NET_BIND_SERVICE"}:
            yield f"{name} adds capabilities"
        if own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
            yield f"{name} may be root"
        if own.get("runAsUser", pod.get("runAsUser")) in (0, None):
            yield f"{name} has no user of its own"
        profile = own.get("seccompProfile", pod.get("seccompProfile", {})).get("type")
        if profile not in ("RuntimeDefault", "Localhost"):
            yield f"{name} has no seccomp profile"
        if own.get("procMount", "Default") != "Default":
            yield f"{name} has a procMount"
        if any(port.get("hostPort") for port in container.get("ports", ())):
            yield f"{name} has a hostPort"


def hardened(spec: dict[str, Any]) -> Iterator[str]:
    """What this project asks beyond `restricted`."""
    if spec.get("automountServiceAccountToken") is not False:
        yield "the token is mounted"
    if spec.get("enableServiceLinks") is not False:
        yield "service links are on"
    for container in (*spec.get("initContainers", ()), *spec["containers"]):
        name = container["name"]
        if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
            yield f"{name} can write to its image"
        for bound in ("requests", "limits"):
            if not {"cpu", "memory"} <= container["resources"][bound].keys():
                yield f"{name} has no {bound}"
        for variable in container.get("env", ()):
            if any(
                word in variable["name"] for word in ("KEY", "PASSWORD", "TOKEN", "SECRET")
            ) and ("value" in variable):
                yield f"{name} has a literal {variable['name']}"
    for volume in spec.get("volumes", ()):
        if "emptyDir" in volume and "sizeLimit" not in (volume["emptyDir"] or {}):
            yield f"volume {volume['name']} has no limit"


def pods(built: Built) -> Iterator[dict[str, Any]]:
    yield built.pod
    job = build(built.folder / "smoke") if built.row["options"] else []
    yield from (o["spec"]["template"]["spec"] for o in job if o["kind"] == "Job")


def test_every_pod_is_restricted_and_hardened(every: list[Built]) -> None:
    def check(built: Built) -> Iterator[str]:
        for spec in pods(built):
            yield from restricted(spec)
            yield from hardened(spec)

    assert problems(every, check) == []


MUTATIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "host network": lambda pod: pod.update(hostNetwork=True),
    "host path": lambda pod: pod["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
    "root": lambda pod: pod["securityContext"].pop("runAsNonRoot"),
    "user 0": lambda pod: pod["containers"][0]["securityContext"].update(runAsUser=0),
    "seccomp": lambda pod: pod["securityContext"].pop("seccompProfile"),
    "capabilities": lambda pod: pod["initContainers"][0]["securityContext"].pop("capabilities"),
    "privileged": lambda pod: pod["containers"][0]["securityContext"].update(privileged=True),
    "escalation": lambda pod: pod["containers"][0]["securityContext"].pop(
        "allowPrivilegeEscalation"
    ),
    "writable": lambda pod: pod["containers"][0]["securityContext"].pop("readOnlyRootFilesystem"),
    "token": lambda pod: pod.pop("automountServiceAccountToken"),
    "no limit": lambda pod: pod["containers"][0]["resources"]["limits"].pop("memory"),
    "unbounded": lambda pod: pod["volumes"].append({"name": "x", "emptyDir": {}}),
    "literal": lambda pod: pod["containers"][0]["env"].append({"name": "API_KEY", "value": "x"}),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_policy_finds_what_breaks_it(name: str, every: list[Built]) -> None:
    pod = deepcopy(every[0].pod)
    MUTATIONS[name](pod)
    assert [*restricted(pod), *hardened(pod)]


CHECKOV_SKIPPED = {
    "CKV2_K8S_6": "the NetworkPolicy is an option, and has its own test",
    "CKV_K8S_15": "IfNotPresent: tags of this repository's images are never moved to another content",
    "CKV_K8S_35": "MLflow's client and TEI take credentials from the environment alone",
    "CKV_K8S_43": "digests of images that the user builds are not known when the repository is rendered",
}


def test_checkov_finds_nothing(every: list[Built], tmp_path: Path) -> None:
    checkov = os.environ.get("CHECKOV") or environment("checkov").parent / "checkov"
    chosen: dict[tuple[Any, ...], Built] = {}
    for built in every:
        chosen.setdefault((built.row["model_storage"], built.row["options"]), built)
    for number, built in enumerate(chosen.values()):
        objects = [o for o in built.objects if o["apiVersion"].split("/")[0] not in CUSTOM]
        (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump_all(objects))
    done = subprocess.run(
        [
            checkov,
            *("--directory", tmp_path, "--framework", "kubernetes", "--compact", "--quiet"),
            *("--skip-check", ",".join(CHECKOV_SKIPPED), "--output", "json", "--skip-download"),
        ],
        capture_output=True,
        text=True,
    )
    report = json.loads(done.stdout)
    failed = {
        (c["check_id"], c["check_name"], c["resource"]) for c in report["results"]["failed_checks"]
    }
    assert failed == set()
    assert report["summary"]["passed"] > 500


# Serving


def test_tei_gets_its_flags_explicitly(every: list[Built]) -> None:
    def check(built: Built) -> Iterator[str]:
        flags = dict(arg.partition("=")[::2] for arg in built.tei["args"])
        wanted = {
            "--model-id": "/model/current",
            "--served-model-name": built.answers["model_id"],
            "--hostname": "0.0.0.0",
            "--port": "8355",
            "--json-output": "",
            "--auto-truncate": "true",
            "--pooling": catalog.load()[built.answers["model_id"]].facts.pooling,
        }
        for name, value in wanted.items():
            if flags.get(name) != value:
                yield f"{name} is {flags.get(name)}"
        batch = int(flags["--max-client-batch-size"])
        if int(flags["--max-concurrent-requests"]) < 8 * batch:
            yield "eight full batches at a time would be refused"

    assert problems(every, check) == []


def test_model_fetch_understands_its_arguments(every: list[Built]) -> None:
    program = ROOT / "template/images/model-fetch"
    shown = subprocess.run(
        [os.sys.executable, "-m", "model_fetch", "--help"],  # type: ignore[attr-defined]
        cwd=program,
        capture_output=True,
        text=True,
    ).stdout

    def check(built: Built) -> Iterator[str]:
        [container] = built.pod["initContainers"]
        for arg in container["args"]:
            if f"{arg.partition('=')[0]} " not in shown:
                yield f"{arg} is unknown"
        mounted = any(arg.startswith("--mount=") for arg in container["args"])
        if mounted != (built.row["model_storage"] == "mount"):
            yield "--mount does not follow the answer"

    assert "--pin " in shown
    assert problems(every, check) == []


def test_the_pin_in_the_pod_is_the_answer(every: list[Built]) -> None:
    def check(built: Built) -> Iterator[str]:
        [config] = [o for o in built.of_kind("ConfigMap") if "pin.json" in o["data"]]
        if Pin.from_mapping(json.loads(config["data"]["pin.json"])) != deployed(built.answers):
            yield "pin.json is not the pin"
        volumes = {v["name"]: v for v in built.pod["volumes"]}
        if volumes["pin"]["configMap"]["name"] != config["metadata"]["name"]:
            yield "the pod mounts another ConfigMap"

    assert problems(every, check) == []


def test_another_version_rolls_the_deployment(every: list[Built], pin_of: PinOf) -> None:
    built = every[0]
    before = built.one("Deployment")["spec"]["template"]
    pin = built.folder / "k8s/base/pin.json"
    content = pin.read_text()
    try:
        pin.write_text(content.replace('"version": "3"', '"version": "4"'))
        [after] = [o for o in build(built.folder / "k8s") if o["kind"] == "Deployment"]
    finally:
        pin.write_text(content)
    assert after["spec"]["template"] != before


def test_probes_and_drain_fit_each_other(every: list[Built]) -> None:
    def check(built: Built) -> Iterator[str]:
        tei, pod = built.tei, built.pod
        startup, liveness = tei["startupProbe"], tei["livenessProbe"]
        if startup["httpGet"] != {"path": "/health", "port": "http"}:
            yield "startupProbe asks elsewhere"
        for probe in (tei["readinessProbe"], liveness):
            if probe["httpGet"]["path"] == "/health" and built.row["tei_image"] == "official":
                yield "a probe that waits behind batches"
            hang = probe["periodSeconds"] * (probe["failureThreshold"] + 1)
            if hang + liveness["terminationGracePeriodSeconds"] > 75:
                yield "a process that hangs is left alone"
        pin = built.answers["pin"]
        budget = startup["periodSeconds"] * startup["failureThreshold"]
        if budget < 60 + pin["facts"]["weights_bytes"] / 50e6:
            yield f"{budget} s to start are too few"
        sleep = tei["lifecycle"]["preStop"]["sleep"]["seconds"]
        longest = pod["terminationGracePeriodSeconds"] - sleep
        if longest < 60:
            yield "a drain cuts requests off"
        for route in built.of_kind("HTTPRoute"):
            [rule] = route["spec"]["rules"]
            if int(rule["timeouts"]["request"].rstrip("s")) > longest:
                yield "the route lets requests live longer than the drain"
        if built.one("Deployment")["spec"]["progressDeadlineSeconds"] <= budget:
            yield "a rollout is given up before the pod could have started"

    assert problems(every, check) == []


def test_a_rollout_never_waits_for_a_gpu_or_a_volume_that_is_taken(every: list[Built]) -> None:
    def check(built: Built) -> Iterator[str]:
        rolling = built.one("Deployment")["spec"]["strategy"]["rollingUpdate"]
        claims = built.of_kind("PersistentVolumeClaim")
        single = any(c["spec"]["accessModes"] == ["ReadWriteOnce"] for c in claims)
        gpu = "nvidia.com/gpu" in built.tei["resources"]["limits"]
        wanted = {"maxSurge": 0, "maxUnavailable": 1}
        if not gpu and not single:
            wanted = {"maxSurge": 1, "maxUnavailable": 0}
        if rolling != wanted:
            yield f"{rolling}"

    assert problems(every, check) == []


def test_a_gpu_is_asked_for_and_nothing_that_gb10_lacks(every: list[Built]) -> None:
    def check(built: Built) -> Iterator[str]:
        gpu = accelerator.for_name(built.row["accelerator"])
        resources = built.tei["resources"]
        wanted = "1" if gpu.is_gpu else None
        for bound in ("requests", "limits"):
            if resources[bound].get("nvidia.com/gpu") != wanted:
                yield f"{bound} of nvidia.com/gpu"
        architecture = built.answers["image_platform"].split("/")[1]
        if built.pod["nodeSelector"] != {"kubernetes.io/arch": architecture}:
            yield f"{built.pod['nodeSelector']}"
        if "affinity" in built.pod:
            yield "affinity"
        if (built.pod.get("runtimeClassName") or "") != built.answers["runtime_class_name"]:
            yield "runtimeClassName"
        tolerated = "gpu-toleration" in built.answers["components"]
        if ("tolerations" in built.pod) != tolerated:
            yield "tolerations"

    assert problems(every, check) == []


def test_an_autoscaler_alone_owns_the_replicas(every: list[Built]) -> None:
    def check(built: Built) -> Iterator[str]:
        replicas = built.one("Deployment")["spec"].get("replicas")
        scaled = built.row["scaling"] in ("hpa", "keda")
        if replicas != (None if scaled else int(built.answers["replicas"])):
            yield f"replicas is {replicas}"
        scalers = built.of_kind("HorizontalPodAutoscaler") + built.of_kind("ScaledObject")
        if len(scalers) != scaled:
            yield f"{len(scalers)} autoscalers"
        for scaler in scalers:
            if scaler["spec"]["scaleTargetRef"]["name"] != built.answers["project_name"]:
                yield "it scales something else"
        budgets = len(built.of_kind("PodDisruptionBudget"))
        if budgets != (scaled or int(built.answers["replicas"]) > 1):
            yield f"{budgets} disruption budgets"

    assert problems(every, check) == []


def test_storage_follows_the_answer(every: list[Built]) -> None:
    def check(built: Built) -> Iterator[str]:
        storage = built.row["model_storage"]
        volumes = {v["name"]: v for v in built.pod["volumes"]}
        claims = built.of_kind("PersistentVolumeClaim")
        if storage == "pvc":
            [claim] = claims
            shared = built.row["scaling"] != "one"
            mode = "ReadWriteMany" if shared else "ReadWriteOnce"
            if claim["spec"]["accessModes"] != [mode]:
                yield f"{claim['spec']['accessModes']}"
            if volumes["cache"]["persistentVolumeClaim"]["claimName"] != claim["metadata"]["name"]:
                yield "the pod mounts another claim"
            wanted = built.answers["storage_class"] or None
            if claim["spec"].get("storageClassName") != wanted:
                yield "storageClassName"
        elif claims or "emptyDir" not in volumes["cache"]:
            yield "there is a claim"
        for container in (*built.pod["initContainers"], built.tei):
            mounts = {m["name"]: m for m in container["volumeMounts"]}
            if ("artifact-store" in mounts) != (storage == "mount"):
                yield f"{container['name']} and the artifact store"
            if storage == "mount" and not mounts["artifact-store"]["readOnly"]:
                yield f"{container['name']} can write to the artifact store"
        mounts = {m["name"]: m for m in built.tei["volumeMounts"]}
        if not (mounts["cache"].get("readOnly") and mounts["model"].get("readOnly")):
            yield "TEI can write to the model"

    assert problems(every, check) == []


def test_the_network_policy_opens_what_is_needed_and_nothing_else(every: list[Built]) -> None:
    def check(built: Built) -> Iterator[str]:
        for policy in built.of_kind("NetworkPolicy"):
            spec = policy["spec"]
            if set(spec["policyTypes"]) != {"Ingress", "Egress"}:
                yield "policyTypes"
            [ingress] = spec["ingress"]
            if not ingress["from"] or ingress["ports"] != [{"port": "http", "protocol": "TCP"}]:
                yield "anybody may come in"
            allowed = {
                name
                for peer in ingress["from"]
                for expression in peer.get("namespaceSelector", {}).get("matchExpressions", ())
                for name in expression["values"]
            }
            names = ("allowed_namespaces", "edge_namespaces", "prometheus_namespace")
            listed = {n for name in names for n in built.answers[name].split()}
            if allowed != listed:
                yield f"{allowed} may come in"
            everywhere = [
                {"ipBlock": {"cidr": cidr, "except": left_out}}
                for cidr, left_out in egress.EVERYWHERE.items()
            ]
            anywhere = set()
            for rule in spec["egress"]:
                far = any("ipBlock" in peer for peer in rule.get("to", ()))
                if far and rule["to"] != [{"namespaceSelector": {}}, *everywhere]:
                    yield f"a machine's credentials can be asked for: {rule['to']}"
                if far or "to" not in rule:
                    anywhere |= {p["port"] for p in rule["ports"]}
                if "to" not in rule and not {p["port"] for p in rule["ports"]} <= {53, 5353}:
                    yield "egress to a machine's own services"
            wanted = {53, 5353}
            if "example.com" in built.answers["mlflow_tracking_uri"]:
                wanted |= {443}
            if "example.com" in built.answers["proxy"]:
                wanted |= {3128}
            if built.answers["mlflow_auth"] == "keycloak":
                wanted |= {80, 443, 8080, 8443}
            if built.row["model_storage"] != "mount":
                wanted |= {80, 443, 8333, 9000}
            if anywhere != wanted:
                yield f"egress to {anywhere}, not {wanted}"
            inside = [
                rule
                for rule in spec["egress"]
                if "to" in rule and not any("ipBlock" in peer for peer in rule["to"])
            ]
            near = [
                built.answers[n]
                for n in ("mlflow_tracking_uri", "proxy")
                if built.answers[n] and "example.com" not in built.answers[n]
            ]
            if len(inside) != len(near):
                yield f"egress inside the cluster: {inside}"
            if any("ports" in rule for rule in inside):
                yield "a pod's port is not the Service's"
            selected = spec["podSelector"]["matchLabels"].items()
            labels = built.one("Deployment")["spec"]["template"]["metadata"]["labels"]
            if not selected <= labels.items():
                yield "it selects another pod"

    assert problems(every, check) == []
    assert any(built.of_kind("NetworkPolicy") for built in every)


OPERATORS_OWN = {"/", "/health", "/ping", "/info", "/metrics", "/docs", "/api-doc/openapi.json"}


def test_only_what_clients_call_is_routed(every: list[Built]) -> None:
    def check(built: Built) -> Iterator[str]:
        paths: list[tuple[str, str]] = []
        for route in built.of_kind("HTTPRoute"):
            [rule] = route["spec"]["rules"]
            paths += [(m["path"]["type"], m["path"]["value"]) for m in rule["matches"]]
            [parent] = route["spec"]["parentRefs"]
            at = [parent["namespace"], parent["name"], parent.get("sectionName")]
            if [part for part in at if part] != built.answers["gateway_listener"].split("/"):
                yield f"attached to {parent}"
        for ingress in built.of_kind("Ingress"):
            [rule] = ingress["spec"]["rules"]
            paths += [(p["pathType"], p["path"]) for p in rule["http"]["paths"]]
            if ingress["spec"].get("ingressClassName", "") != built.answers["ingress_class"]:
                yield "another class"
            notes = ingress["metadata"].get("annotations", {})
            if any(name.startswith("nginx.ingress.kubernetes.io") for name in notes):
                yield "annotations of a retired controller"
            if built.answers["ingress_class"] and not any("timeout" in name for name in notes):
                yield "the controller's own timeout cuts long requests off"
            issuer = notes.get("cert-manager.io/cluster-issuer", "")
            if issuer != built.answers["tls_issuer"]:
                yield f"the certificate is from {issuer}"
        if any(kind != "Exact" for kind, _ in paths):
            yield "more than the paths themselves"
        routed = {path for _, path in paths}
        if paths and (not {"/v1/embeddings", "/embed"} <= routed or routed & OPERATORS_OWN):
            yield f"{routed}"

    assert problems(every, check) == []


@pytest.mark.parametrize("mlflow_auth", ["none", "token", "basic", "keycloak"])
def test_readers_create_the_namespace_before_what_is_in_it(
    mlflow_auth: str, pin_of: PinOf, render: Any
) -> None:
    model = "BAAI/bge-base-en-v1.5"
    given = {"image_pull_secret": "registry", "ca_config_map": "ca", "mlflow_auth": mlflow_auth}
    folder = render(model_id=model, pin=pin_of(model), components=["api-key", "ingress"], **given)
    for path, first in (
        ("README.md", "make namespace"),
        ("images/tei/README.md", "create namespace"),
    ):
        text = (folder / path).read_text()
        creates = re.findall(r"kubectl --namespace \S+ create (?:secret|configmap)", text)
        assert len(creates) >= 1 + 3 * (path == "README.md")
        assert text.index(first) < text.index(creates[0])


@pytest.mark.parametrize("routed", ["gateway", "ingress"])
def test_an_open_route_is_asked_for_explicitly(routed: str, pin_of: PinOf, render: Any) -> None:
    model = "BAAI/bge-base-en-v1.5"
    given = {"model_id": model, "pin": pin_of(model), "components": [routed]}
    with pytest.raises(UserMessageError, match="add api-key, or answer open_to_everyone=true"):
        render(**given)
    assert render(**given, open_to_everyone=True).exists()
    assert render(**given | {"components": [routed, "api-key"]}).exists()


def test_without_a_pin_nothing_runs_in_several_versions(pin_of: PinOf, render: Any) -> None:
    for several in ({"replicas": "2"}, {"components": ["monitoring", "autoscaling-keda"]}):
        with pytest.raises(UserMessageError, match="nothing is pinned") as refused:
            render(**several)
        assert "\n" not in str(refused.value)
    assert render(replicas="2", pin=pin_of("nomic-ai/nomic-embed-text-v1.5")).exists()


@pytest.mark.parametrize("pinned", [True, False])
def test_an_unpinned_repository_says_so(
    pinned: bool, template: Path, tmp_path: Path, pin_of: PinOf, capfd: pytest.CaptureFixture[str]
) -> None:
    model = "BAAI/bge-base-en-v1.5"
    given = {"model_id": model} | ({"pin": pin_of(model)} if pinned else {})
    folder = tmp_path / "rendered"
    copier.run_copy(str(template), folder, data=given, defaults=True, unsafe=True)
    assert ("NOTHING IS PINNED" in capfd.readouterr().err) != pinned
    top = (folder / "README.md").read_text().partition("## Build")[0]
    assert ("**Nothing is pinned.**" in top) != pinned
    # A kubectl that takes everything: what is asked is whether make gets so far.
    (tmp_path / "kubectl").write_text('#!/bin/sh\necho "$@" >>"$0.log"\n')
    (tmp_path / "kubectl").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for words, deploys in (([], pinned), (["ALLOW_UNPINNED=1"], True), (["NAMESPACE=x"], False)):
        (tmp_path / "kubectl.log").write_text("")
        made = subprocess.run(
            ["make", "deploy", "IMAGES=true", *words],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert (made.returncode == 0) == deploys, made.stderr
        assert ("apply -k k8s" in (tmp_path / "kubectl.log").read_text()) == deploys
        if not deploys:
            assert "make update" in made.stderr


def test_who_selects_by_labels_and_pulls_with_a_secret_finds_them(every: list[Built]) -> None:
    def check(built: Built) -> Iterator[str]:
        wanted = dict(p.split("=") for p in built.answers["prometheus_labels"].split()).items()
        for item in built.of_kind("PodMonitor") + built.of_kind("PrometheusRule"):
            if not wanted <= item["metadata"]["labels"].items():
                yield f"Prometheus does not find {item['kind']}"
        secrets = [s["name"] for s in built.one("ServiceAccount").get("imagePullSecrets", ())]
        if secrets != built.answers["image_pull_secret"].split():
            yield f"pulls with {secrets}"

    assert problems(every, check) == []


def test_a_missing_secret_is_named_where_a_login_is_needed(every: list[Built]) -> None:
    def check(built: Built) -> Iterator[str]:
        [container] = built.pod["initContainers"]
        [source] = container["envFrom"]
        needed = built.answers["mlflow_auth"] != "none"
        if source["secretRef"].get("optional", False) == needed:
            yield "optional"

    assert problems(every, check) == []


def test_a_private_authority_is_mounted_and_named(every: list[Built]) -> None:
    def check(built: Built) -> Iterator[str]:
        [container] = built.pod["initContainers"]
        file = {v["name"]: v.get("value") for v in container["env"]}
        mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
        volumes = {v["name"]: v for v in built.pod["volumes"]}
        name = built.answers["ca_config_map"]
        if ("private-ca" in volumes) != bool(name):
            yield "volume"
        elif name and (
            volumes["private-ca"]["configMap"]["name"] != name
            or file["MLFLOW_TRACKING_SERVER_CERT_PATH"] != f"{mounts['private-ca']}/ca.crt"
        ):
            yield "the file is not where MLflow's client looks"

    assert problems(every, check) == []


def test_the_pods_reach_mlflow_through_the_proxy_that_is_answered(every: list[Built]) -> None:
    def check(built: Built) -> Iterator[str]:
        [container] = built.pod["initContainers"]
        env = {v["name"]: v.get("value") for v in container["env"]}
        proxy = built.answers["proxy"]
        found = [env.get(name, "") for name in ("HTTP_PROXY", "HTTPS_PROXY")]
        if found != [proxy, proxy]:
            yield f"through {found}"
        if proxy and env["NO_PROXY"] != ".svc,.cluster.local":
            yield "what is in the cluster is asked through it too"
        if any("proxy" in v["name"].lower() for v in built.tei["env"]):
            yield "TEI asks nobody"

    assert problems(every, check) == []


def test_names_of_two_services_never_meet(every: list[Built]) -> None:
    def check(built: Built) -> Iterator[str]:
        name = built.answers["project_name"]
        for item in built.objects:
            if not (item["metadata"]["name"] + "-").startswith(f"{name}-"):
                yield f"{item['kind']} {item['metadata']['name']}"

    assert problems(every, check) == []


def test_selectors_find_the_pods(every: list[Built]) -> None:
    def check(built: Built) -> Iterator[str]:
        labels = built.one("Deployment")["spec"]["template"]["metadata"]["labels"].items()
        if not built.one("Service")["spec"]["selector"].items() <= labels:
            yield "Service"
        for kind in ("PodMonitor", "PodDisruptionBudget"):
            for item in built.of_kind(kind):
                if not item["spec"]["selector"]["matchLabels"].items() <= labels:
                    yield kind
        for item in built.objects:
            if item["metadata"]["namespace"] != built.answers["namespace"]:
                yield f"{item['kind']} is in {item['metadata']['namespace']}"

    assert problems(every, check) == []


def test_no_secret_is_rendered(every: list[Built]) -> None:
    assert [b.row for b in every if b.of_kind("Secret")] == []


def test_the_api_key_comes_from_a_secret_and_not_into_the_log(every: list[Built]) -> None:
    def check(built: Built) -> Iterator[str]:
        env = {v["name"]: v for v in built.tei["env"]}
        asked = "api-key" in built.answers["components"]
        if ("API_KEY" in env) != asked:
            yield "API_KEY"
        quiet = "text_embeddings_router=warn," in env["LOG_LEVEL"]["value"]
        if asked and not quiet:
            yield "TEI logs its arguments, and with them the key"

    assert problems(every, check) == []


def test_images_are_pinned(every: list[Built]) -> None:
    def check(built: Built) -> Iterator[str]:
        for container in (*built.pod["initContainers"], built.tei):
            name, _, tag = container["image"].partition("@")[0].rpartition(":")
            if "/" not in name or not tag or tag == "latest":
                yield container["image"]
        official = built.answers["tei_image"] == "official"
        if official != built.tei["image"].startswith("ghcr.io/huggingface/"):
            yield built.tei["image"]

    assert problems(every, check) == []


def test_the_tags_are_the_versions_of_the_programs() -> None:

    source = (ROOT / "template/images/model-fetch/model_fetch/__init__.py").read_text()
    assert f'__version__ = "{sizing.MODEL_FETCH_VERSION}"' in source


@pytest.mark.parametrize(
    ("here", "pods"),
    [
        ("https://mlflow.example.com", "https://mlflow.example.com"),
        ("http://10.1.2.3:5000/team", "http://10.1.2.3:5000/team"),
        *((uri, "http://mlflow.mlflow.svc.cluster.local:5000") for uri in (None, "")),
        *(
            (f"http://{host}:5000", "http://mlflow.mlflow.svc.cluster.local:5000")
            for host in (
                *("localhost", "127.0.0.1", "127.8.0.1", "0.0.0.0", "[::1]", "mlflow"),
                "host.docker.internal",
            )
        ),
    ],
)
def test_pods_reach_mlflow_where_whoever_renders_does_if_they_can(
    here: str | None, pods: str
) -> None:
    assert egress.usual_tracking_uri(here) == pods


def test_the_registry_of_the_shell_is_what_the_pods_are_told(
    render: Callable[..., Path], pin_of: PinOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The root README has them export it; whoever presses Enter has it in the Deployment too."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example.com:9")
    model = "BAAI/bge-base-en-v1.5"
    folder = render(program=False, model_id=model, pin=pin_of(model))
    [deployment] = [item for item in build(folder / "k8s") if item["kind"] == "Deployment"]
    [fetch] = deployment["spec"]["template"]["spec"]["initContainers"]
    told = {variable["name"]: variable.get("value") for variable in fetch["env"]}
    assert told["MLFLOW_TRACKING_URI"] == "http://mlflow.example.com:9"


def test_a_page_that_nobody_routes_to_is_reached_by_nobody(
    render: Callable[..., Path], pin_of: PinOf
) -> None:
    """An empty list of namespaces is no object that the API server takes, nor may it mean everybody."""
    model = "BAAI/bge-base-en-v1.5"
    chosen = ["gateway", "network-policy", "api-key", "playground"]
    given: dict[str, Any] = {"model_id": model, "pin": pin_of(model), "components": chosen}
    folder = render(program=False, edge_namespaces="", **given)
    policies = {
        item["metadata"]["name"]: item["spec"]
        for item in build(folder / "k8s")
        if item["kind"] == "NetworkPolicy"
    }
    page = policies["text-embeddings-page"]
    assert page["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in page


@pytest.mark.parametrize(
    ("routed", "let_in"),
    [
        ([], ["monitoring"]),
        (["gateway"], ["monitoring", "infra"]),
        (["ingress"], ["monitoring", "traefik"]),
        (["gateway", "ingress"], ["monitoring", "infra", "traefik"]),
    ],
)
def test_whoever_routes_is_let_in_unless_told_otherwise(
    routed: list[str], let_in: list[str], render: Callable[..., Path], pin_of: PinOf
) -> None:
    model = "BAAI/bge-base-en-v1.5"
    given: dict[str, Any] = {"model_id": model, "pin": pin_of(model), "open_to_everyone": True}
    chosen = ["network-policy", *routed]
    folder = render(
        program=False, components=chosen, gateway_listener="infra/shared/https", **given
    )
    [policy] = [item for item in build(folder / "k8s") if item["kind"] == "NetworkPolicy"]
    [rule] = policy["spec"]["ingress"]
    [namespaces] = [
        peer["namespaceSelector"] for peer in rule["from"] if "namespaceSelector" in peer
    ]
    assert namespaces["matchExpressions"][0]["values"] == let_in
