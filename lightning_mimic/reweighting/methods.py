"""The four ways in which the products with per-sample gradients are computed and the weights enter."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from lightning_mimic import distributed
from lightning_mimic.errors import MimicError, join_names
from lightning_mimic.gradients import (
    Graph,
    LayerGradients,
    LossGradients,
    ModelHooks,
    OutputGradients,
    WholeModelGradients,
    is_linear,
)
from lightning_mimic.gradients.compiled import compiled_parameters
from lightning_mimic.gradients.graph import (
    is_compiled,
    mixes_samples,
    reaches,
    uncovered_parameters,
    used_beyond,
    walk,
)
from lightning_mimic.gradients.layer_hooks import LayerCall
from lightning_mimic.gradients.model import rows_of_samples
from lightning_mimic.gradients.nodes import grad_fn_of, kind_of
from lightning_mimic.gradients.subgraph import SubgraphUse
from lightning_mimic.reweighting.checks import ONE_LAYER_PRODUCTS
from lightning_mimic.reweighting.forward import Forward
from lightning_mimic.reweighting.gate import Gate
from lightning_mimic.reweighting.hooks import GradientHooks
from lightning_mimic.reweighting.messages import COMPILED_TWICE, HOOKED, NORMALISED, RECOMPUTED, UNSCORED
from lightning_mimic.reweighting.products import GradientProducts, layer_products
from lightning_mimic.reweighting.reference_monitor import warn_once_for_all_ranks
from lightning_mimic.reweighting.weigh import StepResult
from lightning_mimic.scorers import HEAD_NEEDS, NEEDS, Need
from lightning_mimic.sharding import unshard

#: What the weights must reach: all trainable parameters, all that some tensor with a row per sample leads to, or the
#: target parameters only.
Reach = Literal["all", "around", "targets"]

#: Products that no gradient is needed for.
LOSS_PRODUCTS: frozenset[Need] = frozenset({"losses", "reference_losses"})

_DOT: frozenset[Need] = frozenset({"dot"})


@dataclass
class ScoringTask:
    """What a run scores, the same for all of its micro-batches.

    Attributes:
        module: The module that is trained.
        hooks: On the layers that own target parameters.
        targets: The target parameters by name, as the graph knows them; empty for a scorer that needs no gradient.
        whole: Of a sharded module the parameters as the graph knows them, by name.
        needs: The products that scorer and weighting need.
        reach: What the weights must reach.
        optional: Names of targets that the loss need not reach; their gradient is zero then.
        keeps: Weighted gradients are formed from kept output gradients, and no backward pass goes through the graph.
    """

    module: nn.Module
    hooks: ModelHooks
    targets: dict[str, nn.Parameter]
    whole: dict[str, nn.Parameter]
    needs: frozenset[Need]
    reach: Reach
    optional: frozenset[str] = frozenset()
    keeps: bool = False
    hooked: list[str] = field(init=False)

    def __post_init__(self) -> None:
        #: Targets with gradient hooks that somebody else has registered.
        self.hooked = [name for name, p in self.targets.items() if p._backward_hooks]
        self._reported = False

    def report_unreached(self, names: Collection[str]) -> None:
        """Warn once that the loss does not reach some of the targets."""
        if names and not self._reported:
            self._reported = True
            warn_once_for_all_ranks(
                f"`parameters`: no path leads from the loss to {_share(self.targets, names)}: "
                f"{join_names(list(names))}. Their gradients are zero in this batch, and so is their share of the "
                "scores."
            )

    @property
    def device(self) -> torch.device:
        """Of the module's parameters."""
        return next(self.module.parameters()).device

    @property
    def layer_needs(self) -> list[Need]:
        """Those of the needs that only one layer's gradients offer."""
        return sorted(ONE_LAYER_PRODUCTS.keys() & self.needs)

    @property
    def layer_products(self) -> frozenset[Need]:
        """The products of the one target layer; none where there are several."""
        layers = self.hooks.layers
        if len(layers) != 1:
            return frozenset()
        offered = LayerGradients.products_of(layers[0].layer)
        head = HEAD_NEEDS if is_linear(layers[0].layer) else frozenset[Need]()
        return head | {need for need in NEEDS if need in offered}

    def target_nodes(self, forward: Forward, graph: Graph) -> set[Node]:
        """Return where the target parameters meet the batch, of the nodes of a graph."""
        calls = [call for call in forward.calls.calls if call.node in graph]
        called = Counter(name for call in calls for name in call.names)
        ends = {name: graph.terminals(p) for name, p in self.targets.items()}
        elsewhere = {end.node for name, found in ends.items() if len(found) != called[name] for end in found}
        return elsewhere | {call.node for call in calls}


