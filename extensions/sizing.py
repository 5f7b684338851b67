"""What TEI and its pod are given: flags, memory, probes, drain and scaling, from a model and an accelerator.

Pure arithmetic: nothing here reads a file or asks a server. Each rule says where it is from:
"TEI" with a file name is huggingface/text-embeddings-inference at
0d124dc9773be6ac5a9a57d8439aba9bbbf33273; "measured" says when and on what; "assumed" is an estimate
of ours, on the safe side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from math import ceil
from typing import Any

from . import accelerator as accelerators
from . import compatibility, edge
from .accelerator import Accelerator
from .egress import Egress, destinations
from .embedding_model import Facts
from .errors import ConfigurationError, TemplateError, UnsuitableModelError
from .pin import Pin
from .tei import Edit, edits, environment, release

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

_DEFAULT_BATCH_TOKENS = 16384
"""TEI's own (router/src/main.rs)."""

_SMALLEST_BATCH_TOKENS = {True: 2048, False: 512}
"""By whether it is a GPU, which less would leave idle, and cut inputs that most models take whole (assumed).

On a CPU batching gains nothing: 0.18 to 0.21 CPU seconds per text of MiniLM and 1.98 to 2.06 of BERT-base
from one text in a batch to four (measured 2026-11-25, 2 cores).
"""

_ONE_THREAD_HIDDEN = 384
"""Hidden size up to which a model is computed by one thread on a CPU: more wait for each other.

MiniLM with MKL, 8 requests at a time, one thread beside two: 76 texts/s and 14 CPU ms beside 36 and 29 at
32 tokens, 8.0 and 131 beside 9.5 and 144 at 256. BERT-base (768): 10.8 texts/s beside 10.2, but 1.4 beside
2.0. Without MKL a second thread brought MiniLM 7 and 21 % (measured 2026-11-28, 2 cores of an AMD processor).
"""

_CPU_BATCH_INPUTS = 4
"""Inputs per batch on a CPU, whatever is asked for (TEI backends/candle/src/lib.rs, max_batch_size)."""

_USED_OF_GPU = 0.9
"""Of a GPU's own memory; the rest is the driver's and fragmentation. Assumed."""

_USED_OF_UNIFIED = 0.25
"""One of the four parts that a DGX Spark is usually sliced into; the rest is the system's and others'."""

_UNIFIED_RESERVE_BYTES = 16 * GIB
"""Of unified memory, for the operating system, kubelet and page cache. Assumed."""

_CPU_ACTIVATION_BYTES = 8 * GIB
"""Of a pod on a CPU, so that the pod fits a common node. Assumed."""

_CUDA_BYTES = GIB
"""CUDA context, kernels and cuBLAS workspace on the GPU. Assumed."""

_PROCESS_BYTES = {True: 512 * MIB, False: 96 * MIB}
"""TEI itself, requests and responses in flight, by whether there is a GPU (assumed there).

On a CPU MiniLM took 154 MiB in all with 16 texts and 244 with 1,024 in the queue (measured 2026-11-25).
"""

_ANSWERS_BYTES = GIB
"""Of a pod on a CPU, beside what it asks for: long answers. /tokenize takes no place in TEI's queue, and
thirty requests of 0.5 MB at once took 955 and 1,244 MiB with MiniLM, where 180 were in use (measured
2026-11-28, two runs).
"""

_BYTES_PER_TOKEN_OF_VOCABULARY = 600
"""Of one copy of the tokenizer in memory; each worker has its own (TEI #766). Assumed."""

_DEFAULT_VOCABULARY = 256_000
"""Tokens, where the model does not say."""

_SUSTAINED_FLOPS = {True: 20e12, False: 0.1e12}
"""Operations per second that any GPU of the table (assumed), or four CPU cores, keep up at least.

One core did 54e9 to 58e9 with MiniLM and BERT-base, without MKL (measured 2026-11-25): half of four.
"""

_MEASURED_SHARE = 0.7
"""Of the tokens per second that the operator measured, what is counted on: the rest is for a worse moment."""

_SLOW_GPU_FLOPS = 1e12
"""Operations per second that no GPU falls below at a full batch, and no CPU pod of this size reaches."""

_PAYLOAD_BYTES = 2_000_000
"""TEI's own --payload-limit: the largest request body."""

_BYTES_PER_TOKEN_OF_TEXT = 4
"""English text and common tokenizers. Assumed."""

