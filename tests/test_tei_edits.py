"""The edits of TEI's sources: what is listed is what is there, and one that does not fit stops the build."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from copier.errors import UserMessageError

from extensions import tei
from tests.containers.mirrors import anchors, anchors_of

if TYPE_CHECKING:
    from tests.containers.renders import RenderTei

pytest_plugins = ["tests.containers.renders"]

ROOT = Path(__file__).parent.parent
PATCHES = ROOT / "template/images/tei/patches"
NAMES = [edit.name for edit in tei.every_edit()]
NEW = "backends/candle/src/layers/in_place.rs"


def apply(sources: Path, patches: Path, names: str) -> subprocess.CompletedProcess[str]:
    command = ["perl", PATCHES / "apply.pl", patches, names]
    return subprocess.run(command, cwd=sources, text=True, capture_output=True)


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Files that hold each anchor of ours once, and nothing else of TEI."""
    folder = tmp_path / "src"
    for name, texts in anchors().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"before {text} behind\n" for text in texts))
    return folder


def test_every_listed_edit_is_a_file_and_every_file_is_listed() -> None:
    assert {path.stem for path in PATCHES.glob("*.edit")} == set(NAMES)


@pytest.mark.parametrize("edit", tei.every_edit(), ids=NAMES)
def test_an_edit_says_why_where_it_was_reported_and_for_which_releases(edit: tei.Edit) -> None:
    comment = [
        line for line in (PATCHES / f"{edit.name}.edit").read_text().splitlines() if line[:1] == "#"
    ]
    (upstream,) = (line for line in comment if line.startswith("# Upstream: "))
    (releases,) = (line for line in comment if line.startswith("# For: "))

    assert len(" ".join(comment[:-2])) > 80
    assert (f"issues/{edit.upstream}" in upstream) == (edit.upstream is not None)
    known = [release["commit"][:12] for release in tei.releases()]
    assert re.findall(r"[0-9a-f]{12}", releases)
    assert set(re.findall(r"[0-9a-f]{12}", releases)) <= set(known)


@pytest.mark.parametrize("edit", tei.every_edit(), ids=NAMES)
def test_an_edit_holds_little_of_tei(edit: tei.Edit) -> None:
    finds = re.findall(r"^find: (.*)$", (PATCHES / f"{edit.name}.edit").read_text(), re.M)

    assert finds
    assert all(len(anchor) < 80 for anchor in finds)


def test_edits_are_made(sources: Path) -> None:
    done = apply(sources, PATCHES, ",".join(NAMES))

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"patches: {name}" for name in sorted(content(sources))]
    assert "pub fn softmax_in_place" in (sources / NEW).read_text()
    qwen3 = (sources / "backends/candle/src/models/qwen3.rs").read_text()
    assert qwen3 == "before let mut masking = true; behind\n"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("times", [0, 2])
def test_an_anchor_that_is_not_there_once_changes_nothing(
    sources: Path, name: str, times: int
) -> None:
    where, anchor = anchors_of(PATCHES / f"{name}.edit")[-1]
    path = sources / where
    path.write_text(path.read_text().replace(anchor, " ".join([anchor] * times)))
    before = content(sources)

    done = apply(sources, PATCHES, ",".join(NAMES))

    assert done.returncode == 1
    looked_for = " ".join(anchor.splitlines())
    assert done.stderr == (
        f"patches: {name} is not for this TEI: {where} has '{looked_for}' {times} times, not once.\n"
    )
    assert content(sources) == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no edit own."),
        (
            "file: lib.rs\nfind: no such\nput: x\n",
            "own is not for this TEI: lib.rs has 'no such' 0",
        ),
        ("file: gone.rs\nfind: a\nput: x\n", "own is not for this TEI: there is no gone.rs."),
        ("file: lib.rs\n", "own.edit changes nothing."),
        ("find: a\nput: x\n", "own.edit names no file."),
        ("file: lib.rs\nput: x\n", "own.edit puts before it finds."),
        ("file: new.rs\nnew: x\nput: x\n", "own.edit puts before it finds."),
        ("file: lib.rs\nnew: x\n", "own is not for this TEI: lib.rs is there already."),
        (
            "file: lib.rs\nfind: let a\nfind: = 1\nput: x\n",
            "own is not for this TEI: lib.rs has 'let a = 1' 0",
        ),
        ("file: lib.rs\nfind: let a\nand: x\n", "own.edit has a line that is none: and: x"),
    ],
)
def test_a_wrong_edit_is_one_line(tmp_path: Path, text: str | None, said: str) -> None:
    (tmp_path / "lib.rs").write_text("let a = 1;\n")
    if text is not None:
        (tmp_path / "own.edit").write_text(text)

    done = apply(tmp_path, tmp_path, "own")

    assert done.returncode == 1
    assert done.stderr.startswith(f"patches: {said}")
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "lib.rs").read_text() == "let a = 1;\n"