class MicroBatch(Protocol):
    """What a scoring method reads of a step, and the one thing that it does with it."""

    hooks: GradientHooks
    #: A backward pass follows the forward pass.
    backward_follows: bool

    @property
    def gate(self) -> Gate:
        """Where the weights enter."""

    @property
    def clean(self) -> Tensor | None:
        """Samples that hold no NaN and whose loss is finite; ``None`` where that is not known."""

    @property
    def direction(self) -> Mapping[str, Tensor]:
        """V by parameter name; empty if none is needed."""

    @property
    def scale(self) -> Tensor:
        """What loss and gradients will be multiplied with against underflow, a scalar."""

    def factor(self) -> Tensor:
        """Return the gradient that the backward pass began with at the loss, a scalar."""

    def weigh(self, products: GradientProducts) -> StepResult:
        """Score and weigh the samples."""


class ScoringMethod(ABC):
    """A way to the products, and to the tensor at which the weights enter."""

    #: In words, for messages.
    description: ClassVar[str]

    def __init__(self, task: ScoringTask) -> None:
        self._task = task

    @property
    def products(self) -> frozenset[Need]:
        """The products that it offers."""
        return LOSS_PRODUCTS

    def check_products(self) -> None:
        """Raise ``MimicError`` if something is needed that this method does not offer."""
        for need in sorted(self._task.needs - self.products):
            raise MimicError(
                f"the scorer needs {ONE_LAYER_PRODUCTS.get(need, repr(need))}, which are known for one nn.Linear under "
                "a loss of independent samples, and this is not such a case."
            )

    @abstractmethod
    def gate_edge(self, forward: Forward) -> GradientEdge:
        """Return the tensor at which the weights enter, with one row per sample.

        Raises:
            MimicError: No such tensor lies between the loss and the parameters.
        """

    @abstractmethod
    def score(self, forward: Forward, edge: GradientEdge, step: MicroBatch) -> Tensor:
        """Have the step weigh its samples and let the weights enter the backward pass, now or within it.

        Args:
            forward: The micro-batch after its forward pass.
            edge: From :meth:`gate_edge`.
            step: Takes the products.

        Returns:
            The loss from which the backward pass begins.
        """


class NoGradient(ScoringMethod):
    """The scores need no gradient."""

    description = "no gradient is needed"

    def __init__(self, task: ScoringTask) -> None:
        super().__init__(task)
        self._cuts = _Cuts(task)

    def gate_edge(self, forward: Forward) -> GradientEdge:
        """Return the lowest cut above all parameters; the losses, where all ranks would have to look for it."""
        at_losses = forward.of_all_ranks or bool(self._task.whole)
        return forward.losses_edge if forward.losses_edge and at_losses else self._cuts.lowest(forward)

    def score(self, forward: Forward, edge: GradientEdge, step: MicroBatch) -> Tensor:
        """Weigh by the losses."""
        step.gate.before_backward(forward, edge, step.weigh({}), step.scale)
        return forward.loss


