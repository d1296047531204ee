"""Layers of every kind with a rule that takes one tensor, and batches for them."""

from functools import partial

import pytest
import torch
from torch import nn

LAYERS = {  # how the layer is made, and the shape of one sample
    "linear": (partial(nn.Linear, 5, 4), (5,)),
    "linear, one token axis": (partial(nn.Linear, 5, 4), (3, 5)),
    "linear, two token axes": (partial(nn.Linear, 5, 4), (2, 3, 5)),
    "linear, more tokens than features": (partial(nn.Linear, 2, 3), (9, 2)),
    "linear, no bias": (partial(nn.Linear, 5, 4, bias=False), (3, 5)),
    "conv1d": (partial(nn.Conv1d, 3, 4, 3, stride=2, dilation=2, padding=2), (3, 7)),
    "conv1d, groups": (partial(nn.Conv1d, 4, 2, 2, groups=2, bias=False), (4, 5)),
    "conv2d": (partial(nn.Conv2d, 3, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (3, 6, 5)),
    "conv2d, groups": (partial(nn.Conv2d, 4, 6, 3, groups=2), (4, 5, 4)),
    "conv2d, circular": (partial(nn.Conv2d, 3, 4, 3, padding=1, padding_mode="circular"), (3, 4, 5)),
    "conv2d, reflect": (partial(nn.Conv2d, 3, 4, 3, padding=(1, 2), padding_mode="reflect"), (3, 4, 5)),
    "conv2d, same": (partial(nn.Conv2d, 3, 4, (1, 3), padding="same"), (3, 4, 5)),
    "conv3d": (partial(nn.Conv3d, 2, 4, (1, 2, 3), stride=(1, 2, 1), padding=1, groups=2), (2, 3, 4, 3)),
    "layer norm": (partial(nn.LayerNorm, 5, eps=1e-2), (5,)),
    "layer norm, tokens": (partial(nn.LayerNorm, 5), (3, 5)),
    "layer norm, two axes, no bias": (partial(nn.LayerNorm, (3, 4), bias=False), (2, 3, 4)),
    "group norm": (partial(nn.GroupNorm, 2, 6, eps=1e-2), (6,)),
    "group norm, pixels": (partial(nn.GroupNorm, 2, 4), (4, 3, 2)),
    "batch norm": (lambda: nn.BatchNorm1d(4, eps=1e-2).eval(), (4,)),
    "batch norm, sequence": (lambda: nn.BatchNorm1d(4).eval(), (4, 3)),
    "batch norm, pixels": (lambda: nn.BatchNorm2d(3).eval(), (3, 4, 2)),
    "batch norm, voxels": (lambda: nn.BatchNorm3d(2).eval(), (2, 2, 3, 2)),
    "batch norm, training": (partial(nn.BatchNorm1d, 4, eps=1e-2), (4,)),
    "batch norm, training, pixels": (partial(nn.BatchNorm2d, 3), (3, 4, 2)),
    "batch norm, no statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False).eval(), (3, 4, 2)),
    "rms norm": (partial(nn.RMSNorm, 5, eps=1e-2), (5,)),
    "rms norm, tokens, no eps": (partial(nn.RMSNorm, 5), (3, 5)),
    "rms norm, two axes": (partial(nn.RMSNorm, (3, 4)), (2, 3, 4)),
    "prelu": (nn.PReLU, (5,)),
    "prelu, channels": (partial(nn.PReLU, 5), (5,)),
    "prelu, channels, pixels": (partial(nn.PReLU, 3), (3, 4, 2)),
    "transposed conv1d": (partial(nn.ConvTranspose1d, 3, 4, 3, stride=3, dilation=2, padding=2), (3, 7)),
    "transposed conv1d, groups": (partial(nn.ConvTranspose1d, 4, 2, 2, groups=2, bias=False), (4, 5)),
    "transposed conv2d": (
        partial(nn.ConvTranspose2d, 3, 4, (3, 2), (2, 1), padding=(1, 2), output_padding=(1, 2), dilation=(1, 3)),
        (3, 4, 5),
    ),
    "transposed conv2d, groups": (partial(nn.ConvTranspose2d, 4, 6, 3, groups=2), (4, 5, 4)),
    "transposed conv3d": (partial(nn.ConvTranspose3d, 2, 4, (1, 2, 3), stride=(1, 2, 1), groups=2), (2, 3, 4, 3)),
    "embedding": (partial(nn.Embedding, 4, 3), ()),
    "embedding, tokens": (partial(nn.Embedding, 4, 3), (6,)),
    "embedding, padding": (partial(nn.Embedding, 4, 3, padding_idx=-3), (6,)),
}
LINEAR = [kind for kind in LAYERS if kind.startswith("linear")]
TARGETS = [("weight", "bias"), ("weight",), ("bias",)]


def with_targets(kinds):
    pairs = [(kind, target) for kind in kinds for target in TARGETS]
    return [
        pytest.param(kind, target, id=f"{kind}: {'+'.join(target)}")
        for kind, target in pairs
        if all(getattr(LAYERS[kind][0](), part, None) is not None for part in target)
    ]


def made(kind, rows, dtype=torch.float64):
    """A layer and a batch; the same numbers, in float32 already, for every dtype."""
    torch.manual_seed(rows)
    make, shape = LAYERS[kind]
    layer = make()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
        for name, statistic in layer.named_buffers():
            if name != "num_batches_tracked":
                statistic.uniform_(0.5, 2.0)
    if isinstance(layer, nn.Embedding):
        x = torch.randint(4, (rows, *shape))
        x.view(-1)[0] = 1  # the row that padding_idx=-3 means
    else:
        x = torch.randn(rows, *shape).to(dtype)
    return layer.to(dtype), (x, torch.randn(rows).to(dtype))
