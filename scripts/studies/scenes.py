"""Pictures of two coloured shapes with captions that describe them: 1,800 different captions, made in a second."""

from typing import NamedTuple

import torch
from torch import Tensor

COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.8, 0.1),
    "blue": (0.2, 0.3, 1.0),
    "yellow": (0.9, 0.9, 0.1),
    "purple": (0.7, 0.1, 0.8),
    "white": (1.0, 1.0, 1.0),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
RELATIONS = ("above", "beside")
#: Objects are a colour and a shape; captions are an object, a relation, and another object.
OBJECTS = len(COLOURS) * len(SHAPES)
CAPTIONS = OBJECTS * OBJECTS * len(RELATIONS)
SIDE = 32
WORDS = ("", "a", *COLOURS, *SHAPES, *RELATIONS, ".")
#: Tokens of a caption: "a red circle above a blue ring ."
LENGTH = 8


class Scenes(NamedTuple):
    """Pairs of images and captions.

    Attributes:
        images: Shape ``(n, 3, 32, 32)``, -1 to 1.
        tokens: Int64, shape ``(n, 8)``; the last word has the highest number, as open_clip's text towers expect.
        mismatched: Captions that describe another image, shape ``(n,)``.
        captions: Index of each caption among all, int64 of shape ``(n,)``.
    """

    images: Tensor
    tokens: Tensor
    mismatched: Tensor
    captions: Tensor


def scenes(count: int, seed: int, mismatched: float, captions: int = CAPTIONS) -> Scenes:
    """Draw scenes.

    Args:
        count: Of pairs.
        seed: Of everything about them but which captions there are.
        mismatched: Share of pairs that get the caption of another such pair.
        captions: How many different captions there are.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(CAPTIONS, generator=torch.Generator().manual_seed(0))[:captions]
    shown = chosen[torch.randint(captions, (count,), generator=generator)]
    given = shown.clone()
    wrong = torch.randperm(count, generator=generator)[: round(mismatched * count)]
    given[wrong] = shown[wrong.roll(1)]
    images = _draw(shown, generator) + 0.1 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return Scenes(images.clamp(0, 1) * 2 - 1, _tokens(given), given != shown, given)


def _parts(captions: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Colour and shape of both objects, and the relation twice."""
    relation, pair = captions % len(RELATIONS), captions // len(RELATIONS)
    first, second = pair // OBJECTS, pair % OBJECTS
    return [(first // len(SHAPES), first % len(SHAPES)), (second // len(SHAPES), second % len(SHAPES)), (relation,) * 2]


def _tokens(captions: Tensor) -> Tensor:
    (colour, shape), (other_colour, other_shape), (relation, _) = _parts(captions)
    start = WORDS.index("red")
    word = torch.full_like(captions, WORDS.index("a"))
    shapes, relations = start + len(COLOURS), start + len(COLOURS) + len(SHAPES)
    end = torch.full_like(captions, WORDS.index("."))
    return torch.stack(
        [
            word,
            start + colour,
            shapes + shape,
            relations + relation,
            word,
            start + other_colour,
            shapes + other_shape,
            end,
        ],
        1,
    )


def _draw(captions: Tensor, generator: torch.Generator) -> Tensor:
    first, second, (relation, _) = _parts(captions)
    palette = torch.tensor(list(COLOURS.values()))
    above = relation == 0
    images = torch.full((len(captions), 3, SIDE, SIDE), 0.1)
    for (colour, shape), sign in ((first, -1), (second, 1)):
        jitter = 2 * torch.rand(len(captions), 2, generator=generator) - 1
        size = 5 + 1.5 * torch.rand(len(captions), generator=generator)
        offset = sign * 8.0
        down = SIDE / 2 + torch.where(above, offset, 0.0) + 1.5 * jitter[:, 0]
        right = SIDE / 2 + torch.where(above, 0.0, offset) + 1.5 * jitter[:, 1]
        y = (torch.arange(SIDE) + 0.5 - down[:, None])[:, :, None] / size[:, None, None]
        x = (torch.arange(SIDE) + 0.5 - right[:, None])[:, None, :] / size[:, None, None]
        radius, reach = (x.square() + y.square()).sqrt(), torch.maximum(x.abs(), y.abs())
        kinds = torch.stack(
            [
                radius < 1,
                reach < 0.9,
                (y.abs() < 1) & (x.abs() < (y + 1) / 2),
                (reach < 1) & (torch.minimum(x.abs(), y.abs()) < 0.35),
                (radius < 1) & (radius > 0.55),
            ]
        )
        mask = kinds[shape, torch.arange(len(captions))][:, None]
        images = torch.where(mask, palette[colour][:, :, None, None], images)
    return images
