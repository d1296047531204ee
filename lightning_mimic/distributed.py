"""Every question about ranks and every exchange between them, by torch.distributed.

All functions work without a process group, as on one rank. Those that exchange something must be called on every rank.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_mimic.errors import MimicError

Result = TypeVar("Result")

#: Seconds for which an exchange waits for the other ranks on gloo. On other backends the process group's own limit
#: holds, since to wait for one exchange would be to wait for the device.
TIME_LIMIT = 600.0
#: Seconds for which the other ranks are waited for once an exchange has failed, to find those that do not answer.
ROLL_CALL = 5.0


def is_distributed() -> bool:
    """Whether this process belongs to a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def world_size() -> int:
    """The number of ranks."""
    return torch.distributed.get_world_size() if is_distributed() else 1


def rank() -> int:
    """The number of this rank, from 0."""
    return torch.distributed.get_rank() if is_distributed() else 0


def end_process_group() -> None:
    """Leave the process group, if there is one, so that another can be made."""
    if is_distributed():
        torch.distributed.destroy_process_group()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add the tensors of all ranks, in place.

    Args:
        tensor: Of the same shape and dtype on every rank.

    Returns:
        The tensor itself.
    """
    if is_distributed():
        with _answered():
            _wait(torch.distributed.all_reduce(tensor, async_op=_is_gloo()))
    return tensor


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank (a host sync).

    Args:
        flag: Of this rank.
        device: On which the ranks exchange it.
    """
    if not is_distributed():
        return flag
    return bool(sum_over_ranks(torch.tensor(int(flag), device=device)))


def gather_equal(tensor: Tensor) -> list[Tensor]:
    """Gather tensors of one shape from all ranks.

    Args:
        tensor: Of the same shape and dtype on every rank; not checked.

    Returns:
        One tensor per rank, in the ranks' order, without gradients.
    """
    own = tensor.detach().contiguous()
    if not is_distributed():
        return [own]
    tensors = [torch.empty_like(own) for _ in range(world_size())]
    with _answered():
        _wait(torch.distributed.all_gather(tensors, own, async_op=_is_gloo()))
    return tensors


def stack_over_ranks(row: Tensor) -> Tensor:
    """Stack one row per rank.

    Args:
        row: Shape ``(n,)`` on every rank.

    Returns:
        Shape ``(ranks, n)``, in the ranks' order, without gradients if there are several ranks.
    """
    return torch.stack(gather_equal(row)) if is_distributed() else row[None]


def gather_rows(rows: Tensor) -> list[Tensor]:
    """Gather the rows of all ranks, which may hold different numbers of them.

    Args:
        rows: Shape ``(n, ...)``.

    Returns:
        One tensor per rank, in the ranks' order, without gradients.
    """
    own = rows.detach().contiguous()
    if not is_distributed():
        return [own]
    counts = torch.cat(gather_equal(torch.tensor([len(own)], device=own.device))).tolist()
    padded = own.new_zeros((max(counts), *own.shape[1:]))
    padded[: len(own)] = own
    return [rows[:count] for rows, count in zip(gather_equal(padded), counts, strict=True)]


def broadcast(value: Result) -> Result:
    """Return the first rank's value on every rank; it is pickled between the processes of one run."""
    if not is_distributed():
        return value
    values: list[Any] = [value]
    with _answered():
        _meet()
        torch.distributed.broadcast_object_list(values)
    first: Result = values[0]
    return first


def gather_objects(value: Result) -> list[Result]:
    """Return the values of all ranks, in the ranks' order; they are pickled between the processes of one run."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    with _answered():
        _meet()
        torch.distributed.all_gather_object(values, value)
    return values


def _is_gloo() -> bool:
    return bool(torch.distributed.get_backend() == torch.distributed.Backend.GLOO)


def _wait(work: Any) -> None:
    """Wait for an exchange that was started on gloo; on other backends there is nothing to wait for."""
    if work is not None:
        work.wait(timedelta(seconds=TIME_LIMIT))


def _meet() -> None:
    """Wait until all ranks have come here, no longer than :data:`TIME_LIMIT`."""
    if _is_gloo():
        torch.distributed.monitored_barrier(timeout=timedelta(seconds=TIME_LIMIT))


@contextmanager
def _answered() -> Iterator[None]:
    """Raise ``MimicError`` where another rank does not answer, because it was killed or hangs."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        raise MimicError(
            f"rank {rank()} of {world_size()} got no answer from {_silent_ranks()}, which was killed, failed or hangs. "
            f"What the ledger has of all ranks so far is kept. torch.distributed: {first}"
        ) from error


def _silent_ranks() -> str:
    """Name the ranks that do not answer, once an exchange has failed, which it does on all ranks."""
    silent: list[int] | None = None

    def call() -> None:
        nonlocal silent
        end = time.monotonic() + ROLL_CALL
        with suppress(RuntimeError):  # the process that keeps the store is gone
            store = torch.distributed.distributed_c10d._get_default_store()
            store.set(f"lightning_mimic/{rank()}", "answers")
            silent = [other for other in range(world_size()) if not _answers(store, other, end)]

    # In a thread, because the store does not answer either, where the process that keeps it hangs.
    caller = threading.Thread(target=call, daemon=True)
    caller.start()
    caller.join(ROLL_CALL + 10)
    return f"rank {', '.join(map(str, silent))}" if silent else "another rank"


def _answers(store: Any, other: int, end: float) -> bool:
    try:
        store.wait([f"lightning_mimic/{other}"], timedelta(seconds=max(0.1, end - time.monotonic())))
    except RuntimeError:
        return False
    return True


def on_all_ranks(act: Callable[[], Result], problem: str) -> Result:
    """Act, and raise on all ranks if that fails on one, so that no rank waits for another.

    Args:
        act: Called once on every rank.
        problem: What another rank did if it failed, such as ``"could not start"``, for the message.

    Raises:
        Exception: What ``act`` raised on this rank.
        MimicError: It failed on another rank only.
    """
    error: Exception | None = None
    try:
        result = act()
    except Exception as caught:  # whatever it is, the other ranks must know before it is raised
        error = caught
    messages = gather_objects(None if error is None else str(error))
    if error is not None:
        raise error
    failed = [f"rank {number}: {message}" for number, message in enumerate(messages) if message is not None]
    if failed:
        raise MimicError(f"another rank {problem}: {failed[0]}")
    return result
