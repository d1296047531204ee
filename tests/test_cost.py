"""The gate on arithmetic: what scoring and weighting add to a step, counted and not timed."""

import functools
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lightning_mimic.reference.aligned
import lightning_mimic.reweighting.reference_monitor
from lightning_mimic import Aligned, GradMimic
from support.toys import trainer

# The published figures are counted by the same callback.
sys.path.append(str(Path(__file__).parent.parent / "scripts"))
from benchmark_methods import IMAGE, MODELS, FlopCount, Plain, Repeated, check_agreement

ROWS, BATCH = 2, 32  # samples here, and in a batch that one would train with
ONE_LAYER, ALL, ALIGNED = 1.005, 1.70, 1.05  # most that a step may cost, plain training being 1


class WithLosses(Plain):
    """The per-sample contract."""

    def sample_losses(self, batch):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels, reduction="none")

    def training_step(self, batch, batch_idx):
        return self.sample_losses(batch).mean()


class Bench:
    """One architecture: counts the second step of fits, as the first step's checks come once."""

    def __init__(self, name):
        torch.manual_seed(0)
        self.net, self.last = MODELS[name].build(), MODELS[name].last
        self.reference = {n: p.detach() + 0.01 for n, p in self.net.named_parameters()}
        self.batch = torch.randn(ROWS, *IMAGE), torch.randint(1000, (ROWS,))
        self.plain = self.flops(Plain, None, step=0)

    def flops(self, kind, parameters, step=1, reference=None):
        mimic = [] if parameters is None else [GradMimic(reference or self.reference, parameters)]
        count = FlopCount({step})
        trainer(*mimic, count).fit(kind(self.net), Repeated(self.batch, step + 1))
        return count.flops[step]


@pytest.fixture(autouse=True)
def short_diagnosis(monkeypatch):
    """A reference that can be run is looked at in the first steps, until there are enough samples; here in one."""
    monkeypatch.setattr(lightning_mimic.reweighting.reference_monitor, "SAMPLES", 1)


@pytest.fixture(scope="module")
def benches():
    return functools.cache(Bench)


@pytest.mark.parametrize(("name", "kind"), [("vit_b_16", Plain), ("resnet50", Plain), ("resnet50", WithLosses)])
def test_one_layer_costs_its_own_forward_pass(benches, name, kind):
    bench = benches(name)
    layer = bench.net.get_submodule(bench.last)
    (size,) = (p.numel() for n, p in layer.named_parameters() if n.endswith("weight"))
    added = bench.flops(kind, f"net.{bench.last}") - bench.plain
    # More than nothing: the counter sees what the hook does inside the backward pass.
    assert added == 2 * ROWS * size
    assert bench.plain + added <= ONE_LAYER * bench.plain


@pytest.mark.parametrize(("name", "kind"), [("vit_b_16", Plain), ("vit_b_16", WithLosses), ("resnet50", Plain)])
def test_all_parameters(benches, name, kind):
    bench = benches(name)
    # A pass without weight gradients and each layer's forward pass once more cannot cost less than the lower bound.
    assert 1.5 < bench.flops(kind, "all") / bench.plain <= ALL


@pytest.mark.parametrize("name", ["vit_b_16", "resnet50"])
def test_an_aligned_reference_of_the_model_s_own_size(benches, name, monkeypatch):
    bench = benches(name)
    # The counter does not know the fused attention that inference takes.
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    # Enough samples from the first step on: warming up costs a reference's forward pass per step, once.
    monkeypatch.setattr(lightning_mimic.reference.aligned, "SAMPLES_PER_FEATURE", 0)
    between, refit = (bench.flops(Plain, f"net.{bench.last}", step, Aligned(bench.net, every=2)) for step in (1, 2))
    (shape,) = (p.shape for p in bench.net.get_submodule(bench.last).parameters() if p.ndim == 2)
    classes, width = shape
    assert bench.plain * 1.3 < refit  # a forward pass is a third of a step
    # The counter knows neither Cholesky's factors nor their use, which do not grow with the batch.
    solving = (width**3 / 3 + 2 * width**2 * classes) * ROWS / BATCH
    assert (9 * between + refit + solving) / 10 <= ALIGNED * bench.plain


def test_the_baselines_of_the_benchmark_do_the_same_job(tmp_path):
    check_agreement(tmp_path)
