"""Arithmetic, time and memory of training steps in a real Trainer, each method beside plain training."""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch

from scripts.benchmarks.benchmark_report import Report, add_numbers
from scripts.benchmarks.paired_rounds import alone, interleave, own_memory, spread
from scripts.benchmarks.short_fits import FlopCount, quiet_trainer, repeated, silence

WARM_UP = 3
SEED = 0
MEASURES = ("arithmetic", "time", "memory")
HEADS = ("model", "target", "method", "arithmetic", "time (quartiles)", "rounds", "peak memory")
MEMORY = {
    "cpu": "growth of the process over its first steps, alone, each freed tensor given back at once",
    "cuda": "what torch allocated on the GPU",
}
#: Module, callbacks and batch.
Made = tuple[L.LightningModule, list[L.Callback], tuple[torch.Tensor, ...]]


class UnusableError(Exception):
    """The method cannot train this model; the reason in a word."""


@dataclass(frozen=True)
class Method:
    """One row of the table; ``make`` builds it, given itself, a folder for the reference and the batch size."""

    model: str
    target: str
    name: str
    make: Callable[["Method", Path, int], Made]


def add_options(parser: argparse.ArgumentParser, *, rounds: int, batch_size: int) -> None:
    parser.add_argument("--measure", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--device", choices=list(MEMORY), default="cpu")
    parser.add_argument("--precision", default="32-true", help="Lightning's")
    add_numbers(parser, rounds=rounds, batch_size=batch_size, threads=len(os.sched_getaffinity(0)))


def measure_steps(
    name: str, groups: Sequence[tuple[Sequence[Method], int]], options: argparse.Namespace, note: str
) -> Iterator[Report]:
    """Measure group by group, each with its rounds and plain training as its first method; yields all so far."""
    caption = (
        f"Batches of {options.batch_size}, precision {options.precision}, AdamW, seed {SEED}. plain's rows have "
        "amounts, the others ratios to it. Arithmetic: matrix products, convolutions and attention of one later step. "
        f"Time: median over rounds of a method's step over plain's step in the same round, after {WARM_UP} rounds of "
        f"warm-up. Peak memory: {MEMORY[options.device]}. {note}"
    )
    section = " ".join([name, options.device, *(options.measure if len(options.measure) < len(MEASURES) else [])])
    known: dict[Method, dict[str, Any]] = {}
    rows, results = [], []
    for methods, rounds in groups:
        known |= {method: amounts(method, options) for method in methods if method not in known}
        usable = [method for method in methods if known[method]["failed"] is None and "time" in options.measure]
        seconds = step_times(usable, rounds, options)
        found = [{**known[method], "seconds": seconds.get(method, [])} for method in methods]
        for method, one in zip(methods, found, strict=True):
            rows.append([method.model, method.target, method.name, *cells(one, found[0])])
            results.append({"model": method.model, "target": method.target, "method": method.name, **one})
        yield Report(section, HEADS, rows, caption, results, text=3)


def amounts(method: Method, options: argparse.Namespace) -> dict[str, Any]:
    """Return arithmetic and memory of a method, or why it cannot be used."""
    found: dict[str, Any] = {"flops": None, "bytes": None, "failed": None}
    try:
        if "arithmetic" in options.measure:
            count = FlopCount({WARM_UP})  # the checks of the first steps come once
            train(method, options, WARM_UP + 1, count)
            found["flops"] = count.flops[WARM_UP]
        # By default the allocator keeps freed memory in pieces, which shows in the process and not in the method.
        with mock.patch.dict(os.environ, {"MALLOC_MMAP_THRESHOLD_": str(2**16)}):
            if "memory" in options.measure:
                found["bytes"] = alone(peak_memory, method, options)
    except Exception as error:  # whatever it is, it belongs in the table
        line = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0][:100]
        found["failed"] = line if isinstance(error, UnusableError) else f"failed: {line}"
    return found


def train(method: Method, options: argparse.Namespace, steps: int, *callbacks: L.Callback) -> None:
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as folder:
        module, own, batch = method.make(method, Path(folder), options.batch_size)
        # On the device already, so that no method pays for the transfer.
        batches = repeated(tuple(tensor.to(options.device) for tensor in batch), steps)
        quiet_trainer(*own, *callbacks, device=options.device, precision=options.precision).fit(module, batches)


def peak_memory(method: Method, options: argparse.Namespace) -> int:
    silence()
    torch.set_num_threads(options.threads)
    before = own_memory("VmRSS")
    train(method, options, WARM_UP)
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return own_memory("VmHWM") - before


def step_times(methods: Sequence[Method], rounds: int, options: argparse.Namespace) -> dict[Method, list[float]]:
    """Return the seconds of steps that are taken in turn, each method in a process of its own."""
    torch.cuda.empty_cache()  # does nothing without a GPU
    context = multiprocessing.get_context("spawn")  # nothing of torch survives a fork
    connections, processes = {}, []
    for method in methods:
        connections[method], theirs = context.Pipe()
        processes.append(context.Process(target=take_steps, args=(theirs, method, options), daemon=True))
        processes[-1].start()
        theirs.close()
    title = ", ".join(dict.fromkeys(f"{method.model} {method.name}" for method in methods))
    found = interleave(title, {m: partial(step, m, c) for m, c in connections.items()}, rounds, WARM_UP)
    for connection, process in zip(connections.values(), processes, strict=True):
        connection.close()
        process.join()
    return found


def step(method: Method, connection: Connection) -> float:
    try:
        connection.send("step")
        return connection.recv()
    except (EOFError, OSError):
        raise SystemExit(
            f"{method.model}, {method.name}: its process has ended. Fewer --methods or a smaller --batch-size need "
            "less memory."
        ) from None


def take_steps(connection: Connection, method: Method, options: argparse.Namespace) -> None:
    silence()
    torch.set_num_threads(options.threads)
    train(method, options, WARM_UP + options.rounds + 1, StepOnRequest(connection, options.device))


class StepOnRequest(L.Callback):
    """Takes a step whenever the parent asks for one, and answers with its seconds; the last of the callbacks."""

    def __init__(self, connection: Connection, device: str) -> None:
        self.connection, self.device = connection, device

    def on_train_start(self, trainer: L.Trainer, *given: Any) -> None:
        self.wait(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *given: Any) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.connection.send(time.perf_counter() - self.started)
        self.wait(trainer)

    def wait(self, trainer: L.Trainer) -> None:
        try:
            self.connection.recv()
        except EOFError:  # the parent is done
            trainer.should_stop = True
        self.started = time.perf_counter()


def cells(one: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    """Return arithmetic, time, rounds and memory: amounts for plain training, ratios to it for others."""
    if one["failed"] is not None:
        return ["–", one["failed"], "–", "–"]
    seconds, rounds = one["seconds"], str(len(one["seconds"]) or "–")
    if one is plain:
        time = f"{statistics.median(seconds):.2f} s" if seconds else "–"
        return [amount(one["flops"], 1e9, " GFLOP"), time, rounds, amount(one["bytes"], 2**30, " GiB")]
    time = spread(seconds, plain["seconds"]) if seconds and plain["seconds"] else "–"
    return [amount(one["flops"], plain["flops"], digits=4), time, rounds, amount(one["bytes"], plain["bytes"])]


def amount(value: float | None, unit: float | None, name: str = "", digits: int = 2) -> str:
    return f"{value / unit:,.{digits}f}{name}" if value and unit else "–"
