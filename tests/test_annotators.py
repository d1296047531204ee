"""Wrong labels: as people give them, read without running code, and as the paper draws them."""

import re
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_mimic.data.annotators import AnnotatorNoise
from lightning_mimic.data.noise import SymmetricNoise
from lightning_mimic.data.torchvision_sets import TorchvisionDataModule
from support.image_sets import labels_of, write_set

CLEAN = labels_of("cifar10", "train")


def people(path, kind=np.int64, **changes):
    """A file as CIFAR-10N's: in ``worse_label`` every third label is the next class, in ``random_label1`` none."""
    worse = torch.where(torch.arange(30) % 3 == 0, (CLEAN + 1) % 10, CLEAN)
    columns = {"clean_label": CLEAN, "worse_label": worse, "random_label1": CLEAN}
    arrays = {name: column.numpy().astype(kind) for name, column in columns.items()}
    torch.save(arrays | changes, path)
    return path


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_the_labels_of_people_go_with_the_rows_that_are_asked_for(kind, tmp_path):
    noise = AnnotatorNoise(people(tmp_path / "CIFAR-10_human.pt", kind), "worse_label")
    for rows in (None, torch.tensor([3, 0, 29, 4]), torch.randperm(30), torch.arange(0)):
        picked = torch.arange(30) if rows is None else rows
        noisy, wrong = noise(CLEAN[picked], 10, rows)
        assert noisy.dtype == torch.int64
        assert torch.equal(wrong, picked % 3 == 0)
        assert torch.equal(noisy, torch.where(wrong, (CLEAN[picked] + 1) % 10, CLEAN[picked]))
    assert not AnnotatorNoise(noise.path, "random_label1")(CLEAN, 10)[1].any()


@pytest.mark.parametrize("train", ["noisy", "trusted_held"])
def test_a_part_of_a_set_gets_the_labels_of_its_own_images(train, tmp_path, monkeypatch):
    write_set("cifar10", tmp_path, monkeypatch)
    noise = AnnotatorNoise(people(tmp_path / "CIFAR-10_human.pt"), "worse_label")
    data = TorchvisionDataModule("cifar10", tmp_path, torch.zeros_like, train, noise, trusted=0.5)
    data.setup()
    assert torch.equal(data.wrong, data.noisy_ids % 3 == 0)
    assert 0 < int(data.wrong.sum()) < len(data.wrong) == 10
    samples = data.train_dataloader().dataset
    given = dict(zip(samples.ids, samples.dataset.labels.tolist(), strict=True))
    assert sorted(given) == data.rows[train].tolist()
    assert given == {row: int((CLEAN[row] + (row % 3 == 0)) % 10) for row in given}


