"""Numbers for TEI and its pod, against what was computed by hand from the rules' own words."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from copier.errors import UserMessageError
from hypothesis import given, settings
from hypothesis import strategies as st

from extensions import accelerator, catalog, sizing
from extensions.embedding_model import Facts
from extensions.errors import ConfigurationError, UnsuitableModelError
from extensions.pin import Pin

GIB = 1 << 30

ANSWERS: dict[str, Any] = {
    "accelerator": "gb10",
    "image_platform": "linux/arm64",
    "project_name": "text-embeddings",
    "namespace": "text-embeddings",
    "container_registry": "registry.example.com",
    "model_storage": "pvc",
    "mlflow_tracking_uri": "http://mlflow.mlflow.svc.cluster.local:5000",
    "mlflow_auth": "none",
    "replicas": "1",
    "components": [],
    "pooling": "auto",
    "tei_image": "build",
    "tei_ref": "0d124dc9773be6ac5a9a57d8439aba9bbbf33273",
}


def plan(model_id: str, name: str, **changes: Any) -> sizing.Plan:
    pin = catalog.resolve(model_id, "latest")
    platform = accelerator.for_name(name).platforms[0]
    more = {"accelerator": name, "image_platform": platform}
    return sizing.plan(pin, ANSWERS | more | changes)


# By hand. Per token: bytes of a number x (12 hidden + 6 intermediate); without flash attention also
# 3 x bytes x heads x longest input. Weights: parameters x bytes of a number.
TABLE = {
    ("BAAI/bge-base-en-v1.5", "l4"): {
        "max_client_batch_size": 512,  # 2 x 109,482,240 x 512 x 8 x 512 / 20e12 = 23 s of 60
        "dtype": "float16",
        "max_batch_tokens": 16384,
        "served_input_tokens": 512,
        # 109,482,240 x 2 | 16,384 x 2 x (9,216 + 18,432) | CUDA
        "memory": sizing.Memory(218_964_480, 905_969_664, GIB),
        # 512 MiB + 4 x 30,522 x 600 + 1 GiB = 1,683,865,536
        "memory_request_mib": 7 * 256,
        # 1,683,865,536 x 5/4 + 437,951,488 of weights on their way
        "memory_limit_mib": 10 * 256,
        "startup_failures": 26,  # 120 + 8.8 + 0.5 s
        "request_seconds": 60,  # 2 x 109,482,240 x 500,000 / 20e12 = 5.5 s
        "grace_seconds": 80,
        "queue_target": 32,
        "slo_seconds": 1,
        "claim": sizing.Claim("text-embeddings-models-16gi", "ReadWriteOnce", 16),
    },
    ("Qwen/Qwen3-Embedding-4B", "gb10"): {
        "max_client_batch_size": 64,  # 2 x 4.02e9 x 512 x 8 x 64 / 20e12 = 105 s of 210; 128 would be 210.8
        "dtype": "float16",
        "max_batch_tokens": 40960,  # its own context
        "served_input_tokens": 40960,
        # 4,020,000,000 x 2 | 40,960 x 2 x (30,720 + 58,368) | CUDA: 15.3 of a quarter of 119 GiB
        "memory": sizing.Memory(8_040_000_000, 7_298_088_960, GIB),
        # 512 MiB + 4 x 151,665 x 600 + 1 GiB + the three above = 18,386,437,520
        "memory_request_mib": 69 * 256,
        "memory_limit_mib": 86 * 256,  # x 5/4
        "startup_failures": 67,  # 120 + 160.8 + 49.4 s
        "request_seconds": 210,  # 2 x 4.02e9 x 500,000 / 20e12 = 201 s
        "grace_seconds": 230,
        "queue_target": 80,
        "slo_seconds": 33,  # 2 x 2 x 4.02e9 x 40,960 / 20e12
        "claim": sizing.Claim("text-embeddings-models-32gi", "ReadWriteOnce", 32),
    },
    ("Alibaba-NLP/gte-large-en-v1.5", "cpu"): {
        "max_client_batch_size": 32,  # TEI's own; 2 x 434e6 x 512 x 8 x 32 / 0.1e12 is above 600 s already
        "dtype": "float32",
        # 8,192: x (147,456 + 3 x 4 x 16 x 8,192) = 13.1 GiB; 4,096: x (147,456 + 3 x 4 x 16 x 4,096) = 3.6
        "max_batch_tokens": 4096,
        "served_input_tokens": 4096,
        "memory": sizing.Memory(1_736_000_000, 3_825_205_248, 0),
        # 96 MiB + 2 x 30,528 x 600 + weights + the larger of activations and file = 5,698,502,144
        "memory_request_mib": 170 * 32,
        "memory_limit_mib": 255 * 32,  # x 3/2
        "startup_failures": 53,  # 120 + 34.7 + 3 x 35.6 s
        "request_seconds": 600,
        "grace_seconds": 620,
        "queue_target": 4,  # inputs in a batch of a CPU
        "slo_seconds": 72,  # 2 x 2 x 434e6 x 4,096 / 0.1e12
        "claim": sizing.Claim("text-embeddings-models-16gi", "ReadWriteOnce", 16),
    },
    ("Alibaba-NLP/gte-large-en-v1.5", "t4"): {
        "max_client_batch_size": 256,  # 2 x 434e6 x 512 x 8 x 256 / 20e12 = 46 s of 60
        "dtype": "float16",
        # 16,384: 868e6 + 16,384 x (73,728 + 3 x 2 x 16 x 8,192) + 1 GiB = 14.9 of 12.6 GiB; 8,192: 8.4
        "max_batch_tokens": 8192,
        "served_input_tokens": 8192,
        "memory": sizing.Memory(868_000_000, 7_046_430_720, GIB),
        # 512 MiB + 4 x 30,528 x 600 + 1 GiB = 1,683,879,936
        "memory_request_mib": 7 * 256,
        "memory_limit_mib": 15 * 256,  # x 5/4 + 1,736,000,000
        "startup_failures": 32,  # 120 + 34.7 + 1.1 s
        "request_seconds": 60,
        "grace_seconds": 80,
        "queue_target": 16,
        "slo_seconds": 1,
        "claim": sizing.Claim("text-embeddings-models-16gi", "ReadWriteOnce", 16),
    },
}


@pytest.mark.parametrize(("model_id", "name"), TABLE)
def test_the_numbers_are_those_computed_by_hand(model_id: str, name: str) -> None:
    it = plan(model_id, name)
    expected = TABLE[model_id, name]
    found = {key: getattr(it.tei if key.startswith("memory_") else it, key) for key in expected}
    assert found == expected


MINILM = Facts(
    architecture="bert",
    dimensions=384,
    max_input_tokens=256,
    pooling="mean",
    parameters=22_713_216,
    dtype="float32",
    weights_bytes=90_868_376,
    hidden_size=384,
    attention_heads=12,
    intermediate_size=1536,
    vocab_size=30_522,
)
BERT_BASE = replace(
    MINILM,
    dimensions=768,
    max_input_tokens=512,
    parameters=109_482_240,
    weights_bytes=437_951_488,
    hidden_size=768,
    intermediate_size=3072,
)
XLM_R_LARGE = Facts(
    architecture="xlm-roberta",
    dimensions=1024,
    max_input_tokens=512,
    pooling="mean",
    parameters=559_890_432,
    dtype="float32",
    weights_bytes=2_239_561_728,
    hidden_size=1024,
    attention_heads=16,
    intermediate_size=4096,
    vocab_size=250_002,
)


@pytest.mark.parametrize(
    ("facts", "peak_mib"),
    [
        # cgroup's peak, 2026-11-25, own CPU build: 1,024 inputs waiting; four longest in a batch
        pytest.param(MINILM, 244, id="MiniLM"),
        pytest.param(BERT_BASE, 968, id="BERT-base"),
        pytest.param(XLM_R_LARGE, 4069, id="XLM-RoBERTa large"),
    ],
)
def test_a_pod_on_a_cpu_asks_for_what_it_takes(facts: Facts, peak_mib: int) -> None:
    it = sizing.plan(pin_with(facts), ANSWERS | {"accelerator": "cpu"})
    assert it.max_batch_tokens == 512
    assert it.served_input_tokens == facts.max_input_tokens
    assert peak_mib <= it.tei.memory_request_mib <= 1.5 * peak_mib
    assert it.tei.memory_request_mib * 1.25 <= it.tei.memory_limit_mib
    assert it.tei.memory_limit_mib - it.tei.memory_request_mib >= 1024  # for long answers
    assert it.queue_target == 4


@pytest.mark.parametrize(
    ("facts", "kind", "cores"),
    [(MINILM, "cpu", "1"), (BERT_BASE, "cpu", "4"), (XLM_R_LARGE, "cpu", "4"), (MINILM, "l4", "2")],
)
def test_a_small_model_on_a_cpu_takes_one_core(facts: Facts, kind: str, cores: str) -> None:
    it = sizing.plan(pin_with(facts), ANSWERS | {"accelerator": kind})
    assert it.tei.cpu_request == cores
    assert it.one_thread == (cores == "1")


def test_the_rule_for_memory_agrees_with_what_was_measured() -> None:
    """bge-m3 (XLM-RoBERTa large): 568 million parameters, vocabulary of 250,002."""
    facts = replace(
        XLM_R_LARGE,
        max_input_tokens=8192,
        parameters=567_754_752,
        weights_bytes=2_271_019_008,
    )
    # At 4,096 batch tokens: TEI's cpu-arm64-1.9.4 6.2 GiB resident; our build 5,401 MiB, 2026-11-25.
    it = sizing.plan(pin_with(facts), ANSWERS | {"accelerator": "cpu"})
    assert it.max_batch_tokens == 4096
    assert 5401 <= it.tei.memory_request_mib <= 1.5 * 5401
    assert it.tei.memory_limit_mib >= 6.2 * 1024
    # Its warm-up took 182 s on two busy cores, of a start of 183.
    assert it.startup_failures * 5 >= 1.3 * 183
    # TEI's 121-1.9.4 on a Spark: 7 GB more in use with its defaults, 19 tokenizers among them.
    gb10 = accelerator.for_name("gb10")
    memory = sizing.memory_needed(facts, gb10, 16384)
    resources = sizing.tei_resources(facts, gb10, memory, workers=19)
    assert 7e9 <= resources.memory_request_mib * (1 << 20) <= 1.25 * 7e9


def test_a_model_that_does_not_fit_says_what_does() -> None:
    with pytest.raises(UnsuitableModelError) as refused:
        plan("Qwen/Qwen3-Embedding-4B", "rtx-50")
    text = str(refused.value)
    # 8.04e9 + 2,048 x 178,176 + 1 GiB = 8.8 GiB; 90 % of 7 GiB
    assert text.startswith(
        "Qwen/Qwen3-Embedding-4B does not fit: it needs 8.8 GiB, NVIDIA GeForce RTX 50 has 6.3 GiB "
        "to give; choose accelerator=gb10, "
    )
    assert "rtx-50" not in text.partition("choose")[2]


def test_a_model_that_fits_nothing_says_so() -> None:
    pin = catalog.resolve("Qwen/Qwen3-Embedding-4B", "latest")
    huge = replace(pin, facts=replace(pin.facts, parameters=10**12, weights_bytes=2 * 10**12))
    with pytest.raises(UnsuitableModelError, match="choose a smaller model"):
        sizing.plan(huge, ANSWERS)


def test_a_pin_without_the_size_of_its_weights_is_refused() -> None:
    pin = catalog.resolve("BAAI/bge-base-en-v1.5", "latest")
    unknown = replace(pin, facts=replace(pin.facts, weights_bytes=None))
    with pytest.raises(UnsuitableModelError, match="weights_bytes"):
        sizing.plan(unknown, ANSWERS)


def test_a_model_of_which_little_is_known_is_still_sized() -> None:
    pin = catalog.resolve("BAAI/bge-base-en-v1.5", "latest")
    facts = Facts(architecture="bert", weights_bytes=437_951_488, pooling="cls")
    it = sizing.plan(replace(pin, facts=facts), ANSWERS)
    assert (
        it.memory.weights == 437_951_488
    )  # as if stored in two bytes: rather too much than too little
    assert it.max_batch_tokens == 16384


def test_scaling_needs_monitoring() -> None:
    pin = catalog.resolve("BAAI/bge-base-en-v1.5", "latest")
    alone = ANSWERS | {"components": ["autoscaling-keda"]}
    wrong = sizing.problem(pin, alone)
    assert isinstance(wrong, ConfigurationError)
    assert "add monitoring" in str(wrong)
    both = ANSWERS | {"components": ["autoscaling-keda", "monitoring"]}
    assert sizing.problem(pin, both) is None


def test_float16_is_not_given_to_models_that_overflow_in_it() -> None:
    facts = Facts(architecture="gemma3_text", weights_bytes=10**9)
    gpu = accelerator.for_name("h100")
    assert sizing.serving_dtype(facts, gpu) == "float32"
    assert not sizing.uses_flash_attention(facts, gpu)


@pytest.mark.parametrize("name", accelerator.names())
@pytest.mark.parametrize("model_id", catalog.load())
def test_every_flag_has_a_reason_of_one_line(model_id: str, name: str) -> None:
    try:
        it = plan(model_id, name)
    except UnsuitableModelError:
        assert (model_id, name) == ("Qwen/Qwen3-Embedding-4B", "rtx-50")
        return
    for flag in it.flags:
        assert flag.reason
        assert "\n" not in flag.reason
    assert len({flag.name for flag in it.flags}) == len(it.flags)
    assert not any(arg.endswith("=None") for arg in it.args)
    facts = catalog.load()[model_id].facts
    cut = it.served_input_tokens < (facts.max_input_tokens or 0)
    reasons = {flag.name: flag.reason for flag in it.flags}
    assert ("inputs are cut" in reasons["--max-batch-tokens"]) == cut


def test_a_second_pod_shares_the_volume_under_another_name() -> None:
    one = plan("BAAI/bge-base-en-v1.5", "l4")
    two = plan("BAAI/bge-base-en-v1.5", "l4", replicas="2")
    scaled = plan("BAAI/bge-base-en-v1.5", "l4", components=["autoscaling-hpa", "monitoring"])
    assert one.claim.access_mode == "ReadWriteOnce"
    assert two.claim.access_mode == scaled.claim.access_mode == "ReadWriteMany"
    assert one.claim.name != two.claim.name == scaled.claim.name


def test_another_storage_class_is_another_claim() -> None:
    model = "BAAI/bge-base-en-v1.5"
    classes = ["", "longhorn", "ceph.example.com", "x" * 253]
    names = [plan(model, "l4", storage_class=name).claim.name for name in classes]
    assert len(set(names)) == len(names)
    assert all(len(name) <= 253 for name in names)
    assert names[0] == "text-embeddings-models-16gi"


@pytest.mark.parametrize(
    ("answer", "served"), [("", 4096), ("512", 512), ("2048", 2048), ("100000", 4096)]
)
def test_inputs_are_cut_on_a_cpu_where_it_was_answered(answer: str, served: int) -> None:
    it = plan("Alibaba-NLP/gte-large-en-v1.5", "cpu", longest_input=answer)
    assert it.served_input_tokens == it.max_batch_tokens == served
    assert (
        plan("Alibaba-NLP/gte-large-en-v1.5", "l4", longest_input=answer).served_input_tokens > 8000
    )


@pytest.mark.parametrize(
    ("model", "accelerator"),
    [("BAAI/bge-base-en-v1.5", "cpu"), ("Qwen/Qwen3-Embedding-4B", "gb10")],
)
def test_what_was_measured_takes_the_place_of_what_was_assumed(
    model: str, accelerator: str
) -> None:
    assumed = plan(model, accelerator)
    tokens = assumed.max_batch_tokens
    speed = round(tokens / assumed.batch_seconds / 0.7)  # so much measured is what was assumed
    same = plan(model, accelerator, measured_tokens_per_second=str(speed))
    assert same.batch_seconds == pytest.approx(assumed.batch_seconds, rel=0.02)
    slow = plan(model, accelerator, measured_tokens_per_second=str(max(1, speed // 10)))
    assert slow.batch_seconds > 9 * assumed.batch_seconds
    assert slow.startup_failures > assumed.startup_failures
    assert slow.request_seconds >= assumed.request_seconds
    fast = plan(model, accelerator, measured_tokens_per_second=str(10 * speed))
    assert fast.batch_seconds < assumed.batch_seconds / 9
    assert fast.request_seconds <= assumed.request_seconds


def test_a_probe_never_waits_behind_a_batch() -> None:
    """/health does (TEI issue 424); of a GPU with our edits and short batches it may be asked."""
    edited = {"tei_edits": True}
    assert plan("BAAI/bge-base-en-v1.5", "l4", **edited).liveness_path == "/health"
    for it in (
        plan("BAAI/bge-base-en-v1.5", "l4", tei_edits=False),
        plan("BAAI/bge-base-en-v1.5", "l4", tei_image="official", **edited),
        plan("Qwen/Qwen3-Embedding-4B", "gb10", **edited),  # 16 s
        plan("BAAI/bge-base-en-v1.5", "cpu", **edited),
    ):
        assert it.liveness_path == "/metrics"
    assert it.readiness_path == "/metrics"
    hang = it.probe_seconds * (it.probe_failures + 1) + 30
    assert hang <= 60


@pytest.mark.parametrize(
    ("mib", "quantity"), [(992, "992Mi"), (1024, "1Gi"), (1536, "1536Mi"), (71680, "70Gi")]
)
def test_memory_is_written_as_kubernetes_keeps_it(mib: int, quantity: str) -> None:
    assert sizing.Resources("1", "1", mib, mib, "").memory_limit == quantity


def test_a_pod_more_during_a_rollout_only_where_nothing_is_in_its_way() -> None:
    assert not plan("BAAI/bge-base-en-v1.5", "gb10", replicas="4").surge
    assert not plan("BAAI/bge-base-en-v1.5", "cpu").surge
    assert plan("BAAI/bge-base-en-v1.5", "cpu", replicas="2").surge
    assert plan("BAAI/bge-base-en-v1.5", "cpu", model_storage="ephemeral").surge


@pytest.mark.parametrize(
    ("model_id", "more", "said"),
    [
        ("Qwen/Qwen3-Embedding-4B", {"accelerator": "rtx-50"}, "does not fit: it needs 8.8 GiB"),
        ("BAAI/bge-base-en-v1.5", {"components": ["autoscaling-hpa"]}, "add monitoring"),
        ("BAAI/bge-base-en-v1.5", {"components": ["autoscaling-keda"]}, "add monitoring"),
    ],
)
def test_what_cannot_be_deployed_is_refused_before_anything_is_written(
    model_id: str, more: dict[str, Any], said: str, render: Any, pin_of: Any, tmp_path: Path
) -> None:
    target = tmp_path / "nothing"
    with pytest.raises(UserMessageError, match=said) as refused:
        render(target, model_id=model_id, pin=pin_of(model_id), **more)
    assert "\n" not in str(refused.value)
    assert not target.exists()


# Properties

MODELS = st.builds(
    Facts,
    architecture=st.sampled_from(["bert", "nomic_bert", "qwen3", "mpnet", "gemma3_text"]),
    max_input_tokens=st.sampled_from([128, 512, 2048, 8192, 32768]),
    pooling=st.just("mean"),
    parameters=st.integers(10**6, 3 * 10**9),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    weights_bytes=st.integers(10**6, 10**10),
    hidden_size=st.sampled_from([128, 384, 768, 1024, 4096]),
    attention_heads=st.sampled_from([4, 12, 16, 32]),
    intermediate_size=st.sampled_from([512, 3072, 4096, 16384]),
    vocab_size=st.integers(1000, 300_000),
)
GPUS = st.sampled_from([accelerator.for_name(name) for name in accelerator.names()])


def pin_with(facts: Facts) -> Pin:
    return replace(catalog.resolve("BAAI/bge-base-en-v1.5", "latest"), facts=facts)


@settings(max_examples=100, deadline=None)
@given(facts=MODELS, gpu=GPUS)
def test_what_is_planned_fits(facts: Facts, gpu: accelerator.Accelerator) -> None:
    try:
        tokens = sizing.max_batch_tokens(pin_with(facts), gpu)
    except UnsuitableModelError:
        needed = sizing.memory_needed(facts, gpu, 2048 if gpu.is_gpu else 512)
        limit = sizing.available_bytes(gpu) if gpu.is_gpu else 8 * GIB
        assert (needed.total if gpu.is_gpu else needed.activations) > limit
        return
    memory = sizing.memory_needed(facts, gpu, tokens)
    assert tokens >= (2048 if gpu.is_gpu else 512)
    if gpu.is_gpu:
        assert memory.total <= sizing.available_bytes(gpu)
    resources = sizing.tei_resources(facts, gpu, memory, workers=4)
    assert resources.memory_request_mib <= resources.memory_limit_mib
    if gpu.unified_memory or not gpu.is_gpu:
        assert resources.memory_request_mib * sizing.MIB > memory.total
    # Counted once: what the limit has above the request is headroom, not a second copy.
    assert resources.memory_limit_mib * sizing.MIB <= (
        ceil(1.5 * (memory.total + 3 * GIB + (facts.weights_bytes or 0))) + 512 * sizing.MIB
    )


@settings(max_examples=100, deadline=None)
@given(facts=MODELS, gpu=GPUS, tokens=st.sampled_from([2048, 8192, 16384]))
def test_more_needs_more(facts: Facts, gpu: accelerator.Accelerator, tokens: int) -> None:
    assert facts.parameters
    assert facts.weights_bytes
    larger = replace(facts, parameters=2 * facts.parameters, weights_bytes=2 * facts.weights_bytes)
    before = sizing.memory_needed(facts, gpu, tokens)
    assert sizing.memory_needed(larger, gpu, tokens).total > before.total
    assert sizing.memory_needed(facts, gpu, 2 * tokens).activations >= 2 * before.activations
    assert sizing.startup_seconds(larger, gpu, tokens) >= sizing.startup_seconds(facts, gpu, tokens)
    assert sizing.request_seconds(larger, gpu) >= sizing.request_seconds(facts, gpu)
    assert sizing.batch_seconds(larger, gpu, tokens) > sizing.batch_seconds(facts, gpu, tokens)
    claims = [sizing.model_claim(f, "x", shared=False).size_gib for f in (facts, larger)]
    assert claims == sorted(claims)


@settings(max_examples=100, deadline=None)
@given(facts=MODELS, gpu=GPUS.filter(lambda gpu: gpu.is_gpu), factor=st.sampled_from([2, 4]))
def test_a_larger_gpu_takes_no_smaller_batch(
    facts: Facts, gpu: accelerator.Accelerator, factor: int
) -> None:
    larger = replace(gpu, memory_gib=factor * (gpu.memory_gib or 0))
    try:
        tokens = sizing.max_batch_tokens(pin_with(facts), gpu)
    except UnsuitableModelError:
        return
    assert sizing.max_batch_tokens(pin_with(facts), larger) >= tokens
