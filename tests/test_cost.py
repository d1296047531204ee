"""The gate on arithmetic: what scoring and weighting add to a step, counted and not timed."""

import functools
import json
import logging
import runpy
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from toys import trainer

import lightning_mimic.reference.aligned
import lightning_mimic.reweighting.reference_monitor
from lightning_mimic import Aligned, GradMimic

# The published figures are counted by the same callback.
sys.path.append(str(Path(__file__).parent.parent / "scripts" / "benchmarks"))
from baselines import METHODS, MODELS, Plain, method_of
from short_fits import FlopCount, quiet_trainer, repeated, save_reference

BENCHMARKS = Path(__file__).parent.parent / "scripts" / "benchmarks"
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
        self.batch = MODELS[name].batch(ROWS)
        self.plain = self.flops(Plain, None, step=0)

    def flops(self, kind, parameters, step=1, reference=None):
        mimic = [] if parameters is None else [GradMimic(reference or self.reference, parameters)]
        count = FlopCount({step})
        trainer(*mimic, count).fit(kind(self.net), repeated(self.batch, step + 1))
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


class KeepGradient(L.Callback):
    """What the optimizer is given, as one vector."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradient = torch.cat([p.grad.flatten() for p in pl_module.parameters()])


@pytest.mark.parametrize("target", ["last", "mlp", "all"])
def test_the_baselines_of_the_benchmark_do_the_same_job(target, tmp_path):
    small, given = MODELS["small"], {}
    torch.manual_seed(2)
    inputs, labels = small.batch(5)
    for method in METHODS:
        torch.manual_seed(0)
        net = small.build().double()
        module, callbacks = method_of(method, net, small.path(target), save_reference(net, tmp_path / "small.pt"))
        keep = KeepGradient()
        quiet_trainer(*callbacks, keep).fit(module, repeated((3 * inputs.double(), labels), 1))
        given[method] = keep.gradient
    for method in ("vmap", "loop"):
        torch.testing.assert_close(given[method], given["ours"], rtol=1e-9, atol=1e-12)
    assert (given["plain"] - given["ours"]).norm() > 1e-2 * given["plain"].norm(), "the weights do nothing"


@pytest.fixture
def benchmarks(monkeypatch, capsys):
    """Runs `python scripts/benchmarks` in this process; gives what it printed."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    levels = [each.level for each in loggers]

    def run(*words):
        monkeypatch.setattr(sys, "argv", [str(BENCHMARKS), *map(str, words)])
        runpy.run_path(str(BENCHMARKS), run_name="__main__")
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
    text = page.read_text()
    assert text.startswith("# Page\n\n<!-- benchmark step cpu arithmetic: begin -->\n\n- machine: ")
    assert text.endswith("<!-- benchmark step cpu arithmetic: end -->\nrest\n")
    assert "old" not in text
    assert printed.strip() in text
    assert f"{flops['ours', 'last'] / plain:.4f}" in text
    assert f"command: `python scripts/benchmarks step {' '.join(map(str, given))}" in text


def test_the_tool_lists_its_benchmarks_and_refuses_a_gpu_that_is_not_there(benchmarks, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        benchmarks("--help")
    text = capsys.readouterr().out
    assert all(f"\n    {name} " in text for name in ("step", "clip", "features", "shards", "curation"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmarks("step", "--device", "cuda")
    assert "--device cuda: torch sees no GPU here" in capsys.readouterr().err
