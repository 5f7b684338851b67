"""What the files of a Hugging Face embedding model say, and which of them TEI reads.

Works on any folder that can list itself and read a small file: a local one, or one in MLflow.
"TEI" with a file name is huggingface/text-embeddings-inference at
0d124dc9773be6ac5a9a57d8439aba9bbbf33273.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from . import contract, limits, module_rules, reading
from .contract import SENTENCE_CONFIGS
from .errors import UnsuitableModelError
from .reading import UnreadableError

_TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""What transformers makes a tokenizer of, beside tokenizer.json; TEI reads none of them."""

_CONFIGS = (
    "config.json",
    "1_Pooling/config.json",
    "modules.json",
    "config_sentence_transformers.json",
    *_TOKENIZER_CONFIGS,
    *SENTENCE_CONFIGS,
)
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_LONGEST_CONFIG = limits.ANSWER_BYTES
"""Of JSON that is read while rendering; a longer tokenizer.json is left to model-fetch."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_LONGEST_POINTER = 200
_STORED_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""Of one number of each type of a safetensors file (safetensors 0.8.0, tensor.rs)."""

_LONGEST_HEADER = 64 << 20
_ADAPTERS = (
    "retrieval_query",
    "retrieval_passage",
    "separation",
    "classification",
    "text_matching",
)
"""Folders of jina-embeddings-v3-hf, one PEFT adapter per task."""

_PEFT = ("adapter_model.safetensors", "adapter_model.bin", "adapter_config.json")
_ADAPTER_ALONE = (
    "has the weights of an adapter alone: merge it into its base model (PEFT's merge_and_unload) and "
    "register that."
)

_DIGEST_FOLDER = ".cache/huggingface/download"


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a folder."""

    path: str
    """Below the model version's artifacts, with '/'."""

    size: int | None
    """Bytes; None for a folder."""


class Folder(Protocol):
    """The artifacts of one model version."""

    def entries(self, path: str) -> list[Entry]:
        """What stands directly in a folder ('' is the root); [] when there is no such folder."""

    def read(self, path: str) -> bytes:
        """A small file, whole."""

    def head(self, path: str, size: int) -> bytes | None:
        """The first bytes of a large file, or None where that is not cheap."""


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """One file that TEI reads."""

    path: str
    """In the folder that TEI gets."""

    source: str
    """Below the artifact URI; `from` in the mapping."""

    size: int
    """Bytes."""

    sha256: str | None = None
    """Lower-case hexadecimal; None where nobody recorded it."""

    blob_sha1: str | None = None
    """SHA-1 of Git's blob (header and content), which Hugging Face records for small files."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What sizing, flags and documentation need to know of a model. None: not known."""

    architecture: str
    """`model_type` of config.json, by which TEI chooses its implementation."""

    class_name: str | None = None
    """First of `architectures` of config.json."""

    dimensions: int | None = None
    """Length of one embedding."""

    max_input_tokens: int | None = None
    """Longest input that the model takes, in tokens."""

    pooling: str | None = None
    """cls, mean or last-token, as TEI's --pooling takes it."""

    parameters: int | None = None
    dtype: str | None = None
    """Of the stored weights: float32, float16 or bfloat16."""

    weights_bytes: int | None = None
    """Size of the weight files."""

    hidden_size: int | None = None
    layers: int | None = None
    attention_heads: int | None = None
    intermediate_size: int | None = None
    vocab_size: int | None = None
    normalize: bool | None = None
    """The model's own pipeline ends with L2 normalisation."""

    prompts: Mapping[str, str] = field(default_factory=dict)
    """Prefixes by name, from config_sentence_transformers.json."""

    license: str | None = None

    attention: str | None = None
    """both, of a model that was causal once and attends both ways; None: as its architecture does."""

    window: int | None = None
    """Tokens that the attention of most layers reaches."""

    activation: str | None = None
    """Of the feed-forward layers, as config.json calls it."""

    alibi: bool | None = None
    """Positions are a table of TEI's, not of the model (jina-embeddings-v2)."""

    default_prompt: str | None = None
    """Name of the prompt that the model's own pipeline puts before every text."""


