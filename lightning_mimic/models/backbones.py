"""Backbones that give features: torchvision's without their classifier, and a small one for the digits."""

from torch import Tensor, nn


def torchvision_backbone(name: str, weights: str | None = None) -> nn.Module:
    """A torchvision classification model whose last linear layer is left out.

    Args:
        name: As ``torchvision.models.get_model`` takes it, such as ``"resnet50"`` or ``"vit_b_16"``.
        weights: A weights entry such as ``"DEFAULT"``; fetched by torchvision.

    Returns:
        From images to features ``(B, D)``.

    Raises:
        ValueError: An unknown name (with the nearest ones), or a model that does not end in a linear layer.
    """
    import torchvision  # only this function needs it

    from lightning_mimic.gradients import nearest_names

    known = torchvision.models.list_models(torchvision.models)
    if name not in known:
        raise ValueError(f"`name`: torchvision has no classification model {name!r}; {nearest_names(name, known)}.")
    model: nn.Module = torchvision.models.get_model(name, weights=weights)
    path, last = [(path, module) for path, module in model.named_modules() if not list(module.children())][-1]
    if type(last) is not nn.Linear:
        raise ValueError(f"`name`: {name!r} ends in a {type(last).__name__}, not in a linear layer to leave out.")
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    return model


class SmallConvNet(nn.Module):
    """Two convolutions; every place of the second one's maps is a feature, or these are brought down to a few.

    For 8 × 8 images and ``width=64`` that is 4,096 features, more than there are images to train on, as it is with
    large backbones on small data.

    Args:
        width: Channels of the second convolution.
        channels: Of the image.
        features: Features to bring the maps down to, pooled to 8 × 8 places; all places, if left out.

    Example:
        >>> import torch
        >>> SmallConvNet(width=64)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 4096])
        >>> SmallConvNet(features=256)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 256])
    """

    def __init__(self, width: int = 64, channels: int = 1, features: int | None = None) -> None:
        super().__init__()
        few = (
            []
            if features is None
            else [nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(64 * width, features), nn.ReLU()]
        )
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, width, 3, padding=1),
            nn.ReLU(),
            *(few or [nn.Flatten()]),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Features, shape ``(B, width · H · W)`` or ``(B, features)``."""
        features: Tensor = self.layers(images)
        return features
