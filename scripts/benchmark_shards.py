"""Samples per second of the image-text data module beside open_clip's own webdataset pipeline.

Same shards (written here: JPEGs of about 300 × 300 pixels with captions), same transform, tokenizer, batch size and
workers; open_clip's takes webdataset's grouping of files, as its own fails with webdataset 1.0. The two take turns, an
epoch each, so that whatever else the machine does hits both alike; its workers stay from epoch to epoch, ours do not:

    python scripts/benchmark_shards.py --pairs 2000 --rounds 3
"""

import argparse
import io
import json
import random
import statistics
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import open_clip
import torch
import webdataset
from benchmark_tables import processor, quartiles
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lightning_mimic.data.image_text import ImageTextDataModule

SEED = 0
SHARDS = 8
NAMES = {"ours": "lightning_mimic", "theirs": "open_clip_train"}


def write_shards(folder: Path, pairs: int) -> str:
    """Shards of photograph-like JPEGs, and the brace range that names them."""
    drawn = random.Random(SEED)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:08d}.tar", "w") as tar:
            for number in range(shard * pairs // SHARDS, (shard + 1) * pairs // SHARDS):
                key = f"{number:09d}"
                description = {"uid": f"{drawn.getrandbits(128):032x}", "key": key, "caption": f"a photo of {number}"}
                for suffix, data in {
                    "jpg": jpeg(drawn),
                    "txt": description["caption"].encode(),
                    "json": json.dumps(description).encode(),
                }.items():
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return f"{folder}/{{{0:08d}..{SHARDS - 1:08d}}}.tar"


def jpeg(drawn: random.Random) -> bytes:
    size = drawn.randint(250, 350), drawn.randint(250, 350)
    # Coarse noise, enlarged: as many bytes as a photograph of that size, about 20 kB.
    small = Image.frombytes("RGB", (size[0] // 5, size[1] // 5), drawn.randbytes(size[0] // 5 * (size[1] // 5) * 3))
    file = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
    return file.getvalue()


def ours(shards: str, pairs: int, workers: int, batch_size: int) -> Iterable[Any]:
    data = ImageTextDataModule(shards, *parts(), batch_size=batch_size, num_workers=workers, seed=SEED)
    data.setup("fit")
    return data.train_dataloader()


def theirs(shards: str, pairs: int, workers: int, batch_size: int) -> Iterable[Any]:
    from open_clip_train import data

    # Its own grouping of files into samples stumbles over the marks that webdataset 1.0 puts between shards.
    data.tarfile_to_samples_nothrow = webdataset.tarfile_to_samples(handler=data.log_and_continue)
    transform, tokenizer = parts()
    options = {"train_data": shards, "train_num_samples": pairs, "train_data_upsampling_factors": None}
    options |= {"batch_size": batch_size, "workers": workers, "world_size": 1, "seed": SEED}
    info = data.get_wds_dataset(Namespace(**options, dataset_resampled=False), transform, True, tokenizer=tokenizer)
    return info.dataloader


def parts() -> tuple[Callable[[Any], torch.Tensor], Any]:
    return open_clip.image_transform(224, is_train=True), open_clip.get_tokenizer("ViT-B-32")


def rate(loader: Iterable[Any]) -> float:
    """Samples per second of an epoch, the start of its workers included."""
    started, samples = time.perf_counter(), 0
    for images, texts in loader:
        assert images.shape[1:] == (3, 224, 224)
        assert len(texts) == len(images)
        samples += len(images)
    return samples / (time.perf_counter() - started)


def show(console: Console, rates: dict[int, dict[str, list[float]]], options: Namespace) -> None:
    table = Table()
    for head in ("workers", "pipeline", "samples/s", "ratio (quartiles)", "rounds"):
        table.add_column(head, justify="left" if head == "pipeline" else "right")
    for workers, measured in rates.items():
        for name, values in measured.items():
            low, middle, high = quartiles([a / b for a, b in zip(values, measured["theirs"], strict=True)])
            ratio = "–" if name == "theirs" else f"{middle:.3f} ({low:.3f}–{high:.3f})"
            table.add_row(str(workers), NAMES[name], f"{statistics.median(values):,.0f}", ratio, str(len(values)))
        table.add_section()
    console.print(table)
    console.print(
        f"Medians over rounds of an epoch of {options.pairs} pairs, batches of {options.batch_size}, after one round "
        f"of warm-up; ratio: ours over open_clip's in the same round. {processor()}, torch {torch.__version__}.",
        style="dim",
        highlight=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2000, help="%(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="that count (%(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="%(default)s")
    parser.add_argument("--batch-size", type=int, default=100, help="%(default)s")
    options = parser.parse_args()
    if options.pairs < SHARDS or max(options.workers) > SHARDS:
        parser.error(f"there are {SHARDS} shards: at least as many --pairs, at most as many --workers")
    torch.set_num_threads(1)
    console, rates = Console(), {}
    with tempfile.TemporaryDirectory() as folder, Progress(console=console) as progress:
        shards = write_shards(Path(folder), options.pairs)
        task = progress.add_task("epochs", total=2 * (options.rounds + 1) * len(options.workers))
        for workers in options.workers:
            loaders = {
                name: make(shards, options.pairs, workers, options.batch_size)
                for name, make in (("ours", ours), ("theirs", theirs))
            }
            rates[workers] = {name: [] for name in loaders}
            for number in range(options.rounds + 1):
                for name, loader in loaders.items():
                    measured = rate(loader)
                    if number:
                        rates[workers][name].append(measured)
                    progress.advance(task)
    show(console, rates, options)


if __name__ == "__main__":
    main()
