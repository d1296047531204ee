"""What the target parameters are multiplied with, for a reference that is aligned."""

from collections.abc import Collection

from torch import Tensor

from lightning_mimic.callbacks.plan import Plan
from lightning_mimic.callbacks.step import Step
from lightning_mimic.gradients.tap import LayerCall


def target_features(plan: Plan, targets: Collection[str], step: Step) -> dict[str, Tensor]:
    """The batch as it meets each target parameter, shape ``(B, ..., D)``, by name.

    Args:
        plan: Its tap has seen the step.
        targets: Names of the target parameters.
        step: After its forward pass.

    Raises:
        ValueError: A target met the batch otherwise than in one matrix product.
    """
    layers = plan.tap.layers
    if len(layers) == 1 and set(layers[0].parts.values()) == set(targets):
        return dict.fromkeys(targets, plan.call.inputs)
    uses, unseen = plan.tap.uses(step.graph, step.rows)
    found: dict[str, list[Tensor]] = {name: [] for name in targets}
    for use in uses:
        if isinstance(use, LayerCall):
            for name in use.parts.values():
                found[name].append(use.inputs)
        else:
            found[use.name].extend(use.factors)
    for name, features in found.items():
        if len(features) != 1:
            why = unseen.get(name, "it does not meet the batch in one matrix product")
            raise ValueError(
                f"`parameters`: an aligned reference needs what {name!r} is multiplied with, which is not known: "
                f"{why}. Name the model's last projections."
            )
    return {name: features[0].detach() for name, features in found.items()}
