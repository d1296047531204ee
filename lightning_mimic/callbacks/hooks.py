"""What is attached to a user's module while it trains, and taken off without a trace."""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_mimic.gradients.gate import hook_gradient


def wrap_method(owner: nn.Module, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Puts ``around(call, *args, **kwargs)`` in the place of a method of one object.

    Args:
        owner: The object; a copy of it gets the plain method's behaviour.
        name: The method's name.
        around: Called with the original method, bound, and its arguments.

    Returns:
        A function that undoes it.
    """
    before: Callable[..., Any] | None = vars(owner).get(name)
    function: Callable[..., Any] = before if before is not None else getattr(type(owner), name)
    alive = True

    @functools.wraps(function)  # Lightning inspects the signature
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = before if before is not None else functools.partial(function, self)
        return around(call, *args, **kwargs) if alive and self is owner else call(*args, **kwargs)

    # A bound method, not a closure: deepcopy binds it to the copy.
    wrapper = types.MethodType(method, owner)
    setattr(owner, name, wrapper)

    def undo() -> None:
        nonlocal alive
        alive = False
        if vars(owner).get(name) is not wrapper:
            return  # somebody wrapped it after us and still calls through
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    return undo


class LossTap:
    """Catches the per-sample losses that a module's ``sample_losses(batch)`` returns.

    Args:
        module: A module with that method.
    """

    def __init__(self, module: nn.Module) -> None:
        self.armed = False
        self._undo = wrap_method(module, "sample_losses", self._around)
        self.reset()

    def reset(self) -> None:
        """Forgets the last step."""
        self.armed = False
        #: The losses as they were returned, shape ``(B,)``, without their graph.
        self.values: Tensor | None = None
        self._live: Tensor | None = None
        self._edge: GradientEdge | None = None

    def remove(self) -> None:
        """Gives the module its own method back."""
        self.reset()
        self._undo()

    def compare(self, expected: Callable[[], Tensor | None], tell: Callable[[Tensor], None]) -> None:
        """Has the backward pass tell whether training_step did something else than average the losses.

        Args:
            expected: What each loss gets under a plain mean, a scalar, asked for in every reverse pass; ``None``
                before the backward pass.
            tell: Called with a boolean scalar on the device, true if it is not that.
        """

        def look(gradients: Tensor) -> None:
            gradient = expected()
            if gradient is not None:
                alike = torch.isclose(gradients, gradient.to(gradients.dtype), rtol=1e-2, atol=0.0)
                tell(~alike.all())

        hook_gradient(self.edge, look)

    @property
    def live(self) -> Tensor:
        """The losses with their graph.

        Raises:
            ValueError: They were changed in place.
        """
        assert self._live is not None
        if self._live.grad_fn is not self.edge.node:
            raise ValueError(
                "the losses that `sample_losses` returned were changed in place. Use the out-of-place operation, "
                "within `sample_losses`."
            )
        return self._live

    @property
    def edge(self) -> GradientEdge:
        """Where the losses' gradient arrives."""
        assert self._edge is not None
        return self._edge

    def _around(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        losses = call(*args, **kwargs)
        if self.armed and losses.requires_grad:
            if self._live is not None:
                raise ValueError("`sample_losses` is called more than once in a training step; call it once.")
            if losses.ndim != 1:
                raise ValueError(f"`sample_losses` returned shape {tuple(losses.shape)}; expected (B,).")
            self.values = losses.detach().clone()
            self._live, self._edge = losses, get_gradient_edge(losses)
        return losses
