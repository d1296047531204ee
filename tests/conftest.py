"""Settings of a test run: one thread per process, the slow files first, random inputs that can be repeated.

Random inputs are the same in every run, or new ones in a nightly run, with their seed in the report.
"""

import os
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.database import DirectoryBasedExampleDatabase

# Set before torch is imported, and inherited by the processes that tests start: on tensors this small, more threads
# only wait for each other and for those of the other workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest.register_assert_rewrite("support")

FOUND = Path(__file__).parent.parent / "outputs" / "nightly" / "hypothesis"
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
# On CI machines Hypothesis derandomizes by default, so a nightly run has to say that it does not.
settings.register_profile(
    "nightly",
    derandomize=False,
    max_examples=1000,
    deadline=None,
    print_blob=True,
    database=DirectoryBasedExampleDatabase(FOUND),
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

SEED = "MIMIC_TEST_SEED"


def seed_of_the_run() -> int:
    return int(os.environ.get(SEED, "0"))


@pytest.fixture
def run_seed() -> int:
    """Seed of a test's random inputs: MIMIC_TEST_SEED, by default 0."""
    return seed_of_the_run()


def pytest_report_header() -> str:
    return f"random inputs: {SEED}={seed_of_the_run()}, Hypothesis profile {os.environ.get('HYPOTHESIS_PROFILE', 'ci')}"


def is_random(item: pytest.Item) -> bool:
    return "run_seed" in getattr(item, "fixturenames", ()) or hasattr(getattr(item, "obj", None), "hypothesis")


def pytest_itemcollected(item: pytest.Item) -> None:
    if is_random(item):
        item.add_marker("random")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that hold slow tests, so that no worker is left with a long one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.failed and is_random(item):
        report.sections.append(("Random inputs", f"repeat with {SEED}={seed_of_the_run()}"))
    return report