class InBackward(ScoringMethod):
    """One layer's output gradient is used inside the one backward pass."""

    description = "one layer's output gradient, inside the one backward pass"

    @property
    def products(self) -> frozenset[Need]:
        """The layer's."""
        return LOSS_PRODUCTS | self._task.layer_products

    def observed(self, forward: Forward) -> tuple[WholeModelGradients, bool]:
        """Return the gradients at the layer's call, and whether a normalisation above it mixes the samples."""
        call = self._call(forward)
        rows = WholeModelGradients(forward.root, [call], forward.graph, forward.rows)
        return rows, mixes_samples(grad_fn_of(forward.loss), call.node)

    def gate_edge(self, forward: Forward) -> GradientEdge:
        """Return the layer's output."""
        return GradientEdge(self._call(forward).node, 0)

    def score(self, forward: Forward, edge: GradientEdge, step: MicroBatch) -> Tensor:
        """Register a hook that scores, weighs and gates."""
        call, samples = self._call(forward), forward.rows
        needs = self._task.needs

        def on_gradient(gradients: Tensor) -> Tensor | None:
            arrived = gradients.shape
            gradients = gradients.reshape(call.shape)  # flattened where torch makes the output as a view of a matrix
            rows = len(gradients)
            if rows != samples:
                raise MimicError(
                    f"`parameters`: the output of {call.name!r} has {rows} rows for {samples} samples in this "
                    "batch; it must have one row per sample in every batch."
                )
            # From the mean loss's gradient, scaled and divided, back to that of each unreduced loss.
            dtype = torch.promote_types(gradients.dtype, torch.float32)
            own = call.gradients(gradients.to(dtype) * (rows / step.factor()))
            result = step.weigh(layer_products(call, own, needs, step.direction, step.clean))
            gated = step.gate.in_backward(gradients, call, result)
            return None if gated is None else gated.reshape(arrived)

        if step.backward_follows:
            step.hooks.on_edge(edge, on_gradient)
        else:
            on_gradient(*torch.autograd.grad(forward.loss, [edge], step.scale.to(forward.loss.dtype)))
        return forward.loss

    def _call(self, forward: Forward) -> LayerCall:
        return forward.only_call(self._task.hooks.layers[0].name)


