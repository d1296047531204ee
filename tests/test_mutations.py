"""The mutation check: its list fits the code, and its runner tells a caught fault from one that survives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MUTATIONS = Path(__file__).parent / "mutations"
CODE = "def larger(a, b):\n    return a if a > b else b\n"
TEST = "from toy import larger\n\n\ndef test_larger():\n    assert larger(2, 1) == larger(1, 2) == 2\n"


def run(*arguments):
    command = [sys.executable, str(MUTATIONS / "run.py"), *map(str, arguments)]
    quick = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | quick)


def write_list(root, **mutations):
    """Write a list of mutations: name to what is replaced and by what."""
    entries = [
        {"name": name, "file": "toy/__init__.py", "old": old, "new": new, "tests": ["tests/test_toy.py"]}
        for name, (old, new) in mutations.items()
    ]
    lines = ["[[mutation]]\n" + "".join(f"{key} = {json.dumps(each[key])}\n" for key in each) for each in entries]
    (root / "tests" / "mutations" / "mutations.toml").write_text("\n".join(lines))


@pytest.fixture
def root(tmp_path):
    """A checkout with a package of one function, one test of it, and mutations."""
    root = tmp_path / "checkout"
    (root / "toy").mkdir(parents=True)
    (root / "toy" / "__init__.py").write_text(CODE)
    (root / "tests" / "mutations").mkdir(parents=True)
    (root / "tests" / "test_toy.py").write_text(TEST)
    broken = ("def larger", "import nowhere\n\n\ndef larger")
    write_list(root, is_caught=("a > b", "a < b"), is_survived=("a > b", "a >= b"), broken=broken)
    subprocess.run(["git", "init", "--quiet", root], check=True)
    return root


def test_every_snippet_occurs_once_and_every_test_file_is_there():
    done = run("--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_caught_fault_is_told_from_one_that_survives_and_from_one_that_no_test_could_miss(root, tmp_path):
    done = run("--root", root, "--only", "is_", "--out", tmp_path / "results.json")
    assert done.returncode == 1, done.stdout + done.stderr
    first, second = json.loads((tmp_path / "results.json").read_text())["mutations"]
    assert (first["outcome"], first["by"], first["line"]) == ("caught", "tests/test_toy.py::test_larger", 2)
    assert (second["outcome"], second["by"]) == ("survived", "")
    done = run("--root", root, "--only", "broken")
    assert (done.returncode, "not collected" in done.stdout) == (2, True)
    assert (root / "toy" / "__init__.py").read_text() == CODE


def test_a_snippet_that_occurs_more_than_once_is_an_error(root):
    write_list(root, twice=("larger(a", "smaller(a"), unfit=("b", "c"))
    done = run("--root", root)
    assert done.returncode == 2
    assert "unfit: the snippet occurs 3 times in toy/__init__.py" in done.stdout


def test_a_generated_fault_that_survives_is_recorded(root, tmp_path):
    done = run("--root", root, "--random", 2, "--seed", 5, "--out", tmp_path / "results.json")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    (only,) = results["mutations"]  # there is one place
    found = [only[key] for key in ("file", "line", "old", "new", "outcome")]
    assert [results["seed"], *found] == [5, "toy/__init__.py", 2, "a > b", "a >= b", "survived"]
