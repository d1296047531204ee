"""The gate on arithmetic: what scoring and weighting add to a step, counted and not timed."""

import copy
import dataclasses
import functools
import json
import logging
import sys
from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer

from lightning_mimic import Aligned, GradMimic
from scripts.benchmarks import __main__ as command

# The published figures are counted by the same callback.
from scripts.benchmarks.baselines import METHODS, MODELS, Plain, method_of
from scripts.benchmarks.short_fits import FlopCount, quiet_trainer, repeated, save_reference
from support.toys import diagnosing, trainer

pytestmark = pytest.mark.slow
IMAGE, CLASSES = MODELS["vit_b_16"].shape, MODELS["vit_b_16"].classes
ROWS, BATCH = 2, 32  # samples here, and in a batch that one would train with
ONE_LAYER, ALL, KEPT, ALIGNED = 1.005, 1.70, 1.40, 1.05  # most that a step may cost, plain training being 1


class WithLosses(Plain):
    """The per-sample contract."""

    def sample_losses(self, batch):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels, reduction="none")

    def training_step(self, batch, batch_idx):
        return self.sample_losses(batch).mean()


class AtOnce(Aligned):
    """Enough samples from the first step on: warming up costs a reference's forward pass per step, once."""

    samples_per_feature = 0


def blocks(count):
    """A ViT-B/16 of so many blocks instead of 12."""
    return VisionTransformer(IMAGE[1], patch_size=16, num_layers=count, num_heads=12, hidden_dim=768, mlp_dim=3072)


#: Two small versions, each as a network and the shape of its images, and how often their difference goes into what the
#: published architecture has more than the first of them: 11 blocks, or 7 × 7 instead of 1 × 1 patches of 32 pixels.
SMALL = {
    "vit_b_16": (((partial(blocks, 1), IMAGE), (partial(blocks, 2), IMAGE)), 11),
    "resnet50": (
        ((MODELS["resnet50"].build, (3, 32, 32)), (MODELS["resnet50"].build, (3, 64, 64))),
        (49 - 1) // (4 - 1),
    ),
}


class Bench:
    """One architecture: counts the second step of fits, as the first step's checks come once.

    The arithmetic is linear in the number of blocks and in the area of an image, so that of the published architecture
    follows from two small versions.
    """

    def __init__(self, name):
        torch.manual_seed(0)
        builds, self.times = SMALL[name]
        self.last = MODELS[name].last
        self.versions = [
            (build(), (torch.randn(ROWS, *image), torch.randint(CLASSES, (ROWS,)))) for build, image in builds
        ]
        # After this step no layer is at zero, as a new head may be.
        self.plain = self.flops(Plain, None, step=0)

    def flops(self, kind, parameters, step=1, keep=False, **aligning):
        small, larger = (self.counted(*version, kind, parameters, step, keep, **aligning) for version in self.versions)
        return small + self.times * (larger - small)

    def counted(self, net, batch, kind, parameters, step, keep, **aligning):
        count, mimic = FlopCount({step}), []
        if parameters is not None:
            net = copy.deepcopy(net)  # each count begins where the plain step ended
            reference = {n: p.detach() + 0.01 for n, p in net.named_parameters()}
            # A reference that can be run is diagnosed in the first steps, until there are enough samples; here in one.
            reference = AtOnce(net, **aligning) if aligning else reference
            callback = GradMimic(reference, parameters, keep_output_gradients=keep)
            mimic = [diagnosing(callback, 1)]
        trainer(*mimic, count).fit(kind(net), repeated(batch, step + 1))
        return count.flops[step]

    def layer(self):
        return self.versions[0][0].get_submodule(self.last)


@pytest.fixture(scope="module")
def benches():
    return functools.cache(Bench)


def plain_flops(build, image):
    """Of a step on a device that computes nothing."""
    with torch.device("meta"):
        net, images, labels = build(), torch.empty(ROWS, *image), torch.empty(ROWS, dtype=torch.int64)
    with FlopCounterMode(display=False) as count:
        F.cross_entropy(net(images), labels).backward()
    return count.get_total_flops()


@pytest.mark.parametrize("name", SMALL)
def test_the_arithmetic_of_the_published_architecture_follows_from_the_small_versions(name):
    versions, times = SMALL[name]
    small, larger = (plain_flops(*version) for version in versions)
    assert small + times * (larger - small) == plain_flops(MODELS[name].build, IMAGE)


@pytest.mark.parametrize(("name", "kind"), [("vit_b_16", Plain), ("resnet50", Plain), ("resnet50", WithLosses)])
def test_one_layer_costs_its_own_forward_pass(benches, name, kind):
    bench = benches(name)
    (size,) = (p.numel() for n, p in bench.layer().named_parameters() if n.endswith("weight"))
    added = bench.flops(kind, f"net.{bench.last}") - bench.plain
    # More than nothing: the counter sees what the hook does inside the backward pass.
    assert added == 2 * ROWS * size
    assert bench.plain + added <= ONE_LAYER * bench.plain


@pytest.mark.parametrize(("name", "kind"), [("vit_b_16", Plain), ("vit_b_16", WithLosses), ("resnet50", Plain)])
def test_all_parameters(benches, name, kind):
    bench = benches(name)
    # A pass without weight gradients and each layer's forward pass once more cannot cost less than the lower bound.
    assert 1.5 < bench.flops(kind, "all") / bench.plain <= ALL


@pytest.mark.parametrize("kind", [Plain, WithLosses])
def test_all_parameters_from_kept_output_gradients(benches, kind):
    bench = benches("vit_b_16")
    # Beside a plain step each layer's forward pass once more, for the scores.
    assert 1.3 < bench.flops(kind, "all", keep=True) / bench.plain <= KEPT


