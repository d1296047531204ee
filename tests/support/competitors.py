"""Parameters, reference batches and a mixed loss for the tests of other scores."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from support.toys import WithLosses, toy_data

HEAD = ("head.weight", "head.bias")
NAN = float("nan")
OTHERS = [toy_data(8, seed=5)[:3], toy_data(8, seed=5)[3:8]]  # two batches, of 3 and 5 samples


class Mixed(WithLosses):
    """Every loss depends on every sample, so that losses are differentiated twice."""

    def sample_losses(self, batch: Any) -> Tensor:
        return mixed_losses(self, batch)


def mixed_losses(module: nn.Module, batch: Any) -> Tensor:
    logits = module(batch[0])
    return F.cross_entropy(logits - logits.mean(0), batch[1], reduction="none")
