"""The contrastive losses in blocks: values, gradients and their directional derivatives against the whole matrix."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from lightning_mimic.errors import MimicError
from lightning_mimic.models import global_pair_losses, pair_losses
from support.cases import for_each
from support.ranks import on_two_ranks

WORLD, ROWS = 4, 3
BIASES = (None, -2.0)


def whole_matrix(images, texts, scale, bias):
    """The losses from all cosines at once."""
    logits = scale * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    if bias is None:
        return -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()) / 2
    both = -F.logsigmoid((2 * torch.eye(len(logits), dtype=logits.dtype) - 1) * (logits + bias))
    return (both.sum(0) + both.sum(1)) / 2


def inputs(rows, bias, seed=0):
    """Inputs of two linear towers, and the parameters: both matrices, scale and bias."""
    draw = torch.Generator().manual_seed(seed)
    images, texts, towers = (
        torch.randn(*shape, dtype=torch.float64, generator=draw) for shape in ((rows, 6), (rows, 6), (2, 6, 5))
    )
    parameters = [*towers, torch.tensor(3.0, dtype=torch.float64)]
    if bias is not None:
        parameters.append(torch.tensor(bias, dtype=torch.float64))
    return images, texts, [each.clone().requires_grad_() for each in parameters]


def derivatives(losses, parameters, weights):
    """Gradients of the weighted sum of losses, and each loss's derivative along a direction, by reverse passes."""
    gradients = torch.autograd.grad((losses * weights).sum(), parameters, retain_graph=True)
    directions = [torch.linspace(-1, 1, p.numel(), dtype=p.dtype).reshape(p.shape) for p in parameters]
    u = torch.ones_like(losses, requires_grad=True)
    sums = torch.autograd.grad(losses, parameters, u, create_graph=True)
    along = sum((total * direction).sum() for total, direction in zip(sums, directions, strict=True))
    return gradients, torch.autograd.grad(along, u)[0]


@for_each(("bias", "block"), [(bias, block) for bias in BIASES for block in (1, 3, 4, 11, 100)])
def test_blocks_of_any_size_give_what_the_whole_matrix_gives(bias, block):
    images, texts, parameters = inputs(11, bias)
    weights = torch.linspace(0.1, 2, 11, dtype=torch.float64)

    def found(of, **options):
        embedded = images @ parameters[0], texts @ parameters[1]
        losses = of(*embedded, parameters[2], parameters[3] if bias is not None else None, **options)
        return losses, *derivatives(losses, parameters, weights)

    exact = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(found(pair_losses, block_size=block), found(whole_matrix), **exact)


@for_each("bias", BIASES)
def test_no_block_is_larger_than_it_says(bias, monkeypatch):
    rows, seen = 40, []
    original = torch.addmm

    def watched(*arguments):
        seen.append(original(*arguments))
        return seen[-1]

    monkeypatch.setattr(torch, "addmm", watched)
    images, texts, parameters = inputs(rows, bias)
    embedded = images @ parameters[0], texts @ parameters[1]
    losses = pair_losses(*embedded, parameters[2], None if bias is None else parameters[3], block_size=7)
    derivatives(losses, parameters, torch.ones(rows, dtype=torch.float64))
    assert {tuple(each.shape) for each in seen} == {(7, rows), (5, rows)}
    # Of the losses, of their gradients, and twice of the derivative along a direction; 6 blocks of images and of texts.
    assert len(seen) == 4 * 12


def test_gradients_are_formed_in_full_precision_under_autocast():
    images, texts, parameters = inputs(6, None)
    embedded = [
        (each @ tower).float().detach().requires_grad_()
        for each, tower in zip((images, texts), parameters, strict=False)
    ]
    weights = torch.linspace(0.1, 2, 6)

    def found():
        losses = pair_losses(*embedded, torch.tensor(50.0))
        return losses, *derivatives(losses, embedded, weights)

    expected = found()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(found(), expected, rtol=0, atol=0)


def test_extreme_logits_are_finite():
    same = torch.eye(4)
    for scale, bias in ((1e4, None), (1e4, -10.0)):
        embeddings = same.clone().requires_grad_()
        losses = pair_losses(
            embeddings, same.flip(0), torch.tensor(scale), None if bias is None else torch.tensor(bias)
        )
        assert torch.isfinite(losses).all()
        losses.sum().backward()
        assert torch.isfinite(embeddings.grad).all()


def test_what_is_not_offered_is_refused():
    embeddings = torch.randn(4, 5, requires_grad=True)
    losses = pair_losses(embeddings, torch.randn(4, 5), torch.tensor(2.0))
    (gradient,) = torch.autograd.grad(losses.sum(), embeddings, create_graph=True)
    with pytest.raises(MimicError, match="differentiated with respect to embeddings, scale or bias"):
        gradient.square().sum().backward()
    with pytest.raises(MimicError, match="`block_size` is 0"):
        pair_losses(embeddings, embeddings, torch.tensor(2.0), block_size=0)


def cases():
    return itertools.product(BIASES, (1, 2, 100))


def on_rank(rank, folder):
    """Losses of all ranks' pairs, and this rank's part of the derivatives."""
    own, results = slice(rank * ROWS, (rank + 1) * ROWS), []
    for bias, block in cases():
        images, texts, parameters = inputs(WORLD * ROWS, bias)
        embedded = images[own] @ parameters[0], texts[own] @ parameters[1]
        losses = global_pair_losses(*embedded, *parameters[2:], block_size=block)
        weights = torch.linspace(0.1, 2, len(losses), dtype=torch.float64)
        results.append((losses.detach(), *derivatives(losses, parameters, weights)))
    torch.save(results, folder / f"{rank}.pt")


def test_four_processes_add_up_to_one(tmp_path):
    on_two_ranks(on_rank, tmp_path, world=WORLD)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    for number, (bias, _) in enumerate(cases()):
        images, texts, parameters = inputs(WORLD * ROWS, bias)
        losses = whole_matrix(
            images @ parameters[0], texts @ parameters[1], *parameters[2:3], *(parameters[3:] or [None])
        )
        weights = torch.linspace(0.1, 2, len(losses), dtype=torch.float64)
        gradients, along = derivatives(losses, parameters, weights)
        found = [part[number] for part in parts]
        for each, _, _ in found:
            torch.testing.assert_close(each, losses.detach(), rtol=1e-10, atol=1e-12)
        summed = [sum(of_rank) for of_rank in zip(*(gradients for _, gradients, _ in found), strict=True)]
        torch.testing.assert_close(summed, list(gradients), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(sum(along for _, _, along in found), along, rtol=1e-10, atol=1e-12)
