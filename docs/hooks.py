"""What the documentation's site takes from elsewhere: the answers from copier.yml, links to the sources."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the page of answers, which is never written by hand."""
    files.append(File.generated(config, "answers.md", content=answers()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Links that leave docs/ go to the repository."""
    base = f"{config.repo_url}blob/main/"
    return re.sub(r"\]\(\.\./([^)]*)\)", rf"]({base}\1)", markdown)


def answers() -> str:
    """Every question of copier.yml that is an answer of a person's, as a Markdown page."""
    questions: dict[str, Any] = yaml.safe_load((ROOT / "copier.yml").read_text())
    rows = []
    for name, question in questions.items():
        if name.startswith("_") or not isinstance(question, dict) or "help" not in question:
            continue
        rows.append(f"## `{name}`\n\n{shown(question['help'])}\n\n{details(question)}")
    return (
        "# Answers\n\nWhat `copier copy` asks, in its order; `--data name=value` answers without asking. "
        "What is computed from other answers is told as copier.yml has it.\n\n" + "\n\n".join(rows)
    )


def details(question: dict[str, Any]) -> str:
    """Default, choices and when it is asked."""
    lines = [f"- Default: {code(question.get('default', 'none'))}"]
    choices = question.get("choices")
    if isinstance(choices, dict):
        lines.append("- One of:\n" + "\n".join(f"    - `{v}`: {k}" for k, v in choices.items()))
    elif isinstance(choices, list):
        lines.append("- One of: " + ", ".join(f"`{v}`" for v in choices))
    if question.get("multiselect"):
        lines.append("- Any number of them")
    for key, says in (("when", "Exists when"), ("ask", "Asked when")):
        if key in question:
            lines.append(f"- {says}: {code(question[key])}")
    return "\n".join(lines)


def shown(text: object) -> str:
    """A question's words; what is computed in them stays visible as such."""
    return re.sub(r"\{\{ *(.*?) *\}\}", r"`\1`", str(text))


def code(value: object) -> str:
    """A value as code, without Copier's braces."""
    text = "no" if value is False else "yes" if value is True else str(value)
    text = re.sub(r"\{\{ *(.*?) *\}\}", r"\1", text) if value not in ("", [], None) else "empty"
    return f"`{text}`"
