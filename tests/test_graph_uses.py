"""The graph knows a parameter's uses, the deepest of its marks, and the cut: where each sample still has its row."""

from collections.abc import Collection

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import GradientEdge, Node

from lightning_mimic.gradients import Graph
from lightning_mimic.gradients.graph import reaches, walk
from lightning_mimic.gradients.nodes import is_leaf, kind_of, shape_of
from support.cases import for_each, pairwise
from support.examples import examples

B, D = 3, 4
forty = examples(40)


def lowest_cut(graph: Graph, wanted: Collection[Node], samples: int) -> GradientEdge | None:
    return next(reversed(graph.cuts(wanted, samples)), None)


def ends(tensor, parameter):
    found = Graph(tensor.grad_fn).terminals(parameter)
    return sorted(([kind_of(n) for n in end.chain], kind_of(end.node), end.argument) for end in found)


# torch 2.6 makes a node of the colon in an index.
COLONS = kind_of(nn.Parameter(torch.ones(2))[:, None].grad_fn.next_functions[0][0]) == "Slice"
USES = {  # and by which views, in which operation, as which argument
    "never": (lambda w, x: x.square(), []),
    "once": (lambda w, x: F.linear(x, w), [(["T"], "Mm", 1)]),
    "once, as it is": (lambda w, x: x @ w, [([], "Mm", 1)]),
    "once, from the left": (lambda w, x: w @ x.T, [([], "Mm", 0)]),
    "once, on tokens": (lambda w, x: F.linear(x[:, None].expand(-1, 3, -1), w), [(["T"], "Mm", 1)]),
    "once, with a bias of its own": (lambda w, x: F.linear(x, w, x[0]), [(["T"], "Addmm", 2)]),
    "once, as a filter": (
        lambda w, x: F.conv2d(x[:, :, None, None], w[:, :, None, None]),
        [([*(["Slice", "Slice"] if COLONS else []), "Unsqueeze", "Unsqueeze"], "Convolution", 1)],
    ),
    "once, after many views": (
        lambda w, x: x @ w.view(2, 8)[None].squeeze(0).reshape(4, 4).permute(1, 0).transpose(0, 1),
        [(["View", "Unsqueeze", "Squeeze", "View", "Permute", "Transpose"], "Mm", 1)],
    ),
    "one part of it": (lambda w, x: x @ w[:4], [([], "Slice", 0)]),
    "once, in another dtype": (lambda w, x: x.double() @ w.double(), [(["ToCopy"], "Mm", 1)]),
    "one row of it": (lambda w, x: x + w[0], [([], "Select", 0)]),
    "spread over the batch": (lambda w, x: x[:, None] * w[None].expand(B, -1, -1), [(["Unsqueeze"], "Expand", 0)]),
    "looked up": (lambda w, x: F.embedding(torch.tensor([1, 2, 0]), w), [([], "Embedding", 0)]),
    "twice": (lambda w, x: F.linear(F.linear(x, w), w), [(["T"], "Mm", 1)] * 2),
    "tied through a transpose": (
        lambda w, x: F.linear(F.linear(x, w), w.t()),
        [(["T"], "Mm", 1), (["T", "T"], "Mm", 1)],
    ),
    "one transpose used twice": (lambda w, x: (x @ (t := w.t())) @ t, [(["T"], "Mm", 1)] * 2),
    "times itself": (lambda w, x: w * w, [([], "Mul", 0), ([], "Mul", 1)]),
    "regularised": (lambda w, x: F.linear(x, w) + w.square().sum(), [([], "Pow", 0), (["T"], "Mm", 1)]),
}


@pytest.mark.parametrize("case", USES)
def test_every_use_of_a_parameter_is_found_behind_its_views(case):
    function, expected = USES[case]
    weight, x = nn.Parameter(torch.randn(D, D)), torch.randn(B, D, requires_grad=True)
    assert ends(function(weight, x).sum(), weight) == expected
    assert ends(function(weight, x).sum(), nn.Parameter(torch.zeros(1))) == []
    assert ends(function(weight.requires_grad_(False), x).sum() + x.sum(), weight) == []


