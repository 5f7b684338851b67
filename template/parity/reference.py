# /// script
# requires-python = ">=3.11"
# dependencies = ["sentence-transformers==6.2.0", "transformers==5.23.0", "torch==2.13.0", "peft==0.21.2"]
# ///
"""Computes a model as its makers run it, for `make parity` to compare a service with.

    uv run --script parity/reference.py FOLDER --output parity/reference.json

FOLDER holds the files of the model: best as they were registered, since model-fetch may have repaired
its copy, and both sides would then be repaired alike. Nothing else is needed, so a job that registers a
model can run this too. On a CPU, in float32, one text at a time; code that comes with the model does
not run unless --trust-remote-code is given.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import itertools
import json
import os
import random
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIBRARIES = ("sentence-transformers", "transformers", "torch")

Parts = list[tuple[str, int]]
"""A text in short: each part so many times, one after the other."""

PLAIN = (
    "The harbour was empty before the storm.",
    "Which river flows through Vienna?",
    "def add(a, b): return a + b",
    "Der Zug nach Berlin hat zwanzig Minuten Verspätung.",
    ".",
)
SIGNS = (
    "ÇA VA? ÉLÈVES, GARÇONS ET NAÏVETÉ À LA MODE",
    "東京の天気は晴れです。北京今天下雨。",
    "  two   spaces,\ta tab, a line\nfeed and 3.14159 € at the end  ",
    "Ünïcödé ﬁne ½ ² — “quoted” 👍🏽",
)
"""What tokenizers normalize differently."""

FILL = "the cat and a dog sat by one old red box on top of my new big green hill near our blue lake"


class CannotMake(Exception):
    """There is no reference to be had from this folder."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="of the model's files")
    parser.add_argument("--output", type=Path, default=Path("reference.json"))
    parser.add_argument("--max-input-tokens", type=int, help="what is served [the model's own]")
    parser.add_argument("--pooling", help="cls, mean or lasttoken, where the model names none")
    parser.add_argument("--prompt", help="before each text [the model's default prompt, if any]")
    parser.add_argument("--task", help="whose adapter is active, as retrieval.query [none]")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's code")
    given = parser.parse_args(arguments)
    try:
        reference = made(given)
    except CannotMake as reason:
        print(f"parity-reference: {' '.join(str(reason).split())[:500]}", file=sys.stderr)
        return 1
    part = given.output.with_name(given.output.name + ".part")
    part.write_text(json.dumps(reference, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, given.output)
    texts = sum(len(group["texts"]) for group in reference["groups"])
    print(f"{given.output}: {texts} texts, {' and '.join(reference['forms'])}")
    return 0


def made(given: argparse.Namespace) -> dict[str, Any]:
    """The reference; raises CannotMake."""
    config = given.folder / "config.json"
    if not config.is_file():
        raise CannotMake(f"{given.folder} holds no config.json: name the folder of the model")
    adapter = _adapter(given) if given.task else None
    if not (given.folder / "modules.json").is_file() and not given.pooling:
        raise CannotMake(f"{given.folder} does not say how it pools: --pooling does")
    model = _load(given, adapter)
    longest = min(given.max_input_tokens or model.max_seq_length, model.max_seq_length)
    model.max_seq_length = longest
    prompts, default = model.prompts or {}, given.task or model.default_prompt_name
    prompt = given.prompt if given.prompt is not None else prompts.get(default) or ""
    groups = dict(_groups(lambda text: _count(model, prompt + text), longest))
    forms = {"as published": _vectors(model, groups, prompt)}
    if _gelu_as_tanh(model):
        # TEI computes every gelu so (candle's `gelu`), which alone makes 0.99995 of 1.0000000.
        forms["gelu by tanh"] = _vectors(model, groups, prompt)
    return {
        "made_with": {name: version(name) for name in LIBRARIES},
        "dtype": "float32",
        "prompt": prompt,
        "max_input_tokens": longest,
        "dimensions": len(next(iter(forms["as published"].values()))) // 2,
        "files": _digests(given.folder),
        "forms": list(forms),
        "gelu": "gelu" in _activations(config) or len(forms) > 1,
        "groups": [
            {
                "name": name,
                "texts": [
                    {
                        "parts": parts,
                        "tokens": min(_count(model, prompt + _text(parts)), longest),
                        "vectors": [_base64(form[_text(parts)]) for form in forms.values()],
                    }
                    for parts in texts
                ],
            }
            for name, texts in groups.items()
        ],
    }


def _load(given: argparse.Namespace, adapter: Path | None) -> Any:
    # Whatever the folder names, it is all here: nothing is looked for on the Hub.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0", "TQDM_DISABLE": "1"}
    import torch
    from sentence_transformers import SentenceTransformer

    options: dict[str, Any] = {
        "device": "cpu",
        "trust_remote_code": given.trust_remote_code,
        "model_kwargs": {"dtype": torch.float32},
        "local_files_only": True,
    }
    try:
        model = SentenceTransformer(str(given.folder), **options)
        if not (given.folder / "modules.json").is_file():
            model[1] = type(model[1])(model.get_embedding_dimension(), pooling_mode=given.pooling)
        if adapter:
            model.load_adapter(str(adapter))
        return model.eval()
    except Exception as error:  # whatever the libraries, or the model's own code, may raise
        hint = "" if given.trust_remote_code else "; code that comes with it was not run"
        raise CannotMake(
            f"sentence-transformers cannot load {given.folder}{hint}: {error}"
        ) from None


def _adapter(given: argparse.Namespace) -> Path:
    """Of the task, as jina-embeddings-v3-hf has them: transformers has that model's class itself."""
    folder: Path = given.folder / given.task.translate(str.maketrans(".-", "__"))
    if not (folder / "adapter_config.json").is_file():
        raise CannotMake(
            f"{folder} has no adapter: name the folder of the model as it is published with its adapters "
            "apart (jina-embeddings-v3-hf), not the one that model-fetch converted"
        )
    return folder


def _groups(count: Callable[[str], int], longest: int) -> Iterator[tuple[str, list[Parts]]]:
    """Texts by what they are for. count: tokens of a text before it is cut."""
    yield "plain", [[(text, 1)] for text in PLAIN]
    yield "signs", [[(text, 1)] for text in SIGNS]
    yield "equal", [[(text, 1)] for text in _equal(count, 4)]
    fill = FILL.split()
    turned = [" ".join(fill[n:] + fill[:n]) + " " for n in (0, 7, 13)]
    # A round of the words has more tokens than words, and one more round is more than enough.
    rounds = longest // len(fill) + 1
    exact = _exact(count, turned[0], longest)
    yield "limit", [*([(text, rounds)] for text in turned[1:]), exact]
    yield "beside", [[("Short.", 1)], _exact(count, turned[1], max(longest // 2, 8))]


def _equal(count: Callable[[str], int], number: int) -> list[str]:
    """Texts of the same words in other orders, of exactly the same number of tokens."""
    first, *inner, last = FILL.split()[:14]
    found: dict[int, list[str]] = {}
    for seed in range(1000):
        order = random.Random(seed).sample(inner, len(inner))  # noqa: S311
        text = " ".join([first, *order, last])
        same = found.setdefault(count(text), [])
        same += [text] if text not in same else []
        if len(same) == number:
            return same
    raise CannotMake("its tokenizer gives no two texts the same length")


def _exact(count: Callable[[str], int], unit: str, tokens: int) -> Parts:
    """The unit over and over, and words until it has exactly so many tokens, or the next fewer."""
    each = max(1, count(unit * 2) - count(unit))
    times = max(0, (tokens - count("")) // each)
    while times and count(unit * times) > tokens:
        times -= 1
    rest = ""
    for word in itertools.chain(unit.split(), ["a"] * 8, [".", ",", "1", "x"]):
        longer = f"{rest}{word} "
        if count(unit * times + longer.rstrip()) <= tokens:
            rest = longer
    return [(unit, times), (rest.rstrip(), 1)]


def _text(parts: Parts) -> str:
    return "".join(text * times for text, times in parts)


def _count(model: Any, text: str) -> int:
    return len(model.tokenizer(text, truncation=False, verbose=False)["input_ids"])


def _vectors(model: Any, groups: dict[str, list[Parts]], prompt: str) -> dict[str, bytes]:
    """Each text's vector, of length 1, in 16-bit numbers: they carry a cosine to seven digits."""
    texts = [_text(parts) for group in groups.values() for parts in group]
    found = {}
    for text in texts:
        vector = model.encode(text, prompt=prompt or None, normalize_embeddings=True)
        found[text] = struct.pack(f"<{len(vector)}e", *map(float, vector))
    return found


def _gelu_as_tanh(model: Any) -> bool:
    """Put the tanh form in the place of every gelu; whether there was one."""
    from torch.nn import GELU

    found = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child).__name__ == "GELUActivation"
        or (isinstance(child, GELU) and child.approximate == "none")
    ]
    for parent, name in found:
        setattr(parent, name, GELU(approximate="tanh"))
    return bool(found)


def _activations(config: Path) -> list[object]:
    said = json.loads(config.read_text(encoding="utf-8"))
    names = ("hidden_act", "hidden_activation", "activation", "activation_function")
    return [said.get(name) for name in names]


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of what decides the vectors."""
    suffixes = (".json", ".safetensors", ".bin", ".model", ".txt")
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.suffix in suffixes and not name.startswith("."):
            with path.open("rb") as stream:
                digests[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


if __name__ == "__main__":
    sys.exit(main())
