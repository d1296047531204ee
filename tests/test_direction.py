"""The direction to the reference is fresh, in full precision, and says when there is none."""

import pytest
import torch
from torch import nn

from lightning_mimic.gradients import Direction

EXACT = {"rtol": 0, "atol": 0}


def near(reference, distance, dtype=torch.float32):
    """A direction from a weight that far, relatively, from its reference."""
    away = torch.randn(reference.shape, dtype=torch.float64)
    moved = reference.double() + away * distance * reference.double().norm() / away.norm()
    return Direction({"w": reference}, {"w": nn.Parameter(moved.to(dtype))})


def test_the_norm_is_taken_over_all_tensors_together():
    parameters = {"w": nn.Parameter(torch.zeros(2, 2)), "b": nn.Parameter(torch.ones(1))}
    reference = {"b": torch.tensor([13.0]), "unused": torch.ones(9), "w": torch.tensor([[3.0, 0.0], [0.0, 4.0]])}
    vectors, norm = Direction(reference, parameters)()
    expected = {"w": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "b": torch.tensor([12.0])}
    torch.testing.assert_close(vectors, expected, **EXACT)
    torch.testing.assert_close(norm, torch.tensor(13.0))
    assert list(vectors) == ["w", "b"]
    assert norm.shape == ()


def test_it_points_from_where_the_parameter_is_now():
    weight = nn.Parameter(torch.zeros(3))
    direction = Direction({"w": torch.tensor([3.0, 0.0, 0.0])}, {"w": weight})
    before, _ = direction()
    with torch.no_grad():
        weight.add_(1.0)
    vectors, norm = direction()
    torch.testing.assert_close(vectors["w"], torch.tensor([2.0, -1.0, -1.0]), **EXACT)
    torch.testing.assert_close(norm, torch.tensor(6.0).sqrt())
    torch.testing.assert_close(before["w"], torch.tensor([3.0, 0.0, 0.0]), **EXACT)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept_in", [torch.float32, torch.float64])
def test_half_precision_parameters_get_a_float32_direction_that_is_not_rounded(half, kept_in):
    torch.manual_seed(0)
    weight, reference = nn.Parameter(torch.randn(50).to(half)), torch.randn(50, dtype=kept_in)
    vectors, norm = Direction({"w": reference}, {"w": weight})()
    assert vectors["w"].dtype == norm.dtype == torch.float32
    torch.testing.assert_close(vectors["w"], reference.float() - weight.detach().float(), **EXACT)
    assert not torch.equal(vectors["w"], vectors["w"].to(half).float())


def test_a_half_precision_reference_of_a_float32_model_gives_a_float32_direction():
    weight = nn.Parameter(torch.tensor([1.0 + 2**-20]))
    vectors, _ = Direction({"w": torch.tensor([1.0], dtype=torch.bfloat16)}, {"w": weight})()
    torch.testing.assert_close(vectors["w"], torch.tensor([-(2.0**-20)]), **EXACT)


def test_float64_parameters_keep_float64():
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    vectors, norm = Direction({"w": torch.tensor([1.0 + 2**-40], dtype=torch.float64)}, {"w": weight})()
    torch.testing.assert_close(vectors["w"], torch.tensor([2.0**-40], dtype=torch.float64), **EXACT)
    assert norm.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(("distance", "vanished"), [(0.0, True), (1e-7, True), (1e-5, False), (1.0, False)])
def test_it_vanishes_at_rounding_distance_of_the_reference_whatever_the_weights_size(scale, distance, vanished, dtype):
    torch.manual_seed(1)
    direction = near(scale * torch.randn(40, dtype=dtype), distance, dtype)
    gone = direction.vanishes(direction()[1])
    assert gone.shape == ()
    assert gone.dtype == torch.bool
    assert bool(gone) is vanished


@pytest.mark.parametrize(("value", "vanished"), [(0.0, True), (1e-3, False)])
def test_an_all_zero_reference_is_met_only_at_zero(value, vanished):
    direction = Direction({"w": torch.zeros(4)}, {"w": nn.Parameter(torch.full((4,), value))})
    assert bool(direction.vanishes(direction()[1])) is vanished


def test_it_requires_no_gradient_and_leaves_the_parameters_alone():
    weight, reference = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))
    with torch.enable_grad():
        vectors, norm = Direction({"w": reference}, {"w": weight})()
    assert not vectors["w"].requires_grad
    assert not norm.requires_grad
    vectors["w"].mul_(5)
    torch.testing.assert_close(weight.detach(), torch.zeros(2), **EXACT)
    torch.testing.assert_close(reference.detach(), torch.ones(2), **EXACT)
    assert weight.grad is None
    assert weight.requires_grad
