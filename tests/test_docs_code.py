"""The code of README.md and of every page of docs/ runs as it is written, in an empty folder, in order, twice.

Trainings that take minutes are cut short (``SHORTER``); their command lines are what the page says.
"""

import re
import warnings
from pathlib import Path

import pytest

from lightning_mimic.gradients import layer_rules
from support.pages import ROOT, blocks, run_page

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: Pages whose code is tried elsewhere.
ELSEWHERE = {
    "docs/datacomp.md": "tests/test_datacomp_page.py",
    "docs/guide/compatibility.md": "scripts/compatibility/__main__.py",
}
#: What a block may need that a test has not.
NEEDS = {
    "needs a checkout, and installs packages",
    "needs a checkpoint with several state dicts",
    "needs a package that no extra brings",
    "needs a network",
    "needs an interrupted run",
    "needs an object store",
    "needs hours",
    "needs several machines",
    "needs tables of other programs",
    "needs the loop around it",
    "needs two free cores for half a minute",
    "needs your images",
}
#: Words that are added to the trainings of a page.
SHORTER = {
    "docs/start/first-run.md": ["trainer.max_epochs=10"],
    "docs/start/own-images.md": ["trainer.max_epochs=12"],
    "docs/start/image-text.md": ["trainer.max_epochs=3", "++trainer.limit_val_batches=0"],
}
#: What a page prints, as the page does not show it itself.
PRINTED = {
    "docs/contributing/extending.md": ["tensor([ 1.6667, -0.2000])", "tensor([0.7500, 0.2500])", "torch.Size([5])"],
    "docs/contributing/recipes.md": ["tensor([0.1000, 2.0000])"],
    "docs/formats/manifest.md": ["[0, 2]"],
    "docs/guide/parameters.md": ["['head.weight']"],
    "docs/guide/references.md": ["compatible", "unrelated"],
}
LANGUAGES = {"python", "console", "diff", "text", "yaml", "json"}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def runs(page: Path, kind: str) -> bool:
    return name(page) not in ELSEWHERE and any(each.kind == kind and not each.not_run for each in blocks(page))


TRAINING = [page for page in PAGES if runs(page, "console") or (runs(page, "python") and ".fit(" in page.read_text())]
OTHERS = [page for page in PAGES if runs(page, "python") and page not in TRAINING]


def run_twice(page, folder, monkeypatch):
    monkeypatch.setattr(layer_rules, "_REGISTERED", {})
    here = folder / "empty"
    here.mkdir()
    monkeypatch.chdir(here)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and loggers
        for turn in range(2):
            run_page(page, folder / f"state{turn}", SHORTER.get(name(page), []))
            layer_rules._REGISTERED.clear()


@pytest.mark.parametrize("page", OTHERS, ids=name)
def test_the_code_runs(page, tmp_path, monkeypatch, capsys):
    run_twice(page, tmp_path, monkeypatch)
    if name(page) in PRINTED:
        assert capsys.readouterr().out.splitlines() == 2 * PRINTED[name(page)]


@pytest.mark.slow
@pytest.mark.parametrize("page", TRAINING, ids=name)
def test_the_trainings_run(page, tmp_path, monkeypatch):
    run_twice(page, tmp_path, monkeypatch)


def test_only_what_needs_something_else_is_not_run():
    reasons = {each.not_run for page in PAGES for each in blocks(page) if each.not_run}
    assert reasons == NEEDS


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_has_a_known_language(page):
    text = page.read_text()
    fences = re.findall(r"^ *```(.*)$", text, re.MULTILINE)
    assert len(fences) % 2 == 0
    assert set(fences[::2]) <= LANGUAGES | {""}
    assert len(re.findall("<!-- not run", text)) == sum(bool(each.not_run) for each in blocks(page))


def test_pages_that_are_tried_elsewhere_are_there():
    assert all((ROOT / path).exists() for pair in ELSEWHERE.items() for path in pair)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name in ("README.md", "CONTRIBUTING.md")], ids=name)
def test_links_and_make_targets_are_there(page):
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert [link for link in links if not (ROOT / link).exists()] == []
    makefile = (ROOT / "Makefile").read_text()
    assert [target for target in re.findall(r"`make ([\w-]+)", text) if f"\n{target}:" not in makefile] == []