class ReversePass(ScoringMethod):
    """A reverse pass over the layers, before the backward pass."""

    description = "a reverse pass over the layers, before the backward pass"

    def __init__(self, task: ScoringTask) -> None:
        super().__init__(task)
        self._cuts = _Cuts(task)
        self._all_seen = False
        # How parameters met the batch where it was checked that the rows are the samples.
        self._checked: set[tuple[object, ...]] = set()
        # Found by the module, because its code runs as it is written in the steps that are looked at.
        self._compiled: set[int] = set()

    @property
    def products(self) -> frozenset[Need]:
        """The dot product, and what one layer offers if there are no others."""
        return LOSS_PRODUCTS | _DOT | self._task.layer_products

    def gate_edge(self, forward: Forward) -> GradientEdge:
        """Return the lowest cut above the target parameters, or all of them."""
        return forward.losses_edge if forward.losses_edge and forward.of_all_ranks else self._cuts.lowest(forward)

    def observed(self, forward: Forward) -> tuple[WholeModelGradients, bool]:
        """Return the gradients at all uses, and whether a normalisation above one of them mixes the samples.

        Raises:
            MimicError: Some parameters' gradients would not be seen.
        """
        self._cuts.known_shape = None  # the cut is looked for again
        self._compiled = compiled_parameters(self._task.module)
        rows = self._rows(forward, self.gate_edge(forward), forward.seed)
        self._all_seen = True
        self._checked |= _ways(forward, rows)
        return rows, rows.normalised()

    def _rows(self, forward: Forward, edge: GradientEdge, seed: Tensor) -> WholeModelGradients:
        """Return the per-sample gradients, computed when products with them are asked for.

        Args:
            forward: The micro-batch.
            edge: Where the weights will enter.
            seed: What the reverse pass begins with.

        Raises:
            MimicError: Some parameters' gradients would not be seen.
        """
        task, graph, below = self._task, forward.graph, Graph(edge.node)
        uses, unseen = task.hooks.uses(forward.calls, below, forward.rows)
        beyond = used_beyond(graph.root, edge.node, task.targets)
        hidden = task.hooks.hidden(forward.calls, graph)
        unseen |= {name: why for name, why in hidden.items() if name in unseen}
        unseen |= dict.fromkeys(beyond, "used again between the loss and the tensor that is weighted")
        zero = {n for n in unseen if not below.terminals(task.targets[n])} - hidden.keys() - set(beyond)
        if not self._all_seen:
            # Those that a later batch does not use have been seen to be used as they should.
            zero &= task.optional
        refused = {name: why for name, why in unseen.items() if name not in zero}
        if refused:
            raise MimicError(_unseen(task.targets, refused))
        if not self._all_seen:
            task.report_unreached([name for name in unseen if name in zero])
        rows = WholeModelGradients(forward.root, uses, graph, forward.rows, seed)
        _refuse_compiled(rows.compiled(self._compiled))
        hooked = [
            name for name in task.hooked if any(name in use.names for use in uses if isinstance(use, SubgraphUse))
        ]
        if hooked:
            raise MimicError(HOOKED.format(join_names(hooked)))
        return rows

    def score(self, forward: Forward, edge: GradientEdge, step: MicroBatch) -> Tensor:
        """Go through the layers, weigh, and let the weights enter above them or in the gradients that are formed."""
        # As small as in the backward pass: what fits into half precision there must fit here.
        scale = step.scale / forward.rows
        rows = self._rows(forward, edge, forward.seed * scale)
        ways = _ways(forward, rows)
        if not ways <= self._checked and not rows.normalised():
            samples_are_apart(self._task, forward, rows)
        self._checked |= ways
        if self._task.layer_needs:
            call = forward.only_call(self._task.hooks.layers[0].name)
            own = rows.only_layer().divided(scale)
            products = layer_products(call, own, self._task.needs, step.direction, step.clean)
        elif self._task.keeps and step.backward_follows:
            return self._attached(forward, edge, rows, scale, step)
        else:
            products = {"dot": rows.dot(step.direction) / scale}
        step.gate.before_backward(forward, edge, step.weigh(products), step.scale)
        return forward.loss

    def _attached(
        self, forward: Forward, edge: GradientEdge, rows: WholeModelGradients, scale: Tensor, step: MicroBatch
    ) -> Tensor:
        """Return a loss from which the weighted gradients come without another pass through the graph."""
        task = self._task
        refuse_uncovered(task, forward, edge)  # what an epoch's first step was checked for may have changed
        refuse_unkept(task, forward, rows)
        kept = OutputGradients(task.targets)
        with task.hooks.recording() as again:
            dots = rows.dot(step.direction, keep=kept)
        if again.calls:
            raise MimicError(RECOMPUTED)
        result = step.weigh({"dot": dots / scale})
        weights, passing, masked = step.gate.rows(forward, result)
        # Rows as they were kept are those of the mean loss, multiplied by as much.
        return kept.attach(forward.loss, weights * passing / scale / forward.rows, masked)


