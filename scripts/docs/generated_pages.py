"""Pages that are made when the site is built (run by mkdocs-gen-files).

They are README.md, CONTRIBUTING.md and CHANGELOG.md with links that hold on the site, the API and the commands.
"""

from pathlib import Path

import mkdocs_gen_files

from scripts.docs import api, commands
from scripts.docs.links import PAGES, for_site

ROOT = Path(__file__).parents[2]

made = {page: for_site((ROOT / source).read_text(), source, page) for source, page in PAGES.items()}
made |= api.pages() | commands.pages()
for page, text in made.items():
    with mkdocs_gen_files.open(page, "w") as file:
        file.write(text)
for source, page in PAGES.items():
    mkdocs_gen_files.set_edit_path(page, f"../{source}")
