"""The direction to the reference is fresh, in full precision, and says when there is none."""

import pytest
import torch
from torch import nn

from lightning_mimic.gradients import Direction
from support.cases import case, for_each

EXACT = {"rtol": 0, "atol": 0}


def near(reference, distance, dtype=torch.float32):
    """A direction from a weight that far, relatively, from its reference."""
    away = torch.randn(reference.shape, dtype=torch.float64)
    moved = reference.double() + away * distance * reference.double().norm() / away.norm()
    return Direction({"w": reference}, {"w": nn.Parameter(moved.to(dtype))})


def test_the_norm_is_taken_over_all_tensors_together():
    parameters = {"w": nn.Parameter(torch.zeros(2, 2)), "b": nn.Parameter(torch.ones(1))}
    reference = {"b": torch.tensor([13.0]), "unused": torch.ones(9), "w": torch.tensor([[3.0, 0.0], [0.0, 4.0]])}
    direction = Direction(reference, parameters)
    expected = {"w": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "b": torch.tensor([12.0])}
    torch.testing.assert_close(dict(direction), expected, **EXACT)
    torch.testing.assert_close(direction.norm(), torch.tensor(13.0))
    assert direction.norm().shape == ()


def test_it_is_a_mapping_over_the_parameters_in_their_order():
    parameters = {"w": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(1))}
    direction = Direction({"b": torch.ones(1), "unused": torch.ones(9), "w": torch.ones(2)}, parameters)
    assert list(direction) == list(direction.keys()) == ["w", "b"]
    assert len(direction) == 2
    assert "w" in direction
    assert "unused" not in direction
    assert direction.get("unused") is None
    with pytest.raises(KeyError, match="unused"):
        direction["unused"]
    torch.testing.assert_close(direction["b"], torch.ones(1), **EXACT)


def test_a_reference_that_lacks_a_parameter_is_no_direction():
    with pytest.raises(KeyError, match="b"):
        Direction({"w": torch.ones(2)}, {"w": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(1))})


def test_it_points_from_where_the_parameter_is_now():
    weight = nn.Parameter(torch.zeros(3))
    direction = Direction({"w": torch.tensor([3.0, 0.0, 0.0])}, {"w": weight})
    before = direction["w"]
    with torch.no_grad():
        weight.add_(1.0)
    torch.testing.assert_close(direction["w"], torch.tensor([2.0, -1.0, -1.0]), **EXACT)
    torch.testing.assert_close(direction.norm(), torch.tensor(6.0).sqrt())
    torch.testing.assert_close(before, torch.tensor([3.0, 0.0, 0.0]), **EXACT)


def test_it_points_to_where_the_reference_was_when_it_was_made():
    reference, parameters = {"w": torch.ones(3)}, {"w": nn.Parameter(torch.zeros(3))}
    direction = Direction(reference, parameters)
    reference["w"].mul_(7)
    reference.clear()
    parameters.clear()
    torch.testing.assert_close(dict(direction), {"w": torch.ones(3)}, **EXACT)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@for_each("kept_in", [torch.float32, torch.float64])
def test_half_precision_parameters_get_a_float32_direction_that_is_not_rounded(half, kept_in):
    torch.manual_seed(0)
    weight, reference = nn.Parameter(torch.randn(50).to(half)), torch.randn(50, dtype=kept_in)
    direction = Direction({"w": reference}, {"w": weight})
    assert direction["w"].dtype == direction.norm().dtype == torch.float32
    torch.testing.assert_close(direction["w"], reference.float() - weight.detach().float(), **EXACT)
    assert not torch.equal(direction["w"], direction["w"].to(half).float())


def test_a_half_precision_reference_of_a_float32_model_gives_a_float32_direction():
    weight = nn.Parameter(torch.tensor([1.0 + 2**-20]))
    direction = Direction({"w": torch.tensor([1.0], dtype=torch.bfloat16)}, {"w": weight})
    torch.testing.assert_close(direction["w"], torch.tensor([-(2.0**-20)]), **EXACT)


def test_float64_parameters_keep_float64():
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    direction = Direction({"w": torch.tensor([1.0 + 2**-40], dtype=torch.float64)}, {"w": weight})
    torch.testing.assert_close(direction["w"], torch.tensor([2.0**-40], dtype=torch.float64), **EXACT)
    assert direction.norm().dtype == torch.float64


@for_each("names", [("half", "single", "double"), ("double", "single", "half")])
def test_parameters_of_several_dtypes_have_one_norm_in_the_highest(names):
    dtypes = {"half": torch.bfloat16, "single": torch.float32, "double": torch.float64}
    parameters = {name: nn.Parameter(torch.zeros(4, dtype=dtypes[name])) for name in names}
    reference = {name: torch.full((4,), 2.0 if name == "double" else 0.25, dtype=torch.float64) for name in names}
    direction = Direction(reference, parameters)
    assert {name: v.dtype for name, v in direction.items()} == dtypes | {"half": torch.float32}
    torch.testing.assert_close(direction.norm(), torch.tensor(16.5, dtype=torch.float64).sqrt(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@for_each(("distance", "vanished"), [(0.0, True), (1e-7, True), (1e-5, False), (1.0, False)])
def test_it_vanishes_at_rounding_distance_of_the_reference_whatever_the_weights_size(distance, vanished, dtype):
    for scale in (1e-6, 1.0, 1e6):
        torch.manual_seed(1)
        direction = near(scale * torch.randn(40, dtype=dtype), distance, dtype)
        gone = direction.vanishes(direction.norm())
        with case(scale):
            assert (gone.shape, gone.dtype, bool(gone)) == ((), torch.bool, vanished)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@for_each(("roundings", "vanished"), [(0, True), (2, False)])
def test_half_precision_parameters_have_met_the_reference_when_they_are_as_near_as_they_come(half, roundings, vanished):
    torch.manual_seed(1)
    direction = near(torch.randn(400), roundings * torch.finfo(half).eps, half)
    assert bool(direction.norm() > 0)
    assert bool(direction.vanishes(direction.norm())) is vanished


@for_each(("value", "vanished"), [(0.0, True), (1e-3, False)])
def test_an_all_zero_reference_is_met_only_at_zero(value, vanished):
    direction = Direction({"w": torch.zeros(4)}, {"w": nn.Parameter(torch.full((4,), value))})
    assert bool(direction.vanishes(direction.norm())) is vanished


def test_one_parameter_at_its_reference_is_not_all_of_them():
    parameters = {"w": nn.Parameter(torch.ones(4)), "b": nn.Parameter(torch.zeros(1))}
    direction = Direction({"w": torch.ones(4), "b": torch.ones(1)}, parameters)
    assert not direction.vanishes(direction.norm())
    with torch.no_grad():
        parameters["b"].fill_(1.0)
    assert direction.vanishes(direction.norm())


def test_it_requires_no_gradient_and_leaves_the_parameters_alone():
    weight, reference = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))
    direction = Direction({"w": reference}, {"w": weight})
    with torch.enable_grad():
        vector, norm = direction["w"], direction.norm()
    assert not vector.requires_grad
    assert not norm.requires_grad
    vector.mul_(5)
    torch.testing.assert_close(direction["w"], torch.ones(2), **EXACT)
    torch.testing.assert_close(weight.detach(), torch.zeros(2), **EXACT)
    torch.testing.assert_close(reference.detach(), torch.ones(2), **EXACT)
    assert weight.grad is None
    assert weight.requires_grad
