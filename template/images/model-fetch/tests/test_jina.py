"""The conversion of jina-embeddings-v3: what it writes, what it refuses, how much memory it takes."""

from __future__ import annotations

import json
import shutil
import sys
import tracemalloc
from pathlib import Path

import pytest

numpy = pytest.importorskip("numpy", reason="the conversion needs numpy")

# What is tested, and the checkpoints beside this file, wherever pytest was started.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import jina_checkpoints as checkpoints  # noqa: E402
from jina_checkpoints import LAYOUTS, TASKS  # noqa: E402
from model_fetch import jina, tensors  # noqa: E402
from model_fetch.errors import ConfigurationError, TemplateError, UnsuitableModelError  # noqa: E402

CHECKPOINT = checkpoints.random_checkpoint()


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> dict[str, Path]:
    """The same checkpoint in every layout. Read-only: copy before changing."""
    root = tmp_path_factory.mktemp("jina")
    return {layout: checkpoints.save(CHECKPOINT, root / layout, layout) for layout in LAYOUTS}


@pytest.fixture
def source(sources, tmp_path) -> Path:
    """A copy of the published layout, to be broken."""
    return Path(shutil.copytree(sources["original"], tmp_path / "source"))


@pytest.fixture
def hf_source(sources, tmp_path) -> Path:
    """A copy of the layout with adapter folders, to be broken."""
    return Path(shutil.copytree(sources["hf"], tmp_path / "hf-source"))


def change_tensors(
    folder: Path, change, name: str = "model.safetensors", dtype: str = "F32"
) -> None:
    """Apply `change` to the dictionary of a file's tensors, and write them back."""
    stored = {key: tensor.read().reshape(tensor.shape) for key, tensor in
              tensors.read_header(folder / name).items()}  # fmt: skip
    change(stored)
    checkpoints.write_safetensors(folder / name, stored, dtype)


def change_config(folder: Path, name: str = "config.json", **changes) -> None:
    """Set keys of a JSON file; None removes one."""
    config = json.loads((folder / name).read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / name).write_text(json.dumps(config))