class DoubleBackward(ScoringMethod):
    """The losses are differentiated twice."""

    description = "the losses, differentiated twice"

    @property
    def products(self) -> frozenset[Need]:
        """The dot product."""
        return LOSS_PRODUCTS | _DOT

    def gate_edge(self, forward: Forward) -> GradientEdge:
        """Return the losses."""
        if forward.losses is None:
            raise MimicError("training_step no longer calls `sample_losses`, from which its samples were scored.")
        return forward.losses.edge

    def check(self, forward: Forward, refusal: ValueError | None) -> None:
        """Raise ``MimicError`` where the losses cannot be differentiated twice.

        Args:
            forward: The micro-batch.
            refusal: Why the samples cannot be scored in a cheaper way.
        """
        task = self._task
        parts = compiled_parameters(task.module)
        leaves = {id(leaf.variable) for leaf in forward.graph.leaves}  # type: ignore[attr-defined]
        _refuse_compiled(not parts.isdisjoint(leaves) or any(map(is_compiled, forward.graph.order)))
        if task.hooked:
            raise MimicError(HOOKED.format(join_names(task.hooked)))
        hidden = task.hooks.hidden(forward.calls, forward.graph)
        zero = [
            n
            for n in task.targets
            if n in task.optional - hidden.keys() and not forward.graph.terminals(task.targets[n])
        ]
        reached = {name: p for name, p in task.targets.items() if name not in zero}
        try:
            LossGradients(forward.root, reached).check(forward.graph)
        except ValueError as error:
            # The obstacle to the cheaper way is what most users will want to change.
            if refusal is None:
                raise
            raise MimicError(f"{refusal} Nor from the losses alone: {error}") from refusal
        task.report_unreached(zero)

    def score(self, forward: Forward, edge: GradientEdge, step: MicroBatch) -> Tensor:
        """Differentiate, weigh, and let the weights enter at the losses."""
        reached = {n: p for n, p in self._task.targets.items() if forward.graph.terminals(p)}
        again = partial(unshard, self._task.module)
        dots = LossGradients(forward.root, reached, between=again).dot(step.direction)
        if forward.of_all_ranks:
            # Every rank holds its own part of each sample's gradient.
            dots = distributed.sum_over_ranks(dots)[forward.own]
        step.gate.before_backward(forward, edge, step.weigh({"dot": dots}), step.scale)
        return forward.loss


class _Cuts:
    """The tensors with a row per sample through which every path to the parameters leads.

    Args:
        task: What the run scores.
    """

    def __init__(self, task: ScoringTask) -> None:
        self._task = task
        self._place = 0
        #: Rows, number of cuts and whether code is compiled, for which the place of the lowest is known.
        self.known_shape: tuple[int, int, bool] | None = None

    def lowest(self, forward: Forward) -> GradientEdge:
        """Return the lowest one whose first axis is the batch's, where values that are not finite are masked best.

        Raises:
            MimicError: There is none.
        """
        task, graph = self._task, forward.graph
        targets = task.target_nodes(forward, graph)
        wanted = graph.leaves if task.reach == "all" or not task.targets else targets
        cuts = graph.cuts(wanted, forward.rows)
        if not cuts:
            # A tensor with a row per sample above all targets shows which parameters go around it.
            for edge in graph.cuts(targets, forward.rows)[-1:]:
                refuse_uncovered(task, forward, edge)
            raise MimicError(
                f"no tensor with a row for each of {forward.rows} samples lies between the loss and the parameters. "
                "Give the module a method `sample_losses(batch)` that returns one loss per sample, and return its mean."
            )
        # Looked for again (a host sync) when another size might make other axes look like the batch's.
        compiled = any(map(is_compiled, graph.order))
        if self.known_shape != (forward.rows, len(cuts), compiled):
            known = forward.sample_cuts(cuts)
            deep = 1 if compiled else rows_of_samples(forward.root, known, forward.rows)
            self._place = cuts.index(known[:deep][-1])
            self.known_shape = (forward.rows, len(cuts), compiled)
        return cuts[self._place]


def only_call(task: ScoringTask, forward: Forward) -> LayerCall | None:
    """Return the call of the one target layer, if scores and weights both belong at its output."""
    root, calls = grad_fn_of(forward.loss), forward.calls.calls
    if len(calls) != 1 or not reaches(root, calls[0].node):
        return None
    call = calls[0]
    uses, unseen = task.hooks.uses(forward.calls, Graph(call.node), forward.rows)
    if unseen or uses != calls or used_beyond(root, call.node, task.targets):
        return None
    if forward.losses_edge is not None and call.node in walk(root, stop=forward.losses_edge.node):
        return None  # another term of the loss would be scored with the samples' losses
    around = uncovered_parameters(root, call.node, {}) if task.reach != "targets" else []
    if around and task.reach == "around":
        cuts = forward.graph.cuts(task.target_nodes(forward, forward.graph), forward.rows)
        unavoidable = uncovered_parameters(root, cuts[-1].node, {}) if cuts else around
        around = around if len(around) > len(unavoidable) else []
    return None if around else call


