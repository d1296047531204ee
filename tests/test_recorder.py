"""The buffer of scores: when it is written, what it warns of, and which epoch it takes rows for."""

import warnings

import pytest
import torch

from lightning_mimic.errors import MimicError
from lightning_mimic.ledger import Flag
from lightning_mimic.reweighting.loss_problem import LossProblem
from lightning_mimic.reweighting.recorder import FLUSH_EVERY, Position, ScoreRecorder


class Writer:
    """In the place of a LedgerWriter: the ids of what was appended, and how often that was committed."""

    def __init__(self):
        self.ids, self.flushes = [], 0

    def append(self, columns):
        self.ids += list(columns["id"])

    def flush(self):
        self.flushes += 1


def add(recorder, ids, flag=Flag.OK, *, epoch=0, assumed=False):
    columns = {"score": torch.zeros(len(ids)), "flag": torch.full((len(ids),), flag, dtype=torch.int8)}
    recorder.add(Position(epoch, 0, 0, assumed), ids, columns, torch.tensor(LossProblem.NONE))


def test_scores_are_written_whenever_so_many_micro_batches_wait():
    writer = Writer()
    recorder = ScoreRecorder(writer)
    for k in range(2 * FLUSH_EVERY + 1):
        add(recorder, [k])
    assert (writer.ids, writer.flushes) == (list(range(2 * FLUSH_EVERY)), 2)


def test_every_kind_of_flag_is_warned_of_once():
    recorder = ScoreRecorder(None, expected=[Flag.ZERO_DIRECTION])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for flag in (Flag.NONFINITE_LOSS, Flag.OK, Flag.ALONE, Flag.NONFINITE_LOSS, Flag.ZERO_DIRECTION, Flag.ALONE):
            add(recorder, [0], flag)
            recorder.flush()
    assert [str(each.message)[:11] for each in caught] == ["1 samples h", "a micro-bat"]


def test_a_second_epoch_that_was_not_given_is_noticed_whatever_came_between():
    recorder = ScoreRecorder(Writer())
    for ids in ([0, 1], [2, 3], [4, 5], [3, 0]):
        add(recorder, ids, assumed=True)
    with pytest.raises(MimicError, match=r"^`epoch`: the sample 0 was scored again"):
        recorder.flush()


def test_the_same_samples_in_given_epochs_are_accepted():
    writer = Writer()
    recorder = ScoreRecorder(writer)
    for epoch in range(2):
        add(recorder, ["a", "b"], epoch=epoch)
    recorder.flush()
    assert writer.ids == ["a", "b"] * 2
