"""Docstrings as Markdown: examples as code, and Sphinx roles such as :class:`Ledger` as names."""

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`(?:~[^`]*\.)?([^`]*)`")


def for_site(docstring: str) -> str:
    """Return a docstring that shows on the site as it was meant.

    Example:
        >>> for_site("Read a :class:`~lightning_mimic.Ledger`.")
        'Read a `Ledger`.'
    """
    return _EXAMPLE.sub("Examples:", _ROLE.sub(r"`\1`", docstring))


class Docstrings(griffe.Extension):
    """Rewrites the docstrings that mkdocstrings reads."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object (called by Griffe)."""
        if obj.docstring:
            obj.docstring.value = for_site(obj.docstring.value)
