"""Random compositions of operations: what is taken for a plain mean is one, by batches of copies of each sample."""

from random import Random

import pytest
import torch

from lightning_mimic.gradients.forward_trace import ForwardTrace
from lightning_mimic.gradients.graph import reaches
from lightning_mimic.gradients.plain_mean import DataFlow
from support.cases import case
from support.random_losses import CLASSES, RandomLoss, copies, drawn_batch

LOSSES = 1500


def own_gradients(loss, batch, done):
    """B times every row's gradient, and each sample's gradient where the whole batch consists of its copies."""
    rows = batch["inputs"].clone().requires_grad_()
    value = loss(batch | {"rows": rows}, [], only=done)
    (of_rows,) = torch.autograd.grad(value, rows)
    alone = []
    for sample in range(len(rows)):
        same = copies(batch, sample)
        row = same["inputs"].requires_grad_()
        value = loss(same | {"rows": row}, [], only=done)
        gradient = torch.autograd.grad(value, row, allow_unused=True)[0] if value.requires_grad else None
        alone.append(torch.zeros(CLASSES).double() if gradient is None else gradient.sum(0))
    return len(rows) * of_rows, torch.stack(alone)


@pytest.mark.filterwarnings("ignore")  # of operations that do not fit together
def test_what_is_taken_for_a_plain_mean_is_one(run_seed):
    random, generator = Random(run_seed), torch.Generator().manual_seed(run_seed)
    shown = refused = 0
    for number in range(LOSSES):
        loss, batch = RandomLoss.drawn(random), drawn_batch(random.choice([2, 3, 5, 7]), generator)
        weight = torch.eye(CLASSES, dtype=torch.float64, requires_grad=True)
        trace, done = ForwardTrace(len(batch["y"])), []
        trace.expect(batch.values(), [weight])
        with trace.recording():
            rows = batch["inputs"] @ weight
            value = loss(batch | {"rows": rows}, done)
        if value.grad_fn is None or not reaches(value.grad_fn, rows.grad_fn):
            continue
        if DataFlow(trace, rows.grad_fn).objection(value) is not None:
            refused += 1
            continue
        shown += 1
        with case(run_seed, number, loss):
            ours, alone = own_gradients(loss, batch, done)
            torch.testing.assert_close(ours, alone, rtol=1e-6, atol=1e-9, equal_nan=True)
    assert shown > LOSSES / 20
    assert refused > LOSSES / 20


@pytest.mark.parametrize("size", [2, 5])
def test_a_size_that_is_the_number_of_classes_changes_nothing(size):
    batch = drawn_batch(size, torch.Generator().manual_seed(0))
    weight = torch.eye(CLASSES, dtype=torch.float64, requires_grad=True)
    trace = ForwardTrace(size)
    trace.expect(batch.values(), [weight])
    with trace.recording():
        rows = batch["inputs"] @ weight
        right, wrong = (rows - batch["real"]).square().mean(), (rows.T[:size, :size] * rows[:, :size]).mean()
    flow = DataFlow(trace, rows.grad_fn)
    assert flow.objection(right) is None
    assert flow.objection(wrong) is not None
