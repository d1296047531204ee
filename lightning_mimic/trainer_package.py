"""The package that Lightning comes from: ``lightning`` or ``pytorch_lightning``, which are two sets of classes.

Base classes are those of ``lightning``, or of ``pytorch_lightning`` where it is the only one that is installed.
Lightning calls hooks by name, so one callback serves the trainers of both; classes that it compares are those of the
trainer's own package.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning.pytorch as pl
else:
    try:
        import lightning.pytorch as pl
    except ModuleNotFoundError as error:
        if error.name not in ("lightning", "lightning.pytorch"):
            raise
        import pytorch_lightning as pl

__all__ = ["fabric_of", "package_of", "pl"]

_FABRIC = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}


def package_of(trainer: object) -> Any:
    """Return the package of a trainer.

    Args:
        trainer: A ``Trainer`` of either package, or of a class derived from it.

    Returns:
        ``lightning.pytorch`` or ``pytorch_lightning``.

    Raises:
        TypeError: It is no Trainer of Lightning's.

    Example:
        >>> package_of(pl.Trainer(accelerator="cpu", logger=False)) is pl
        True
    """
    for kind in type(trainer).__mro__:
        for package in _FABRIC:
            if kind.__module__ == f"{package}.trainer.trainer":
                return importlib.import_module(package)
    name = f"{type(trainer).__module__}.{type(trainer).__name__}"
    raise TypeError(f"the trainer is a {name}; expected the Trainer of `lightning` or of `pytorch_lightning`.")


def fabric_of(package: ModuleType) -> Any:
    """Return the package of Lightning Fabric that belongs to one of the two packages."""
    return importlib.import_module(_FABRIC[package.__name__])
