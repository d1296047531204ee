"""Damage files of every kind, and read them."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from lightning_mimic.data.digit_pairs import encode_png
from lightning_mimic.data.image_text import ImageTextDataModule
from lightning_mimic.errors import MimicError
from lightning_mimic.manifest import KeptIds, Manifest, write_manifest
from lightning_mimic.reference import read_reference
from scripts.torture.commands import Command, features_of, ledger_rows, make_manifest, write_ledger
from scripts.torture.processes import SECONDS
from scripts.torture.tries import Tries


@dataclass(frozen=True)
class Readable:
    """A file that is damaged, and how it is read.

    Attributes:
        name: For the table.
        make: Writes it, and what belongs to it, into an empty folder; returns its path.
        read: Its content, from the folder that holds it.
        checked: Checksums cover its values, so that other ones must never be read.
        share: Of all mutations.
    """

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    checked: bool = True
    share: int = 1


def mutate(content: bytes, draws: random.Random) -> bytes:
    """Damage a file: bits, bytes, blocks, digits, its end.

    Args:
        content: Of the whole file.
        draws: Source of randomness.

    Returns:
        Other bytes.
    """
    changed = bytearray(content)
    while bytes(changed) == content:
        kind, place = draws.randrange(8), draws.randrange(len(content))
        length = min(draws.choice((1, 4, 64, 512)), len(content) - place)
        if kind <= 1:
            changed[place] ^= 1 << draws.randrange(8)
        elif kind == 2:
            changed[place : place + length] = draws.randbytes(length)
        elif kind == 3:
            del changed[place:]
        elif kind == 4:
            del changed[place : place + length]
        elif kind == 5:
            changed[place : place + length] = bytes(length)
        elif kind == 6:
            changed[place:place] = draws.choice((draws.randbytes(length), content[place : place + length]))
        else:
            digits = [where for where, byte in enumerate(content) if 48 <= byte <= 57]
            if digits:
                changed[draws.choice(digits)] = draws.randrange(48, 58)
    return bytes(changed)


def mutate_files(folder: Path, commands: Sequence[Command], count: int, seed: int, only: str) -> Iterator[Tries]:
    """Damage each kind of file, and count what its reader makes of it.

    Args:
        folder: For everything that is written; made.
        commands: Not used here.
        count: Mutations in all.
        seed: Of all of them.
        only: Names that contain this text.
    """
    del commands
    chosen = [each for each in READABLE if only in each.name]
    shares = sum(each.share for each in chosen)
    for each in chosen:
        place = folder / each.name.replace(" ", "-").replace("/", "-")
        (place / "it").mkdir(parents=True)
        yield _mutations(place, each, max(1, count * each.share // shares), seed)
        shutil.rmtree(place)


def _mutations(folder: Path, readable: Readable, count: int, seed: int) -> Tries:
    tries = Tries("mutation", readable.name)
    path = readable.make(folder / "it")
    content, results = path.read_bytes(), folder / "results"
    whole = readable.read(path.parent)
    while tries.count < count:
        results.write_text("")
        first = tries.count
        reader = os.fork()
        if reader == 0:
            _read_damaged(readable, path, content, whole, range(first, count), seed, results)
        _watch(reader, results)
        for line in results.read_text().splitlines():
            kind, text = json.loads(line)
            _count(tries, readable, kind, text)
        if tries.count < count:  # the process did not survive the next one
            _count(tries, readable, "died or hung", "the process was killed, or took too long")
        path.write_bytes(content)
    return tries


def _read_damaged(
    readable: Readable, path: Path, content: bytes, whole: Any, numbers: range, seed: int, results: Path
) -> None:
    """In a process of its own, read one damaged file after the other, and write a line on each."""
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (1, 2):
            os.dup2(nothing, descriptor)
        with results.open("a") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for number in numbers:
                path.write_bytes(mutate(content, random.Random(f"{seed} {readable.name} {number}")))
                try:
                    found = ("held" if readable.read(path.parent) == whole else "other values", "")
                except MimicError as error:
                    found = ("refused", str(error)[:200])
                except BaseException as error:
                    found = ("another error", f"{type(error).__name__}: {error}"[:200])
                print(json.dumps(found), file=file, flush=True)
    finally:
        os._exit(0)


def _watch(process: int, results: Path) -> None:
    """Wait for the end of a process, and kill it if it writes nothing for too long."""
    size, since = 0, time.monotonic()
    while os.waitpid(process, os.WNOHANG) == (0, 0):
        time.sleep(0.02)
        if results.stat().st_size != size:
            size, since = results.stat().st_size, time.monotonic()
        elif time.monotonic() - since > SECONDS:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return


def _count(tries: Tries, readable: Readable, kind: str, text: str) -> None:
    number = tries.count
    tries.count += 1
    if kind == "refused":
        tries.refused += 1
    elif kind == "held":
        tries.held += 1
    elif kind == "other values" and not readable.checked:
        tries.undetected += 1
    else:
        tries.fail(number, f"{kind} {text}")


def _weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layers.{n}.weight": torch.randn(8, 6, generator=generator) for n in range(4)}


def _make_torch(folder: Path) -> Path:
    torch.save({"state_dict": _weights(), "epoch": 3}, folder / "reference.pt")
    return folder / "reference.pt"


def _make_legacy(folder: Path) -> Path:
    torch.save(_weights(), folder / "reference.pt", _use_new_zipfile_serialization=False)
    return folder / "reference.pt"


def _make_safetensors(folder: Path) -> Path:
    save_file(_weights(), folder / "reference.safetensors")
    return folder / "reference.safetensors"


def _read_reference(folder: Path) -> Any:
    tensors = read_reference(next(folder.glob("reference.*")))
    return {name: (tensor.dtype, tuple(tensor.shape), tensor.numpy().tobytes()) for name, tensor in tensors.items()}


def _make_part(folder: Path) -> Path:
    write_ledger(folder)
    return next((folder / "ledger").glob("*.parquet"))


def _make_description(folder: Path) -> Path:
    write_ledger(folder)
    return next((folder / "ledger").glob("*meta.json"))


def _make_decisions(folder: Path) -> Path:
    write_ledger(folder)
    make_manifest(folder, "made")
    return folder / "made" / "manifest.parquet"


def _read_manifest(folder: Path) -> Any:
    manifest = Manifest(folder / "manifest.parquet")
    return manifest.table().to_pylist(), manifest.provenance


def _make_uids(folder: Path) -> Path:
    table = pa.table({"id": [f"{n:032x}" for n in range(64)], "keep": [n % 3 > 0 for n in range(64)]})
    write_manifest(folder / "manifest.parquet", table.to_reader(), {"samples": 64})
    return folder / "manifest.parquet"


def _read_kept(folder: Path) -> Any:
    kept = KeptIds(folder / "manifest.parquet")
    return [kept.times(f"{n:032x}") for n in range(80)]


def _make_features(folder: Path) -> Path:
    features_of(folder, "features").prepare_data()
    return max((folder / "features").iterdir(), key=lambda path: path.stat().st_size)


def _read_features(folder: Path) -> Any:
    cached = features_of(folder.parent, folder.name)
    cached.prepare_data()
    cached.setup()
    images = cached.data.sources["train"].images
    return torch.stack([images[row] for row in range(len(images))]).numpy().tobytes()


def _pictures() -> Tensor:
    return torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def _make_shard(folder: Path) -> Path:
    with tarfile.open(folder / "00000000.tar", "w") as tar:
        for number, picture in enumerate(_pictures()):
            image, caption = encode_png(picture), f"number {number}"
            described = {"uid": f"{number:032x}", "sha256": hashlib.sha256(image).hexdigest(), "caption": caption}
            files = {"png": image, "txt": caption.encode(), "json": json.dumps(described).encode()}
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder / "00000000.tar"


def _read_shard(folder: Path) -> bool:
    """Whether every image that is read is one of those that were written; captions have no checksums."""
    known = {picture.mul(255).byte().numpy().tobytes() for picture in _pictures()}
    shards = str(folder / "00000000.tar")
    data = ImageTextDataModule(shards, _grey, _letters, batch_size=2, shuffle=0, verify=True)
    data.setup("fit")
    try:
        images = {image.numpy().tobytes() for batch in data.train_dataloader() for image in batch[0]}
    finally:
        data.teardown("fit")
    return images <= known


def _grey(image: Any) -> Tensor:
    return pil_to_tensor(image.convert("L"))


def _letters(captions: list[str]) -> Tensor:
    return torch.tensor([[len(caption)] for caption in captions])


READABLE = (
    Readable("reference (.pt, zip)", _make_torch, _read_reference, share=5),
    Readable("reference (.pt, legacy)", _make_legacy, _read_reference, checked=False, share=3),
    Readable("reference (.safetensors)", _make_safetensors, _read_reference, checked=False, share=3),
    Readable("part of a ledger", _make_part, lambda folder: ledger_rows(folder.parent, folder.name), share=6),
    Readable(
        "description of a ledger", _make_description, lambda folder: ledger_rows(folder.parent, folder.name), share=6
    ),
    Readable("manifest", _make_decisions, _read_manifest, share=4),
    Readable("manifest as a filter", _make_uids, _read_kept, share=4),
    Readable("cached features", _make_features, _read_features),
    Readable("shard", _make_shard, _read_shard, share=2),
)
