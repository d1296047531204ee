"""Products with the samples' own gradients, from the losses alone, equal those of a loop over samples."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from lightning_mimic.gradients import Graph, LossGradients
from oracles import per_sample_gradients
from support.batch_norm_nets import fresh
from support.cases import case
from support.gradient_checks import Ad, contrastive, looped, losses_of, param, vectors_of
from support.networks import NETS, made

B, T, D = 4, 3, 4
FUSED = "which cannot be differentiated twice. Name parameters above it, or allow the slower attention that can with "


def held(net, losses_of, batch, names):
    """The losses and the rows over the named parameters, which pass the check."""
    torch.manual_seed(7)  # dropout
    losses = losses_of(net, batch)
    rows = LossGradients(losses, {name: net.get_parameter(name) for name in names})
    rows.check(Graph(losses.grad_fn))
    return losses, rows


def assert_own(net, batch, *, losses_of=losses_of, names=None, rtol=1e-9):
    vectors = vectors_of(net, names)
    dot = held(net, losses_of, batch, vectors)[1].dot(vectors)
    torch.manual_seed(7)
    expected = looped(per_sample_gradients(net, losses_of, batch), vectors)
    scale = float(expected.abs().max())
    assert scale > 1e-4, "a check that could not fail"
    assert dot.dtype == expected.dtype
    assert not dot.requires_grad
    torch.testing.assert_close(dot, expected, rtol=rtol, atol=rtol * scale)
    assert all(p.grad is None for p in net.parameters())


SINGLE = ["mlp", "conv net", "timm vit", "CLIP image tower", "CLIP text tower", "torchvision convnext", "mixer"]


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.float64) for kind in NETS), *((kind, torch.float32) for kind in SINGLE)]
)
def test_products_equal_those_of_a_loop_over_samples(kind, dtype):
    net, x, _ = made(kind, dtype=dtype)
    with sdpa_kernel(SDPBackend.MATH):
        assert_own(net, x, rtol=1e-9 if dtype == torch.float64 else 1e-3)


NETS_OF_PARAMETERS = {
    "class token": (lambda n, x: torch.cat([n.p.expand(B, -1, -1), n.l(x)], 1), {"p": (1, 1, D)}),
    "one number": (lambda n, x: n.l(x) * n.p.exp(), {"p": ()}),
    "a slice and a row": (lambda n, x: n.l(x)[..., :2] @ n.p[:2] + n.p[2], {"p": (D, 5)}),
    "einsum": (lambda n, x: torch.einsum("btd,tde->be", n.l(x), n.p), {"p": (T, D, 2)}),
    "a repeated token": (lambda n, x: n.p.repeat(B, T, 1) * n.l(x), {"p": (1, 1, D)}),
    "by its layer and by hand": (lambda n, x: n.l(x).tanh() @ n.l.weight + n.p, {"p": (D,)}),
    "a table of as many rows as samples": (lambda n, x: n.l(x)[:, 0] @ n.p.T, {"p": (B, D)}),
    "samples exchanged": (lambda n, x: n.l(x).flip(0) + n.p, {"p": (D,)}),
}


@pytest.mark.parametrize("kind", NETS_OF_PARAMETERS)
def test_parameters_of_no_layer(kind):
    torch.manual_seed(0)
    compute, shapes = NETS_OF_PARAMETERS[kind]
    net = Ad(compute, l=nn.Linear(D, D), **{name: param(*shape) for name, shape in shapes.items()}).double()
    x = torch.randn(B, T, D).double()
    for losses in (losses_of, contrastive):
        with case(losses.__name__):
            assert_own(net, x, losses_of=losses)


@pytest.mark.parametrize("kind", ["convolutions", "no norm over the batch", "tied and reused", "one axis"])
def test_own_gradients_where_samples_see_each_other(kind):
    for losses in (losses_of, contrastive):
        net, x = fresh(kind)
        with case(losses.__name__):
            assert_own(net, x, losses_of=losses)


class Clip(nn.Module):
    """Two towers and a temperature; the text's output is its embedding."""

    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(5, D), nn.LayerNorm(D))
        self.words, self.projection = nn.Embedding(9, D), param(D, D)
        self.logit_scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, pairs):
        image = F.normalize(self.image(pairs[0]) @ self.projection, dim=1)
        text = F.normalize(self.words(pairs[1]).mean(1), dim=1)
        return self.logit_scale.exp() * image @ text.T


def clip_losses(net, pairs):
    logits, own = net(pairs), torch.arange(len(pairs[0]))
    return (F.cross_entropy(logits, own, reduction="none") + F.cross_entropy(logits.T, own, reduction="none")) / 2


def clip(dtype=torch.float64):
    torch.manual_seed(0)
    return Clip().to(dtype), (torch.randn(6, 5, dtype=dtype), torch.randint(0, 9, (6, 2)))


@pytest.mark.parametrize("names", [None, ["logit_scale"], ["projection"], ["words.weight", "image.1.bias"]])
def test_own_losses_of_clip(names):
    for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        net, pairs = clip(dtype)
        with case(dtype):
            assert_own(net, pairs, losses_of=clip_losses, names=names, rtol=rtol)