def refusal(source: Path, task: str = "retrieval.passage", dtype: str = "float16") -> str:
    """The one line with which a conversion is refused; nothing may be left that looks complete."""
    destination = source.parent / "refused"
    with pytest.raises(TemplateError) as caught:
        jina.convert(source, task, destination, dtype=dtype)
    assert isinstance(caught.value, (UnsuitableModelError, ConfigurationError))
    assert not list(destination.glob("model.safetensors*"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("task", TASKS)
def test_every_adapter_of_every_layout_is_merged(sources, tmp_path, layout, task):
    record = jina.convert(sources[layout], task, tmp_path / "out", dtype="float32")
    written = checkpoints.read_safetensors(tmp_path / "out/model.safetensors")
    expected = checkpoints.merged(CHECKPOINT, task)
    assert list(written) == list(jina.Architecture.from_config(CHECKPOINT.config).shapes())
    assert written.keys() == expected.keys()
    for name, values in expected.items():
        numpy.testing.assert_allclose(written[name], values, rtol=0, atol=1e-6, err_msg=name)
    assert record["task"] == task
    assert record["weights_changed"] == 2 + 4 * 3
    assert record["left_out"] == ["pooler.dense.bias", "pooler.dense.weight"]


def test_all_layouts_give_the_same_bytes_in_float16(sources, tmp_path):
    written = []
    for layout in LAYOUTS:
        jina.convert(sources[layout], "separation", tmp_path / layout)
        written.append((tmp_path / layout / "model.safetensors").read_bytes())
    assert written[0] == written[1]
    # Three small products instead of one large: the last bit before rounding may differ.
    first, third = (checkpoints.read_safetensors(tmp_path / name / "model.safetensors")
                    for name in (LAYOUTS[0], LAYOUTS[2]))  # fmt: skip
    for name, values in first.items():
        numpy.testing.assert_allclose(third[name], values, rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("prefix", ["roberta.", "base_model.model.", "base_model.model.roberta."])
def test_names_may_have_what_libraries_put_in_front(hf_source, tmp_path, prefix):
    def rename(stored: dict) -> None:
        for name in list(stored):
            stored[prefix + name] = stored.pop(name)

    change_tensors(hf_source, rename)
    change_tensors(hf_source / "separation", rename, "adapter_model.safetensors")
    jina.convert(hf_source, "separation", tmp_path / "out", dtype="float32")
    written = checkpoints.read_safetensors(tmp_path / "out/model.safetensors")
    for name, values in checkpoints.merged(CHECKPOINT, "separation").items():
        numpy.testing.assert_allclose(written[name], values, rtol=0, atol=1e-6, err_msg=name)


def test_published_sizes():
    """The real model: 292 tensors, 558,314,496 parameters, counted in the published checkpoint."""
    published = CHECKPOINT.config | {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "vocab_size": 250002,
        "max_position_embeddings": 8194,
    }
    architecture = jina.Architecture.from_config(published)
    shapes = architecture.shapes()
    assert len(shapes) == 292
    assert sum(int(numpy.prod(shape)) for shape in shapes.values()) == 558_314_496
    assert architecture.tei_config("float16") == {
        "architectures": ["NomicBertModel"],
        "model_type": "nomic_bert",
        "prenorm": False,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_base": 20000.0,
        "rotary_emb_interleaved": False,
        "rotary_scaling_factor": None,
        "qkv_proj_bias": True,
        "mlp_fc1_bias": True,
        "mlp_fc2_bias": True,
        "activation_function": "gelu",
        "n_embd": 1024,
        "n_head": 16,
        "n_inner": 4096,
        "n_layer": 24,
        "n_positions": 8192,
        "max_position_embeddings": 8192,
        "vocab_size": 250002,
        "type_vocab_size": 1,
        "layer_norm_epsilon": 1e-05,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "torch_dtype": "float16",
    }


def test_what_tei_reads_beside_the_weights(sources, tmp_path):
    jina.convert(sources["original"], "retrieval.query", tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert found == {
        "1_Pooling/config.json",
        "config.json",
        "config_sentence_transformers.json",
        "model.safetensors",
        "sentence_bert_config.json",
        "tokenizer.json",
    }

    def read(name: str) -> dict:
        return json.loads((tmp_path / "out" / name).read_text())

    assert read("1_Pooling/config.json") == {
        "word_embedding_dimension": 64,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
    }
    assert read("sentence_bert_config.json") == {"max_seq_length": 128, "do_lower_case": False}
    assert read("config_sentence_transformers.json") == {
        "prompts": {"retrieval.query": "Represent the query for retrieving evidence documents: "}
    }
    assert read("config.json")["layer_norm_epsilon"] == 1e-05
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (
        sources["original"] / "tokenizer.json"
    ).read_bytes()


def test_a_task_without_instruction_has_no_prompt(sources, tmp_path):
    record = jina.convert(sources["hf"], "text-matching", tmp_path / "out")
    written = json.loads((tmp_path / "out/config_sentence_transformers.json").read_text())
    assert written == {"prompts": {}}
    assert record["prompt"] == ""


def test_the_published_instruction_stands_in_for_a_missing_one(source, tmp_path):
    change_config(source, task_instructions=None)
    record = jina.convert(source, "retrieval.passage", tmp_path / "out")
    assert record["prompt"] == "Represent the document for retrieval: "


def test_the_source_is_only_read(sources, tmp_path):
    before = {path: path.read_bytes() for path in sources["hf"].rglob("*") if path.is_file()}
    jina.convert(sources["hf"], "classification", tmp_path / "out")
    assert before == {p: p.read_bytes() for p in sources["hf"].rglob("*") if p.is_file()}


def test_sharded_weights(source, tmp_path):
    stored = tensors.read_header(source / "model.safetensors")
    names = sorted(stored)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, part in halves.items():
        values = {name: stored[name].read().reshape(stored[name].shape) for name in part}
        checkpoints.write_safetensors(source / shard, values, "BF16")
    (source / "model.safetensors").unlink()
    index = {"weight_map": {name: shard for shard, part in halves.items() for name in part}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    jina.convert(source, "separation", tmp_path / "out", dtype="float32")
    written = checkpoints.read_safetensors(tmp_path / "out/model.safetensors")
    expected = checkpoints.merged(CHECKPOINT, "separation")
    assert all(
        numpy.allclose(written[name], values, atol=1e-6) for name, values in expected.items()
    )

    (source / "model-2.safetensors").unlink()
    assert "names the shard model-2.safetensors, which is missing" in refusal(source)


FAULTS = {
    "a missing weight": (
        lambda t: t.pop("roberta.encoder.layers.1.mlp.fc2.bias"),
        "lacks encoder.layers.1.mlp.fc2.bias",
    ),
    "a missing original": (
        lambda t: t.pop("roberta.encoder.layers.2.mixer.Wqkv.parametrizations.weight.original"),
        "lacks encoder.layers.2.attn.Wqkv.weight",
    ),
    "half an adapter": (
        lambda t: t.pop("roberta.encoder.layers.0.mlp.fc1.parametrizations.weight.0.lora_B"),
        "lacks encoder.layers.0.mlp.fc1's lora_B",
    ),
    "no adapter for one weight": (
        lambda t: [
            t.pop(f"roberta.encoder.layers.0.mlp.fc1.parametrizations.weight.0.lora_{n}")
            for n in "AB"
        ],
        "lacks the adapter of encoder.layers.0.mlp.fc1",
    ),
    "an unknown tensor": (
        lambda t: t.update({"lm_head.bias": t["roberta.emb_ln.bias"]}),
        "holds lm_head.bias, which jina-embeddings-v3 does not have",
    ),
    "a layer too many": (
        lambda t: t.update({"roberta.encoder.layers.3.norm1.bias": t["roberta.emb_ln.bias"]}),
        "holds encoder.layers.3.norm1.bias",
    ),
    "an embedding's factors swapped": (
        lambda t: swap(t, "roberta.embeddings.word_embeddings"),
        "roberta.embeddings.word_embeddings",
    ),
    "a linear layer's factors swapped": (
        lambda t: swap(t, "roberta.encoder.layers.0.mlp.fc1"),
        "roberta.encoder.layers.0.mlp.fc1",
    ),
    "a transposed weight": (
        lambda t: transpose(t, "roberta.encoder.layers.1.mlp.fc2.parametrizations.weight.original"),
        "has the shape [128, 64]; config.json makes it [64, 128]",
    ),
    "an adapter too few": (
        lambda t: cut(t, "roberta.encoder.layers.1.mlp.fc2.parametrizations.weight.0.lora_A"),
        "does not hold the 5 adapters of config.json",
    ),
    "NaN in a weight": (
        lambda t: spoil(t, "roberta.encoder.layers.2.norm1.weight", float("nan")),
        "roberta.encoder.layers.2.norm1.weight holds NaN or infinity",
    ),
    "infinity in a table": (
        lambda t: spoil(
            t, "roberta.embeddings.word_embeddings.parametrizations.weight.original", float("-inf")
        ),
        "word_embeddings.parametrizations.weight.original holds NaN or infinity",
    ),
    "NaN in an adapter": (
        lambda t: spoil(
            t, "roberta.encoder.layers.0.mixer.Wqkv.parametrizations.weight.0.lora_A", float("nan")
        ),
        "Wqkv.parametrizations.weight.0.lora_A holds NaN or infinity",
    ),
    "the same weight twice": (
        lambda t: t.update({"emb_ln.bias": t["roberta.emb_ln.bias"]}),
        "roberta.emb_ln.bias and emb_ln.bias are the same weight twice",
    ),
}


def swap(stored: dict, module: str) -> None:
    """Exchange A and B."""
    a, b = (f"{module}.parametrizations.weight.0.lora_{n}" for n in "AB")
    stored[a], stored[b] = stored[b], stored[a]


def transpose(stored: dict, name: str) -> None:
    stored[name] = stored[name].T


def cut(stored: dict, name: str) -> None:
    stored[name] = stored[name][:4]


def spoil(stored: dict, name: str, value: float) -> None:
    stored[name].flat[stored[name].size // 3] = value


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_is_not_whole_is_refused_by_name(source, fault):
    change, message = FAULTS[fault]
    change_tensors(source, change)
    assert message in refusal(source)


def test_only_the_chosen_adapter_is_checked_and_used(source, tmp_path):
    """An adapter that nobody asked for may be anything: it is never read."""
    name = "roberta.encoder.layers.0.mixer.Wqkv.parametrizations.weight.0.lora_A"
    change_tensors(source, lambda t: t[name][4].fill(float("nan")))
    jina.convert(source, TASKS[3], tmp_path / "out")
    assert "holds NaN" in refusal(source, TASKS[4])


def test_a_value_beyond_float16_is_refused_unless_float32_is_asked_for(source, tmp_path):
    change_tensors(source, lambda t: spoil(t, "roberta.emb_ln.bias", 7e4))
    assert "roberta.emb_ln.bias holds 7e+04, beyond float16's 65504" in refusal(source)
    jina.convert(source, TASKS[0], tmp_path / "out", dtype="float32")
    assert (
        checkpoints.read_safetensors(tmp_path / "out/model.safetensors")["emb_ln.bias"].max() == 7e4
    )


def test_an_adapter_that_is_not_there(source, hf_source):
    assert refusal(source, "clustering") == (
        "The checkpoint has no adapter clustering; it has " + ", ".join(TASKS) + "."
    )
    shutil.rmtree(hf_source / "retrieval_query")
    assert refusal(hf_source, "retrieval.query") == (
        "The checkpoint has no adapter retrieval.query; it has classification, retrieval_passage,"
        " separation, text_matching."
    )


def test_neither_layout(hf_source):
    for folder in hf_source.glob("*/"):
        shutil.rmtree(folder)
    assert "neither adapters in its weights (parametrizations) nor adapter folders" in refusal(
        hf_source
    )


def test_another_model(source):
    change_config(source, architectures=["BertModel"], lora_adaptations=None)
    assert "config.json is not jina-embeddings-v3's" in refusal(source)


def test_a_pickle_alone_is_refused_with_the_way_out(source):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    assert "save the model with safetensors and register that version" in refusal(source)


def test_no_weights_at_all(source):
    (source / "model.safetensors").unlink()
    assert "There is no model.safetensors" in refusal(source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_emb_base": None}, "must say one base of the rotary positions"),
        ({"rope_parameters": {"rope_theta": 10000.0}}, "says [10000.0, 20000.0]"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "asks for dynamic rotary positions"),
        ({"position_embedding_type": "absolute"}, "position_embedding_type absolute"),
        ({"hidden_act": "relu"}, "hidden_act relu"),
        ({"lora_rank": None}, "lacks lora_adaptations, lora_rank or lora_alpha"),
        ({"lora_rank": 8}, "which is not one of rank 8"),
        ({"layer_norm_eps": None}, "must give layer_norm_eps as a number, not None"),
        ({"num_hidden_layers": "3"}, "must give num_hidden_layers as a number, not '3'"),
        ({"num_hidden_layers": 2}, "encoder.layers.2.attn.Wqkv.bias"),
        ({"num_hidden_layers": 4}, "lacks encoder.layers.3.attn.Wqkv.bias"),
        ({"vocab_size": 501}, "has the shape [500, 64]; config.json makes it [501, 64]"),
        ({"intermediate_size": 64.5}, "must give intermediate_size as a count, not 64.5"),
    ],
)
def test_a_config_that_leaves_something_open_is_refused(source, changes, message):
    change_config(source, **changes)
    assert message in refusal(source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "not a plain LoRA with r and lora_alpha (use_dora)"),
        ({"use_rslora": True}, "(use_rslora)"),
        ({"bias": "all"}, "(bias)"),
        ({"peft_type": "IA3"}, "not a plain LoRA"),
        ({"lora_alpha": None}, "not a plain LoRA"),
        ({"r": 8}, "which is not one of rank 8"),
    ],
)
def test_a_peft_adapter_that_would_be_applied_otherwise_is_refused(hf_source, changes, message):
    change_config(hf_source / "retrieval_passage", "adapter_config.json", **changes)
    assert message in refusal(hf_source)


PEFT_FAULTS = {
    "a missing third": (
        lambda t: [t.pop(f"encoder.layers.1.self_attn.k_proj.lora_{n}.weight") for n in "AB"],
        "lacks retrieval_passage: encoder.layers.1.attn.Wqkv's q_proj, k_proj and v_proj",
    ),
    "a missing factor": (
        lambda t: t.pop("encoder.layers.1.mixer.out_proj.lora_A.weight"),
        "lacks retrieval_passage: encoder.layers.1.attn.out_proj's lora_A",
    ),
    "a missing module": (
        lambda t: [t.pop(f"embeddings.word_embeddings.lora_embedding_{n}") for n in "AB"],
        "lacks the adapter of embeddings.word_embeddings",
    ),
    "an unknown tensor": (
        lambda t: t.update({"encoder.layers.0.mlp.fc1.lora_magnitude_vector": numpy.zeros(3)}),
        "holds encoder.layers.0.mlp.fc1.lora_magnitude_vector",
    ),
    "an unknown module": (
        lambda t: t.update({f"classifier.lora_{n}.weight": numpy.zeros((4, 4)) for n in "AB"}),
        "holds the adapter of classifier",
    ),
    "a transposed embedding": (
        lambda t: [transpose(t, f"embeddings.word_embeddings.lora_embedding_{n}") for n in "AB"],
        "which is not one of rank 4",
    ),
}


@pytest.mark.parametrize("fault", PEFT_FAULTS)
def test_a_peft_adapter_that_is_not_whole_is_refused_by_name(hf_source, fault):
    change, message = PEFT_FAULTS[fault]
    change_tensors(hf_source / "retrieval_passage", change, "adapter_model.safetensors")
    assert message in refusal(hf_source)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-10], "damaged or cut short"),
        (lambda data: data[: len(data) // 2], "damaged or cut short"),
        (lambda data: data + b"\0", "damaged or cut short"),
        (lambda data: data[:4], "is not a whole safetensors file"),
        (lambda data: b"", "is not a whole safetensors file"),
        (
            lambda data: b"version https://git-lfs.github.com/spec/v1\n",
            "is not a whole safetensors",
        ),
        (lambda data: b"\xff" * 8 + data[8:], "is not a whole safetensors file"),
        (lambda data: data.replace(b"[500,64]", b"[501,64]", 1), "the file is damaged"),
        (lambda data: data[:8] + b"[" + data[9:], "is not a whole safetensors file"),
    ],
)
def test_damaged_files_are_refused(source, damage, message):
    path = source / "model.safetensors"
    data = path.read_bytes().replace(b"[500, 64]", b"[500,64] ", 1)
    path.write_bytes(damage(data))
    assert message in refusal(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"]["vocab"].update({"more": 500}), "has 501 tokens"),
        (lambda t: t["post_processor"]["single"][1]["Sequence"].update(type_id=1), "token type 1"),
    ],
)
def test_a_tokenizer_that_reads_past_the_tables_is_refused(source, change, message):
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    change(tokenizer)
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert message in refusal(source)


