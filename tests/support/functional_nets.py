"""Networks that are a function of their parameters, and the shapes of their inputs."""

import torch

from support.gradient_checks import Ad

B, T, D = 3, 2, 4
FLAT, TOKENS, IMAGE = (B, D), (B, T, D), (B, D, T)


def ad(compute, parts):
    torch.manual_seed(0)
    return Ad(lambda net, x: compute(net, x).sin(), **parts()).double()
