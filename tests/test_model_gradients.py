"""Products over whole models equal those of a loop over samples, on the architectures people train."""

import pytest
import torch

from support.cases import case, for_each
from support.gradient_checks import assert_exact, assert_near_under_autocast, losses_of, traced, vectors_of
from support.networks import NETS, made


@pytest.mark.parametrize("kind", NETS)
def test_products_equal_those_of_a_loop_over_samples(kind):
    net, x, unseen = made(kind)
    rows = assert_exact(net, x, unseen=unseen)
    assert not rows.rows_that_mix_samples()


@pytest.mark.parametrize("kind", ["mlp", "timm vit", "torchvision vit", "CLIP text tower"])
def test_a_batch_of_one_has_the_ordinary_gradient(kind):
    net, x, unseen = made(kind, rows=1)
    assert_exact(net, x, unseen=unseen)


@pytest.mark.parametrize("kind", ["conv net", "timm vit", "CLIP image tower", "torchvision convnext", "mixer"])
def test_float32_products_are_within_its_rounding(kind):
    net, x, unseen = made(kind, dtype=torch.float32)
    assert_exact(net, x, unseen=unseen, rtol=1e-4)


@pytest.mark.parametrize("kind", ["mlp of tokens", "conv net", "timm vit", "torchvision vit"])
def test_products_of_an_autocast_pass_are_near_those_of_the_exact_one(kind):
    net, x, _ = made(kind, dtype=torch.float32)
    net.eval()
    assert_near_under_autocast(net, x)


@pytest.mark.parametrize("kind", ["mlp", "conv net", "timm vit, layer scale", "torchvision vit", "CLIP image tower"])
def test_weights_or_biases_alone(kind):
    net, x, _ = made(kind)
    for ending in ("weight", "bias"):
        with case(ending):
            assert_exact(net, x, names=[name for name, _ in net.named_parameters() if name.endswith(ending)])


@for_each(
    ("kind", "names"),
    [
        ("mlp", ["4.weight", "4.bias"]),
        ("mlp", ["0.weight", "4.bias"]),
        ("timm vit", ["cls_token", "blocks.1.attn.qkv.weight"]),
        ("timm vit", ["pos_embed"]),
        ("CLIP image tower", ["proj", "class_embedding"]),
        ("CLIP image tower", ["proj"]),
        ("torchvision vit", ["encoder.layers.encoder_layer_1.self_attention.in_proj_weight", "heads.head.bias"]),
        ("torchvision swin", ["head.weight", "norm.bias"]),
    ],
)
def test_some_parameters_alone(kind, names):
    net, x, _ = made(kind)
    assert_exact(net, x, names=names)


@for_each("frozen", ["0.", "2.", "4.", "2.weight", "0.bias", "4.weight"])
def test_what_is_frozen_is_in_nobodys_way(frozen):
    net, x, _ = made("mlp")
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    assert_exact(net, x)


def test_a_frozen_backbone_below_leaves_the_head():
    net, x, _ = made("timm vit")
    net.requires_grad_(False)
    net.head.requires_grad_(True)
    assert_exact(net, x)
    vectors = vectors_of(net, ["head.weight", "blocks.0.mlp.fc1.weight", "cls_token"])
    unseen = traced(net, losses_of, x, vectors)[2]
    assert set(unseen) == {"blocks.0.mlp.fc1.weight", "cls_token"}
    assert "ran without gradient" in unseen["blocks.0.mlp.fc1.weight"]
    assert unseen["cls_token"] == "no path leads from the loss to it"
