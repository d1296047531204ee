"""The files of cached features: one for the same images and weights, whole or not there, and trusted for a reason."""

import errno
import os
import random
import re
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mimic.data import CachedFeatures
from lightning_mimic.data.noise import SymmetricNoise
from lightning_mimic.errors import MimicError
from lightning_mimic.models import ImageClassifier
from support.small_images import TEST, TRAIN, SmallImages, classifier


def prepared(folder: Path, model: ImageClassifier | None = None, **options: Any) -> list[int]:
    """How many images the backbone saw while features were made ready, by call."""
    model, seen = model or classifier(), []
    handle = model.backbone.register_forward_pre_hook(lambda _, images: seen.append(len(images[0])))
    CachedFeatures(SmallImages(**options), model, folder).prepare_data()
    handle.remove()
    return seen


BUILT = [TRAIN, TRAIN, TEST]  # plain and flipped, and the test split
LOOKED = [2, 2, 2]


def test_features_are_computed_once_for_the_same_images_and_weights(tmp_path):
    assert prepared(tmp_path) == BUILT
    for same in ({}, {"seed": 1}, {"noise": SymmetricNoise(0.6)}, {"train": "trusted"}):
        assert prepared(tmp_path, **same) == LOOKED
    assert prepared(tmp_path, flip=False) == [TRAIN, 2]  # the test split is there
    assert prepared(tmp_path, of=1) == BUILT
    assert prepared(tmp_path, classifier(seed=1)) == BUILT
    other = classifier()
    other.backbone[1].running_mean += 1  # a buffer
    assert prepared(tmp_path, other) == BUILT
    other = classifier()
    other.backbone[2] = nn.GELU()  # the same weights
    assert prepared(tmp_path, other) == BUILT
    assert len(list(tmp_path.iterdir())) == 11


def damage(path: Path, kind: str) -> None:
    whole = path.read_bytes()
    rows = torch.zeros(TRAIN, 2, 5) if kind == "another shape" else torch.zeros(TRAIN, 2, 6 * 14 * 14)
    contents = {"cut off": whole[: len(whole) // 2], "empty": b"", "something else": b"features", "pickled": whole}
    if kind in contents:
        path.write_bytes(contents[kind])
    if kind not in contents or kind == "pickled":
        np.save(path, np.array([{}]) if kind == "pickled" else rows.numpy())


@pytest.mark.parametrize("kind", ["cut off", "empty", "something else", "pickled", "another shape", "other features"])
def test_a_damaged_file_is_not_used(kind, tmp_path):
    prepared(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    train = max(files, key=lambda path: len(files[path]))
    damage(train, kind)
    said = "does not hold the backbone's features" if kind[-2:] in ("pe", "es") else "is damaged ("
    with pytest.warns(UserWarning, match=re.escape(f"{train} {said}") + ".*recomputed"):
        assert prepared(tmp_path) == ([TRAIN, TRAIN, 2] if said[0] == "i" else [2, 2, TRAIN, TRAIN, 2])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_every_changed_byte_is_noticed_and_the_features_come_back(tmp_path):
    def prepare():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            prepared(tmp_path, flip=False)
        return [str(each.message) for each in said]

    prepare()
    whole = {path: path.read_bytes() for path in tmp_path.iterdir()}
    first, second = whole
    rng = random.Random(0)
    mutants: list[tuple[Path, bytes]] = [(first, whole[second]), (second, whole[first])]  # swapped
    for path in whole:
        data = whole[path]
        for _ in range(60):
            at = rng.choice([rng.randrange(128), rng.randrange(len(data)), len(data) - 1 - rng.randrange(33)])
            mutants.append((path, data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]))
        mutants += [(path, data[:cut]) for cut in (0, 1, 127, len(data) - 32, len(data) - 1)]
        mutants += [(path, data + b"\0"), (path, data[:-32] + data[-64:-32] + data[-32:])]
    for path, changed in mutants:
        path.write_bytes(changed)
        (said,) = prepare()
        assert str(path) in said
        assert "recomputed" in said
        assert {each: each.read_bytes() for each in tmp_path.iterdir()} == whole
    assert prepare() == []


def test_what_was_not_computed_is_said(tmp_path):
    with pytest.raises(MimicError, match=r"^`features`: .*\.npy does not exist; call `prepare_data\(\)`"):
        CachedFeatures(SmallImages(), classifier(), tmp_path).setup()
    (tmp_path / "file").touch()
    with pytest.raises(MimicError, match=r"^`features`: .*/file cannot be created: File exists\.$"):
        CachedFeatures(SmallImages(), classifier(), tmp_path / "file").prepare_data()


def test_a_backbone_whose_weights_do_not_say_all_is_found_out(tmp_path):
    class Scaled(nn.Flatten):
        factor = 1.0

        def forward(self, images: Tensor) -> Tensor:
            return self.factor * super().forward(images)

    prepared(tmp_path, classifier(Scaled))
    Scaled.factor = 1.1
    with pytest.warns(UserWarning, match="does not hold the backbone's features"):
        assert prepared(tmp_path, classifier(Scaled)) == [2, 2, TRAIN, TRAIN, 2, TEST]


class Broken(nn.Flatten):
    """Is interrupted at its second call."""

    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 4:  # after the classifier's own, and both views of the first batch
            raise KeyboardInterrupt
        return super().forward(images)


def test_an_interruption_leaves_nothing_half(tmp_path):
    data = SmallImages()
    data.eval_batch_size = 8
    with pytest.raises(KeyboardInterrupt):
        CachedFeatures(data, classifier(Broken), tmp_path).prepare_data()
    assert list(tmp_path.iterdir()) == []


def test_two_runs_at_once_do_not_disturb_each_other(tmp_path):
    both = threading.Barrier(2)
    models = [classifier(), classifier()]

    def together(*_: Any) -> None:
        both.wait(30)

    for model in models:  # the features of a split are computed by both at the same time
        model.backbone.register_forward_pre_hook(together)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda model: CachedFeatures(SmallImages(), model, tmp_path).prepare_data(), models))
    assert len(list(tmp_path.iterdir())) == 2
    assert prepared(tmp_path) == LOOKED


