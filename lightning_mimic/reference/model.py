"""The reference as a model that can be asked for its losses."""

import copy
from typing import Any

from torch import nn

from lightning_mimic.errors import MimicError, ReferenceLoadError
from lightning_mimic.reference.aligned import Aligned
from lightning_mimic.reference.match import aliases_of, match_reference
from lightning_mimic.reference.open_clip_hub import open_clip_model
from lightning_mimic.reference.read import PUBLISHED, ReferenceSource, read_reference
from lightning_mimic.sharding import sharded_modules


def reference_model(
    source: ReferenceSource, module: nn.Module, method: str = "sample_losses", *, argument: str = "reference"
) -> nn.Module:
    """The reference with a method that it is asked by, frozen and in evaluation mode.

    Args:
        source: A module that has this method, of whatever architecture, or weights for ``module``'s own;
            ``"open_clip:ARCHITECTURE/TAG"`` is a module where towers are asked for.
        module: The module that is trained; has the method.
        method: Its name.
        argument: Name of the caller's argument that holds the source, for messages.

    Returns:
        A copy, on the module's device: another full set of weights.

    Raises:
        ReferenceLoadError: Weights that cannot be read, are missing or do not fit.

    Example:
        >>> import torch
        >>> reference_model({"weight": torch.ones(1, 1)}, nn.Linear(1, 1, bias=False)).weight.requires_grad
        False
    """
    if isinstance(source, str) and source.startswith(PUBLISHED) and method.startswith("encode_"):
        source = open_clip_model(source, argument=argument)
    if isinstance(source, nn.Module) and callable(getattr(source, method, None)):
        model = copy.deepcopy(source).to(next(module.parameters()).device)
    else:
        if sharded_modules(module):
            raise ReferenceLoadError(
                f"`{argument}` is weights for a model that is sharded (`fully_shard`), of which no second one can be "
                f"made to compute with them; give the reference as a module that has `{method}`, which is not sharded."
            )
        model = copy.deepcopy(module)
        stored = set(module.state_dict())
        named = [*module.named_parameters(), *module.named_buffers()]
        wanted = {name: t for name, t in named if name in stored and t.is_floating_point()}
        tensors = read_reference(source, argument=argument)
        weights = match_reference(tensors, wanted, aliases_of(module), argument=argument)
        model.load_state_dict(weights, strict=False)
    return model.eval().requires_grad_(False)


def refuse_module_on_features(reference: Any) -> None:
    """Refuse a reference module where batches hold the trained model's features in place of images.

    Args:
        reference: Any reference, also an :class:`~lightning_mimic.Aligned` one; weights of the trained model and
            ``None`` are accepted.

    Raises:
        MimicError: It is a module, which has a backbone of its own.

    Example:
        >>> refuse_module_on_features(nn.Linear(1, 1))
        Traceback (most recent call last):
            ...
        lightning_mimic.errors.MimicError: the reference is a module (Linear), which would be asked...
    """
    reference = reference.reference if isinstance(reference, Aligned) else reference
    if isinstance(reference, nn.Module):
        raise MimicError(
            f"the reference is a module ({type(reference).__name__}), which would be asked about the features of "
            "another backbone than its own. Give weights for the trained model (a path or a state dict), or train "
            "without `features`."
        )
