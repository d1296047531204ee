"""Image-text pairs made from scikit-learn's digits, written as shards in the layout of img2dataset and DataComp."""

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
    """Hold the digits of image-text pairs, as int64 tensors of equal length.

    Attributes:
        rows: Row numbers in ``sklearn.datasets.load_digits``.
        shown: Digits shown by the images.
        named: Digits named by the captions.
    """

    rows: Tensor
    shown: Tensor
    named: Tensor


def split_digit_pairs(seed: int, mismatched: float) -> dict[str, DigitPairs]:
    """Divide the digits into parts, leaving out the 500 test images of ``DigitsDataModule``.

    Args:
        seed: Seed of the split, and of the selection of mismatched captions.
        mismatched: Share of the pool whose captions name another digit, 0 to 1.

    Returns:
        Parts by name: ``"reference"`` (300), ``"val"`` (100, including the 50 validation images of
        ``DigitsDataModule``) and ``"pool"`` (897).

    Raises:
        MimicError: ``mismatched`` is outside 0 to 1.

    Example:
        >>> pool = split_digit_pairs(seed=0, mismatched=0.4)["pool"]
        >>> len(pool.rows), int((pool.shown != pool.named).sum())
        (897, 358)
    """
    if not 0 <= mismatched <= 1:
        raise MimicError(f"`mismatched` is {mismatched!r}; expected the share of mismatched captions, 0 to 1.")
    digits = DigitsDataModule(split_seed=seed)
    digits.setup()
    # The reference must not be trained on the 50 validation images.
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
    """Encode an image of shape ``(1, 8, 8)``, 0 to 1, as an RGB PNG with the pixels of torchvision's ``to_pil_image``.

    Example:
        >>> encode_png(torch.zeros(1, 8, 8))[1:4]
        b'PNG'
    """
    from PIL import Image  # an optional package

    file = io.BytesIO()
    Image.fromarray(image[0].mul(255).byte().numpy()).convert("RGB").save(file, "png")
    return file.getvalue()


def write_digit_shards(out: str | Path, seed: int = 0, mismatched: float = 0.4) -> None:
    """Write folders ``reference``, ``val`` and ``pool``, and ``truth.parquet``, which marks mismatched captions.

    Each folder has shards named from ``00000000.tar``, a table of metadata for each shard, and ``sizes.json``. The same
    arguments give the same bytes.

    Args:
        out: Folder to create; it must be empty if it exists.
        seed: Seed of the split, of the wording of captions, and of the selection of mismatched captions.
        mismatched: Share of the pool whose captions name another digit, 0 to 1.

    Raises:
        MimicError: The folder is not empty or cannot be written, or ``mismatched`` is outside 0 to 1. Nothing is
            written then.

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
        raise MimicError(f"`out`: {folder} is not an empty directory; choose another one, or remove its content.")
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
    except OSError as error:  # a full disk, or another process has created the folder
        raise MimicError(f"`out`: {folder} cannot be written: {error.strerror or error}.") from error


def _write_part(directory: Path, ids: Sequence[str], images: Tensor, captions: Sequence[str]) -> None:
    """Write the shards of one part.

    Args:
        directory: Folder to create.
        ids: Ids of the pairs.
        images: Images, shape ``(n, 1, 8, 8)``, 0 to 1.
        captions: Captions of the pairs.
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
                    member = tarfile.TarInfo(f"{key}.{suffix}")  # its time is 0, so that the bytes are reproducible
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
