"""Image-text pairs in webdataset shards, as img2dataset and DataComp write them."""

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
    """Pairs of an image and its caption, from tar files of ``KEY.jpg``, ``KEY.txt`` and ``KEY.json``.

    The image may also be ``.jpeg``, ``.png`` or ``.webp``; the caption may be ``caption`` in the json, whose ``uid``
    is the pair's id (else its key). A pair that is not whole, or cannot be decoded, is skipped, counted and listed;
    so is a shard that ends early.

    Training batches are ``(images, texts)`` with ``.ids``, a list of str. One process sees every pair once in an
    epoch, the last batch of each worker may be smaller. Several ranks, whose contrastive losses need batches of one
    size, get the same number of full batches: a worker that runs out starts over, and the ledger tells repeats by
    their id. So does a worker that broken pairs leave more than a batch short of the stated length.

    The length is known if samples are drawn with replacement, from the headers of local tars of at most 2 GiB
    together, else from ``sizes.json`` or ``NAME_stats.json`` beside the shards; these two say nothing of what ``keep``
    keeps, so that with it bigger shards have no length.

    Args:
        shards: Paths, brace ranges (``{00000000..00000127}.tar``), ``pipe:`` commands or URLs, one or a list.
        transform: PIL image of mode RGB to float tensor, such as ``open_clip.image_transform``.
        tokenizer: List of str to int64 tensor of shape ``(n, L)``, such as ``open_clip.get_tokenizer``.
        eval_transform: For pairs that validate, and labelled images; ``transform``, if left out.
        val_shards: Pairs that validate, in their order, divided among ranks and workers as those that train.
        zero_shot: A data module of labelled images (PIL, or tensors of shape ``(C, H, W)`` from 0 to 1), whose
            validation images (if it has any) and test images become batches of ``(images, labels)``, labels of shape
            ``(n,)``. They follow the pairs in the lists of validation and test loaders; texts have two dimensions,
            labels one.
        keep: A manifest; only what it keeps trains, as often as it keeps it.
        with_replacement: Draw shards with replacement, for ever, as DataComp trains.
        samples_per_epoch: Over all ranks, rounded up to whole batches of every worker; if drawn with replacement.
        batch_size: Pairs per batch and process.
        num_workers: Loader processes.
        shuffle: Pairs that a worker holds, undecoded, to draw the next one from; 0: the order of the shards.
        seed: Of the order.
        max_pixels: Most pixels of an image, by its header.
        verify: Skip pairs whose image differs from the ``sha256`` that img2dataset and DataComp write in the json, at
            the cost of a hash of every image. It is that of the file that was downloaded; images that were
            resized since, and pairs without one, are taken, and counted in the warning at the end.
        rejects: Directory for the list of skipped pairs; they are counted without one, too.

    Raises:
        MimicError: Arguments that contradict one another, or no such shards.

    Example:
        >>> ImageTextDataModule("{0..3}.tar", transform=None, tokenizer=None, samples_per_epoch=100)
        Traceback (most recent call last):
        ...
        lightning_mimic.errors.MimicError: `samples_per_epoch` is 100, and one pass over all pairs is an epoch...
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
            raise MimicError("`with_replacement` has no end of its own; give `samples_per_epoch`.")
        if samples_per_epoch is not None and not with_replacement:
            raise MimicError(
                f"`samples_per_epoch` is {samples_per_epoch}, and one pass over all pairs is an epoch without "
                "`with_replacement`; set that to true, or leave the number out (the Trainer's `limit_train_batches` "
                "ends epochs early)."
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
            # Lightning goes without validation where these methods are its own; of an empty list it would warn.
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]
            self.test_dataloader = super().test_dataloader  # type: ignore[method-assign]
        self._kept: KeptIds | None = None
        self._loaders: list[PairLoader] = []
        self._train: PairLoader | None = None
        self._resumed: dict[str, Any] | None = None
        self._directory: Path | None = None
        # Where `rejects` is left out; on the first rank.
        self._temporary: TemporaryFolder | None = None

    def prepare_data(self) -> None:
        if self.zero_shot is not None:
            self.zero_shot.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Looks whether all shards are there, and reads the manifest; the same on every rank."""
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
        """Yield pairs of the training shards as a person looks at them, known after :meth:`setup`.

        Args:
            ids: Of the pairs; those that the shards do not have, or whose files are broken, are left out.

        Yields:
            An id, and image (PIL, mode RGB) and caption; every shard is read at most once, up to the last pair.
        """
        wanted = set(map(str, ids))
        for shard in self._train_urls:
            for name, pair in find_pairs(shard, wanted, self.max_pixels) if wanted else ():
                wanted.discard(name)
                yield name, pair

    def state_dict(self) -> dict[str, Any]:
        """Where the training pairs are; a loader that is asked for its length early would not be told by Lightning."""
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
        """Says what was skipped, once all ranks have written it."""
        for loader in self._loaders:
            loader.close()
        if self.trainer is not None:
            self.trainer.strategy.barrier("rejects")
        self._report()

    def on_exception(self, exception: BaseException) -> None:
        """As at the end, without waiting for ranks that may be gone."""
        for loader in self._loaders:
            # What ended the training may be the loader's own error.
            with contextlib.suppress(Exception):
                loader.close()
        self._report()

    def _check_tokenizer(self) -> None:
        texts = self.tokenizer(["a photo"])
        if not isinstance(texts, Tensor) or texts.dim() != 2 or len(texts) != 1 or texts.dtype != torch.int64:
            shown = f"{texts.dtype} {tuple(texts.shape)}" if isinstance(texts, Tensor) else type(texts).__name__
            raise MimicError(f"`tokenizer` made {shown} of one caption; expected torch.int64 (1, L).")

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
                f"one of its own. Set `num_workers` to at most {len(urls) // world}, or make more and smaller shards."
                if len(urls) >= world
                else f"`{argument}`: {len(urls)} shards for {world} ranks; every rank needs one of its own. Train with "
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
        """Return the error of shards that hold no pair by the names of their files, once it is listed why."""
        every = dataclasses.replace(config, kept=None)
        if PairStream(every, rank, 1, None, False, 0, StreamPosition([[0, 0]])).list_rejects():
            return MimicError(
                hide_secrets(f"`keep`: {self.keep} keeps none of the pairs in {join_names(config.shards, 3)}.")
            )
        return no_pairs(config)

    @property
    def _listed(self) -> str:
        """Where the user finds what was skipped, as a phrase."""
        return f"listed in {self.rejects}" if self.rejects is not None else "give `rejects=` a directory for the list"

    def _batches_per_worker(
        self, urls: list[str], argument: str, counts: dict[str, int], rank: int, world: int, workers: int
    ) -> list[int] | None:
        """Batches of each of the rank's workers, if that is known."""
        unknown = [url for url in urls if url not in counts]
        if unknown and world > 1:
            why = "which pairs `keep` keeps of each shard" if self._kept and argument == "shards" else "their number"
            raise MimicError(
                hide_secrets(
                    f"`{argument}`: {world} ranks need the same number of batches, and {why} is not known for "
                    f"{len(unknown)} of {len(urls)} shards, such as {unknown[0]}. Write sizes.json beside them "
                    '({"00000000.tar": 10000, ...}; `keep` needs local tars of at most 2 GiB), or draw '
                    "`with_replacement` with `samples_per_epoch`."
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
        if loader == []:  # it holds none back
            return []
        dataset = getattr(loader, "dataset", None)
        if dataset is None or isinstance(dataset, IterableDataset):
            raise MimicError(
                f"`zero_shot`: {type(self.zero_shot).__name__}.{name}() is no loader of a map-style dataset."
            )
        images = LabelledImages(dataset, self.eval_transform)
        return [DataLoader(images, batch_size=self.batch_size, num_workers=self.num_workers)]

    def _open_rejects(self) -> None:
        """One directory and one name of the run for all ranks."""
        if self._directory is not None:
            return
        run, directory = uuid.uuid4().hex[:12], self.rejects
        if directory is None and (self.trainer is None or self.trainer.is_global_zero):
            try:
                self._temporary = TemporaryFolder("lightning-mimic-rejects-")
            except OSError as error:
                raise MimicError(f"no temporary folder can be made: {error}. Give `rejects=` a directory.") from error
            directory = self._temporary.path
        if self.trainer is not None:
            run, directory = self.trainer.strategy.broadcast((run, directory))
        assert directory is not None
        self._run, self._directory = run, path_of(directory, "rejects")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MimicError(f"`rejects`: {directory} cannot be a directory: {error}.") from error

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
    """Pairs that train of each shard, where that is known."""
    ids = scanned_ids(urls)
    if kept is None:
        return stated | {url: len(each) for url, each in ids.items()}
    return {url: sum(kept.times(name) or 0 for name in each) for url, each in ids.items()}
