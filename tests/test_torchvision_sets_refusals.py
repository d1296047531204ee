"""Data sets that are not there, not whole, or not the published ones: said before training, and nothing is run."""

import pickle
import re
import shutil
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import torchvision.datasets

from lightning_mimic.data.torchvision_sets import SETS, TorchvisionDataModule
from lightning_mimic.data.transforms import paper_transform
from support.image_sets import labels_of, opened, write_set


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    write_set("cifar10", tmp_path / "sets", monkeypatch)
    return tmp_path / "sets"


def test_without_a_network_it_is_said_what_belongs_where(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    for name, spec in SETS.items():
        module = TorchvisionDataModule(name, tmp_path / name)
        where = tmp_path / name / spec.folder
        message = (
            f"`data`: {spec.reader} cannot be read from {tmp_path / name}: <urlopen error no route to host>. "
            f"Set `download=True` to download it. Without a network, copy {' and '.join(spec.archives)} to {where}; "
            f"`download=True` unpacks them to {' and '.join(str(tmp_path / name / path) for path in spec.unpacked)}. "
            "Remove incomplete files first."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$") as caught:
            module.prepare_data()
        assert isinstance(caught.value.__cause__, urllib.error.URLError)
        quiet = TorchvisionDataModule(name, tmp_path / name, download=False)
        quiet.prepare_data()  # asks for nothing
        with pytest.raises(ValueError, match=f"{spec.reader} cannot be read from .*: Dataset not found"):
            quiet.setup()


def archive(name, root, patch):
    """Packs the files of a written set as they are published, where the table says they belong."""
    spec, reader = SETS[name], getattr(torchvision.datasets, SETS[name].reader)
    folder = root / spec.folder
    for url in spec.archives:
        file = folder / url.rpartition("/")[2]
        inside = folder / file.name.partition(".")[0]  # of Pet, whose two archives are named after their folders
        if not inside.exists():
            inside = folder / (root / spec.unpacked[0]).relative_to(folder).parts[0]
        if file.suffix != ".mat":
            with tarfile.open(file, "w:gz") as tar:
                tar.add(inside, inside.name)
            shutil.rmtree(inside)
    if name == "flowers102":
        patch.setattr(reader, "_file_dict", reader._file_dict | {"image": ("102flowers.tgz", None)})
    elif name == "oxford_pet":
        patch.setattr(reader, "_RESOURCES", [(url, None) for url in spec.archives])
    else:
        patch.setattr(reader, "_MD5" if name == "dtd" else "tgz_md5", None)


@pytest.mark.parametrize("name", SETS)
def test_what_is_put_where_the_message_says_is_unpacked_without_a_network(name, tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", None)
    write_set(name, tmp_path, monkeypatch)
    archive(name, tmp_path, monkeypatch)
    assert not any((tmp_path / path).exists() for path in SETS[name].unpacked)
    module = TorchvisionDataModule(name, tmp_path, paper_transform(8))
    module.prepare_data()
    assert all((tmp_path / path).is_dir() for path in SETS[name].unpacked)
    module.setup()
    assert torch.equal(module.true_labels, labels_of(name, "train"))


class Canary:
    """Says in a file that a pickle's code was run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", f"cifar-10-batches-py/{file}")
        for file in ("data_batch_1", "data_batch_5", "test_batch", "batches.meta")
    ]
    + [("cifar100", f"cifar-100-python/{file}") for file in ("train", "test", "meta")],
)
def test_a_pickle_that_is_not_the_published_one_is_never_opened(name, file, tmp_path, monkeypatch):
    write_set(name, tmp_path, monkeypatch)
    opened(name, tmp_path)
    (tmp_path / file).write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"^`data`: CIFAR100? cannot be read from .* not found or corrupted"):
        opened(name, tmp_path)
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / file).read_bytes())
    assert (tmp_path / "ran").exists()


def test_half_a_set_is_noticed_before_training(tmp_path, monkeypatch):
    write_set("dtd", tmp_path, monkeypatch)
    images = sorted((tmp_path / "dtd" / "dtd" / "images").rglob("*_train*.jpg"))
    images[3].write_bytes(images[3].read_bytes()[:100])
    broken = rf"^image \d+ cannot be decoded: {re.escape(str(images[3]))}: .*Replace or remove it"
    with pytest.raises(ValueError, match=broken):
        list(opened("dtd", tmp_path).train_dataloader())
    labels = tmp_path / "dtd" / "dtd" / "labels" / "test1.txt"
    text = labels.read_text()
    labels.write_text("".join(line for line in text.splitlines(True) if "class005" not in line))
    with pytest.raises(ValueError, match=r"DTD cannot be read from .*: there are 46 classes instead of 47"):
        opened("dtd", tmp_path)
    labels.write_text(text)
    for image in images[:2]:
        image.unlink()
    with pytest.raises(
        ValueError, match=r"DTD cannot be read from .*: 2 of 141 images do not exist, such as .*jpg\. Set"
    ):
        opened("dtd", tmp_path)


def test_what_no_set_can_be_is_refused(cifar10):
    with pytest.raises(ValueError, match=re.escape("`name` is 'flower102'; nearest: 'flowers102', 'cifar10'")):
        TorchvisionDataModule("flower102", "sets")
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=f"`trusted` is {share}; expected a share .* from 0 to below 1"):
            TorchvisionDataModule("dtd", "sets", trusted=share)
    with pytest.raises(ValueError, match=r"`train` is 'trusted', but that part has no images; .*noisy \(30\)"):
        opened("cifar10", cifar10, train="trusted")
    with pytest.raises(ValueError, match=re.escape("`transform` is None, so that images are PIL images, on which")):
        opened("cifar10", cifar10, None).train_dataloader()
