"""The short form of ``scripts/torture``: nothing is lost, mixed or believed; and the tool finds what is wrong."""

import itertools
import random

import pytest
import torch

from scripts.torture.commands import COMMANDS, Command, nothing
from scripts.torture.kills import kill_commands
from scripts.torture.mutations import READABLE, Readable, mutate, mutate_files
from scripts.torture.processes import Child
from scripts.torture.races import race
from support.cases import for_each

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # forked processes must not wait for threads that they do not have
    yield
    torch.set_num_threads(before)


def passed(results):
    """Results as (name, failures), of at least one try each."""
    found = list(results)
    assert found
    assert all(tries.count > 0 for tries in found)
    return [(tries.name, tries.failures) for tries in found if tries.failures]


@for_each("command", COMMANDS)
def test_a_kill_at_any_file_operation_leaves_the_old_or_the_new(command, tmp_path):
    assert passed(kill_commands(tmp_path, [command], 4, 0, "")) == []


def test_mutations_are_refused_or_harmless(tmp_path):
    assert passed(mutate_files(tmp_path, (), 600, 0, "")) == []


def test_of_several_writers_one_wins_or_all_write_the_same(tmp_path):
    assert passed(race(tmp_path, COMMANDS, len(COMMANDS), 0, "")) == []


# The tool itself


def write_half_by_half(folder, name):
    (folder / name).write_text("half")
    with (folder / name).open("a") as file:
        file.write(" and half")


def text_of(folder, name):
    return (folder / name).read_text() if (folder / name).exists() else None


def leave_behind(folder, name):
    (folder / f".{name}.tmp").touch()
    (folder / f".{name}.tmp").rename(folder / name)
    (folder / name).with_suffix(".part").touch()


CARELESS = Command("careless", nothing, write_half_by_half, text_of)
LITTERS = Command("litters", nothing, leave_behind, lambda folder, name: (folder / name).exists() or None)


@for_each("command", [CARELESS, LITTERS])
def test_kills_find_what_is_not_atomic_and_what_stays(command, tmp_path):
    [tries] = kill_commands(tmp_path, [command], 20, 0, "")
    assert tries.failures


def test_races_find_a_second_winner(tmp_path):
    [tries] = race(tmp_path, [CARELESS], 2, 0, "")
    assert len(tries.failures) == 2
    assert "3 of 3 succeeded" in tries.failures[0]


def unchecked(folder):
    content = (folder / "file").read_bytes()
    if content.startswith(b"crash"):
        raise SystemError
    return content


def make_file(folder):
    (folder / "file").write_bytes(b"0123456789" * 9)
    return folder / "file"


@for_each("checked", [True, False])
def test_mutations_find_other_values(checked, tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.torture.mutations.READABLE", [Readable("file", make_file, unchecked, checked)])
    [tries] = mutate_files(tmp_path, (), 20, 0, "")
    assert (tries.count, len(tries.failures), tries.undetected) == ((20, 20, 0) if checked else (20, 0, 20))


@for_each("way", ["error", "exit", "kill"])
def test_mutations_find_other_errors_and_deaths(way, tmp_path, monkeypatch):
    calls = itertools.count()

    def read(folder):
        if next(calls) % 3 == 2:
            {"error": lambda: {}["key"], "exit": lambda: exit(3), "kill": lambda: __import__("os").abort()}[way]()
        return 0

    monkeypatch.setattr("scripts.torture.mutations.READABLE", [Readable("file", make_file, read)])
    [tries] = mutate_files(tmp_path, (), 7, 0, "")
    assert tries.count == 7
    assert 2 <= len(tries.failures) <= 3


def test_every_mutation_changes_the_file_and_can_be_repeated():
    content = bytes(range(256)) * 4
    made = [mutate(content, random.Random(number)) for number in range(300)]
    assert content not in made
    assert len(set(made)) > 250
    assert made[7] == mutate(content, random.Random(7))


def test_a_process_ends_with_its_value_its_error_or_its_death(tmp_path):
    def ended(act, seconds=60):
        ending = Child(act, tmp_path / "answer").wait(seconds)
        return ending.kind, ending.value

    assert ended(lambda: 3) == ("value", 3)
    assert ended(lambda: {}["key"]) == ("error", "KeyError: 'key'")
    assert ended(lambda: __import__("os").abort())[0] == "killed"
    assert ended(lambda: __import__("time").sleep(60), 0.1)[0] == "hung"
    assert len({each.name for each in READABLE}) == len(READABLE)
