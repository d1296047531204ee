"""Parts of a module that torch.compile has compiled."""

from collections.abc import Iterator

from torch import nn


def compiled_parameters(module: nn.Module) -> set[int]:
    """Return the ids of the parameters of all compiled parts, whether or not their code has run yet.

    A part is compiled as a module (``torch.compile(layer)``, ``layer.compile()``) or by one of its methods.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> net[1].compile()
        >>> compiled_parameters(net) == {id(p) for p in net[1].parameters()}
        True
    """
    return {id(p) for part in module.modules() if _is_compiled(part) for p in part.parameters()}


def _is_compiled(module: nn.Module) -> bool:
    if getattr(module, "_compiled_call_impl", None) is not None:
        return True
    return any(hasattr(each, "_torchdynamo_orig_callable") for each in _methods(module))


def _methods(module: nn.Module) -> Iterator[object]:
    """The functions of an object's own, of its class and of the classes above it, without calling a property."""
    for owner in (module, *type(module).__mro__):
        yield from (each for each in vars(owner).values() if callable(each) and not isinstance(each, nn.Module | type))
