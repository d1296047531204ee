"""Settings of a test run: one thread per process, and the slow files first."""

import os

import pytest

# Set before torch is imported, and inherited by the processes that tests start: on tensors this small, more threads
# only wait for each other and for those of the other workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest.register_assert_rewrite("support")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that hold slow tests, so that no worker is left with a long one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
