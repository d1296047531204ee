"""What is no reference to align a CLIP with, and what else of a module is aligned."""

import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_mimic import Aligned, GradMimic
from lightning_mimic.reference import aligned_direction
from support.aligned_towers import ROWS, STILL, fit
from support.clips import KINDS, clip, pairs, towers
from support.toys import loader, trainer


class Wrong(nn.Module):
    """A reference that says something else."""

    def __init__(self, images, texts):
        super().__init__()
        self.images, self.texts = images, texts

    def encode_image(self, images):
        return self.images(images)

    def encode_text(self, texts):
        return self.texts(texts)


def fails(rows):
    raise RuntimeError("expected an image of 224 pixels")


def ones(*shape):
    return lambda rows: torch.ones(len(rows), *shape).double()


def quoted(*names):
    return ", ".join(map(repr, names))


PARTS = (
    "`parameters`: an aligned CLIP refits both of its projections, that of the images (below `visual`) and that of "
    "the texts, each a matrix or a whole nn.Linear; not {}. Of open_clip's ViTs these are `towers.visual.proj` and "
    "`towers.text_projection`."
)
SHAPES = (
    "`Aligned`: the reference gives shapes {} and {} for 4 pairs; expected a row each, images and texts of one width."
)
SCALE, HEAD = "towers.logit_scale", "towers.visual.head.proj.weight"
UNTURNED = (
    "`Aligned(rotate=False)`: the reference's embeddings have 20 dimensions and the model's 12, so they cannot share a "
    "frame; leave `rotate` out."
)
# kind, reference, parameters, message
REFUSED = {
    "one projection": ("vit", towers(), ["towers.visual.proj"], PARTS.format("'towers.visual.proj'")),
    "the scale": (
        "vit",
        towers(),
        [*KINDS["vit"][-1], SCALE],
        PARTS.format(quoted(SCALE, *reversed(KINDS["vit"][-1]))),
    ),
    "a bias missing": (
        "biases",
        towers(),
        [HEAD, "towers.text.text_projection"],
        PARTS.format(quoted("towers.text.text_projection.bias", "towers.text.text_projection.weight", HEAD)),
    ),
    "a vector": (
        "vit",
        towers(),
        ["towers.visual.ln_post.weight", "towers.text_projection"],
        PARTS.format(quoted("towers.text_projection", "towers.visual.ln_post.weight")),
    ),
    "tokens": ("vit", Wrong(ones(3, 4), ones(12)), KINDS["vit"][-1], SHAPES.format("(4, 3, 4)", "(4, 12)")),
    "two widths": ("vit", Wrong(ones(12), ones(10)), KINDS["vit"][-1], SHAPES.format("(4, 12)", "(4, 10)")),
    "rows": (
        "vit",
        Wrong(ones(12), lambda rows: torch.ones(8, 12).double()),
        KINDS["vit"][-1],
        SHAPES.format("(4, 12)", "(8, 12)"),
    ),
}


@pytest.mark.parametrize("cache", [False, True])
def test_a_wider_reference_is_not_taken_without_a_rotation(cache):
    aligned = Aligned(towers("wide"), rotate=False, cache=cache)
    with pytest.raises(ValueError, match=f"^{re.escape(UNTURNED)}$"):
        trainer(GradMimic(aligned, KINDS["vit"][-1])).fit(clip(), loader(pairs(4)))


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_aligned_is_refused_in_a_sentence(case):
    kind, reference, parameters, message = REFUSED[case]
    module = clip(kind)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        trainer(GradMimic(Aligned(reference), parameters)).fit(module, loader(pairs(4)))
    assert "training_step" not in vars(module)


def test_what_a_reference_says_when_it_fails_is_heard():
    aligned = Aligned(Wrong(fails, ones(12)))
    with pytest.raises(RuntimeError, match="expected an image of 224 pixels"):
        trainer(GradMimic(aligned, KINDS["vit"][-1])).fit(clip(), loader(pairs(4)))


def test_a_batch_may_be_anything_if_it_is_said_what_of_it_is_meant():
    class Keyed(type(clip())):
        def sample_losses(self, batch):
            return super().sample_losses((batch["image"], batch["text"]))

        def training_step(self, batch, batch_idx):
            return self.sample_losses(batch).mean()

    batches = DataLoader([{"image": i, "text": t} for i, t in pairs(80)], ROWS)
    module = Keyed(towers(), **STILL).double()
    with pytest.raises(ValueError, match=re.escape("inputs=lambda batch: (batch['image'], batch['text'])")):
        fit(module, Aligned(towers(seed=1)), batches)
    found = fit(module, Aligned(towers(seed=1), lambda b: (b["image"], b["text"])), batches)
    expected = fit(clip(**STILL), Aligned(towers(seed=1)))
    torch.testing.assert_close(found["reference"], expected["reference"], rtol=0, atol=0)


def test_of_a_classifier_one_layer_is_fitted():
    net = nn.Sequential(nn.Linear(3, 4))
    direction = aligned_direction(Aligned(nn.Linear(3, 4)), net, dict(net.named_parameters()))
    assert type(direction).__name__ == "AlignedLayer"


def test_a_matrix_that_is_added_and_not_multiplied_is_refused():
    names = ["towers.visual.proj", "towers.positional_embedding"]
    with pytest.raises(ValueError, match=r"needs the inputs of 'towers\.positional_embedding', which are not known"):
        trainer(GradMimic(Aligned(clip(seed=1)), names, math_attention=True)).fit(clip(), loader(pairs(8)))
