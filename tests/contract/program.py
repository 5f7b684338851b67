"""Compare TEI's contract with TEI: `make contract` prints every row and what differs.

TEI_ROUTER (and TEI_ROUTER_EDITED, for the column of our edits) name the programs; see tests/real_tei.py.

    python -m tests.contract.program [--quick] [--write] [row ...]

Per row: the model as transformers saves it, repaired as model-fetch does, alone and in batches; then
without each required key, with each key changed for both sides, with each pooling, each prefix of the
tensors and each type of weights. A fault is what the rules would serve and TEI computes otherwise, or
what they refuse as not starting and TEI computes rightly.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from extensions import accelerator, compatibility, contract
from extensions.embedding_model import Facts
from tests import real_tei
from tests.contract import tiny

CPU = accelerator.for_name("cpu")
RIGHT, ALONE = 0.9999, 0.99999
"""Cosines: to transformers' own vectors, and of a text alone to the same text in a batch."""

ROOT = Path(__file__).parents[2]
RESULT, DOCUMENT = ROOT / "tests/contract/verified.json", ROOT / "docs/models.md"
BEGIN, END = "<!-- make contract: begin -->", "<!-- make contract: end -->"
PREFIXES = (
    "",
    "model.",
    "bert.",
    "roberta.",
    "xlm-roberta.",
    "camembert.",
    "xlm_roberta.",
    "mpnet.",
    "distilbert.",
    "deberta.",
    "new.",
    "0.auto_model.",
)
POOLINGS = ("cls", "mean", "last-token")

CHANGES: dict[str, list[dict[str, Any]]] = yaml.safe_load(
    Path(__file__).with_name("changes.yaml").read_text()
)


class Refused(Exception):
    """The rules refuse the folder."""


class Program:
    """What TEI makes of folders; counts its starts."""

    def __init__(self, edited: bool) -> None:
        self.edited = edited
        found = real_tei.router(edited)
        assert found, real_tei.LEFT_OUT
        self.path, self.starts = found, 0
        self.worst: dict[str, float] = {}
        """Row -> smallest cosine to transformers of all that the rules serve."""

    def vectors(self, folder: Path, pooling: str, dtype: str = "float32") -> dict[str, Any]:
        """Of all texts: alone, and the same out of batches. Raises: real_tei.NotServing."""
        self.starts += 1
        flags = (f"--pooling={pooling}", f"--dtype={dtype}", "--tokenization-workers=1")
        texts = tiny.texts()
        with real_tei.serving(folder, *flags, program=self.path, seconds=60) as server:
            alone = [vector for text in texts for vector in _embed(server, text)]
            batches = {
                "equal": (texts[2:6], alone[2:6]),
                "long": (texts[-3:], alone[-3:]),
                "mixed": (texts, alone),
                "reversed": (texts[::-1], alone[::-1]),
            }
            worst = 1.0
            for asked, expected in batches.values():
                worst = min(worst, tiny.worst(_embed(server, *asked), expected))
            with ThreadPoolExecutor(8) as pool:
                answers = pool.map(lambda text: _embed(server, text)[:1], texts * 2)
                together = [vector for answer in answers for vector in answer]
            worst = min(worst, tiny.worst(together, alone * 2))
        return {"alone": alone, "batches": worst}


def _embed(server: real_tei.Server, *texts: str) -> list[list[float]]:
    """Vectors; [] where TEI answers with an error."""
    status, answer = server.request("/v1/embeddings", {"input": list(texts), "model": "any"})
    return [row["embedding"] for row in json.loads(answer)["data"]] if status == 200 else []


def repaired(folder: Path, pooling: str, edited: bool, longest: int | None = None) -> Path:
    """The folder as model-fetch hands it to TEI. Raises: Refused."""
    files = _files(folder)
    tensors = {name: str(entry["dtype"]) for name, entry in _header(folder)[0].items()}
    findings = compatibility.check(
        files, CPU, pooling=pooling, tensors=tensors, edited=edited, longest=longest
    )
    if why := compatibility.refusal(findings):
        raise Refused(why)
    target = folder.with_name(f"{folder.name}-repaired")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    for path, content in compatibility.repaired(files, findings).items():
        if content is not None:
            tiny.write(target / path, content)
    return target


def limit_of(folder: Path, edited: bool) -> int:
    """Tokens that are served there: fewer where TEI lacks an edit that the contract can do without."""
    config = json.loads((folder / "config.json").read_text())
    row = contract.of(config)
    if edited or row is None or row.mask is None or row.mask.limit is None:
        return tiny.LIMIT
    facts = Facts(row.name, max_input_tokens=tiny.LIMIT, window=config["sliding_window"])
    return compatibility.served_tokens(facts, CPU, edited=False) or tiny.LIMIT


def _files(folder: Path) -> dict[str, Any]:
    names = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {n: json.loads(p.read_text()) if n.endswith(".json") else None for n, p in names.items()}


def _header(folder: Path) -> tuple[dict[str, Any], bytes]:
    data = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, data[8 + length :]