@pytest.mark.parametrize("case", ["never", "once", "twice", "tied through a transpose", "one transpose used twice"])
def test_autocast_and_its_cache_hide_no_use_and_add_none(case):
    function, expected = USES[case]
    weight, x = nn.Parameter(torch.randn(D, D)), torch.randn(B, D, requires_grad=True)
    for cache in (True, False):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            found = ends(function(weight, x).float().sum(), weight)
        assert [end[1:] for end in found] == [end[1:] for end in expected], f"cache {cache}"
        assert all("ToCopy" in chain for chain, _, _ in found), f"cache {cache}"


def test_a_layers_weight_and_bias_enter_one_operation():
    layer = nn.Linear(D, 2)
    total = layer(torch.randn(B, D)).sum()
    assert ends(total, layer.weight) == [(["T"], "Addmm", 2)]
    assert ends(total, layer.bias) == [([], "Addmm", 0)]


def test_the_graph_knows_its_nodes_their_order_their_parents_and_its_leaves():
    body, head = nn.Linear(D, D), nn.Linear(D, 2)
    hidden = torch.tanh(body(torch.randn(B, D)))
    root = (head(hidden).sum() + hidden.sum()).grad_fn
    graph = Graph(root)
    assert graph.root is graph.order[0] is root
    assert set(graph.order) == set(walk(root)) == set(graph.parents)
    assert len(graph.order) == len(set(graph.order))
    assert {node.variable for node in graph.leaves} == {*body.parameters(), *head.parameters()}
    assert all(is_leaf(node) is (node in graph.leaves) for node in graph.order)
    assert hidden.grad_fn in graph
    assert torch.tanh(hidden).grad_fn not in graph
    place = {node: i for i, node in enumerate(graph.order)}
    for node in graph.order:
        assert sorted((place[p], a) for p, a in graph.parents[node]) == sorted(
            (place[p], a) for p in graph.order for a, (child, _) in enumerate(p.next_functions) if child is node
        )
        assert all(place[p] < place[node] for p, _ in graph.parents[node])


def test_deep_and_dense_graphs_are_walked_once_and_without_recursion():
    layer = nn.Linear(D, D)
    y = layer(torch.randn(B, D))
    call = y.grad_fn
    for _ in range(3000):
        y = y + y
    graph = Graph(y.sum().grad_fn)
    assert len(graph.terminals(layer.weight)) == 1
    assert graph.deepest([y.grad_fn, call]) == [call]
    assert len(graph.nodes_reaching([call])) == 3002
    assert lowest_cut(graph, [call], B).node is call
    assert lowest_cut(graph, graph.leaves, B).node is call


def branches():
    body, left, right = nn.Linear(D, D), nn.Linear(D, 2), nn.Linear(D, 2)
    h = body(torch.randn(B, D))
    a, b = left(h.tanh()), right(h.tanh())
    return Graph((a.sum() * b.sum()).grad_fn), h.grad_fn, a.grad_fn, b.grad_fn


def test_the_deepest_marks_are_those_with_no_mark_below():
    graph, body, left, right = branches()
    assert graph.deepest([]) == []
    assert graph.deepest([graph.root]) == [graph.root]
    assert graph.deepest([graph.root, left, body]) == [body]
    assert set(graph.deepest([left, right])) == {left, right}
    assert set(graph.deepest([graph.root, right, left])) == {left, right}
    assert set(graph.deepest(graph.order)) == graph.leaves


def test_what_leads_to_a_mark_is_the_mark_and_what_is_above():
    graph, body, left, right = branches()
    assert graph.nodes_reaching([]) == set()
    assert graph.nodes_reaching([graph.root]) == {graph.root}
    assert left in graph.nodes_reaching([body])
    assert right in graph.nodes_reaching([body])
    assert graph.nodes_reaching([left]) & {body, left, right} == {left}
    assert graph.nodes_reaching(graph.leaves) == set(graph.order)


