"""Docstrings as Markdown: examples as code, and Sphinx roles such as :class:`Ledger` as links where there is a page."""

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`(?:~(?P<path>[^`]*\.))?(?P<name>[^`]*)`")


def for_site(docstring: str) -> str:
    """Return a docstring that shows on the site as it was meant.

    Example:
        >>> for_site("Read a :class:`~lightning_mimic.Ledger` with :func:`read`.")
        'Read a <autoref optional identifier="lightning_mimic.Ledger"><code>Ledger</code></autoref> with `read`.'
    """
    return _EXAMPLE.sub("Examples:", _ROLE.sub(_name, docstring))


def _name(role: re.Match[str]) -> str:
    if role["path"] is None:
        return f"`{role['name']}`"
    path = f"{role['path']}{role['name'].rstrip('()')}"
    return f'<autoref optional identifier="{path}"><code>{role["name"]}</code></autoref>'


class Docstrings(griffe.Extension):
    """Rewrites the docstrings that mkdocstrings reads."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object (called by Griffe)."""
        if obj.docstring:
            obj.docstring.value = for_site(obj.docstring.value)
