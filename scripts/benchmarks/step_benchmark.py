"""Measure what scoring and re-weighting cost: GradMimic beside plain training and beside two ways to do it by hand.

    python -m scripts.benchmarks step --batch-size 4
    python -m scripts.benchmarks step --batch-size 4 --measure arithmetic

On a GPU, whose memory holds all methods at once (else fewer --methods at a time, or a smaller --batch-size):

    python -m scripts.benchmarks step --device cuda --precision bf16-mixed --batch-size 256 --targets last
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from scripts.benchmarks import training_steps
from scripts.benchmarks.baselines import METHODS, MODELS, method_of
from scripts.benchmarks.benchmark_report import Report
from scripts.benchmarks.short_fits import save_reference
from scripts.benchmarks.training_steps import Made, Method

NOTE = (
    "last: the last layer; mlp: the last MLP, of resnet50, which has none, the last block; all: all parameters. "
    "resnet50's BatchNorm mixes samples: ours scores what a sample contributes to the batch's gradient, loop the "
    "gradient of its own loss."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["vit_b_16", "resnet50"])
    parser.add_argument("--targets", nargs="+", choices=["last", "mlp", "all"], default=["last", "mlp", "all"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--slow-rounds", type=int, default=5, help="of vmap and loop")
    training_steps.add_options(parser, rounds=40, batch_size=8)


def make(method: Method, folder: Path, batch_size: int) -> Made:
    model = MODELS[method.model]
    net = model.build()
    reference = save_reference(net, folder / "reference.pt")
    module, callbacks = method_of(method.name, net, model.path(method.target), reference)
    return module, callbacks, model.batch(batch_size)


def groups_of(model: str, options: argparse.Namespace) -> Iterator[tuple[Sequence[Method], int]]:
    """Return the methods that take turns: the callback for all targets, and the baselines target by target.

    The baselines run fewer rounds, and need too much memory to be there all at once.
    """
    plain = [Method(model, "–", name, make) for name in ("plain", "again") if name in ("plain", *options.methods)]
    by_hand = [name for name in ("vmap", "loop") if name in options.methods]
    targets = options.targets if "ours" in options.methods else []
    ours = [Method(model, target, "ours", make) for target in targets]
    kept = [Method(model, "all", "kept", make)] if "kept" in options.methods and "all" in options.targets else []
    yield [*plain, *ours, *kept], options.rounds
    for target in options.targets if by_hand else []:
        slow = [Method(model, target, name, make) for name in by_hand]
        yield [plain[0], *slow], min(options.slow_rounds, options.rounds)


def measure(options: argparse.Namespace) -> Iterator[Report]:
    groups = [group for model in options.models for group in groups_of(model, options)]
    explained = [f"{name}: {METHODS[name]}." for name in METHODS if name in options.methods]
    return training_steps.measure_steps("step", groups, options, " ".join([*explained, NOTE]))