_LOAD_BYTES_PER_SECOND = 50e6
"""Reading weights from a slow network volume. Assumed."""

_FETCH_BYTES_PER_SECOND = 20e6
"""Fetching a model from MLflow. Assumed."""

_USUAL_INPUT_TOKENS = 512
"""Of a chunk of text as retrieval pipelines cut it."""

_CONCURRENT_CLIENTS = 8
"""That send full batches at the same time. Assumed."""

_SHORT_BATCH_SECONDS = 5
"""Longest batch behind which a health check may wait. Assumed."""

PROBE_SECONDS = 5
"""Between two readiness or liveness probes, and until one has failed."""

PROBE_FAILURES = 4
"""In a row: 25 s at most, and a process that hangs is killed 30 s later. /metrics answered within
23 ms beside 4 clients with batches of seconds (measured 2026-11-25, load 17 on 2 cores)."""

PORT = 8355
PRE_STOP_SECONDS = 15
"""Longer than endpoints take to leave load balancers; KServe waits as long."""

MODEL_FETCH_VERSION = "1.0.0"
"""Tag of the image of model-fetch: the version of the program."""

SMOKE_VERSION = "1.0.0"
"""Tag of the image of smoke: the version of the program."""


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag of TEI, and why it has its value."""

    name: str
    value: str | None
    """None: deliberately not given."""

    reason: str
    """One sentence for the operator."""


@dataclass(frozen=True, slots=True)
class Resources:
    """Requests and limits of one container."""

    cpu_request: str
    """Kubernetes quantity of cores."""

    cpu_limit: str
    memory_request_mib: int
    memory_limit_mib: int
    reason: str
    """How the memory adds up."""

    @property
    def memory_request(self) -> str:
        """Kubernetes quantity of `memory_request_mib`."""
        return _quantity(self.memory_request_mib)

    @property
    def memory_limit(self) -> str:
        """Kubernetes quantity of `memory_limit_mib`."""
        return _quantity(self.memory_limit_mib)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that serving takes."""

    weights: int
    """In the type that TEI computes in."""

    activations: int
    """Of one full batch."""

    overhead: int
    """On the accelerator, beside both."""

    @property
    def total(self) -> int:
        """On the accelerator, or in the pod when there is none."""
        return self.weights + self.activations + self.overhead


@dataclass(frozen=True, slots=True)
class Image:
    """An image as kustomize's `images` takes it."""

    name: str
    tag: str
    digest: str | None = None

    @property
    def reference(self) -> str:
        """As a container engine takes it."""
        return f"{self.name}:{self.tag}" + (f"@{self.digest}" if self.digest else "")


@dataclass(frozen=True, slots=True)
class Claim:
    """The PersistentVolumeClaim of the models."""

    name: str
    """Holds size, access and class, which a claim cannot change: another size is another claim."""

    access_mode: str
    """ReadWriteOnce, or ReadWriteMany as soon as two pods may stand on two nodes."""

    size_gib: int


