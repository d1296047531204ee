"""The rules of the house, enforced: who may import whom, what is installed, what the core needs."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = [
    "errors",
    "distributed",
    "files",
    "gradients",
    "scorers",
    "reference",
    "ledger",
    "callbacks",
    "models",
    "data",
    "curation",
    "cli",
]
STRANGERS = {"callbacks", "models", "data"}  # do not know each other
FILES = sorted((ROOT / "lightning_mimic").rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def rooms(path: Path) -> tuple[str, set[str]]:
    own = path.relative_to(ROOT / "lightning_mimic").parts[0].removesuffix(".py")
    used = {name.split(".")[1] for name in imports(path) if name.startswith("lightning_mimic.")}
    return own, used & set(ORDER) - {own}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_from_those_above_it(path):
    own, used = rooms(path)
    if own not in ORDER:  # the package's own front, which shows everything
        return
    assert all(ORDER.index(room) < ORDER.index(own) for room in used), used
    if own in STRANGERS:
        assert not used & STRANGERS


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_package_stays_where_it_belongs(path):
    own = path.relative_to(ROOT / "lightning_mimic").parts[0]
    tops = {name.split(".")[0] for name in imports(path)}
    if own in ("ledger", "curation", "gradients", "scorers", "reference"):
        assert not tops & {"lightning", "pytorch_lightning", "lightning_utilities"}
    if own == "ledger":
        assert "torch" not in tops
    if own in ("gradients", "scorers"):
        optional = {
            n for n, owners in OPTIONAL.items() if path.relative_to(ROOT / "lightning_mimic").as_posix() in owners
        }
        assert tops - optional <= {"torch", "lightning_mimic"} | set(sys.stdlib_module_names)
    if own != "cli":
        assert not tops & {"hydra", "omegaconf"}
    assert "pickle" not in tops or path.name == "read.py"


# The callbacks still have questions of their own.
ASKS = {"callbacks/plan.py", "callbacks/products.py", "callbacks/second_batch.py", "callbacks/step.py"}
ASKS |= {"callbacks/support.py"}
# Names that one file uses, and no other file of the package but those that are listed.
OWNED = {
    r"torch\.distributed|gather_all_tensors|\bdist\.|all_reduce|all_gather": {"distributed.py"} | ASKS,
    r"\bos\.(replace|rename|link|fsync)\b|\bfsync\b|shutil\.move|NamedTemporaryFile|\.tmp\b": {"files.py"},
}


@pytest.mark.parametrize("names", OWNED)
def test_ranks_are_asked_about_and_files_are_renamed_in_one_place(names):
    users = {p.relative_to(ROOT / "lightning_mimic").as_posix() for p in FILES if re.search(names, p.read_text())}
    assert users == OWNED[names]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_path_is_renamed_by_its_own_methods(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    methods = [call for call in calls if isinstance(call.func, ast.Attribute)]
    assert not [m.lineno for m in methods if m.func.attr in ("rename", "hardlink_to") or _renames(m)]


def _renames(call: ast.Call) -> bool:
    """Whether it may be ``Path.replace(target)``; ``str.replace`` has two arguments, ``dataclasses.replace`` names."""
    return call.func.attr == "replace" and len(call.args) == 1 and not call.keywords


def test_the_oracles_import_torch_only():
    tops = {name.split(".")[0] for name in imports(ROOT / "tests" / "oracles.py")}
    assert tops <= {"torch"} | set(sys.stdlib_module_names)


def test_every_room_is_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    there = {"lightning_mimic"} | {
        f"lightning_mimic.{p.parent.name}" for p in ROOT.glob("lightning_mimic/*/__init__.py")
    }
    assert listed == there | {"lightning_mimic.conf"}


def test_files_stay_readable():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in [*FILES, *ROOT.glob("tests/*.py")]}
    assert {name: n for name, n in lengths.items() if n > 310} == {}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_importing_needs_the_core_only(path):
    # Optional packages are imported within the one function or file that owns them.
    owners = {"curation/report.py": {"matplotlib"}, "cli/curate.py": {"rich"}}
    allowed = {"lightning", "lightning_utilities", "torch", "torchmetrics", "hydra", "omegaconf", "pyarrow"}
    allowed |= owners.get(path.relative_to(ROOT / "lightning_mimic").as_posix(), set()) | {"lightning_mimic"}
    tops = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            tops |= {name.split(".")[0] for name in names}
    assert tops <= allowed | set(sys.stdlib_module_names)


# Who may import what is optional at all, if only within a function.
OPTIONAL = {
    "duckdb": {"curation/database.py"},
    "snorkel": {"curation/label_model.py"},
    "sklearn": {"curation/filters.py", "data/digits.py"},
    "scipy": {"scorers/grad_match.py"},
    "rich": {"cli/curate.py"},
    "matplotlib": {"curation/report.py"},
    "safetensors": {"reference/read.py"},
    "torchvision": {
        "data/image_folder.py",
        "data/torchvision_sets.py",
        "data/transforms.py",
        "models/backbones.py",
    },
    "timm": {"data/transforms.py", "models/backbones.py"},
    "open_clip": {"models/zero_shot.py", "reference/pretrained.py"},
    "webdataset": {"data/shards.py"},
    "PIL": {"data/pairs.py", "data/labelled.py"},
}


@pytest.mark.parametrize("package", OPTIONAL)
def test_an_optional_package_has_its_owners(package):
    users = {p.relative_to(ROOT / "lightning_mimic").as_posix() for p in FILES if package in tops_of(p)}
    assert users == OPTIONAL[package]


def tops_of(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def reached(path: Path, seen: set[Path]) -> set[Path]:
    """All files of the package that importing one of them runs, without the package's front."""
    if path not in seen:
        seen.add(path)
        for name in imports(path):
            parts = name.split(".")
            for last in range(2, len(parts) + 1 if parts[0] == "lightning_mimic" else 0):
                there = ROOT.joinpath(*parts[:last])
                for file in (there / "__init__.py", there.with_suffix(".py")):
                    if file.exists():
                        reached(file, seen)
    return seen


@pytest.mark.parametrize(("room", "others"), [("curation", {"data/ids.py"}), ("ledger", set())])
def test_deciding_and_recording_reach_no_lightning_by_way_of_another_room(room, others):
    files = set().union(*(reached(path, set()) for path in FILES if path.parent.name == room))
    users = {p for p in files if tops_of(p) & {"lightning", "pytorch_lightning", "hydra"}}
    # A manifest picks samples of a data set with ids, whose batches know how to move to a device.
    assert {p.relative_to(ROOT / "lightning_mimic").as_posix() for p in users} == others


def test_the_front_does_not_open_the_picture_room():
    assert not any("report" in name for name in imports(ROOT / "lightning_mimic" / "curation" / "__init__.py"))