@dataclass(frozen=True, slots=True)
class EmbeddingModel:
    """An embedding model as its files describe it."""

    files: tuple[PinnedFile, ...]
    facts: Facts
    configs: Mapping[str, Any]
    """The parsed JSON files by path; only those that are there."""

    revision: str | None
    """Commit on the Hugging Face Hub, where the mirror kept it."""

    tensors: Mapping[str, str | None] | None = None
    """Types of the weights by name; None where reading them was not cheap."""


def inspect(folder: Folder, name: str) -> EmbeddingModel:
    """Read what describes the model, never its weights.

    Args: name: how errors call the model.
    Raises: UnsuitableModelError when TEI could not load it; says what is missing or wrong.
    """
    folder = read = _Hashed(folder)
    root = _model_root(folder, name)
    found = _files(folder, root, name)
    configs: dict[str, Any] = {
        path: _json(folder, entry, f"{name}: {path}")
        for path, entry in found.items()
        if path in _CONFIGS or (path == "tokenizer.json" and (entry.size or 0) <= _LONGEST_CONFIG)
    }
    config = configs["config.json"]
    for path, wanted in _module_files(configs):
        for entry in folder.entries(_join(root, path)):
            file_name = entry.path.rsplit("/", 1)[-1]
            if file_name in wanted and f"{path}/{file_name}" not in found:
                found[f"{path}/{file_name}"] = entry
                if file_name == "config.json":
                    configs[f"{path}/config.json"] = _json(folder, entry, f"{name}: {path}")
    weights = _weights(folder, found, name, configs)
    for path in [p for p in found if _is_weight(p) and "/" not in p and p not in weights]:
        del found[path]
    for path, entry in found.items():
        if _is_weight(path) and (entry.size or 0) < _LONGEST_POINTER:
            _no_pointer(folder.read(entry.path), f"{name}: {path}")
    digests = _digests(folder, root, found)
    files = tuple(
        read.pinned(path, entry, *digests.get(path, (None, None, None))[1:])
        for path, entry in sorted(found.items())
    )
    if not any(file.size for file in files if _is_weight(file.path)):
        raise UnsuitableModelError(f"{name} has weights of 0 bytes: register it again.")
    revisions = {revision for revision, *_ in digests.values() if revision}
    header = _safetensors_header(folder, found.get("model.safetensors"))
    facts = _facts(config, configs, found, weights, header)
    revision = revisions.pop() if len(revisions) == 1 else None
    return EmbeddingModel(files, facts, configs, revision, _tensors(configs, weights, header))


class _Hashed:
    """A folder that remembers the digests of what was read of it, whole."""

    def __init__(self, folder: Folder) -> None:
        self.entries, self.head = folder.entries, folder.head
        self._read = folder.read
        self._digests: dict[str, tuple[str, str]] = {}

    def read(self, path: str) -> bytes:
        data = self._read(path)
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
        self._digests[path] = hashlib.sha256(data).hexdigest(), blob.hexdigest()
        return data

    def pinned(
        self, path: str, entry: Entry, sha256: str | None, blob_sha1: str | None
    ) -> PinnedFile:
        """The file with its digests: of what was read, else as somebody recorded them."""
        if entry.path in self._digests:
            sha256, blob = self._digests[entry.path]
            blob_sha1 = blob_sha1 if blob_sha1 == blob else None
        return PinnedFile(path, entry.path, entry.size or 0, sha256, blob_sha1)


def weights_size(folder: Folder, name: str) -> int:
    """Bytes of the weights that TEI would load; raises UnsuitableModelError like `inspect`."""
    root = _model_root(folder, name)
    found = _files(folder, root, name)
    return sum(found[path].size or 0 for path in _weights(folder, found, name, {}))


# Which files


def _join(root: str, path: str) -> str:
    return f"{root}/{path}" if root else path


