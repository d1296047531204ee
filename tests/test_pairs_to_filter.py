"""A pair's id, from its shard by way of batch and ledger to DataComp's filter file; also where training broke off."""

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_mimic import Aligned, GradMimic, Ledger
from lightning_mimic.curation import curate
from lightning_mimic.data.image_text import ImageTextDataModule
from lightning_mimic.data.rejects import Rejects
from support.clips import BARE, clip
from support.pair_shards import SIZES, pair, uid, write, write_shards
from support.toys import parameters_of, trainer

BROKEN = {"png": b"<html>"}
EPOCHS = 3


def transform(image):
    """As large as the towers want it; its first channel tells the pair's number."""
    colour = torch.tensor(image.getpixel((0, 0))).float()
    return (colour / 10).view(3, 1, 1).expand(3, 32, 32) + torch.linspace(0, 1, 32)


def tokenizer(captions):
    """Eight words, the last of which ends the caption."""
    numbers = [int(caption.removeprefix("number ")) if caption.startswith("number") else 0 for caption in captions]
    return torch.tensor([[n % 90 + 1, n // 90 + 1, 5, 5, 5, 5, 5, 99] for n in numbers])


def data_of(folder, **options):
    shards = [str(path) for path in sorted((folder / "shards").glob("*.tar"))]
    return ImageTextDataModule(shards, transform, tokenizer, **({"batch_size": 4, "shuffle": 50} | options))


@pytest.fixture
def folder(tmp_path):
    """26 pairs in five shards, two of them broken."""
    paths = write_shards(tmp_path / "shards", *SIZES)
    write(paths[1], [file for n in (7, 8, 9) for file in pair(n, **(BROKEN if n in (7, 9) else {}))])
    return tmp_path


class Seen(Callback):
    """Which number each place of each batch had, told by its image alone."""

    def __init__(self):
        self.numbers = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        found = (batch[0][:, 0, 0, 0] * 10).round().long().tolist()
        for position, number in enumerate(found):
            self.numbers[trainer.current_epoch, batch_idx, position] = number


def mimic(ledger, **options):
    reference = parameters_of(clip(seed=1, dtype=torch.float32))
    return GradMimic(reference, BARE, temperature=0.05, ledger=ledger, on_doubtful="warn", **options)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.filterwarnings("ignore:the reference is")
def test_every_id_is_that_of_its_picture_as_far_as_the_filter_file(num_workers, folder):
    seen = Seen()
    with pytest.warns(UserWarning, match=r"2 image-text pairs were skipped \(2 undecodable image\); listed in"):
        trainer(mimic(folder / "scores"), seen, epochs=EPOCHS).fit(
            clip(dtype=torch.float32),
            datamodule=data_of(folder, num_workers=num_workers, rejects=folder / "rejects"),
        )
    rows = Ledger(folder / "scores").table().to_pylist()
    assert len(rows) == len(seen.numbers) >= EPOCHS * 24
    for row in rows:
        assert row["id"] == uid(seen.numbers[row["epoch"], row["batch"], row["position"]])
    assert {int(row["id"], 16) for row in rows} == set(range(26)) - {7, 9}
    assert set(Rejects(folder / "rejects").table["id"].to_pylist()) == {uid(7), uid(9)}

    done = curate(folder / "scores", out=folder / "curated", exports=["datacomp"])
    table = done.manifest.table().to_pylist()
    kept = sorted(row["id"] for row in table if row["keep"])
    assert 0 < len(kept) < 24, "a filter that keeps or drops all"
    pairs = np.load(folder / "curated" / "kept.npy")
    assert pairs.dtype == np.dtype("u8,u8")
    assert [f"{high:016x}{low:016x}" for high, low in pairs] == kept

    again = Seen()
    with pytest.warns(UserWarning, match=r"2 unknown to the manifest"):
        trainer(again).fit(
            clip(dtype=torch.float32), datamodule=data_of(folder, keep=folder / "curated" / "manifest.parquet")
        )
    assert sorted(uid(number) for number in set(again.numbers.values())) == kept


class Stop(Callback):
    """Saves in the middle of an epoch, and breaks off one batch later."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 9:
            trainer.save_checkpoint(self.path)
        if trainer.global_step == 10:
            raise InterruptedError


@pytest.mark.slow
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.filterwarnings("ignore:the reference is", "ignore:.*pairs were skipped")
def test_a_resumed_fit_scores_and_learns_as_if_it_had_not_stopped(aligned, folder):
    def fitted(name, *callbacks, **how):
        callback = mimic(folder / name)
        if aligned:
            reference = Aligned(clip("wide", seed=1, dtype=torch.float32), every=2)
            callback = GradMimic(reference, BARE, temperature=0.05, ledger=folder / name)
        module = clip(dtype=torch.float32)
        trainer(callback, *callbacks, epochs=5).fit(module, datamodule=data_of(folder), **how)
        return module

    whole = fitted("whole")
    saved = folder / "saved.ckpt"
    with pytest.raises(InterruptedError):
        fitted("broken", Stop(saved))
    resumed = fitted("broken", ckpt_path=saved)
    torch.testing.assert_close(parameters_of(resumed), parameters_of(whole), rtol=0, atol=0)
    columns = ["id", "epoch", "batch", "position", "score", "weight", "loss"]
    order = [(name, "ascending") for name in ("epoch", "batch", "position")]
    one, two = (Ledger(folder / name).table().sort_by(order).select(columns) for name in ("whole", "broken"))
    assert one.to_pylist() == two.to_pylist()
    assert any(row["score"] is not None for row in one.to_pylist())
