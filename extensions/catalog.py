"""Well-known embedding models: what a render without a registry at hand knows of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from .embedding_model import Facts, printable
from .errors import ConfigurationError
from .pin import JINA_V3, Pin
from .registry import registered_name, workspace

_JINA_V3_CONVERTED: Mapping[str, Any] = MappingProxyType(
    {
        "architecture": "nomic_bert",
        "class_name": "NomicBertModel",
        "max_input_tokens": 8192,
        "pooling": "mean",
        "parameters": 558_314_496,
        "dtype": "float16",
        "weights_bytes": 1_116_659_456,
    }
)
"""Facts of a converted jina-embeddings-v3, as counted in a conversion of its full size."""

_PREFIXES_NEEDED = (
    "The model was trained with a prefix before every text and gives worse vectors without it: "
    "clients write it."
)

_TABLE = Path(__file__).parent / "data" / "catalog.yaml"


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """One well-known model."""

    model_id: str
    facts: Facts
    """As published; `prompts` are those of `config_sentence_transformers.json` and model card."""

    prompts_needed: bool
    """Without its prefixes the model gives worse vectors."""

    source: str
    """Where the row is from."""


@cache
def load() -> Mapping[str, CatalogModel]:
    """The catalogue by Hugging Face id, in its own order."""
    table = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    return MappingProxyType({model_id: _model(model_id, row) for model_id, row in table.items()})


def _model(model_id: str, row: Mapping[str, object]) -> CatalogModel:
    facts, prompts = row["facts"], row["prompts"]
    assert isinstance(facts, dict)
    assert isinstance(prompts, dict)
    return CatalogModel(
        model_id=model_id,
        facts=Facts(**facts, prompts={k: printable(v, kept="\n") for k, v in prompts.items()}),
        prompts_needed=bool(row["prompts_needed"]),
        source=str(row["source"]),
    )


def find(model_id: str) -> CatalogModel | None:
    """The model of a Hugging Face id, or of the name that it is registered under."""
    name = registered_name(model_id)
    return next((m for m in load().values() if registered_name(m.model_id) == name), None)


def resolve(model_id: str, selector: str) -> Pin:
    """A pin without a version, which model-fetch resolves in the cluster.

    Raises: ConfigurationError when the catalogue does not have the model.
    """
    model = find(model_id)
    if model is None:
        raise ConfigurationError(
            f"{model_id} is not in the catalogue and MLFLOW_TRACKING_URI is not set: set it, or "
            f"choose one of {', '.join(load())}."
        )
    return Pin(
        model_id=model.model_id,
        registered_model=registered_name(model_id),
        selector=selector,
        version=None,
        run_id=None,
        logged_model_id=None,
        artifact_uri=None,
        revision=None,
        files=(),
        facts=model.facts,
        conversion={"kind": JINA_V3} if model.facts.class_name == "XLMRobertaLoRA" else None,
        workspace=workspace(),
    )


def enriched(pin: Pin) -> Pin:
    """A pin with what no file of a well-known model says: its licence, its prefixes, their weight."""
    model = find(pin.model_id)
    if model is None:
        return pin
    missing = {
        name: getattr(model.facts, name)
        for name in ("license", "prompts")
        if not getattr(pin.facts, name)
    }
    remarks = (*pin.remarks, _PREFIXES_NEEDED) if model.prompts_needed else pin.remarks
    return replace(pin, facts=replace(pin.facts, **missing), remarks=remarks)


def deployed(pin: Pin, task: str) -> Pin:
    """The pin as the cluster gets it: where a model is converted, the task, and what TEI then serves.

    Args: task: the adapter that is merged in; of no meaning for a model that is not converted.
    """
    if pin.conversion is None:
        return pin
    prompts = load()["jinaai/jina-embeddings-v3"].facts.prompts
    facts = replace(
        pin.facts,
        **_JINA_V3_CONVERTED,
        prompts={name: text for name, text in prompts.items() if name == task},
    )
    return replace(pin, facts=facts, conversion={**pin.conversion, "task": task})


def choices() -> list[tuple[str, str]]:
    """(label, model id) of each model of the catalogue."""
    return [
        (
            f"{m.model_id}, {(m.facts.weights_bytes or 0) / 1e6:,.0f} MB (from the catalogue)",
            m.model_id,
        )
        for m in load().values()
    ]