@pytest.mark.parametrize("kind", ["mlp of tokens", "conv net", "mixer"])
def test_products_of_an_autocast_pass_are_near_those_of_the_exact_one(kind):
    net, x, _ = made(kind, dtype=torch.float32)
    vectors = vectors_of(net)

    def autocast(net, x):
        with torch.autocast("cpu", torch.bfloat16):
            return losses_of(net, x).float()

    dot = held(net, autocast, x, vectors)[1].dot(vectors)
    assert dot.dtype == torch.float32
    expected = looped(per_sample_gradients(net, losses_of, x), vectors)
    assert float((dot - expected).norm() / expected.norm()) < 0.05


def test_double_vectors_on_float_parameters():
    net, x, _ = made("mlp", dtype=torch.float32)
    vectors = vectors_of(net)
    _, rows = held(net, losses_of, x, vectors)
    doubles = rows.dot({name: v.double() for name, v in vectors.items()})
    assert doubles.dtype == torch.float64
    torch.testing.assert_close(doubles.float(), rows.dot(vectors), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "conv net", "torchvision resnet in eval mode"])
def test_the_backward_pass_afterwards_is_the_one_without_scoring_to_the_last_bit(kind):
    net, x, _ = made(kind, dtype=torch.float32)
    vectors = vectors_of(net)
    gradients = []
    for scored in (True, False):
        net.zero_grad()
        losses = losses_of(net, x)
        if scored:
            LossGradients(losses, dict(net.named_parameters())).dot(vectors)
            assert all(p.grad is None for p in net.parameters())
        losses.mean().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_products_in_a_no_grad_region():
    net, x, _ = made("mlp")
    vectors = vectors_of(net)
    _, rows = held(net, losses_of, x, vectors)
    expected = rows.dot(vectors)
    with torch.no_grad():
        torch.testing.assert_close(rows.dot(vectors), expected, rtol=0, atol=0)


def test_a_checkpointed_block():
    torch.manual_seed(0)
    block = nn.Sequential(nn.LayerNorm(D), nn.Dropout(0.5), nn.Linear(D, D), nn.GELU())

    def compute(net, x):
        return net.after(checkpoint(net.block, net.before(x), use_reentrant=False))

    net = Ad(compute, before=nn.Linear(D, D), block=block, after=nn.Linear(D, 2)).double()
    assert_own(net, torch.randn(B, T, D).double())


def attending():
    torch.manual_seed(0)
    parts = {"below": nn.Linear(D, 3 * D), "above": nn.Linear(D, 2), "beside": nn.Linear(D, 2)}

    def compute(net, x):
        q, k, v = net.below(x).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(*(t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v)))
        return net.above(mixed.transpose(1, 2).flatten(2)) + net.beside(x)

    return Ad(compute, **parts).double(), torch.randn(B, T, D).double()


def test_below_attention_that_can_be_differentiated_twice():
    net, x = attending()
    with sdpa_kernel(SDPBackend.MATH):
        assert_own(net, x)


def test_above_and_beside_fused_attention():
    net, x = attending()
    assert_own(net, x, names=["above.weight", "above.bias", "beside.weight"])


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["below.weight", "above.weight", "below.bias"], "'below.weight', 'below.bias'"),
        (["above.weight", "below.bias"], "'below.bias'"),
    ],
)
def test_below_fused_attention_parameters_are_refused_by_name(names, shown):
    net, x = attending()
    message = (
        f"`parameters`: {shown} lie below fused attention (ScaledDotProductFlashAttentionForCpu), {FUSED}"
        "`math_attention=True`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        held(net, losses_of, x, names)


def test_below_either_of_two_fused_attentions_parameters_are_refused():
    (left, x), (right, _) = attending(), attending()
    net = Ad(lambda net, x: net.left(x) + net.right(x), left=left, right=right)
    with pytest.raises(ValueError, match=r"^`parameters`: 'left.below.bias', 'right.below.bias' lie below fused"):
        held(net, losses_of, x, ["left.below.bias", "right.below.bias", "left.above.bias"])


def test_below_fused_attention_a_long_list_is_cut():
    net, x, _ = made("timm vit")
    names = [
        name for name in vectors_of(net) if not name.startswith(("blocks.1.norm2", "blocks.1.mlp", "norm", "head"))
    ]
    below = [name for name in names if not name.startswith("blocks.1.attn.proj")]
    message = f"`parameters`: {', '.join(map(repr, below[:6]))} and {len(below) - 6} more lie below fused attention"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        held(net, losses_of, x, names)
    assert_own(net, x, names=["blocks.1.attn.proj.weight", "blocks.1.mlp.fc1.weight", "norm.bias", "head.weight"])


@pytest.mark.parametrize("why", ["frozen", "unused"])
def test_what_no_path_leads_to_is_refused_by_name(why):
    net, x, _ = made("mlp")
    net.spare = nn.Linear(2, 2)
    names = ["0.weight", "spare.bias"] if why == "unused" else ["0.weight", "2.bias"]
    net.get_parameter(names[1]).requires_grad_(why == "unused")
    message = f"`parameters`: no path leads from the losses to '{names[1]}', or they are frozen."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        held(net, lambda net, x: losses_of(net[:5], x), x, names)