def _is_weight(path: str) -> bool:
    return path.endswith((".safetensors", ".safetensors.index.json", "pytorch_model.bin"))


def _model_root(folder: Folder, name: str) -> str:
    """The folder that holds config.json and weights.

    Decided by the listing, never by MLmodel: a mirror's `model_binary` names a folder that is not
    there. 1_Pooling and N_Dense have a config.json too, so it must stand beside a model's files.
    """
    queue, seen_gguf = [""], False
    for depth in range(3):
        children: list[str] = []
        for path in queue:
            entries = folder.entries(path)
            names = {e.path.rsplit("/", 1)[-1] for e in entries if e.size is not None}
            seen_gguf |= any(n.endswith(".gguf") for n in names)
            if "config.json" in names and (
                any(_is_weight(n) for n in names) or {"tokenizer.json", "modules.json"} & names
            ):
                return path
            if "modules.json" in names:
                raise UnsuitableModelError(
                    f"{name} has no config.json beside its modules.json, where TEI looks for its layers: "
                    "save the model again with a current sentence-transformers."
                )
            children += [e.path for e in entries if e.size is None]
        queue = [c for c in children if not re.search(r"(^|/)(\.|onnx|openvino|\d_)", c)][:20]
        if depth == 0 and not queue:
            break
    if seen_gguf:
        raise UnsuitableModelError(
            f"{name} is a GGUF model, which TEI cannot read: register the safetensors original."
        )
    raise UnsuitableModelError(
        f"{name} is no embedding model that TEI can serve: its artifacts hold no folder with "
        "config.json and model.safetensors."
    )


def _files(folder: Folder, root: str, name: str) -> dict[str, Entry]:
    """The small files that TEI reads, and all weights of the root, by their path for TEI."""
    entries = {e.path.rsplit("/", 1)[-1]: e for e in folder.entries(root)}
    wanted = {*_CONFIGS, "tokenizer.json"}
    found = {
        n: e for n, e in entries.items() if e.size is not None and (n in wanted or _is_weight(n))
    }
    if "tokenizer.json" not in found:
        # mlflow.transformers saves a pipeline in parts: the tokenizer stands beside the model.
        parent = root.rpartition("/")[0]
        for entry in folder.entries(_join(parent, "components/tokenizer")):
            file_name = entry.path.rsplit("/", 1)[-1]
            if file_name in ("tokenizer.json", *_TOKENIZER_CONFIGS):
                found.setdefault(file_name, entry)
    if "1_Pooling" in entries:
        for entry in folder.entries(_join(root, "1_Pooling")):
            if entry.path.endswith("/config.json"):
                found["1_Pooling/config.json"] = entry
    for adapter in (n for n in _ADAPTERS if n in entries):
        for entry in folder.entries(_join(root, adapter)):
            file_name = entry.path.rsplit("/", 1)[-1]
            if file_name in ("adapter_config.json", "adapter_model.safetensors"):
                found[f"{adapter}/{file_name}"] = entry
    if "adapter_config.json" in entries and any(_is_weight(n) and n not in _PEFT for n in found):
        raise UnsuitableModelError(
            f"{name} has an adapter beside its weights (adapter_config.json), which sentence-transformers "
            "applies and TEI does not: merge it (PEFT's merge_and_unload) and register that."
        )
    missing = [n for n in ("config.json", "tokenizer.json") if n not in found]
    if not any(_is_weight(n) for n in found):
        if any(n in entries for n in _PEFT):
            raise UnsuitableModelError(f"{name} {_ADAPTER_ALONE}")
        missing.append("model.safetensors (or pytorch_model.bin)")
    if missing:
        raise UnsuitableModelError(
            f"{name} lacks {' and '.join(missing)}, which TEI needs: register it again with "
            "its complete files."
        )
    return found


