"""Package fronts whose names are imported when they are first used."""

import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_mimic.errors import nearest_names


def lazy_front(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and ``__dir__`` of a package whose names are imported when they are first used.

    A public name must not be that of a submodule: whoever imports the submodule would replace it.

    Args:
        package: Name of the package.
        names: Public names by the module that defines them.

    Returns:
        The two functions, to be assigned at the package's top level. The package's modules are attributes, too.

    Example:
        >>> get, names = lazy_front("lightning_mimic", {"lightning_mimic.errors": ["MimicError"]})
        >>> get("MimicError").__module__
        'lightning_mimic.errors'
        >>> get("MimikError")
        Traceback (most recent call last):
            ...
        AttributeError: module 'lightning_mimic' has no attribute 'MimikError'; nearest: 'MimicError'...
    """
    sources = {name: module for module, found in names.items() for name in found}

    def submodules() -> list[str]:
        return [each.name for each in pkgutil.iter_modules(sys.modules[package].__path__)]

    def get(name: str) -> Any:
        if name in sources:
            value = getattr(importlib.import_module(sources[name]), name)
            setattr(sys.modules[package], name, value)
            return value
        if name.startswith("_"):  # asked for by import, inspect and copy
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        modules = submodules()
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(
            f"module {package!r} has no attribute {name!r}; {nearest_names(name, [*sources, *modules])}"
        )

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *sources, *submodules()})

    return get, listed
