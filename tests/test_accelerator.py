"""The table of accelerators holds together, and wrong combinations are refused in one line."""

from __future__ import annotations

import re

import pytest

from extensions import accelerator
from extensions.errors import ConfigurationError

NAMES = ("gb10", "rtx-50", "b200", "gh200", "h100", "l4", "a10", "a100", "t4", "cpu")
TEI_REF = "0d124dc9773be6ac5a9a57d8439aba9bbbf33273"

# TEI 0d124dc, backends/candle/src/compute_cap.rs: compiled -> runtime compute capabilities.
ACCEPTED = {
    75: (75, 75),
    80: (80, 89),
    86: (86, 89),
    89: (89, 89),
    90: (90, 90),
    100: (100, 100),
} | {
    120: (120, 121),
    121: (121, 121),
}


def test_the_table_has_the_ten_accelerators_with_the_spark_first() -> None:
    assert accelerator.names() == NAMES
    assert list(accelerator.choices().values()) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_agrees_with_itself(name: str) -> None:
    row = accelerator.for_name(name)

    assert row.name == name
    assert row.source
    assert row.platforms
    assert set(row.platforms) <= {"linux/arm64", "linux/amd64"}
    assert set(row.official_images) <= set(row.platforms)
    assert row.is_gpu == ("cuda" in " ".join(row.features(row.platforms[0])))
    # TEI's flash attention exists in float16 alone.
    assert not row.flash_attention or row.dtype == "float16"
    for image in (row.build_image, row.runtime_image, *row.official_images.values()):
        assert re.fullmatch(r"[a-z.]+/[a-z0-9/-]+:[a-z0-9.-]+(@sha256:[0-9a-f]{64})?", image)
        assert ":latest" not in image


@pytest.mark.parametrize("name", NAMES[:-1])
def test_a_gpu_is_compiled_for_what_it_is(name: str) -> None:
    gpu = accelerator.for_name(name)

    assert gpu.compute_cap is not None
    assert gpu.runs_on == ACCEPTED[gpu.compute_cap]
    assert gpu.architecture in (f"sm_{gpu.compute_cap}", f"sm_{gpu.compute_cap}a")
    assert f"sm_{gpu.compute_cap}" in gpu.cublas_code
    # cuBLAS 12.9.1 has all of its modules for these alone; a GPU runs the code of an older one of its family.
    whole = {cap for cap in (70, 80, 90, 100, 120) if f"sm_{cap}" in gpu.cublas_code}
    assert any(cap // 10 == gpu.compute_cap // 10 and cap <= gpu.compute_cap for cap in whole)
    # An architecture with `a` runs on that very compute capability alone.
    assert gpu.architecture is not None
    assert not gpu.architecture.endswith("a") or gpu.runs_on == (gpu.compute_cap, gpu.compute_cap)
    # From CUDA 12.9 on, nvcc knows sm_121.
    assert gpu.oldest_driver == 12090


def test_the_spark_is_compiled_for_sm_121a_while_tei_reads_121() -> None:
    spark = accelerator.for_name("gb10")

    assert (spark.compute_cap, spark.architecture) == (121, "sm_121a")
    assert spark.nvcc_append_flags == "--gpu-architecture=sm_121a"
    assert spark.platforms == ("linux/arm64",)
    assert spark.unified_memory


def test_turing_has_its_own_features_and_no_flash_attention() -> None:
    turing = accelerator.for_name("t4")

    assert "candle-cuda-turing" in turing.features("linux/amd64")
    assert "candle-cuda" not in turing.features("linux/arm64")
    assert not turing.flash_attention


def test_every_good_combination_passes() -> None:
    for row in accelerator.load().values():
        for platform in row.platforms:
            assert accelerator.problem(row.name, platform, "build", TEI_REF) is None
        for platform in row.official_images:
            assert accelerator.problem(row.name, platform, "official", TEI_REF) is None


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        (
            ("gb11", "linux/arm64", "build", TEI_REF),
            "accelerator: 'gb11' is not one of gb10, rtx-50, b200, gh200, h100, l4, a10, a100, t4, cpu.",
        ),
        (
            ("gb10", "linux/amd64", "build", TEI_REF),
            "image_platform: NVIDIA DGX Spark (GB10) does not sit in linux/amd64 machines, use linux/arm64.",
        ),
        (
            ("l4", "linux/amd64", "build", "main"),
            "tei_ref: 'main' is not a commit of TEI, use its 40 hexadecimal digits.",
        ),
        (
            ("l4", "linux/amd64", "build", TEI_REF[:7]),
            "tei_ref: '0d124dc' is not a commit of TEI, use its 40 hexadecimal digits.",
        ),
        (
            ("gh200", "linux/arm64", "official", TEI_REF),
            "tei_image: Hugging Face publishes no TEI image for NVIDIA GH200 on linux/arm64, "
            "use tei_image=build.",
        ),
        (
            ("a100", "linux/arm64", "official", TEI_REF),
            "tei_image: Hugging Face publishes no TEI image for NVIDIA A100, A30 on linux/arm64, "
            "use tei_image=build.",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    answers: tuple[str, str, str, str], sentence: str
) -> None:
    assert accelerator.problem(*answers) == sentence


@pytest.mark.parametrize("name", ["", "GB10", "cuda", None, ["gb10"]])
def test_an_unknown_name_raises_one_line_with_the_names(name: object) -> None:
    with pytest.raises(ConfigurationError) as error:
        accelerator.for_name(name)  # type: ignore[arg-type]

    assert "\n" not in str(error.value)
    assert str(error.value).endswith(f"is not one of {', '.join(NAMES)}.")
