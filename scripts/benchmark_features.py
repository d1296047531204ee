"""How much faster a linear probe trains from cached features than from images.

A ViT-B/16 of torchvision with random weights, which cost as much as others, over JPEGs that are decoded in every epoch,
as those of a data set are; plain SGD, no validation. The ways take turns, a whole fit each, so that whatever else the
machine does hits them alike:

    python scripts/benchmark_features.py --images 64 --rounds 3 --json features.json

On a GPU, with as many images as keep it busy:

    python scripts/benchmark_features.py --device cuda --images 4096 --workers 8
"""

import argparse
import io
import json
import random
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from benchmark import silence
from benchmark_tables import processor, quartiles
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torchvision.transforms import v2

from lightning_mimic.data import CachedFeatures
from lightning_mimic.data.splits import LabelledSplits, Source
from lightning_mimic.models import ImageClassifier, torchvision_backbone

SEED, SIZE, CLASSES = 0, 224, 10
#: What training from features is to reach at least.
BAR = 8
# Whether it flips, and whether its features are there; None: on the images.
WAYS: dict[str, tuple[str, bool, bool | None]] = {
    "plain": ("images, flipped", True, None),
    "flipped": ("features of both views: computed, then trained on", True, False),
    "one view": ("features of one view: computed, then trained on", False, False),
    "there": ("features of both views that are there already", True, True),
}


class Decoded:
    """JPEGs in memory, decoded when they are asked for."""

    transform = v2.Compose(
        [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    )

    def __init__(self, count: int) -> None:
        drawn = random.Random(SEED)
        self.files = [jpeg(drawn) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> torch.Tensor:
        image: torch.Tensor = self.transform(Image.open(io.BytesIO(self.files[row])).convert("RGB"))
        return image


def jpeg(drawn: random.Random) -> bytes:
    # Coarse noise, enlarged: as many bytes as a photograph of that size.
    small = Image.frombytes("RGB", (SIZE // 4, SIZE // 4), drawn.randbytes(SIZE // 4 * (SIZE // 4) * 3))
    file = io.BytesIO()
    small.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
    return file.getvalue()


class Photographs(LabelledSplits):
    """All of them train."""

    num_classes = CLASSES

    def __init__(self, images: Decoded, **options: Any) -> None:
        super().__init__(**options)
        self.images = images

    def read(self) -> Mapping[str, Source]:
        labels = torch.arange(len(self.images)) % CLASSES
        source = Source(self.images, labels, lambda: f"{len(self.images)} images")
        return {"train": source, "test": source}

    def divide(self, labels: torch.Tensor) -> Mapping[str, torch.Tensor]:
        none = torch.arange(0)
        return {"noisy": torch.arange(len(labels)), "trusted_fit": none, "trusted_held": none, "test": none}


def seconds(way: str, images: Decoded, model: ImageClassifier, there: Path, options: Namespace) -> float:
    """Of a fit, with all that belongs to it."""
    _, flip, cached = WAYS[way]
    data: L.LightningDataModule = Photographs(
        images, flip=flip, batch_size=options.batch_size, num_workers=options.workers
    )
    with tempfile.TemporaryDirectory() as fresh:
        if cached is not None:
            data = CachedFeatures(data, model, there if cached else fresh)
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        accelerator = "gpu" if options.device == "cuda" else "cpu"
        trainer = L.Trainer(max_epochs=options.epochs, accelerator=accelerator, devices=1, **quiet)
        started = time.perf_counter()
        trainer.fit(model, data)
        return time.perf_counter() - started


def show(console: Console, measured: dict[str, list[float]], options: Namespace) -> None:
    table = Table()
    for head in ("trained on", "seconds", "times as fast (quartiles)", f"at least {BAR} times"):
        table.add_column(head, justify="left" if head == "trained on" else "right")
    for way, values in measured.items():
        low, middle, high = ratios(measured, way)
        faster = (
            ["–", "–"] if way == "plain" else [f"{middle:.2f} ({low:.2f}–{high:.2f})", "yes" if low >= BAR else "no"]
        )
        table.add_row(WAYS[way][0], f"{statistics.median(values):.1f}", *faster)
    console.print(table)
    console.print(
        f"Medians over {options.rounds} rounds of {options.epochs} epochs on {options.images} images, {SIZE} × {SIZE} "
        f"pixels in batches of {options.batch_size}; how fast: beside the first in the same round. {where(options)}, "
        f"torch {torch.__version__}.",
        style="dim",
        highlight=False,
    )


def ratios(measured: dict[str, list[float]], way: str) -> list[float]:
    return quartiles([plain / own for plain, own in zip(measured["plain"], measured[way], strict=True)])


def where(options: Namespace) -> str:
    if options.device == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor()}, {options.threads} threads"


def parsed() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="%(default)s")
    parser.add_argument("--epochs", type=int, default=10, help="%(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="%(default)s")
    parser.add_argument("--batch-size", type=int, default=32, help="%(default)s")
    parser.add_argument("--workers", type=int, default=0, help="that decode (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="%(default)s")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="file for what was measured")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; run on a machine with one, or leave --device out")
    return options


def main() -> None:
    silence()
    options, console = parsed(), Console()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    images = Decoded(options.images)
    backbone = torchvision_backbone("vit_b_16")
    model = ImageClassifier(backbone, CLASSES, (3, SIZE, SIZE), freeze_backbone=True, optimizer=torch.optim.SGD)
    measured: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder, Progress(console=console) as progress:
        task = progress.add_task("fits", total=options.rounds * len(WAYS))
        CachedFeatures(Photographs(images, flip=True), model, folder).prepare_data()  # and the warm-up
        for _ in range(options.rounds):
            for way, values in measured.items():
                values.append(seconds(way, images, model, Path(folder), options))
                progress.advance(task)
    show(console, measured, options)
    if options.json:
        facts = {name: value for name, value in vars(options).items() if name != "json"}
        said = {"where": where(options), "torch": torch.__version__, **facts, "seconds": measured}
        said["times as fast"] = {way: ratios(measured, way) for way in measured if way != "plain"}
        options.json.write_text(json.dumps(said, indent=2) + "\n")


if __name__ == "__main__":
    main()
