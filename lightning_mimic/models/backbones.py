"""Backbones that return features: models of torchvision and timm without their classifier, and a small network."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_mimic.errors import MimicError, nearest_names, package_of_extra


def published_transform(backbone: nn.Module) -> Callable[[Any], Tensor] | None:
    """Return the image transform that was published with a backbone's weights: image size, mean and deviation.

    Args:
        backbone: Backbone made by :func:`timm_backbone` or :func:`torchvision_backbone`. With random weights, the
            transform of the model's default weights is used.

    Returns:
        Function from a PIL image of mode RGB to a tensor ``(C, H, W)``; ``None`` for other backbones.

    Example:
        >>> from PIL import Image
        >>> backbone = timm_backbone("test_resnet")
        >>> published_transform(backbone)(Image.new("RGB", (300, 200))).shape
        torch.Size([3, 160, 160])
    """
    make = getattr(backbone, "make_published_transform", None)
    return None if make is None else make()


def torchvision_backbone(name: str, weights: str | None = None, **options: Any) -> nn.Module:
    """Create a torchvision classification model without its last linear layer.

    Args:
        name: Name for ``torchvision.models.get_model``, such as ``"resnet50"`` or ``"vit_b_16"``.
        weights: Tag of published weights, such as ``"IMAGENET1K_V1"``, or ``"DEFAULT"``; torchvision downloads them
            once. ``None``: random weights. For weights in a file use ``pretrained`` of
            :class:`~lightning_mimic.models.ImageClassifier`.
        options: Further arguments of the model, such as ``image_size``.

    Returns:
        A module from images ``(B, C, H, W)`` to features ``(B, D)``.

    Raises:
        MimicError: The name or tag is unknown, the weights cannot be downloaded, or the model does not end in a linear
            layer.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     torchvision_backbone("vit_b_16")(torch.zeros(2, 3, 224, 224)).shape
        torch.Size([2, 768])
    """
    with package_of_extra("a backbone of torchvision", "vision"):
        import torchvision

    known = torchvision.models.list_models(torchvision.models)
    if name not in known:
        raise MimicError(f"`name`: torchvision has no classification model {name!r}; {nearest_names(name, known)}.")
    published = None
    if weights is not None:
        entries = torchvision.models.get_model_weights(name)
        published = entries[_tag(name, weights, entries.__name__, list(entries.__members__))]
        try:
            # The builder would unpickle the file in torch's cache; this ensures that it contains only tensors.
            published.get_state_dict(progress=True, check_hash=True, weights_only=True)
        except OSError as error:
            raise MimicError(_NOT_FETCHED.format(name=name, why=error, where=published.url)) from error
    model: nn.Module = torchvision.models.get_model(name, weights=published, **options)
    path, last = [(path, module) for path, module in model.named_modules() if not list(module.children())][-1]
    if type(last) is not nn.Linear:
        raise MimicError(
            f"`name`: {name!r} ends in a {type(last).__name__}; expected a linear layer, which is removed."
        )
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    entry = published or torchvision.models.get_model_weights(name).DEFAULT
    size = {"crop_size": options["image_size"], "resize_size": options["image_size"]} if "image_size" in options else {}
    model.make_published_transform = partial(entry.transforms, **size)  # type: ignore[assignment]
    return model


def timm_backbone(name: str, weights: str | None = None, **options: Any) -> nn.Module:
    """Create a timm model without its classifier.

    Args:
        name: Name listed by ``timm.list_models``, such as ``"vit_base_patch16_224"``, without a tag.
        weights: Tag of published weights, such as ``"augreg_in21k"``, or ``"DEFAULT"``; timm downloads them once.
            ``None``: random weights. For weights in a file use ``pretrained`` of
            :class:`~lightning_mimic.models.ImageClassifier`.
        options: Further arguments of ``timm.create_model``, such as ``in_chans`` and ``img_size``.

    Returns:
        A module from images ``(B, C, H, W)`` to features ``(B, D)``.

    Raises:
        MimicError: The name or tag is unknown, or the weights cannot be downloaded.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     timm_backbone("vit_base_patch16_224")(torch.zeros(2, 3, 224, 224)).shape
        torch.Size([2, 768])
    """
    with package_of_extra("a backbone of timm", "vision"):
        import timm

    plain, _, tag = name.partition(".")
    if not timm.is_model(plain):
        raise MimicError(f"`name`: timm has no model {plain!r}; {nearest_names(plain, timm.list_models())}.")
    if tag:
        raise MimicError(f"`name`: {name!r} includes a tag of weights; give name={plain!r} and weights={tag!r}.")
    if weights is None:
        model: nn.Module = timm.create_model(name, num_classes=0, **options)
        return _with_timm_transform(model, options)
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
    tag = _tag(name, weights, name, ["DEFAULT", *tags] if tags else [])
    full = name if tag == "DEFAULT" else f"{name}.{tag}"
    try:
        model = timm.create_model(full, pretrained=True, num_classes=0, **options)
    except OSError as error:
        published = timm.get_pretrained_cfg(full)
        where = f"model.safetensors of https://huggingface.co/{published.hf_hub_id if published else full}"
        raise MimicError(_NOT_FETCHED.format(name=name, why=error, where=where)) from error
    return _with_timm_transform(model, options)


def _with_timm_transform(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    settings = resolve_data_config(options, model=model)
    model.make_published_transform = partial(create_transform, **settings, is_training=False)  # type: ignore[assignment]
    return model


class SmallConvNet(nn.Module):
    """Small network of two convolutions whose flattened output is the features, optionally reduced by a linear layer.

    For 8 × 8 images and ``width=64`` there are 4,096 features, more than training images in the digits data, as is
    common with large backbones on small data.

    Args:
        width: Number of channels of the second convolution.
        channels: Number of channels of the image.
        features: Number of features to which the output is reduced, after pooling to 8 × 8; ``None``: no reduction.

    Example:
        >>> import torch
        >>> SmallConvNet(width=64)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 4096])
        >>> SmallConvNet(features=256)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 256])
    """

    def __init__(self, width: int = 64, channels: int = 1, features: int | None = None) -> None:
        super().__init__()
        reduction = (
            []
            if features is None
            else [nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(64 * width, features), nn.ReLU()]
        )
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, width, 3, padding=1),
            nn.ReLU(),
            *(reduction or [nn.Flatten()]),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the features, shape ``(B, width · H · W)`` or ``(B, features)``."""
        features: Tensor = self.layers(images)
        return features


_NOT_FETCHED = (
    "`weights` of {name!r} could not be downloaded ({why}). Download {where} on a machine with network access, and "
    "give the file's path as ImageClassifier's `pretrained`, without `weights`."
)


def _tag(name: str, weights: str, prefix: str, tags: Sequence[str]) -> str:
    """Return the tag, without its prefix if it is given with one, or raise an error if it is unknown."""
    tag = weights.removeprefix(f"{prefix}.")
    if tag not in tags:
        known = f"its tags are {', '.join(map(repr, tags))}" if tags else "it has no published weights"
        raise MimicError(
            f"`weights`: {name!r} has no weights {weights!r}; {known}. Give a file as ImageClassifier's `pretrained`."
        )
    return tag
