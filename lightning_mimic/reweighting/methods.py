"""The four methods that compute products with per-sample gradients and apply the weights."""

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

#: Parameters whose gradients must be weighted: all trainable parameters, all that lie below some tensor with a row per
#: sample, or the target parameters only.
Reach = Literal["all", "around", "targets"]

#: Products that need no gradient.
LOSS_PRODUCTS: frozenset[Need] = frozenset({"losses", "reference_losses"})

_DOT: frozenset[Need] = frozenset({"dot"})


@dataclass
class ScoringTask:
    """Scoring setup of a run, the same for all of its micro-batches.

    Attributes:
        module: Module that is trained.
        hooks: Hooks on the layers that own target parameters.
        targets: Target parameters by name, as the tensors that occur in the graph; empty for a scorer that needs no
            gradient.
        whole: Parameters of a sharded module by name, as the tensors that occur in the graph.
        needs: Products that the scorer and the weighting need.
        reach: Parameters whose gradients must be weighted.
        optional: Names of targets on which the loss need not depend; their gradient is zero if it does not.
        keeps: Whether weighted gradients are formed from kept output gradients, without a backward pass through the
            graph.
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
        #: Targets with gradient hooks that other code has registered.
        self.hooked = [name for name, p in self.targets.items() if p._backward_hooks]
        self._reported = False

    def report_unreached(self, names: Collection[str]) -> None:
        """Warn once that the loss does not depend on some of the targets."""
        if names and not self._reported:
            self._reported = True
            warn_once_for_all_ranks(
                f"`parameters`: no path leads from the loss to {_share(self.targets, names)}: "
                f"{join_names(list(names))}. Their gradients are zero in this batch, and so is their share of the "
                "scores."
            )

    @property
    def device(self) -> torch.device:
        """Device of the module's parameters."""
        return next(self.module.parameters()).device

    @property
    def layer_needs(self) -> list[Need]:
        """Needed products that only the gradients of a single layer offer, sorted."""
        return sorted(ONE_LAYER_PRODUCTS.keys() & self.needs)

    @property
    def layer_products(self) -> frozenset[Need]:
        """Products that the target layer offers; empty if there are several target layers."""
        layers = self.hooks.layers
        if len(layers) != 1:
            return frozenset()
        offered = LayerGradients.products_of(layers[0].layer)
        head = HEAD_NEEDS if is_linear(layers[0].layer) else frozenset[Need]()
        return head | {need for need in NEEDS if need in offered}

    def target_nodes(self, forward: Forward, graph: Graph) -> set[Node]:
        """Return the nodes of a graph at which the target parameters are used."""
        calls = [call for call in forward.calls.calls if call.node in graph]
        called = Counter(name for call in calls for name in call.names)
        ends = {name: graph.terminals(p) for name, p in self.targets.items()}
        elsewhere = {end.node for name, found in ends.items() if len(found) != called[name] for end in found}
        return elsewhere | {call.node for call in calls}


class MicroBatch(Protocol):
    """Interface of a step as used by a scoring method: attributes to read, and :meth:`weigh`."""

    hooks: GradientHooks
    #: Whether a backward pass follows the forward pass.
    backward_follows: bool

    @property
    def gate(self) -> Gate:
        """Gate that applies the weights."""

    @property
    def clean(self) -> Tensor | None:
        """Mask of the samples without NaN and with a finite loss; ``None`` where it is not known."""

    @property
    def direction(self) -> Mapping[str, Tensor]:
        """Direction v by parameter name; empty if no direction is needed."""

    @property
    def scale(self) -> Tensor:
        """Factor that loss and gradients will be multiplied by to prevent underflow, a scalar."""

    def factor(self) -> Tensor:
        """Return the gradient with which the backward pass started at the loss, a scalar."""

    def weigh(self, products: GradientProducts) -> StepResult:
        """Score and weigh the samples."""


