"""Text of users and of the registry, written so that it stays text in the language around it."""

from __future__ import annotations

import json
import re
import shlex

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#+!|~$&-])")


def yaml_text(text: object) -> str:
    """A double-quoted scalar, which YAML and JSON read alike."""
    quoted = json.dumps(str(text), ensure_ascii=False)
    # YAML allows fewer characters than JSON (YAML 1.2, 5.1); those that it lacks are escaped.
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in quoted)


def markdown_text(text: object) -> str:
    """Inline Markdown that shows the text as it is."""
    return _MARKDOWN.sub(r"\\\1", str(text))


def shell_text(text: object) -> str:
    """One word of a POSIX shell."""
    return shlex.quote(str(text))


def without_credentials(url: object) -> str:
    """A URL without user and password: Copier stores its template's URL as it was typed."""
    return re.sub(r"^([a-z+]+://)[^/@]*@", r"\1", str(url))
