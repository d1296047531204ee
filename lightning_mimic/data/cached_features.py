"""Features of a frozen backbone, computed once per data set and cached for the training of heads."""

import contextlib
import dataclasses
import errno
import hashlib
import io
import math
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mimic.errors import MimicError, join_names
from lightning_mimic.files import atomic_write, fetched
from lightning_mimic.random_streams import torch_generator
from lightning_mimic.reference import fingerprint
from lightning_mimic.stores import as_store_path, path_of
from lightning_mimic.trainer_package import pl

#: Version of the file format; files of other versions are not used.
FORMAT = 2
# Sources that each stage of Lightning reads; other stages read all.
_READ = {"fit": ("train", "val"), "validate": ("train", "val"), "test": ("test",)}
_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class FeatureModel(Protocol):
    """A classifier that can be trained on its frozen backbone's features, such as ``ImageClassifier``.

    Attributes:
        backbone: Module from images ``(B, C, H, W)`` to features ``(B, D)``.
        head: Trained layer, whose ``in_features`` is D.
        freeze_backbone: Whether the backbone is frozen and stays in evaluation mode.
        takes_features: Whether batches hold features instead of images; set by :class:`CachedFeatures`.
        device: Device of the model.
    """

    backbone: nn.Module
    head: Any
    freeze_backbone: bool
    takes_features: bool

    @property
    def device(self) -> torch.device: ...


_MODEL = ("backbone", "head", "freeze_backbone", "takes_features", "device")


class FeatureRows:
    """Read features by row from a memory-mapped file.

    Args:
        path: Path of a file written by :class:`CachedFeatures`; a file on an object store is downloaded, and the copy
            is deleted with this object.
    """

    def __init__(self, path: Path) -> None:
        self._copy = contextlib.ExitStack()
        weakref.finalize(self, self._copy.close)
        self.path = self._copy.enter_context(fetched(path))
        self._rows = _opened(self.path)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Tensor:
        return torch.from_numpy(self._rows[row].copy())

    def __reduce__(self) -> Any:
        # A spawned worker opens the file itself, so that the array is not copied to it.
        return FeatureRows, (self.path,)