@st.composite
def graphs(draw):
    """A graph of branches that meet again, over ``(B, D)`` tensors and parameters of shape ``(D,)``."""
    weights = [torch.ones(D, requires_grad=True) for _ in range(3)]
    made = [torch.ones(B, D) * weights[0]]
    for _ in range(draw(st.integers(1, 10))):
        one, other = (made[-1 - draw(st.integers(0, min(2, len(made) - 1)))] for _ in range(2))
        made.append(
            draw(
                st.sampled_from(
                    [
                        lambda one, other: one.tanh(),
                        lambda one, other: one + other,
                        lambda one, other: one + other.mean(0),
                        lambda one, other: one * weights[1] + weights[2],
                        lambda one, other: torch.cat(one.chunk(2, 1), 1),
                    ]
                )
            )(one, other)
        )
    graph = Graph(draw(st.sampled_from([made[-1].sum(1), made[-1].sum(), made[-1].sum() + weights[1].sum()])).grad_fn)
    marks = draw(st.lists(st.sampled_from(graph.order), min_size=1, max_size=3, unique=True))
    return graph, marks


@forty
@given(case=graphs())
def test_leading_and_deepest_agree_with_a_search_from_every_node(case):
    graph, marks = case
    assert graph.nodes_reaching(marks) == {n for n in graph.order if any(reaches(n, mark) for mark in marks)}
    below = {mark: [other for other in marks if other is not mark and reaches(mark, other)] for mark in marks}
    assert set(graph.deepest(marks)) == {mark for mark in marks if not below[mark]}


def plain_cut(graph, wanted):
    """Of the nodes without which nothing wanted is reached, the last with no parameter on the way."""
    found = None
    for node in graph.order:
        above = set(walk(graph.root, stop=node)) - {node}
        on_the_way = [other for other in above if reaches(other, node)]
        if above & set(wanted) or any(is_leaf(child) for n in on_the_way for child, _ in n.next_functions):
            continue
        if not is_leaf(node) and len(node._input_metadata) == 1 and shape_of(node)[:1] == (B,):
            found = node
    return found


@examples(200)
@given(case=graphs(), leaves=st.booleans())
def test_the_lowest_cut_is_the_last_node_without_which_nothing_wanted_is_reached(case, leaves):
    graph, marks = case
    wanted = graph.leaves if leaves else marks
    cut = lowest_cut(graph, wanted, B)
    assert (None if cut is None else cut.node) is plain_cut(graph, wanted)
    assert cut is None or cut.output_nr == 0


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 2)
        self.norm, self.scale = nn.BatchNorm1d(D, affine=False), nn.Parameter(torch.ones(()))
        self.seen = {}
        for name in ("body", "head", "aux", "norm"):
            getattr(self, name).register_forward_hook(lambda m, args, out, name=name: self.seen.update({name: out}))


def split(net, h):
    left, right = net.head(h).chunk(2, 1)
    return (left * right).mean()


def unbound(net, h):
    left, *_, right = net.head(h).unbind(1)
    return F.softplus(left * right).mean()


def penalised(net, h):
    return net.head(h).square().mean() + sum(p.square().sum() for p in net.parameters())


Y = torch.tensor([0, 1, 3])
CUTS = {  # the loss, whose output is the cut above all leaves and above the head's call, or the operation
    "a classifier": (lambda n, h: F.cross_entropy(n.head(h), Y), "head", "head"),
    "its losses": (lambda n, h: F.cross_entropy(n.head(h), Y, reduction="none"), "head", "head"),
    "an activation and a shape": (lambda n, h: n.head(h).relu().view(B, 2, 2).mean((1, 2)).sum(), "head", "head"),
    "two losses": (lambda n, h: F.cross_entropy(z := n.head(h), Y) + z.square().mean(), "head", "head"),
    "a residual": (lambda n, h: F.cross_entropy(n.head(h) + h, Y), "Add", "head"),
    "a scale": (lambda n, h: F.cross_entropy(n.head(h) * n.scale, Y), "Mul", "Mul"),
    "a layer after it": (lambda n, h: n.aux(n.head(h)).mean(), "aux", "aux"),
    "an auxiliary loss": (lambda n, h: n.head(h).mean() + n.aux(h).mean(), None, "head"),
    "an auxiliary loss first": (lambda n, h: n.aux(h).mean() + n.head(h).exp().mean(), None, "head"),
    "an auxiliary loss per sample": (lambda n, h: (n.head(h).mean(1) + n.aux(h).mean(1)).sum(), "Add", "head"),
    "an L2 term": (penalised, None, "head"),
    "a norm over the batch": (lambda n, h: F.cross_entropy(n.norm(n.head(h)), Y), "norm", "norm"),
    "parts": (split, "head", "head"),
    "columns": (unbound, "head", "head"),
    "a mean over the batch first": (lambda n, h: n.head(h).mean(0).exp().sum(), "head", "head"),
    "a prototype": (lambda n, h: (n.head(h) @ n.aux(h).mean(0).repeat(2)).sum(), "Mv", "head"),
}


