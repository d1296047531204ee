"""Random inputs: a run says their seed, a failure repeats it, and the seed gives the same ones again."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # runs of pytest in processes of their own

INPUTS = """
import random

from hypothesis import given
from hypothesis import strategies as st

drawn = []


def test_own(run_seed):
    assert False, f"own {random.Random(run_seed).random()}"


@given(st.integers(0, 10**9))
def test_example(number):
    drawn.append(number)


def test_examples():
    assert len(drawn) in (100, 1000) and not drawn, f"examples {drawn[3:9]}"


def test_plain():
    pass
"""


def run(folder: Path, seed: str | None, profile: str = "ci", *options: str) -> tuple[str, list[str]]:
    """What a run of the tests above shows, and their inputs."""
    folder.mkdir()
    (folder / "test_inputs.py").write_text(INPUTS)
    shutil.copy(Path(__file__).with_name("conftest.py"), folder)
    given = os.environ | {"HYPOTHESIS_PROFILE": profile, "PYTHONPATH": str(Path(__file__).parent)}
    given.pop("MIMIC_TEST_SEED", None)
    given |= {} if seed is None else {"MIMIC_TEST_SEED": seed}
    how = ["-p", "no:cacheprovider", "--rootdir", str(folder), *options, str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *how], cwd=folder, env=given, capture_output=True, text=True, check=False
    )
    return done.stdout, re.findall(r"^E +AssertionError: (.*)$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("machine", [{}, {"CI": "true"}], ids=["developer", "ci"])
def test_a_seed_is_said_and_gives_the_same_inputs_again(machine, tmp_path, monkeypatch):
    monkeypatch.delenv("CI", raising=False)  # Hypothesis changes its defaults where this is set
    for name, value in machine.items():
        monkeypatch.setenv(name, value)
    shown, inputs = run(tmp_path / "a", None)
    assert "random inputs: MIMIC_TEST_SEED=0, Hypothesis profile ci" in shown
    assert "repeat with MIMIC_TEST_SEED=0" in shown
    assert len(inputs) == 2
    nights = [run(tmp_path / folder, "7", "nightly", "--hypothesis-seed=7") for folder in "bc"]
    assert "random inputs: MIMIC_TEST_SEED=7, Hypothesis profile nightly" in nights[0][0]
    assert "repeat with MIMIC_TEST_SEED=7" in nights[0][0]
    assert nights[0][1] == nights[1][1]
    assert all(a != b for a, b in zip(nights[0][1], inputs, strict=True))


def test_what_has_random_inputs_is_marked(tmp_path):
    shown, _ = run(tmp_path / "a", "3", "ci", "-m", "random", "--collect-only", "-q")
    assert [line.rpartition("::")[2] for line in shown.splitlines() if "::" in line] == ["test_own", "test_example"]
