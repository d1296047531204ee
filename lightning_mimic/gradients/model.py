"""Per-sample gradients of many parameters at once, from one reverse pass over their uses."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from lightning_mimic.errors import MimicError
from lightning_mimic.gradients.functional_use import FunctionalUse, functional_use
from lightning_mimic.gradients.graph import Graph, Terminal, is_compiled, normalises_batch
from lightning_mimic.gradients.layer_hooks import CallWatch, LayerCall, LayerCalls, LayerHooks
from lightning_mimic.gradients.layer_rules import is_linear
from lightning_mimic.gradients.layers import LayerGradients
from lightning_mimic.gradients.nodes import BatchAxis, gate_rows, hook_gradient, kind_of, leaf_below
from lightning_mimic.gradients.output_gradients import OutputGradients, Use
from lightning_mimic.gradients.sample_gradients import DotOnly
from lightning_mimic.gradients.subgraph import SubgraphSearch, SubgraphUse

_RAN_WITHOUT = (
    "its layer ran without gradient: it and all before it are frozen, or it ran under no_grad or reentrant activation "
    "checkpointing (use_reentrant=False works)"
)


def _first(axes: int) -> int:
    return 0


def _in_attention(axes: int) -> int:
    """It computes with the time axis first, whatever it is given; with other than three axes heads are apart."""
    return 1 if axes == 3 else axes


def _in_recurrence(axes: int) -> int:
    """All steps together have the time axis first, one step alone has none."""
    return int(axes > 2)


class ModelHooks:
    """Sees every use of the named parameters in a forward pass.

    Layers of a known kind are seen by their calls; what is left (a class token, a projection, the inside of
    ``nn.MultiheadAttention``) is looked up in the autograd graph: by the operation that combines it with the batch, or
    else by the first tensors above it that have a row per sample.

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
        self._batch_axis: dict[str, BatchAxis] = {}
        self.layers: list[LayerHooks] = []
        self._hooks: list[LayerHooks | CallWatch] = []
        names = {id(module.get_parameter(name)): name for name in parameters}
        for path, layer in module.named_modules():
            own = {part: names[id(p)] for part, p in layer.named_parameters(recurse=False) if id(p) in names}
            if isinstance(layer, nn.MultiheadAttention):
                # Its out_proj is never called. Parametrized weights belong to modules below it.
                self._batch_axis |= {names[id(p)]: _in_attention for p in layer.parameters() if id(p) in names}
            elif isinstance(layer, nn.RNNBase):
                self._batch_axis |= {names[id(p)]: _in_recurrence for p in layer.parameters() if id(p) in names}
            if not own:
                continue
            try:
                LayerGradients.check(path, layer)
            except ValueError:
                self._hooks.append(CallWatch(layer, list(own.values())))  # the graph may know more
                continue
            self.layers.append(LayerHooks(path, layer, own))
        self._hooks += self.layers
        if len(self.layers) == 1:
            # That of several layers would be held much longer than a forward pass holds them.
            self.layers[0].keeps_output = is_linear(self.layers[0].layer)

    def start(self) -> LayerCalls:
        """Begin to record calls.

        Returns:
            An object that holds the calls from here on, until :meth:`stop`.
        """
        calls = LayerCalls()
        for hooks in self._hooks:
            hooks.into = calls
        return calls

    def stop(self) -> None:
        """Ignore calls from now on."""
        for hooks in self._hooks:
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
        for hooks in self._hooks:
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
        search = SubgraphSearch(graph, samples)
        seen = [call for call in calls.calls if call.node in graph]
        hidden = self.hidden(calls, graph)
        calls_of: dict[str, list[LayerCall]] = {}
        for each in seen:
            for name in each.names:
                calls_of.setdefault(name, []).append(each)
        known: list[FunctionalUse] = []
        searched: set[str] = set()
        unseen: dict[str, str] = {}
        for name, parameter in self._parameters.items():
            ends, own = graph.terminals(parameter), calls_of.get(name, [])
            if name in hidden:
                unseen[name] = hidden[name]
                continue
            if not own and not ends:
                unseen[name] = _RAN_WITHOUT if name in calls.without_gradient else "no path leads from the loss to it"
                continue
            batch_axis = self._batch_axis.get(name, _first)
            rules = [] if own else _rules(name, ends, graph, samples, batch_axis)
            if own and _one_row_each(parameter, own, len(ends), search):
                continue
            if rules and not any(use.node in search.spread for use in rules):
                known += rules
                continue
            searched.add(name)
            problem = search.add(name, parameter, batch_axis)
            if problem is not None:
                unseen[name] = problem
        uses: list[Use] = [call for each in seen if (call := each.without(searched)) is not None]
        return [*uses, *known, *search.uses()], unseen

    def hidden(self, calls: LayerCalls, graph: Graph) -> dict[str, str]:
        """Return the parameters that may have a gradient of which the graph does not show all.

        Args:
            calls: Of the forward pass.
            graph: Below the losses.

        Returns:
            Name to the reason.
        """
        reentrant = any(kind_of(node).startswith("CheckpointFunction") for node in graph.order)
        found: dict[str, str] = {}
        for name, parameter in self._parameters.items():
            unreached = not graph.terminals(parameter)
            if name in calls.packed:
                found[name] = "its layer was given a PackedSequence, whose rows are not the samples; pad it instead"
            elif parameter.requires_grad and name in calls.without_gradient and (unreached or reentrant):
                found[name] = _RAN_WITHOUT
            elif parameter.requires_grad and unreached and reentrant:
                found[name] = (
                    "no path leads from the loss to it but through reentrant activation checkpointing, which would "
                    "hide one; use_reentrant=False works"
                )
        return found


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
        self._subgraphs = {use.subgraph for use in uses if isinstance(use, SubgraphUse)}
        self._deepest = graph.deepest(self._at)
        #: How each parameter meets the batch: name, rule, operation, and which axes are as long as the batch.
        self.ways = {(name, type(use), kind_of(use.node), _as_long(use, samples)) for use in uses for name in use.names}
        #: The last :meth:`rows_that_mix_samples` saw both samples at every use.
        self.conclusive = False

    def dot(self, vectors: Mapping[str, Tensor], keep: OutputGradients | None = None) -> Tensor:
        """``⟨gᵢ, v⟩`` for every sample.

        Args:
            vectors: Parameter name to a tensor of its shape.
            keep: Takes the output gradients of all uses on the way.

        Returns:
            Shape ``(B,)``, in the dtype of ``vectors`` or higher.
        """
        shares: list[Tensor] = []
        along = {subgraph: subgraph.derivatives(vectors) for subgraph in self._subgraphs}

        def share(use: Use, gradient: Tensor) -> Tensor:
            if isinstance(use, SubgraphUse):
                return use.dot(gradient, along[use.subgraph])
            return use.dot(gradient, vectors)

        def take(use: Use, gradient: Tensor | None) -> None:
            if gradient is None:  # autograd's way to say zero
                return
            shares.append(share(use, gradient))
            if keep is not None:
                keep.add(use, gradient)

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

        def look(own: int, use: Use, gradient: Tensor | None) -> None:
            if edge is not None and use.node is edge.node:
                return  # its rows are the edge's own
            rows = None if gradient is None else gradient.reshape(use.shape).movedim(use.axis, 0)
            if rows is not None and (len(rows) != self._samples or not _alone(rows, own)):
                found.extend(use.names)
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
        """Whether torch.compile made a part of what is gone through for the scores, which it allows only once.

        Args:
            parameters: Ids of parameters of compiled parts, by which these are known while they run as written.
        """
        uses = [use for here in self._at.values() for use in here if isinstance(use, SubgraphUse)]
        below = {id(parameter) for use in uses for parameter in use.subgraph.parameters.values()}
        if not below.isdisjoint(parameters):
            return True
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
        self._visit(self._seed, lambda use, gradient: found.append(gradient))
        if found[0] is None:
            raise MimicError(f"no gradient reaches the output of {uses[0].name!r}.")
        return uses[0].gradients(found[0])

    def _above(self) -> list[Node]:
        """The nodes that the reverse pass goes through."""
        leading = self._graph.nodes_reaching(self._at)
        return [n for n in self._graph.order if any(child in leading for child, _ in n.next_functions)]

    def _visit(self, seed: Tensor, visit: Callable[[Use, Tensor | None], None]) -> None:
        """One reverse pass that shows every use the gradient of its output."""

        def visit_all(uses: Sequence[Use], gradients: Sequence[Tensor | None]) -> None:
            for use in uses:
                visit(use, gradients[use.output_nr])

        hooks = [
            node.register_prehook(lambda gradients, uses=uses: visit_all(uses, gradients))
            for node, uses in self._at.items()
            if node not in self._deepest
        ]
        # What lies above the deepest uses is computed on the way to them; weights' gradients are not.
        ends = list({(node, use.output_nr): None for node in self._deepest for use in self._at[node]})
        try:
            found = dict(zip(ends, _reverse(self._losses, [GradientEdge(*end) for end in ends], seed), strict=True))
            for node in self._deepest:
                for use in self._at[node]:
                    visit(use, found[node, use.output_nr])
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


def _as_long(use: Use, samples: int) -> tuple[bool, ...]:
    return tuple(length == samples for length in use.shape)


def _rules(
    name: str, ends: Sequence[Terminal], graph: Graph, samples: int, batch_axis: BatchAxis
) -> list[FunctionalUse]:
    """Return the rules for all uses of a parameter; none, if there is a use without a rule."""
    found = [functional_use(name, end, graph, samples, batch_axis) for end in ends]
    rules = [use for use in found if use is not None]
    return rules if len(rules) == len(ends) else []


def _one_row_each(parameter: nn.Parameter, calls: Sequence[LayerCall], uses: int, search: SubgraphSearch) -> bool:
    """Whether the calls of a parameter's layer are all of its uses, each with an output of one row per sample."""
    if parameter.requires_grad and uses != len(calls):  # a frozen layer's call is scored all the same
        return False
    return all(
        call.shape[0] == search.samples
        and LayerGradients.batch_first(call.layer, call.shape)
        and call.node not in search.spread
        for call in calls
    )
