"""What the images are built from, rendered by Copier for every accelerator and platform."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import copier
import pytest

ROOT = Path(__file__).parents[2]

RenderTei = Callable[..., Path]


@pytest.fixture(scope="session")
def render_tei(tmp_path_factory: pytest.TempPathFactory) -> RenderTei:
    """`render_tei("gb10", **answers)`: what builds the images; the same answers once."""
    template = tmp_path_factory.mktemp("template-of-tei")
    shutil.copy(ROOT / "copier.yml", template)
    parts = ("images/tei", "images/model-fetch", "smoke", "scripts", "{{objects_folder}}/build")
    for folder in ("extensions", *(f"template/{part}" for part in parts)):
        shutil.copytree(ROOT / folder, template / folder)
    for file in ("images.mk.jinja", "images.json.jinja"):
        shutil.copy(ROOT / "template/images" / file, template / "template/images")

    @cache
    def render(accelerator: str, **answers: Any) -> Path:
        target = tmp_path_factory.mktemp(accelerator)
        copier.run_copy(
            str(template),
            target,
            data={"accelerator": accelerator, **answers},
            defaults=True,
            unsafe=True,
            quiet=True,
        )
        return target

    return render
