"""Check that a tag, the package's version, CITATION.cff and the changelog name the same release.

python scripts/check_release.py v0.1.0
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """Return what keeps a tag from being released."""
    version = tag.removeprefix("v")
    found = []
    for name, pattern in (
        ("lightning_mimic/version.py", r'__version__ = "(.*)"'),
        ("CITATION.cff", r"version: (.*)"),
        ("CHANGELOG.md", r"## \[(\d.*)\] - \d{4}-\d\d-\d\d"),
    ):
        match = re.search(f"^{pattern}$", (root / name).read_text(), re.MULTILINE)
        if match is None or match[1] != version:
            found.append(f"{name} is at {match[1] if match else 'no release'}, the tag at {version}")
    return found


if __name__ == "__main__":
    sys.exit("\n".join(problems(sys.argv[1])))
