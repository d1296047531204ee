"""One micro-batch: from the forward pass to weighted gradients."""

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_mimic import distributed
from lightning_mimic.batches import sample_count
from lightning_mimic.errors import MimicError
from lightning_mimic.gradients.forward_trace import ForwardTrace
from lightning_mimic.gradients.layer_hooks import LayerCalls
from lightning_mimic.ledger import Flag
from lightning_mimic.reweighting.batch import Ids, blank_nan_samples
from lightning_mimic.reweighting.features import target_features
from lightning_mimic.reweighting.forward import Forward
from lightning_mimic.reweighting.gate import ClosedGate, FullGate, Gate, TargetGate
from lightning_mimic.reweighting.head import Head, HeadProducts
from lightning_mimic.reweighting.hooks import GradientHooks, LossCapture, SampleLosses
from lightning_mimic.reweighting.loss_check import LossCheck
from lightning_mimic.reweighting.loss_problem import LossProblem
from lightning_mimic.reweighting.messages import NOT_THE_MEAN, SEVERAL_PASSES
from lightning_mimic.reweighting.methods import ScoringMethod, ScoringTask
from lightning_mimic.reweighting.products import GradientProducts
from lightning_mimic.reweighting.recorder import Position
from lightning_mimic.reweighting.settings import Settings
from lightning_mimic.reweighting.target import Target
from lightning_mimic.reweighting.weigh import StepResult, weigh_batch
from lightning_mimic.scorers import Products, Weighting, validate_scores

# Models with an open step: a second one would score gradients that the first has weighted.
_OPEN: WeakSet[nn.Module] = WeakSet()

# Products of the layer that a scorer gets only where they are those of a last layer under cross-entropy.
_OF_HEAD = frozenset({"outputs", "output_gradients", "reference_outputs"})


class _Eager:
    """Context in which compiled code runs uncompiled; contexts of several steps may end in any order.

    ``torch.compiler.set_stance`` restores what it found, so that contexts that overlap would leave it changed.
    """

    def __init__(self) -> None:
        self._open = 0
        self._stance = ExitStack()

    def __enter__(self) -> None:
        if not self._open:
            self._stance.enter_context(torch.compiler.set_stance("force_eager"))
        self._open += 1

    def __exit__(self, *_: object) -> None:
        self._open -= 1
        if not self._open:
            self._stance.close()


_EAGER = _Eager()


@dataclass(frozen=True)
class StepContext:
    """What all micro-batches of a run share.

    Attributes:
        settings: The user's.
        task: The parameters and the hooks on their layers.
        target: The direction towards the reference.
        capture: Captures per-sample losses; ``None`` for a module without ``sample_losses``.
        loss_check: Shows that the losses of such a module are means over the samples.
        weighting: The settings' own, or one of this run where it keeps state.
        choose: Returns the method that scores a micro-batch; looks at its graph first, if the second argument is true.
        head: The last layer, where the target is one under cross-entropy.
    """

    settings: Settings
    task: ScoringTask
    target: Target
    capture: LossCapture | None
    loss_check: LossCheck
    weighting: Weighting
    choose: Callable[[Forward, bool], ScoringMethod]
    head: Head


