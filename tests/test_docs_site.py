"""The generated pages of the documentation: every public name, every command and every setting is on one."""

import importlib
import re

import pytest

from lightning_mimic.cli.conf_comments import read_conf
from scripts.docs import api, commands
from scripts.docs.docstrings import for_site as docstring_for_site
from scripts.docs.links import for_site
from support.configs import CONF, ROOT

PACKAGES = ["lightning_mimic"]
PACKAGES += sorted(f"lightning_mimic.{path.parent.name}" for path in (ROOT / "lightning_mimic").glob("*/__init__.py"))
API, COMMANDS = api.pages(), commands.pages()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_on_its_page(package):
    names = getattr(importlib.import_module(package), "__all__", [])
    page = API.get("api/index.md" if package == "lightning_mimic" else f"api/{package.rpartition('.')[2]}.md", "")
    documented = re.findall(rf"^## ::: {re.escape(package)}\.(?:\w+\.)*(\w+)$", page, re.MULTILINE)
    linked = re.findall(r"^\| \[`(\w+)`\]", page, re.MULTILINE)
    assert sorted([*documented, *linked]) == sorted(names)


def test_a_name_is_documented_once():
    there = [each for page in API.values() for each in re.findall(r"^## ::: (\S+)\.(\w+)$", page, re.MULTILINE)]
    objects = [getattr(importlib.import_module(module), name) for module, name in there]
    assert len({id(each) for each in objects}) == len(objects)


def test_every_command_has_a_page_with_examples():
    for name in commands._entry_points():
        page = COMMANDS[f"commands/{name}.md"]
        assert re.search(rf"```console\n(.*\n)*?{name}", page), name


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.relative_to(CONF).as_posix())
def test_every_setting_is_on_a_page(path):
    group = path.relative_to(CONF).parts[0]
    root = path.parent == CONF
    page = COMMANDS[f"commands/{'mimic-' + path.stem.replace('_', '-') if root else group}.md"]
    inner = "" if root or group in commands.GLOBAL else path.parent.relative_to(CONF).as_posix().replace("/", ".") + "."
    for each in read_conf(path).settings:
        assert f"| `{inner}{each.key}` |" in page


@pytest.mark.parametrize(
    ("markdown", "source", "page", "want"),
    [
        ("[a](docs/guide/ids.md#x)", "README.md", "readme.md", "[a](guide/ids.md#x)"),
        ("![a](docs/images/a.png)", "README.md", "readme.md", "![a](images/a.png)"),
        ("[a](../../CHANGELOG.md)", "docs/guide/ids.md", "guide/ids.md", "[a](../changelog.md)"),
        ("[a](CONTRIBUTING.md#b)", "README.md", "readme.md", "[a](contributing/index.md#b)"),
        ("[a](../../setup.cfg)", "docs/guide/ids.md", "guide/ids.md", "a"),
        ("[a](https://arxiv.org)", "README.md", "readme.md", "[a](https://arxiv.org)"),
        ("```\n[a](setup.cfg)\n```", "README.md", "readme.md", "```\n[a](setup.cfg)\n```"),
        ("[a](ids.md)", "docs/guide/losses.md", "guide/losses.md", "[a](ids.md)"),
    ],
)
def test_links_hold_on_the_site(markdown, source, page, want):
    assert for_site(markdown, source, page) == want


def test_links_to_other_files_lead_to_the_repository_where_it_is_known():
    link = for_site("[a](../../setup.cfg)", "docs/guide/ids.md", "guide/ids.md", "https://example.org/repository/")
    assert link == "[a](https://example.org/repository/blob/main/setup.cfg)"


def test_docstrings_become_markdown():
    text = "Read a :class:`~lightning_mimic.Ledger` or :func:`read`.\n\nExample:\n    >>> 1\n    1"
    link = '<autoref optional identifier="lightning_mimic.Ledger"><code>Ledger</code></autoref>'
    assert docstring_for_site(text) == f"Read a {link} or `read`.\n\nExamples:\n    >>> 1\n    1"
