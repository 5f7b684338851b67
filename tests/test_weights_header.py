"""The header of the weights, as far as rendering reads it: what no reader of the format takes is refused."""

from __future__ import annotations

import hashlib
import json

import pytest

from extensions import embedding_model
from extensions.embedding_model import Entry
from extensions.errors import UnsuitableModelError
from tests.snapshots import CONFIG, safetensors

FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b'{"version": "1.0"}',
    "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
    "model.safetensors": safetensors({"embeddings.word_embeddings.weight": (30, 8)}),
}


class Memory:
    """A folder of these files."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def entries(self, path: str) -> list[Entry]:
        prefix = f"{path}/" if path else ""
        below = [p[len(prefix) :] for p in self.files if p.startswith(prefix)]
        names = {rest.partition("/")[0] for rest in below}
        return [
            Entry(prefix + n, len(self.files[prefix + n]) if prefix + n in self.files else None)
            for n in sorted(names)
        ]

    def read(self, path: str) -> bytes:
        return self.files[path]

    def head(self, path: str, size: int) -> bytes | None:
        return self.files[path][:size]


def weights(header: bytes, data: int = 4) -> dict[str, bytes]:
    text = len(header).to_bytes(8, "little") + header + bytes(data)
    return FILES | {"model.safetensors": text}


def tensor(**changes: object) -> bytes:
    usual = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    return json.dumps({"w": usual | changes}).encode()


@pytest.mark.parametrize(
    "header",
    [
        b"", b"[]", b"{", b"null", b'{"w": 1}', b'{"w": {}}', b"\xff" * 9, "{}".encode("utf-16"),
        b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "shape": [1]}}',
        tensor(shape=["a", 2_000_000_000]), tensor(shape=["a", 10**15]), tensor(shape=[[], 10**290]),
        tensor(shape=[2**40, 2**40]), tensor(shape=[1.5]), tensor(shape=["1"]), tensor(shape=[-1]),
        tensor(shape=None), tensor(shape=[True]), tensor(dtype=["F32"]), tensor(dtype=None),
        tensor(data_offsets=[0]), tensor(data_offsets=[0, 4, 8]), tensor(data_offsets=["0", 4]),
        tensor(data_offsets=[4, 0]), tensor(data_offsets=[0.0, 4]), tensor(data_offsets=None),
        tensor(data_offsets=[0, 8]), tensor(data_offsets=[4, 8]), tensor(shape=[2]),
        b'{"w": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        b' "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": ' * 500 + b"1" + b"}" * 500,
    ],
    ids=range(32),
)  # fmt: skip
def test_a_header_that_is_none(header: bytes) -> None:
    with pytest.raises(UnsuitableModelError, match=r"header is damaged|cut off"):
        embedding_model.inspect(Memory(weights(header)), "x")


def test_weights_of_no_bytes() -> None:
    with pytest.raises(UnsuitableModelError):
        embedding_model.inspect(Memory(FILES | {"model.safetensors": b""}), "x")


def test_the_pin_has_the_digest_of_every_file_that_was_read() -> None:
    files = {f.path: f for f in embedding_model.inspect(Memory(FILES), "x").files}
    assert files.pop("model.safetensors").sha256 is None
    assert files
    for path, file in files.items():
        assert file.sha256 == hashlib.sha256(FILES[path]).hexdigest()


def test_a_recorded_digest_that_no_longer_fits_is_not_pinned() -> None:
    """A file that was changed after it was downloaded: what the registry gives now counts."""
    record = "0123456789abcdef0123456789abcdef01234567"
    cached = ".cache/huggingface/download/"
    sha1 = hashlib.sha1(b"blob %d\0" % len(FILES["tokenizer.json"]) + FILES["tokenizer.json"])
    more = {
        f"{cached}config.json.metadata": f"{record}\n{'0' * 40}\n1.0\n".encode(),
        f"{cached}tokenizer.json.metadata": f"{record}\n{sha1.hexdigest()}\n1.0\n".encode(),
    }
    files = {f.path: f for f in embedding_model.inspect(Memory(FILES | more), "x").files}
    assert files["config.json"].blob_sha1 is None
    assert files["tokenizer.json"].blob_sha1 == sha1.hexdigest()