@pytest.mark.parametrize("when", ["before", "while writing"])
def test_a_full_disk_is_said(when, monkeypatch, tmp_path):
    def full(*args: Any) -> Any:
        if when == "before":
            return type("Usage", (), {"free": 1000})
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*(("shutil.disk_usage", full) if when == "before" else ("os.fsync", full)))
    message = (
        f"`features`: {tmp_path} has no space for the 0.00 GiB of features; choose another directory, or train without "
        "`features`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        prepared(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_else_draws_otherwise_and_images_come_back(tmp_path):
    model, data = classifier(), SmallImages()
    cached = CachedFeatures(data, model, tmp_path)
    model.backbone.train()  # as somebody may have left it
    before = torch.get_rng_state()
    cached.prepare_data()
    image = data.sources["train"].images[3]
    cached.setup("fit")
    assert torch.equal(torch.get_rng_state(), before)
    assert model.takes_features
    expected = model.backbone.eval()(torch.stack([image, image.flip(-1)]))
    torch.testing.assert_close(data.sources["train"].images[3], expected)
    assert data.sources["test"].images[3].shape == (3, 16, 16)  # a fit does not test
    assert data.sources["train"].images.path.stat().st_mode & 0o777 == 0o666 & ~mask()  # others may read it, too
    cached.setup("fit")
    cached.teardown("fit")
    assert not model.takes_features
    assert data.sources["train"].images[3].shape == (3, 16, 16)


def mask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


def test_workers_open_the_file_themselves(tmp_path):
    cached = CachedFeatures(SmallImages(num_workers=1), classifier(), tmp_path)
    cached.prepare_data()
    cached.setup()
    rows = cached.data.sources["train"].images
    rebuilt, arguments = rows.__reduce__()
    assert arguments == (rows.path,)
    torch.testing.assert_close(rebuilt(*arguments)[5], rows[5], rtol=0, atol=0)
    loader = DataLoader(rows, 4, num_workers=1, generator=torch.Generator(), multiprocessing_context="fork")
    torch.testing.assert_close(torch.cat(list(loader))[5], rows[5], rtol=0, atol=0)
