"""Per-sample gradients of many parameters at once, from one reverse pass over their uses."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from lightning_mimic.errors import MimicError
from lightning_mimic.gradients.functional_use import FunctionalUse, functional_use
from lightning_mimic.gradients.graph import Graph, is_compiled, normalises_batch
from lightning_mimic.gradients.layer_hooks import LayerCall, LayerCalls, LayerHooks
from lightning_mimic.gradients.layers import LayerGradients
from lightning_mimic.gradients.nodes import gate_rows, hook_gradient, kind_of, leaf_below
from lightning_mimic.gradients.sample_gradients import DotOnly

#: A place where a parameter and the batch meet: a known layer's call, or an operation in the graph.
Use = LayerCall | FunctionalUse


class ModelHooks:
    """Sees every use of the named parameters in a forward pass.

    Layers of a known kind are seen by their calls; what is left (a class token, a projection, the inside of
    ``nn.MultiheadAttention``) is looked up in the autograd graph.

    Args:
        module: The module that is trained.
        parameters: Full name to parameter, each parameter once.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> hooks = ModelHooks(net, dict(net.named_parameters()))
        >>> with hooks.recording() as calls:
        ...     losses = net(torch.ones(4, 2)).squeeze(1)
        >>> uses, unseen = hooks.uses(calls, Graph(losses.grad_fn), samples=4)
        >>> WholeModelGradients(losses, uses, Graph(losses.grad_fn), 4).dot(dict(net.named_parameters())).shape
        torch.Size([4])
        >>> hooks.remove()
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self._batch_axis: dict[str, int] = {}
        self.layers: list[LayerHooks] = []
        names = {id(module.get_parameter(name)): name for name in parameters}
        for path, layer in module.named_modules():
            own = {part: names[id(p)] for part, p in layer.named_parameters(recurse=False) if id(p) in names}
            if isinstance(layer, nn.MultiheadAttention):
                # It computes with the time axis first, whatever it is given, and never calls its out_proj.
                inside = [*layer.parameters(recurse=False), *layer.out_proj.parameters()]
                self._batch_axis |= {names[id(p)]: 1 for p in inside if id(p) in names}
            if not own:
                continue
            try:
                LayerGradients.check(path, layer)
            except ValueError:
                continue  # the graph may know more
            self.layers.append(LayerHooks(path, layer, own))

    def start(self) -> LayerCalls:
        """Begin to record calls.

        Returns:
            An object that holds the calls from here on, until :meth:`stop`.
        """
        calls = LayerCalls()
        for hooks in self.layers:
            hooks.into = calls
        return calls

    def stop(self) -> None:
        """Ignore calls from now on."""
        for hooks in self.layers:
            hooks.into = None

    @contextmanager
    def recording(self) -> Iterator[LayerCalls]:
        """Record the calls of a block, given as a context manager."""
        try:
            yield self.start()
        finally:
            self.stop()

    def remove(self) -> None:
        """Takes every hook off the module."""
        for hooks in self.layers:
            hooks.remove()

    def uses(self, calls: LayerCalls, graph: Graph, samples: int) -> tuple[list[Use], dict[str, str]]:
        """Where the parameters met the batch.

        Args:
            calls: Of the forward pass.
            graph: Below the losses, or any cut.
            samples: B.

        Returns:
            The uses, and for every parameter whose uses are not all known its name and the reason.
        """
        reentrant = any(kind_of(node).startswith("CheckpointFunction") for node in graph.order)
        uses: list[Use] = [call for call in calls.calls if call.node in graph]
        unseen: dict[str, str] = {}
        for name, parameter in self._parameters.items():
            ends = graph.terminals(parameter)
            own = [use for use in uses if isinstance(use, LayerCall) and name in use.parts.values()]
            found: list[FunctionalUse | str] = []
            if own:
                problems = [problem for call in own if (problem := _problem(call, samples)) is not None]
                if reentrant and name in calls.without_gradient:
                    problems.append(_why_unused(name, calls))
                if parameter.requires_grad and len(ends) != len(own):
                    problems.append(f"used in {len(ends)} places, {len(own)} of them a call of its layer")
            elif ends:
                found = [functional_use(name, end, graph, samples, self._batch_axis.get(name, 0)) for end in ends]
                problems = [use for use in found if isinstance(use, str)]
            else:
                problems = [_why_unused(name, calls)]
            if problems:
                unseen[name] = problems[0]
            else:
                uses += [use for use in found if isinstance(use, FunctionalUse)]
        return uses, unseen