def _rewrite(folder: Path, header: dict[str, Any], data: bytes) -> None:
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def verify(name: str, program: Program, quick: bool, say: Callable[[str], None]) -> list[str]:
    """Everything of one row; returns the faults."""
    faults: list[str] = []
    row = contract.architectures()[name]
    with TemporaryDirectory(prefix="contract-") as temporary:
        for what, wrong in _checks(name, row, program, Path(temporary), quick):
            say(f"{name:12} {what}{': FAULT ' + wrong if wrong else ''}")
            if wrong:
                faults.append(f"{name} ({'edited' if program.edited else 'plain'}) {what}: {wrong}")
    return faults


def _checks(
    name: str, row: contract.Architecture, program: Program, place: Path, quick: bool
) -> Iterator[tuple[str, str]]:
    pooling = "mean"
    base = tiny.build(name, place / "base", pooling)
    yield from _compare(name, "as transformers saves it", base, pooling, program)
    masked = row.mask is None or program.edited
    for mode in POOLINGS:
        folder = _copy(base, place / f"pooling-{mode}")
        tiny.dress(folder, mode)
        works = mode.replace("-", "") in row.pooling
        yield from _compare(
            name, f"pooling {mode}", folder, mode, program, works if masked else None
        )
    if program.edited and quick:
        return
    for change in CHANGES.get(name, [])[: 3 if quick else None]:
        shown = ", ".join(f"{k}={v}" for k, v in change.items())[:80]
        try:
            folder = tiny.build(name, place / "changed", pooling, **change)
        except Exception as error:  # transformers itself refuses it
            yield f"{shown}: transformers refuses it ({type(error).__name__})", ""
            continue
        if "is_causal" in change:  # which transformers reads and does not save
            config = json.loads((folder / "config.json").read_text())
            tiny.write(folder / "config.json", config | {"is_causal": change["is_causal"]})
        yield from _compare(name, shown, folder, pooling, program)
        shutil.rmtree(folder)
    # Once, on the program that serves the row.
    if not quick and program.edited == (row.mask is not None):
        yield from _keys(row, base, pooling, program, place)
        yield from _names_and_types(row, base, pooling, program, place)


def _keys(
    row: contract.Architecture, base: Path, pooling: str, program: Program, place: Path
) -> Iterator[tuple[str, str]]:
    """Leaves out each required key: the repaired model must be what transformers loads."""
    served = repaired(base, pooling, program.edited)
    for key, said in row.keys.items():
        if "type" not in said or (said.get("optional") and "absent" not in said):
            continue
        original = json.loads((base / "config.json").read_text())
        if key in original and ("default" in said or "absent" in said):
            folder = _copy(base, place / "without")
            original.pop(key)
            tiny.write(folder / "config.json", original)
            yield from _compare(row.name, f"without {key}, repaired", folder, pooling, program)
        if said.get("optional"):
            continue
        raw = _copy(served, place / "raw")
        config = json.loads((raw / "config.json").read_text())
        config.pop(key, None)
        if key == "rope_theta":  # either is enough
            config.pop("rope_parameters", None)
        tiny.write(raw / "config.json", config)
        try:
            program.vectors(raw, pooling)
            yield f"without {key}", "TEI starts without it, and the table says that it is required"
        except real_tei.NotServing:
            yield f"without {key}: TEI stops, as the table says", ""


def _names_and_types(
    row: contract.Architecture, base: Path, pooling: str, program: Program, place: Path
) -> Iterator[tuple[str, str]]:
    served = repaired(base, pooling, program.edited)
    header, data = _header(served)
    expected = tiny.vectors(base, pooling)
    own = next((p for p in row.prefixes if p and any(n.startswith(p) for n in header)), "")
    for prefix in PREFIXES:
        folder = _copy(served, place / "named")
        names = {f"{prefix}{n.removeprefix(own)}": entry for n, entry in header.items()}
        _rewrite(folder, names, data)
        try:
            worst = tiny.worst(program.vectors(folder, pooling)["alone"], expected)
        except real_tei.NotServing:
            worst = 0.0
        listed = prefix in row.prefixes
        wrong = "" if (worst > RIGHT) == listed else f"cosine {worst:.7f}, listed: {listed}"
        yield f"prefix {prefix or 'none'}", wrong
    import torch
    from safetensors.torch import load_file, save_file

    for dtype in ("float16", "bfloat16", "float64", "int8"):
        folder = _copy(served, place / "typed")
        weights = load_file(folder / "model.safetensors")
        save_file(
            {n: t.to(getattr(torch, dtype)) for n, t in weights.items()},
            folder / "model.safetensors",
        )
        kind = {"float16": "F16", "bfloat16": "BF16", "float64": "F64", "int8": "I8"}[dtype]
        listed = kind in contract.table()["weights"]["dtypes"]
        try:
            worst = tiny.worst(program.vectors(folder, pooling)["alone"], expected)
        except real_tei.NotServing:
            worst = 0.0
        wrong = f"cosine {worst:.5f}" if listed and worst < 0.99 else ""
        result = f"cosine {worst:.5f}" if worst else "TEI stops"
        yield f"weights {kind}: {result}, listed: {listed}", wrong


