"""Links of documentation pages to files outside docs/, which GitHub shows and the site does not have.

Pages link to each other and to the repository's files by relative paths, so that they work where the repository is
browsed. On the site, README.md, CONTRIBUTING.md and CHANGELOG.md are pages (``PAGES``), and every other file is a link
into the repository if its address is known (``repo_url`` in mkdocs.yml), and plain text otherwise.
"""

import posixpath
import re

#: Pages made of files of the repository's root, by the file.
PAGES = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing/index.md", "CHANGELOG.md": "changelog.md"}

_LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
_FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


def for_site(markdown: str, source: str, page: str, repository: str | None = None) -> str:
    r"""Return a page's text with links that hold on the site.

    Args:
        markdown: The text.
        source: Path of the file that it comes from, relative to the repository.
        page: Path of the page, relative to docs/.
        repository: Address of the repository, if known.

    Example:
        >>> for_site("See [scale](docs/guide/scale.md#cost).", "README.md", "readme.md")
        'See [scale](guide/scale.md#cost).'
        >>> for_site("[The table](../../setup.cfg)", "docs/formats/ledger.md", "formats/ledger.md")
        'The table'
    """

    def change(link: re.Match[str]) -> str:
        return _rewritten(link, source, page, repository)

    return "".join(part if part.startswith("```") else _LINK.sub(change, part) for part in _FENCE.split(markdown))


def _rewritten(link: re.Match[str], source: str, page: str, repository: str | None) -> str:
    target, anchor = link["target"], link["anchor"] or ""
    if "://" in target or target.startswith(("mailto:", "/")):
        return link[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if path in PAGES:
        path = f"docs/{PAGES[path]}"
    if path.startswith("docs/"):
        relative = posixpath.relpath(path, posixpath.dirname(f"docs/{page}"))
        return f"{link['picture']}[{link['text']}]({relative}{anchor})"
    return f"[{link['text']}]({repository.rstrip('/')}/blob/main/{path}{anchor})" if repository else link["text"]
