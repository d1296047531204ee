"""Data module of image-text pairs in webdataset shards, in the layout of img2dataset and DataComp."""

import contextlib
import dataclasses
import math
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_mimic.data.images import MAX_PIXELS
from lightning_mimic.data.labelled import LabelledImages
from lightning_mimic.data.pair_loader import PairLoader
from lightning_mimic.data.pair_stream import (
    PairStream,
    ShardReaderConfig,
    StreamPosition,
    find_pairs,
    no_pairs,
    shards_for_worker,
)
from lightning_mimic.data.rejects import Rejects, summary
from lightning_mimic.data.shards import list_shards, scanned_ids, stated_counts
from lightning_mimic.distributed import rank, world_size
from lightning_mimic.errors import MimicError, join_names
from lightning_mimic.files import TemporaryFolder
from lightning_mimic.manifest import KeptIds
from lightning_mimic.stores import hide_secrets, path_of
from lightning_mimic.trainer_package import pl


class ImageTextDataModule(pl.LightningDataModule):
    """Load image-text pairs from tar files with ``KEY.jpg``, ``KEY.txt`` and ``KEY.json``.

    The image may also be ``.jpeg``, ``.png`` or ``.webp``. Without ``KEY.txt``, the caption is ``caption`` in the json.
    The id of a pair is ``uid`` in the json, otherwise its key. Incomplete pairs, pairs that cannot be decoded, and
    truncated shards are skipped, counted and listed.

    Training batches are ``(images, texts)`` with ``ids``, a list of str. One process sees every pair once per epoch;
    the last batch of each worker may be smaller. Contrastive losses over several ranks need batches of equal size, so
    all ranks get the same number of full batches: a worker that runs out of pairs starts again, and the ledger
    recognises repeated pairs by their ids. A worker also starts again if broken pairs leave it more than one batch
    short of the stated length.

    The length is known with ``with_replacement``; from the headers of local tars if these have at most 2 GiB in total;
    otherwise from ``sizes.json`` or ``NAME_stats.json`` beside the shards. These files do not tell which pairs ``keep``
    keeps, so that larger shards have no length with ``keep``.

    Args:
        shards: Paths, brace ranges (``{00000000..00000127}.tar``), ``pipe:`` commands or URLs, one or a list.
        transform: Function from a PIL image of mode RGB to a float tensor, such as ``open_clip.image_transform``.
        tokenizer: Function from a list of str to an int64 tensor of shape ``(n, L)``, such as
            ``open_clip.get_tokenizer``.
        eval_transform: Transform for validation pairs and labelled images; ``None``: ``transform``.
        val_shards: Shards with validation pairs, which are read in order and divided among ranks and workers like the
            training shards.
        zero_shot: Data module of labelled images (PIL images, or tensors of shape ``(C, H, W)`` from 0 to 1). Its
            validation images (if any) and test images become batches ``(images, labels)`` with labels of shape
            ``(n,)``. Their loaders follow those of the pairs in the lists of validation and test loaders; texts have
            two dimensions and labels one.
        keep: Manifest; train only on the pairs that it keeps, as often as it lists them.
        with_replacement: Whether to draw shards with replacement, without end, as in DataComp's training.
        samples_per_epoch: Number of pairs per epoch over all ranks, rounded up to whole batches of every worker; only
            with ``with_replacement``.
        batch_size: Number of pairs per batch and process.
        num_workers: Number of loader processes.
        shuffle: Number of undecoded pairs in a worker's shuffle buffer; 0: keep the order of the shards.
        seed: Seed of the order.
        max_pixels: Maximum number of pixels of an image, by its header.
        verify: Whether to skip pairs whose image differs from the ``sha256`` that img2dataset and DataComp write to the
            json, at the cost of hashing every image. That hash is of the downloaded file; resized images and pairs
            without a hash are accepted, and counted in the warning at the end.
        rejects: Directory for the list of skipped pairs; they are counted even without it.

    Raises:
        MimicError: Arguments contradict each other, or shards do not exist.

    Example:
        >>> ImageTextDataModule("{0..3}.tar", transform=None, tokenizer=None, samples_per_epoch=100)
        Traceback (most recent call last):
        ...
        lightning_mimic.errors.MimicError: `samples_per_epoch` is 100, but without `with_replacement` an epoch is...
    """

    def __init__(  # noqa: PLR0913
        self,
        shards: str | Sequence[str],
        transform: Callable[[Any], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
        eval_transform: Callable[[Any], Tensor] | None = None,
        val_shards: str | Sequence[str] | None = None,
        zero_shot: pl.LightningDataModule | None = None,
        keep: str | Path | None = None,
        with_replacement: bool = False,
        samples_per_epoch: int | None = None,
        batch_size: int = 256,
        num_workers: int = 0,
        shuffle: int = 5000,
        seed: int = 0,
        max_pixels: int = MAX_PIXELS,
        verify: bool = False,
        rejects: str | Path | None = None,
    ) -> None:
        super().__init__()
        if with_replacement and samples_per_epoch is None:
            raise MimicError("`with_replacement` needs the length of an epoch; give `samples_per_epoch`.")
        if samples_per_epoch is not None and not with_replacement:
            raise MimicError(
                f"`samples_per_epoch` is {samples_per_epoch}, but without `with_replacement` an epoch is one pass over "
                "all pairs. Set `with_replacement=true`, or leave `samples_per_epoch` out (`limit_train_batches` of "
                "the trainer shortens epochs)."
            )
        least = {"samples_per_epoch": 1, "batch_size": 1, "num_workers": 0, "shuffle": 0, "max_pixels": 1}
        given = (samples_per_epoch, batch_size, num_workers, shuffle, max_pixels)
        for (name, lowest), value in zip(least.items(), given, strict=True):
            if value is not None and value < lowest:
                raise MimicError(f"`{name}` is {value}; expected at least {lowest}.")
        self.shards = shards
        self.transform = transform
        self.tokenizer = tokenizer
        self.eval_transform = transform if eval_transform is None else eval_transform
        self.val_shards = val_shards
        self.zero_shot = zero_shot
        self.keep = keep
        self.with_replacement = with_replacement
        self.samples_per_epoch = samples_per_epoch
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.shuffle = shuffle
        self.seed = seed
        self.max_pixels = max_pixels
        self.verify = verify
        self.rejects = rejects
        if val_shards is None and zero_shot is None:
            # Lightning skips validation if these methods are the base class's; an empty list would cause a warning.
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]
            self.test_dataloader = super().test_dataloader  # type: ignore[method-assign]
        self._kept: KeptIds | None = None
        self._loaders: list[PairLoader] = []
        self._train: PairLoader | None = None
        self._resumed: dict[str, Any] | None = None
        self._directory: Path | None = None
        # Replaces `rejects` if that is None; on the first rank only.
        self._temporary: TemporaryFolder | None = None

    def prepare_data(self) -> None:
        if self.zero_shot is not None:
            self.zero_shot.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Check that all shards exist, and read the manifest; the same on every rank."""
        self._check_tokenizer()
        self._train_urls = list_shards(self.shards)
        self._val_urls = [] if self.val_shards is None else list_shards(self.val_shards, "val_shards")
        if self.keep is not None and self._kept is None:
            self._kept = KeptIds(self.keep)
        if self.zero_shot is not None:
            self.zero_shot.setup(stage)  # type: ignore[arg-type]
        self._open_rejects()

    def train_dataloader(self) -> PairLoader:
        self._train = self._loader(self._train_urls, "shards", self.transform)
        if self._resumed is not None:
            self._train.load_state_dict(self._resumed)
            self._resumed = None
        return self._train

    def samples_by_id(self, ids: Sequence[int | str]) -> Iterator[tuple[int | str, Any]]:
        """Yield pairs of the training shards before any transform; call :meth:`setup` first.

        Args:
            ids: Ids of the pairs; pairs that are missing from the shards or broken are skipped.

        Yields:
            Id, and a pair of image (PIL, mode RGB) and caption. Each shard is read at most once, up to the last pair
            found.
        """
        wanted = set(map(str, ids))
        for shard in self._train_urls:
            for name, pair in find_pairs(shard, wanted, self.max_pixels) if wanted else ():
                wanted.discard(name)
                yield name, pair

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training pairs.

        It is saved here because Lightning does not restore the state of a loader whose length was requested early.
        """
        return {} if self._train is None else {"train": self._train.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict.get("train")

    def val_dataloader(self) -> list[Any]:
        return [*self._pairs_to_evaluate(), *self._labelled("val_dataloader")]

    def test_dataloader(self) -> list[Any]:
        return [*self._pairs_to_evaluate(), *self._labelled("test_dataloader")]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer is not None and self.trainer.training and self._train is not None:
            self._train.advance()
        return batch

    def teardown(self, stage: str | None = None) -> None:
        """Warn of skipped pairs and shards, after all ranks have written their lists."""
        for loader in self._loaders:
            loader.close()
        if self.trainer is not None:
            self.trainer.strategy.barrier("rejects")
        self._report()

    def on_exception(self, exception: BaseException) -> None:
        """Warn as in :meth:`teardown`, without waiting for other ranks, which may have ended."""
        for loader in self._loaders:
            # The exception may be the loader's own.
            with contextlib.suppress(Exception):
                loader.close()
        self._report()

    def _check_tokenizer(self) -> None:
        texts = self.tokenizer(["a photo"])
        if not isinstance(texts, Tensor) or texts.dim() != 2 or len(texts) != 1 or texts.dtype != torch.int64:
            shown = f"{texts.dtype} {tuple(texts.shape)}" if isinstance(texts, Tensor) else type(texts).__name__
            raise MimicError(f"`tokenizer` returned {shown} for one caption; expected torch.int64 (1, L).")

    def _pairs_to_evaluate(self) -> list[PairLoader]:
        return [self._loader(self._val_urls, "val_shards", self.eval_transform)] if self._val_urls else []

    def _loader(self, urls: list[str], argument: str, transform: Callable[[Any], Tensor]) -> PairLoader:
        train = argument == "shards"
        rank, world = self._rank_and_world()
        num_workers = self.num_workers if train else min(self.num_workers, len(urls) // world)
        workers = max(1, num_workers)
        with_replacement = train and self.with_replacement
        if not with_replacement and len(urls) < world * workers:
            raise MimicError(
                f"`{argument}`: {len(urls)} shards for {world} ranks with {workers} workers each; every worker needs "
                f"its own shard. Set `num_workers` to at most {len(urls) // world}, or make more and smaller shards."
                if len(urls) >= world
                else f"`{argument}`: {len(urls)} shards for {world} ranks; every rank needs its own shard. Train with "
                "fewer devices, or make more and smaller shards."
            )
        kept = self._kept if train else None
        stated = stated_counts(urls)
        config = ShardReaderConfig(
            urls, stated, transform, self.tokenizer, self.batch_size, workers, self.shuffle if train else 0, self.seed,
            self.max_pixels, kept, with_replacement, self.verify, str(self._directory), self._run, self._listed,
        )  # fmt: skip
        if with_replacement:
            assert self.samples_per_epoch is not None
            batches = math.ceil(self.samples_per_epoch / (self.batch_size * world * workers))
            batches_per_worker: list[int] | None = [batches] * workers
        else:
            counts = _counts(urls, stated, kept)
            if not sum(counts.get(url, 1) for url in urls):
                raise self._no_pairs(config, rank)
            batches_per_worker = self._batches_per_worker(urls, argument, counts, rank, world, workers)
        loader = PairLoader(
            config, rank, world, batches_per_worker, with_replacement or world > 1, num_workers,
            self.trainer if train else None, self._temporary,
        )  # fmt: skip
        self._loaders.append(loader)
        return loader

    def _no_pairs(self, config: ShardReaderConfig, rank: int) -> MimicError:
        """Return the error for shards without a pair according to their file names, after listing the reasons."""
        every = dataclasses.replace(config, kept=None)
        if PairStream(every, rank, 1, None, False, 0, StreamPosition([[0, 0]])).list_rejects():
            return MimicError(
                hide_secrets(f"`keep`: {self.keep} keeps none of the pairs in {join_names(config.shards, 3)}.")
            )
        return no_pairs(config)

    @property
    def _listed(self) -> str:
        """Where the list of skipped pairs is, as a phrase for messages."""
        return f"listed in {self.rejects}" if self.rejects is not None else "set `rejects=` to a directory for the list"

    def _batches_per_worker(
        self, urls: list[str], argument: str, counts: dict[str, int], rank: int, world: int, workers: int
    ) -> list[int] | None:
        """Return the number of batches of each worker of this rank; ``None`` if unknown."""
        unknown = [url for url in urls if url not in counts]
        if unknown and world > 1:
            what = "pairs that `keep` keeps" if self._kept and argument == "shards" else "pairs"
            raise MimicError(
                hide_secrets(
                    f"`{argument}`: {world} ranks need the same number of batches, but the number of {what} is unknown "
                    f"for {len(unknown)} of {len(urls)} shards, such as {unknown[0]}. Write sizes.json beside them "
                    '({"00000000.tar": 10000, ...}; `keep` needs local tars of at most 2 GiB), or set '
                    "`with_replacement` and `samples_per_epoch`."
                )
            )
        if unknown:
            return None
        every = [
            [sum(counts[url] for url in shards_for_worker(urls, r, world, w, workers)) for w in range(workers)]
            for r in range(world)
        ]
        if world > 1:
            return [math.ceil(max(map(max, every)) / self.batch_size)] * workers
        return [math.ceil(count / self.batch_size) for count in every[rank]]

    def _rank_and_world(self) -> tuple[int, int]:
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        return rank(), world_size()

    def _labelled(self, name: str) -> list[DataLoader]:
        if self.zero_shot is None:
            return []
        loader: Any = getattr(self.zero_shot, name)()
        if loader == []:  # it has no such images
            return []
        dataset = getattr(loader, "dataset", None)
        if dataset is None or isinstance(dataset, IterableDataset):
            raise MimicError(
                f"`zero_shot`: {type(self.zero_shot).__name__}.{name}() is not a loader of a map-style dataset."
            )
        images = LabelledImages(dataset, self.eval_transform)
        return [DataLoader(images, batch_size=self.batch_size, num_workers=self.num_workers)]

    def _open_rejects(self) -> None:
        """Create the directory for rejects, and agree on it and on the name of the run on all ranks."""
        if self._directory is not None:
            return
        run, directory = uuid.uuid4().hex[:12], self.rejects
        if directory is None and (self.trainer is None or self.trainer.is_global_zero):
            try:
                self._temporary = TemporaryFolder("lightning-mimic-rejects-")
            except OSError as error:
                raise MimicError(
                    f"a temporary folder cannot be created: {error}. Set `rejects=` to a directory."
                ) from error
            directory = self._temporary.path
        if self.trainer is not None:
            run, directory = self.trainer.strategy.broadcast((run, directory))
        assert directory is not None
        self._run, self._directory = run, path_of(directory, "rejects")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MimicError(f"`rejects`: {directory} cannot be created: {error}.") from error

    def _report(self) -> None:
        self._loaders, self._train = [], None
        directory, self._directory = self._directory, None
        if directory is None or (self.trainer is not None and not self.trainer.is_global_zero):
            return
        found = summary(Rejects(directory, self._run))
        if self._temporary is not None:
            self._temporary.close()
            self._temporary = None
        if found:
            warnings.warn(f"{found}; {self._listed}.", stacklevel=2)


def _counts(urls: list[str], stated: dict[str, int], kept: KeptIds | None) -> dict[str, int]:
    """Return the number of training pairs of each shard for which it is known."""
    ids = scanned_ids(urls)
    if kept is None:
        return stated | {url: len(each) for url, each in ids.items()}
    return {url: sum(kept.times(name) or 0 for name in each) for url, each in ids.items()}
