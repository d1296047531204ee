"""README.md, CONTRIBUTING.md and CHANGELOG.md as pages of the site (run by mkdocs-gen-files)."""

from pathlib import Path

import mkdocs_gen_files

from scripts.docs.links import PAGES, for_site

ROOT = Path(__file__).parents[2]

for source, page in PAGES.items():
    with mkdocs_gen_files.open(page, "w") as file:
        file.write(for_site((ROOT / source).read_text(), source, page))
    mkdocs_gen_files.set_edit_path(page, f"../{source}")
