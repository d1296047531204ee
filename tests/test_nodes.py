"""What a view and an in-place operation leave in the graph, whichever nodes the installed torch makes of them."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import GradientEdge

from lightning_mimic.gradients import Graph
from lightning_mimic.gradients.nodes import kind_of, node_of_all

B, D = 3, 4


def product():
    """A matrix product of ``B`` samples of two tokens, and the view of it that has their axes apart."""
    matrix = torch.randn(2 * B, D) @ nn.Parameter(torch.randn(D, D))
    return matrix, matrix.view(B, 2, D)


def in_place(changed, looked_at):
    changed.mul_(2)
    return looked_at


SEEN = {  # what is made of a product and its view, and the shapes under which the product is seen
    "as it is": (lambda m, v: m, [(6, 4)]),
    "its view": (lambda m, v: v, [(6, 4), (3, 2, 4)]),
    "its view changed in place": (lambda m, v: v.relu_(), [(6, 4), (3, 2, 4)]),
    "its view changed in place twice": (lambda m, v: v.relu_().mul_(2), [(6, 4), (3, 2, 4)]),
    "its view changed in place in part": (lambda m, v: in_place(v[:, 0], v), [(6, 4), (3, 2, 4)]),
    "its view used before it is changed in place": (
        lambda m, v: torch.stack([3 * v, v.mul_(2)]),
        [(6, 4), (3, 2, 4), (3, 2, 4)],
    ),
    "its view of one more axis changed in place": (lambda m, v: v[None].relu_(), [(6, 4), (1, 3, 2, 4)]),
    "another order of the view that was changed in place": (lambda m, v: in_place(v, v.mT), [(6, 4)]),
    "a part of the view that was changed in place": (lambda m, v: in_place(v, v[1:]), [(6, 4)]),
    "a first part of the view that was changed in place": (lambda m, v: in_place(v, v[:2]), [(6, 4)]),
}


@pytest.mark.parametrize("case", SEEN)
def test_the_shapes_of_an_output_are_those_of_its_views_in_the_same_order(case):
    function, shapes = SEEN[case]
    matrix, view = product()
    node = matrix.grad_fn
    assert kind_of(node) == "Mm"
    assert sorted(Graph(function(matrix, view).sum().grad_fn).shapes(node), key=len) == shapes


def test_the_whole_gradient_of_a_view_arrives_at_its_base():
    matrix, view = product()
    assert node_of_all(matrix) is node_of_all(view) is node_of_all(view[None].squeeze(0)) is matrix.grad_fn
    node = node_of_all(view)
    total = (3 * view).sum() + view.relu_().sum()
    (arrived,) = torch.autograd.grad(total, [GradientEdge(node, 0)])
    torch.testing.assert_close(arrived, 3 + (matrix > 0).float())


def test_the_node_of_all_is_unknown_for_parts_for_other_orders_and_for_one_output_of_several():
    _, view = product()
    one_of_two = torch.std_mean(view, 2)[1].view(-1)
    for other in (view.mT, view[1:], view.unbind()[0], one_of_two, nn.Parameter(torch.ones(4)).view(2, 2)[:, 0]):
        assert node_of_all(other) is None
    view.mul_(2)
    assert node_of_all(view) is None