def samples_are_apart(task: ScoringTask, forward: Forward, rows: WholeModelGradients) -> bool:
    """Return whether it could be seen of all target parameters that their rows are the samples.

    Raises:
        MimicError: They are not.
    """
    edge: GradientEdge | None = None
    if forward.losses is None:
        cuts = forward.graph.cuts(task.target_nodes(forward, forward.graph), forward.rows)
        if not cuts:
            return rows.conclusive
        edge = forward.sample_cuts(cuts)[0]
    mixing = rows.rows_that_mix_samples(edge)
    if mixing:
        raise MimicError(
            f"`parameters`: where {join_names(mixing)} is used, the loss of one sample shows in the rows of others: "
            "its first axis is not the batch's, or the loss makes the samples depend on each other. Name a later "
            "layer, or give the module a method `sample_losses(batch)` that returns one loss per sample."
        )
    return rows.conclusive


def refuse_uncovered(task: ScoringTask, forward: Forward, edge: GradientEdge) -> None:
    """Raise ``MimicError`` if the weights must reach all trainable parameters and do not."""
    if task.reach != "all":
        return
    parameters = dict(task.module.named_parameters()) | task.whole
    names = uncovered_parameters(grad_fn_of(forward.loss), edge.node, parameters)
    if names:
        raise MimicError(
            f"the loss reaches {len(names)} trainable parameters around the tensor that is weighted (the output of "
            f"{kind_of(edge.node)}), so the weights would not reach them: {join_names(names)}. Weight the target alone "
            "with `reweight='target'`, or let these have the plain mean with `uncovered='mean'`."
        )


def refuse_unkept(task: ScoringTask, forward: Forward, rows: WholeModelGradients) -> None:
    """Raise ``MimicError`` if the gradients formed from kept output gradients are not all that the loss would give."""
    leaves = {id(leaf.variable) for leaf in forward.graph.leaves}  # type: ignore[attr-defined]
    others = leaves - {id(p) for p in task.targets.values()}
    if others:
        names = {id(p): name for name, p in task.module.named_parameters()}
        found = sorted(names.get(leaf, "a tensor outside the module") for leaf in others)
        raise MimicError(UNSCORED.format(join_names(found)))
    if rows.normalised():
        raise MimicError(NORMALISED)
    hooked = [name for name, p in task.targets.items() if p._backward_hooks]
    if hooked:
        raise MimicError(HOOKED.format(join_names(hooked)))


def _refuse_compiled(compiled: bool) -> None:
    if compiled:
        raise MimicError(COMPILED_TWICE)


def _ways(forward: Forward, rows: WholeModelGradients) -> set[tuple[object, ...]]:
    """Return how the parameters meet the batch; for what has no rule of its own, in a batch of this size."""
    return {(*way, forward.rows if way[1] is SubgraphUse else None) for way in rows.ways}


def _share(targets: Mapping[str, nn.Parameter], names: Collection[str]) -> str:
    share = sum(targets[name].numel() for name in names) / sum(p.numel() for p in targets.values())
    return f"{len(names)} of {len(targets)} parameters, {share:.1%} of their elements"


def _unseen(targets: Mapping[str, nn.Parameter], unseen: Mapping[str, str]) -> str:
    shown = "; ".join([f"{name!r} ({why})" for name, why in unseen.items()][:6]) + "; ..." * (len(unseen) > 6)
    return (
        f"`parameters`: the scores do not see {_share(targets, unseen)}: {shown}. Leave them out "
        f"(`'!{next(iter(unseen))}'`), or give the module a method `sample_losses(batch)` that returns one loss per "
        "sample, from which any parameter can be scored."
    )
