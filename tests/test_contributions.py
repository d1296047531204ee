"""Where samples see each other, rows are their contributions to the total, as copies of the weights per row say."""

import pytest
import torch

from oracles import contributions, per_sample_gradients
from support.batch_norm_nets import NETS, fresh
from support.cases import for_each
from support.gradient_checks import assert_exact, contrastive, looped, losses_of, traced, vectors_of
from support.networks import IMAGES, made, timm_resnet, torchvision_resnet


@pytest.mark.parametrize("kind", NETS)
@for_each("losses", [losses_of, contrastive])
def test_the_oracles_contributions_add_up_to_the_ordinary_gradient(kind, losses):
    net, x = fresh(kind)
    ordinary = torch.autograd.grad(losses(net, x).sum(), list(net.parameters()))
    summed = [rows.sum(0) for rows in contributions(net, losses, x).values()]
    torch.testing.assert_close(summed, list(ordinary), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", NETS)
def test_where_no_sample_sees_another_the_oracles_agree(kind):
    net, x = fresh(kind)
    net.eval()
    own, contributed = per_sample_gradients(net, losses_of, x), contributions(net, losses_of, x)
    torch.testing.assert_close(contributed, own, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["convolutions", "tied and reused", "one axis"])
def test_where_samples_see_each_other_the_oracles_differ(kind):
    net, x = fresh(kind)
    own, contributed = per_sample_gradients(net, losses_of, x), contributions(net, losses_of, x)
    first = next(iter(own))
    assert (own[first] - contributed[first]).abs().max() > 1e-2 * own[first].abs().max()


@pytest.mark.parametrize("kind", NETS)
@for_each("losses", [losses_of, contrastive])
def test_products_are_those_of_the_contributions(kind, losses):
    net, x = fresh(kind)
    rows = assert_exact(net, x, losses_of=losses, oracle=contributions)
    independent = losses is losses_of and kind == "no norm over the batch"
    assert bool(rows.rows_that_mix_samples()) is not independent
    assert rows.normalised() is (kind != "no norm over the batch")


@for_each("ending", ["weight", "bias"])
def test_weights_or_biases_alone(ending):
    net, x = fresh("convolutions")
    assert_exact(net, x, names=[n for n, _ in net.named_parameters() if n.endswith(ending)], oracle=contributions)


@pytest.mark.parametrize("names", [["10.weight", "10.bias"], ["8.weight"], ["8.weight", "10.bias"]])
def test_above_the_last_norm_over_the_batch_rows_are_the_samples_own(names):
    net, x = fresh("convolutions")
    rows = assert_exact(net, x, names=names)
    assert not rows.rows_that_mix_samples()
    assert not rows.normalised()


def test_running_statistics_are_left_to_the_forward_pass():
    net, x = fresh("convolutions")
    vectors = vectors_of(net)
    rows = traced(net, losses_of, x, vectors)[1]
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    rows.dot(vectors)
    rows.rows_that_mix_samples()
    torch.testing.assert_close(dict(net.named_buffers()), before, rtol=0, atol=0)


@pytest.mark.parametrize("make", [torchvision_resnet, timm_resnet])
def test_a_resnets_contributions_add_up_to_the_ordinary_product(make):
    torch.manual_seed(0)
    net, x = make().double(), torch.randn(4, *IMAGES).double()
    vectors = vectors_of(net)
    losses, rows, unseen = traced(net, losses_of, x, vectors)
    assert unseen == {}
    total = torch.autograd.grad(losses.sum(), [net.get_parameter(name) for name in vectors], retain_graph=True)
    slope = sum((g * v).sum() for g, v in zip(total, vectors.values(), strict=True))
    torch.testing.assert_close(rows.dot(vectors).sum(), slope, rtol=1e-9, atol=0)
    assert rows.rows_that_mix_samples()
    assert rows.normalised()


@pytest.mark.parametrize("kind", ["CLIP image tower", "mlp", "torchvision vit"])
def test_under_a_contrastive_loss_products_add_up_to_the_ordinary_one(kind):
    net, x, _ = made(kind)
    vectors = vectors_of(net)
    losses, rows, _ = traced(net, contrastive, x, vectors)
    total = torch.autograd.grad(losses.sum(), [net.get_parameter(name) for name in vectors], retain_graph=True)
    slope = sum((g * v).sum() for g, v in zip(total, vectors.values(), strict=True))
    torch.testing.assert_close(rows.dot(vectors).sum(), slope, rtol=1e-9, atol=0)
    own = looped(per_sample_gradients(net.eval(), contrastive, x), vectors)
    assert (rows.dot(vectors) - own).abs().max() > 1e-3 * own.abs().max()
