"""Checks of scorer, module and parameters before the first step."""

from collections.abc import Mapping

from torch import nn

from lightning_mimic.errors import MimicError, join_names
from lightning_mimic.gradients import is_linear, owning_layer
from lightning_mimic.reference import Aligned, ReferenceSource
from lightning_mimic.reweighting.gate import Reweight
from lightning_mimic.reweighting.reference_monitor import OnDoubtful
from lightning_mimic.scorers import HEAD_NEEDS, WEIGHT_NEEDS, Need, Scorer, UsesLoader

#: Products that only one layer's gradients offer, in words.
ONE_LAYER_PRODUCTS: dict[Need, str] = {
    "norms": "the norms of per-sample gradients",
    "gram": "the inner products of per-sample gradients",
    "outputs": "the outputs of the last layer",
    "reference_outputs": "the reference's outputs of the last layer",
    "labels": "the labels of a cross-entropy",
    "calibrated_outputs": "the calibrated reference's outputs of the last layer",
    "posteriors": "the probabilities that labels are right",
}


def check_scorer(scorer: Scorer, needs: frozenset[Need], *, reference: bool, parameters: bool) -> None:
    """Check that exactly what is needed is given; nothing is ignored silently.

    Args:
        scorer: The scorer.
        needs: The products that scorer and weighting need.
        reference: A reference is given.
        parameters: Parameters are named.

    Raises:
        MimicError: Something is missing, or given in vain.
    """
    name = type(scorer).__name__
    of_reference = {"reference_losses"} if isinstance(scorer, UsesLoader) else WEIGHT_NEEDS | {"reference_losses"}
    if isinstance(scorer, UsesLoader) and needs & (WEIGHT_NEEDS - {"dot"}):
        raise MimicError(
            f"{join_names(sorted(needs & (WEIGHT_NEEDS - {'dot'})))} come from the weights of a reference, and {name} "
            "takes its direction from the batches of its `loader`; take another scorer or weighting."
        )
    if reference and "dot" in needs - of_reference:
        raise MimicError(
            f"`reference` is given, but {name} takes its direction from the batches of its `loader`; leave it out."
        )
    for argument, given, needed, example in (
        ("reference", reference, of_reference, "a checkpoint's path"),
        ("parameters", parameters, WEIGHT_NEEDS | ONE_LAYER_PRODUCTS.keys(), "a layer's path or 'all'"),
    ):
        if given and not needs & needed:
            raise MimicError(f"`{argument}` is given, but {name} takes none; leave it out.")
        if not given and needs & needed:
            raise MimicError(f"`{argument}` is missing; {name} needs one: {example}.")


def check_start_direction(
    scorer: Scorer, needs: frozenset[Need], reference: ReferenceSource | Aligned | None, on_doubtful: OnDoubtful
) -> None:
    """Check that there are starting weights from which a direction to the reference can be taken.

    Args:
        scorer: The scorer.
        needs: The products that scorer and weighting need.
        reference: As the user gave it.
        on_doubtful: What to do about a reference that is not found compatible.

    Raises:
        MimicError: There are none.
    """
    name = type(scorer).__name__
    for given, why in (
        ("dot" not in needs, f"{name} takes no direction"),
        (isinstance(scorer, UsesLoader), f"{name} takes its direction from the batches of its `loader`"),
        (
            bool(needs & HEAD_NEEDS),
            f"{join_names(sorted(needs & HEAD_NEEDS))} rest on the reference's outputs, to which that direction does "
            "not lead from the current ones",
        ),
        (
            isinstance(reference, Aligned),
            "an aligned reference is fitted to the model's current features and has no start in common with it",
        ),
        (on_doubtful == "align", "`on_doubtful='align'` may align the reference, which has no start in common then"),
    ):
        if given:
            raise MimicError(f"`direction` is 'start', but {why}; leave it out.")