@pytest.mark.parametrize("name", ["vit_b_16", "resnet50"])
def test_an_aligned_reference_of_the_model_s_own_size(benches, name, monkeypatch):
    bench = benches(name)
    # The counter does not know the fused attention that inference takes.
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    between, refit = (bench.flops(Plain, f"net.{bench.last}", step, every=2) for step in (1, 2))
    (shape,) = (p.shape for p in bench.layer().parameters() if p.ndim == 2)
    classes, width = shape
    assert bench.plain * 1.3 < refit  # a forward pass is a third of a step
    # The counter knows neither Cholesky's factors nor their use, which do not grow with the batch.
    solving = (width**3 / 3 + 2 * width**2 * classes) * ROWS / BATCH
    assert (9 * between + refit + solving) / 10 <= ALIGNED * bench.plain


class KeepGradient(L.Callback):
    """What the optimizer is given, as one vector."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradient = torch.cat([p.grad.flatten() for p in pl_module.parameters()])


@pytest.mark.parametrize("target", ["last", "mlp", "all"])
def test_the_baselines_of_the_benchmark_do_the_same_job(target, tmp_path):
    small, given = MODELS["small"], {}
    torch.manual_seed(2)
    inputs, labels = small.batch(5)
    for method in METHODS.keys() - ({"kept"} if target != "all" else set()):
        torch.manual_seed(0)
        net = small.build().double()
        module, callbacks = method_of(method, net, small.path(target), save_reference(net, tmp_path / "small.pt"))
        keep = KeepGradient()
        quiet_trainer(*callbacks, keep).fit(module, repeated((3 * inputs.double(), labels), 1))
        given[method] = keep.gradient
    for method in given.keys() - {"plain", "again", "ours"}:
        torch.testing.assert_close(given[method], given["ours"], rtol=1e-9, atol=1e-12)
    assert (given["plain"] - given["ours"]).norm() > 1e-2 * given["plain"].norm(), "the weights do nothing"


@pytest.fixture
def benchmarks(monkeypatch, capsys):
    """Runs `python -m scripts.benchmarks` in this process; gives what it printed."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    levels = [each.level for each in loggers]

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, words)])
        command.main()
        return capsys.readouterr().out

    yield run
    for each, level in zip(loggers, levels, strict=True):
        each.setLevel(level)


def test_the_tool_counts_arithmetic_and_writes_its_section(benchmarks, tmp_path):
    page, out = tmp_path / "page.md", tmp_path / "out" / "steps.json"
    page.write_text(
        "# Page\n\n<!-- benchmark step cpu arithmetic: begin -->old<!-- benchmark step cpu arithmetic: end -->\nrest\n"
    )
    given = ["--models", "small", "--measure", "arithmetic", "--batch-size", 5]
    printed = benchmarks("step", *given, "--out", out, "--markdown", page)
    found = json.loads(out.read_text())
    flops = {(each["method"], each["target"]): each["flops"] for each in found["results"]}
    assert not any(each["failed"] or each["seconds"] for each in found["results"])
    layers = {"body": 6 * 8, "mlp": 8 * 8, "head": 8 * 4}
    plain = 2 * 5 * (3 * sum(layers.values()) - layers["body"])  # no gradient of the input
    assert flops["plain", "–"] == flops["again", "–"] == plain
    assert flops["ours", "last"] == plain + 2 * 5 * layers["head"]
    assert flops["ours", "mlp"] == plain + 2 * 5 * (layers["mlp"] + layers["head"])  # and back to the MLP's outputs
    assert plain < flops["vmap", "last"] <= 2 * plain
    assert flops["loop", "all"] > 2 * plain
    assert flops["kept", "all"] == plain + 2 * 5 * sum(layers.values())
    text = page.read_text()
    assert text.startswith("# Page\n\n<!-- benchmark step cpu arithmetic: begin -->\n\n- machine: ")
    assert text.endswith("<!-- benchmark step cpu arithmetic: end -->\nrest\n")
    assert "old" not in text
    assert printed.strip() in text
    assert f"{flops['ours', 'last'] / plain:.4f}" in text
    assert f"command: `python -m scripts.benchmarks step {' '.join(map(str, given))}" in text


def new_head(build=MODELS["small"].build):
    net = build()
    torch.nn.init.zeros_(net.head.weight)
    return net


def test_the_tool_counts_a_step_after_the_checks_of_a_new_head(benchmarks, tmp_path, monkeypatch):
    """Behind a head of zeros no gradient flows in the first step, so that its checks are repeated in the second."""
    given = dataclasses.replace(MODELS["small"], build=new_head)
    monkeypatch.setitem(MODELS, "small", given)
    torch.manual_seed(0)
    module, callbacks = method_of("ours", new_head(), None, save_reference(given.build(), tmp_path / "r.pt"))
    count = FlopCount(range(8))
    quiet_trainer(*callbacks, count).fit(module, repeated(given.batch(5), 8))
    steady = count.flops[7]
    assert count.flops[1] > steady == count.flops[5]
    words = ["--models", "small", "--measure", "arithmetic", "--batch-size", 5, "--methods", "ours", "--targets", "all"]
    benchmarks("step", *words, "--out", tmp_path / "found.json")
    found = {each["method"]: each["flops"] for each in json.loads((tmp_path / "found.json").read_text())["results"]}
    assert found["ours"] == steady


def test_the_tool_lists_its_benchmarks_and_refuses_a_gpu_that_is_not_there(benchmarks, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        benchmarks("--help")
    text = capsys.readouterr().out
    assert all(f"\n    {name} " in text for name in ("step", "clip", "features", "shards", "curation"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmarks("step", "--device", "cuda")
    assert "--device cuda: torch sees no GPU here" in capsys.readouterr().err
