"""``mimic-doctor``: print versions, devices and optional packages, for bug reports."""

import argparse
import importlib
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from lightning_mimic.cli.extras import PACKAGE, requirements_by_extra
from lightning_mimic.cli.help import version_text

#: Variables by which launchers tell a process its rank.
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_PROCID", "SLURM_NTASKS")


def checkup() -> str:
    """Return versions, devices and optional packages as text.

    Packages are looked up in the metadata of the environment and not imported, except torch, for the devices; an error
    while it is imported is part of the text.

    Example:
        >>> print(checkup().splitlines()[0])
        lightning-mimic ...
    """
    lines = [f"{PACKAGE} {_installed(PACKAGE)}", f"python {platform.python_version()} ({sys.executable})"]
    lines += [f"system {platform.platform()}, {os.cpu_count()} cores", "", "required packages"]
    by_extra = requirements_by_extra()
    lines += _states(by_extra.pop("", []))
    for extra, requirements in sorted(by_extra.items()):
        lines += ["", f"optional packages of pip install '{PACKAGE}[{extra}]'", *_states(requirements)]
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
    parser = argparse.ArgumentParser("mimic-doctor", description="Print versions, devices and optional packages.")
    parser.add_argument("--version", action="version", version=version_text())
    parser.parse_args()
    sys.stdout.write(checkup() + "\n")


if __name__ == "__main__":
    main()
