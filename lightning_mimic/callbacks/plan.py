"""How a module's samples are scored: decided by looking at its first step, and looked at again every epoch."""

import warnings
from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from lightning_mimic.callbacks.products import Found, layer_products
from lightning_mimic.callbacks.refusals import COMPILED, HOOKED, NOT_PLAIN
from lightning_mimic.callbacks.step import Step, Way
from lightning_mimic.callbacks.support import OF_ONE_LAYER, any_rank
from lightning_mimic.gradients import Graph, LossGradients, ModelTap, WholeModelGradients
from lightning_mimic.gradients.graph import (
    escaping_parameters,
    is_compiled,
    mixes_samples,
    not_a_plain_mean,
    reaches,
    used_beyond,
    walk,
)
from lightning_mimic.gradients.model import rows_of_samples
from lightning_mimic.gradients.nodes import kind_of, made_by
from lightning_mimic.gradients.parameters import few
from lightning_mimic.gradients.tap import LayerCall
from lightning_mimic.scorers import Need

Reach = Literal["all", "around", "targets"]
MOST_LOOKS = 20


class Plan:
    """Which way the scores are taken and where the weights enter.

    Args:
        module: The module that is trained.
        targets: The target parameters by name; empty for a scorer that needs no gradient.
        needs: What the scorer needs.
        reach: The weights must reach ``"all"`` trainable parameters, all but those that go ``"around"`` every cut
            above the targets, or the ``"targets"`` only.
    """

    def __init__(
        self, module: nn.Module, targets: Mapping[str, nn.Parameter], needs: Collection[Need], *, reach: Reach
    ) -> None:
        self.tap = ModelTap(module, targets)
        self.way = Way.NONE
        self._module = module
        self._targets = dict(targets)
        #: Targets with gradient hooks that somebody else has put there.
        self.hooked = [name for name, p in targets.items() if p._backward_hooks]
        self._needs = needs
        self._reach = reach
        self._decided = self._looking = False
        self._cuts = 0
        self._looked_like = (0, 0)
        #: The last look showed nothing of some parameters; look at the next step again.
        self.pending = False
        self._looks = 0

    def decide(self, step: Step) -> str:
        """Looks at the graph of a step.

        Returns:
            Whose gradient is scored: ``"own_loss"``, the ``"contribution"`` to a total that mixes samples, or
            ``"no_gradient"``.

        Raises:
            ValueError: The scores would not be those of the samples, or the weights would not reach all
                parameters; says which and what to do.
        """
        before, self._looking = self.way, True
        way, mixed = self._way(step) if self._targets else (Way.NONE, False)
        if self._decided and way != before:
            raise ValueError(
                f"the samples can no longer be scored as in the first step ({before.value}), only otherwise "
                f"({way.value}), and scores of the two kinds do not mix. Start another run."
            )
        self.way = way
        gate = self.gate(step)
        if step.losses is None:
            reason = not_a_plain_mean(made_by(step.loss), gate.node)
            if reason:
                raise ValueError(NOT_PLAIN.format(reason))
        self._refuse_escaping(step, gate)
        self._decided, self._looking = True, False
        return "no_gradient" if way is Way.NONE else "contribution" if mixed else "own_loss"

    @property
    def call(self) -> LayerCall:
        """The one call of the one target layer in this step.

        Raises:
            ValueError: There was none, or more than one.
        """
        calls = self._calls()
        if len(calls) != 1:
            name = self.tap.layers[0].name
            raise ValueError(
                f"`parameters`: {name!r} was called {len(calls)} times in this step, and once in the first."
            )
        return calls[0]

    def gate(self, step: Step) -> GradientEdge:
        """The tensor at which the weights enter, one row per sample.

        Raises:
            ValueError: No such tensor lies between the loss and the parameters.
        """
        if self.way is Way.IN_PASS:
            return GradientEdge(self.call.node, 0)
        if step.losses_edge is not None and (self.way is Way.DOUBLE or step.of_all_ranks):
            return step.losses_edge
        graph = step.graph
        wanted = graph.leaves if self._reach == "all" or not self._targets else self._target_nodes(graph)
        cuts = graph.cuts(wanted, step.rows)
        if not cuts:
            # A tensor with a row per sample that all targets lie below shows what goes around it.
            for edge in graph.cuts(self._target_nodes(graph), step.rows)[-1:]:
                self._refuse_escaping(step, edge)
            raise ValueError(
                f"no tensor with a row for each of {step.rows} samples lies between the loss and the parameters. Give "
                "the module a method `sample_losses(batch)` that returns one loss per sample, and return its mean."
            )
        # The lowest one with the batch's axis, where what is not finite is masked best; looked for again when another
        # size might make other axes look like it (a host sync).
        looks_like = (step.rows, len(cuts))
        if self._looking or looks_like != self._looked_like:
            compiled = any(map(is_compiled, graph.order))
            self._cuts = 1 if compiled else rows_of_samples(step.root, cuts, step.rows)
            self._looked_like = looks_like
        return cuts[: self._cuts][-1]

    def products(
        self, step: Step, gate: GradientEdge, direction: Mapping[str, Tensor], scale: Tensor, clean: Tensor | None
    ) -> Found:
        """The products that the scorer needs, from a pass before the backward pass.

        Args:
            step: After its forward pass.
            gate: Where the weights will enter.
            direction: v by parameter name.
            scale: Against underflow in half precision; divided out.
            clean: Samples of this rank that are finite.
        """
        if self.way is Way.DOUBLE:
            assert step.losses is not None
            dots = LossGradients(step.losses, self._targets).dot(direction)
            if step.of_all_ranks:
                # Every rank holds its own part of each sample's gradient.
                torch.distributed.all_reduce(dots)
                dots = dots[step.own]
            return {"dot": dots}
        # As small as in the backward pass: what fits into half precision there must fit here.
        scale = scale / step.rows
        rows = self._rows(step, gate, step.seed * scale)
        if not OF_ONE_LAYER.keys() & set(self._needs):
            return {"dot": rows.dot(direction) / scale}
        return layer_products(self.call, rows.only_layer().divided(scale), self._needs, direction, clean)

    def _way(self, step: Step) -> tuple[Way, bool]:
        """The way for this step's graph, and whether a normalisation mixes samples above a target."""
        if step.of_all_ranks:
            self._check_double(step, None)
            return Way.DOUBLE, False
        refusal, mixed = None, False
        self._looks, self.pending = (self._looks if self.pending else 0) + 1, False
        call = self._only_call(step)
        way = Way.REVERSE if call is None else Way.IN_PASS
        try:
            if call is None:
                self.way = way
                rows = self._rows(step, self.gate(step), step.seed)
                mixed = rows.normalised()
            else:
                rows = WholeModelGradients(step.root, [call], step.graph, step.rows)
                mixed = mixes_samples(made_by(step.loss), call.node)
            if not mixed:
                self._refuse_strangers(step, rows)
        except ValueError as error:  # not raised before the other ranks have been heard
            refusal = error
        # A gradient that stays zero (a unit that died) must not have every step looked at.
        self.pending = any_rank(self.pending and self._looks < MOST_LOOKS, step.loss.device)
        refused = any_rank(refusal is not None, step.loss.device)
        if step.losses is None and refusal is not None:
            raise refusal
        if step.losses is None or not refused:
            return way, mixed
        self._check_double(step, refusal)
        return Way.DOUBLE, False

    def _rows(self, step: Step, gate: GradientEdge, seed: Tensor) -> WholeModelGradients:
        """The per-sample gradients of this step, to be taken in a reverse pass."""
        below, graph = Graph(gate.node), step.graph
        uses, unseen = self.tap.uses(below, step.rows)
        beyond = [n for n, p in self._targets.items() if used_beyond(graph.root, gate.node, p)]
        unseen |= dict.fromkeys(beyond, "used again between the loss and the tensor that is weighted")
        if self._decided:
            # A parameter that a later batch does not use has a gradient of zero.
            unseen = {n: why for n, why in unseen.items() if below.terminals(self._targets[n])}
        if unseen:
            self._refuse_unseen(unseen)
        rows = WholeModelGradients(step.root, uses, graph, step.rows, seed)
        _refuse_compiled(rows.compiled())
        return rows

    def _calls(self) -> list[LayerCall]:
        return [call for tap in self.tap.layers for call in tap.calls]

    def _only_call(self, step: Step) -> LayerCall | None:
        """The call of the one target layer, if scores and weights both belong at its output."""
        root, calls = made_by(step.loss), self._calls()
        if len(calls) != 1 or not reaches(root, calls[0].node):
            return None
        call = calls[0]
        uses, unseen = self.tap.uses(Graph(call.node), step.rows)
        if unseen or uses != calls or any(used_beyond(root, call.node, p) for p in self._targets.values()):
            return None
        if step.losses_edge is not None and call.node in walk(root, stop=step.losses_edge.node):
            return None  # another term of the loss would be scored with the samples' losses
        around = escaping_parameters(root, call.node, {}) if self._reach != "targets" else []
        if around and self._reach == "around":
            cuts = step.graph.cuts(self._target_nodes(step.graph), step.rows)
            unavoidable = escaping_parameters(root, cuts[-1].node, {}) if cuts else around
            around = around if len(around) > len(unavoidable) else []
        return None if around else call

    def _target_nodes(self, graph: Graph) -> set[Node]:
        called = {name for tap in self.tap.layers if tap.calls for name in tap.parts.values()}
        bare = {end.node for n, p in self._targets.items() if n not in called for end in graph.terminals(p)}
        return bare | {call.node for call in self._calls() if call.node in graph}

    def _check_double(self, step: Step, refusal: ValueError | None) -> None:
        assert step.losses is not None
        _refuse_compiled(any(map(is_compiled, step.graph.order)))
        for need in sorted(OF_ONE_LAYER.keys() & set(self._needs)):
            raise ValueError(
                f"the scorer needs {OF_ONE_LAYER[need]}, which are known for one nn.Linear under a loss of independent "
                "samples, and this is not such a case."
            )
        if self.hooked:
            raise ValueError(HOOKED.format(few(self.hooked)))
        try:
            LossGradients(step.losses, self._targets).check(step.graph)
        except ValueError as error:
            # What stood in the cheaper way is what most users will want to change.
            raise error if refusal is None else ValueError(f"{refusal} Nor from the losses alone: {error}") from refusal

    def _refuse_strangers(self, step: Step, rows: WholeModelGradients) -> None:
        """Raises ``ValueError`` unless the rows that are scored are the samples."""
        if rows.compiled():
            warnings.warn(COMPILED, stacklevel=2)
            return
        cuts: list[GradientEdge | None] = [None]
        if step.losses is None:
            cuts = [*step.graph.cuts(self._target_nodes(step.graph), step.rows)]
        strangers = rows.strangers(cuts[0]) if cuts else []
        self.pending = not rows.conclusive
        if strangers:
            raise ValueError(
                f"`parameters`: where {few(strangers)} is used, the loss of one sample shows in the rows of others: "
                "its first axis is not the batch's, or the loss makes the samples depend on each other. Name a later "
                "layer, or give the module a method `sample_losses(batch)` that returns one loss per sample."
            )

    def _refuse_unseen(self, unseen: Mapping[str, str]) -> None:
        size = sum(p.numel() for p in self._targets.values())
        share = sum(self._targets[name].numel() for name in unseen) / size
        shown = "; ".join([f"{name!r} ({why})" for name, why in unseen.items()][:6]) + "; ..." * (len(unseen) > 6)
        raise ValueError(
            f"`parameters`: the scores do not see {len(unseen)} of {len(self._targets)} parameters, {share:.1%} of "
            f"their elements: {shown}. Leave them out (`'!{next(iter(unseen))}'`), or give the module a method "
            "`sample_losses(batch)` that returns one loss per sample, from which any parameter can be scored."
        )

    def _refuse_escaping(self, step: Step, gate: GradientEdge) -> None:
        if self._reach != "all":
            return
        names = escaping_parameters(made_by(step.loss), gate.node, dict(self._module.named_parameters()))
        if names:
            raise ValueError(
                f"the loss reaches {len(names)} trainable parameters around the tensor that is weighted (the output of "
                f"{kind_of(gate.node)}), so the weights would not reach them: {few(names)}. Weight the target alone "
                "with `scope='target'`, or let these have the plain mean with `escaping='plain'`."
            )


def _refuse_compiled(compiled: bool) -> None:
    if compiled:
        raise ValueError(
            "`parameters`: scoring these takes a second reverse pass, which torch.compile leaves no room for. Name the "
            "last layer alone, or do not compile the module."
        )
