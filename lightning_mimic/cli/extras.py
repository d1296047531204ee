"""Packages that the extras of this package bring, from its own metadata."""

from importlib import metadata

from packaging.requirements import Requirement

PACKAGE = "lightning-mimic"
#: Extras that bring tools for development, or other extras.
_NOT_FOR_USERS = frozenset({"all", "dev", "docs", "paper", "test"})
#: Names under which packages are imported, where these differ.
_IMPORTED_AS = {
    "mlflow-skinny": "mlflow",
    "open-clip-torch": "open_clip",
    "pillow": "PIL",
    "scikit-learn": "sklearn",
    "vl-convert-python": "vl_convert",
}


def requirements_by_extra() -> dict[str, list[Requirement]]:
    """Return what each extra for users requires; under ``""`` what the package itself requires.

    Example:
        >>> [each.name for each in requirements_by_extra()["s3"]]
        ['s3fs']
    """
    found: dict[str, list[Requirement]] = {}
    for text in metadata.requires(PACKAGE) or []:
        requirement = Requirement(text)
        extra = "" if requirement.marker is None else str(requirement.marker).partition("extra == ")[2].strip("\"'")
        if extra not in _NOT_FOR_USERS:
            found.setdefault(extra, []).append(requirement)
    return found


def extra_of(module: str) -> str | None:
    """Return the extra that brings a module, ``None`` if no extra does.

    Example:
        >>> extra_of("open_clip"), extra_of("duckdb"), extra_of("this")
        ('clip', 'curation', None)
    """
    for extra, requirements in requirements_by_extra().items():
        names = (each.name.lower().replace("_", "-") for each in requirements)
        if extra and module in [_IMPORTED_AS.get(name, name.replace("-", "_")) for name in names]:
            return extra
    return None
