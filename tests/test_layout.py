"""The layout of the package: which room may import which, what importing a room loads, and what is installed."""

import ast
import configparser
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_mimic

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_mimic"
FILES = sorted(PACKAGE.rglob("*.py"))

#: Loaded by importing anything of the package.
FRONT = {"errors", "lazy", "version"}
BASE = FRONT | {"dataset_ids", "files", "random_streams", "stores"}
RECORDS = {"ledger", "manifest"}
PURE = BASE | {"batches", "distributed", "sharding", "gradients", "scorers", "reference"}
TABLES = {"user_files", "database", "tables"}
OFFLINE = BASE | RECORDS | TABLES
#: By room, a module or package directly in ``lightning_mimic``, those that it may import. A room may not exist yet.
MAY_IMPORT = {
    "version": set(),
    "errors": set(),
    "batches": set(),
    **{room: {"errors", "version"} for room in ("dataset_ids", "distributed", "lazy", "random_streams")},
    "stores": {"errors"},
    "files": {"errors", "version", "stores"},
    "user_files": {"errors", "files", "stores"},
    "database": {"errors", "files", "user_files"},
    "tables": {"errors", "files", "stores", "user_files", "database"},
    "sharding": {"errors", "distributed"},
    "gradients": PURE - {"gradients", "scorers", "reference"},
    "scorers": PURE - {"scorers", "reference"},
    "reference": PURE - {"reference"},
    "ledger": BASE,
    "manifest": BASE | TABLES,
    "reweighting": PURE | RECORDS,
    "trainer_package": set(),
    **{room: PURE | RECORDS | {"reweighting", "trainer_package"} for room in ("callbacks", "models")},
    "data": PURE | RECORDS | TABLES | {"reweighting", "trainer_package"},
    "metrics": OFFLINE | {"distributed"},
    "report": OFFLINE,
    "curation": OFFLINE | {"metrics", "report"},
}
MAY_IMPORT["cli"] = set(MAY_IMPORT)

#: What importing a room, with all its modules, may load of the large packages; a stage may load those before it, too.
STAGES = {
    "": [
        "",
        "version",
        "errors",
        "lazy",
        "dataset_ids",
        "stores",
        "files",
        "random_streams",
        *sorted(TABLES),
        "ledger",
        "manifest",
        "report",
        "curation",
    ],
    "torch": ["batches", "sharding"],
    "torchmetrics": ["distributed", "gradients", "scorers", "reference", "reweighting", "metrics"],
    "lightning.pytorch": ["trainer_package", "callbacks", "models", "data"],
    "hydra omegaconf": ["cli"],
}
LARGE = {"torch", "torchmetrics", "lightning", "pytorch_lightning", "hydra", "omegaconf", "duckdb", "snorkel"}

#: Files that may import an optional package, if only within a function.
OPTIONAL = {
    "duckdb": {"database.py"},
    "snorkel": {"curation/label_model.py"},
    "sklearn": {"curation/filters.py", "data/digits.py"},
    "scipy": {"scorers/grad_match.py"},
    "rich": {"cli/curate.py", "cli/progress.py", "cli/report.py"},
    "matplotlib": {"curation/plots.py"},
    "altair": {"report/charts.py"},
    "vl_convert": {"report/charts.py"},
    "jinja2": {"report/page.py"},
    "safetensors": {"reference/read_file.py"},
    "torchvision": {"data/image_folder.py", "data/torchvision_sets.py", "data/transforms.py", "models/backbones.py"},
    "timm": {"data/transforms.py", "models/backbones.py"},
    "open_clip": {"models/zero_shot.py", "reference/open_clip_hub.py"},
    "webdataset": {"data/shard_files.py", "data/shards.py"},
    "PIL": {"data/digit_pairs.py", "data/image_splits.py", "data/images.py", "data/labelled.py", "report/samples.py"},
}
TRAINERS = {"lightning", "pytorch_lightning"}
CORE = TRAINERS | {
    "torch",
    "torchmetrics",
    "yaml",
    "hydra",
    "omegaconf",
    "pyarrow",
    "filelock",
    "fsspec",
    "packaging",
    "lightning_mimic",
}
#: Names that one file uses, and no other file of the package but those that are listed.
OWNED = {
    r"torch\.distributed(?!\.checkpoint)|gather_all_tensors|\bdist\.|all_reduce|all_gather": {
        "distributed.py",
        "sharding.py",
    },
    r"\bmanual_seed|random\.seed\(|(default_rng|RandomState)\((?!stream_seed)": {"random_streams.py"},
    r"\bfsspec\.|url_to_fs": {"data/shard_files.py", "stores.py"},
    r"\bos\.(replace|rename|link|fsync)\b|\bfsync\b|shutil\.move|NamedTemporaryFile|\.tmp\b": {"files.py"},
}
#: Of the core's packages, those that a room's files may name at all; elsewhere all but Hydra's.
NAMED = {
    "gradients": {"torch", "lightning_mimic"},
    "scorers": {"torch", "lightning_mimic"},
    "reference": CORE - TRAINERS - {"hydra", "omegaconf"},
    "reweighting": CORE - TRAINERS - {"hydra", "omegaconf"},
    "ledger": {"pyarrow", "filelock", "lightning_mimic"},
    "manifest": {"pyarrow", "torch", "lightning_mimic"},
    "curation": CORE - TRAINERS - {"hydra", "omegaconf"},
    "cli": CORE,
}