class Step:
    """One micro-batch: created when it starts, closed when it ends.

    In a training loop of one's own, :meth:`~lightning_mimic.Reweighter.step` creates it and :meth:`backward` is the one
    method to call. An adapter calls :meth:`start`, :meth:`after_forward`, has the backward pass run, and then
    :meth:`finish` and :meth:`close`.

    Args:
        context: Of the run.
        batch: What the module will compute its loss from.
        ids: Of its samples, where they are known.
        position: Of the micro-batch.
        check: Look at the graph: for the first micro-batch, and whenever it may have changed.
        scale: Of the gradient scaler over the accumulated micro-batches, a scalar; ``None`` without one.
    """

    def __init__(
        self,
        context: StepContext,
        batch: Any,
        ids: Ids | None,
        position: Position,
        *,
        check: bool,
        scale: Tensor | None,
    ) -> None:
        self._context = context
        self._check = check
        self._ids_given = ids is not None
        self._scaled = scale is not None
        self._closing = ExitStack()
        #: As it was given.
        self.given_batch = batch
        #: As the module must see it: from :meth:`start` on, samples that hold NaN are zero throughout.
        self.batch = batch
        self.ids = ids
        self.position = position
        #: Hooks on the graph of this micro-batch.
        self.hooks = GradientHooks()
        self._closing.callback(self.hooks.remove)
        self._rows = sample_count(batch) if ids is None else len(ids)
        self._not_nan: Tensor | None = None
        self._unit = torch.ones((), device=context.task.device)
        self._scale = scale
        self._calls = LayerCalls()
        self._captured: list[SampleLosses] = []
        self._trace: ForwardTrace | None = None
        self._recording = ExitStack()
        self._losses: Tensor | None = None
        self._reference_losses: Tensor | None = None
        self._match_posteriors: Tensor | None = None
        self._factor: Tensor | None = None
        self._problem: Tensor | None = None
        self._result: StepResult | None = None
        #: A loss was handed over.
        self.has_loss = False
        #: A backward pass follows the forward pass.
        self.backward_follows = True
        #: The classes of the samples, for the ledger.
        self.classes: dict[str, Tensor] = {}

    # What an adapter or a training loop calls

    def start(self, batch: Any) -> None:
        """Record what the forward pass does, until the loss is there.

        Args:
            batch: What the module's loss would be computed from without this step.

        Raises:
            RuntimeError: Another step of the same model has not ended.
        """
        settings, model = self._context.settings, self._context.task.module
        if model in _OPEN:
            raise RuntimeError("a step is begun while another one on the same model is open; end the first one before.")
        _OPEN.add(model)
        self._closing.callback(_OPEN.discard, model)
        self.given_batch = self.batch = batch
        if not self._ids_given:
            self._rows = sample_count(batch)
        if settings.masks and self._rows:
            self.batch, self._not_nan = blank_nan_samples(batch, self._rows)
        if settings.math_attention:  # to the end, because checkpointed blocks run again in reverse passes
            self._closing.enter_context(sdpa_kernel(SDPBackend.MATH))
        if self._check and "torch._dynamo" in sys.modules:
            # Compiled code shows neither what it does nor whether it mixes the samples; it runs as it is written.
            self._recording.enter_context(_EAGER)
        self._calls = self._context.task.hooks.start()
        self._closing.callback(self._stop)
        if self._context.capture is not None:
            self._captured = self._context.capture.start()
        if self._rows is not None:
            seen = (batch, self.batch)  # a loop of one's own may use either
            self._trace = self._context.loss_check.trace(seen, self._rows, self._check)
            if self._trace is not None:
                self._recording.enter_context(self._trace.recording())

    def after_forward(self, loss: Tensor, *, backward_follows: bool = True) -> Tensor:
        """Score the samples, or prepare to do so within the backward pass, and let the weights enter it.

        Args:
            loss: The mean loss of the micro-batch: not divided for accumulation, not scaled.
            backward_follows: A backward pass from the loss comes next; otherwise the samples are only scored, in a
                reverse pass that computes no parameter's gradient.

        Returns:
            The loss from which the backward pass must begin: the one that was given, or one of the same value.

        Raises:
            MimicError: The scores would not be those of the samples.
        """
        if self.has_loss:
            raise RuntimeError(SEVERAL_PASSES)
        if loss.numel() != 1 or loss.grad_fn is None:
            kind = f"of shape {tuple(loss.shape)}" if loss.grad_fn is not None else "without a gradient"
            raise MimicError(
                f"the loss is a tensor {kind}; expected the mean loss of the batch, a differentiable scalar."
            )
        # A recomputation (activation checkpointing) calls layers again; that is not another use of them.
        self._stop()
        if self._trace is not None:
            self._context.loss_check.look(self._trace)
        self.has_loss = True
        self.backward_follows = backward_follows
        forward = self._forward(loss)
        target, task = self._context.target, self._context.task
        self._losses = None if forward.losses is None else forward.own_rows(forward.losses.values)
        like = None if forward.losses is None else forward.losses.values
        reference_losses = target.reference_losses(self.batch, like)
        self._reference_losses = None if reference_losses is None else forward.own_rows(reference_losses)
        self._match_posteriors = target.observe(
            self.batch, self.ids, lambda: target_features(task.hooks, target.parameters, forward), self._not_nan
        )
        # Under DDP here, within its forward, and not later: beyond it lies a node that must be passed once.
        with torch.autocast(loss.device.type, enabled=False):
            method = self._context.choose(forward, self._check)
            edge = method.gate_edge(forward)
            self._watch(forward, edge)
            start = method.score(forward, edge, self)
            if start is not loss:
                self.hooks.on_edge(get_gradient_edge(start), self._remember)
        # The backward pass frees activations as it goes; nothing here may hold them.
        self._calls, self._captured, self._trace = LayerCalls(), [], None
        self._factor = None  # of a reverse pass for the scores
        return start

    def backward(
        self,
        loss: Tensor,
        run: Callable[[Tensor], Any] = Tensor.backward,
        *,
        label: Tensor | None = None,
        predicted: Tensor | None = None,
    ) -> StepResult:
        """Run the backward pass with the weights in it.

        Args:
            loss: The mean loss of the micro-batch, computed from :attr:`batch` within the step: not divided for
                accumulation, not scaled.
            run: Runs the backward pass; whatever it multiplies the loss by (gradient accumulation, a gradient scaler)
                is divided out of the scores, and left in the gradients.
            label: Given class of each sample, for the ledger, shape ``(B,)``.
            predicted: Predicted class of each sample, for the ledger, shape ``(B,)``.

        Returns:
            Scores and weights.

        Raises:
            MimicError: The scores would not be those of the samples.
        """
        self.classes = self._checked_classes(label=label, predicted=predicted)
        run(self.after_forward(loss))
        result = self.finish()
        if result is None or self._factor is None:
            raise RuntimeError("`run` must run the backward pass from the loss before it returns; it has not.")
        return result

    def finish(self) -> StepResult | None:
        """Return the result after the backward pass; ``None`` if there was none, because nothing was trained on.

        Raises:
            RuntimeError: The backward pass has not come by the scored layer.
        """
        if self.backward_follows and self._factor is None:
            return None  # as in the pass in which SWA renews the statistics of batch norms
        if self.has_loss and self._result is None:
            raise RuntimeError("no gradient reached the output of the scored layer, so this batch has no scores.")
        return self._result

    def close(self) -> None:
        """Remove all hooks of this micro-batch."""
        self._closing.close()
        self.__dict__.pop("gate", None)  # it may hold a method of this step, which only garbage collection would free

    def __enter__(self) -> "Step":
        self.start(self.given_batch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def problem(self) -> Tensor:
        """Return whether the loss was the plain mean of its samples: a :class:`LossProblem`, on the device."""
        if self._problem is None:
            raise RuntimeError("there is no loss yet.")
        return self._problem

    # What a scoring method reads

    @property
    def clean(self) -> Tensor | None:
        """Samples of this rank that hold no NaN and whose loss is finite; ``None`` where that is not known."""
        if self._losses is None:
            return self._not_nan
        finite = torch.isfinite(self._losses)
        return finite if self._not_nan is None else finite & self._not_nan

    @property
    def direction(self) -> Mapping[str, Tensor]:
        """V by parameter name; empty if none is needed."""
        direction = self._context.target.direction
        return {} if direction is None else direction

    @property
    def scale(self) -> Tensor:
        """What loss and gradients will be multiplied with against underflow, a scalar."""
        return self._unit if self._scale is None else self._scale

    def factor(self) -> Tensor:
        """Return the gradient that the backward pass began with at the loss, a scalar."""
        if self._factor is None:
            raise RuntimeError("the backward pass did not begin at the loss.")
        return self._factor

    @cached_property
    def gate(self) -> Gate:
        """Where the weights enter."""
        return self._make_gate()

    def weigh(self, products: GradientProducts) -> StepResult:
        """Score and weigh the samples.

        Args:
            products: Those that come from gradients.
        """
        settings, target = self._context.settings, self._context.target
        vanishes = torch.zeros((), dtype=torch.bool, device=self._unit.device)
        direction_norm = norm = mimic_scores = None
        clean = self.clean
        if target.direction is not None:
            norm = target.direction.norm()
            vanishes = target.direction.vanishes(norm)
            direction_norm = torch.where(vanishes, torch.ones_like(norm), norm)
            if (dot := products.get("dot")) is not None:
                known = ~vanishes if clean is None else clean & ~vanishes
                mimic_scores = torch.where(known, -dot / direction_norm, torch.nan)
            vanishes = vanishes | target.undecided
        head = self._head(products, vanishes)
        fields: dict[str, Any] = {name: value for name, value in products.items() if name not in _OF_HEAD}
        if head is not None:
            fields |= head.products
            vanishes = vanishes | head.unknown
        columns = {} if head is None else head.columns
        if self._match_posteriors is not None:
            fields["posteriors"] = self._match_posteriors
            columns["posterior"] = self._match_posteriors
        known_products = Products(
            samples=torch.zeros(self._rows or 0, device=self._unit.device),
            direction_norm=direction_norm,
            losses=self._losses,
            reference_losses=self._reference_losses,
            **fields,
        )
        scorer, weighting = settings.make_scores, self._context.weighting
        scores = validate_scores(scorer, scorer(known_products.for_reader(scorer)), known_products)
        result = weigh_batch(
            scores,
            clean,
            vanishes,
            weighting,
            scaled=self._scaled,
            distrusted=head.distrusted if head is not None and settings.diagnose_reference else None,
            products=known_products.for_reader(weighting),
        )
        # By the flag, not by the mask: when no sample is finite nothing is masked, and it must stop all the same.
        if settings.on_nonfinite == "raise" and (
            bad := (result.flags == Flag.NONFINITE_LOSS).nonzero().flatten().tolist()
        ):
            raise FloatingPointError(f"samples at positions {bad} of the batch have a loss that is not finite.")
        self._result = replace(
            result,
            losses=self._losses,
            mimic_scores=mimic_scores,
            direction_norm=norm,
            head=columns or None,
            wrong_share=self._context.head.wrong_share if target.wrong_share is None else target.wrong_share,
        )
        return self._result

    # The rest

    def _head(self, products: GradientProducts, vanishes: Tensor) -> HeadProducts | None:
        """Return what is known of the last layer, if the one target is such a layer under cross-entropy."""
        head, reference = self._context.head, self._context.target.reference
        if not head.required and (reference is None or "reference_outputs" not in products):
            return None
        if self._context.settings.direction == "start":
            return None  # the model's outputs and that direction do not add up to the reference's
        found = head.products(
            products,
            {} if reference is None else reference,
            self.direction,
            self.clean,
            vanishes,
            epoch=self.position.epoch if self.backward_follows else None,
            check=self._check,
        )
        if found is not None and self._problem is not None:
            self._problem = self._problem + found.unrecognised * LossProblem.NOT_CROSS_ENTROPY
        return found

    def _stop(self) -> None:
        self._recording.close()
        self._context.task.hooks.stop()
        if self._context.capture is not None:
            self._context.capture.stop()

    def _forward(self, loss: Tensor) -> Forward:
        if self._rows is None:
            raise MimicError(
                "the batch's tensors do not share one leading size, so the number of samples is unknown; give ids with "
                "WithIds, a key 'id', or `id_from=`."
            )
        rows = self._rows
        if self._context.capture is None:
            shown = self._context.loss_check.basis == "shown"
            return Forward(loss, None, self._calls, rows, self._trace, shows=shown)
        if not self._captured:
            raise MimicError(
                "the module has a method `sample_losses`, but training_step did not call it; training_step must "
                "return the mean of `self.sample_losses(batch)`."
            )
        losses = self._captured[0]
        if len(losses.values) not in (rows, rows * distributed.world_size()):
            raise MimicError(f"`sample_losses` returned {len(losses.values)} losses for {rows} samples.")
        return Forward(loss, losses, self._calls, rows, self._trace)

    def _watch(self, forward: Forward, edge: GradientEdge) -> None:
        """Have the backward pass show by what the loss is multiplied, and whether it is the mean of the losses."""
        problem = torch.zeros((), dtype=torch.int8, device=forward.loss.device)
        if self._context.loss_check.looks_for_nan and self._not_nan is not None:
            problem = problem + (~self._not_nan).any() * LossProblem.MEANT_NAN
        self._problem = problem
        self.hooks.on_edge(get_gradient_edge(forward.loss), self._remember)
        if forward.losses is None:
            self._problem = self._problem + self._context.loss_check.problem(forward, edge)
            return
        rows, check = forward.rows, self._check

        def compare(gradients: Tensor) -> None:
            if self._factor is None:
                return  # a reverse pass for the scores
            expected = (self._factor / rows).to(gradients.dtype)
            close = min(64 * torch.finfo(gradients.dtype).eps, 1e-2)
            unequal = ~torch.isclose(gradients, expected, rtol=close, atol=0.0).all()
            if check and bool(unequal):
                raise MimicError(NOT_THE_MEAN)
            self._problem = problem + unequal * LossProblem.NOT_THE_MEAN

        if self.backward_follows and not self._context.task.keeps:
            self.hooks.on_edge(forward.losses.edge, compare)
            return
        (gradients,) = torch.autograd.grad(forward.loss, [forward.losses.edge], retain_graph=True, allow_unused=True)
        compare(torch.zeros_like(forward.losses.values) if gradients is None else gradients)

    def _remember(self, gradient: Tensor) -> None:
        """Keep what the backward pass began with."""
        self._factor = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32)).reshape(())

    def _checked_classes(self, **columns: Tensor | None) -> dict[str, Tensor]:
        given = {name: classes for name, classes in columns.items() if classes is not None}
        for name, classes in given.items():
            fits = isinstance(classes, Tensor) and not classes.is_floating_point() and classes.shape == (self._rows,)
            if not fits:
                kind = (
                    f"shape {tuple(classes.shape)}, {classes.dtype}" if isinstance(classes, Tensor) else type(classes)
                )
                raise MimicError(f"`{name}` is {kind}; expected class indices, an integer tensor of shape (B,).")
        return given

    def _make_gate(self) -> Gate:
        reweight = self._context.settings.reweight
        if reweight == "none" or not self.backward_follows:
            return ClosedGate(self.hooks, self._not_nan)
        if reweight == "all":
            return FullGate(self.hooks, self._not_nan)
        return TargetGate(self.hooks, self._not_nan, self._context.target.parameters, self.factor)
