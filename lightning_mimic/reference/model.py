"""The reference as a model that can be asked for its losses."""

import copy

from torch import nn

from lightning_mimic.reference.match import aliases_of, match_reference
from lightning_mimic.reference.pretrained import open_clip_model
from lightning_mimic.reference.read import PUBLISHED, ReferenceSource, read_reference


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
        model = copy.deepcopy(module)
        stored = set(module.state_dict())
        named = [*module.named_parameters(), *module.named_buffers()]
        wanted = {name: t for name, t in named if name in stored and t.is_floating_point()}
        tensors = read_reference(source, argument=argument)
        weights = match_reference(tensors, wanted, aliases_of(module), argument=argument)
        model.load_state_dict(weights, strict=False)
    return model.eval().requires_grad_(False)
