"""What can go wrong, as the user meets it: one sentence that says what is wrong and what to do.

The text of every error here is shown as it is, so it never holds a credential and never a line break.
"""

from __future__ import annotations


class TemplateError(Exception):
    """Base of all errors that are told to the user in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


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
