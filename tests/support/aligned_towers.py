"""A fit of a small CLIP to an unrelated reference."""

from functools import partial

import torch

from lightning_mimic import GradMimic
from support.clips import KINDS, pairs
from support.toys import loader, trainer

ROWS, WIDTH = 16, 16  # of a batch, and of the ViTs' features
TAU = 0.03
STILL = {"optimizer": partial(torch.optim.SGD, lr=0.0)}


def fit(module, aligned, batches=None, *, kind="vit", epochs=1, options=None, **settings):
    """Fit a module; returns the aligned projections and the statistics."""
    callback = GradMimic(aligned, KINDS[kind][-1], temperature=TAU, min_ess=0, **settings)
    trainer(callback, epochs=epochs, **(options or {})).fit(module, batches or loader(pairs(80), ROWS))
    return callback.state_dict()["target"]["aligned"]
