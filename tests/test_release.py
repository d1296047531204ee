"""A release is refused unless tag, version, citation and changelog agree."""

import pytest

from lightning_mimic.version import __version__
from scripts.check_release import ROOT, problems
from support.cases import for_each

FILES = {
    "lightning_mimic/version.py": '__version__ = "1.2.3"\n',
    "CITATION.cff": "cff-version: 1.2.0\nversion: 1.2.3\n",
    "CHANGELOG.md": "# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2027-01-31\n\n## [1.2.2] - 2026-12-01\n",
}


@pytest.fixture
def root(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_what_agrees_is_released(root):
    assert problems("v1.2.3", root) == []


@for_each(("name", "old", "new"), [
    ("lightning_mimic/version.py", "1.2.3", "1.2.4"),
    ("CITATION.cff", "1.2.3", "1.2.2"),
    ("CHANGELOG.md", "## [1.2.3] - 2027-01-31\n", ""),
])  # fmt: skip
def test_what_disagrees_is_named(name, old, new, root):
    (root / name).write_text(FILES[name].replace(old, new))
    (problem,) = problems("v1.2.3", root)
    assert problem.startswith(f"{name} is at 1.2.")
    assert problem.endswith("the tag at 1.2.3")
    (root / name).write_text(FILES[name])


def test_the_citation_has_the_packages_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