class ScoringMethod(ABC):
    """Compute the products and find the tensor at which the weights are applied; base class of the methods."""

    #: Short description, for messages.
    description: ClassVar[str]

    def __init__(self, task: ScoringTask) -> None:
        self._task = task

    @property
    def products(self) -> frozenset[Need]:
        """Products that this method offers."""
        return LOSS_PRODUCTS

    def check_products(self) -> None:
        """Raise ``MimicError`` if a product is needed that this method does not offer."""
        for need in sorted(self._task.needs - self.products):
            raise MimicError(
                f"the scorer needs {ONE_LAYER_PRODUCTS.get(need, repr(need))}, which can be computed only for a single "
                "nn.Linear under a loss of independent samples, and this is not such a case."
            )

    @abstractmethod
    def gate_edge(self, forward: Forward) -> GradientEdge:
        """Return the edge of the tensor at which the weights are applied; it has one row per sample.

        Raises:
            MimicError: No such tensor lies between the loss and the parameters.
        """

    @abstractmethod
    def score(self, forward: Forward, edge: GradientEdge, step: MicroBatch) -> Tensor:
        """Compute the products, weigh the samples, and apply the weights; now or during the backward pass.

        Args:
            forward: Micro-batch after its forward pass.
            edge: Edge from :meth:`gate_edge`.
            step: Step whose samples are weighed from the products.

        Returns:
            The loss from which the backward pass starts.
        """


class NoGradient(ScoringMethod):
    """Method for scores that need no gradient."""

    description = "no gradient is needed"

    def __init__(self, task: ScoringTask) -> None:
        super().__init__(task)
        self._cuts = _Cuts(task)

    def gate_edge(self, forward: Forward) -> GradientEdge:
        """Return the lowest cut above all parameters, or the losses where finding that cut would involve all ranks."""
        at_losses = forward.of_all_ranks or bool(self._task.whole)
        return forward.losses_edge if forward.losses_edge and at_losses else self._cuts.lowest(forward)

    def score(self, forward: Forward, edge: GradientEdge, step: MicroBatch) -> Tensor:
        """Weigh the samples by their losses."""
        step.gate.before_backward(forward, edge, step.weigh({}), step.scale)
        return forward.loss


class InBackward(ScoringMethod):
    """Method that uses the output gradient of a single layer within the regular backward pass."""

    description = "one layer's output gradient, inside the one backward pass"

    @property
    def products(self) -> frozenset[Need]:
        """Products that the layer offers."""
        return LOSS_PRODUCTS | self._task.layer_products

    def observed(self, forward: Forward) -> tuple[WholeModelGradients, bool]:
        """Return the per-sample gradients at the layer's call, and whether a normalisation above it mixes samples."""
        call = self._call(forward)
        rows = WholeModelGradients(forward.root, [call], forward.graph, forward.rows)
        return rows, mixes_samples(grad_fn_of(forward.loss), call.node)

    def gate_edge(self, forward: Forward) -> GradientEdge:
        """Return the edge of the layer's output."""
        return GradientEdge(self._call(forward).node, 0)

    def score(self, forward: Forward, edge: GradientEdge, step: MicroBatch) -> Tensor:
        """Register a hook that scores and weighs the samples and applies the weights."""
        call, samples = self._call(forward), forward.rows
        needs = self._task.needs

        def on_gradient(gradients: Tensor) -> Tensor | None:
            arrived = gradients.shape
            gradients = gradients.reshape(call.shape)  # flat if torch returns the output as a view of a matrix
            rows = len(gradients)
            if rows != samples:
                raise MimicError(
                    f"`parameters`: the output of {call.name!r} has {rows} rows for {samples} samples in this "
                    "batch; it must have one row per sample in every batch."
                )
            # Convert the scaled gradient of the mean loss to the gradients of the unreduced losses.
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
    """Method that makes a reverse pass over the layers before the backward pass."""

    description = "a reverse pass over the layers, before the backward pass"

    def __init__(self, task: ScoringTask) -> None:
        super().__init__(task)
        self._cuts = _Cuts(task)
        self._all_seen = False
        # Uses of parameters for which it was checked that the rows are the samples.
        self._checked: set[tuple[object, ...]] = set()
        # Ids of compiled parameters, found by inspecting the module: in observed steps its code runs uncompiled.
        self._compiled: set[int] = set()

    @property
    def products(self) -> frozenset[Need]:
        """The dot product, and the products of the target layer if there is only one."""
        return LOSS_PRODUCTS | _DOT | self._task.layer_products

    def gate_edge(self, forward: Forward) -> GradientEdge:
        """Return the lowest cut above the target parameters or above all parameters, as ``reach`` requires."""
        return forward.losses_edge if forward.losses_edge and forward.of_all_ranks else self._cuts.lowest(forward)

    def observed(self, forward: Forward) -> tuple[WholeModelGradients, bool]:
        """Return the per-sample gradients at all uses, and whether a normalisation above one of them mixes samples.

        Raises:
            MimicError: The gradients of some parameters cannot be observed.
        """
        self._cuts.known_shape = None  # search for the cut again
        self._compiled = compiled_parameters(self._task.module)
        rows = self._rows(forward, self.gate_edge(forward), forward.seed)
        self._all_seen = True
        self._checked |= _kinds_of_use(forward, rows)
        return rows, rows.normalised()

    def _rows(self, forward: Forward, edge: GradientEdge, seed: Tensor) -> WholeModelGradients:
        """Return the per-sample gradients, which are computed when a product with them is requested.

        Args:
            forward: Micro-batch after its forward pass.
            edge: Edge at which the weights will be applied.
            seed: Gradient with which the reverse pass starts at the root.

        Raises:
            MimicError: The gradients of some parameters cannot be observed.
        """
        task, graph, below = self._task, forward.graph, Graph(edge.node)
        uses, unseen = task.hooks.uses(forward.calls, below, forward.rows)
        beyond = used_beyond(graph.root, edge.node, task.targets)
        hidden = task.hooks.hidden(forward.calls, graph)
        unseen |= {name: why for name, why in hidden.items() if name in unseen}
        unseen |= dict.fromkeys(beyond, "used again between the loss and the tensor that is weighted")
        zero = {n for n in unseen if not below.terminals(task.targets[n])} - hidden.keys() - set(beyond)
        if not self._all_seen:
            # In later batches, any target may be unused: its use was checked in the first step.
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
        """Make the reverse pass, weigh, and apply the weights above the layers or to the gradients that are formed."""
        # Scaled as in the backward pass, so that half precision suffices here if it does there.
        scale = step.scale / forward.rows
        rows = self._rows(forward, edge, forward.seed * scale)
        kinds = _kinds_of_use(forward, rows)
        if not kinds <= self._checked and not rows.normalised():
            samples_are_apart(self._task, forward, rows)
        self._checked |= kinds
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
        """Return a loss whose backward pass yields the weighted gradients without another pass through the graph."""
        task = self._task
        refuse_uncovered(task, forward, edge)  # what the check in the epoch's first step found may have changed
        refuse_unkept(task, forward, rows)
        kept = OutputGradients(task.targets)
        with task.hooks.recording() as again:
            dots = rows.dot(step.direction, keep=kept)
        if again.calls:
            raise MimicError(RECOMPUTED)
        result = step.weigh({"dot": dots / scale})
        weights, passing, masked = step.gate.rows(forward, result)
        # The kept rows belong to the mean loss and carry the same scale; both are divided out.
        return kept.attach(forward.loss, weights * passing / scale / forward.rows, masked)


