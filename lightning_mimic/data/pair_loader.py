"""Resumable loader for one rank's batches of image-text pairs."""

import warnings
import weakref
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_mimic.data.pair_stream import PairStream, ShardReaderConfig, StreamPosition, no_pairs
from lightning_mimic.data.pairs import Origin
from lightning_mimic.data.shards import PairSources
from lightning_mimic.distributed import gather_objects
from lightning_mimic.files import TemporaryFolder
from lightning_mimic.random_streams import torch_generator


@dataclass(eq=False)
class PairLoader:
    """Iterate over the batches of a rank, in a different order each epoch, resumable within an epoch.

    It is not a DataLoader, because Lightning warns of DataLoaders with a length over an iterable-style data set.

    Args:
        config: Settings for reading shards into batches.
        rank: Rank of this process.
        world: Number of ranks.
        batches_per_worker: As for :class:`PairStream`; their sum is the length.
        exact: As for :class:`PairStream`.
        num_workers: Number of loader processes; 0: the main process.
        trainer: Trainer that knows the first epoch, and which batches have been trained on. Without one, each pass is a
            new epoch, and a batch counts as trained on when it is yielded.
        folder: Temporary folder with this loader's rejects, referenced here because the data module may be deleted
            before the loader.

    Example:
        Loaders are made by :meth:`ImageTextDataModule.train_dataloader
        <lightning_mimic.data.image_text.ImageTextDataModule.train_dataloader>`.
    """

    config: ShardReaderConfig
    rank: int
    world: int
    batches_per_worker: list[int] | None
    exact: bool
    num_workers: int
    trainer: Any = None
    folder: TemporaryFolder | None = None
    _epoch: int = field(default=-1, init=False)
    _position: StreamPosition = field(init=False)
    _start_position: StreamPosition = field(init=False)
    _begun: bool = field(default=True, init=False)
    _ended: bool = field(default=False, init=False)
    _loaded: dict[str, Any] | None = field(default=None, init=False)
    _given: dict[str, Any] | None = field(default=None, init=False)
    _pending: deque[tuple[int, int, int]] = field(default_factory=deque, init=False)
    _sources: PairSources = field(init=False)
    _running: weakref.ref[Generator[Any, None, None]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._position = self._start_position = self._start()
        self._sources = PairSources(self.config.shards)

    def __len__(self) -> int:
        if self.batches_per_worker is None:
            raise TypeError("the number of pairs in these shards is unknown; write sizes.json beside them")
        return sum(self.batches_per_worker)

    def __iter__(self) -> Iterator[Any]:
        self.close()
        self._epoch, self._position = self._next_epoch()
        self._loaded = None
        self._start_position, self._begun, self._ended = self._position, False, False
        self._pending.clear()
        stream = PairStream(
            self.config, self.rank, self.world, self.batches_per_worker, self.exact, self._epoch, self._position
        )
        source = DataLoader(
            stream,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_unchanged,
            pin_memory=torch.cuda.is_available(),
            # Seeds the workers, for random transforms, and leaves the global generator unchanged.
            generator=torch_generator(self.config.seed, "loader workers", self._epoch),
        )
        batches = self._batches(iter(source))
        # A weak reference, because a reference cycle would keep worker processes alive until garbage collection.
        self._running = weakref.ref(batches)
        return batches

    def _batches(self, source: Iterator[tuple[int, int, int, list[Origin], Any]]) -> Generator[Any, None, None]:
        empty = True
        for slot, given, read, origins, batch in source:
            empty = False
            # Checked here, because a worker sees its own shards only.
            for name, (shard, key, by_key) in zip(batch.ids, origins, strict=True):
                self._sources.add(name, shard, key, by_key=by_key)
            self._pending.append((slot, given, read))
            if self.trainer is None:
                self.advance()
            yield batch
        self._begun = self._ended = True
        if empty and not any(given for given, _ in self._position.workers):
            raise no_pairs(self.config)

    def advance(self) -> None:
        """Record that training on the next yielded batch begins; Lightning may fetch a batch in advance."""
        if self._pending:
            slot, given, read = self._pending.popleft()
            workers = list(self._position.workers)
            workers[slot] = [given, read]
            self._position = StreamPosition(workers, (slot + 1) % self.config.workers)
            self._begun = True

    def close(self) -> None:
        """End the epoch and its worker processes, which then write their rejects."""
        batches = None if self._running is None else self._running()
        if batches is not None:
            batches.close()
        self._running = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position of every rank; all ranks must call it, as they do for a checkpoint."""
        ended = self._ended and not self._pending if self.trainer is None else self.trainer.is_last_batch
        position = {"workers": self._position.workers, "next_worker": self._position.next_worker}
        ranks = gather_objects(position) if self.world > 1 else [position]
        return {"epoch": max(self._epoch, 0), "ended": bool(ended), "setting": self._setting(), "ranks": ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state at the next ``iter()``; if shards, ranks or workers have changed, the epoch restarts."""
        if state == self._given:  # Lightning calls this, too
            return
        self._given = state
        unlike = [name for name, value in self._setting().items() if state["setting"].get(name) != value]
        if unlike:
            changed = ", ".join(f"{name}: {state['setting'].get(name)}, now {self._setting()[name]}" for name in unlike)
            warnings.warn(
                f"the order of image-text pairs has changed since the checkpoint was written ({changed}). The epoch "
                "restarts, so that some pairs are seen twice and others are missed.",
                stacklevel=2,
            )
            state = {**state, "ranks": []}
        self._loaded = state

    def _next_epoch(self) -> tuple[int, StreamPosition]:
        """Return the epoch and the position of the next ``iter()``."""
        state = self._loaded
        if state is not None and not state["ended"] and state["ranks"]:
            own = state["ranks"][self.rank if len(state["ranks"]) > 1 else 0]
            return state["epoch"], StreamPosition([list(each) for each in own["workers"]], own["next_worker"])
        if state is not None:
            return state["epoch"] + bool(state["ended"]), self._start()
        if self._epoch < 0 and self.trainer is not None:
            # At the end of an epoch, Lightning saves the number of the next epoch, and later loads no state.
            return self.trainer.fit_loop.epoch_progress.current.processed, self._start()
        # Lightning may call iter() again before it has taken a batch.
        return (self._epoch + 1, self._start()) if self._begun else (self._epoch, self._start_position)

    def _start(self) -> StreamPosition:
        return StreamPosition([[0, 0] for _ in range(self.config.workers)])

    def _setting(self) -> dict[str, int]:
        """Return the settings that determine the order."""
        names = ("seed", "batch_size", "workers", "shuffle")
        return {"ranks": self.world, "shards": len(self.config.shards)} | {n: getattr(self.config, n) for n in names}


def _unchanged(batch: Any) -> Any:
    return batch
