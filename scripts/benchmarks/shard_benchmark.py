"""Measure samples per second of the image-text data module beside open_clip's own webdataset pipeline.

Same shards (written here: JPEGs of about 300 × 300 pixels with captions), same transform, tokenizer, batch size and
workers; open_clip's takes webdataset's grouping of files, as its own fails with webdataset 1.0. The two take turns, an
epoch each; its workers stay from epoch to epoch, ours do not:

    python -m scripts.benchmarks shards --pairs 2000 --rounds 3
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import open_clip
import torch
import webdataset

from lightning_mimic.data.image_text import ImageTextDataModule
from scripts.benchmarks.benchmark_report import Report, add_numbers
from scripts.benchmarks.paired_rounds import interleave, spread
from scripts.benchmarks.photographs import jpeg

SEED = 0
SHARDS = 8
NAMES = {"theirs": "open_clip_train", "again": "open_clip_train again: the noise", "ours": "lightning_mimic"}


def add_options(parser: argparse.ArgumentParser) -> None:
    add_numbers(parser, pairs=2000, rounds=3, batch_size=100)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help=f"at most {SHARDS}")
    parser.set_defaults(threads=1)


def write_shards(folder: str, pairs: int) -> str:
    """Write shards of photograph-like JPEGs; returns the brace range that names them."""
    drawn = random.Random(SEED)
    for shard in range(SHARDS):
        with webdataset.TarWriter(f"{folder}/{shard:08d}.tar") as tar:
            for number in range(shard * pairs // SHARDS, (shard + 1) * pairs // SHARDS):
                key, caption = f"{number:09d}", f"a photo of {number}"
                image = jpeg(drawn, drawn.randint(250, 350), drawn.randint(250, 350))
                facts = {"uid": f"{drawn.getrandbits(128):032x}", "key": key, "caption": caption}
                tar.write({"__key__": key, "jpg": image, "txt": caption, "json": facts})
    return f"{folder}/{{{0:08d}..{SHARDS - 1:08d}}}.tar"


def ours(shards: str, workers: int, options: argparse.Namespace) -> Iterable[Any]:
    data = ImageTextDataModule(shards, *parts(), batch_size=options.batch_size, num_workers=workers, seed=SEED)
    data.setup("fit")
    return data.train_dataloader()


def theirs(shards: str, workers: int, options: argparse.Namespace) -> Iterable[Any]:
    from open_clip_train import data

    # Its own grouping of files into samples stumbles over the marks that webdataset 1.0 puts between shards.
    data.tarfile_to_samples_nothrow = webdataset.tarfile_to_samples(handler=data.log_and_continue)
    transform, tokenizer = parts()
    given = {"train_data": shards, "train_num_samples": options.pairs, "train_data_upsampling_factors": None}
    given |= {"batch_size": options.batch_size, "workers": workers, "world_size": 1, "seed": SEED}
    given["dataset_resampled"] = False
    return data.get_wds_dataset(argparse.Namespace(**given), transform, True, tokenizer=tokenizer).dataloader


def parts() -> tuple[Callable[[Any], torch.Tensor], Any]:
    return open_clip.image_transform(224, is_train=True), open_clip.get_tokenizer("ViT-B-32")


def rate(loader: Iterable[Any]) -> float:
    """Return the samples per second of an epoch, the start of its workers included."""
    started, samples = time.perf_counter(), 0
    for images, texts in loader:
        assert images.shape[1:] == (3, 224, 224)
        assert len(texts) == len(images)
        samples += len(images)
    return samples / (time.perf_counter() - started)


def measure(options: argparse.Namespace) -> Iterator[Report]:
    torch.set_num_threads(options.threads)
    rows, results = [], {}
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(folder, options.pairs)
        for workers in options.workers:
            baseline = partial(rate, theirs(shards, workers, options))
            ways = {"theirs": baseline, "again": baseline, "ours": partial(rate, ours(shards, workers, options))}
            results[workers] = rates = interleave(f"epochs, {workers} workers", ways, options.rounds, 1)
            for name, values in rates.items():
                ratio = "–" if name == "theirs" else spread(values, rates["theirs"])
                rows.append([NAMES[name], str(workers), f"{statistics.median(values):,.0f}", ratio])
    caption = (
        f"Medians over {options.rounds} rounds of an epoch of {options.pairs} pairs, batches of {options.batch_size}, "
        "after one round of warm-up; ratio: to open_clip's in the same round."
    )
    yield Report("shards", ("pipeline", "workers", "samples/s", "ratio (quartiles)"), rows, caption, results)
