"""The converted model against transformers' own implementation with the same adapter active.

On one side JinaEmbeddingsV3Model, its adapter applied beside each layer and never merged. On the
other side what TEI computes from the converted folder, written down here after its source
(backends/candle/src/models/nomic.rs at 0d124dc): transformers' own `nomic_bert` cannot hold this
model (no biases, a gated MLP). Then one fault at a time, each of which must show.

Needs torch==2.13.0 and transformers==5.23.0; with peft==0.21.2 the adapter folders are also read by
PEFT itself.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the reference is computed by torch")
transformers = pytest.importorskip("transformers", "5.0", reason="it has JinaEmbeddingsV3Model")

# What is tested, and the checkpoints beside this file, wherever pytest was started.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import jina_checkpoints as checkpoints  # noqa: E402
import numpy  # noqa: E402
from jina_checkpoints import ALPHA, FOLDER_NAMES, LAYOUTS, RANK, TASKS  # noqa: E402
from model_fetch import jina  # noqa: E402
from model_fetch.errors import UnsuitableModelError  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

pytestmark = pytest.mark.reference

CHECKPOINT = checkpoints.random_checkpoint()
LONGEST = 100
THRESHOLD = 0.9999
"""Least cosine of a right conversion; faults must stay below it."""


def texts(count: int = 60) -> list[str]:
    """Texts of 1 to LONGEST words, the shortest and the longest among them."""
    chance = random.Random(11)
    lengths = [1, 2, LONGEST, *(chance.randint(1, LONGEST) for _ in range(count - 3))]
    words = checkpoints.CONFIG["vocab_size"] - 4
    return [" ".join(f"w{chance.randrange(words)}" for _ in range(length)) for length in lengths]


def tokenize(folder: Path, sentences: list[str], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, padded with `pad`, and the attention mask; both of shape (texts, tokens)."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch(sentences)]
    mask = [torch.ones_like(row) for row in ids]
    padded = torch.nn.utils.rnn.pad_sequence
    return padded(ids, batch_first=True, padding_value=pad), padded(mask, batch_first=True)


def mean_pooled(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Unit vectors of the mean over each text's own tokens."""
    weights = mask[:, :, None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


# transformers, with an adapter active


def native_state(checkpoint: checkpoints.Checkpoint) -> dict[str, torch.Tensor]:
    """The checkpoint by transformers' names."""
    state = {}
    for name, values in checkpoint.tensors.items():
        if ".Wqkv." in name:
            for part, third in zip("qkv", numpy.split(values, 3), strict=True):
                native = checkpoints.native_name(name).replace("qkv_proj", f"{part}_proj")
                state[native] = torch.tensor(third)
        else:
            state[checkpoints.native_name(name)] = torch.tensor(values)
    return state


def native_model(checkpoint: checkpoints.Checkpoint) -> torch.nn.Module:
    """JinaEmbeddingsV3Model with the checkpoint's weights: every one, and no other."""
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "intermediate_size", "max_position_embeddings", "type_vocab_size", "layer_norm_eps",
            "hidden_act", "pad_token_id", "bos_token_id", "eos_token_id")  # fmt: skip
    config = transformers.JinaEmbeddingsV3Config(
        **{key: checkpoint.config[key] for key in keys},
        rope_parameters={
            "rope_type": "default",
            "rope_theta": checkpoint.config["rotary_emb_base"],
        },
        attn_implementation="eager",
    )
    model = transformers.JinaEmbeddingsV3Model(config).eval()
    model.load_state_dict(native_state(checkpoint), strict=True)
    return model


def activate(model: torch.nn.Module, factors: dict) -> list:
    """Add `x → x·A·B·scaling` beside every layer of `factors`; returns the hooks to remove."""
    modules = dict(model.named_modules())
    hooks = []

    def beside(name: str, change: Callable) -> None:
        hooks.append(
            modules[name].register_forward_hook(
                lambda module, inputs, output: output + change(inputs[0]) * ALPHA / RANK
            )
        )

    for module, (left, right) in factors.items():
        left, right = torch.tensor(left), torch.tensor(right)
        name = checkpoints.native_name(module)
        if module.startswith("embeddings."):
            beside(name, lambda ids, left=left, right=right: left[ids] @ right)
        elif "qkv_proj" in name:
            for part, third in zip("qkv", left.chunk(3), strict=True):
                split = name.replace("qkv_proj", f"{part}_proj")
                beside(split, lambda x, third=third, right=right: x @ right.T @ third.T)
        else:
            beside(name, lambda x, left=left, right=right: x @ right.T @ left.T)
    return hooks


