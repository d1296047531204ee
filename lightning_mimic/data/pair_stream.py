"""From shards to batches of image-text pairs, within one worker."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from lightning_mimic.data.ids import SampleWithId, collate_with_ids
from lightning_mimic.data.pairs import BrokenPairError, Pair, described, id_of, pair_of, picture
from lightning_mimic.data.rejects import Reason, RejectWriter
from lightning_mimic.data.shards import read_shard
from lightning_mimic.manifest import KeptIds


@dataclass(frozen=True)
class Reading:
    """How shards become batches; the same on all ranks.

    Args:
        shards: All of them; worker ``w`` of rank ``r`` reads every (ranks · workers)-th.
        counts: Pairs that a shard should have, where that is known.
        transform: PIL image to tensor.
        tokenizer: List of str to int64 tensor of shape ``(n, L)``.
        batch_size: Pairs per batch.
        workers: Processes of one rank, at least 1 (which may be the main process).
        shuffle: Pairs in a worker's shuffle buffer; 0 keeps the order of the shards, too.
        seed: Of the order.
        max_pixels: Of an image.
        kept: Which ids train, and how often; all, if left out.
        with_replacement: Draw shards with replacement, all workers from all.
        rejects: Directory of the rejects' parts.
        run: Begins their names.
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
    rejects: str
    run: str


@dataclass(frozen=True)
class Place:
    """Where an epoch goes on.

    Args:
        workers: Of each stream, batches given and pairs drawn for them.
        turn: The stream whose batch comes next.
    """

    workers: list[list[int]]
    turn: int = 0


@dataclass(eq=False)
class PairStream(IterableDataset):
    """Every batch of a worker, in order; what it rejects is written as it goes.

    Args:
        reading: How.
        rank: Of this process.
        world: Number of ranks.
        promised: Batches of each of the rank's workers. Where broken pairs make a worker run out one batch before, its
            last two are smaller; else it starts over (if all of its own are broken, with all shards), so that the
            length holds. ``None`` for one pass, however many batches that is.
        exact: Full batches, and no more than promised.
        epoch: Decides on the order.
        place: Where to start.
    """

    reading: Reading
    rank: int
    world: int
    promised: list[int] | None
    exact: bool
    epoch: int
    place: Place

    def __iter__(self) -> Iterator[tuple[int, int, int, Any]]:
        """Stream, batches given by it and pairs drawn for them, and the batch."""
        info = get_worker_info()
        slot = ((0 if info is None else info.id) + self.place.turn) % self.reading.workers
        name = f"{self.reading.run}-e{self.epoch}-r{self.rank}-w{slot}"
        with RejectWriter(self.reading.rejects, name) as reject:
            for given, drawn, samples in self._batches(slot, reject):
                yield slot, given, drawn, self._collated(samples)

    def _batches(  # noqa: C901 -- one loop whose ends depend on each other
        self, slot: int, reject: RejectWriter
    ) -> Iterator[tuple[int, int, list[SampleWithId]]]:
        given, skipped = self.place.workers[slot]
        promised = None if self.promised is None else self.promised[slot]
        if self.exact and given == promised:
            return
        shards, size = self._shards(slot), self.reading.batch_size
        batch: list[tuple[int, SampleWithId]] = []  # how many pairs had been drawn, and the last of them
        drawn = 0
        for number in itertools.count():
            found = False
            for pair in self._drawn(shards, slot, number, reject):
                drawn += 1
                sample = None if drawn <= skipped else self._sample(pair, reject)
                found |= drawn <= skipped or sample is not None
                if sample is None:
                    continue
                # A full batch waits for the next pair: with the epoch's last one all rejects have been written.
                if len(batch) == size:
                    given += 1
                    yield given, *_joined(batch)
                    batch = []
                batch.append((drawn, sample))
                if (self.exact or number) and given + 1 == promised and len(batch) == size:
                    break
            fills = len(batch) == size if self.exact or number else bool(batch)
            if promised is None or given + fills >= promised:
                break
            if given + 2 == promised and not self.exact and not number and len(batch) > 1:
                reject.flush()  # short by one: the last two are smaller
                half = (len(batch) + 1) // 2
                given += 1
                yield given, *_joined(batch[:half])
                batch = batch[half:]
                break
            if not found:
                if len(shards) == len(self.reading.shards):
                    raise RuntimeError(
                        f"none of the {len(shards)} shards gave a pair, such as {shards[0]}; why is listed in "
                        f"{self.reading.rejects}"
                    )
                shards = self.reading.shards  # all of its own are broken; it has promised batches, though
        reject.flush()
        if batch:
            yield given + 1, *_joined(batch)

    def _drawn(self, shards: Sequence[str], slot: int, number: int, reject: RejectWriter) -> Iterator[Pair]:
        """The pairs of one pass, in its order."""
        order = random.Random(f"{self.reading.seed} {self.epoch} {self.rank} {slot} {number}")
        if self.reading.with_replacement:
            shards = order.choices(shards, k=max(len(shards), 100))
        elif self.reading.shuffle:
            shards = order.sample(shards, len(shards))
        buffer: list[Pair] = []
        for shard in shards:
            for pair in self._pairs(shard, reject):
                if not self.reading.shuffle:
                    yield pair
                elif len(buffer) < self.reading.shuffle:
                    buffer.append(pair)
                else:
                    chosen = order.randrange(len(buffer))
                    buffer[chosen], pair = pair, buffer[chosen]
                    yield pair
        order.shuffle(buffer)
        yield from buffer

    def _shards(self, slot: int) -> Sequence[str]:
        if self.reading.with_replacement:
            return self.reading.shards
        return dealt(self.reading.shards, self.rank, self.world, slot, self.reading.workers)

    def _pairs(self, shard: str, reject: RejectWriter) -> Iterator[Pair]:
        for key, files in read_shard(shard, reject, self.reading.counts.get(shard)):
            name = None
            try:
                description = described(files)
                name = id_of(key, description)
                times = 1 if self.reading.kept is None else self.reading.kept.times(name)
                if times is None:
                    raise BrokenPairError(Reason.UNKNOWN_ID)
                if times:
                    yield from itertools.repeat(pair_of(shard, key, name, files, description), times)
            except BrokenPairError as broken:
                reject(shard, broken.reason, broken.detail, key=key, id=name)

    def _sample(self, pair: Pair, reject: RejectWriter) -> SampleWithId | None:
        try:
            image = picture(pair.image, self.reading.max_pixels)
        except BrokenPairError as broken:
            reject(pair.shard, broken.reason, broken.detail, key=pair.key, id=pair.id)
            return None
        return SampleWithId((self.reading.transform(image), pair.caption), pair.id)

    def _collated(self, samples: list[SampleWithId]) -> Any:
        return collate_with_ids(samples, collate_fn=self._images_and_texts)

    def _images_and_texts(self, samples: list[tuple[Tensor, str]]) -> tuple[Tensor, Tensor]:
        images, captions = zip(*samples, strict=True)
        return torch.stack(images), self.reading.tokenizer(list(captions))


def _joined(batch: list[tuple[int, SampleWithId]]) -> tuple[int, list[SampleWithId]]:
    return batch[-1][0], [sample for _, sample in batch]


def dealt(shards: Sequence[str], rank: int, world: int, worker: int, workers: int) -> Sequence[str]:
    """One worker's share of the shards; the shares are disjoint, and together all.

    Example:
        >>> [dealt("abcde", rank, 2, worker, 2) for rank in (0, 1) for worker in (0, 1)]
        ['ae', 'b', 'c', 'd']
    """
    return shards[rank * workers + worker :: world * workers]
