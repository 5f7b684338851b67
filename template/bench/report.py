"""What the measured numbers say: table, plots, advice, and what changed since the last run. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil
from typing import Any

Row = Mapping[str, Any]
"""One point of the sweep: length, concurrency, texts_s, tokens_s, p50_ms, p99_ms, texts, refused, failed."""

KNEE = 0.9
"""Share of the best throughput that is worth waiting for: beyond it requests wait and nothing is gained."""

HEADROOM = 0.7
"""Share of the measured throughput that a replica is planned for: the rest is for peaks and restarts."""

BATCH_SECONDS = 1.0
"""A batch that takes longer holds everyone else up: short requests wait for the batch before them."""

REQUEST_SECONDS = 10.0
"""One request of a full client batch, with others beside it."""


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed; 0 where there is none."""
    ordered = sorted(values)
    return ordered[max(0, ceil(share * len(ordered)) - 1)] if ordered else 0.0


def summary(
    length: str, concurrency: int, answers: Sequence[tuple[float, int, int]], seconds: float
) -> dict[str, Any]:
    """A row of one point.

    Args:
        length: name of the texts' length.
        answers: seconds, texts and tokens of each request that was answered.
        seconds: from the first request to the last answer.
    """
    texts = sum(n for _, n, _ in answers)
    times = [t for t, _, _ in answers]
    return {
        "length": length,
        "concurrency": concurrency,
        "texts": texts,
        "texts_s": texts / seconds if seconds else 0.0,
        "tokens_s": sum(n for _, _, n in answers) / seconds if seconds else 0.0,
        "p50_ms": 1000 * percentile(times, 0.5),
        "p99_ms": 1000 * percentile(times, 0.99),
    }


def of_length(rows: Sequence[Row], length: str) -> list[Row]:
    """The rows of one length, by concurrency."""
    return sorted((r for r in rows if r["length"] == length), key=lambda r: r["concurrency"])


def lengths(rows: Sequence[Row]) -> list[str]:
    """Names of the lengths, in the order in which they were measured."""
    return list(dict.fromkeys(r["length"] for r in rows))


def knee(rows: Sequence[Row]) -> Row:
    """Of one length's rows, the least concurrency that reaches KNEE of the best throughput."""
    best = max(r["texts_s"] for r in rows)
    return next(r for r in of_length(rows, rows[0]["length"]) if r["texts_s"] >= KNEE * best)


def power_below(value: float) -> int:
    """The largest power of two that is not above `value`; 1 at least."""
    return 1 << max(0, int(max(1.0, value)).bit_length() - 1)


def replicas(rate: float, texts_s: float) -> int:
    """Pods for `rate` texts a second, each planned for HEADROOM of what one did.

    Raises: ValueError where nothing was measured.
    """
    if texts_s <= 0:
        raise ValueError("nothing was answered, so no number of pods can be said")
    return max(1, ceil(rate / (HEADROOM * texts_s)))


def batch_tokens(tokens_s: float, longest: int, now: int) -> int:
    """--max-batch-tokens for which a batch takes at most BATCH_SECONDS; never below the longest input."""
    wanted = power_below(tokens_s * BATCH_SECONDS)
    return min(now, max(longest, wanted)) if now >= longest else now


def client_batch(texts_s: float, now: int) -> int:
    """--max-client-batch-size that is answered within REQUEST_SECONDS; a power of two, never above `now`."""
    return min(now, max(1, power_below(texts_s * REQUEST_SECONDS)))


def tokens_s(rows: Sequence[Row]) -> float:
    """The most tokens a second of the longest texts: what sizes are made from."""
    return float(max(r["tokens_s"] for r in of_length(rows, "longest") or rows))