def check_keeping(keep: bool, scorer: Scorer, needs: frozenset[Need], reweight: Reweight, uncovered: str) -> None:
    """Check that a run can form the weighted gradients from kept output gradients.

    Args:
        keep: It is to do so.
        scorer: The scorer.
        needs: The products that scorer and weighting need.
        reweight: What the weights reach.
        uncovered: What to do about parameters that they do not reach.

    Raises:
        MimicError: It cannot.
    """
    name = type(scorer).__name__
    of_layer = sorted(needs & ONE_LAYER_PRODUCTS.keys())
    for given, why in (
        (bool(of_layer), f"{ONE_LAYER_PRODUCTS[of_layer[0]]}, of one layer, are needed" if of_layer else ""),
        ("dot" not in needs, f"{name} takes no gradients"),
        (reweight != "all", f"with `reweight={reweight!r}` other parameters than the scored ones keep their gradients"),
        (uncovered != "error", f"with `uncovered={uncovered!r}` some parameters keep their gradients"),
    ):
        if keep and given:
            raise MimicError(
                "`keep_output_gradients` saves a second pass where several layers are scored and all gradients are "
                f"weighted, but {why}; leave it out."
            )


def check_needs(scorer: Scorer, needs: frozenset[Need], module: nn.Module, targets: Mapping[str, nn.Parameter]) -> None:
    """Check that the module and its parameters can give what is needed.

    Args:
        scorer: The scorer.
        needs: The products that scorer and weighting need.
        module: The module that is trained.
        targets: The target parameters by name.

    Raises:
        MimicError: They cannot.
    """
    name = type(scorer).__name__
    by_losses = needs & {"losses", "reference_losses"} or isinstance(scorer, UsesLoader)
    if by_losses and not callable(getattr(module, "sample_losses", None)):
        raise MimicError(
            f"{name} needs the loss of every sample: give {type(module).__name__} a method `sample_losses(batch)` that "
            "returns one loss per sample, and average it in training_step."
        )
    for need in sorted(needs & ONE_LAYER_PRODUCTS.keys()):
        path, layer = owning_layer(module, targets)
        if not is_linear(layer):
            raise MimicError(
                f"{name} needs {ONE_LAYER_PRODUCTS[need]}, which are known for nn.Linear; {path!r} is a "
                f"{type(layer).__name__}."
            )


def check_sharded(
    module: nn.Module,
    scorer: Scorer,
    needs: frozenset[Need],
    reference: ReferenceSource | Aligned | None,
    reweight: Reweight,
    on_doubtful: OnDoubtful,
    keep_output_gradients: bool,
) -> None:
    """Check that a run does nothing that is not exact for a model sharded by ``fully_shard``.

    Args:
        module: The module that is trained.
        scorer: The scorer.
        needs: The products that scorer and weighting need.
        reference: As the user gave it.
        reweight: What the weights reach.
        on_doubtful: What to do about a reference that is not found compatible.
        keep_output_gradients: Form the weighted gradients from the output gradients of the scoring pass.

    Raises:
        MimicError: It would.
    """
    name = type(scorer).__name__
    layerless = not needs & (WEIGHT_NEEDS | ONE_LAYER_PRODUCTS.keys())
    unseen = layerless and not callable(getattr(module, "sample_losses", None))
    for given, instead in (
        (isinstance(reference, Aligned), "An aligned reference is fitted from whole layers; give one as it is"),
        (on_doubtful == "align", "`on_doubtful='align'` fits whole layers; take 'warn' or 'raise'"),
        (reweight == "target", "`reweight='target'` adds to gradients that are sharded; take 'all' or 'none'"),
        (keep_output_gradients, "`keep_output_gradients` adds to gradients that are sharded; leave it out"),
        (isinstance(scorer, UsesLoader), f"{name} runs the model on batches of its own; take MimicScore"),
        (unseen, f"{name} needs no layer, so give the module a method `sample_losses(batch)` that shows its samples"),
    ):
        if given:
            raise MimicError(f"the model is sharded (`fully_shard`). {instead}, or train it under DDP.")
