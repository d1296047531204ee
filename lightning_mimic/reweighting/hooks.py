"""Wrappers around a module's methods, hooks on the autograd graph, and their removal."""

import functools
import types
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_mimic.errors import MimicError
from lightning_mimic.gradients import hook_gradient


def wrap_method(owner: object, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Replace a method of one object by ``around(call, *args, **kwargs)``.

    Args:
        owner: Object whose method is replaced; copies of the object behave as with the original method.
        name: Name of the method.
        around: Function that is called with the original bound method and its arguments.

    Returns:
        A function that restores the original method.
    """
    before: Callable[..., Any] | None = vars(owner).get(name)
    function: Callable[..., Any] = before if before is not None else getattr(type(owner), name)
    alive = True

    @functools.wraps(function)  # Lightning inspects the signature
    def method(self: object, *args: Any, **kwargs: Any) -> Any:
        call = before if before is not None else functools.partial(function, self)
        return around(call, *args, **kwargs) if alive and self is owner else call(*args, **kwargs)

    # A bound method, not a closure: deepcopy binds it to the copy.
    wrapper = types.MethodType(method, owner)
    setattr(owner, name, wrapper)

    def undo() -> None:
        nonlocal alive
        alive = False
        if vars(owner).get(name) is not wrapper:
            return  # other code has wrapped this wrapper and still calls it
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    return undo


@dataclass(frozen=True)
class SampleLosses:
    """The per-sample losses of one forward pass.

    Attributes:
        values: Losses as ``sample_losses`` returned them, detached, shape ``(B,)``.
        edge: Graph edge at which their gradient arrives.
    """

    values: Tensor
    edge: GradientEdge
    _live: Tensor

    @property
    def live(self) -> Tensor:
        """Losses attached to their graph.

        Raises:
            MimicError: The losses were modified in place.
        """
        if self._live.grad_fn is not self.edge.node:
            raise MimicError(
                "the losses that `sample_losses` returned were changed in place. Use an out-of-place operation, and do "
                "it within `sample_losses`."
            )
        return self._live


class LossCapture:
    """Capture the losses that a module's ``sample_losses(batch)`` returns.

    Args:
        module: Module that has this method.
    """

    def __init__(self, module: nn.Module) -> None:
        self._into: list[SampleLosses] | None = None
        self._undo = wrap_method(module, "sample_losses", self._around)

    def start(self) -> list[SampleLosses]:
        """Start capturing.

        Returns:
            A list that receives the losses: empty until the method returns losses with a graph, then one item.
        """
        self._into = []
        return self._into

    def stop(self) -> None:
        """Ignore calls from now on."""
        self._into = None

    def remove(self) -> None:
        """Restore the module's original method."""
        self.stop()
        self._undo()

    def _around(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        losses = call(*args, **kwargs)
        if self._into is not None and losses.requires_grad:
            if self._into:
                raise MimicError("`sample_losses` is called more than once in a training step; call it once.")
            if losses.ndim != 1:
                raise MimicError(f"`sample_losses` returned shape {tuple(losses.shape)}; expected (B,).")
            self._into.append(SampleLosses(losses.detach().clone(), get_gradient_edge(losses), losses))
        return losses


class GradientHooks:
    """Gradient hooks of one micro-batch on its autograd graph and on parameters.

    They must be removed when the micro-batch ends: a hook whose closure refers to its own graph would never be freed.
    """

    def __init__(self) -> None:
        self._handles = ExitStack()

    def on_edge(self, edge: GradientEdge, change: Callable[[Tensor], Tensor | None]) -> None:
        """Call ``change`` with the gradient that arrives at an edge, as :func:`hook_gradient` does."""
        self._handles.callback(hook_gradient(edge, change).remove)

    def on_parameter(self, parameter: nn.Parameter, change: Callable[[Tensor], Tensor | None]) -> None:
        """Call ``change`` with a parameter's gradient before it is accumulated."""
        handle: torch.utils.hooks.RemovableHandle = parameter.register_hook(change)
        self._handles.callback(handle.remove)

    def remove(self) -> None:
        """Remove all hooks."""
        self._handles.close()
