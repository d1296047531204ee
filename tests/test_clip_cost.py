"""What scoring and aligning add to a CLIP's step, counted and not timed."""

from types import SimpleNamespace

import open_clip
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_mimic import Aligned, GradMimic
from lightning_mimic.models import CLIP

# The published figures are counted by the same callback.
from scripts.benchmarks.short_fits import FlopCount, repeated
from support.clips import BARE, SGD, losses_of
from support.toys import diagnosing, trainer

pytestmark = pytest.mark.slow

BATCH, MOST, MOST_ALIGNED = 64, 1.02, 1.05  # pairs, and most that a step may cost, plain training being 1
WIDTHS, EMBEDDED = (768, 512), 512  # of the image's and the text's features, and of both embeddings


class AtOnce(Aligned):
    """Enough samples from the first step on: warming up costs a reference's forward pass per step, once."""

    samples_per_feature = 0


def flops_of_a_real_step():
    """Of a ViT-B-32 on a device that computes nothing, and of its forward pass alone."""
    towers = open_clip.create_model("ViT-B-32", load_weights=False, device="meta")
    images, texts = torch.empty(BATCH, 3, 224, 224, device="meta"), torch.empty(BATCH, 77, device="meta").long()
    with FlopCounterMode(display=False) as count:
        loss = losses_of(SimpleNamespace(towers=towers), (images, texts)).mean()
        forward = count.get_total_flops()
        loss.backward()
    return count.get_total_flops(), forward


def shallow():
    """A ViT-B-32 of one layer, images of one patch and captions of four words: its projections are the real ones."""
    torch.manual_seed(0)
    image = {"layers": 1, "width": WIDTHS[0], "patch_size": 32, "image_size": 32}
    text = {"layers": 1, "width": WIDTHS[1], "context_length": 4, "heads": 8, "vocab_size": 9}
    return CLIP(open_clip.CLIP(EMBEDDED, image, text), optimizer=SGD)


def flops_of_a_shallow_step(step=1, **settings):
    """The second step's, as the first step's checks come once."""
    module, count = shallow(), FlopCount({step})
    batch = torch.randn(BATCH, 3, 32, 32), torch.randint(1, 9, (BATCH, 4))
    # A reference that can be run is diagnosed in the first steps, until there are enough samples; here in one.
    callbacks = [diagnosing(GradMimic(parameters=BARE, **settings), 1), count] if settings else [count]
    trainer(*callbacks).fit(module, repeated(batch, step + 1))
    return count.flops[step]


@pytest.fixture(scope="module")
def real():
    return flops_of_a_real_step()


@pytest.fixture(scope="module")
def without():
    return flops_of_a_shallow_step()


def test_scoring_both_projections_of_a_vit(real, without):
    step, forward = real
    assert 2.9 < step / forward < 3.1
    towers = shallow()
    reference = {name: towers.get_parameter(name).detach() + 0.01 for name in BARE}
    added = flops_of_a_shallow_step(reference=reference) - without
    # The product of the direction with each projection's features cannot be saved.
    assert added >= sum(2 * BATCH * width * EMBEDDED for width in WIDTHS)
    assert step + added <= MOST * step


def test_an_aligned_reference_of_the_model_s_own_size(real, without):
    between, refit = (flops_of_a_shallow_step(step, reference=AtOnce(shallow(), every=2)) for step in (1, 2))
    step, forward = real
    own = shallow()
    with FlopCounterMode(display=False) as count, torch.no_grad():
        own.sample_losses((torch.randn(BATCH, 3, 32, 32), torch.ones(BATCH, 4, dtype=torch.int64)))
    refitting = refit - without - count.get_total_flops() + forward
    # The counter knows no decomposition: Cholesky's factors, and about twenty cubes for the rotation.
    refitting += sum(width**3 / 3 + 2 * width**2 * EMBEDDED for width in WIDTHS) + 20 * EMBEDDED**3
    assert forward < refitting
    assert (9 * (between - without) + refitting) / 10 <= (MOST_ALIGNED - 1) * step