class DoubleBackward(ScoringMethod):
    """Method that differentiates the losses twice."""

    description = "the losses, differentiated twice"

    @property
    def products(self) -> frozenset[Need]:
        """The dot product."""
        return LOSS_PRODUCTS | _DOT

    def gate_edge(self, forward: Forward) -> GradientEdge:
        """Return the edge of the per-sample losses."""
        if forward.losses is None:
            raise MimicError(
                "training_step no longer calls `sample_losses`, from which the scores are computed. Call it every step."
            )
        return forward.losses.edge

    def check(self, forward: Forward, refusal: ValueError | None) -> None:
        """Raise ``MimicError`` if the losses cannot be differentiated twice.

        Args:
            forward: Micro-batch after its forward pass.
            refusal: Error that explains why no cheaper method applies; ``None`` if there is none.
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
            # Most users will want to remove the obstacle to the cheaper method, so name it first.
            if refusal is None:
                raise
            raise MimicError(f"{refusal} Scoring from the losses alone is not possible either: {error}") from refusal
        task.report_unreached(zero)

    def score(self, forward: Forward, edge: GradientEdge, step: MicroBatch) -> Tensor:
        """Differentiate the losses twice, weigh, and apply the weights at the losses."""
        reached = {n: p for n, p in self._task.targets.items() if forward.graph.terminals(p)}
        again = partial(unshard, self._task.module)
        dots = LossGradients(forward.root, reached, between=again).dot(step.direction)
        if forward.of_all_ranks:
            # Each rank holds a part of every sample's gradient.
            dots = distributed.sum_over_ranks(dots)[forward.own]
        step.gate.before_backward(forward, edge, step.weigh({"dot": dots}), step.scale)
        return forward.loss


class _Cuts:
    """Search for cuts: tensors with one row per sample through which every path from the loss to the parameters leads.

    Args:
        task: Scoring setup of the run.
    """

    def __init__(self, task: ScoringTask) -> None:
        self._task = task
        self._index = 0
        #: Number of rows, number of cuts and whether code is compiled, for which the index of the lowest cut is known.
        self.known_shape: tuple[int, int, bool] | None = None

    def lowest(self, forward: Forward) -> GradientEdge:
        """Return the lowest cut whose first axis is the batch's; masking there removes the most non-finite values.

        Raises:
            MimicError: There is no cut.
        """
        task, graph = self._task, forward.graph
        targets = task.target_nodes(forward, graph)
        wanted = graph.leaves if task.reach == "all" or not task.targets else targets
        cuts = graph.cuts(wanted, forward.rows)
        if not cuts:
            # If a cut above the targets exists, name the parameters that bypass it instead.
            for edge in graph.cuts(targets, forward.rows)[-1:]:
                refuse_uncovered(task, forward, edge)
            raise MimicError(
                f"no tensor with a row for each of {forward.rows} samples lies between the loss and the parameters. "
                "Give the module a method `sample_losses(batch)` that returns one loss per sample, and return its mean."
            )
        # Search again (a host sync) if the size has changed: other axes may now have the size of the batch.
        compiled = any(map(is_compiled, graph.order))
        if self.known_shape != (forward.rows, len(cuts), compiled):
            known = forward.sample_cuts(cuts)
            deep = 1 if compiled else rows_of_samples(forward.root, known, forward.rows)
            self._index = cuts.index(known[:deep][-1])
            self.known_shape = (forward.rows, len(cuts), compiled)
        return cuts[self._index]


def only_call(task: ScoringTask, forward: Forward) -> LayerCall | None:
    """Return the call of the only target layer if scores and weights can both be applied at its output, or ``None``."""
    root, calls = grad_fn_of(forward.loss), forward.calls.calls
    if len(calls) != 1 or not reaches(root, calls[0].node):
        return None
    call = calls[0]
    uses, unseen = task.hooks.uses(forward.calls, Graph(call.node), forward.rows)
    if unseen or uses != calls or used_beyond(root, call.node, task.targets):
        return None
    if forward.losses_edge is not None and call.node in walk(root, stop=forward.losses_edge.node):
        return None  # the layer's gradient would include another term of the loss
    around = uncovered_parameters(root, call.node, {}) if task.reach != "targets" else []
    if around and task.reach == "around":
        cuts = forward.graph.cuts(task.target_nodes(forward, forward.graph), forward.rows)
        unavoidable = uncovered_parameters(root, cuts[-1].node, {}) if cuts else around
        around = around if len(around) > len(unavoidable) else []
    return None if around else call


def samples_are_apart(task: ScoringTask, forward: Forward, rows: WholeModelGradients) -> bool:
    """Check that the rows at all target parameters are the samples.

    Returns:
        Whether the check was conclusive for all target parameters.

    Raises:
        MimicError: Some rows depend on other samples.
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
    """Raise ``MimicError`` if all trainable parameters must be weighted and some would not be."""
    if task.reach != "all":
        return
    parameters = dict(task.module.named_parameters()) | task.whole
    names = uncovered_parameters(grad_fn_of(forward.loss), edge.node, parameters)
    if names:
        raise MimicError(
            f"the loss reaches {len(names)} trainable parameters around the tensor that is weighted (the output of "
            f"{kind_of(edge.node)}), so these would not be weighted: {join_names(names)}. Weight only the target "
            "parameters with `reweight='target'`, or give these the plain mean with `uncovered='mean'`."
        )


