"""What the rules look at, and what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from . import contract

OK, FIXED, WARNED, REFUSED = "ok", "fixed", "warned", "refused"
OUTCOMES = (OK, FIXED, WARNED, REFUSED)
"""From best to worst: served as it is; after a repair that changes no weight; served, with something
to know; not served."""

Files = Mapping[str, object]
"""Path in TEI's folder -> the parsed JSON, or None for a file that is there and is not JSON (weights) or
was not read."""

Tensors = Mapping[str, str | None]
"""Name of a tensor -> its type as safetensors names it; None: not known."""


class Hardware(Protocol):
    """What the rules ask of an accelerator (accelerator.Accelerator has it)."""

    @property
    def title(self) -> str: ...
    @property
    def is_gpu(self) -> bool: ...
    @property
    def flash_attention(self) -> bool: ...
    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Finding:
    """What one rule says about one model."""

    rule: str
    outcome: str
    """One of OUTCOMES."""

    message: str
    """One sentence for the user."""

    source: str
    changes: Mapping[str, object] = field(default_factory=dict)
    """Of a repair: path -> the file's new content, or None when it is to be left out."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model folder's configuration, as the rules look at it."""

    files: Files
    task: str | None = None
    """The adapter that jina-embeddings-v3 is converted with; None when no conversion was asked for."""

    pooling: str | None = None
    """What TEI is told as --pooling; None when nobody tells it."""

    tensors: Tensors | None = None
    """Of the weights; None where they were not looked at."""

    longest: int | None = None
    """Tokens that the service takes, where it takes fewer than the model."""

    edited: bool = True
    """TEI has the edits of images/tei."""

    def json(self, path: str) -> Mapping[str, Any]:
        """A JSON object of the folder; empty when there is none."""
        content = self.files.get(path)
        return content if isinstance(content, dict) else {}

    @property
    def config(self) -> Mapping[str, Any]:
        return self.json("config.json")

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type"))

    @property
    def class_names(self) -> list[str]:
        names = self.config.get("architectures")
        return [str(name) for name in names] if isinstance(names, list) else []

    @property
    def architecture(self) -> contract.Architecture | None:
        """The contract's row; None where TEI has no implementation."""
        return contract.of(self.config)

    @property
    def is_jina_v3(self) -> bool:
        """Published (no model_type), re-saved (xlm-roberta) or transformers' own, never converted."""
        return (
            self.model_type == "jina_embeddings_v3"
            or "XLMRobertaLoRA" in self.class_names
            or bool(self.config.get("lora_adaptations"))
        )


Result = tuple[str, str] | tuple[str, str, Mapping[str, object]]
"""Outcome, message, and the changes of a repair."""

Look = Callable[[Model, Hardware | None], Iterator[Result]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that must hold for TEI to serve a model correctly."""

    name: str
    holds: str
    """What is said when nothing is wrong."""

    source: str
    look: Look
    """Yields what is wrong, nothing when all is well."""

    applies: Callable[[Model], bool] = lambda model: True
