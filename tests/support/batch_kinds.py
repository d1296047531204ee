"""Batches of many kinds that hold the same samples; at module level, so that workers find their classes."""

import dataclasses
from collections import OrderedDict, UserDict, UserList, defaultdict, namedtuple
from collections.abc import Iterator, MutableMapping
from functools import cached_property
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from lightning_mimic.batches import parts_of

FEATURES = 3


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


Untyped = namedtuple("Untyped", "x y")


@dataclasses.dataclass
class Fields:
    x: Tensor
    y: Tensor
    names: list[str] | None = None

    @cached_property
    def doubled(self) -> Tensor:
        return 2 * self.x


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    y: Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    x: Tensor
    y: Tensor


@dataclasses.dataclass
class Derived:
    """Fields that the constructor does not take, or takes without keeping them."""

    x: Tensor
    y: Tensor
    scale: dataclasses.InitVar[float]
    total: Tensor = dataclasses.field(init=False)

    def __post_init__(self, scale: float) -> None:
        self.total = self.x.sum(1) * scale


class Validated:
    """A field that is checked whenever it is set, as those of anomalib's batches are."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            raise AttributeError(self.name)  # no default
        return vars(instance)[self.name]

    def __set__(self, instance: Any, value: Any) -> None:
        if not isinstance(value, Tensor) or value.shape[0] < 1:
            raise TypeError(f"{self.name} must be a batched tensor, not {value!r}")
        vars(instance)[self.name] = value


@dataclasses.dataclass
class ValidatedFields:
    x: Tensor = Validated()  # type: ignore[assignment]
    y: Tensor = Validated()  # type: ignore[assignment]


@dataclasses.dataclass
class Validating(ValidatedFields):
    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError("x and y must have as many rows")


class Encoding(UserDict):
    """As `transformers.BatchEncoding`: keys are attributes, `to` changes it, pickling keeps two attributes."""

    def __init__(self, data: Any = None, encodings: Any = None) -> None:
        super().__init__(data)
        self._encodings = encodings

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data, "encodings": self._encodings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.data, self._encodings = state["data"], state["encodings"]

    def to(self, device: Any, *, non_blocking: bool = False) -> "Encoding":
        self.data = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.data.items()}
        return self


class OwnMapping(MutableMapping):
    """A mapping that holds its items in an attribute and does not know how to copy itself."""

    def __init__(self, items: Any) -> None:
        self.held = dict(items)

    def __getitem__(self, key: Any) -> Any:
        return self.held[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.held[key] = value

    def __delitem__(self, key: Any) -> None:
        del self.held[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


class Graphs:
    """As a batch of PyTorch Geometric: the nodes of all graphs, attributes in a store, `to` changes it."""

    def __init__(self, **store: Any) -> None:
        self.__dict__["store"] = store

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["store"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self.store[name] = value

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.store.items())

    def keys(self) -> list[str]:
        return list(self.store)

    @property
    def num_graphs(self) -> int:
        return len(self.ptr) - 1

    def _apply(self, change: Any) -> "Graphs":
        self.store.update({k: change(v) if isinstance(v, Tensor) else v for k, v in self.store.items()})
        return self

    def to(self, device: Any, *args: Any, non_blocking: bool = False) -> "Graphs":
        return self._apply(lambda tensor: tensor.to(device))

    def pin_memory(self) -> "Graphs":
        return self._apply(lambda tensor: tensor.pin_memory())


def graphs_of(samples: list[tuple[Tensor, int]]) -> Graphs:
    """Graphs of two nodes each, whose mean is the sample's x."""
    x, y = default_collate(samples)
    nodes = torch.stack([x + 1, x - 1], 1).flatten(0, 1)
    count = torch.arange(len(x))
    return Graphs(x=nodes, y=y, batch=count.repeat_interleave(2), ptr=2 * torch.arange(len(x) + 1))


def tuple_of(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    x, y = default_collate(samples)
    return x, y


#: From samples ``(x, y)`` to a batch, by the batch's kind.
COLLATE = {
    "tensor": lambda samples: tuple_of(samples)[0],
    "tuple": tuple_of,
    "list": default_collate,
    "dict": lambda samples: dict(zip("xy", tuple_of(samples), strict=True)),
    "named tuple": lambda samples: Pair(*tuple_of(samples)),
    "untyped named tuple": lambda samples: Untyped(*tuple_of(samples)),
    "OrderedDict": lambda samples: OrderedDict(zip("xy", tuple_of(samples), strict=True)),
    "defaultdict": lambda samples: defaultdict(list, zip("xy", tuple_of(samples), strict=True)),
    "UserDict": lambda samples: UserDict(zip("xy", tuple_of(samples), strict=True)),
    "UserList": lambda samples: UserList(tuple_of(samples)),
    "encoding": lambda samples: Encoding(dict(zip("xy", tuple_of(samples), strict=True)), "encodings"),
    "mapping": lambda samples: OwnMapping(zip("xy", tuple_of(samples), strict=True)),
    "nested": lambda samples: {"inputs": [Fields(*tuple_of(samples))], "y": tuple_of(samples)[1]},
    "dataclass": lambda samples: Fields(*tuple_of(samples), names=["a"]),
    "derived": lambda samples: Derived(*tuple_of(samples), scale=1.0),
    "validating": lambda samples: Validating(*tuple_of(samples)),
    "frozen": lambda samples: Frozen(*tuple_of(samples)),
    "slots": lambda samples: Slots(*tuple_of(samples)),
    "graphs": graphs_of,
}


def inputs_of(batch: Any) -> Tensor:
    """Return x of a batch of any of these kinds."""
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Graphs):
        return batch.x.unflatten(0, (-1, 2)).mean(1)
    if isinstance(batch, dict) and "inputs" in batch:
        return batch["inputs"][0].x
    return dict(parts_of(batch))[0 if isinstance(batch, tuple | list | UserList) else "x"]


class FromAny(pl.LightningModule):
    """A linear layer whose loss takes a batch of any of these kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, 2)

    def sample_losses(self, batch: Any) -> Tensor:
        return self.head(inputs_of(batch).to(self.head.weight.dtype)).square().sum(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.sample_losses(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)
