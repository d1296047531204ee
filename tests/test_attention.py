"""Inside attention, where the time axis comes first and no layer is called, products are exact or named as unseen."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from oracles import per_sample_gradients
from support.cases import case, pairwise
from support.gradient_checks import Ad, assert_exact, losses_of, traced, unknown, vectors_of

ROWS, WIDTH = 3, 4


def attention(batch_first=True, **options):
    return nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first, **options)


def inputs(tokens, rows=ROWS):
    torch.manual_seed(tokens)
    return torch.randn(rows, tokens, WIDTH).double()


def self_attending(layer, **masks):
    """A net from and to batch first, whatever the layer wants."""

    def compute(net, x):
        h = x if layer.batch_first else x.transpose(0, 1)
        h = net.attention(h, h, h, **masks)[0]
        return (h if layer.batch_first else h.transpose(0, 1)).tanh()

    return Ad(compute, attention=layer).double()


def masks_of(kind, tokens):
    masks = {}
    if "padding" in kind:
        masks["key_padding_mask"] = torch.arange(tokens) >= torch.tensor([[1], [tokens], [2]])
    if "causal" in kind:
        masks["attn_mask"] = torch.ones(tokens, tokens).triu(1).bool()
    if "per head" in kind:
        masks["attn_mask"] = torch.randn(2 * ROWS, tokens, tokens).double()
    return masks


@pytest.mark.parametrize(
    *pairwise(
        mask=["none", "padding", "causal", "padding, causal", "per head"],
        need_weights=[True, False],
        batch_first=[True, False],
        dropout=[0.0, 0.5],
        tokens=[2, ROWS],
    )
)
def test_self_attention(mask, need_weights, batch_first, dropout, tokens):
    torch.manual_seed(0)
    layer = attention(batch_first, dropout=dropout)
    net = self_attending(layer, need_weights=need_weights, **masks_of(mask, tokens))
    rows = assert_exact(net, inputs(tokens))
    assert not rows.rows_that_mix_samples()


OPTIONS = {"bias": False, "add_zero_attn": True, "add_bias_kv": True}


@pytest.mark.parametrize(*pairwise(option=OPTIONS, batch_first=[True, False], need_weights=[True, False]))
def test_options_of_self_attention(option, batch_first, need_weights):
    torch.manual_seed(0)
    net = self_attending(attention(batch_first, **{option: OPTIONS[option]}), need_weights=need_weights)
    assert_exact(net, inputs(2))
    assert_exact(net, inputs(1, rows=1))


def test_one_attention_called_twice():
    torch.manual_seed(0)

    def compute(net, x):
        for _ in range(2):
            x = x + net.attention(x, x, x)[0]
        return x

    assert_exact(Ad(compute, attention=attention()).double(), inputs(2))


def test_the_weights_alone_of_an_attention():
    torch.manual_seed(0)
    net = Ad(lambda net, x: net.attention(x, x, x)[1], attention=attention()).double()
    assert_exact(net, inputs(2), unseen=["*out_proj*"])


CROSS = {
    "all different": (lambda net, x: net.attention(x, 2 * x, x.sin())[0], {}),
    "keys are values": (lambda net, x: net.attention(x, y := x.sin(), y)[0], {}),
    "other lengths": (lambda net, x: net.attention(x[:, :2], x, x)[0], {}),
    "other widths": (lambda net, x: net.attention(x, x[..., :3], x[..., :2])[0], {"kdim": 3, "vdim": 2}),
    "biases of keys and values": (lambda net, x: net.attention(x, y := x.sin(), y)[0], {"add_bias_kv": True}),
}


@pytest.mark.parametrize("kind", CROSS)
def test_cross_attention(kind):
    torch.manual_seed(0)
    compute, options = CROSS[kind]
    parts = {"attention": attention(**options), "before": nn.Linear(WIDTH, WIDTH)}
    net = Ad(lambda net, x: compute(net, net.before(x)), **parts).double()
    for rows, tokens in ((ROWS, ROWS), (ROWS, 5), (1, 2), (2, 5), (5, 5)):
        with case(f"{rows} rows, {tokens} tokens"):
            assert not assert_exact(net, inputs(tokens, rows)).rows_that_mix_samples()
    for name in vectors_of(net):
        with case(name):
            assert_exact(net, inputs(5, 2), names=[name])


def test_attention_without_a_batch_is_unseen():
    net = Ad(lambda net, x: net.attention(x[0], x[0], x[0])[0], attention=attention()).double()
    vectors = vectors_of(net)
    for tokens in (ROWS, 5):
        with case(f"{tokens} tokens"):
            rows, unseen = traced(net, lambda net, x: net(x).sum(1)[:ROWS], inputs(tokens), vectors)[1:]
            assert set(unknown(rows, unseen)) == set(vectors)


@pytest.mark.parametrize(*pairwise(norm_first=[True, False], dropout=[0.0, 0.5], tokens=[2, ROWS]))
def test_an_encoder_layer_with_the_batch_first(norm_first, dropout, tokens):
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(WIDTH, 2, 6, dropout, batch_first=True, norm_first=norm_first).double()
    assert_exact(net, inputs(tokens))


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("tokens", [2, ROWS])
def test_an_encoder_layer_with_the_time_first_is_exact_where_axes_differ_in_length(norm_first, tokens):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 6, 0.1, norm_first=norm_first)
    net = Ad(lambda net, x: net.layer(x.transpose(0, 1)).transpose(0, 1), layer=layer).double()
    assert_exact(net, inputs(tokens, 5))
    # There are three projections, and as many tokens as samples: what is outside of the attention is refused, if any.
    assert_exact(net, inputs(tokens), unseen=None)


def test_attention_over_the_batch_by_mistake_is_unseen():
    torch.manual_seed(0)
    net = Ad(lambda net, x: net.attention(x, x, x)[0], attention=attention(batch_first=False)).double()
    vectors = vectors_of(net)
    assert set(unknown(*traced(net, losses_of, inputs(2), vectors)[1:])) == set(vectors)


def test_a_decoder_layer():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(WIDTH, 2, 6, 0.1, batch_first=True)
    assert_exact(Ad(lambda net, x: net.layer(x, x.sin()), layer=layer).double(), inputs(2))


BLOCKS = {
    "linear": lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(WIDTH, WIDTH), nn.Tanh()),
}


def checkpointed(block, use_reentrant):
    def compute(net, x):
        return net.after(checkpoint(net.block, net.before(x), use_reentrant=use_reentrant))

    parts = {"before": nn.Linear(WIDTH, WIDTH), "block": block, "after": nn.Linear(WIDTH, WIDTH)}
    return Ad(compute, **parts).double()


@pytest.mark.parametrize("kind", BLOCKS)
def test_checkpointed_layers(kind):
    torch.manual_seed(0)
    assert_exact(checkpointed(BLOCKS[kind](), use_reentrant=False), inputs(2))


def test_checkpointed_attention_is_exact_or_stops():
    torch.manual_seed(0)
    net = checkpointed(nn.TransformerEncoderLayer(WIDTH, 2, 6, 0.0, batch_first=True), use_reentrant=False)
    try:
        assert_exact(net, inputs(2), unseen=None)
    except CheckpointError as error:
        assert "already unpacked" in str(error)  # noqa: PT017


@pytest.mark.parametrize("kind", BLOCKS)
def test_what_a_reentrant_checkpoint_hides_is_unseen(kind):
    torch.manual_seed(0)
    net = checkpointed(BLOCKS[kind](), use_reentrant=True)
    vectors = vectors_of(net)
    assert set(traced(net, losses_of, inputs(2), vectors)[2]) == {name for name in vectors if name.startswith("block")}
    assert_exact(net, inputs(2), names=["after.weight", "after.bias"], oracle=plainly)


def plainly(net, losses_of, x):
    """The loop over samples with no checkpoint in it, which autograd.grad could not cross."""
    compute = net.compute
    net.compute = lambda net, x: net.after(net.block(net.before(x)))
    gradients = per_sample_gradients(net, losses_of, x)
    net.compute = compute
    return gradients


def test_a_layer_used_above_a_reentrant_checkpoint_that_uses_it_too_is_unseen():
    torch.manual_seed(0)

    def compute(net, x):
        return net.layer(checkpoint(net.layer, x.requires_grad_(), use_reentrant=True))

    net = Ad(compute, layer=nn.Linear(WIDTH, WIDTH)).double()
    vectors = vectors_of(net)
    assert set(traced(net, losses_of, inputs(2), vectors)[2]) == set(vectors)
