"""Text of users and of the registry, written so that it stays text in the language around it."""

from __future__ import annotations

import json
import re
import shlex

_YAML_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
_MARKDOWN = re.compile(r"([\\`*_\[\]<>#!|~$&@]|/(?=/)|(?<=www)\.)", re.IGNORECASE)
"""Characters that mean something, and those by which GitHub makes links of bare addresses."""

_LINE_START = re.compile(r"^(\s*)([-+=]|\d+[.)])")


def yaml_text(text: object) -> str:
    """A double-quoted scalar, which YAML and JSON read alike."""
    quoted = json.dumps(str(text), ensure_ascii=False)
    # YAML allows fewer characters than JSON (YAML 1.2, 5.1); those that it lacks are escaped.
    escapes = {c: f"\\u{ord(c):04x}" if ord(c) < 1 << 16 else f"\\U{ord(c):08x}" for c in quoted}
    return "".join(c if c.isprintable() else escapes[c] for c in quoted)


def yaml_name(name: object) -> str:
    """A scalar, plain where every YAML reads it as text: `no` and `2024-01-01` are quoted."""
    text = str(name)
    plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9./_-]*", text)
    return text if plain and text.lower() not in _YAML_WORDS else yaml_text(text)


def markdown_text(text: object) -> str:
    """Inline Markdown that shows the text as it is, at the start of a line too."""
    escaped = _MARKDOWN.sub(r"\\\1", str(text))
    return _LINE_START.sub(lambda m: m[1] + m[2][:-1] + "\\" + m[2][-1], escaped)


def markdown_code(text: object) -> str:
    """A code span of a Markdown table that shows the text as a JSON string."""
    quoted = yaml_text(text).replace("|", r"\|")
    ticks = max((len(run) for run in re.findall("`+", quoted)), default=0)
    fence = "`" * (ticks + 1)
    return f"{fence} {quoted} {fence}" if ticks else f"{fence}{quoted}{fence}"


def shell_text(text: object) -> str:
    """One word of a POSIX shell."""
    return shlex.quote(str(text))


def argument_text(text: object) -> str:
    """An argument of a container in YAML: Kubernetes and Compose fill in what follows a `$`."""
    return yaml_text(str(text).replace("$", "$$"))


def unit_text(text: object) -> str:
    """A word of a line in a unit of systemd, which fills in what follows a `%` or a `$`."""
    return yaml_text(str(text).replace("%", "%%").replace("$", "$$"))


def without_credentials(url: object) -> str:
    """A template's URL without login and query: Copier stores it as it was typed.

    The user of an SSH address stays: it is no secret, and nothing can be cloned without it.
    """
    scheme, separator, rest = str(url).partition("://")
    if not separator:
        return str(url)
    address = re.split(r"[?#]", rest)[0]
    authority, slash, path = address.partition("/")
    login, at, host = authority.rpartition("@")
    user = login.partition(":")[0] + at if "ssh" in scheme.lower() else ""
    return f"{scheme}://{user}{host}{slash}{path}"
