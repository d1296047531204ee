"""What scoring and re-weighting cost: GradMimic beside plain training and beside two ways to do it by hand.

Every method runs in a process of its own, in a real Trainer; the processes take turns, one step each, so that whatever
else the machine does hits all alike. On a GPU, whose memory holds all of them at once (else fewer --methods at a time,
or a smaller --batch-size):

    python scripts/benchmark.py --device cuda --precision bf16-mixed --batch-size 256 --targets last
"""

import argparse
import json
import logging
import multiprocessing
import os
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning as L
import torch
from benchmark_methods import (
    CLASSES,
    IMAGE,
    METHODS,
    MODELS,
    FlopCount,
    Repeated,
    Unusable,
    check_agreement,
    method_of,
    quiet_trainer,
    save_reference,
)
from benchmark_tables import SEED, TARGETS, WARM_UP, rows_of, setting, show, write_markdown
from rich.console import Console
from rich.progress import Progress


class Baton(L.Callback):
    """Goes one step whenever it is told to, and says how long it took; the last of the callbacks."""

    def __init__(self, connection: Connection, count: FlopCount, device: str, resident: int) -> None:
        self.connection, self.count, self.device, self.resident = connection, count, device, resident

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.wait(trainer, 0)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.started
        self.connection.send(("done", seconds, self.peak(), self.count.flops.get(batch_idx)))
        self.wait(trainer, batch_idx + 1)

    def wait(self, trainer: L.Trainer, step: int) -> None:
        order = self.connection.recv()
        if order == "count":
            self.count.steps.add(step)
        trainer.should_stop = order == "stop"
        self.started = time.perf_counter()

    def peak(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.resident


Made = tuple[L.LightningModule, list[L.Callback], tuple[torch.Tensor, ...]]


def live(connection: Connection, options: argparse.Namespace, made: Callable[[Path], Made]) -> None:
    """A worker's life: one fit, whose steps the parent calls for.

    Args:
        connection: To the parent.
        options: Of the command.
        made: Module, callbacks and batch; given a folder for the reference.
    """
    silence()
    try:
        torch.set_num_threads(options.threads)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        torch.manual_seed(SEED)
        with tempfile.TemporaryDirectory() as folder:
            module, callbacks, batch = made(Path(folder))
            # There already, so that no method pays for its way to the device.
            loader = Repeated(tuple(tensor.to(options.device) for tensor in batch), WARM_UP + options.steps + 2)
            count = FlopCount()
            callbacks += [count, Baton(connection, count, options.device, resident)]
            accelerator = "gpu" if options.device == "cuda" else "cpu"
            quiet_trainer(callbacks, accelerator=accelerator, precision=options.precision).fit(module, loader)
    except Unusable as reason:
        connection.send(("failed", str(reason)))
    except BaseException as error:  # whatever it is, it belongs in the table
        connection.send(("failed", f"failed: {first_line(error)}"))


def work(connection: Connection, model: str, target: str, method: str, options: argparse.Namespace) -> None:
    """Trains a classifier."""

    def made(folder: Path) -> Made:
        net, path = MODELS[model].build(), MODELS[model].path(target)
        module, callbacks = method_of(method, net, path, save_reference(net, folder / "reference.pt"))
        batch = torch.randn(options.batch_size, *IMAGE), torch.randint(CLASSES, (options.batch_size,))
        return module, callbacks, batch

    live(connection, options, made)


def silence() -> None:
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def first_line(error: BaseException) -> str:
    line = (str(error) or type(error).__name__).splitlines()[0]
    return line.split(". ")[0][:100]


@dataclass
class Worker:
    """The parent's end of a method's process, and what it has measured."""

    model: str
    target: str
    method: str
    rounds: int
    job: Callable[..., None] = work
    seconds: list[float] = field(default_factory=list)
    memory: int | None = None
    flops: int | None = None
    failed: str | None = None

    def start(self, options: argparse.Namespace) -> None:
        # Nothing of torch survives a fork.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        given = (theirs, self.model, self.target, self.method, options)
        self.process = context.Process(target=self.job, args=given, daemon=True)
        self.process.start()
        theirs.close()

    def step(self, number: int, exact_memory: bool) -> None:
        if self.failed is None and number < self.rounds and (answer := self._ask("step")):
            self.seconds.append(answer[1])
            self.memory = answer[2] if exact_memory else None

    def count(self) -> None:
        if self.failed is None and self.method != "again" and (answer := self._ask("count")):
            self.flops = answer[3]

    def stop(self) -> None:
        with suppress(OSError):  # it has failed, and said so
            self.connection.send("stop")
        self.process.join()

    def _ask(self, order: str) -> tuple[Any, ...] | None:
        with suppress(OSError):  # it may be dead, but its last words still there
            self.connection.send(order)
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            answer = "failed", f"failed: killed (exit code {self.process.exitcode})"
        if answer[0] == "failed":
            self.failed, self.seconds, self.memory = answer[1], [], None
            return None
        return answer


def measure(workers: list[Worker], options: argparse.Namespace, tick: Callable[[], None]) -> list[Worker]:
    """A step each in turn, until the last has done its rounds."""
    for worker in workers:
        worker.start(options)
    for number in range(max(worker.rounds for worker in workers)):
        for worker in workers:
            worker.step(number, exact_memory=options.device == "cuda")
            if number == worker.rounds - 1:
                worker.count()
                worker.stop()
        tick()
    return workers


def weigh(workers: list[Worker], options: argparse.Namespace, tick: Callable[[], None]) -> list[Worker]:
    """One process after another for its peak memory, with an allocator that gives back at once what is freed.

    As it is set up by default it keeps freed memory in pieces, which shows in the process and not in the method.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    for worker in workers:
        worker.start(options)
        for number in range(worker.rounds):
            worker.step(number, exact_memory=True)
        worker.seconds = []
        worker.stop()
        tick()
    return workers


def groups_of(model: str, options: argparse.Namespace) -> list[list[Worker]]:
    """Those that take turns with one another: the callback for all targets, and the baselines target by target.

    The baselines run fewer rounds, and need too much memory to be there all at once. Plain training goes first in each.
    """
    if options.memory_only:
        plain = Worker(model, options.targets[0], "plain", WARM_UP)
        others = [m for m in options.methods if m not in ("plain", "again")]
        return [[plain, *(Worker(model, t, m, WARM_UP) for m in others for t in options.targets)]]
    rounds = 1 if options.flops_only else WARM_UP + options.steps  # the first step's checks are not to be counted
    slow = 1 if options.flops_only else WARM_UP + min(options.slow_steps, options.steps)
    first = [Worker(model, options.targets[0], m, rounds) for m in ("plain", "again") if m in options.methods]
    groups = [first + [Worker(model, t, "ours", rounds) for t in options.targets if "ours" in options.methods]]
    for target in options.targets:
        baselines = [Worker(model, target, m, slow) for m in ("vmap", "loop") if m in options.methods]
        if baselines:
            groups.append([Worker(model, target, "plain", slow), *baselines])
    return groups


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, choices in (("models", MODELS), ("targets", TARGETS), ("methods", METHODS)):
        parser.add_argument(f"--{name}", nargs="+", choices=list(choices), default=list(choices))
    parser.add_argument("--steps", type=int, default=40, help="rounds that count (%(default)s)")
    parser.add_argument("--slow-steps", type=int, default=5, help="of vmap and loop (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="%(default)s")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", default="32-true", help="Lightning's (%(default)s)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores, help="of a process; one runs at a time (%(default)s)")
    parser.add_argument("--flops-only", action="store_true", help="count the arithmetic and leave the clock alone")
    parser.add_argument("--memory-only", action="store_true", help="peak memory on a CPU, one process at a time")
    parser.add_argument("--out", type=Path, help="JSON with every step's time")
    parser.add_argument("--markdown", type=Path, help="a file whose section for this device is written anew")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; run on a machine with one, or leave --device out")
    # The others are measured against plain, which goes first.
    options.methods = [m for m in METHODS if m == "plain" or m in options.methods]
    if options.flops_only:
        options.methods = [m for m in options.methods if m != "again"]
    return options


def main() -> None:
    silence()
    options, console = parsed(), Console()
    with tempfile.TemporaryDirectory() as folder:
        check_agreement(Path(folder))
    rows = []
    with Progress(console=console) as progress:
        for model in options.models:
            for workers in groups_of(model, options):
                name = ", ".join(dict.fromkeys(worker.method for worker in workers))
                total = len(workers) if options.memory_only else max(worker.rounds for worker in workers)
                task = progress.add_task(f"{model}: {name}", total=total)
                method = weigh if options.memory_only else measure
                rows += rows_of(method(workers, options, lambda task=task: progress.advance(task)))
                if options.out:  # after every group: a long run that breaks off has not been for nothing
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(json.dumps({**setting(options), "rows": rows}, indent=2))
    show(console, rows, options)
    if options.markdown:
        write_markdown(options.markdown, rows, options)


if __name__ == "__main__":
    main()
