"""Forward hooks on layers that record their calls and change nothing."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.utils.rnn import PackedSequence

from lightning_mimic.errors import MimicError
from lightning_mimic.gradients.layer_rule import map_tensors
from lightning_mimic.gradients.layers import LayerGradients
from lightning_mimic.gradients.nodes import node_of_all
from lightning_mimic.gradients.rule_check import check_registered_rule


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer, from which its per-sample gradients are computed.

    Attributes:
        name: The layer's path.
        layer: The layer.
        parts: The layer's own parameter names, such as ``"weight"``, to the full names of the observed parameters.
        node: Where the output's whole gradient arrives, in this shape or flattened: :func:`~.nodes.node_of_all`,
            taken before an in-place operation could replace it.
        shape: The output's shape.
        beside: Where the gradients of the layer's inputs arrive.
    """

    name: str
    layer: nn.Module
    parts: Mapping[str, str]
    node: Node
    shape: tuple[int, ...]
    beside: tuple[Node, ...] = field(repr=False)
    _args: tuple[Any, ...] = field(repr=False)
    _kwargs: Mapping[str, Any] = field(repr=False)
    _versions: tuple[tuple[Tensor, int], ...] = field(repr=False)
    _output: tuple[Tensor, int] | None = field(default=None, repr=False)

    #: The batch's axis in ``shape``.
    axis: ClassVar[int] = 0
    #: As which of the node's outputs the gradient arrives.
    output_nr: ClassVar[int] = 0

    @property
    def names(self) -> list[str]:
        """Of the observed parameters."""
        return list(self.parts.values())

    @property
    def inputs(self) -> Tensor:
        """The first tensor among the layer's inputs.

        Raises:
            RuntimeError: An input was changed in place after the layer had used it.
        """
        self._check_versions()
        return self._versions[0][0]

    @property
    def output(self) -> Tensor | None:
        """The layer's output, detached; ``None`` where it was not kept, or was changed in place since."""
        if self._output is None:
            return None
        output, version = self._output
        return output if output._version == version else None

    def without(self, names: Collection[str]) -> "LayerCall | None":
        """Return the call with fewer observed parameters; ``None`` if none is left."""
        parts = {part: name for part, name in self.parts.items() if name not in names}
        if len(parts) == len(self.parts):
            return self
        return replace(self, parts=parts) if parts else None

    def check_rule(self) -> None:
        """Compare a rule that a user registered for the layer with autograd, once for each kind of call.

        Raises:
            MimicError: The rule is wrong.
        """
        check_registered_rule(self.layer, self._args, self._kwargs)

    def gradients(self, output_gradients: Tensor) -> LayerGradients:
        """Return the per-sample gradients of this call, given the gradient of its output.

        Raises:
            RuntimeError: An input was changed in place after the layer had used it.
            MimicError: A rule that was registered for the layer is wrong.
        """
        self._check_versions()
        gradients = output_gradients.reshape(self.shape)
        return LayerGradients(self.layer, self._args, gradients, list(self.parts), kwargs=self._kwargs)

    def dot(self, output_gradients: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """Return this call's share in ``⟨gᵢ, v⟩``, shape ``(B,)``; ``vectors`` by full name."""
        return self.gradients(output_gradients).dot(self.local(vectors))

    def local(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the vectors of this layer by part, from those by full name."""
        return {part: vectors[name] for part, name in self.parts.items()}

    def _check_versions(self) -> None:
        if any(tensor._version != version for tensor, version in self._versions):
            raise RuntimeError(
                f"the input of {self.name!r} was changed in place after the layer had used it, so the scores cannot be "
                "taken from it. Use the out-of-place operation."
            )


@dataclass
class LayerCalls:
    """What one forward pass did with the observed layers.

    Attributes:
        calls: Calls whose output has a gradient, in their order.
        without_gradient: Parameters whose layer also ran without one, by full name.
        packed: Parameters whose layer was given a ``PackedSequence``, by full name.
    """

    calls: list[LayerCall] = field(default_factory=list)
    without_gradient: set[str] = field(default_factory=set)
    packed: set[str] = field(default_factory=set)


class CallWatch:
    """A hook on a module whose calls are not recorded, that looks under what conditions it runs.

    Args:
        module: Has parameters of its own, but no rule.
        names: Full names of these parameters.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        #: Where what was seen is recorded; nowhere between forward passes.
        self.into: LayerCalls | None = None

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def before_forward(called: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if self.into is None or called is not module:
                return
            if not torch.is_grad_enabled():
                self.into.without_gradient.update(names)
            if any(isinstance(each, PackedSequence) for each in (*args, *kwargs.values())):
                self.into.packed.update(names)

        self._handle = module.register_forward_pre_hook(before_forward, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook off the module."""
        self.into = None
        self._handle.remove()


class LayerHooks:
    """A forward hook on one layer that records its calls.

    Args:
        name: The layer's path, for messages.
        layer: A layer that :meth:`LayerGradients.check` accepts.
        parts: The layer's own parameter names, such as ``"weight"``, to the full names of the parameters.
    """

    def __init__(self, name: str, layer: nn.Module, parts: Mapping[str, str]) -> None:
        self.name, self.layer, self.parts = name, layer, dict(parts)
        #: Where calls are recorded; nowhere between forward passes.
        self.into: LayerCalls | None = None
        #: Keep the output of each call until the gradients have been computed.
        self.keeps_output = False

        # A plain function: deepcopy of the module (SWA, EMA) takes it along as it is, and the copy's calls
        # are told apart by their module. Outside of compiled graphs, in which it could not look.
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def forward_hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            if self.into is not None and module is layer:
                self._record(self.into, args, kwargs, output)

        # First of all hooks: another one may put something else in the output's place.
        self._handle = layer.register_forward_hook(forward_hook, prepend=True, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook off the layer."""
        self.into = None
        self._handle.remove()

    def _record(self, into: LayerCalls, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        if not isinstance(output, Tensor):
            raise MimicError(
                f"`parameters`: {self.name!r} returned a {type(output).__name__}; a layer with a rule must return one "
                "tensor."
            )
        if not output.requires_grad or output.grad_fn is None:
            into.without_gradient.update(self.parts.values())
            return
        node = node_of_all(output)
        if node is None:
            return  # the graph may know more
        versions: list[tuple[Tensor, int]] = []
        beside: list[Node] = []

        def detached(tensor: Tensor) -> Tensor:
            if tensor.grad_fn is not None:
                beside.append(tensor.grad_fn)
            twin = tensor.detach()  # counts changes in place together with the tensor
            if not twin.is_inference():
                versions.append((twin, twin._version))
            return twin

        inputs, named = map_tensors(detached, args), map_tensors(detached, dict(kwargs))
        into.calls.append(
            LayerCall(
                name=self.name,
                layer=self.layer,
                parts=self.parts,
                node=node,
                shape=tuple(output.shape),
                beside=tuple(beside),
                _args=inputs,
                _kwargs=named,
                _versions=tuple(versions),
                _output=(kept := output.detach(), kept._version) if self.keeps_output else None,
            )
        )
