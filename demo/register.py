"""Register a Hugging Face model in MLflow so that its pin has every digest: `make register`.

Takes a folder as the Hub's client leaves it (`hf download --local-dir`), or any folder that
sentence-transformers saved, or, on a machine with internet, a model id. MLFLOW_TRACKING_URI says where.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from demo.registry import register_snapshot  # noqa: E402
from extensions import pin  # noqa: E402
from extensions.embedding_model import Entry, inspect  # noqa: E402
from extensions.errors import TemplateError  # noqa: E402

METADATA = Path(".cache/huggingface/download")
LEFT_OUT = (".git", ".cache")


class LocalFolder:
    """A folder on this machine, as the rules read one."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def entries(self, path: str) -> list[Entry]:
        """What is directly in a folder; nothing where it is none."""
        folder = self.root / path
        if not folder.is_dir():
            return []
        return [
            Entry(p.relative_to(self.root).as_posix(), None if p.is_dir() else p.stat().st_size)
            for p in sorted(folder.iterdir())
        ]

    def read(self, path: str) -> bytes:
        """A small file, whole."""
        return (self.root / path).read_bytes()

    def head(self, path: str, size: int) -> bytes:
        """The beginning of a file."""
        with (self.root / path).open("rb") as file:
            return file.read(size)


def main() -> int:
    """Returns an exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, help="the model's files; without it they are downloaded"
    )
    parser.add_argument("--model", required=True, help="its Hugging Face id, as in ORG/NAME")
    parser.add_argument("--revision", help="of the download; by default the newest")
    parser.add_argument(
        "--parity", type=Path, help="also write the reference for `make parity` here"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the model's own code for that reference",
    )
    given = parser.parse_args()
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        return wrong("set MLFLOW_TRACKING_URI to the address of MLflow")
    if given.folder and not given.folder.is_dir():
        return wrong(f"{given.folder} is no folder")
    with tempfile.TemporaryDirectory() as temporary:
        try:
            folder = given.folder or downloaded(given.model, given.revision, Path(temporary))
            model = inspect(LocalFolder(folder), given.model)
            remarks, _ = pin._judged(model, given.model)  # what rendering would say of it
            if given.parity and (code := referenced(folder, given)):
                return code
            staged = stage(folder, Path(temporary) / "staged")
            uri = os.environ["MLFLOW_TRACKING_URI"]
            version = register_snapshot(uri, staged, given.model)
        except TemplateError as error:
            return wrong(str(error))
        except Exception as error:  # the clients of MLflow and of the Hub raise of every kind
            if os.environ.get("DEBUG"):
                raise
            return wrong(f"{' '.join(str(error).split())[:400]} (DEBUG=1 shows more)")
    facts = model.facts
    print(f"registered {given.model.replace('/', '-')} version {version}:")
    print(f"  {facts.architecture}, {facts.dimensions} dimensions, {facts.pooling} pooling")
    print(f"  {len(model.files)} files that TEI reads, each with its digest")
    for remark in remarks:
        print(f"  {remark}")
    return 0


def referenced(folder: Path, given: argparse.Namespace) -> int:
    """Write what sentence-transformers computes of the folder; the exit code, 0 when all is well."""
    script = ROOT / "template/parity/reference.py"
    if importlib.util.find_spec("sentence_transformers"):
        command = [sys.executable, str(script)]
    else:  # in an environment of its own, which the script describes
        uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
        command = [uv, "run", "--no-project", "--script", str(script)]
    more = ["--trust-remote-code"] if given.trust_remote_code else []
    done = subprocess.run(
        [*command, str(folder), "--output", str(given.parity), *more], check=False
    )
    return done.returncode


def wrong(text: str) -> int:
    """One line, and the exit code that goes with it."""
    print(f"register: {text}", file=sys.stderr)
    return 1


def downloaded(model: str, revision: str | None, place: Path) -> Path:
    """A snapshot from the Hub, with what its client says of each file."""
    from huggingface_hub import snapshot_download  # heavy, and needed without a folder only

    folder = place / "downloaded"
    snapshot_download(model, revision=revision, local_dir=folder)
    return folder


def stage(folder: Path, target: Path) -> Path:
    """The folder's files as links, and beside each what the Hub's client says of it, or its digest."""
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if not file.is_file() or name.parts[0] in LEFT_OUT:
            continue
        link = target / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.resolve())
        kept = folder / METADATA / f"{name}.metadata"
        metadata = target / METADATA / f"{name}.metadata"
        metadata.parent.mkdir(parents=True, exist_ok=True)
        if kept.is_file() and kept.stat().st_mtime >= file.stat().st_mtime:
            metadata.write_bytes(kept.read_bytes())
        else:
            metadata.write_text(f"-\n{sha256(file)}\n0\n")
    return target


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