def test_characters_that_mean_something_elsewhere_are_plain(tmp_path: Path) -> None:
    (tmp_path / "lib.rs").write_text("a.b(c)? /* $x \\1 */\n")
    (tmp_path / "own.edit").write_text("file: lib.rs\nfind: .b(c)?\nput: [$&] \\1 ${x}\nput: .*\n")

    assert apply(tmp_path, tmp_path, "own").returncode == 0
    assert (tmp_path / "lib.rs").read_text() == "a[$&] \\1 ${x}\n.* /* $x \\1 */\n"


def test_an_anchor_may_be_of_several_lines_and_a_file_may_be_new(tmp_path: Path) -> None:
    (tmp_path / "lib.rs").write_text("a;\nb;\na;\n\n    c;\n")
    (tmp_path / "own.edit").write_text(
        "file: lib.rs\nfind: a;\nfind: c;\nput: x;\nfile: new/one.rs\nnew: one\nnew:\nnew:   two\n"
    )
    (tmp_path / "new").mkdir()

    assert apply(tmp_path, tmp_path, "own").returncode == 0
    assert (tmp_path / "lib.rs").read_text() == "a;\nb;\nx;\n"
    assert (tmp_path / "new/one.rs").read_text() == "one\n\n  two\n"


@pytest.mark.parametrize("name", ["cpu", "gb10"])
def test_the_image_says_which_edits_are_in(render_tei: RenderTei, name: str) -> None:
    folder = render_tei(name) / "images/tei"
    dockerfile = (folder / "Dockerfile").read_text()

    names = [edit.name for edit in tei.every_edit(name)]
    assert ("cpu-speed" in names) == (name == "cpu")
    assert dockerfile.count(f"ARG TEI_EDITS={','.join(names)}\n") == 3
    assert f'DOCKER_LABEL="{name} edits=${{TEI_EDITS}}"' in dockerfile
    assert 'tei.edits="${TEI_EDITS}"' in dockerfile
    assert sorted(path.name for path in (folder / "patches").iterdir()) == sorted(
        ["apply.pl", *(f"{edit}.edit" for edit in names)]
    )


@pytest.mark.parametrize("answers", [{"tei_edits": False}, {"tei_edits": "no"}], ids=str)
def test_the_answer_turns_them_off(render_tei: RenderTei, answers: dict[str, object]) -> None:
    folder = render_tei("cpu", **answers)

    assert not (folder / "images/tei/patches").exists()
    dockerfile = (folder / "images/tei/Dockerfile").read_text()
    assert "edits" not in dockerfile.lower()
    assert 'DOCKER_LABEL="cpu"' in dockerfile
    assert "patches" not in (folder / "images/tei/kustomization.yaml").read_text()
    assert "patches" not in (folder / "k8s/build/job.yaml").read_text()


RELEASES = [
    pytest.param(release, id=f"{release['version']}-{release['commit'][:7]}")
    for release in tei.releases()
]


@pytest.mark.parametrize("release", RELEASES)
def test_a_known_release_is_built_unless_it_does_not_take_our_flags(
    render_tei: RenderTei, release: dict[str, object]
) -> None:
    if release["version"] in ("1.9.0", "1.9.1"):
        with pytest.raises(UserMessageError, match="does not take --auto-truncate") as refused:
            render_tei("gb10", tei_ref=release["commit"])
        assert str(refused.value).endswith("use 1.9.2 or newer.")
        return
    folder = render_tei("gb10", tei_ref=release["commit"]) / "images/tei"

    assert f"ARG TEI_REF={release['commit']}\n" in (folder / "Dockerfile").read_text()
    assert f"calls itself {release['calls_itself']}" in (folder / "README.md").read_text()


def test_every_flag_has_the_release_that_first_takes_it() -> None:
    given = set(re.findall(r'"(--[a-z-]+)"', (ROOT / "extensions/sizing.py").read_text()))

    assert given == set(tei.flags())
    assert tei.problem("0" * 40) is None


def test_a_release_that_nobody_knows_is_said_to_be_unknown(render_tei: RenderTei) -> None:
    readme = render_tei("cpu", tei_ref="0" * 40) / "images/tei/README.md"

    assert "Nothing is known here of that commit." in readme.read_text()


def test_statistics_are_turned_off_whether_the_release_knows_them_or_not(
    render_tei: RenderTei,
) -> None:
    assert tei.environment()["USAGE_STATS"] == "off"
    assert "USAGE_STATS=off" in (render_tei("cpu") / "images/tei/Dockerfile").read_text()
    deployment = ROOT / "template/{{objects_folder}}/base/deployment.yaml.jinja"
    for file in (deployment, ROOT / "template/compose.yaml.jinja"):
        assert "it.tei_environment.items()" in file.read_text()