class CachedFeatures(pl.LightningDataModule):
    """Wrap a data module, replacing its images by cached features of a classifier's frozen backbone.

    Loaders, parts, noise, filter, ids, order and flips are those of the wrapped data module, so that a head is trained
    as on the images, up to float32 rounding, because features are computed in batches of another size. Features are
    float32; with mixed precision, which would run the backbone in lower precision, they differ by the rounding of that
    precision. Batches are features ``(B, D)`` and labels, with ids.

    A file holds the features of all images of one split, and also those of the flipped images if training flips:
    float32, shape ``(rows, views, D)``, readable by ``numpy.load``, with a SHA-256 of its name and content at the end.
    Its name is a hash of data, transform, backbone and weights. One process writes it under a temporary name; any
    number of runs and processes can use it. Before a run uses a file, its first and last rows are compared with the
    backbone's output for these images, and its checksum is verified, which reads the file once (one to two seconds per
    GiB, in one process per machine). If either check fails, the features are recomputed with a warning.

    Args:
        data: Data module of labelled images, such as those of ``lightning_mimic.data``, whose training images are not
            augmented except by flipping.
        model: Classifier to train, with ``freeze_backbone=True``.
        directory: Directory for the files, or its URL. From an object store, each training process downloads a file
            once, and the process that checks it once more.

    Raises:
        MimicError: ``data`` or ``model`` has another type, the backbone is trained, or images are augmented at random.

    Example:
        >>> import tempfile
        >>> from lightning_mimic.data.digits import DigitsDataModule
        >>> from lightning_mimic.models import ImageClassifier
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
        >>> model = ImageClassifier(net, num_classes=10, image_shape=(1, 8, 8), freeze_backbone=True)
        >>> cached = CachedFeatures(DigitsDataModule(), model, tempfile.mkdtemp())
        >>> cached.prepare_data()
        >>> cached.setup()
        >>> cached.data.sources["train"].images[0].shape
        torch.Size([1, 16])
    """

    def __init__(self, data: pl.LightningDataModule, model: FeatureModel, directory: str | Path) -> None:
        super().__init__()
        if not isinstance(data, pl.LightningDataModule) or not callable(getattr(data, "flipped", None)):
            raise MimicError(
                f"`data` is a {type(data).__name__}; features can be cached for data modules of labelled images only. "
                "Train without `features`."
            )
        if missing := [name for name in _MODEL if not hasattr(model, name)]:
            raise MimicError(
                f"`model` is a {type(model).__name__} without {join_names(missing)}; features can be cached for "
                "classifiers such as ImageClassifier only. Train without `features`."
            )
        if not model.freeze_backbone:
            raise MimicError(
                "the backbone is trained, so that its features change with every step and cannot be cached. Set "
                "`freeze_backbone=true`, or train without `features`."
            )
        if _augments(data):
            raise MimicError(
                f"{type(data).__name__} augments its training images at random, so that their features cannot be "
                "cached. Set `augment=false` (flipping by `flip` is cached), or train without `features`."
            )
        self.data: Any = data
        self.model = model
        self.directory = path_of(directory, "features")
        self._plain: dict[str, Any] = {}

    def prepare_data(self) -> None:
        """Compute missing features on the trainer's device, in one process per machine.

        Raises:
            MimicError: The trainer trains another model, or files cannot be written, for example on a full disk.
        """
        trained: Any = None if self.trainer is None else self.trainer.lightning_module
        if trained not in (None, self.model):
            raise MimicError("CachedFeatures and the trainer have different models; give both the same one.")
        self.data.prepare_data()
        self.data.setup()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MimicError(f"`features`: {self.directory} cannot be created: {error.strerror}.") from error
        self.model.backbone.to(self._device).eval()
        for name, path in self._paths(None if self.trainer is None else self.trainer.state.fn).items():
            images = self._source(name).images
            if not (path.exists() and self._holds(path, images, self._views(name))):
                self._write(path, images, self._views(name))

    def setup(self, stage: str | None = None) -> None:
        """Replace images by features, and set the model to take features."""
        self.data.setup(stage)
        for name, path in self._paths(stage).items():
            source = self._plain[name] = self._source(name)
            if not path.exists():
                raise MimicError(
                    f"`features`: {path} does not exist; call `prepare_data()` on every machine to compute it."
                )
            self.data.sources[name] = dataclasses.replace(source, images=FeatureRows(path))
        self.model.takes_features = True

    def teardown(self, stage: str | None = None) -> None:
        """Restore the images."""
        self.data.sources |= self._plain
        self._plain = {}
        self.model.takes_features = False

    def train_dataloader(self) -> Any:
        return self.data.train_dataloader()

    def val_dataloader(self) -> Any:
        return self.data.val_dataloader()

    def test_dataloader(self) -> Any:
        return self.data.test_dataloader()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        views = batch[0]
        view = torch.zeros(len(views), dtype=torch.int64)
        if self.data.flip and self.trainer is not None and self.trainer.training:
            view = self.data.flipped(batch.ids, self.trainer.current_epoch).to(torch.int64)
        batch[0] = views[torch.arange(len(views)), view]
        return batch

    @property
    def num_classes(self) -> Any:
        """Number of classes of the wrapped data module; ``None`` if unknown."""
        return getattr(self.data, "num_classes", None)

    @property
    def class_names(self) -> Any:
        """Names of the classes of the wrapped data module; ``None`` if unknown."""
        return getattr(self.data, "class_names", None)

    @property
    def _device(self) -> torch.device:
        return self.model.device if self.trainer is None else self.trainer.strategy.root_device

    def _source(self, name: str) -> Any:
        """Return a source with its images instead of features."""
        return self._plain.get(name, self.data.sources[name])

    def _views(self, name: str) -> int:
        return 2 if self.data.flip and name == "train" else 1

    def _paths(self, stage: str | None) -> dict[str, Path]:
        """Return the files of the sources that a stage reads, by name of the source."""
        names = tuple(self.data.sources) if stage is None else _READ.get(stage, tuple(self.data.sources))
        if "test" in names and "test" not in self.data.sources:
            names = (*names, "train")  # whose held-out trusted images are the test set
        if self.trainer is not None and self.trainer.limit_val_batches == 0:
            names = tuple(name for name in names if name != "val")
        weights = fingerprint(self.model.backbone.state_dict())
        settings = [FORMAT, str(self.model.backbone), weights, self.model.head.in_features]
        paths = {}
        for name in names:
            if name in self.data.sources:
                key = repr([*settings, self._source(name).key(), self._views(name)])
                paths[name] = self.directory / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
        return paths

    def _features(self, images: Tensor, views: int) -> Tensor:
        """Return features of a batch on the CPU, float32, shape ``(B, views, D)``."""
        images = images.to(self._device)
        with torch.no_grad():
            features = [self.model.backbone(each) for each in (images, images.flip(-1))[:views]]
        return torch.stack(features, 1).float().cpu()

    def _holds(self, path: Path, images: Any, views: int) -> bool:
        """Return whether a file is whole and has the features of these images."""
        with fetched(path) as content:
            return self._content_holds(content, images, views)

    def _content_holds(self, path: Path, images: Any, views: int) -> bool:
        try:
            held = _opened(path)
        except Exception as error:  # a damaged header raises many types of errors
            self._warn_of_damage(path, str(error))
            return False
        ends = [0, len(images) - 1]
        expected = self._features(torch.stack([images[row] for row in ends]), views)
        if held.shape == (len(images), *expected.shape[1:]) and held.dtype.str == "<f4":
            difference = (torch.from_numpy(held[ends]) - expected).norm()
            # Rounding depends on device and batch size; another backbone or image differs by more.
            if difference <= 1e-2 * expected.norm():
                if _is_whole(path):
                    return True
                self._warn_of_damage(path, "its checksum does not match its content")
                return False
        pl.utilities.rank_zero_warn(
            f"{path} does not hold the backbone's features of these images; they are recomputed."
        )
        return False

    def _warn_of_damage(self, path: Path, why: str) -> None:
        pl.utilities.rank_zero_warn(f"{path} is damaged ({why}); its features are recomputed.")

    def _write(self, path: Path, images: Any, views: int) -> None:
        shape = (len(images), views, self.model.head.in_features)
        # A file for an object store is written to the local disk first.
        disk = tempfile.gettempdir() if as_store_path(self.directory) else self.directory
        size, free = 4 * math.prod(shape), shutil.disk_usage(disk).free
        no_room = (
            f"`features`: {disk} has no space for the {size / 2**30:.2f} GiB of features; choose another directory, or "
            "train without `features`."
        )
        if free < size:
            raise MimicError(no_room)
        try:
            with atomic_write(path) as file:
                digest = _digest(path)
                for content in self._contents(images, shape):
                    digest.update(content)
                    file.write(content)
                file.write(digest.digest())
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise MimicError(f"`features`: {path} cannot be written: {error.strerror or error}.") from error
            raise MimicError(no_room) from error

    def _contents(self, images: Any, shape: tuple[int, int, int]) -> Iterator[bytes]:
        """Yield the content of a file in parts; writing to a memory map would kill the process if the disk is full."""
        from numpy.lib import format as npy  # torch does not require NumPy

        header = io.BytesIO()
        npy.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
        yield header.getvalue()
        loader = DataLoader(
            images,
            batch_size=self.data.eval_batch_size,
            num_workers=self.data.num_workers,
            generator=torch_generator(0, "loader workers"),  # leaves the global generator unchanged
        )
        quiet = self.trainer is None or self.trainer.progress_bar_callback is None
        with pl.callbacks.progress.tqdm_progress.Tqdm(
            desc="Features", total=shape[0], unit="images", disable=quiet
        ) as progress:
            for batch in loader:
                yield self._features(batch, shape[1]).numpy().astype("<f4", copy=False).tobytes()
                progress.update(len(batch))


def _digest(path: Path) -> "hashlib._Hash":
    """Return a hash that starts with the file's name, so that a renamed file is noticed."""
    return hashlib.sha256(path.name.encode())


def _is_whole(path: Path) -> bool:
    """Return whether a file ends with the checksum of its content."""
    digest = _digest(path)
    rest = path.stat().st_size - digest.digest_size
    with path.open("rb") as file:
        while rest > 0 and (content := file.read(min(rest, 2**20))):
            digest.update(content)
            rest -= len(content)
        return file.read() == digest.digest()


def _opened(path: Path) -> Any:
    import numpy as np

    return np.load(path, mmap_mode="r", allow_pickle=False)


def _augments(data: Any) -> bool:
    """Return whether training images may be augmented other than by flipping.

    This is the attribute ``augment`` of the data module. Without it, a data module that overrides hooks for its batches
    is assumed to augment images.
    """
    flips = [kind for kind in type(data).__mro__ if "flipped" in vars(kind)][-1]
    hooks = any(getattr(type(data), name) is not getattr(flips, name) for name in _HOOKS)
    return bool(getattr(data, "augment", hooks))
