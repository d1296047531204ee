"""Measure how much faster a linear probe trains from cached features than from images.

A ViT-B/16 of torchvision with random weights, which cost as much as others, over JPEGs that are decoded in every epoch;
plain SGD, no validation. The ways take turns, a whole fit each:

    OMP_NUM_THREADS=1 python -m scripts.benchmarks features --images 32 --rounds 3

On a GPU, with as many images as keep it busy:

    python -m scripts.benchmarks features --device cuda --images 4096 --workers 8
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torchvision.transforms import v2

from lightning_mimic.data import CachedFeatures
from lightning_mimic.data.image_folder import ImageFolderDataModule
from lightning_mimic.models import ImageClassifier, torchvision_backbone
from scripts.benchmarks.benchmark_report import Report, add_numbers
from scripts.benchmarks.paired_rounds import interleave, spread
from scripts.benchmarks.photographs import jpeg
from scripts.benchmarks.short_fits import quiet_trainer

SEED, SIZE, CLASSES = 0, 224, 10
#: By name: in the table, whether it flips, and whether its features are there; ``None``: on the images.
WAYS: dict[str, tuple[str, bool, bool | None]] = {
    "plain": ("images, flipped", True, None),
    "again": ("images, flipped, again: the noise", True, None),
    "flipped": ("features of both views: computed, then trained on", True, False),
    "one view": ("features of one view: computed, then trained on", False, False),
    "there": ("features of both views that are there already", True, True),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    threads = torch.get_num_threads()
    add_numbers(parser, images=64, epochs=10, rounds=3, batch_size=32, workers=0, threads=threads)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")


def write_images(root: Path, count: int) -> None:
    drawn = random.Random(SEED)
    for number in range(count):
        path = root / "train" / str(number % CLASSES) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(drawn, SIZE, SIZE))
    (root / "test").symlink_to("train")


def images_of(root: Path, flip: bool, options: argparse.Namespace) -> ImageFolderDataModule:
    steps = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    size, workers = options.batch_size, options.workers
    return ImageFolderDataModule(root, v2.Compose(steps), flip=flip, batch_size=size, num_workers=workers)


def seconds(way: str, root: Path, model: ImageClassifier, options: argparse.Namespace) -> float:
    """Return the seconds of a fit, with all that belongs to it."""
    _, flip, cached = WAYS[way]
    images = images_of(root, flip, options)
    with tempfile.TemporaryDirectory() as fresh:
        data = images if cached is None else CachedFeatures(images, model, root / "features" if cached else fresh)
        trainer = quiet_trainer(device=options.device, max_epochs=options.epochs)
        started = time.perf_counter()
        trainer.fit(model, data)
        return time.perf_counter() - started


def measure(options: argparse.Namespace) -> Iterator[Report]:
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    backbone = torchvision_backbone("vit_b_16")
    model = ImageClassifier(backbone, CLASSES, (3, SIZE, SIZE), freeze_backbone=True, optimizer=torch.optim.SGD)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root, options.images)
        CachedFeatures(images_of(root, True, options), model, root / "features").prepare_data()  # and the warm-up
        ways = {way: partial(seconds, way, root, model, options) for way in WAYS}
        times = interleave("fits", ways, options.rounds)
    rows = []
    for way, values in times.items():
        faster = "–" if way == "plain" else spread(times["plain"], values, 2)
        rows.append([WAYS[way][0], f"{statistics.median(values):.1f}", faster])
    caption = (
        f"Medians over {options.rounds} rounds of {options.epochs} epochs on {options.images} images, {SIZE} × {SIZE} "
        f"pixels, in batches of {options.batch_size}; how fast: beside the first in the same round."
    )
    heads = ("trained on", "seconds", "times as fast (quartiles)")
    yield Report(f"features {options.device}", heads, rows, caption, times)