@dataclass(frozen=True, slots=True)
class Plan:
    """All that the templates print of numbers."""

    flags: tuple[Flag, ...]
    served_input_tokens: int
    """Longer inputs are cut: the model's context, or --max-batch-tokens if that is less."""

    max_client_batch_size: int
    max_batch_tokens: int
    dtype: str
    pooling: str
    memory: Memory
    tei: Resources
    model_fetch: Resources
    gpus: int
    """`nvidia.com/gpu` of the pod."""

    startup_failures: int
    """Probes, 5 s apart, that may fail while TEI loads."""

    probe_seconds: int
    """Period and timeout of the readiness and the liveness probe."""

    probe_failures: int

    readiness_path: str
    """Answered at once, whatever is computed."""

    liveness_path: str
    """/health, which computes a token after a failed inference, where no batch keeps it waiting."""

    request_seconds: int
    """Longest request: what routes let live, and what a drain waits for."""

    pre_stop_seconds: int
    """Between a pod's leaving the Service and SIGTERM."""

    grace_seconds: int
    """terminationGracePeriodSeconds."""

    progress_seconds: int
    """progressDeadlineSeconds: pulling images, fetching the model and loading it."""

    surge: bool
    """A rollout may start a pod before it stops one: no GPU and no ReadWriteOnce volume is in the way."""

    claim: Claim
    model_gib: int
    """Of an emptyDir that takes one version."""

    min_replicas: int
    max_replicas: int
    scale_up_seconds: int
    """Between two pods more: the first helps only once it has loaded the model."""

    queue_target: int
    """Inputs waiting per pod, above which another pod is worth starting: one full batch."""

    batch_seconds: float
    """Longest batch, at the slowest sustained speed."""

    slo_seconds: int
    """A request takes no longer than this for each of its inputs, on average."""

    slow_base_seconds: float
    """A batch on a GPU never takes longer than this plus `slow_token_seconds` per token."""

    slow_token_seconds: float
    tei_image: Image
    tei_edits: tuple[Edit, ...]
    """The edits of TEI's sources that its image has."""

    tei_release: Mapping[str, Any] | None
    """What is known of the release that is built; None where nothing is."""

    tei_environment: Mapping[str, str]
    one_thread: bool
    """The model is computed by one thread, whatever cores there are."""

    model_fetch_image: Image
    smoke_image: Image
    egress: tuple[Egress, ...]
    build_namespace: str
    """Of the Job that builds TEI: it takes what no serving pod may, and a quota of its own."""

    api_paths: tuple[str, ...]
    """What is routed from outside."""

    page_paths: tuple[str, ...]
    """What is routed to the page that tries it; empty where it was not chosen."""

    ingress_annotations: Mapping[str, str]

    @property
    def args(self) -> tuple[str, ...]:
        """The arguments of TEI's container, one per flag."""
        given = (flag for flag in self.flags if flag.value is not None)
        return tuple(f"{f.name}={f.value}" if f.value else f.name for f in given)