def refuse_unkept(task: ScoringTask, forward: Forward, rows: WholeModelGradients) -> None:
    """Raise ``MimicError`` if gradients formed from kept output gradients would differ from those of the loss."""
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


def _kinds_of_use(forward: Forward, rows: WholeModelGradients) -> set[tuple[object, ...]]:
    """Return the kinds of use of the parameters; for those without a rule of their own, with the batch size."""
    return {(*kind, forward.rows if kind[1] is SubgraphUse else None) for kind in rows.ways}


def _share(targets: Mapping[str, nn.Parameter], names: Collection[str]) -> str:
    share = sum(targets[name].numel() for name in names) / sum(p.numel() for p in targets.values())
    return f"{len(names)} of {len(targets)} parameters, {share:.1%} of their elements"


def _unseen(targets: Mapping[str, nn.Parameter], unseen: Mapping[str, str]) -> str:
    shown = "; ".join([f"{name!r} ({why})" for name, why in unseen.items()][:6]) + "; ..." * (len(unseen) > 6)
    return (
        f"`parameters`: the gradients of {_share(targets, unseen)} cannot be observed: {shown}. Leave them out "
        f"(`'!{next(iter(unseen))}'`), or give the module a method `sample_losses(batch)` that returns one loss per "
        "sample, from which any parameter can be scored."
    )
