"""Construction of the data module and the model of a configuration; each completes missing settings of the other."""

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_mimic.data.transforms import paper_transform
from lightning_mimic.errors import MimicError
from lightning_mimic.models.backbones import published_transform

#: Height and width of images for a backbone that was not published with a size.
SMALL_SIZE = 32


def build(config: DictConfig) -> tuple[Any, Any]:
    """Build the data module and the model.

    Settings that are null are completed: ``data.transform`` by the model's backbone, ``model.num_classes`` and
    ``model.image_shape`` by the data.

    Args:
        config: With ``data`` and ``model``, whose ``num_classes`` and ``image_shape`` are set in place.

    Returns:
        The data module and the model.

    Raises:
        MimicError: A setting is null and cannot be taken from the data, or it differs from the data.
    """
    data = instantiate(config.data)
    if "backbone" not in config.model:
        return data, instantiate(config.model)
    backbone = instantiate(config.model.backbone)
    if OmegaConf.select(config, "data.transform", default=...) is None:
        data.transform = published_transform(backbone) or paper_transform(SMALL_SIZE)
    names = [name for name in ("num_classes", "image_shape") if name in config.model]
    for name in names:
        config.model[name] = _agreed(name, config.model[name], getattr(data, name, None))
    return data, instantiate(config.model, backbone=backbone)


def _agreed(name: str, given: Any, of_data: Any) -> Any:
    """Return a setting of the model, which must be that of the data where both are known."""
    given, known = (
        list(each) if isinstance(each, tuple) or OmegaConf.is_list(each) else each for each in (given, of_data)
    )
    if given is None and known is None:
        raise MimicError(f"`model.{name}` is null and cannot be taken from the data; give model.{name}=...")
    if given is not None and known is not None and given != known:
        raise MimicError(
            f"`model.{name}` is {given}, and that of the data is {known}. Leave model.{name} out; it is then taken "
            "from the data."
        )
    return known if given is None else given
