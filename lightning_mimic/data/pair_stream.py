"""Reading of shards into batches of image-text pairs, within one worker."""

import contextlib
import itertools
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from lightning_mimic.data.ids import SampleWithId, collate_with_ids
from lightning_mimic.data.images import TRANSPARENT
from lightning_mimic.data.pairs import (
    BrokenPairError,
    Origin,
    Pair,
    decode_image,
    described,
    id_of,
    is_verified,
    pair_of,
)
from lightning_mimic.data.rejects import Reason, Rejects, RejectWriter, examples, summary
from lightning_mimic.data.shards import name_in_shards, read_shard
from lightning_mimic.errors import MimicError
from lightning_mimic.manifest import KeptIds
from lightning_mimic.random_streams import stream_seed
from lightning_mimic.stores import hide_secrets

#: Maximum number of bytes of undecoded images in a worker's shuffle buffer, whatever the number of pairs.
BUFFER_BYTES = 2**30


@dataclass(frozen=True)
class ShardReaderConfig:
    """Hold the settings for reading shards into batches, which are the same on all ranks.

    Args:
        shards: All shards; each worker reads every (ranks · workers)-th of them.
        counts: Expected number of pairs of each shard for which it is known.
        transform: Function from a PIL image to a tensor.
        tokenizer: Function from a list of str to an int64 tensor of shape ``(n, L)``.
        batch_size: Number of pairs per batch.
        workers: Number of workers of a rank, at least 1 (which may be the main process).
        shuffle: Number of pairs in a worker's shuffle buffer, limited to :data:`BUFFER_BYTES`; 0: keep the order of
            pairs and shards.
        seed: Seed of the order.
        max_pixels: Maximum number of pixels of an image.
        kept: Ids to train on, and how often; ``None``: all.
        with_replacement: Whether each worker draws from all shards with replacement.
        verify: Whether to reject images that differ from the ``sha256`` in their json.
        rejects: Directory for the lists of rejects.
        run: Name of the run, the prefix of the lists' file names.
        listed: Phrase for messages that tells where the rejects are listed.
    """

    shards: Sequence[str]
    counts: dict[str, int]
    transform: Callable[[Any], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    batch_size: int
    workers: int
    shuffle: int
    seed: int
    max_pixels: int
    kept: KeptIds | None
    with_replacement: bool
    verify: bool
    rejects: str
    run: str
    listed: str


@dataclass(frozen=True)
class StreamPosition:
    """Hold the position within an epoch from which a stream resumes.

    Args:
        workers: For each worker, the number of batches yielded, and of pairs read for them.
        next_worker: Worker that yields the next batch.
    """

    workers: list[list[int]]
    next_worker: int = 0


@dataclass(eq=False)
class PairStream(IterableDataset):
    """Iterate over the batches of one worker, writing rejected pairs as they occur.

    Args:
        config: Settings for reading shards into batches.
        rank: Rank of this process.
        world: Number of ranks.
        batches_per_worker: Number of batches of each worker of the rank. If broken pairs leave a worker one batch
            short, its last two batches are smaller; if more are missing, it starts again (with all shards if all of its
            own pairs are broken), so that the number is reached. ``None``: one pass, with any number of batches.
        exact: Whether all batches are full, and their number is exactly ``batches_per_worker``.
        epoch: Number of the epoch, which determines the order.
        position: Position from which to start.
    """

    config: ShardReaderConfig
    rank: int
    world: int
    batches_per_worker: list[int] | None
    exact: bool
    epoch: int
    position: StreamPosition

    def __iter__(self) -> Iterator[tuple[int, int, int, list[Origin], Any]]:
        """Yield worker, number of its batches so far, number of pairs read for them, the pairs' origins, and batch."""
        info = get_worker_info()
        slot = ((0 if info is None else info.id) + self.position.next_worker) % self.config.workers
        name = f"{self.config.run}-e{self.epoch}-r{self.rank}-w{slot}"
        with RejectWriter(self.config.rejects, name) as reject:
            for given, read, origins, samples in self._batches(slot, reject):
                yield slot, given, read, origins, self._collated(samples)

    def list_rejects(self) -> int:
        """Read all shards without decoding images, write the rejects, and return the number of other pairs."""
        with RejectWriter(self.config.rejects, f"{self.config.run}-r{self.rank}") as reject:
            return sum(1 for shard in self.config.shards for _ in self._pairs(shard, reject))

    def _batches(  # noqa: C901 -- one loop whose ends depend on each other
        self, slot: int, reject: RejectWriter
    ) -> Iterator[tuple[int, int, list[Origin], list[SampleWithId]]]:
        given, skipped = self.position.workers[slot]
        expected = None if self.batches_per_worker is None else self.batches_per_worker[slot]
        if self.exact and given == expected:
            return
        shards, size = self._shards(slot), self.config.batch_size
        # Number of pairs read so far, and origin and sample of the last of them.
        batch: list[tuple[int, Origin, SampleWithId]] = []
        read = 0
        for number in itertools.count():
            found = False
            for pair in self._pairs_of_pass(shards, slot, number, reject):
                read += 1
                sample = None if read <= skipped else self._sample(pair, reject)
                found |= read <= skipped or sample is not None
                if sample is None:
                    continue
                # A full batch is held until the next pair, so that all rejects are written before the last batch.
                if len(batch) == size:
                    given += 1
                    yield given, *_joined(batch)
                    batch = []
                batch.append((read, pair.origin, sample))
                if (self.exact or number) and given + 1 == expected and len(batch) == size:
                    break
            fills = len(batch) == size if self.exact or number else bool(batch)
            if expected is None or given + fills >= expected:
                break
            if given + 2 == expected and not self.exact and not number and len(batch) > 1:
                reject.flush()  # one batch short: split the last one in two
                half = (len(batch) + 1) // 2
                given += 1
                yield given, *_joined(batch[:half])
                batch = batch[half:]
                break
            if not found:
                if len(shards) == len(self.config.shards):
                    reject.flush()
                    raise no_pairs(self.config)
                shards = self.config.shards  # all of the worker's own pairs are broken, but batches are expected
        reject.flush()
        if batch:
            yield given + 1, *_joined(batch)

    def _pairs_of_pass(self, shards: Sequence[str], slot: int, number: int, reject: RejectWriter) -> Iterator[Pair]:
        """Yield the pairs of one pass in shuffled order."""
        order = random.Random(stream_seed(self.config.seed, "shard order", self.epoch, self.rank, slot, number))
        if self.config.with_replacement:
            shards = order.choices(shards, k=max(len(shards), 100))
        elif self.config.shuffle:
            shards = order.sample(shards, len(shards))
        buffer: list[Pair] = []
        held = 0
        for shard in shards:
            for pair in self._pairs(shard, reject):
                if not self.config.shuffle:
                    yield pair
                    continue
                held += len(pair.image)
                if len(buffer) < self.config.shuffle:
                    buffer.append(pair)
                else:
                    chosen = order.randrange(len(buffer))
                    buffer[chosen], pair = pair, buffer[chosen]
                    held -= len(pair.image)
                    yield pair
                while held > BUFFER_BYTES:
                    pair = buffer.pop(order.randrange(len(buffer)))
                    held -= len(pair.image)
                    yield pair
        order.shuffle(buffer)
        yield from buffer

    def _shards(self, slot: int) -> Sequence[str]:
        if self.config.with_replacement:
            return self.config.shards
        return shards_for_worker(self.config.shards, self.rank, self.world, slot, self.config.workers)

    def _pairs(self, shard: str, reject: RejectWriter) -> Iterator[Pair]:
        unverified = 0
        for key, files in read_shard(shard, reject, self.config.counts.get(shard)):
            name = None
            try:
                description = described(files)
                name = id_of(name_in_shards(shard, key), description)
                times = 1 if self.config.kept is None else self.config.kept.times(name)
                if times is None:
                    raise BrokenPairError(Reason.UNKNOWN_ID)
                if not times:
                    continue
                pair = pair_of(shard, key, name, files, description)
                if self.config.verify:
                    unverified += not is_verified(pair.image, description)
                yield from itertools.repeat(pair, times)
            except BrokenPairError as broken:
                reject(shard, broken.reason, broken.detail, key=key, id=name)
        if unverified:
            detail = "no sha256 in the json, or the image was resized after the download"
            reject(shard, Reason.NOT_VERIFIED, detail, found=unverified)

    def _sample(self, pair: Pair, reject: RejectWriter) -> SampleWithId | None:
        shard, key, _ = pair.origin
        try:
            image = decode_image(pair.image, self.config.max_pixels)
        except BrokenPairError as broken:
            reject(shard, broken.reason, broken.detail, key=key, id=pair.id)
            return None
        if TRANSPARENT in image.info:
            reject(shard, Reason.TRANSPARENT, key=key, id=pair.id)
        return SampleWithId((self.config.transform(image), pair.caption), pair.id)

    def _collated(self, samples: list[SampleWithId]) -> Any:
        return collate_with_ids(samples, collate_fn=self._images_and_texts)

    def _images_and_texts(self, samples: list[tuple[Tensor, str]]) -> tuple[Tensor, Tensor]:
        images, captions = zip(*samples, strict=True)
        # In a worker, default_collate writes the batch into shared memory; torch.stack would need another copy.
        return default_collate(list(images)), self.config.tokenizer(list(captions))


def no_pairs(config: ShardReaderConfig) -> MimicError:
    """Return the error for shards without a usable pair, whose rejects have been written."""
    rejects = Rejects(config.rejects, config.run)
    why = f"{summary(rejects) or 'empty'}{examples(rejects)}"
    return MimicError(
        f"none of the {len(config.shards)} shards has a usable pair, such as {hide_secrets(config.shards[0])}: {why}. "
        "Expected consecutive files KEY.jpg (or .jpeg, .png, .webp) and KEY.txt, or KEY.json with a `caption`; KEY "
        f"ends at the first dot of the name. Skipped pairs: {config.listed}."
    )


def _joined(batch: list[tuple[int, Origin, SampleWithId]]) -> tuple[int, list[Origin], list[SampleWithId]]:
    return batch[-1][0], [origin for _, origin, _ in batch], [sample for _, _, sample in batch]


def find_pairs(shard: str, ids: Collection[str], max_pixels: int) -> Iterator[tuple[str, tuple[Any, str]]]:
    """Yield id, image and caption of the pairs of a shard that have one of the ids; broken pairs are skipped.

    Args:
        shard: Path, command or URL of the shard.
        ids: Ids of the pairs.
        max_pixels: Maximum number of pixels of an image.
    """
    for key, files in read_shard(shard, lambda *_, **__: None):
        with contextlib.suppress(BrokenPairError):
            description = described(files)
            name = id_of(name_in_shards(shard, key), description)
            if name in ids:
                pair = pair_of(shard, key, name, files, description)
                yield name, (decode_image(pair.image, max_pixels), pair.caption)


def shards_for_worker(shards: Sequence[str], rank: int, world: int, worker: int, workers: int) -> Sequence[str]:
    """Return the shards of one worker; the workers' shards are disjoint and cover all shards.

    Example:
        >>> [shards_for_worker("abcde", rank, 2, worker, 2) for rank in (0, 1) for worker in (0, 1)]
        ['ae', 'b', 'c', 'd']
    """
    return shards[rank * workers + worker :: world * workers]
