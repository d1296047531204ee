"""Losses of sequences: the mean over each one's own targets."""

import pytest
import torch
import torch.nn.functional as F

from lightning_mimic import MimicError, token_losses

LOGITS = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.tensor([[0, 1, 2, 3], [4, -100, 2, -100], [-100, -100, -100, 0]])


@pytest.mark.parametrize("ignored", [-100, 0])
def test_each_sequence_is_averaged_over_its_own_targets(ignored):
    targets = TARGETS.where(TARGETS >= 0, torch.tensor(ignored))
    right = [F.cross_entropy(row, target, ignore_index=ignored) for row, target in zip(LOGITS, targets, strict=True)]
    found = token_losses(LOGITS, targets, ignored)
    torch.testing.assert_close(found, torch.stack(right).nan_to_num(0.0))


def test_images_of_classes_and_single_targets():
    torch.testing.assert_close(token_losses(LOGITS[:, None], TARGETS[:, None]), token_losses(LOGITS, TARGETS))
    single = F.cross_entropy(LOGITS[:, 0], TARGETS[:, 0].abs() % 5, reduction="none")
    torch.testing.assert_close(token_losses(LOGITS[:, 0], TARGETS[:, 0].abs() % 5), single)


def test_a_sequence_without_targets_has_no_loss_and_no_gradient():
    logits = LOGITS.clone().requires_grad_()
    losses = token_losses(logits, torch.full_like(TARGETS, -100))
    losses.sum().backward()
    torch.testing.assert_close(losses.detach(), torch.zeros(3).double())
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits))


def test_half_precision_is_averaged_in_single():
    assert token_losses(LOGITS.bfloat16(), TARGETS).dtype == torch.float32


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(MimicError, match=r"logits have shape \(3, 4, 5\) and targets \(3, 3\)"):
        token_losses(LOGITS, TARGETS[:, 1:])
