"""Deterministic transforms from PIL images to tensors, whose ``repr`` shows all their settings."""

from typing import Any

from lightning_mimic.data.image_splits import Transform
from lightning_mimic.errors import MimicError, nearest_names, package_of_extra


def paper_transform(size: int = 224) -> Transform:
    """Return the paper's transform: resize to ``size`` by ``size`` pixels, and scale values to -1 to 1.

    The aspect ratio is not preserved. Images are flipped by the data module (``flip=True``).

    Args:
        size: Height and width, pixels.

    Returns:
        Function from a PIL image of mode RGB to a float32 tensor ``(3, size, size)``; values from 0 to 1 are normalised
        with mean 0.5 and standard deviation 0.5.

    Example:
        >>> from PIL import Image
        >>> image = paper_transform(16)(Image.new("RGB", (4, 8), "white"))
        >>> image.shape, float(image.min())
        (torch.Size([3, 16, 16]), 1.0)
    """
    import torch

    with package_of_extra("the transform of images", "vision"):
        from torchvision.transforms import v2

    steps = [v2.Resize((size, size)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])]
    return v2.Compose(steps)  # type: ignore[no-any-return]


def torchvision_preset(weights: str) -> Transform:
    """Return the inference transform that torchvision publishes with weights.

    Args:
        weights: Name of the weights, such as ``"ViT_B_16_Weights.IMAGENET1K_V1"``.

    Raises:
        MimicError: The weights are unknown.

    Example:
        >>> torchvision_preset("ViT_B_16_Weights.IMAGENET1K_V1")
        ImageClassification(
            crop_size=[224]
            resize_size=[256]
            mean=[0.485, 0.456, 0.406]
            std=[0.229, 0.224, 0.225]
            interpolation=InterpolationMode.BILINEAR
        )
    """
    with package_of_extra("torchvision's transform", "vision"):
        from torchvision import models

    kinds = [models.get_model_weights(name) for name in models.list_models(models)]
    known: dict[str, Any] = {str(each): each for kind in kinds for each in kind}
    known |= {f"{kind.__name__}.DEFAULT": kind.DEFAULT for kind in kinds if len(kind)}
    if weights not in known:
        raise MimicError(f"`weights`: torchvision has no {weights!r}; {nearest_names(weights, known)}.")
    return known[weights].transforms()  # type: ignore[no-any-return]


def timm_preset(model_name: str) -> Transform:
    """Return the inference transform that was published with a timm model, without downloading the model.

    Args:
        model_name: Name of the model, such as ``"vit_base_patch16_224.augreg_in21k"``; without a tag, timm's default.

    Raises:
        MimicError: The model or tag is unknown.

    Example:
        >>> timm_preset("vit_base_patch16_224.augreg_in21k").transforms[1]
        CenterCrop(size=(224, 224))
    """
    with package_of_extra("timm's transform", "vision"):
        from timm.data.config import resolve_data_config
        from timm.data.transforms_factory import create_transform
        from timm.models import get_pretrained_cfg, list_models

    known = {*list_models(), *list_models(pretrained=True)}
    config = get_pretrained_cfg(model_name) if model_name in known else None
    if config is None:
        raise MimicError(f"`model_name`: timm has no {model_name!r}; {nearest_names(model_name, known)}.")
    settings = resolve_data_config(pretrained_cfg=config.to_dict())
    return create_transform(**settings, is_training=False)  # type: ignore[no-any-return]
