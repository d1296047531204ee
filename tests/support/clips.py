"""Small CLIPs and pairs, and what they compute written out; at module level, so that spawned processes find them."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_mimic.models import CLIP
from oracles import per_sample_gradients, softmax_weights, weighted_gradient

LENGTH, WORDS, SIDE = 8, 100, 32
VISION: dict[str, Any] = {"layers": 1, "width": 16, "patch_size": 16, "image_size": SIDE, "head_width": 8}
TEXT: dict[str, Any] = {"layers": 1, "width": 16, "context_length": LENGTH, "heads": 2, "vocab_size": WORDS}
TIMM: dict[str, Any] = {"timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear"}
TIMM |= {"image_size": SIDE}
BARE = ["towers.visual.proj", "towers.text_projection"]

# name: class, width of the shared space, image tower, text tower, both projections as `parameters` takes them
KINDS: dict[str, tuple[Callable[..., nn.Module], int, dict[str, Any], dict[str, Any], list[str]]] = {
    "vit": (open_clip.CLIP, 12, VISION, TEXT, BARE),
    "siglip": (partial(open_clip.CLIP, init_logit_bias=-1.5), 12, VISION, TEXT, BARE),
    "wide": (open_clip.CLIP, 20, VISION, TEXT, BARE),
    "narrow": (open_clip.CLIP, 7, VISION, TEXT, BARE),
    "convolution": (
        open_clip.CLIP,
        12,
        TIMM,
        TEXT | {"proj_bias": True},
        ["towers.visual.head.proj", "towers.text_projection"],
    ),
    "biases": (
        open_clip.CustomTextCLIP,
        12,
        TIMM | {"timm_proj_bias": True},
        TEXT | {"proj_bias": True},
        ["towers.visual.head.proj", "towers.text.text_projection"],
    ),
}
SGD = partial(torch.optim.SGD, lr=0.3)


def towers(kind: str = "vit", seed: int = 0, dtype: torch.dtype = torch.float64, **text: Any) -> nn.Module:
    """Open_clip's towers with weights of their own seed."""
    make, width, image, words, _ = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(width, image, words | text).to(dtype)


def clip(kind: str = "vit", seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> CLIP:
    """A module that learns by plain gradient descent, on a learning rate that falls from the first step on."""
    return CLIP(towers(kind, seed, dtype), **({"optimizer": SGD, "warmup_steps": 0} | options)).to(dtype)


def pairs(count: int = 12, seed: int = 0, dtype: torch.dtype = torch.float64) -> TensorDataset:
    """Random images and captions that end at random places."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, SIDE, SIDE, generator=generator).to(dtype)  # the same in every precision
    texts = torch.randint(1, WORDS - 1, (count, LENGTH), generator=generator)
    ends = torch.randint(2, LENGTH, (count, 1), generator=generator)
    return TensorDataset(images, texts.scatter(1, ends, WORDS - 1))


def losses_of(module: nn.Module, batch: Any) -> Tensor:
    """Own losses: of each pair among the batch's, by its image and by its text."""
    towers: Any = module.towers
    images, texts = (F.normalize(e, dim=1) for e in (towers.encode_image(batch[0]), towers.encode_text(batch[1])))
    cosines = images @ texts.T
    logits = towers.logit_scale.exp() * cosines
    if towers.logit_bias is not None:
        belong = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
        both = -F.logsigmoid(belong * (logits + towers.logit_bias))
        return (both.sum(0) + both.sum(1)) / 2
    by_image, by_text = -logits.log_softmax(1).diagonal(), -logits.log_softmax(0).diagonal()
    return (by_image + by_text) / 2


def targets_of(module: nn.Module, kind: str) -> dict[str, nn.Parameter]:
    """Both projections by full name."""
    paths = KINDS[kind][-1]
    return {n: p for n, p in module.named_parameters() if any(n == path or n.startswith(f"{path}.") for path in paths)}


def oracle_steps(
    module: CLIP, batches: Sequence[Any], score: Any, tau: float, lr: float = 0.3, accumulate: int = 1
) -> list[tuple[Tensor, Tensor]]:
    """SGD on Σ wᵢ gᵢ with w = softmax(m/τ), a cosine over all steps; scores and weights of each micro-batch."""
    steps, done, seen, window = math.ceil(len(batches) / accumulate), 0, [], {}
    for index, batch in enumerate(batches):
        gradients = per_sample_gradients(module, losses_of, batch)
        scores = score(module, batch, gradients)
        weights = softmax_weights(scores, tau)
        seen.append((scores, weights))
        step = weighted_gradient(gradients, weights)
        window = {n: window.get(n, 0) + g / accumulate for n, g in step.items()}
        if (index + 1) % accumulate == 0 or index + 1 == len(batches):
            rate = lr * (1 + math.cos(math.pi * done / steps)) / 2
            with torch.no_grad():
                for name, g in window.items():
                    module.get_parameter(name).sub_(rate * g)
                module.towers.logit_scale.clamp_(0, math.log(100))
            window, done = {}, done + 1
    return seen
