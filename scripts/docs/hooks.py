"""Hooks of MkDocs: pages that are made when the site is built, and links that hold on the site."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from scripts.docs import api, commands
from scripts.docs.links import PAGES, for_site

ROOT = Path(__file__).parents[2]


def on_config(config: Any) -> Any:
    """Leave edit links out where the repository's address is not known."""
    if not config.repo_url:
        config.edit_uri = None
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pages of the API, of the commands, and of README.md, CONTRIBUTING.md and CHANGELOG.md."""
    for page, text in (api.pages() | commands.pages()).items():
        files.append(File.generated(config, page, content=text))
    for source, page in PAGES.items():
        file = File.generated(config, page, content=for_site((ROOT / source).read_text(), source, page))
        file.edit_uri = f"../{source}"
        files.append(file)
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Rewrite the links of a page of docs/ to files outside it, and colour commands as bash.

    The lexer of ``console`` expects a prompt before each command.
    """
    source = page.file.src_uri
    return for_site(markdown, f"docs/{source}", source, config.repo_url).replace("```console\n", "```bash\n")
