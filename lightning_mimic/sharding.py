"""Models whose parameters FSDP2 (``fully_shard``) divides among the ranks.

Between steps such a model holds its parameters as DTensors, of which every rank has a part; in the forward and the
backward pass other, whole parameters take their places, the same objects in every step. Functions that exchange
something must be called on every rank.
"""

import sys
from typing import Any, TypeGuard

from torch import Tensor, nn

from lightning_mimic.distributed import world_size
from lightning_mimic.errors import MimicError


def sharded_modules(module: nn.Module) -> list[Any]:
    """Return the modules on which ``fully_shard`` was called, from the root on."""
    # Not imported here: until somebody has done that, nothing is sharded.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [each for each in module.modules() if isinstance(each, fsdp.FSDPModule)]


def is_sharded(tensor: Tensor) -> TypeGuard[Any]:
    """Return whether a tensor is a DTensor, of which this process may hold a part only."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor as it is, or gathered from all ranks if it is sharded.

    Example:
        >>> import torch
        >>> full_tensor(torch.ones(2))
        tensor([1., 1.])
    """
    if not is_sharded(tensor):
        return tensor
    whole: Tensor = tensor.full_tensor()
    return whole


def unshard(module: nn.Module) -> None:
    """Gather all parameters of a sharded model from the ranks, until the next backward pass frees them."""
    for each in sharded_modules(module):
        each.unshard()


def whole_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by which the autograd graph knows those that are sharded, by name.

    They hold data only within a forward and a backward pass.

    Raises:
        MimicError: The model is sharded in a way under which weights or scores would be wrong; on all ranks alike.

    Example:
        >>> whole_parameters(nn.Linear(2, 1))
        {}
    """
    modules = sharded_modules(module)
    for each in modules:
        each.reshard()
    held = dict(module.named_parameters(remove_duplicate=False))
    _check(module, held, sharded=bool(modules))
    found: dict[str, nn.Parameter] = {}
    for each in modules:
        each.unshard()
        # Only those of this module are whole now, so that the whole model never is.
        found |= {n: p for n, p in module.named_parameters(remove_duplicate=False) if p is not held[n]}
        each.reshard()
    for name, parameter in found.items():
        if parameter.device != held[name].device:
            raise MimicError(
                f"the parameters of the model are kept on {held[name].device} and used on {parameter.device} "
                "(CPUOffloadPolicy), where no direction towards the reference can be taken. Leave `offload_policy` out."
            )
    return found


def _check(module: nn.Module, parameters: dict[str, nn.Parameter], *, sharded: bool) -> None:
    kinds = {type(each).__name__ for each in module.modules()}
    if "FullyShardedDataParallel" in kinds:
        raise MimicError(
            "the model is a FullyShardedDataParallel, which flattens its parameters, so that they cannot be scored. "
            "Shard it with `torch.distributed.fsdp.fully_shard`, or train it as a DistributedDataParallel."
        )
    for name, parameter in parameters.items():
        if not is_sharded(parameter):
            continue
        mesh, world = parameter.device_mesh, world_size()
        if not sharded or mesh.ndim != 1 or mesh.size() != world:
            by = "fully_shard" if sharded else "tensor parallelism"
            raise MimicError(
                f"{name!r} is sharded by {by} over a mesh of shape {tuple(mesh.shape)}; a batch's weights are made of "
                f"the samples of all {world} ranks, each of which must hold samples of its own. Use "
                "`fully_shard` with a mesh of one dimension over all ranks, without tensor parallelism."
            )