@torch.no_grad()
def native_vectors(model: torch.nn.Module, factors: dict | None, folder: Path) -> torch.Tensor:
    ids, mask = tokenize(folder, texts(), pad=1)
    hooks = activate(model, factors) if factors else []
    try:
        return mean_pooled(model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
    finally:
        for hook in hooks:
            hook.remove()


# TEI's nomic_bert


@torch.no_grad()
def tei_vectors(folder: Path, pooling: str | None = None) -> torch.Tensor:
    """What TEI answers for the texts: nomic.rs, with the file's own weights in float32."""
    config = json.loads((folder / "config.json").read_text())
    said = json.loads((folder / "1_Pooling/config.json").read_text())
    pooling = pooling or ("cls" if said["pooling_mode_cls_token"] else "mean")
    stored = checkpoints.read_safetensors(folder / "model.safetensors")
    weights = {name: torch.tensor(values) for name, values in stored.items()}
    hidden, heads = config["n_embd"], config["n_head"]
    size = hidden // heads
    assert not config["prenorm"]
    assert not config["rotary_emb_interleaved"]
    assert config["rotary_emb_fraction"] == 1.0
    assert config["rotary_scaling_factor"] is None
    assert config["activation_function"] == "gelu"
    assert config["qkv_proj_bias"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.layer_norm(
            x,
            (hidden,),
            weights[f"{name}.weight"],
            weights[f"{name}.bias"],
            config["layer_norm_epsilon"],
        )

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    ids, mask = tokenize(folder, texts(), pad=0)  # TEI pads with 0 and masks
    tokens = ids.shape[1]
    assert tokens <= config["n_positions"]
    frequencies = config["rotary_emb_base"] ** (-torch.arange(0, size, 2).float() / size)
    angles = torch.arange(tokens)[:, None].float() * frequencies
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    ignored = torch.where(mask == 1, 0.0, float("-inf"))[:, None, None, :]
    x = weights["embeddings.word_embeddings.weight"][ids]
    x = norm(
        x + weights["embeddings.token_type_embeddings.weight"][torch.zeros_like(ids)], "emb_ln"
    )
    for layer in range(config["n_layer"]):
        name = f"encoder.layers.{layer}"
        qkv = linear(x, f"{name}.attn.Wqkv").view(*ids.shape, 3 * heads, size).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=1)
        scores = rotated(q) @ rotated(k).transpose(-1, -2) / math.sqrt(size) + ignored
        attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(*ids.shape, hidden)
        x = norm(x + linear(attended, f"{name}.attn.out_proj"), f"{name}.norm1")
        inner = torch.nn.functional.gelu(linear(x, f"{name}.mlp.fc1"), approximate="tanh")
        x = norm(x + linear(inner, f"{name}.mlp.fc2"), f"{name}.norm2")
    if pooling == "cls":
        return torch.nn.functional.normalize(x[:, 0], dim=-1)
    return mean_pooled(x, mask if pooling == "mean" else torch.ones_like(mask))


def least_cosine(vectors: torch.Tensor, expected: torch.Tensor) -> float:
    """The worst text's. NaN counts as worst."""
    cosines = (vectors.double() * expected.double()).sum(-1)
    return float(cosines.min()) if cosines.isfinite().all() else -1.0


# The proof


@pytest.fixture(scope="session")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return native_model(CHECKPOINT)


@pytest.fixture(scope="session")
def sources(tmp_path_factory, model) -> dict[str, Path]:
    """The checkpoint in every layout; the base model of `hf` as transformers itself saves it."""
    root = tmp_path_factory.mktemp("reference")
    folders = {name: checkpoints.save(CHECKPOINT, root / name, name) for name in LAYOUTS}
    model.save_pretrained(folders["hf"])
    return folders


@pytest.fixture(scope="session")
def expected(sources, model) -> dict[str, torch.Tensor]:
    """Native vectors by task."""
    return {task: native_vectors(model, CHECKPOINT.adapters[task], sources["hf"]) for task in TASKS}


def test_the_texts_are_many_and_of_mixed_length(sources):
    _, mask = tokenize(sources["hf"], texts(), pad=1)
    lengths = mask.sum(1).tolist()
    assert len(lengths) >= 50
    assert min(lengths) == 3
    assert max(lengths) == LONGEST + 2
    assert len(set(lengths)) > 30


def test_transformers_saves_original_names(sources):
    """What `-hf` has been saved with: the names on which the conversion relies."""
    saved = checkpoints.read_safetensors(sources["hf"] / "model.safetensors")
    assert saved.keys() == {checkpoints.original_name(name) for name in CHECKPOINT.tensors}
    config = json.loads((sources["hf"] / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 20000.0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("task", TASKS)
def test_vectors_are_those_of_the_native_model(sources, expected, tmp_path, layout, task, dtype):
    jina.convert(sources[layout], task, tmp_path / "out", dtype=dtype)
    cosine = least_cosine(tei_vectors(tmp_path / "out"), expected[task])
    assert cosine >= (THRESHOLD if dtype == "float16" else 0.999999)


def test_the_adapters_give_different_vectors(sources, expected, model):
    """Otherwise a wrong adapter could not show."""
    plain = native_vectors(model, None, sources["hf"])
    for task in TASKS:
        for other in [plain, *(expected[name] for name in TASKS if name != task)]:
            assert least_cosine(expected[task], other) < 0.95


@pytest.mark.parametrize("layout", ["hf", "native"])
def test_peft_reads_the_adapter_folders_as_the_conversion_does(sources, expected, tmp_path, layout):
    pytest.importorskip("peft", reason="PEFT reads the adapters")
    for task in TASKS:
        model = native_model(CHECKPOINT)
        loaded = model.load_adapter(str(sources[layout] / task.translate(FOLDER_NAMES)))
        assert not loaded.missing_keys
        assert not loaded.unexpected_keys
        vectors = native_vectors(model, None, sources[layout])
        assert least_cosine(vectors, expected[task]) >= 0.999999
        jina.convert(sources[layout], task, tmp_path / task, dtype="float32")
        assert least_cosine(tei_vectors(tmp_path / task), vectors) >= 0.999999


def test_the_prompt_is_the_published_one(sources, tmp_path):
    for task in TASKS:
        record = jina.convert(sources["original"], task, tmp_path / task)
        assert record["prompt"] == CHECKPOINT.config["task_instructions"][task]


# The faults: each made in one place, in what is converted or in what came out


def _config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def _weights(folder: Path, change: Callable[[dict], None]) -> None:
    stored = checkpoints.read_safetensors(folder / "model.safetensors")
    change(stored)
    checkpoints.write_safetensors(folder / "model.safetensors", stored)


def _zero(pattern: str) -> Callable[[Path], None]:
    def change(stored: dict) -> None:
        names = [name for name in stored if pattern in name]
        assert names
        for name in names:
            stored[name][:] = 0

    return lambda folder: _weights(folder, change)


def _exchange(first: int, second: int) -> Callable[[Path], None]:
    """Exchange two thirds of every Wqkv."""

    def change(stored: dict) -> None:
        for name in stored:
            if ".Wqkv." in name:
                thirds = numpy.split(stored[name], 3)
                thirds[first], thirds[second] = thirds[second], thirds[first]
                stored[name] = numpy.concatenate(thirds)

    return lambda folder: _weights(folder, change)


INDEX_0 = [TASKS[1], TASKS[0], *TASKS[2:]]

SOURCE_FAULTS: dict[str, Callable[[Path], None]] = {
    "adapter index 0 instead of 1": lambda f: _config(f, lora_adaptations=INDEX_0),
    "scaling 1 instead of 0.25": lambda f: _config(f, lora_alpha=4),
    "rotary base 10000": lambda f: _config(f, rotary_emb_base=10000.0),
    "rotary base 1000": lambda f: _config(f, rotary_emb_base=1000.0),
}

CONVERTED_FAULTS: dict[str, Callable[[Path], None]] = {
    "rotary base 10000": lambda f: _config(f, rotary_emb_base=10000.0),
    "rotary base 1000": lambda f: _config(f, rotary_emb_base=1000.0),
    "Wqkv biases dropped": _zero("attn.Wqkv.bias"),
    "out_proj biases dropped": _zero("attn.out_proj.bias"),
    "fc1 biases dropped": _zero("mlp.fc1.bias"),
    "fc2 biases dropped": _zero("mlp.fc2.bias"),
    "one bias of one layer dropped": _zero("encoder.layers.1.norm2.bias"),
    "token types dropped": _zero("token_type_embeddings"),
    "k before q": _exchange(0, 1),
    "v before k": _exchange(1, 2),
}


@pytest.mark.parametrize("fault", SOURCE_FAULTS)
def test_a_fault_in_what_is_read_shows(sources, expected, tmp_path, fault):
    source = shutil.copytree(sources["original"], tmp_path / "source")
    SOURCE_FAULTS[fault](source)
    jina.convert(source, TASKS[1], tmp_path / "out", dtype="float32")
    assert least_cosine(tei_vectors(tmp_path / "out"), expected[TASKS[1]]) < THRESHOLD


@pytest.mark.parametrize("fault", CONVERTED_FAULTS)
def test_a_fault_in_what_is_written_shows(sources, expected, tmp_path, fault):
    jina.convert(sources["original"], TASKS[1], tmp_path / "out", dtype="float32")
    CONVERTED_FAULTS[fault](tmp_path / "out")
    assert least_cosine(tei_vectors(tmp_path / "out"), expected[TASKS[1]]) < THRESHOLD


@pytest.mark.parametrize("module", ["", "embeddings.word_embeddings", "layers.1.attn.Wqkv"])
def test_an_adapter_left_out_shows(sources, expected, tmp_path, monkeypatch, module):
    """Everywhere, in the largest table, or in one layer."""
    blocks = jina.Weight.blocks

    def without(weight, dtype):
        left_out = jina.Weight(weight.name, weight.shape, weight.parts, None)
        return blocks(left_out if module in weight.name else weight, dtype)

    monkeypatch.setattr(jina.Weight, "blocks", without)
    jina.convert(sources["original"], TASKS[1], tmp_path / "out", dtype="float32")
    assert least_cosine(tei_vectors(tmp_path / "out"), expected[TASKS[1]]) < THRESHOLD


@pytest.mark.parametrize("pooling", ["cls", "mean with padding"])
def test_other_pooling_shows(sources, expected, tmp_path, pooling):
    jina.convert(sources["original"], TASKS[1], tmp_path / "out", dtype="float32")
    vectors = tei_vectors(tmp_path / "out", pooling)
    assert least_cosine(vectors, expected[TASKS[1]]) < THRESHOLD


@pytest.mark.parametrize("module", ["embeddings.word_embeddings", "encoder.layers.0.mlp.fc1"])
def test_swapped_factors_are_refused(tmp_path, module):
    swapped = checkpoints.random_checkpoint()
    for factors in swapped.adapters.values():
        left, right = factors[module]
        factors[module] = (right.T, left.T)
    source = checkpoints.save(swapped, tmp_path / "source", "original")
    with pytest.raises(UnsuitableModelError, match=module.rpartition(".")[2]):
        jina.convert(source, TASKS[1], tmp_path / "out")


def test_the_epsilon_is_carried_over(tmp_path):
    """1e-5 or 1e-12 gives the same vectors here, so the number itself is checked."""
    source = checkpoints.save(CHECKPOINT, tmp_path / "source", "original")
    _config(source, layer_norm_eps=3e-7)
    jina.convert(source, TASKS[1], tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["layer_norm_epsilon"] == 3e-7
