"""Writes scikit-learn's digits with captions as shards of image-text pairs, as img2dataset and DataComp lay them out.

Needs no network. Some captions of the pool name another digit than the image shows; `truth.parquet` says which.

    python scripts/make_digit_shards.py --out outputs/digit_shards --seed 0 --mismatched 0.4
"""

import argparse
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lightning_mimic.data.digits import DigitsDataModule
from lightning_mimic.data.noise import SymmetricNoise

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


def parts(seed: int, mismatched: float) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """The digits that become pairs; none of them is among the 500 test images of ``DigitsDataModule(seed=seed)``.

    Args:
        seed: Of the split, and of what is mismatched.
        mismatched: Share of the pool whose captions name another digit, 0 to 1.

    Returns:
        By ``"reference"`` (300), ``"val"`` (100, the 50 that ``DigitsDataModule`` validates on among them) and
        ``"pool"`` (897): row numbers of ``sklearn.datasets.load_digits``, the digits shown and the digits named, int64
        of one length.
    """
    digits = DigitsDataModule(train="trusted", seed=seed)
    digits.setup()
    trusted = digits.train_dataloader().dataset
    rows = torch.cat([torch.tensor([sample.id for sample in trusted]), digits.noisy_ids])
    shown = torch.cat([torch.stack([sample.sample[1] for sample in trusted]), digits.true_labels])
    # 150 of the 200 trusted images for the reference; it must not know the 50 that validate.
    order = torch.cat(
        [torch.arange(0, 150), torch.arange(200, 350), torch.arange(150, 200), torch.arange(350, len(rows))]
    )
    rows, shown = rows[order], shown[order]
    named = shown.clone()
    named[400:], _ = SymmetricNoise(mismatched, seed)(shown[400:], len(CLASS_NAMES))
    sizes = [300, 100, len(rows) - 400]
    pieces = zip(rows.split(sizes), shown.split(sizes), named.split(sizes), strict=True)
    return dict(zip(("reference", "val", "pool"), pieces, strict=True))


def uid(seed: int, row: int) -> str:
    """The id of a pair, 32 hexadecimal digits as in DataComp."""
    return hashlib.md5(f"digits-{seed}-{row}".encode()).hexdigest()


def png(image: Tensor) -> bytes:
    """Shape ``(1, 8, 8)``, 0 to 1, as an RGB file of 8 × 8; the same pixels as torchvision's ``to_pil_image``."""
    from PIL import Image  # an optional package

    file = io.BytesIO()
    Image.fromarray(image[0].mul(255).byte().numpy()).convert("RGB").save(file, "png")
    return file.getvalue()


def write_part(directory: Path, uids: list[str], images: Tensor, captions: list[str]) -> None:
    """Shards ``00000000.tar`` and on, a table of metadata beside each, and ``sizes.json``.

    Args:
        directory: Made if need be.
        uids: One per pair.
        images: Shape ``(n, 1, 8, 8)``, 0 to 1.
        captions: One per pair.
    """
    directory.mkdir(parents=True)
    sizes = {}
    for shard, start in enumerate(range(0, len(uids), PAIRS_PER_SHARD)):
        metadata = []
        with tarfile.open(directory / f"{shard:08d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for place in range(start, min(start + PAIRS_PER_SHARD, len(uids))):
                key, caption, image = f"{shard:08d}{place - start:04d}", captions[place], png(images[place])
                described = json.dumps({"uid": uids[place], "caption": caption, "key": key})
                for suffix, content in (("png", image), ("txt", caption.encode()), ("json", described.encode())):
                    member = tarfile.TarInfo(f"{key}.{suffix}")  # its time is 0: the same bytes every time
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                metadata.append(
                    {
                        "uid": uids[place],
                        "text": caption,
                        "original_width": 8,
                        "original_height": 8,
                        "sha256": hashlib.sha256(image).hexdigest(),
                    }
                )
        pq.write_table(pa.Table.from_pylist(metadata), directory / f"{shard:08d}.parquet")
        sizes[f"{shard:08d}.tar"] = len(metadata)
    (directory / "sizes.json").write_text(json.dumps(sizes, indent=2))


def write(out: Path, seed: int, mismatched: float) -> None:
    """Writes folders ``reference``, ``val`` and ``pool``, and ``truth.parquet``; the same for the same arguments.

    Raises:
        FileExistsError: The folder has something in it already.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; give another folder, or remove this one.")
    digits, truth = DigitsDataModule(seed=seed), []
    digits.setup()
    generator = torch.Generator().manual_seed(seed)
    for part, (rows, shown, named) in parts(seed, mismatched).items():
        uids = [uid(seed, row) for row in rows.tolist()]
        wordings = torch.randint(len(TEMPLATES), named.shape, generator=generator).tolist()
        pairs = zip(wordings, named.tolist(), strict=True)
        write_part(out / part, uids, digits.images(rows), [TEMPLATES[w].format(CLASS_NAMES[n]) for w, n in pairs])
        wrong = (shown != named).tolist()
        truth += [{"id": i, "mismatched": w, "digit": d} for i, w, d in zip(uids, wrong, shown.tolist(), strict=True)]
    pq.write_table(pa.Table.from_pylist(truth), out / "truth.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must be empty")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the captions and what is mismatched")
    parser.add_argument("--mismatched", type=float, default=0.4, help="share of the pool, 0 to 1")
    arguments = parser.parse_args()
    try:
        write(arguments.out, arguments.seed, arguments.mismatched)
    except (FileExistsError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