def advice(result: Mapping[str, Any], rate: float | None = None) -> list[str]:
    """Sentences for the operator, from one result."""
    rows, info = result["rows"], result["info"]
    said = []
    for length in lengths(rows):
        at = knee(of_length(rows, length))
        said.append(
            f"{length}: beyond {at['concurrency']} requests at a time nothing is gained "
            f"({at['texts_s']:.1f} texts/s, p99 {at['p99_ms']:.0f} ms there)."
        )
    speed = tokens_s(rows)
    now = int(info["max_batch_tokens"])
    wanted = batch_tokens(speed, int(info["max_input_length"]), now)
    took = now / speed if speed else 0
    said.append(
        f"--max-batch-tokens={now}: a full batch takes {took:.1f} s"
        + (f"; {wanted} would keep it near {BATCH_SECONDS:.0f} s." if wanted < now else ".")
    )
    most = int(info["max_client_batch_size"])
    usual = max(r["texts_s"] for r in (of_length(rows, "mixed") or rows))
    fits = client_batch(usual, most)
    said.append(
        f"--max-client-batch-size={most}: "
        + (
            f"{fits} texts are what is answered within {REQUEST_SECONDS:.0f} s."
            if fits < most
            else f"a full request is answered within {REQUEST_SECONDS:.0f} s."
        )
    )
    if rate is not None:
        count = replicas(rate, usual)
        said.append(
            f"{rate:g} texts/s of mixed length need {count} "
            f"{'replica' if count == 1 else 'replicas'}, each at {100 * HEADROOM:.0f} % of its {usual:.1f}."
        )
    if speed >= 1:
        said.append(
            "Timeouts, probes and alerts follow what was measured, where they were assumed, after: "
            f"copier update -d measured_tokens_per_second={speed:.0f}"
        )
    if result["client_cpu_share"] > 0.8:
        said.append(
            "This client itself was busy: the service may be faster than was measured here."
        )
    return said


def table(rows: Sequence[Row]) -> str:
    """The rows in columns."""
    head = ("length", "at a time", "texts/s", "tokens/s", "p50 ms", "p99 ms", "refused", "failed")
    cells = [
        (
            r["length"],
            str(r["concurrency"]),
            f"{r['texts_s']:.1f}",
            f"{r['tokens_s']:.0f}",
            f"{r['p50_ms']:.0f}",
            f"{r['p99_ms']:.0f}",
            str(r["refused"]),
            str(r["failed"]),
        )
        for r in rows
    ]
    widths = [max(len(row[i]) for row in (head, *cells)) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if not i else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *cells)
    ]
    return "\n".join(line.rstrip() for line in lines)


def comparison(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How the points that both runs have differ, one line each."""
    earlier = {(r["length"], r["concurrency"]): r for r in before["rows"]}
    said = []
    for row in now["rows"]:
        old = earlier.get((row["length"], row["concurrency"]))
        if old and old["texts_s"] and old["p99_ms"]:
            rate = 100 * (row["texts_s"] / old["texts_s"] - 1)
            slow = 100 * (row["p99_ms"] / old["p99_ms"] - 1)
            said.append(
                f"{row['length']}, {row['concurrency']} at a time: "
                f"{rate:+.0f} % texts/s, {slow:+.0f} % p99"
            )
    return said


def plot(rows: Sequence[Row], value: str, title: str) -> str:
    """An SVG: `value` over concurrency, a line per length."""
    names, steps = lengths(rows), sorted({r["concurrency"] for r in rows})
    top = max((r[value] for r in rows), default=0) or 1
    width, height, left, bottom = 640, 320, 64, 48
    colours = ("#0b5cad", "#b3471d", "#2b7a3d", "#7a3d9e")

    def x(concurrency: int) -> float:
        place = steps.index(concurrency) / max(1, len(steps) - 1)
        return left + place * (width - left - 24)

    def y(number: float) -> float:
        return height - bottom - number / top * (height - bottom - 56)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    for share in (0, 0.5, 1):
        at = y(top * share)
        parts.append(f'<line x1="{left}" x2="{width - 24}" y1="{at}" y2="{at}" stroke="#d5d9e0"/>')
        parts.append(
            f'<text x="{left - 8}" y="{at + 4}" text-anchor="end">{top * share:.0f}</text>'
        )
    for step in steps:
        parts.append(
            f'<text x="{x(step)}" y="{height - bottom + 18}" text-anchor="middle">{step}</text>'
        )
    middle = (left + width - 24) / 2
    parts.append(
        f'<text x="{middle}" y="{height - 12}" text-anchor="middle">requests at a time</text>'
    )
    for i, name in enumerate(names):
        colour = colours[i % len(colours)]
        line = of_length(rows, name)
        points = " ".join(f"{x(r['concurrency']):.1f},{y(r[value]):.1f}" for r in line)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(f'<text x="{left + 80 * i}" y="38" fill="{colour}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])