class WholeModelGradients(DotOnly):
    """The matrix G of per-sample gradients over many parameters, never built.

    One reverse pass from the losses to the deepest use computes the activations' gradients and no weight's;
    at every use a product with them is taken and nothing kept. Exact where the samples' losses are
    independent; above a batch normalisation in training mode row *i* is sample *i*'s contribution to the
    total: the same sum over samples.

    Args:
        losses: Unreduced losses of shape ``(B,)``, or a scalar of which they are summed.
        uses: From :meth:`ModelHooks.uses`.
        graph: The graph below ``losses``.
        samples: B.
        seed: What the reverse pass starts with, of the shape of ``losses``: ones, if left out. Row *i* is the
            gradient of ``seedᵢ ℓᵢ``.

    Example:
        See :class:`ModelHooks`.
    """

    def __init__(
        self, losses: Tensor, uses: Sequence[Use], graph: Graph, samples: int, seed: Tensor | None = None
    ) -> None:
        self._losses = losses
        self._graph = graph
        self._samples = samples
        self._seed = torch.ones_like(losses) if seed is None else seed
        self._at: dict[Node, list[Use]] = {}
        for use in uses:
            self._at.setdefault(use.node, []).append(use)
        self._deepest = graph.deepest(self._at)
        #: The last :meth:`rows_that_mix_samples` saw both samples at every use.
        self.conclusive = False

    def dot(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """``⟨gᵢ, v⟩`` for every sample.

        Args:
            vectors: Parameter name to a tensor of its shape.

        Returns:
            Shape ``(B,)``, in the dtype of ``vectors`` or higher.
        """
        shares: list[Tensor] = []

        def take(uses: Sequence[Use], gradient: Tensor | None) -> None:
            if gradient is not None:  # autograd's way to say zero
                shares.extend(use.dot(gradient, vectors) for use in uses)

        self._visit(self._seed, take)
        if not shares:
            return torch.zeros(self._samples, device=self._losses.device)
        return torch.stack(shares).sum(0)

    def rows_that_mix_samples(self, edge: GradientEdge | None = None) -> list[str]:
        """Parameters at whose uses one sample's loss shows in other rows than its own (a host sync per use).

        Either the loss makes the samples depend on each other, or an axis was taken for the batch's that only has
        its length. Looks at the first and the last sample; says in ``conclusive`` whether both showed everywhere,
        because a gradient of zero (of a head that starts at zero) shows nothing.

        Args:
            edge: A tensor above all uses with one row per sample, where the losses themselves are a scalar.
        """
        found: list[str] = []
        self.conclusive = self._samples > 1

        def look(own: int, uses: Sequence[Use], gradient: Tensor | None) -> None:
            for use in uses:
                if edge is not None and use.node is edge.node:
                    continue  # its rows are the edge's own
                rows = None if gradient is None else gradient.reshape(use.shape).movedim(use.axis, 0)
                if rows is not None and (len(rows) != self._samples or not _alone(rows, own)):
                    found.extend(use.parts.values() if isinstance(use, LayerCall) else [use.name])
                elif rows is None or not bool((rows[own].abs() > 0).any()):
                    self.conclusive = False

        # Two passes of one sample, too: those of a sharded model gather its weights, on all ranks as often.
        for own in (0, self._samples - 1):
            with one_sample(self._losses, edge, own, self._samples) as seed:
                self._visit(seed, partial(look, own))
        return list(dict.fromkeys(found))

    def normalised(self) -> bool:
        """Whether a batch normalisation in training mode lies above a use, so that rows are contributions."""
        return any(normalises_batch(node) for node in self._above())

    def compiled(self, parameters: Collection[int] = ()) -> bool:
        """Whether torch.compile made a part of what lies above a use, which can then be gone through only once.

        Args:
            parameters: Ids of parameters of compiled parts, by which these are known while they run as written.
        """
        return any(is_compiled(node) or _uses(node, parameters) for node in self._above())

    def only_layer(self) -> LayerGradients:
        """The same rows with all of a layer's products, where the parameters belong to one call of one layer.

        Raises:
            ValueError: They do not.
        """
        uses = [use for here in self._at.values() for use in here]
        if len(uses) != 1 or not isinstance(uses[0], LayerCall):
            raise MimicError(f"the parameters were used {len(uses)} times, not by one call of one layer.")
        found: list[Tensor | None] = []
        self._visit(self._seed, lambda uses, gradient: found.append(gradient))
        if found[0] is None:
            raise MimicError(f"no gradient reaches the output of {uses[0].name!r}.")
        return uses[0].gradients(found[0])

    def _above(self) -> list[Node]:
        """The nodes that the reverse pass goes through."""
        leading = self._graph.nodes_reaching(self._at)
        return [n for n in self._graph.order if any(child in leading for child, _ in n.next_functions)]

    def _visit(self, seed: Tensor, visit: Callable[[Sequence[Use], Tensor | None], None]) -> None:
        """One reverse pass that shows every use the gradient of its output."""
        hooks = [
            node.register_prehook(lambda gradients, uses=uses: visit(uses, gradients[0]))
            for node, uses in self._at.items()
            if node not in self._deepest
        ]
        # What lies above the deepest uses is computed on the way to them; weights' gradients are not.
        edges = [GradientEdge(node, 0) for node in self._deepest]
        try:
            for node, gradient in zip(self._deepest, _reverse(self._losses, edges, seed), strict=True):
                visit(self._at[node], gradient)
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def one_sample(losses: Tensor, edge: GradientEdge | None, own: int, samples: int) -> Iterator[Tensor]:
    """Within it a reverse pass from ``losses``, begun with the seed that is given, carries one sample's loss alone."""
    alone = torch.arange(samples, device=losses.device) == own
    if edge is None:
        yield alone.to(losses.dtype)
        return
    hook = hook_gradient(edge, lambda gradients: gate_rows(gradients, alone.to(gradients.dtype), ~alone))
    try:
        yield torch.ones_like(losses)
    finally:
        hook.remove()


def rows_of_samples(losses: Tensor, edges: Sequence[GradientEdge], samples: int) -> int:
    """How many of the tensors, from the first on, really have the samples for rows (a host sync per tensor).

    Args:
        losses: Shape ``(B,)``, or a scalar.
        edges: Of tensors of leading size B, each above the next; the rows of the first one are the samples.
        samples: B.
    """
    deep = len(edges)
    for own in {0, samples - 1}:
        with one_sample(losses, edges[0], own, samples) as seed:
            gradients = _reverse(losses, edges, seed)
        # What the first one gets was not cut down to one sample on its way.
        alone = [g is None or _alone(g, own) for g in gradients[1:]]
        deep = min(deep, 1 + (alone.index(False) if False in alone else len(alone)))
    return deep


def _uses(node: Node, parameters: Collection[int]) -> bool:
    leaves = [leaf_below(child) for child, _ in node.next_functions]
    return any(leaf is not None and id(leaf.variable) in parameters for leaf in leaves)  # type: ignore[attr-defined]


def _alone(rows: Tensor, own: int) -> bool:
    return not bool((torch.cat([rows[:own], rows[own + 1 :]]).abs() > 0).any())


def _reverse(losses: Tensor, edges: Sequence[GradientEdge], seed: Tensor) -> tuple[Tensor | None, ...]:
    with torch.autocast(losses.device.type, enabled=False):
        gradients: tuple[Tensor | None, ...] = (
            torch.autograd.grad(losses, edges, seed, retain_graph=True, allow_unused=True) if edges else ()
        )
    return gradients


def _why_unused(name: str, calls: LayerCalls) -> str:
    if name in calls.without_gradient:
        return (
            "its layer ran without gradient: it and all before it are frozen, or it ran under no_grad or reentrant "
            "activation checkpointing (use_reentrant=False works)"
        )
    return "no path leads from the loss to it"


def _problem(call: LayerCall, samples: int) -> str | None:
    """Why a call's per-sample gradients cannot be told, as a phrase."""
    if call.shape[0] != samples or not LayerGradients.batch_first(call.layer, call.shape):
        return f"its layer's output has shape {call.shape}, not one row for each of {samples} samples"
    return None
