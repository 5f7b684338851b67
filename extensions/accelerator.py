"""The accelerators that TEI can be built for: a table, and what may be combined with what."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from .errors import ConfigurationError

_TABLE = Path(__file__).parent / "data" / "accelerators.yaml"


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One kind of GPU, or the CPU, and how TEI is compiled and run for it."""

    name: str
    """Answer of the question `accelerator`, as in `gb10`."""

    title: str
    """What a person calls it, as in `NVIDIA DGX Spark (GB10)`."""

    platforms: tuple[str, ...]
    """Platforms of the machines it sits in, most usual first: `linux/arm64`, `linux/amd64`."""

    compute_cap: int | None
    """Compute capability without its dot, as TEI's CUDA_COMPUTE_CAP wants it: 121. None: no GPU."""

    architecture: str | None
    """Architecture that nvcc compiles for: `sm_121a`. None: no GPU."""

    runs_on: tuple[int, int] | None
    """First and last compute capability that TEI accepts such a build on. None: no GPU."""

    cublas_code: tuple[str, ...]
    """Architectures whose code is kept of the static cuBLAS; empty where none is linked."""

    memory_gib: int | None
    """Memory of the accelerator, GiB; of a family, the smallest. None: whatever the node has."""

    unified_memory: bool
    """GPU and CPU share one memory, which the model then takes from."""

    flash_attention: bool
    """TEI's flash attention works on it."""

    dtype: str
    """Type of weights and activations that TEI should run in: `float16` or `float32`."""

    cargo_features: Mapping[str, tuple[str, ...]]
    """Features that TEI's router is compiled with, by platform; `any` for all others."""

    build_memory_gib: int
    """Memory that building the image takes, GiB."""

    cuda_version: str | None
    """CUDA toolkit of the build, as in `12.9.1`. None: no CUDA."""

    build_image: str
    """Image that TEI is compiled in."""

    runtime_image: str
    """Image that the final image starts from; its C library is the one of `build_image` or newer."""

    official_images: Mapping[str, str]
    """TEI's own image by platform, `repository:tag[@digest]`; empty where upstream has none."""

    source: str
    """Where the row is from."""

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.compute_cap is not None

    def features(self, platform: str) -> tuple[str, ...]:
        """Features that TEI's router is compiled with on that platform."""
        return self.cargo_features.get(platform) or self.cargo_features["any"]

    @property
    def nvcc_append_flags(self) -> str:
        """What nvcc must be told beside TEI's own `--gpu-architecture=sm_<compute_cap>`; mostly "".

        TEI parses CUDA_COMPUTE_CAP as an integer, so `121a` cannot pass there; nvcc takes the last
        `--gpu-architecture` that it is given.
        """
        if self.architecture == f"sm_{self.compute_cap}" or not self.is_gpu:
            return ""
        return f"--gpu-architecture={self.architecture}"

    @property
    def oldest_driver(self) -> int | None:
        """Oldest CUDA version of the driver that loads the kernels, as cuDriverGetVersion counts: 12090.

        TEI's kernels are PTX of the toolkit's version, which an older driver cannot compile.
        """
        if self.cuda_version is None:
            return None
        major, minor = (int(part) for part in self.cuda_version.split(".")[:2])
        return major * 1000 + minor * 10


@cache
def load() -> Mapping[str, Accelerator]:
    """The table by name, in its own order, `gb10` first."""
    table = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    repository = table["official_repository"]
    return MappingProxyType(
        {name: _accelerator(name, row, repository) for name, row in table["accelerators"].items()}
    )


def _accelerator(name: str, row: Mapping[str, Any], repository: str) -> Accelerator:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    images = {
        platform: f"{repository}:{image['tag']}"
        + (f"@{image['digest']}" if "digest" in image else "")
        for platform, image in fields.pop("official_images").items()
    }
    features = {platform: tuple(row) for platform, row in fields.pop("cargo_features").items()}
    fields["cargo_features"] = MappingProxyType(features)
    return Accelerator(name=name, official_images=MappingProxyType(images), **fields)


def names() -> tuple[str, ...]:
    """Every answer of the question `accelerator`."""
    return tuple(load())


def choices() -> dict[str, str]:
    """What the question `accelerator` shows, and the answer behind it."""
    return {accelerator.title: name for name, accelerator in load().items()}


def for_name(name: str) -> Accelerator:
    """The accelerator called `name`.

    Raises: ConfigurationError, in one sentence that lists the names.
    """
    try:
        return load()[name]
    except (KeyError, TypeError):
        raise ConfigurationError(_unknown(name)) from None


def _unknown(name: object) -> str:
    return f"accelerator: '{name}' is not one of {', '.join(names())}."


def problem(name: str, image_platform: str, tei_image: str, tei_ref: str) -> str | None:
    """Why these answers cannot stand together, in one sentence; None when they can.

    Args:
        name: answer `accelerator`.
        image_platform: `linux/arm64` or `linux/amd64`.
        tei_image: `build` or `official`.
        tei_ref: commit of TEI.
    """
    if name not in names():
        return _unknown(name)
    accelerator = for_name(name)
    if image_platform not in accelerator.platforms:
        return (
            f"image_platform: {accelerator.title} does not sit in {image_platform} machines, "
            f"use {' or '.join(accelerator.platforms)}."
        )
    if not re.fullmatch(r"[0-9a-f]{40}", tei_ref):
        return f"tei_ref: '{tei_ref}' is not a commit of TEI, use its 40 hexadecimal digits."
    if tei_image == "official" and image_platform not in accelerator.official_images:
        return (
            f"tei_image: Hugging Face publishes no TEI image for {accelerator.title} on "
            f"{image_platform}, use tei_image=build."
        )
    return None
