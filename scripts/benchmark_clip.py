"""What scoring image-text pairs costs: a ViT-B/32 CLIP with GradMimic beside plain training, step by step in turn.

Every method is a process of its own, of some 5 GiB at a batch of 16; fewer --methods at a time where memory is short:

    python scripts/benchmark_clip.py --steps 8 --methods plain again projections

On a GPU, whose memory holds all methods at once:

    python scripts/benchmark_clip.py --device cuda --precision bf16-mixed --batch-size 1024 --steps 40
"""

import argparse
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import lightning as L
import open_clip
import torch
from benchmark import Made, Worker, live, measure, silence
from benchmark_methods import save_reference
from benchmark_tables import WARM_UP, cells, processor, rows_of
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
    """Trains a CLIP."""

    def made(folder: Path) -> Made:
        clip = CLIP(open_clip.create_model(model), warmup_steps=0)
        callbacks: list[L.Callback] = []
        for callback in METHODS[method][1](save_reference(clip, folder / "reference.pt")):
            callback.examines = False  # the look at the reference is over after 512 pairs
            callbacks.append(callback)
        texts = torch.randint(1, 49408, (options.batch_size, 77))
        return clip, callbacks, (torch.randn(options.batch_size, 3, 224, 224), texts)

    live(connection, options, made)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="of open_clip (%(default)s)")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=10, help="rounds that count (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="%(default)s")
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
