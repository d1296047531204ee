"""The data module: labelled images beside the pairs, open_clip's own parts, and arguments that make no sense."""

import re

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lightning_mimic.data import WithIds, collate_with_ids
from lightning_mimic.data.digits import DigitsDataModule
from lightning_mimic.data.image_text import ImageTextDataModule
from support.cases import for_each
from support.pair_shards import (
    SIZES,
    Reader,
    data_of,
    encoded,
    pair,
    picture_of,
    trainer,
    transform,
    uid,
    write,
    write_shards,
)


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards", *SIZES)


def test_labelled_images_follow_the_pairs_and_are_told_by_their_labels(shards, tmp_path):
    digits = DigitsDataModule(seed=3)
    seen = []

    def to_tensor(image):
        seen.append((image.mode, image.size))
        return torch.tensor(list(image.get_flattened_data())).float()

    data = data_of(shards, eval_transform=to_tensor, val_shards=str(shards[1]), zero_shot=digits, batch_size=20)
    data.setup("fit")
    pairs, images = data.val_dataloader()
    assert [batch.ids for batch in pairs] == [[uid(7), uid(8), uid(9)]]
    assert next(iter(pairs))[1].shape == (3, 2)
    assert [len(batch[1]) for batch in images] == [20, 20, 10]
    assert set(seen) == {("RGB", (4, 4)), ("RGB", (8, 8))}
    for name, loader in (("val_dataloader", images), ("test_dataloader", data.test_dataloader()[1])):
        true = [torch.cat(column) for column in zip(*getattr(digits, name)(), strict=True)]
        shown = [torch.cat(column) for column in zip(*loader, strict=True)]
        assert torch.equal(shown[1], true[1])
        assert shown[1].dtype == torch.int64
        torch.testing.assert_close(shown[0][..., 0] / 255, true[0].flatten(1), rtol=0, atol=0.5 / 255 + 1e-6)
    model = Reader()
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, datamodule=data_of(shards, val_shards=str(shards[1]), eval_transform=to_tensor, zero_shot=digits))
    assert model.validated == [(0, (3, 2)), *[(0, (4,))] * 12, (0, (2,))]
    only = data_of(shards, zero_shot=digits, eval_transform=to_tensor)
    only.setup()
    assert [batch[1].dim() for batch in only.val_dataloader()[0]] == [1] * 13


def test_labelled_pictures_need_not_be_tensors(shards):
    class Pictures(pl.LightningDataModule):
        def val_dataloader(self):
            samples = [(Image.new("L", (4, 4), 9), 1), (picture_of(3), 0)]
            return DataLoader(WithIds(samples), collate_fn=collate_with_ids)

        def test_dataloader(self):
            return None

    data = data_of(shards, zero_shot=Pictures())
    data.setup()
    [(images, labels)] = data.val_dataloader()[0]
    assert images.tolist() == [[9, 9, 9], [3, 0, 7]]
    assert labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"`zero_shot`: Pictures.test_dataloader\(\) is not a loader of a map-style"):
        data.test_dataloader()


def test_open_clips_own_transform_and_tokenizer_fit(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    files = {"png": None, "jpg": encoded(Image.new("RGB", (40, 50), (255, 0, 0)), "JPEG")}
    shard = write(tmp_path / "0.tar", [file for n in range(3) for file in pair(n, **files)])
    tokens = open_clip.get_tokenizer("ViT-B-32", context_length=16)
    image_transform = open_clip.image_transform(32, is_train=False)
    data = ImageTextDataModule(str(shard), image_transform, tokens, batch_size=2, shuffle=0)
    data.setup()
    images, texts = batch = next(iter(data.train_dataloader()))
    assert images.shape == (2, 3, 32, 32)
    assert torch.equal(texts, tokens(["number 0", "number 1"]))
    assert batch.ids == [uid(0), uid(1)]


@for_each(
    ("options", "message"),
    [
        ({"with_replacement": True}, "`with_replacement` needs the length of an epoch; give `samples_per_epoch`"),
        ({"samples_per_epoch": 5}, "`samples_per_epoch` is 5, but without `with_replacement` an epoch is one pass"),
        ({"batch_size": 0}, "`batch_size` is 0; expected at least 1"),
        ({"shuffle": -1}, "`shuffle` is -1; expected at least 0"),
        ({"max_pixels": 0}, "`max_pixels` is 0; expected at least 1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options, message, shards):
    with pytest.raises(ValueError, match=re.escape(message)):
        data_of(shards, **options)


def test_a_tokenizer_or_directory_that_is_none_is_refused_before_training(shards, tmp_path):
    with pytest.raises(
        ValueError, match=re.escape("`tokenizer` returned torch.float32 (1,) for one caption; expected")
    ):
        ImageTextDataModule(str(shards[0]), transform, lambda captions: torch.zeros(len(captions))).setup()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"`rejects`: {tmp_path}/file cannot be created"):
        data_of(shards, rejects=tmp_path / "file").setup()
