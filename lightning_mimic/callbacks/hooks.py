"""What is attached to a user's module while it trains, and taken off without a trace."""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node


class LayerTap:
    """Catches one layer's input and sits on the gradient of its output.

    Args:
        name: The layer's path, for messages.
        layer: The layer.
        on_gradient: Called with the output's gradient inside the backward pass; what it returns takes the
            gradient's place (``None``: as it was).
    """

    def __init__(self, name: str, layer: nn.Module, on_gradient: Callable[[Tensor], Tensor | None]) -> None:
        self.name = name
        self.armed = False
        self._on_gradient = on_gradient

        # A plain function: deepcopy of the module (SWA, EMA) takes it along as it is, and the copy's calls
        # are told apart by their module.
        def forward_hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            if self.armed and module is layer:
                self._catch(args[0] if args else kwargs["input"], output)

        # First of all hooks: another one may put something else in the output's place.
        self._handle = layer.register_forward_hook(forward_hook, prepend=True, with_kwargs=True)
        self.reset()

    def reset(self) -> None:
        """Forgets the last step; holds no tensor of the graph afterwards."""
        self.armed = False
        self.node: Node | None = None
        self.output_shape: tuple[int, ...] = ()
        self._inputs: Tensor | None = None
        self._version = 0
        self._calls_without_gradient = 0

    def remove(self) -> None:
        """Takes the hook off the layer."""
        self.reset()
        self._handle.remove()

    @property
    def inputs(self) -> Tensor:
        """The layer's input in this step.

        Raises:
            RuntimeError: It was changed in place after the layer had used it.
        """
        assert self._inputs is not None
        if self._inputs._version != self._version:
            raise RuntimeError(
                f"the input of {self.name!r} was changed in place after the layer had used it, so the scores cannot be "
                "taken from it. Use the out-of-place operation."
            )
        return self._inputs

    def check_used(self) -> None:
        """Raises ``ValueError`` unless the layer was called, once, and gives a gradient."""
        if self.node is not None:
            return
        if self._calls_without_gradient:
            raise ValueError(
                f"`parameters`: no gradient passes through the output of {self.name!r}: neither it nor anything before "
                "it is trained, or it runs under reentrant activation checkpointing (use_reentrant=False works)."
            )
        raise ValueError(
            f"`parameters`: {self.name!r} was not called in training_step. Layers inside nn.MultiheadAttention and "
            "layers that were compiled before training started are not seen; name another layer."
        )

    def _catch(self, inputs: Tensor, output: Tensor) -> None:
        if not output.requires_grad:
            self._calls_without_gradient += 1
            return
        if self.node is not None:
            raise ValueError(
                f"`parameters`: {self.name!r} is called more than once in a training step; one input and output "
                "gradient do not hold its whole gradient. Name a layer that is called once."
            )
        self._inputs = inputs.detach()
        self._version = inputs._version
        # Taken here: an in-place operation on the output would replace it.
        self.node = output.grad_fn
        self.output_shape = tuple(output.shape)
        output.register_hook(self._on_gradient)


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
        self.losses: Tensor | None = None
        self._expected: Tensor | None = None
        self._undo = wrap_method(module, "sample_losses", self._around)

    def reset(self) -> None:
        """Forgets the last step."""
        self.armed = False
        self.losses = self._expected = None

    def remove(self) -> None:
        """Gives the module its own method back."""
        self.reset()
        self._undo()

    def expect_plain_mean(self, gradient: Tensor) -> None:
        """Makes the coming backward pass raise ``ValueError`` unless training_step averaged the losses.

        Args:
            gradient: What each loss gets under a plain mean, a scalar. Costs a host sync.

        Raises:
            ValueError: training_step did not call ``sample_losses``.
        """
        if self.losses is None:
            raise ValueError(
                "the module has a method `sample_losses`, but training_step did not call it; training_step must "
                "return the mean of `self.sample_losses(batch)`."
            )
        self._expected = gradient

    def _around(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        losses = call(*args, **kwargs)
        if self.armed and losses.requires_grad:
            if self.losses is not None:
                raise ValueError("`sample_losses` is called more than once in a training step; call it once.")
            if losses.ndim != 1:
                raise ValueError(f"`sample_losses` returned shape {tuple(losses.shape)}; expected (B,).")
            self.losses = losses.detach().clone()
            losses.register_hook(self._compare)
        return losses

    def _compare(self, gradients: Tensor) -> None:
        if self._expected is not None and not torch.allclose(
            gradients, self._expected.to(gradients.dtype), rtol=1e-2, atol=0.0
        ):
            raise ValueError(
                "training_step does not return the plain mean of `self.sample_losses(batch)`; weights, ignored targets "
                "and regularisers belong inside `sample_losses`, or in a term of their own."
            )