def _compare(
    name: str,
    what: str,
    folder: Path,
    pooling: str,
    program: Program,
    works: bool | None = None,
) -> Iterator[tuple[str, str]]:
    """One folder: served as the rules say, or refused; with what TEI then computes.

    Args: works: what the table says by itself; None where the rules decide.
    """
    limit = limit_of(folder, program.edited)
    try:
        expected = tiny.vectors(folder, pooling, limit)
    except Exception as error:
        yield f"{what}: transformers does not load it ({type(error).__name__})", ""
        return
    try:
        served, refused = repaired(folder, pooling, program.edited, limit), ""
    except Refused as error:
        served, refused = folder, str(error)
    try:
        found = program.vectors(served, pooling)
        worst, batches = tiny.worst(found["alone"], expected), found["batches"]
        result = f"alone {worst:.7f}, batches {batches:.7f}"
        if limit < tiny.LIMIT:
            result += f", cut at {limit} tokens"
    except real_tei.NotServing:
        worst = batches = -1.0
        result = "TEI stops"
    right = worst > RIGHT and batches > ALONE
    if refused:
        wrong = ""  # a refusal is never silent; that TEI is right is shown
        what = f"{what}: refused ({refused[:70]}…); {result}"
        if works:
            wrong = "the table lists it, and the rules refuse it"
        elif works is False and right:
            wrong = "the table does not list it, and TEI computes it rightly"
    else:
        what = f"{what}: served; {result}"
        program.worst[name] = min(worst, batches, program.worst.get(name, 1.0))
        wrong = "" if right else "served, and not the model's vectors"
    yield what, wrong


def _copy(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))


def markdown() -> str:
    """The table of docs/models.md, from the contract and the noted run."""
    noted = json.loads(RESULT.read_text())
    head = ["architecture", "CPU", "GPU", "flash attention", "pooling", "tensors", "worst cosine"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in contract.architectures().items():
        edit = dict.fromkeys(row.mask.paths, f", {row.mask.edit}") if row.mask else {}
        paths = [
            f"{row.paths[path]}{edit.get(path, '')}" if path in row.paths else "-"
            for path in ("cpu", "gpu", "flash")
        ]
        worst = noted["rows"].get(name, {})
        numbers = ", ".join(
            f"{worst[key]:.7f} {key}" for key in ("plain", "edited") if key in worst
        )
        prefixes = ", ".join(f"`{prefix}`" if prefix else "none" for prefix in row.prefixes)
        pooling = ", ".join(row.pooling)
        lines.append(
            f"| {name} | {' | '.join(paths)} | {pooling} | {prefixes} | {numbers or '-'} |"
        )
    rows = noted["rows"].values()
    newest, starts = max(row["date"] for row in rows), sum(row["starts"] for row in rows)
    what = f"TEI {noted['commit'][:12]} on a CPU, {newest}: "
    what += f"{len(rows)} architectures, {starts} starts, no faults."
    return "\n".join([*lines, "", what])


def _write(programs: list[Program], starts: Mapping[str, int]) -> None:
    """Note the rows (name -> starts of TEI); those of an earlier run on the same commit stay."""
    worst = {"edited" if p.edited else "plain": p.worst for p in programs}
    noted = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    earlier = noted if noted.get("commit") == real_tei.commit() else {}
    new = {
        row: {kind: round(found[row], 7) for kind, found in worst.items() if row in found}
        | {"starts": count, "date": date.today().isoformat()}
        for row, count in starts.items()
    }
    note = {
        "commit": real_tei.commit(),
        "rows": dict(sorted((earlier.get("rows", {}) | new).items())),
    }
    tiny.write(RESULT, note)
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{markdown()}\n{END}{rest.split(END)[1]}")


def main(arguments: list[str]) -> int:
    """Returns 1 where something differs from the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the base, poolings and a few keys")
    parser.add_argument(
        "--write", action="store_true", help="note the result, and in docs/models.md"
    )
    parser.add_argument("rows", nargs="*", default=list(tiny.MODELS))
    given = parser.parse_args(arguments)
    start = time.monotonic()
    faults: list[str] = []
    programs: list[Program] = []
    starts: Counter[str] = Counter()
    for edited in (False, True):
        if real_tei.router(edited) is None:
            print(f"left out, {'with' if edited else 'without'} our edits: {real_tei.LEFT_OUT}")
            continue
        program = Program(edited)
        print(f"# TEI {real_tei.commit()[:12]} {'with our edits' if edited else 'without edits'}")
        for name in given.rows:
            before = program.starts
            faults += verify(name, program, given.quick, lambda line: print(line, flush=True))
            starts[name] += program.starts - before
        programs.append(program)
    took = time.monotonic() - start
    found = f"faults: {len(faults) or 'none'}"
    print(f"\n{len(given.rows)} rows, {starts.total()} starts of TEI, {took:.0f} s; {found}")
    for fault in faults:
        print(f"  {fault}")
    if given.write and not faults and len(programs) == 2 and not given.quick:
        _write(programs, starts)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