def plan(pin: Pin, given: Mapping[str, Any]) -> Plan:
    """Everything that follows from a pin and the answers.

    Args: given: the answers by name, valid each on its own.
    Raises: UnsuitableModelError when the model does not fit the accelerator.
    """
    gpu = accelerators.for_name(given["accelerator"])
    facts = pin.facts
    dtype = serving_dtype(facts, gpu)
    batch_tokens = _batch_tokens(pin, gpu, given)
    served = min(facts.max_input_tokens or batch_tokens, batch_tokens)
    measured = int(given.get("measured_tokens_per_second") or 0)
    client_batch = max_client_batch_size(facts, gpu, measured)
    memory = memory_needed(facts, gpu, batch_tokens)
    workers = 4 if gpu.is_gpu else 2
    replicas = int(given["replicas"])
    autoscaled = any(c.startswith("autoscaling-") for c in given["components"])
    pooling = given["pooling"] if given["pooling"] != "auto" else str(facts.pooling)
    request = request_seconds(facts, gpu, measured)
    longest_batch = batch_seconds(facts, gpu, batch_tokens, measured)
    long_queue = any(edit.name == "queue" for edit in edits(given))
    startup = startup_seconds(facts, gpu, batch_tokens, measured)
    fetch_seconds = ceil(_stored_bytes(facts) / _FETCH_BYTES_PER_SECOND)
    claim = model_claim(
        facts,
        given["project_name"],
        shared=replicas > 1 or autoscaled,
        storage_class=given.get("storage_class", ""),
    )
    registry = f"{given['container_registry']}/{given['project_name']}"
    return Plan(
        flags=tuple(
            _flags(pin, gpu, dtype, pooling, given, batch_tokens, served, client_batch, workers)
        ),
        served_input_tokens=served,
        max_client_batch_size=client_batch,
        max_batch_tokens=batch_tokens,
        dtype=dtype,
        pooling=pooling,
        memory=memory,
        tei=tei_resources(facts, gpu, memory, workers),
        model_fetch=model_fetch_resources(pin),
        gpus=1 if gpu.is_gpu else 0,
        startup_failures=ceil(startup / 5),
        probe_seconds=PROBE_SECONDS,
        probe_failures=PROBE_FAILURES,
        readiness_path="/metrics",
        # An unpatched TEI ends when eight health checks wait (its issue 424), so it is never asked.
        liveness_path="/health"
        if gpu.is_gpu and long_queue and longest_batch <= _SHORT_BATCH_SECONDS
        else "/metrics",
        request_seconds=request,
        pre_stop_seconds=PRE_STOP_SECONDS,
        grace_seconds=PRE_STOP_SECONDS + request + 5,
        progress_seconds=600 + fetch_seconds + startup,
        surge=not gpu.is_gpu
        and (given["model_storage"] != "pvc" or claim.access_mode == "ReadWriteMany"),
        claim=claim,
        model_gib=ceil(_folder_bytes(facts) / GIB),
        min_replicas=replicas,
        max_replicas=2 * replicas,
        scale_up_seconds=min(600, startup),
        queue_target=max(_CPU_BATCH_INPUTS, batch_tokens // _USUAL_INPUT_TOKENS)
        if gpu.is_gpu
        else _CPU_BATCH_INPUTS,
        batch_seconds=longest_batch,
        slo_seconds=max(1, ceil(2 * longest_batch)),
        slow_base_seconds=0.02,
        slow_token_seconds=2 * _parameters(facts) / _SLOW_GPU_FLOPS,
        tei_image=_tei_image(gpu, given),
        tei_edits=edits(given),
        tei_release=release(given["tei_ref"]),
        tei_environment=environment(),
        one_thread=one_thread(facts, gpu),
        model_fetch_image=Image(f"{registry}-model-fetch", MODEL_FETCH_VERSION),
        smoke_image=Image(f"{registry}-smoke", SMOKE_VERSION),
        egress=tuple(destinations(pin, given)),
        build_namespace=f"{given['namespace'][:57]}-build",  # 63 characters at most
        api_paths=edge.API_PATHS,
        page_paths=edge.PAGE_PATHS if "playground" in given["components"] else (),
        ingress_annotations=edge.ingress_annotations(given, request),
    )


def problem(pin: Pin, given: Mapping[str, Any]) -> TemplateError | None:
    """Why these answers cannot make a deployment; None when they can."""
    components = set(given["components"])
    scalers = sorted(c for c in components if c.startswith("autoscaling-"))
    if scalers and "monitoring" not in components:
        return ConfigurationError(
            f"components: {scalers[0]} scales on te_queue_size, which only monitoring collects: "
            "add monitoring."
        )
    try:
        _batch_tokens(pin, accelerators.for_name(given["accelerator"]), given)
    except TemplateError as error:
        return error
    return None


def limited(pin: Pin, given: Mapping[str, Any]) -> Pin:
    """The pin with the length that this deployment serves, where that is less than the model takes."""
    gpu = accelerators.for_name(given["accelerator"])
    hardware = replace(gpu, dtype=serving_dtype(pin.facts, gpu))
    edited = bool(edits(given))
    tokens = compatibility.served_tokens(pin.facts, hardware, edited=edited)
    answered = int(given.get("longest_input") or 0)
    if answered and position_table_bytes(pin.facts, gpu):
        tokens = min(answered, tokens or answered)
    if tokens is None:
        return pin
    why = (
        "the table of positions that TEI builds at start grows with the square of the length"
        if pin.facts.alibi
        else "beyond half its window this image of TEI, which has no edits, loses the window in batches"
    )
    remark = f"Texts are cut at {tokens:,} tokens here: {why}."
    facts = replace(pin.facts, max_input_tokens=tokens)
    return replace(pin, facts=facts, input_tokens=tokens, remarks=(*pin.remarks, remark))


# Memory


def _stored_bytes(facts: Facts) -> int:
    """Size of the weight files."""
    if facts.weights_bytes is None:
        raise UnsuitableModelError(
            "pin.facts.weights_bytes is missing, and nothing can be sized without it: resolve the "
            "pin again."
        )
    return facts.weights_bytes


def _parameters(facts: Facts) -> int:
    """Counted, or from the bytes; of an unknown type, as if each took two."""
    return facts.parameters or _stored_bytes(facts) // _ITEM_BYTES.get(facts.dtype or "", 2)


def _hidden_size(facts: Facts) -> int:
    return facts.hidden_size or facts.dimensions or 4096


def serving_dtype(facts: Facts, gpu: Accelerator) -> str:
    """float16 where flash attention or memory gain from it, float32 elsewhere; TEI has no bfloat16."""
    return gpu.dtype if gpu.dtype in _dtypes(facts) else "float32"


def _dtypes(facts: Facts) -> tuple[str, ...]:
    """What TEI computes an architecture in."""
    known = compatibility.ARCHITECTURES.get(facts.architecture)
    return known.dtypes if known else ("float16", "float32")


def uses_flash_attention(facts: Facts, gpu: Accelerator) -> bool:
    """TEI's flash attention is for float16 alone (backends/candle/src/lib.rs)."""
    row = compatibility.ARCHITECTURES.get(facts.architecture)
    return (
        gpu.flash_attention
        and serving_dtype(facts, gpu) == "float16"
        and (row is None or "flash" in row.paths)
    )


def activation_bytes(facts: Facts, gpu: Accelerator, batch_tokens: int) -> int:
    """Peak of one batch of `batch_tokens` in inputs as long as the model takes.

    Per token: hidden states, projections and the two or three parts of the feed-forward layer,
    counted as 12 hidden sizes and 6 intermediate sizes (assumed; twice what a layer holds at once).
    Without flash attention, also three copies of the attention scores, tokens x longest input x heads.
    Checked against cpu-arm64-1.9.4 with bge-m3 at 4,096 tokens: 6.2 GiB measured, 6.5 GiB by this rule.
    """
    item = _ITEM_BYTES[serving_dtype(facts, gpu)]
    hidden = _hidden_size(facts)
    per_token = item * (12 * hidden + 6 * (facts.intermediate_size or 4 * hidden))
    if not uses_flash_attention(facts, gpu):
        longest = min(facts.max_input_tokens or batch_tokens, batch_tokens)
        heads = facts.attention_heads or max(1, hidden // 64)
        per_token += 3 * item * heads * longest
    return batch_tokens * per_token


def memory_needed(facts: Facts, gpu: Accelerator, batch_tokens: int) -> Memory:
    """Bytes on the accelerator, or of the pod on a CPU."""
    return Memory(
        weights=_parameters(facts) * _ITEM_BYTES[serving_dtype(facts, gpu)],
        activations=activation_bytes(facts, gpu, batch_tokens),
        overhead=_CUDA_BYTES if gpu.is_gpu else position_table_bytes(facts, gpu),
    )


def position_table_bytes(facts: Facts, gpu: Accelerator) -> int:
    """Of the host while TEI starts, for jina-embeddings-v2 without flash attention; 0 for others."""
    if not facts.alibi or uses_flash_attention(facts, gpu):
        return 0
    return compatibility.table_bytes(facts, facts.max_input_tokens or 0)


def _fits(facts: Facts, gpu: Accelerator, batch_tokens: int, wanted: bool) -> bool:
    """Whether a batch fits; `wanted`: within what one pod should take, not only what there is."""
    needed = memory_needed(facts, gpu, batch_tokens)
    if gpu.memory_gib is None:
        return needed.activations <= _CPU_ACTIVATION_BYTES
    return needed.total <= (_wanted_bytes(gpu) if wanted else available_bytes(gpu))


def _wanted_bytes(gpu: Accelerator) -> float:
    share = _USED_OF_UNIFIED if gpu.unified_memory else _USED_OF_GPU
    return (gpu.memory_gib or 0) * GIB * share


def available_bytes(gpu: Accelerator) -> float:
    """The most that serving may take of an accelerator's memory."""
    whole = (gpu.memory_gib or 0) * GIB
    return whole - _UNIFIED_RESERVE_BYTES if gpu.unified_memory else whole * _USED_OF_GPU


def _batch_tokens(pin: Pin, gpu: Accelerator, given: Mapping[str, Any]) -> int:
    """`max_batch_tokens`, with inputs cut on a CPU where that was answered."""
    return max_batch_tokens(pin, gpu, int(given.get("longest_input") or 0))


def max_batch_tokens(pin: Pin, gpu: Accelerator, longest_input: int = 0) -> int:
    """Tokens per batch that fit next to the weights.

    TEI's warm-up allocates exactly this many on a GPU (TEI backends/src/lib.rs), so too many is an
    out-of-memory crash at start; and it never takes an input longer than this.

    Args: longest_input: tokens at which inputs are cut on a CPU; 0: as long as the model takes.
    Returns: tokens; on a GPU TEI's default or the model's longer context, on a CPU the longest
    input, else the largest power of two that fits, down to 2,048 on a GPU and 512 on a CPU.
    Raises: UnsuitableModelError when not even that fits: what it needs, what there is, what fits.
    """
    facts = pin.facts
    least = _SMALLEST_BATCH_TOKENS[gpu.is_gpu]
    first = facts.max_input_tokens or least
    if gpu.is_gpu:
        first = max(_DEFAULT_BATCH_TOKENS, first)
    else:
        first = max(least, min(first, longest_input or first))
    powers = [1 << n for n in range(16, 8, -1) if least <= 1 << n < first]
    for wanted in (True, False):
        for tokens in (first, *powers):
            if _fits(facts, gpu, tokens, wanted):
                return tokens
    needed = memory_needed(facts, gpu, least).total / GIB
    fitting = [
        a.name
        for a in accelerators.load().values()
        if a.is_gpu
        and _fits(facts, a, _SMALLEST_BATCH_TOKENS[True], wanted=False)
        and not compatibility.refusal(compatibility.check_hardware(facts.architecture, a))
    ]
    has = (
        f"{gpu.title} has {available_bytes(gpu) / GIB:.1f} GiB to give"
        if gpu.is_gpu
        else f"a pod on a CPU gets {_CPU_ACTIVATION_BYTES / GIB:.0f} GiB beside the weights"
    )
    way_out = f"choose accelerator={', '.join(fitting)}" if fitting else "choose a smaller model"
    raise UnsuitableModelError(
        f"{pin.model_id} does not fit: it needs {needed:.1f} GiB, {has}; {way_out}."
    )


def one_thread(facts: Facts, gpu: Accelerator) -> bool:
    """Whether one thread computes the model: a small one on a CPU. More replicas then take more texts."""
    return not gpu.is_gpu and _hidden_size(facts) <= _ONE_THREAD_HIDDEN


def tei_resources(facts: Facts, gpu: Accelerator, memory: Memory, workers: int) -> Resources:
    """Requests and limits of TEI's container.

    A GPU's own memory is not the pod's. Unified memory is: whether the kernel charges CUDA's
    allocations to the pod is not settled, so the limit holds them, once. The pages of the mapped
    weights are charged too, so they are counted where the weights end up elsewhere. On a CPU they are
    given back as batches need their room, so the larger of both counts: 305 MiB of MiniLM, where 244
    were in use at most, 966 of BERT-base (968), 4,714 of XLM-RoBERTa large (4,069), all measured
    2026-11-25 with four longest inputs in a batch.
    """
    tokenizers = (
        workers * (facts.vocab_size or _DEFAULT_VOCABULARY) * _BYTES_PER_TOKEN_OF_VOCABULARY
    )
    needed = _PROCESS_BYTES[gpu.is_gpu] + tokenizers
    parts = [f"{_mib(needed)} MiB for TEI and {workers} tokenizers"]
    if gpu.is_gpu:
        needed += _CUDA_BYTES
        parts.append(f"{_mib(_CUDA_BYTES)} MiB for CUDA on the host")
    passing = 0
    if not gpu.is_gpu:
        needed += memory.weights + max(memory.activations, _stored_bytes(facts)) + memory.overhead
        parts.append(
            f"{_mib(memory.weights)} MiB of weights in {serving_dtype(facts, gpu)}, "
            f"{_mib(memory.activations)} MiB for one full batch or, if more, "
            f"{_mib(_stored_bytes(facts))} MiB of the file that they are read from"
        )
        if memory.overhead:
            parts.append(
                f"{_mib(memory.overhead)} MiB for TEI's table of positions while it starts"
            )
    elif gpu.unified_memory:
        needed += memory.total
        parts.append(
            f"{_mib(memory.weights)} MiB of weights in {serving_dtype(facts, gpu)}, "
            f"{_mib(memory.activations)} MiB for one full batch"
        )
        parts.append(f"{_mib(memory.overhead)} MiB for CUDA in the unified memory")
    else:
        passing = _stored_bytes(facts) + position_table_bytes(facts, gpu)
        parts.append(f"up to {_mib(passing)} MiB of weights on their way to the GPU")
    step = 256 if gpu.is_gpu else 32
    if gpu.is_gpu:
        headroom, share = needed // 4, "a quarter"
    elif needed // 2 > _ANSWERS_BYTES:
        headroom, share = needed // 2, "a half"
    else:
        headroom, share = _ANSWERS_BYTES, f"{_mib(_ANSWERS_BYTES)} MiB"
    return Resources(
        cpu_request="2" if gpu.is_gpu else "1" if one_thread(facts, gpu) else "4",
        cpu_limit="2" if one_thread(facts, gpu) else "4",
        memory_request_mib=_rounded_mib(needed, step),
        memory_limit_mib=_rounded_mib(needed + headroom + passing, step),
        reason=f"{', '.join(parts)}; the limit is {share} above that",
    )


def model_fetch_resources(pin: Pin) -> Resources:
    """Requests and limits of the init container, which holds chunks, never a whole file.

    Converting jina-embeddings-v3 stays within 1.5 GB (benchmarks/jina_memory.py).
    """
    return Resources(
        cpu_request="250m",
        cpu_limit="2",
        memory_request_mib=512,
        memory_limit_mib=2048 if pin.conversion else 1024,
        reason="eight chunks of 8 MiB at a time, Python and MLflow's client"
        + (", and blocks of tensors while the model is converted" if pin.conversion else ""),
    )


def _mib(size: int) -> int:
    return ceil(size / MIB)


def _rounded_mib(size: int, step: int) -> int:
    """Up to a multiple of `step` MiB."""
    return step * ceil(size / (step * MIB))


def _quantity(mib: int) -> str:
    """As Kubernetes stores it, so that an apply of the same is no change: 1Gi, never 1024Mi."""
    return f"{mib}Mi" if mib % 1024 else f"{mib // 1024}Gi"


# Time


def tokens_per_second(facts: Facts, gpu: Accelerator, measured: int = 0) -> float:
    """That one replica keeps up at least: of what was measured, or 2 operations per parameter and token.

    Args: measured: tokens a second of the longest texts (`make bench`); 0: nobody has measured.
    """
    if measured:
        return _MEASURED_SHARE * measured
    sustained = _SUSTAINED_FLOPS[gpu.is_gpu] / (2 if one_thread(facts, gpu) else 1)
    return sustained / (2 * _parameters(facts))


def request_seconds(facts: Facts, gpu: Accelerator, measured: int = 0) -> int:
    """Longest request: a body of TEI's --payload-limit. Returns: seconds, 60 to 600, a multiple of 30."""
    tokens = _PAYLOAD_BYTES / _BYTES_PER_TOKEN_OF_TEXT
    seconds = tokens / tokens_per_second(facts, gpu, measured)
    return min(600, max(60, 30 * ceil(seconds / 30)))


def max_client_batch_size(facts: Facts, gpu: Accelerator, measured: int = 0) -> int:
    """Inputs per request: OpenAI's clients send up to 2,048, TEI's own limit is 32.

    As many as leave time for the full batches of all concurrent clients within the longest request.

    Returns: a power of two, 32 to 512: more of them would not fit into --payload-limit.
    """
    tokens = request_seconds(facts, gpu, measured) * tokens_per_second(facts, gpu, measured)
    most = tokens / (_USUAL_INPUT_TOKENS * _CONCURRENT_CLIENTS)
    return next((n for n in (512, 256, 128, 64) if n <= most), 32)


def startup_seconds(facts: Facts, gpu: Accelerator, batch_tokens: int, measured: int = 0) -> int:
    """Budget from the start of TEI's process to its first answer.

    Two minutes for CUDA and its kernels' first compilation (14 s were reported from a Spark with a
    warm cache), reading the weights from a slow volume, and the warm-up (TEI backends/src/lib.rs): of
    a full batch on a GPU, of the longest input on a CPU, with three times the operations of the
    weights for attention. XLM-RoBERTa large with 4,096 tokens took 90 CPU seconds, 182 s on two
    busy cores (measured 2026-11-25); this says 139.
    """
    reading = _stored_bytes(facts) / _LOAD_BYTES_PER_SECOND
    tokens = (
        batch_tokens if gpu.is_gpu else min(facts.max_input_tokens or batch_tokens, batch_tokens)
    )
    return ceil(120 + reading + 3 * batch_seconds(facts, gpu, tokens, measured))


def batch_seconds(facts: Facts, gpu: Accelerator, batch_tokens: int, measured: int = 0) -> float:
    """The longest batch, at the slowest sustained speed."""
    return batch_tokens / tokens_per_second(facts, gpu, measured)


# Storage and images


def _folder_bytes(facts: Facts) -> int:
    """One version on disk, with room for small files and for a conversion's second copy."""
    return 2 * _stored_bytes(facts) + 256 * MIB


def model_claim(facts: Facts, project_name: str, shared: bool, storage_class: str = "") -> Claim:
    """A volume for two versions, since old and new meet in a rollout.

    Size, access mode and StorageClass of a claim cannot be changed at will, and the volume is a
    cache: so all are part of the name, and a change makes a new claim. Sizes are powers of two, to
    be rare.
    """
    size = 16
    while size * GIB < 2 * _folder_bytes(facts):
        size *= 2
    parts = (storage_class, "shared" if shared else "", f"{size}gi")
    name = "-".join([project_name, "models", *filter(None, parts)])
    if len(name) > 253:  # of an object's name
        name = f"{project_name}-models-{sha256(name.encode()).hexdigest()[:16]}"
    return Claim(name, "ReadWriteMany" if shared else "ReadWriteOnce", size)


def _tei_image(gpu: Accelerator, given: Mapping[str, Any]) -> Image:
    if given["tei_image"] == "build":
        name = f"{given['container_registry']}/{given['project_name']}-tei"
        return Image(name, f"{given['tei_ref'][:12]}-{gpu.name}")
    reference, _, digest = gpu.official_images[given["image_platform"]].partition("@")
    name, _, tag = reference.rpartition(":")
    return Image(name, tag, digest or None)


# Flags


def _flags(
    pin: Pin,
    gpu: Accelerator,
    dtype: str,
    pooling: str,
    given: Mapping[str, Any],
    batch_tokens: int,
    served: int,
    client_batch: int,
    workers: int,
) -> Iterator[Flag]:
    """TEI's flags in the order of its own help, each with its reason."""
    facts = pin.facts
    yield Flag(
        "--model-id", "/model/current", "The link that model-fetch sets to the pinned version"
    )
    yield Flag("--served-model-name", pin.model_id, "What clients name as model")
    yield Flag(
        "--pooling",
        pooling,
        "As answered, over what the model's files say"
        if given["pooling"] != "auto"
        else "As the model's files say; always given, because TEI guesses where one is missing",
    )
    yield Flag("--dtype", dtype, _dtype_reason(facts, gpu, dtype))
    longest = facts.max_input_tokens or served
    cut = (
        f"; inputs are cut at {served:,} of the model's {longest:,} tokens"
        if served < longest
        else ""
    )
    yield Flag(
        "--max-batch-tokens",
        str(batch_tokens),
        f"Fits the memory next to the weights; the warm-up proves it at start{cut}"
        if gpu.is_gpu
        else f"The longest input: a CPU gains nothing from more in a batch, and all wait for it{cut}",
    )
    yield Flag(
        "--max-client-batch-size",
        str(client_batch),
        f"Inputs per request; {_CONCURRENT_CLIENTS} such requests of {_USUAL_INPUT_TOKENS} tokens each "
        "are computed within the longest one",
    )
    yield Flag(
        "--max-concurrent-requests",
        str(client_batch * _CONCURRENT_CLIENTS),
        f"TEI counts inputs, not requests: {_CONCURRENT_CLIENTS} full batches at a time, then 429",
    )
    yield Flag(
        "--tokenization-workers",
        str(workers),
        "One per core of the limit, not of the node; each holds a copy of the tokenizer"
        if gpu.is_gpu
        else "Half of the cores: the others compute",
    )
    yield Flag(
        "--auto-truncate",
        "true",
        "A too long input is cut, not refused; clients of /embed may ask for an error with truncate=false",
    )
    task = (pin.conversion or {}).get("task")
    if task and facts.prompts:
        prompt = f"The model was trained with it for {task}; /v1/embeddings takes no prompt name"
        yield Flag("--default-prompt-name", task, prompt)
    elif facts.default_prompt:
        prompt = "The model's own pipeline puts it before every text"
        yield Flag("--default-prompt-name", facts.default_prompt, prompt)
    else:
        yield Flag("--default-prompt", None, _prompt_reason(facts))
    yield Flag(
        "--payload-limit",
        str(_PAYLOAD_BYTES),
        "Bytes per request; the timeouts and the drain are computed for it",
    )
    yield Flag("--hostname", "0.0.0.0", "Kubernetes sets HOSTNAME to the pod's name")  # noqa: S104
    yield Flag("--port", str(PORT), "Above 1024, so no privilege is needed")
    yield Flag("--json-output", "", "Logs that a collector can read")


def _dtype_reason(facts: Facts, gpu: Accelerator, dtype: str) -> str:
    if "float16" not in _dtypes(facts):
        return f"TEI has no float16 for {facts.architecture}"
    if dtype == "float32":
        return "TEI would take float16 even on a CPU, where it is slow"
    if uses_flash_attention(facts, gpu):
        return "TEI's flash attention works in no other type"
    return "Half the memory of float32"


def _prompt_reason(facts: Facts) -> str:
    if not facts.prompts:
        return "The model has no prefixes"
    return (
        "It would stand before queries and documents alike; clients write the model's "
        f"prefixes themselves ({', '.join(facts.prompts)})"
    )
