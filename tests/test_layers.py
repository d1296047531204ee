"""Which layers' gradients follow from what goes in and comes back, and what is said of the others."""

import re

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.nn.utils import parametrizations

from lightning_mimic.gradients import LayerGradients, layer_rules
from oracles import per_sample_gradients
from support.cases import for_each

KNOWN = [
    nn.Linear(2, 2),
    nn.Conv1d(2, 2, 1),
    nn.Conv2d(2, 2, 1),
    nn.Conv3d(2, 2, 1),
    nn.LayerNorm(2),
    nn.GroupNorm(1, 2),
    nn.BatchNorm1d(2),
    nn.BatchNorm2d(2),
    nn.BatchNorm3d(2),
    nn.Embedding(2, 2),
    nn.ConvTranspose1d(2, 2, 1),
    nn.ConvTranspose2d(2, 2, 1),
    nn.ConvTranspose3d(2, 2, 1),
    nn.Bilinear(2, 2, 2),
    nn.RMSNorm(2),
    nn.PReLU(),
    nn.PReLU(2),
]


class Own(nn.Linear):
    pass


@for_each(
    "layer",
    [
        *KNOWN,
        Own(2, 2),
        nn.Linear(2, 2, bias=False),
        nn.LayerNorm(2, bias=False),
        nn.MultiheadAttention(4, 1).out_proj,
    ],
)
def test_known_layers_pass_the_check_and_linear_ones_offer_all_three_products(layer):
    LayerGradients.check("head", layer)
    offered = {"dot", "norms", "gram"} if isinstance(layer, nn.Linear) else {"dot"}
    assert LayerGradients.products_of(layer) == offered


