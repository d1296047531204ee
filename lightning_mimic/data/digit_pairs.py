"""Scikit-learn's digits with captions, as shards of image-text pairs in the layout of img2dataset and DataComp."""

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lightning_mimic.data.digits import DigitsDataModule
from lightning_mimic.data.noise import SymmetricNoise
from lightning_mimic.errors import MimicError
from lightning_mimic.files import atomic_directory
from lightning_mimic.random_streams import torch_generator
from lightning_mimic.stores import path_of

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a photo of the digit {}",
    "a handwritten {}",
    "the number {} in grey",
    "a small scan of the number {}",
    "somebody wrote a {}",
    "{}, drawn with a pen",
)
PAIRS_PER_SHARD = 100


class DigitPairs(NamedTuple):
    """Digits that become pairs; int64 tensors of one length.

    Attributes:
        rows: Row numbers of ``sklearn.datasets.load_digits``.
        shown: The digits that the images show.
        named: The digits that the captions name.
    """

    rows: Tensor
    shown: Tensor
    named: Tensor


def split_digit_pairs(seed: int, mismatched: float) -> dict[str, DigitPairs]:
    """Divide the digits among the parts; none of them is among the 500 test images of ``DigitsDataModule``.

    Args:
        seed: Seed of the split, and of which captions are mismatched.
        mismatched: Share of the pool whose captions name another digit, 0 to 1.

    Returns:
        By name, ``"reference"`` (300), ``"val"`` (100, the 50 that ``DigitsDataModule`` validates on among them) and
        ``"pool"`` (897).

    Raises:
        MimicError: A share outside 0 to 1.

    Example:
        >>> pool = split_digit_pairs(seed=0, mismatched=0.4)["pool"]
        >>> len(pool.rows), int((pool.shown != pool.named).sum())
        (897, 358)
    """
    if not 0 <= mismatched <= 1:
        raise MimicError(f"`mismatched` is the share of captions that name another digit, 0 to 1, not {mismatched!r}.")
    digits = DigitsDataModule(split_seed=seed)
    digits.setup()
    # The reference must not know the 50 trusted images that validate.
    rows = torch.cat(
        [digits.rows["trusted_fit"], digits.noisy_ids[:150], digits.rows["trusted_held"], digits.noisy_ids[150:]]
    )
    shown = digits.sources["train"].labels[rows]
    named = shown.clone()
    named[400:], _ = SymmetricNoise(mismatched, seed)(shown[400:], len(CLASS_NAMES))
    sizes = [300, 100, len(rows) - 400]
    pieces = zip(rows.split(sizes), shown.split(sizes), named.split(sizes), strict=True)
    return dict(zip(("reference", "val", "pool"), map(DigitPairs._make, pieces), strict=True))


def pair_id(seed: int, row: int) -> str:
    """Return the id of a pair, 32 hexadecimal digits as in DataComp.

    Example:
        >>> pair_id(seed=0, row=7)
        'ac51b76e525aa81b0e1c922b8025c45a'
    """
    return hashlib.md5(f"digits-{seed}-{row}".encode()).hexdigest()


def encode_png(image: Tensor) -> bytes:
    """Encode an image of shape ``(1, 8, 8)``, 0 to 1, as RGB; the same pixels as torchvision's ``to_pil_image``.

    Example:
        >>> encode_png(torch.zeros(1, 8, 8))[1:4]
        b'PNG'
    """
    from PIL import Image  # an optional package

    file = io.BytesIO()
    Image.fromarray(image[0].mul(255).byte().numpy()).convert("RGB").save(file, "png")
    return file.getvalue()


def write_digit_shards(out: str | Path, seed: int = 0, mismatched: float = 0.4) -> None:
    """Write folders ``reference``, ``val`` and ``pool``, and ``truth.parquet``, which has the mismatched captions.

    Each folder has shards ``00000000.tar`` and on, a table of metadata beside each, and ``sizes.json``. The same
    arguments give the same bytes.

    Args:
        out: Folder to make; must be empty if it exists.
        seed: Seed of the split, of the captions' wording and of which captions are mismatched.
        mismatched: Share of the pool whose captions name another digit, 0 to 1.

    Raises:
        MimicError: The folder is not empty or cannot be written, or a share outside 0 to 1. Nothing is left then.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_digit_shards(folder)
        ...     pq.read_table(f"{folder}/truth.parquet").column_names
        ['id', 'mismatched', 'digit']
    """
    parts = split_digit_pairs(seed, mismatched)
    digits, truth = DigitsDataModule(), []
    digits.setup()
    generator = torch_generator(seed, "captions")
    folder = path_of(out, "out")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise MimicError(f"`out`: {folder} is not an empty directory; name another one, or remove what it holds.")
    try:
        with atomic_directory(folder, "truth.parquet") as made:
            for part, (rows, shown, named) in parts.items():
                ids = [pair_id(seed, row) for row in rows.tolist()]
                wordings = torch.randint(len(TEMPLATES), named.shape, generator=generator).tolist()
                pairs = zip(wordings, named.tolist(), strict=True)
                captions = [TEMPLATES[wording].format(CLASS_NAMES[digit]) for wording, digit in pairs]
                _write_part(made / part, ids, digits.images(rows), captions)
                wrong = (shown != named).tolist()
                truth += [
                    {"id": i, "mismatched": w, "digit": d} for i, w, d in zip(ids, wrong, shown.tolist(), strict=True)
                ]
            pq.write_table(pa.Table.from_pylist(truth), made / "truth.parquet")
    except OSError as error:  # a full disk; another writer was faster
        raise MimicError(f"`out`: {folder} cannot be written: {error.strerror or error}.") from error


def _write_part(directory: Path, ids: Sequence[str], images: Tensor, captions: Sequence[str]) -> None:
    """Write the shards of one part.

    Args:
        directory: Folder to make.
        ids: One per pair.
        images: Shape ``(n, 1, 8, 8)``, 0 to 1.
        captions: One per pair.
    """
    directory.mkdir()
    sizes = {}
    for shard, start in enumerate(range(0, len(ids), PAIRS_PER_SHARD)):
        metadata = []
        with tarfile.open(directory / f"{shard:08d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for place in range(start, min(start + PAIRS_PER_SHARD, len(ids))):
                key, caption, image = f"{shard:08d}{place - start:04d}", captions[place], encode_png(images[place])
                description = json.dumps({"uid": ids[place], "caption": caption, "key": key})
                for suffix, content in (("png", image), ("txt", caption.encode()), ("json", description.encode())):
                    member = tarfile.TarInfo(f"{key}.{suffix}")  # its time is 0: the same bytes every time
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                metadata.append(
                    {
                        "uid": ids[place],
                        "text": caption,
                        "original_width": 8,
                        "original_height": 8,
                        "sha256": hashlib.sha256(image).hexdigest(),
                    }
                )
        pq.write_table(pa.Table.from_pylist(metadata), directory / f"{shard:08d}.parquet")
        sizes[f"{shard:08d}.tar"] = len(metadata)
    (directory / "sizes.json").write_text(json.dumps(sizes, indent=2))
