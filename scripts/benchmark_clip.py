"""What scoring image-text pairs costs: a ViT-B/32 CLIP with GradMimic beside plain training, step by step in turn.

On a GPU, whose memory holds all methods at once:

    python scripts/benchmark_clip.py --device cuda --precision bf16-mixed --batch-size 1024 --steps 40
"""

import argparse
import os
import resource
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import open_clip
import torch
from benchmark import Baton, Worker, first_line, measure, silence
from benchmark_methods import FlopCount, Repeated, quiet_trainer, save_reference
from benchmark_tables import SEED, WARM_UP, cells, processor, rows_of
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lightning_mimic import Aligned, GradMimic
from lightning_mimic.models import CLIP

PROJECTIONS = ["towers.visual.proj", "towers.text_projection"]
METHODS: dict[str, tuple[str, Callable[[Path], list[GradMimic]]]] = {
    "plain": ("plain training", lambda reference: []),
    "again": ("plain training again: the noise", lambda reference: []),
    "projections": (
        "both projections, weights as they are",
        lambda reference: [GradMimic(reference, PROJECTIONS, on_doubtful="warn")],
    ),
    "mlp": (
        "last MLP layer of the image tower",
        lambda reference: [GradMimic(reference, "towers.visual.transformer.resblocks.11.mlp.c_proj.weight")],
    ),
    "aligned": (
        "both projections, aligned, in a step in which the reference runs (one in ten, once enough pairs are in)",
        lambda reference: [GradMimic(Aligned(reference, every=1), PROJECTIONS)],
    ),
}


def work(connection: Connection, model: str, target: str, method: str, options: argparse.Namespace) -> None:
    """A worker's life: one fit, whose steps the parent calls for."""
    silence()
    try:
        torch.set_num_threads(options.threads)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        torch.manual_seed(SEED)
        clip = CLIP(open_clip.create_model(model), warmup_steps=0)
        batch = (
            torch.randn(options.batch_size, 3, 224, 224),
            torch.randint(1, 49408, (options.batch_size, 77)),
        )
        # There already, so that no method pays for its way to the device.
        loader = Repeated(tuple(part.to(options.device) for part in batch), WARM_UP + options.steps + 2)
        count = FlopCount()
        with tempfile.TemporaryDirectory() as folder:
            reference = save_reference(clip, Path(folder) / "reference.pt")
            callbacks = METHODS[method][1](reference)
            for callback in callbacks:
                callback.examines = False  # the look at the reference is over after 512 pairs
            baton = Baton(connection, count, options.device, resident)
            accelerator = "gpu" if options.device == "cuda" else "cpu"
            trainer = quiet_trainer([*callbacks, count, baton], accelerator=accelerator, precision=options.precision)
            trainer.fit(clip, loader)
    except BaseException as error:  # whatever it is, it belongs in the table
        connection.send(("failed", f"failed: {first_line(error)}"))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="of open_clip (%(default)s)")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=10, help="rounds that count (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="%(default)s")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", default="32-true", help="Lightning's (%(default)s)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores, help="of a process; one runs at a time (%(default)s)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; run on a machine with one, or leave --device out")
    return options


def main() -> None:
    silence()
    options, console = parsed(), Console()
    methods = list(dict.fromkeys(["plain", *options.methods]))
    workers = [Worker(options.model, "", method, WARM_UP + options.steps, work) for method in methods]
    with Progress(console=console) as progress:
        task = progress.add_task(f"{options.model}, batch of {options.batch_size}", total=WARM_UP + options.steps)
        rows = rows_of(measure(workers, options, lambda: progress.advance(task)))
    table = Table()
    for number, head in enumerate(("method", "arithmetic", "time (quartiles)", "rounds", "peak memory")):
        table.add_column(head, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(METHODS[row["method"]][0], *cells(row)[1:])
    console.print(table)
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{processor()}, {options.threads} threads"
    console.print(
        f"plain's row has amounts, the others ratios to it, of steps that took turns. {where}; torch "
        f"{torch.__version__}, precision {options.precision}.",
        style="dim",
        highlight=False,
    )


if __name__ == "__main__":
    main()