def names_in(nodes: Iterator[ast.AST]) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            if node.module == "lightning_mimic":  # `from lightning_mimic import ledger` imports that room
                found |= {f"lightning_mimic.{alias.name}" for alias in node.names}
            else:
                found.add(node.module or "")
    return found


def imports(path: Path) -> set[str]:
    """All modules that a file imports, also within functions and for the type checker."""
    return names_in(ast.walk(ast.parse(path.read_text())))


def tops(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_a_room_imports_only_those_below_it():
    wrong = []
    for path in FILES:
        own = room_of(path)
        used = {name.split(".")[1] for name in imports(path) if name.startswith("lightning_mimic.")} - {own}
        if own == "__init__":  # the package's front, which shows everything
            continue
        if own not in MAY_IMPORT:
            wrong.append(f"{place(path)}: the room {own} is not in MAY_IMPORT")
        elif used - MAY_IMPORT[own]:
            wrong.append(f"{place(path)} imports {', '.join(sorted(used - MAY_IMPORT[own]))}")
    assert not wrong, "\n".join(wrong)


def modules_of(room: str) -> list[str]:
    if not room:
        return ["lightning_mimic"]
    name = f"lightning_mimic.{room}"
    if (PACKAGE / f"{room}.py").exists():
        return [name]
    return [name, *(each.name for each in pkgutil.iter_modules([str(PACKAGE / room)], f"{name}."))]


def reachable(room: str) -> set[str]:
    """The rooms that a room may import, and those that these may import."""
    direct = MAY_IMPORT[room] if room else FRONT
    return FRONT.union(direct, *(reachable(each) for each in direct))


#: Loads the large packages stage by stage and forks for every room, so that a room starts with these alone.
LOADER = """
import importlib, json, os, sys, traceback

def loaded(names):
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            for name in names:
                importlib.import_module(name)
            answer = sorted(sys.modules)
        except BaseException:
            answer = traceback.format_exc()
        with os.fdopen(write, "w") as file:
            json.dump(answer, file)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        answer = json.load(file)
    os.wait()
    return answer

found = {}
for packages, rooms in json.loads(sys.argv[1]):
    for package in packages.split():
        importlib.import_module(package)
    for room, names in rooms.items():
        found[room] = loaded(names)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_importing_a_room_loads_only_what_it_may():
    there = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}
    stages = [
        (packages, {room: modules_of(room) for room in rooms if not room or room in there})
        for packages, rooms in STAGES.items()
    ]
    done = subprocess.run(
        [sys.executable, "-c", LOADER, json.dumps(stages)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {""} | {room_of(path) for path in FILES} - {"__init__"}
    wrong, large = [], set()
    for packages, rooms in stages:
        large |= tops(set(packages.split()))
        for room in rooms:
            assert isinstance(found[room], list), f"{room or 'the front'} cannot be imported:\n{found[room]}"
            used = {name.split(".")[1] for name in found[room] if name.startswith("lightning_mimic.")} - {room}
            for name in sorted(used - reachable(room)) + sorted(tops(set(found[room])) & (LARGE - large)):
                wrong.append(f"importing {room or 'the front'} loads {name}")
    assert not wrong, "\n".join(wrong)


def test_a_file_imports_only_the_packages_that_are_its_own():
    wrong = []
    for path in FILES:
        own, tree = place(path), ast.parse(path.read_text())
        used = tops(imports(path)) - set(sys.stdlib_module_names)
        at_once = tops(names_in(iter(tree.body))) - set(sys.stdlib_module_names)
        optional = {name for name, owners in OPTIONAL.items() if own in owners}
        named = NAMED.get(room_of(path), CORE - {"hydra", "omegaconf"}) | optional
        wrong += [f"{own} imports {name}" for name in sorted(used & (CORE | set(OPTIONAL)) - named)]
        if room_of(path) in ("gradients", "scorers", "ledger"):
            wrong += [f"{own} imports {name}" for name in sorted(used - named)]
        # Optional packages are imported within a function, or in the one file that is of no use without them.
        here = {"curation/plots.py": {"matplotlib"}}.get(own, {"rich"} & optional)
        wrong += [f"{own} imports {name} at its top" for name in sorted(at_once - CORE - here)]
        if "pickle" in tops(imports(path)) and own not in (
            "reference/read_file.py",
            "reference/distributed_checkpoint.py",
        ):
            wrong.append(f"{own} imports pickle")
    unused = {
        (name, owner)
        for name, owners in OPTIONAL.items()
        for owner in owners
        if name not in tops(imports(PACKAGE / owner))
    }
    assert not wrong, "\n".join(wrong)
    assert not unused


def renames(call: ast.Call) -> bool:
    """Whether it is a method that renames a path, such as ``Path.replace(target)``.

    ``str.replace`` has two arguments, ``dataclasses.replace`` names.
    """
    if not isinstance(call.func, ast.Attribute):
        return False
    alone = len(call.args) == 1 and not call.keywords
    return call.func.attr in ("rename", "hardlink_to") or (call.func.attr == "replace" and alone)


def test_ranks_are_asked_about_and_files_are_renamed_in_one_place():
    for names, owners in OWNED.items():
        users = {place(path) for path in FILES if re.search(names, path.read_text())}
        assert users == owners, names
    calls = [(path, node) for path in FILES for node in ast.walk(ast.parse(path.read_text()))]
    wrong = [f"{place(path)}:{node.lineno}" for path, node in calls if isinstance(node, ast.Call) and renames(node)]
    assert not wrong, f"a path is renamed by its own method: {', '.join(wrong)}"


def test_the_oracles_import_torch_only():
    assert tops(imports(ROOT / "tests" / "oracles.py")) <= {"torch"} | set(sys.stdlib_module_names)


def test_no_test_module_is_imported_by_another_file():
    files = sorted((ROOT / "tests").rglob("*.py"))
    names = {path.stem for path in files if path.name.startswith("test_")}
    wrong = {path.name: sorted(tops(imports(path)) & names) for path in files if tops(imports(path)) & names}
    assert not wrong, f"what tests share belongs in tests/support/: {wrong}"


def test_every_room_is_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    there = {f"lightning_mimic.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")}
    assert listed == there | {"lightning_mimic", "lightning_mimic.conf"}


def test_lazy_fronts_show_what_they_declare():
    fronts = [path for path in FILES if path.name == "__init__.py" and "lazy_front(" in path.read_text()]
    assert {place(path) for path in fronts} >= {"__init__.py", "curation/__init__.py", "metrics/__init__.py"}
    for path in fronts:
        name = ".".join(path.parent.relative_to(ROOT).parts)
        front = importlib.import_module(name)
        tree = ast.parse(path.read_text())
        (block,) = (node for node in tree.body if isinstance(node, ast.If))
        typed = {
            alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        (call,) = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
        lazy = {each: module for module, names in ast.literal_eval(call.args[1]).items() for each in names}
        assert lazy == typed, f"{place(path)}: the type checker sees other names than are imported"
        assert set(front.__all__) == set(lazy) | set(front.__all__) & {"__version__"}, place(path)
        for each, module in lazy.items():
            assert getattr(front, each) is getattr(importlib.import_module(module), each)
        modules = {each.name for each in pkgutil.iter_modules(front.__path__)}
        assert not modules & set(lazy), f"{place(path)}: importing a module of that name would replace the name"
        assert set(front.__all__) | modules <= set(dir(front))
        for module in modules - {"report"}:
            assert getattr(front, module) is sys.modules[f"{name}.{module}"]


def test_a_misspelt_name_is_told_the_nearest_ones():
    with pytest.raises(AttributeError, match=r"^module 'lightning_mimic' has no attribute 'GradMimik'; nearest: 'Grad"):
        lightning_mimic.GradMimik  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'curatee'"):
        from lightning_mimic.curation import curatee  # noqa: F401