@pytest.mark.parametrize("case", CUTS)
def test_the_cut_is_as_low_as_all_paths_and_every_row_allow(case):
    net, (loss_of, everywhere, call) = Net(), CUTS[case]
    graph = Graph(loss_of(net, torch.tanh(net.body(torch.randn(B, D)))).grad_fn)
    for wanted, name in ((graph.leaves, everywhere), ([net.seen["head"].grad_fn], call)):
        cut = lowest_cut(graph, wanted, B)
        if name in net.seen:
            assert cut.node is net.seen[name].grad_fn
        else:
            assert (None if cut is None else kind_of(cut.node)) == name
        assert lowest_cut(graph, wanted, B + 4) is None


def test_a_norm_that_is_not_training_is_no_end():
    net = Net().eval()
    graph = Graph(F.cross_entropy(net.norm(net.head(torch.randn(B, D))), Y).grad_fn)
    assert lowest_cut(graph, graph.leaves, B).node is net.seen["head"].grad_fn


def test_what_is_split_is_no_cut_even_where_it_is_wanted():
    z = nn.Linear(D, D)(torch.randn(B, D)).tanh()
    left, right = z.chunk(2, 1)
    root = (left * right).sum()
    assert len(left.grad_fn._input_metadata) == 2
    assert kind_of(lowest_cut(Graph(root.grad_fn), [left.grad_fn], B).node) == "Mul"
    assert lowest_cut(Graph(root.grad_fn), [z.grad_fn], B).node is z.grad_fn


@pytest.mark.parametrize(*pairwise(sizes=[(B, D), (D, B), (B, B)], bias=[False, True], autocast=[False, True]))
def test_a_parameter_that_is_as_long_as_the_batch_is_not_taken_for_it(sizes, bias, autocast):
    features, classes = sizes
    layer = nn.Linear(features, classes, bias)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = layer(torch.randn(B, features))
    graph = Graph(logits.float().square().mean().grad_fn)
    assert lowest_cut(graph, graph.leaves, B).node is logits.grad_fn
    own = Graph(layer.weight.t().square().sum().grad_fn)
    cut = lowest_cut(own, own.leaves, features)
    assert cut is None or kind_of(cut.node) != "T"


def test_a_parameter_spread_over_the_batch_is_its_own_cut():
    token, bias = nn.Parameter(torch.randn(1, D)), nn.Parameter(torch.randn(D))
    spread = token.expand(B, -1)
    graph = Graph((spread + torch.randn(B, D)).square().mean().grad_fn)
    assert lowest_cut(graph, graph.leaves, B).node is spread.grad_fn
    added = torch.randn(B, D) + bias
    graph = Graph(added.square().mean().grad_fn)
    assert lowest_cut(graph, graph.leaves, B).node is added.grad_fn


@for_each("shape", [(B + 2, B, D), (2 * B, D), (B + 2, D, B), (1, B)])
def test_only_the_first_axis_is_the_batchs(shape):
    h = torch.randn(shape) * torch.ones(shape[-1], requires_grad=True)
    assert lowest_cut(Graph(h.square().mean().grad_fn), [h.grad_fn], B) is None
