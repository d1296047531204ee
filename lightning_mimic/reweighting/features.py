"""Inputs of the target parameters, which are needed to align a reference."""

from collections.abc import Collection

from torch import Tensor

from lightning_mimic.errors import MimicError
from lightning_mimic.gradients import ModelHooks
from lightning_mimic.gradients.functional_use import FunctionalUse
from lightning_mimic.gradients.layer_hooks import LayerCall
from lightning_mimic.reweighting.forward import Forward


def target_features(hooks: ModelHooks, targets: Collection[str], forward: Forward) -> dict[str, Tensor]:
    """Return the tensor by which each target parameter is multiplied, shape ``(B, ..., D)``, by parameter name.

    Args:
        hooks: Hooks on the layers of the target parameters.
        targets: Names of the target parameters.
        forward: Micro-batch after its forward pass.

    Raises:
        MimicError: A target parameter is not used in exactly one matrix product.
    """
    layers = hooks.layers
    if len(layers) == 1 and set(layers[0].parts.values()) == set(targets):
        return dict.fromkeys(targets, forward.only_call(layers[0].name).inputs)
    uses, unseen = hooks.uses(forward.calls, forward.graph, forward.rows)
    found: dict[str, list[Tensor]] = {name: [] for name in targets}
    for use in uses:
        if isinstance(use, LayerCall):
            for name in use.parts.values():
                found[name].append(use.inputs)
        elif isinstance(use, FunctionalUse):
            found[use.name].extend(use.factors)
    for name, features in found.items():
        if len(features) != 1:
            why = unseen.get(name, "it is not used in exactly one matrix product")
            raise MimicError(
                f"`parameters`: an aligned reference needs the inputs of {name!r}, which are not known: {why}. Name "
                "the model's last projections."
            )
    return {name: features[0].detach() for name, features in found.items()}
