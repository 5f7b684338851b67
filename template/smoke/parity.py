"""Compares a running endpoint with the model as its makers run it: `python3 parity.py --url http://…`.

What the makers' library computes is in ../parity/reference.json, which `make parity-reference` writes.
Without it the half runs that needs none: each text alone against the same text in company.
Prints one line per group of texts, and ends as smoke.py does.
"""

from __future__ import annotations

import argparse
import base64
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import smoke
from checks import CannotBegin, Skipped, begin, mapping, program, run
from endpoint import Failed, cosine
from smoke import Service

FLOAT32, FLOAT16, OTHER_GELU = 0.9999, 0.9995, 0.9995
"""Least cosine to the reference, of each text; a mean would hide the one kind that is wrong.

Measured on the real server, on a CPU: right models 1.0000000 in float32 once gelu has the form that TEI
computes (tanh), 0.99995 at worst against another form; 0.99977 at worst in float16 with up to 12
layers. The smallest harm of a wrong model was 0.9990 on a short text, and 0.97 on a long one.
"""


@dataclass(frozen=True)
class Text:
    """A text of the reference, and its vector in each form."""

    text: str
    tokens: int
    vectors: tuple[list[float], ...]


@dataclass(frozen=True)
class Reference:
    """What ../parity/reference.json says."""

    made_with: str
    max_input_tokens: int
    prompt: str
    files: dict[str, str]
    forms: tuple[str, ...]
    gelu: bool
    groups: dict[str, tuple[Text, ...]]

    @classmethod
    def read(cls, path: Path) -> Reference | None:
        """None where there is none yet; raises ValueError when it cannot be used."""
        said = mapping(path)
        if not said:
            return None
        try:
            reference = cls(
                ", ".join(f"{name} {number}" for name, number in said["made_with"].items()),
                int(said["max_input_tokens"]),
                str(said["prompt"]),
                dict(said["files"]),
                tuple(map(str, said["forms"])),
                bool(said["gelu"]),
                {str(g["name"]): tuple(map(_read, g["texts"])) for g in said["groups"]},
            )
            forms = len(reference.forms)
            if not forms or any(
                len(t.vectors) != forms for g in reference.groups.values() for t in g
            ):
                raise ValueError
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, struct.error):
            raise ValueError("it is no reference: `make parity-reference` writes one") from None
        return reference

    def least(self, dtype: str) -> float:
        """The least cosine that is right."""
        if dtype != "float32":
            return FLOAT16
        return OTHER_GELU if self.gelu and len(self.forms) == 1 else FLOAT32


def of_this_model(it: Service, reference: Reference) -> str:
    """The reference is of the weights that are served."""
    weights = it.expected.weights or {}
    for path in weights.keys() & reference.files.keys():
        if weights[path] != reference.files[path]:
            raise Failed(f"{path} is another than the reference's: run `make parity-reference`")
    prompt = f", texts begin with {reference.prompt!r}" if reference.prompt else ""
    return f"by {reference.made_with} in float32{prompt}"


def against(it: Service, reference: Reference, group: Sequence[Text]) -> str:
    """Each text of a group, alone and together, has the vector of the reference."""
    limit = it.expected.max_input_tokens
    texts = [
        text
        for text in group
        if limit == reference.max_input_tokens
        or text.tokens < min(limit, reference.max_input_tokens)
    ]
    if not texts:
        raise Skipped(
            f"{limit:,} tokens are served, and the reference is cut at"
            f" {reference.max_input_tokens:,}: run `make parity-reference`"
        )
    said = it.company.together([text.text for text in texts])
    served = [it.company.alone(text.text) for text in texts]
    for text, answer in zip(texts, served, strict=True):
        if answer.tokens != text.tokens:
            raise Failed(
                f"a text has {answer.tokens} tokens, and {text.tokens} in the reference:"
                " another tokenizer, prompt or limit"
            )
    worst, form = max(
        (min(cosine(a.vectors[0], t.vectors[n]) for a, t in zip(served, texts, strict=True)), name)
        for n, name in enumerate(reference.forms)
    )
    least = reference.least(it.expected.dtype)
    found = f"{len(texts)} texts, cosine {worst:.7f} to the reference ({form}), at least {least}"
    if not worst >= least:
        raise Failed(found)
    return f"{found}; {said}"


def no_reference() -> str:
    """Says what is left out."""
    raise Skipped("there is none yet: `make parity-reference` makes one; the rest needs none")


def checks(it: Service, reference: Reference | None) -> Iterator[tuple[str, Callable[[], str]]]:
    """By name, in the order in which they run."""
    half = ("health", "model", "order", "equal", "at limit", "at half", "beside", "at once")
    for name, check in smoke.CHECKS:
        if name in half:
            yield name, partial(check, it)
    if reference is None:
        yield "reference", no_reference
        return
    yield "reference", partial(of_this_model, it, reference)
    for name, group in reference.groups.items():
        yield f"vs {name}", partial(against, it, reference, group)


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--reference",
        type=Path,
        default=Path(__file__).parents[1] / "parity/reference.json",
        help="what to compare with [parity/reference.json]",
    )
    given, expected, endpoint = begin(parser, arguments)
    try:
        reference = Reference.read(given.reference)
    except ValueError as error:
        raise CannotBegin(f"{given.reference} cannot be used: {error}") from None
    return run(endpoint, checks(Service.of(endpoint, expected), reference))


def _read(said: dict[str, Any]) -> Text:
    text = "".join(str(part) * int(times) for part, times in said["parts"])
    raw = [base64.b64decode(vector, validate=True) for vector in said["vectors"]]
    vectors = tuple(list(struct.unpack(f"<{len(one) // 2}e", one)) for one in raw)
    return Text(text, int(said["tokens"]), vectors)


if __name__ == "__main__":
    sys.exit(main())