@for_each(
    "layer",
    [
        nn.MultiheadAttention(2, 1),
        nn.EmbeddingBag(2, 2),
        nn.InstanceNorm2d(2, affine=True),
        nn.SyncBatchNorm(2),
        nn.RReLU(),
        nn.Sequential(nn.Linear(2, 2)),
    ],
)
def test_a_layer_of_an_unknown_kind_is_refused_by_name_and_type(layer, monkeypatch):
    monkeypatch.setattr(layer_rules, "_REGISTERED", {})
    message = (
        f"`parameters`: 'body.head' is a {type(layer).__name__}; per-sample gradients are known for Linear, Bilinear, "
        "Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, LayerNorm, RMSNorm, GroupNorm, "
        "BatchNorm1d, BatchNorm2d, BatchNorm3d, Embedding, PReLU layers. Name such a layer, or register a rule for "
        "this one with `lightning_mimic.gradients.register_layer_rule`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LayerGradients.check("body.head", layer)


@for_each(
    ("layer", "own"),
    [
        (nn.utils.prune.identity(nn.Linear(2, 2), "weight"), "bias, weight_orig"),
        (nn.utils.prune.identity(nn.Linear(2, 2), "bias"), "bias_orig, weight"),
        (nn.utils.prune.identity(nn.Conv2d(2, 2, 1, bias=False), "weight"), "weight_orig"),
        (nn.utils.spectral_norm(nn.Conv1d(2, 2, 1)), "bias, weight_orig"),
        (parametrizations.weight_norm(nn.Linear(2, 2)), "bias"),
        (parametrizations.weight_norm(nn.ConvTranspose2d(2, 2, 1)), "bias"),
        (nn.utils.prune.identity(nn.Bilinear(2, 2, 2), "weight"), "bias, weight_orig"),
        (nn.utils.prune.identity(nn.PReLU(2), "weight"), "weight_orig"),
    ],
)
def test_a_layer_that_makes_its_weight_of_others_is_refused_with_their_names(layer, own):
    message = (
        f"`parameters`: 'head' makes its weight of {own} (weight_norm, pruning ...), in which it is not linear. Name "
        "another layer, or remove the reparametrisation."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LayerGradients.check("head", layer)


@for_each(
    "layer",
    [
        parametrizations.weight_norm(nn.Linear(2, 2, bias=False)),
        nn.LayerNorm(2, elementwise_affine=False),
        nn.RMSNorm(2, elementwise_affine=False),
    ],
)
def test_a_layer_without_parameters_of_its_own_is_refused_in_a_whole_sentence(layer):
    with pytest.raises(ValueError, match=r"`parameters`: 'head' ") as caught:
        LayerGradients.check("head", layer)
    assert "  " not in str(caught.value)


class Rows(nn.Embedding):
    pass


@for_each(
    ("options", "named"),
    [
        ({"max_norm": 1.0}, "max_norm"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq"),
        ({"sparse": True}, "sparse"),
        ({"sparse": True, "max_norm": 2.0}, "max_norm, sparse"),
    ],
)
def test_an_embedding_whose_gradient_is_not_plain_is_refused_with_the_option(options, named):
    message = (
        f"`parameters`: 'words' is an Embedding with {named}, under which its gradient is not linear in its rows or "
        "not dense. Switch that off, or name another layer."
    )
    for kind in (nn.Embedding, Rows):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            LayerGradients.check("words", kind(4, 2, **options))


@for_each(
    ("layer", "shape"),  # the smallest output with a batch axis
    [
        (nn.Linear(2, 3), (5, 3)),
        (Own(2, 3), (5, 3)),
        (nn.Conv1d(2, 3, 1), (5, 3, 4)),
        (nn.Conv2d(2, 3, 1), (5, 3, 4, 4)),
        (nn.Conv3d(2, 3, 1), (5, 3, 4, 4, 4)),
        (nn.LayerNorm(3), (5, 3)),
        (nn.LayerNorm((4, 3)), (5, 4, 3)),
        (nn.GroupNorm(1, 3), (5, 3)),
        (nn.BatchNorm1d(3), (5, 3)),
        (nn.BatchNorm2d(3), (5, 3, 4, 4)),
        (nn.BatchNorm3d(3), (5, 3, 4, 4, 4)),
        (nn.Embedding(2, 3), (5, 3)),
        (nn.ConvTranspose1d(2, 3, 1), (5, 3, 4)),
        (nn.ConvTranspose2d(2, 3, 1), (5, 3, 4, 4)),
        (nn.ConvTranspose3d(2, 3, 1), (5, 3, 4, 4, 4)),
        (nn.Bilinear(2, 2, 3), (5, 3)),
        (nn.RMSNorm(3), (5, 3)),
        (nn.RMSNorm((4, 3)), (5, 4, 3)),
        (nn.PReLU(), (5,)),
        (nn.PReLU(3), (5, 3)),
    ],
)
def test_an_output_without_a_batch_axis_is_recognised(layer, shape):
    assert LayerGradients.batch_first(layer, shape) is True
    assert LayerGradients.batch_first(layer, torch.Size((7, *shape))) is True
    assert LayerGradients.batch_first(layer, shape[1:]) is False


class Bent(nn.Linear):
    def forward(self, input):
        return super().forward(input).relu()


class Standardised(nn.Conv2d):  # as in BiT: another weight through the inner method
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight / weight.std((1, 2, 3), keepdim=True), bias)


class Cropped(nn.ConvTranspose2d):
    def _output_padding(self, *arguments):
        return [0, 0]


def on_the_object(name: str) -> nn.Module:
    layer = nn.Conv1d(2, 2, 1)
    setattr(layer, name, lambda *inputs: inputs[0])
    return layer


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (Bent(4, 3), "Bent with a forward of its own, which may compute something else than Linear."),
        (
            Standardised(4, 2, 3),
            "Standardised with a forward of its own, which may compute something else than Conv2d.",
        ),
        (Cropped(4, 2, 3), "Cropped with a forward of its own, which may compute something else than ConvTranspose2d."),
        (on_the_object("forward"), "Conv1d with a forward of its own"),
        (on_the_object("_conv_forward"), "Conv1d with a forward of its own"),
    ],
)
def test_a_layer_with_a_forward_of_its_own_is_left_to_the_graph(layer, kind):
    with pytest.raises(ValueError, match=f"`parameters`: 'head' is a {re.escape(kind)}"):
        LayerGradients.check("head", layer)


def test_a_subclass_has_its_kinds_products():
    layer = Own(3, 2).double()
    inputs, b = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    gradients = per_sample_gradients(layer, lambda m, x: (m(x) * b).sum(1), inputs)
    matrix = torch.cat([g.flatten(1) for g in gradients.values()], 1)
    held = LayerGradients(layer, inputs, b)
    torch.testing.assert_close(held.norms(), matrix.norm(dim=1))
    torch.testing.assert_close(held.gram(), matrix @ matrix.T)
    torch.testing.assert_close(held.mean(), {name: g.mean(0) for name, g in gradients.items()})