def test_cifar_100_has_one_annotator_and_labels_of_groups_are_none(tmp_path):
    clean = labels_of("cifar100", "train").numpy()
    columns = {"clean_label": clean, "noisy_label": clean[::-1].copy(), "noisy_coarse_label": clean // 5}
    torch.save(columns | {"clean_coarse_label": clean // 5}, tmp_path / "CIFAR-100_human.pt")
    labels, wrong = AnnotatorNoise(tmp_path / "CIFAR-100_human.pt", "noisy_label")(torch.from_numpy(clean), 100)
    assert torch.equal(labels, torch.from_numpy(columns["noisy_label"]))
    assert torch.equal(wrong, labels != torch.from_numpy(clean))
    for name in ("noisy_coarse_label", "clean_label", "aggre_label"):
        with pytest.raises(
            ValueError, match=f"^`annotator`: .*_human.pt has no labels '{name}'; .*: 'noisy_label'\\.$"
        ):
            AnnotatorNoise(tmp_path / "CIFAR-100_human.pt", name)(torch.from_numpy(clean), 100)


def test_files_of_numpy_1_and_2_are_read(tmp_path):
    path = people(tmp_path / "people.pt")
    lines = [f"cnumpy.{core}.multiarray\n_reconstruct\n".encode() for core in ("core", "_core")]
    for line in lines:
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "other.pt", "w") as new:
            for each in old.namelist():
                content = old.read(each)
                for other in lines:
                    content = content.replace(other, line)
                new.writestr(each, content)
                assert (line in content) == each.endswith("data.pkl")
        noisy, wrong = AnnotatorNoise(tmp_path / "other.pt", "worse_label")(CLEAN, 10)
        assert torch.equal(noisy, torch.where(torch.arange(30) % 3 == 0, (CLEAN + 1) % 10, CLEAN))
        assert int(wrong.sum()) == 10


class Canary:
    """Says in a file that a pickle's code was run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_file_that_could_run_code_is_refused(tmp_path):
    allowed = torch.serialization.get_safe_globals()
    inside = np.array([Canary(tmp_path / "ran")], dtype=object)
    for name, more in {"beside": Canary(tmp_path / "ran"), "inside": inside}.items():
        path = people(tmp_path / f"{name}.pt", more=more)
        with pytest.raises(
            ValueError, match=r"^`noise`: .* cannot be read: it is damaged, or contains more than arrays of who"
        ):
            AnnotatorNoise(path, "worse_label")(CLEAN, 10)
        assert not (tmp_path / "ran").exists()
        torch.load(path, weights_only=False)
        (tmp_path / "ran").unlink()
    assert torch.serialization.get_safe_globals() == allowed


def test_files_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "people.pt"

    def refused(message, annotator="worse_label", labels=CLEAN, rows=None):
        with pytest.raises(ValueError, match=message):
            AnnotatorNoise(path, annotator)(labels, 10, rows)

    refused(rf"^`noise`: no file {re.escape(str(path))}\. Download CIFAR-10_human\.pt or CIFAR-100_human\.pt")
    people(path)
    refused("^`annotator`: .*people.pt has no labels 'worst_label'; nearest: 'worse_label'", "worst_label")
    others = "file is of another data set, of another split, or in another order"
    refused(rf"'clean_label' in .* is not the true label of 30 of 30 images; the {others}", labels=(CLEAN + 1) % 10)
    refused("is not the true label of 2 of 2 images", labels=CLEAN[:2], rows=torch.tensor([1, 0]))
    refused("has labels of 30 images, but the training split has at least 31; the file is", rows=torch.arange(1, 31))
    people(path, worse_label=np.zeros(29, dtype=int))
    refused("'clean_label' has 30 labels, 'worse_label' 29")
    people(path, worse_label=np.full(30, 10))
    refused("labels run from 10 to 10, outside the 10 classes")
    for column in (np.zeros(30), np.zeros((30, 1), dtype=int), torch.zeros(30), [0] * 30):
        people(path, worse_label=column)
        refused("^`noise`: 'worse_label' in .* is not an array of whole numbers|cannot be read")
    torch.save({"worse_label": CLEAN.numpy()}, path)
    refused("^`noise`: 'clean_label' in .* is not an array of whole numbers, one per image")
    torch.save([1], path)
    refused("people.pt holds a list; expected a dict of arrays")
    people(path)
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    refused("cannot be read: it is damaged, or")
    at = data.index(b"\x01\x00\x00")
    path.write_bytes(data[:at] + b"\x03" + data[at + 1 :])
    refused("cannot be read: it is damaged, or")


def test_symmetric_noise_hits_the_exact_count_and_never_keeps_the_true_class():
    generator = torch.Generator().manual_seed(0)
    for count in (0, 1, 7, 30, 100, 1020, 1880, 3680, 5000, 50_000):
        for rate in ("0", "0.1", "0.29", "0.3", "0.4", "0.5", "0.57", "0.6", "0.7", "1"):
            labels = torch.randint(0, 10, (count,), generator=generator)
            noisy, wrong = SymmetricNoise(float(rate), seed=count)(labels, 10, torch.arange(count))
            assert int(wrong.sum()) == int(Fraction(rate) * count)
            assert torch.equal(noisy != labels, wrong)


def test_symmetric_noise_draws_uniformly_which_labels_and_which_other_class():
    labels = torch.arange(50_000) % 10
    noisy, wrong = SymmetricNoise(0.4, seed=1)(labels, 10)
    shift = (noisy - labels)[wrong] % 10
    for seen, cells in ((torch.bincount(shift, minlength=10)[1:], 9), (wrong.view(50, 1000).sum(1), 50)):
        expected = 20_000 / cells
        statistic = float(((seen - expected) ** 2 / expected).sum())
        assert len(seen) == cells
        # Chi-square with cells - 1 degrees of freedom: mean that, deviation the root of twice that.
        assert statistic < cells - 1 + 3.5 * (2 * (cells - 1)) ** 0.5
