"""Published models of open_clip, loaded by name."""

from pathlib import Path

from torch import nn

from lightning_mimic.errors import ReferenceLoadError, nearest_names
from lightning_mimic.reference.archive import check_checkpoint
from lightning_mimic.reference.read import PUBLISHED


def open_clip_model(name: str, *, argument: str = "reference") -> nn.Module:
    """Return one of open_clip's models, with its weights.

    Args:
        name: ``open_clip:ARCHITECTURE/TAG``, such as ``"open_clip:ViT-B-32/datacomp_xl_s13b_b90k"``; the weights are
            fetched and kept by open_clip. A file's path may stand in the tag's place.
        argument: Name of the caller's argument that holds the name, for messages.

    Raises:
        ReferenceLoadError: An unknown architecture or tag (with the nearest ones), or weights that cannot be fetched
            or do not fit.

    Example:
        >>> open_clip_model("open_clip:ViT-B-33/openai")
        Traceback (most recent call last):
            ...
        lightning_mimic.errors.ReferenceLoadError: `reference`: open_clip has no architecture 'ViT-B-33'; ...
    """
    try:
        import open_clip
    except ModuleNotFoundError as error:
        raise ReferenceLoadError(
            f"`{argument}`: {name} needs the package open_clip: `pip install lightning-mimic[clip]`."
        ) from error
    architecture, _, tag = name.removeprefix(PUBLISHED).partition("/")
    if architecture not in (known := open_clip.list_models()):
        raise ReferenceLoadError(
            f"`{argument}`: open_clip has no architecture {architecture!r}; {nearest_names(architecture, known)}."
        )
    if not open_clip.is_pretrained_cfg(architecture, tag) and not Path(tag).is_file():
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        raise ReferenceLoadError(
            f"`{argument}`: open_clip has no weights {tag!r} for {architecture} ({nearest_names(tag, tags)}), and "
            f"there is no such file. Write {PUBLISHED}{architecture}/TAG."
        )
    try:
        # open_clip fetches the file once and keeps it; torch, which reads it, compares no checksums.
        kept = open_clip.download_pretrained(open_clip.get_pretrained_cfg(architecture, tag))
        check_checkpoint(Path(kept or tag), argument)
        model: nn.Module = open_clip.create_model(architecture, pretrained=tag, weights_only=True)
    except ReferenceLoadError:
        raise
    except Exception as error:  # its own, the hub's, torch's
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ReferenceLoadError(f"`{argument}`: {name} could not be loaded: {first}") from error
    return model
