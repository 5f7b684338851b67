"""A text's vector alone against its vector in company: needs no reference, and finds lost masks.

TEI computes together what waits together. Where a mask is missing there, a text's vector depends
on its neighbours, without any error: by padding, by equal lengths, or by one long text among short
ones.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from endpoint import Embeddings, Endpoint, Failed, cosine

CPU, GPU = 0.99999, 0.9995
"""Least cosine of alone and together. On a CPU 1.00000000 was measured, in float32 and float16; on a
GPU kernels round differently by the size of the batch, and nobody has measured it: assumed."""

AT_ONCE = 16
"""One-text requests under way together."""

SHORTEST = 4
"""Words."""

Pair = tuple[str, list[float]]
"""A text and the vector that came for it."""

_WORDS = tuple(
    word
    for line in (
        "sea sun map red old tea ice car dog key sky box fog jam log net oak pen rug top fan",
        "gas hat ink lip mud nut owl pig ray saw tub van wax yak zoo arm bed cup ear egg",
    )
    for word in line.split()
)


def words(count: int) -> str:
    """A text of so many short words, always the same; it has at least as many tokens.

    In no order: among equal words a lost mask changes nothing.
    """
    draw = random.Random(0).random
    return " ".join(_WORDS[int(draw() * len(_WORDS))] for _ in range(count))


def twins(text: str) -> list[str]:
    """The text, and one of the same words in another order, which has as many tokens."""
    first, *inner, last = text.split()
    return [text, " ".join([first, *reversed(inner), last])]


def equal(count: int) -> list[str]:
    """Short texts of the same words in other orders: the same number of tokens."""
    first, *inner, last = _WORDS[:10]
    orders = (random.Random(seed).sample(inner, len(inner)) for seed in range(count))
    return [" ".join([first, *order, last]) for order in orders]


class Company:
    """Each text alone, once; then in company, which must not change its vector.

    most: texts in one request; least: cosine of a text alone and in company.
    """

    def __init__(self, endpoint: Endpoint, most: int, least: float) -> None:
        self.endpoint, self.most, self.least = endpoint, most, least
        self._alone: dict[str, Embeddings] = {}

    def alone(self, text: str) -> Embeddings:
        """What a request that holds nothing else gives."""
        if text not in self._alone:
            self._alone[text] = self.endpoint.embed([text])
        return self._alone[text]

    def tokens(self, texts: Iterable[str]) -> str:
        """How long they are, as the server counts, for people."""
        counts = sorted({self.alone(text).tokens for text in texts}, key=str)
        return " or ".join(f"{n:,}" if isinstance(n, int) else "?" for n in counts)

    def sized(self, tokens: int) -> list[str]:
        """Two texts of so many tokens; somewhat fewer where the service hides /tokenize."""
        count = tokens  # a word has at least one
        while (counted := self._counted(words(count))) and counted > tokens and count > SHORTEST:
            count -= max(1, (counted - tokens) * count // counted)
        if not counted:
            count = 64 * tokens * 9 // 10 // max(64, self.alone(words(64)).tokens or 0)
        return twins(words(max(SHORTEST, count)))

    def _counted(self, text: str) -> int | None:
        """Tokens of a text, by /tokenize."""
        answer = self.endpoint.request("/tokenize", {"inputs": text})
        try:
            return len(json.loads(answer.body)[0]) if answer.status == 200 else None
        except (ValueError, RecursionError, LookupError, TypeError):
            return None

    def together(self, texts: Sequence[str]) -> str:
        """All in as few requests as may be; returns the worst cosine, for people."""
        for text in texts:
            self.alone(text)
        chunks = [texts[i : i + self.most] for i in range(0, len(texts), self.most)]
        return self._judged([pair for chunk in chunks for pair in self._ask(chunk)])

    def at_once(self, texts: Sequence[str], beside: Sequence[str] = ()) -> str:
        """A request for each text, sixteen under way at a time; as long as one for those beside."""
        for text in (*texts, *beside):
            self.alone(text)
        with ThreadPoolExecutor(AT_ONCE + 1) as pool:
            long = pool.submit(self._ask, beside[: self.most]) if beside else None
            came: list[Pair] = []
            while not came or (long and not long.done()):
                for pairs in pool.map(self._ask, [[text] for text in texts]):
                    came += pairs
            return self._judged(came + (long.result() if long else []))

    def _ask(self, texts: Sequence[str]) -> list[Pair]:
        return list(zip(texts, self.endpoint.embed(texts).vectors, strict=True))

    def _judged(self, came: Iterable[Pair]) -> str:
        """Raises Failed when a text has another vector than alone."""
        worst, text, vector = min(
            ((cosine(v, self.alone(t).vectors[0]), t, v) for t, v in came), key=lambda row: row[0]
        )
        if worst >= self.least:
            return f"cosine {worst:.7f} to the same alone"
        for other, known in self._alone.items():
            if other != text and cosine(vector, known.vectors[0]) >= self.least:
                raise Failed("the vectors come in another order than the texts")
        raise Failed(
            f"a text of {self.tokens([text])} tokens has another vector in company than alone:"
            f" cosine {worst:.5f}, at least {self.least}"
        )
