"""Text of the registry in every field that a pin has, and every file that is rendered from it."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from extensions import catalog, texts
from tests.conftest import Render, pinned

MARK = "MARK7"
"""In every hostile text, so that it is found again wherever it went."""

HOSTILE = {
    "html": f"</td><img src=//evil.example/{MARK}.png onerror=alert(1)><!--",
    "table": f"a | {MARK} |",
    "link": f"[x](http://evil.example/{MARK}) ![y](//evil.example/{MARK})",
    "bare": f"http://evil.example/{MARK} www.evil.example/{MARK} x@evil.example {MARK}",
    "code": f"`` ` {MARK} ``` ~~~",
    "compose": f"${{AWS_SECRET_ACCESS_KEY}} $HOME $$ {MARK} $(API_KEY)",
    "yaml": f"{MARK}: - \"'}} ]&a *b !!python/object:os.system #",
    "jinja": f"{{{{ 7 * 7 }}}}{{% raw %}}{{# {MARK} #}}",
    "shell": f"'; touch /tmp/{MARK}; $(id) `id` \\",
    "make": f"$(shell touch /tmp/{MARK}) \\",
    "heading": f"# {MARK}",
    "list": f"- {MARK}",
    "entity": f"&lt;{MARK}&#x202e;",
}


def hostile_pin(kind: str) -> dict[str, Any]:
    """A pin with hostile text wherever a pin takes text that no pattern narrows.

    kind: of the text where there is one alone; the lists have them all.
    """
    pin = pinned("BAAI/bge-base-en-v1.5")
    every = list(HOSTILE.values())
    prompts = {text: text for text in every} | {f"a\nb {t}": f"{t}\n```\n{t}" for t in every}
    one = HOSTILE[kind]
    facts = {**pin["facts"], "class_name": one, "license": one, "prompts": prompts}
    folders = [re.sub(r"[/\\]", "_", text).strip(". ") for text in every]
    files = [{"path": f"{f}/x.json", "from": f"{f}/x.json", "size": 1} for f in folders]
    uri = f"s3://mlflow/{re.sub(r'[?#]', '_', one)}"
    return pin | {
        "facts": facts,
        "files": [*pin["files"], *files],
        "artifact_uri": uri,
        "remarks": every,
    }


@pytest.mark.parametrize(
    ("kind", "answers"),
    [
        ("html", {}),
        ("table", {"platform": "thinkube"}),
        ("link", {"ci": "github", "gitops": "argocd", "environments": "staging production"}),
        (
            "heading",
            {"ci": "gitlab", "gitops": "flux", "environments": "a b c", "tei_image": "official"},
        ),
    ],
)
def test_registry_text_is_inert_in_every_file(
    render: Render, kind: str, answers: dict[str, str]
) -> None:
    project = render(
        pin=hostile_pin(kind),
        model_id="BAAI/bge-base-en-v1.5",
        accelerator="gb10",
        components=["monitoring", "network-policy", "api-key", "gateway", "ingress"],
        program=False,
        **answers,
    )

    met = set()
    for path in sorted(p for p in project.rglob("*") if p.is_file()):
        content = path.read_text()
        if MARK not in content:
            continue
        met.add(path.name)
        if path.suffix == ".md":
            assert_markdown_is_inert(content)
            continue
        if path.suffix == ".html":  # in a block that browsers read as data, to its end tag
            start, end = '<script type="application/json" id="rendered">', "</script>"
            before, _, rest = content.partition(start)
            content, _, after = rest.partition(end)
            assert MARK not in before + after
            assert set(HOSTILE.values()) <= set(leaves(json.loads(content)))
            continue
        if path.name == "NOTICE":  # plain text that nothing acts on: the licence stays in its line
            marked = [line for line in content.splitlines() if MARK in line]
            assert len(marked) == 1
            assert marked[0].startswith("- the model ")
            continue
        # No other file has a place for it; one that gets one is looked at here first.
        assert path.suffix in (".yml", ".json"), path
        said = leaves(json.loads(content) if path.suffix == ".json" else yaml.safe_load(content))
        assert set(HOSTILE.values()) <= set(said)
    assert met == {"README.md", ".copier-answers.yml", "pin.json", "index.html", "NOTICE"}
    assert not Path(f"/tmp/{MARK}").exists()


def test_arguments_reach_tei_as_they_are(render: Render) -> None:
    """Kubernetes fills in $(NAME), Compose ${NAME} and $NAME; $$ is one $ for both."""
    project = render(pin=pinned("BAAI/bge-base-en-v1.5"), model_id="BAAI/bge-base-en-v1.5")
    source = (project / "compose.yaml").read_text()
    assert "--served-model-name=" in source
    for text in HOSTILE.values():
        scalar = yaml.safe_load(texts.argument_text(text))
        assert re.sub(r"\$\$", "$", scalar) == text
        assert not re.search(r"(?<!\$)(\$\$)*\$(?!\$)", scalar)


def leaves(value: Any) -> list[str]:
    """All texts of a document, the keys too."""
    if isinstance(value, dict):
        return [leaf for item in value.items() for v in item for leaf in leaves(v)]
    if isinstance(value, list):
        return [leaf for v in value for leaf in leaves(v)]
    return [str(value)]


def assert_markdown_is_inert(markdown: str) -> None:
    """As GitHub reads it: what holds the mark is text or code; no HTML, image or link came of it."""
    usual = MarkdownIt("gfm-like", {"html": True})
    active = []

    def walk(tokens: list[Token]) -> None:
        for token in tokens:
            if token.children:
                walk(token.children)
            elif token.type not in ("text", "text_special", "code_inline", "fence", "inline"):
                active.append((token.type, token.content, str(token.attrs)))

    walk(usual.parse(markdown))
    for kind, content, attributes in active:
        assert MARK not in content + attributes, kind
        assert "evil" not in content + attributes, kind
    headings = re.findall(rf"^#+ .*{MARK}", markdown, re.MULTILINE)
    assert not headings


def test_every_text_of_the_catalogue_is_shown_as_it_is(render: Render) -> None:
    """The escapes are no harm to honest text."""
    model = next(m for m in catalog.load().values() if m.facts.license)
    readme = (render(pin=pinned(model.model_id), model_id=model.model_id) / "README.md").read_text()
    shown = MarkdownIt("gfm-like").render(readme)
    assert f"licence {model.facts.license}" in shown


@pytest.mark.parametrize("text", HOSTILE.values())
def test_markdown_text_reads_as_it_was(text: str) -> None:
    rendered = MarkdownIt("gfm-like", {"html": True}).render(f"{texts.markdown_text(text)}\n")
    bare = re.sub(r"</?p>", "", rendered).strip()
    assert html.unescape(bare) == " ".join(text.split()) or "\\" in text
    assert_markdown_is_inert(texts.markdown_text(text))


def test_a_hostile_pin_leaves_a_log_of_plain_lines(tmp_path: Path) -> None:
    """What model-fetch says of such a pin, where its store does not answer."""
    (tmp_path / "pin.json").write_text(json.dumps(hostile_pin("html")))
    program = Path(__file__).parent.parent / "template/images/model-fetch"
    places = ["--cache", str(tmp_path / "c"), "--link", str(tmp_path / "m"), "--termination-log="]
    done = subprocess.run(
        [sys.executable, "-m", "model_fetch", "--pin", str(tmp_path / "pin.json"), *places],
        cwd=program, capture_output=True, text=True, timeout=60,
        env={"PATH": "/usr/bin:/bin", "AWS_EC2_METADATA_DISABLED": "true"},
    )  # fmt: skip
    assert done.returncode not in (0, 70)
    assert all(line.isprintable() for line in done.stderr.splitlines())
