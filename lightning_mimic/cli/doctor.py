"""``mimic-doctor``: print versions, devices and optional packages, for bug reports."""

import argparse
import importlib
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

_PACKAGE = "lightning-mimic"
#: Variables by which launchers tell a process its rank.
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_PROCID", "SLURM_NTASKS")
#: Extras that bring tools for development, or other extras.
_NOT_FOR_USERS = frozenset({"all", "dev", "docs", "paper", "test"})


def checkup() -> str:
    """Return versions, devices and optional packages as text.

    Packages are looked up in the metadata of the environment and not imported, except torch, for the devices; an error
    while it is imported is part of the text.

    Example:
        >>> print(checkup().splitlines()[0])
        lightning-mimic ...
    """
    lines = [f"{_PACKAGE} {_installed(_PACKAGE)}", f"python {platform.python_version()} ({sys.executable})"]
    lines += [f"system {platform.platform()}, {os.cpu_count()} cores", "", "required packages"]
    by_extra: dict[str, list[Requirement]] = {}
    for text in metadata.requires(_PACKAGE) or []:
        requirement = Requirement(text)
        extra = "" if requirement.marker is None else str(requirement.marker).partition("extra == ")[2].strip("\"'")
        if extra not in _NOT_FOR_USERS:
            by_extra.setdefault(extra, []).append(requirement)
    lines += _states(by_extra.pop("", []))
    for extra, requirements in sorted(by_extra.items()):
        lines += ["", f"optional packages of pip install '{_PACKAGE}[{extra}]'", *_states(requirements)]
    ranks = [f"{name}={os.environ[name]}" for name in _RANKS if name in os.environ]
    return "\n".join([*lines, "", *_devices(), f"ranks: {', '.join(ranks) or 'none set, one process'}"])


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _states(requirements: list[Requirement]) -> Iterator[str]:
    for requirement in sorted(requirements, key=lambda each: each.name.lower()):
        found = _installed(requirement.name)
        fits = found == "missing" or requirement.specifier.contains(found, prereleases=True)
        yield f"  {requirement.name} {found}{'' if fits else f'; {requirement.specifier} is needed'}"


def _devices() -> Iterator[str]:
    try:
        torch = importlib.import_module("torch")
        cuda = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
        yield f"cuda: {', '.join(cuda) or 'no device'} (torch is built for {torch.version.cuda or 'no CUDA'})"
        yield f"mps: {'available' if torch.backends.mps.is_available() else 'not available'}"
    except Exception as error:  # whatever is wrong with torch is what a report needs
        yield f"devices: torch cannot be used: {type(error).__name__}: {error}"


def main() -> None:
    """Print the checkup."""
    argparse.ArgumentParser("mimic-doctor", description="Print versions, devices and optional packages.").parse_args()
    sys.stdout.write(checkup() + "\n")


if __name__ == "__main__":
    main()