def test_no_tokenizer_and_no_config(source):
    (source / "tokenizer.json").unlink()
    assert "There is no tokenizer.json" in refusal(source)
    (source / "config.json").write_text("{")
    assert "config.json is not JSON" in refusal(source)
    (source / "config.json").unlink()
    assert "There is no config.json" in refusal(source)


def test_a_wrong_type_and_a_used_folder_are_refused(source, tmp_path):
    assert "writes float16 or float32, not bfloat16" in refusal(source, dtype="bfloat16")
    (tmp_path / "refused").mkdir()
    (tmp_path / "refused/config.json").write_text("{}")
    assert "is not empty" in refusal(source)


def test_an_interrupted_conversion_leaves_nothing_that_looks_complete(
    source, tmp_path, monkeypatch
):
    blocks = jina.Weight.blocks

    def interrupted(weight, dtype):
        yield from blocks(weight, dtype)
        if weight.name == "encoder.layers.1.mlp.fc1.weight":
            assert (tmp_path / "out/model.safetensors.partial").exists()
            raise KeyboardInterrupt

    monkeypatch.setattr(jina.Weight, "blocks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        jina.convert(source, "separation", tmp_path / "out")
    assert not list((tmp_path / "out").glob("model.safetensors*"))


def test_memory_stays_below_the_largest_tensor(tmp_path):
    """Blocks, not tensors: the peak is below the largest one, and far below the model."""
    large = checkpoints.random_checkpoint(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, vocab_size=100_000,
        lora_adaptations=list(TASKS[:2]), max_position_embeddings=8194,
    )  # fmt: skip
    checkpoints.save(large, tmp_path / "source", "original")
    largest = 100_000 * 256 * 4
    del large
    tracemalloc.start()
    try:
        jina.convert(tmp_path / "source", TASKS[1], tmp_path / "out", dtype="float32")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out/model.safetensors").stat().st_size > largest
    assert peak < largest


JUNK = (None, True, -1, 0, 4.5, 10**9, "4", "", [], ["x"], {}, {"a": 1}, float("inf"))


def convert_or_refuse(source: Path, destination: Path) -> None:
    """Convert, or be refused in one sentence; anything else is an error."""
    said = "."
    try:
        jina.convert(source, TASKS[1], destination)
    except TemplateError as error:
        said = str(error)
    assert said.endswith(".")


@pytest.mark.parametrize("key", [*checkpoints.CONFIG, "rope_parameters", "model_type"])
def test_any_config_is_converted_or_refused(source, tmp_path, key):
    """Never a traceback, whatever stands in one place of config.json."""
    for index, junk in enumerate(JUNK):
        (source / "config.json").write_text(json.dumps(CHECKPOINT.config | {key: junk}))
        convert_or_refuse(source, tmp_path / f"out-{index}")


@pytest.mark.parametrize(
    "key", ["r", "lora_alpha", "peft_type", "bias", "use_dora", "rank_pattern"]
)
def test_any_adapter_config_is_read_or_refused(hf_source, tmp_path, key):
    path = hf_source / "retrieval_passage/adapter_config.json"
    config = json.loads(path.read_text())
    for index, junk in enumerate(JUNK):
        path.write_text(json.dumps(config | {key: junk}))
        convert_or_refuse(hf_source, tmp_path / f"out-{index}")


@pytest.mark.parametrize(
    "keys", [("model",), ("model", "vocab"), ("post_processor",), ("post_processor", "single")]
)
def test_any_tokenizer_is_taken_or_refused(source, tmp_path, keys):
    path = source / "tokenizer.json"
    whole = path.read_text()
    for index, junk in enumerate((*JUNK, [{"Sequence": None}], [{"Sequence": {"type_id": "x"}}])):
        tokenizer = place = json.loads(whole)
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = junk
        path.write_text(json.dumps(tokenizer))
        convert_or_refuse(source, tmp_path / f"out-{index}")
