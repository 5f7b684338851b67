"""What can go wrong, as the user meets it: one sentence that says what is wrong and what to do.

The text of every error here is shown as it is, so it never holds a credential and never a line break.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import unquote_plus

LONGEST = 500
"""Characters of one line for a person."""


def one_line(text: object, longest: int = LONGEST) -> str:
    """Text that cannot break a line, move a terminal's cursor or fill a screen.

    What is too long loses its middle: errors begin with what is wrong and end with what to do.
    """
    said, some, end = str(text), 50 * longest, longest // 3
    if len(said) > 2 * some:
        said = said[:some] + said[-some:]
    line = " ".join("".join(c if c.isprintable() else " " for c in said).split())
    return line if len(line) <= longest else f"{line[: longest - end - 3]} … {line[-end:]}"


def repeats(text: str, secrets: Iterable[str | None]) -> bool:
    """Whether a server's text holds one of these, as it was or as a form has it."""
    return any(s and (s in text or s in unquote_plus(text)) for s in secrets)


class TemplateError(Exception):
    """Base of all errors that are told to the user in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConfigurationError(TemplateError):
    """An answer, an environment variable or a pin is not what it must be."""


class NotFoundError(TemplateError):
    """The registry has no such model, version, alias or file."""


class DeniedError(TemplateError):
    """The registry or its identity provider refused the credentials."""


class UnreachableError(TemplateError):
    """The registry did not answer, or not as MLflow does. Trying again may help."""


class UnsuitableModelError(TemplateError):
    """The model exists, but TEI cannot serve it as it is."""