def _weights(
    folder: Folder, found: dict[str, Entry], name: str, configs: dict[str, Any]
) -> list[str]:
    """The weight files of the root that TEI is to load, the index included, which joins `configs`."""
    if "model.safetensors" in found:
        return ["model.safetensors"]
    index = "model.safetensors.index.json"
    if index in found:
        configs[index] = _json(folder, found[index], f"{name}: {index}")
        weight_map = _mapping(_mapping(configs[index]).get("weight_map"))
        shards = sorted({str(shard) for shard in weight_map.values()})
        missing = [str(s) for s in shards if s not in found]
        if missing or not shards:
            raise UnsuitableModelError(
                f"{name} lacks {', '.join(missing[:3]) or 'a weight map'}, which {index} names: "
                "register it again with its complete files."
            )
        return [index, *shards]
    if "pytorch_model.bin" in found:
        return ["pytorch_model.bin"]
    if any(path in found for path in _PEFT):
        raise UnsuitableModelError(f"{name} {_ADAPTER_ALONE}")
    raise UnsuitableModelError(
        f"{name} holds its weights as {', '.join(sorted(p for p in found if _is_weight(p))[:3])}, "
        "which TEI does not read: save it as model.safetensors."
    )


def _module_files(configs: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Folders of the modules that TEI or its flags need, and what is taken of each."""
    yield module_rules.pooling_folder(configs), ("config.json",)
    for module in module_rules.module_list(configs):
        folder = module_rules.folder_of(module)
        if folder and module_rules.kind_of(module) == "Dense":
            yield folder, ("config.json", "model.safetensors", "pytorch_model.bin")


def _digests(
    folder: Folder, root: str, found: Mapping[str, Entry]
) -> dict[str, tuple[str | None, str | None, str | None]]:
    """(revision, sha256, blob sha1) by path, from what huggingface_hub leaves beside a download.

    Three lines: commit, ETag (SHA-256 of LFS files, Git's blob SHA-1 of others), time
    (huggingface_hub/_local_folder.py). A model that was saved anew has none; `make register` writes
    the digests of such a one in the same way, without a commit.
    """
    prefix = f"{root}/" if root else ""
    cached = _join(root, _DIGEST_FOLDER)
    folders = {path.rpartition("/")[0] for path in found}
    listed = {e.path for f in folders for e in folder.entries(_join(cached, f) if f else cached)}
    digests = {}
    for path, entry in found.items():
        metadata = f"{cached}/{path}.metadata"
        if metadata not in listed or entry.path != f"{prefix}{path}":
            continue
        lines = folder.read(metadata).decode("utf-8", "replace").splitlines()
        revision, etag = (line.strip().strip('"') for line in [*lines, "", ""][:2])
        sha256 = etag if re.fullmatch(r"[0-9a-f]{64}", etag) else None
        sha1 = etag if re.fullmatch(r"[0-9a-f]{40}", etag) else None
        known = re.fullmatch(r"[0-9a-f]{40}", revision)
        digests[path] = (revision if known else None, sha256, sha1)
    return digests


# What they say


def _json(folder: Folder, entry: Entry, name: str) -> Any:
    if (entry.size or 0) > _LONGEST_CONFIG:
        raise UnsuitableModelError(f"{name} is {entry.size} bytes long, which no config file is.")
    data = folder.read(entry.path)
    try:
        value = reading.document(data)
    except UnreadableError as error:
        _no_pointer(data, name)
        problem = str(error).removeprefix("it ")
        raise UnsuitableModelError(
            f"{name} {problem}: the registered copy is damaged, register it again."
        ) from None
    if entry.path.endswith("config.json") and not isinstance(value, dict):
        raise UnsuitableModelError(f"{name} holds no JSON object: register it again.")
    return value


def _no_pointer(data: bytes, name: str) -> None:
    if data.startswith(_LFS_POINTER):
        raise UnsuitableModelError(
            f"{name} is a Git LFS pointer, not the file: run `git lfs pull` and register the model again."
        )


def positive(value: object) -> int | None:
    """A number that can count something: whole, from 1 to 2^53; None when it is no such."""
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if 0 < value <= reading.MOST_COUNTED else None


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of the integers that the config has under these names."""
    nested = config.get("text_config")
    for source in (config, nested if isinstance(nested, dict) else {}):
        for name in names:
            if (value := positive(source.get(name))) is not None:
                return value
    return None


def printable(text: object, longest: int = 500, kept: str = "") -> str:
    """Text from the registry without what could disturb a terminal or a file."""
    return "".join(c if c.isprintable() or c in kept else " " for c in str(text)[:longest])


def _facts(
    config: Mapping[str, Any],
    configs: Mapping[str, Any],
    found: Mapping[str, Entry],
    weights: list[str],
    header: Mapping[str, tuple[str, int]] | None,
) -> Facts:
    hidden_size = _first(config, "hidden_size", "n_embd", "d_model", "dim")
    weights_bytes = sum(found[w].size or 0 for w in weights if not w.endswith(".json"))
    dtype, parameters = _counted(header) or (_stored_dtype(config), None)
    if parameters is None and dtype is not None:
        parameters = weights_bytes // _ITEM_BYTES[dtype]
    architectures = config.get("architectures")
    prompts = _mapping(configs.get("config_sentence_transformers.json")).get("prompts")
    modules = configs.get("modules.json")
    return Facts(
        architecture=printable(config.get("model_type") or "unknown", 60),
        class_name=printable(architectures[0], 80)
        if isinstance(architectures, list) and architectures
        else None,
        dimensions=_dimensions(configs, hidden_size),
        max_input_tokens=contract.sequence_length(configs),
        pooling=_pooling(configs),
        parameters=parameters,
        dtype=dtype,
        weights_bytes=weights_bytes,
        hidden_size=hidden_size,
        layers=_first(config, "num_hidden_layers", "n_layer", "n_layers"),
        attention_heads=_first(config, "num_attention_heads", "n_head", "n_heads"),
        intermediate_size=_first(config, "intermediate_size", "n_inner", "hidden_dim"),
        vocab_size=_first(config, "vocab_size"),
        normalize=any("Normalize" in str(m.get("type")) for m in modules if isinstance(m, dict))
        if isinstance(modules, list)
        else None,
        prompts={printable(k, 60): printable(v, kept="\n") for k, v in _mapping(prompts).items()},
        attention="both" if _attends_both_ways(config) else None,
        window=_first(config, "sliding_window"),
        activation=_text(config, "hidden_act", "activation", "hidden_activation"),
        alibi=contract.is_jina_v2(config) or None,
        default_prompt=module_rules.default_prompt(configs),
    )


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _stored_dtype(config: Mapping[str, Any]) -> str | None:
    """`torch_dtype` (transformers ≤ 4) or `dtype` (5)."""
    dtype = str(config.get("torch_dtype") or config.get("dtype") or "").removeprefix("torch.")
    return dtype if dtype in _ITEM_BYTES else None


def _dimensions(configs: Mapping[str, Any], hidden_size: int | None) -> int | None:
    """Of the last Dense module, else of the pooling, else the hidden size."""
    dense = _dense_configs(configs)
    pooling = _mapping(configs.get(f"{module_rules.pooling_folder(configs)}/config.json"))
    return (
        (positive(_mapping(configs[dense[-1]]).get("out_features")) if dense else None)
        or _first(pooling, "word_embedding_dimension", "embedding_dimension")
        or hidden_size
    )


def _dense_configs(configs: Mapping[str, Any]) -> list[str]:
    """Of the Dense modules, in their order."""
    modules = module_rules.module_list(configs)
    folders = (module_rules.folder_of(m) for m in modules if module_rules.kind_of(m) == "Dense")
    return [path for folder in folders if (path := f"{folder}/config.json") in configs]


def _attends_both_ways(config: Mapping[str, Any]) -> bool:
    return config.get("use_bidirectional_attention") is True or config.get("is_causal") is False


def _text(config: Mapping[str, Any], *names: str) -> str | None:
    found = (config.get(name) for name in names)
    return next((printable(value, 40) for value in found if isinstance(value, str)), None)


def _pooling(configs: Mapping[str, Any]) -> str | None:
    """As TEI calls it; None when the files say none or TEI has no such mode."""
    config = _mapping(configs.get(f"{module_rules.pooling_folder(configs)}/config.json"))
    modes = module_rules.pooling_modes(config)
    if len(modes) != 1 or modes[0] not in module_rules.POOLING_MODES:
        return None
    return modes[0].replace("lasttoken", "last-token")


def _tensors(
    configs: Mapping[str, Any],
    weights: list[str],
    header: Mapping[str, tuple[str, int]] | None,
) -> dict[str, str | None] | None:
    if header is not None:
        return {name: dtype for name, (dtype, _) in header.items()}
    weight_map = _mapping(_mapping(configs.get(weights[0])).get("weight_map"))
    return dict.fromkeys(weight_map) or None


def _counted(header: Mapping[str, tuple[str, int]] | None) -> tuple[str, int] | None:
    """(dtype of most, number of parameters)."""
    counts: dict[str, int] = {}
    for dtype, number in (header or {}).values():
        if dtype in _DTYPES:
            counts[_DTYPES[dtype]] = counts.get(_DTYPES[dtype], 0) + number
    return (max(counts, key=lambda d: counts[d]), sum(counts.values())) if counts else None


def _parsed_header(header: bytes) -> tuple[dict[str, tuple[str, int]], int]:
    """(type, numbers) by name, and the bytes of data, as the format's own reader checks them.

    (`Metadata::validate` of safetensors 0.8.0: from 0, without holes, shape times type is length.)
    Raises: UnreadableError.
    """
    tensors: dict[str, tuple[str, int]] = {}
    spans: list[tuple[int, int]] = []
    for name, value in reading.mapping(
        reading.document(header, "it", _LONGEST_HEADER), "it"
    ).items():
        if name == "__metadata__":
            continue
        tensor = reading.mapping(value, "a tensor")
        dtype, numbers = reading.text(tensor.get("dtype"), "a type"), 1
        for length in reading.items(tensor.get("shape"), "a shape"):
            numbers = reading.count(numbers * reading.count(length, "a length"), "a shape")
        offsets = [
            reading.count(o, "an offset")
            for o in reading.items(tensor.get("data_offsets"), "offsets")
        ]
        if len(offsets) != 2:
            raise UnreadableError("offsets are not two")
        begin, end = offsets
        if end - begin != numbers * _STORED_BYTES.get(dtype, 0) and dtype in _STORED_BYTES:
            raise UnreadableError("a tensor is not as long as its shape says")
        tensors[name] = dtype, numbers
        spans.append((begin, end))
    at = 0
    for begin, end in sorted(spans):
        if begin != at or end < begin:
            raise UnreadableError("tensors overlap, or leave a hole")
        at = end
    return tensors, at


def _safetensors_header(folder: Folder, entry: Entry | None) -> dict[str, tuple[str, int]] | None:
    """(type, numbers) by name as the header of the weights says, where reading it is cheap."""
    start = folder.head(entry.path, 1 << 16) if entry else None
    if not entry or not start or len(start) < 8:
        return None
    length = int.from_bytes(start[:8], "little")
    if length > _LONGEST_HEADER or 8 + length > (entry.size or 0):
        raise UnsuitableModelError(
            f"{entry.path} is no safetensors file: its header does not fit; register it again."
        )
    if len(start) < 8 + length:
        start = folder.head(entry.path, 8 + length) or b""
    try:
        tensors, data = _parsed_header(start[8 : 8 + length])
    except UnreadableError:
        raise UnsuitableModelError(
            f"{entry.path} is no safetensors file: its header is damaged; register it again."
        ) from None
    end = 8 + length + data
    if end != entry.size:
        raise UnsuitableModelError(
            f"{entry.path} has {entry.size} bytes where its header says {end}: the registered copy "
            "is cut off, register it again."
        )
    return tensors
