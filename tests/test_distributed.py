"""Exchanges between ranks: without a process group, and on two ranks."""

import json
import os
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_mimic import distributed
from lightning_mimic.errors import MimicError
from support.ranks import WORLD, on_two_ranks

pytestmark = pytest.mark.slow  # fits and processes


class OwnError(Exception):
    pass


def fails_on(*ranks):
    def act():
        if distributed.rank() in ranks:
            raise OwnError(f"on purpose on {distributed.rank()}")
        return distributed.rank()

    return act


def cases(rank, report):
    """Every function, with what differs between the ranks where it may."""
    device = torch.device("cpu")
    report["group"] = distributed.is_distributed(), distributed.world_size(), distributed.rank()
    given = torch.tensor([1.0, 10.0 * rank], dtype=torch.float64)
    added = distributed.sum_over_ranks(given)
    report["sum"] = added is given, given.tolist(), str(given.dtype)
    report["any"] = [distributed.any_rank(flag, device) for flag in (False, rank == 0, rank == WORLD - 1, True)]
    row = (torch.arange(3.0, requires_grad=True) + rank).half()
    stacked = distributed.stack_over_ranks(row)
    report["stack"] = stacked.tolist(), str(stacked.dtype)
    matrix = (10 * rank + torch.arange(6).reshape(2, 3)).T  # not contiguous
    equal = distributed.gather_equal(matrix)
    report["equal"] = [each.tolist() for each in equal]
    rows = torch.full((rank + 1, 2), rank, dtype=torch.int64)
    gathered = distributed.gather_rows(rows)
    report["rows"] = [each.tolist() for each in gathered], str(gathered[rank].dtype)
    report["same rows"] = [each.tolist() for each in distributed.gather_rows(torch.tensor([[rank]]))]
    report["no rows"] = [each.tolist() for each in distributed.gather_rows(torch.zeros(rank, 2))]
    weight = nn.Parameter(torch.ones(2))
    several = [*distributed.gather_equal(2 * weight), *distributed.gather_rows(2 * weight)]
    report["attached"] = [each.requires_grad for each in several]
    report["broadcast"] = distributed.broadcast({"from": rank, "path": None})
    report["objects"] = distributed.gather_objects({"rank": rank})
    report["acted"] = {}
    for failing in ((), (0,), (1,), (0, 1)):
        try:
            outcome = distributed.on_all_ranks(fails_on(*failing), "could not start")
        except (OwnError, MimicError) as error:
            outcome = f"{type(error).__name__}: {error}"
        report["acted"]["".join(map(str, failing))] = outcome


def on_one_rank(rank, folder):
    report = {}
    cases(rank, report)
    (folder / f"{rank}.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = on_two_ranks(on_one_rank, tmp_path_factory.mktemp("ranks"))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone():
    report = {}
    cases(0, report)
    return json.loads(json.dumps(report))


SAME = {  # on both ranks
    "sum": [True, [2.0, 10.0], "torch.float64"],
    "any": [False, True, True, True],
    "stack": [[[0, 1, 2], [1, 2, 3]], "torch.float16"],
    "equal": [[[0, 3], [1, 4], [2, 5]], [[10, 13], [11, 14], [12, 15]]],
    "rows": [[[[0, 0]], [[1, 1], [1, 1]]], "torch.int64"],
    "same rows": [[[0]], [[1]]],
    "no rows": [[], [[0, 0]]],
    "attached": [False] * 4,
    "broadcast": {"from": 0, "path": None},
    "objects": [{"rank": 0}, {"rank": 1}],
}


@pytest.mark.parametrize("case", SAME)
def test_both_ranks_get_the_same(case, reports):
    assert [report[case] for report in reports] == [SAME[case]] * WORLD


@pytest.mark.parametrize(
    ("case", "expected"),
    {
        "sum": [True, [1.0, 0.0], "torch.float64"],
        "any": [False, True, False, True],
        "stack": [[[0, 1, 2]], "torch.float16"],
        "equal": [[[0, 3], [1, 4], [2, 5]]],
        "rows": [[[[0, 0]]], "torch.int64"],
        "same rows": [[[0]]],
        "no rows": [[]],
        "attached": [False] * 2,
        "broadcast": {"from": 0, "path": None},
        "objects": [{"rank": 0}],
        "group": [False, 1, 0],
        "acted": {"": 0, "0": "OwnError: on purpose on 0", "1": 0, "01": "OwnError: on purpose on 0"},
    }.items(),
)
def test_without_a_group_it_is_as_on_one_rank(case, expected, alone):
    assert alone[case] == expected


def test_ranks_know_themselves(reports):
    assert [report["group"] for report in reports] == [[True, WORLD, 0], [True, WORLD, 1]]


def test_a_failure_on_one_rank_is_raised_on_all(reports):
    own = ["OwnError: on purpose on 0", "OwnError: on purpose on 1"]
    other = [f"MimicError: another rank could not start: rank {rank}: on purpose on {rank}" for rank in (0, 1)]
    first, second = (report["acted"] for report in reports)
    assert (first[""], second[""]) == (0, 1)
    assert (first["0"], second["0"]) == (own[0], other[0])
    assert (first["1"], second["1"]) == (other[1], own[1])
    assert (first["01"], second["01"]) == (own[0], own[1])


def test_every_function_has_its_case():
    public = {n for n, f in vars(distributed).items() if getattr(f, "__module__", "") == distributed.__name__}
    public = {name for name in public if not name.startswith("_")}
    names = {"is_distributed", "world_size", "rank", "sum_over_ranks", "any_rank", "stack_over_ranks", "gather_equal"}
    names |= {"gather_rows", "broadcast", "gather_objects", "on_all_ranks"}
    assert public - {"Result", "end_process_group"} == names


EXCHANGES = {
    "objects": lambda: distributed.gather_objects(0),
    "sum": lambda: distributed.sum_over_ranks(torch.ones(1)),
    "rows": lambda: distributed.gather_rows(torch.ones(1, 2)),
}


def _without_the_other(rank: int, folder: Path, exchange: str, how: str, silent: int) -> None:
    distributed.TIME_LIMIT, distributed.ROLL_CALL = 0.5, 0.5
    distributed.gather_objects(rank)  # all are there
    if rank == silent:
        if how == "hangs":
            time.sleep(3)
        os._exit(0)
    began = time.monotonic()
    try:
        EXCHANGES[exchange]()
    except MimicError as error:
        (folder / "said").write_text(f"{time.monotonic() - began:.0f} {error}")
    os._exit(0)  # the group cannot be destroyed in order


@pytest.mark.parametrize(
    ("exchange", "how", "silent"),
    [
        *((name, "hangs", 1) for name in EXCHANGES),
        ("sum", "hangs", 0),
        ("sum", "is killed", 1),
        ("rows", "is killed", 1),
    ],
)
def test_a_rank_that_does_not_answer_is_named_in_time(exchange, how, silent, tmp_path):
    act = partial(_without_the_other, exchange=exchange, how=how, silent=silent)
    on_two_ranks(act, tmp_path)
    seconds, _, said = (tmp_path / "said").read_text().partition(" ")
    assert int(seconds) < 3
    assert f"rank {1 - silent} of 2 got no answer from rank {silent}, which was killed, failed or hangs" in said
