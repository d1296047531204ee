"""An environment for each library: its own packages in front of those of the environment that is running."""

import importlib.metadata
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.compatibility.libraries import Library
from scripts.provenance import ROOT

#: A second one of these would take gigabytes, or not fit those of the base environment.
_BASE = ("torch", "torchvision", "lightning", "numpy")


class InstallError(Exception):
    """A library cannot be installed beside the base environment's packages."""


@contextmanager
def environment(library: Library, folder: Path) -> Iterator[Path]:
    """Install a library, and remove it in the end.

    Args:
        library: What is installed.
        folder: Of the environment; made, and removed.

    Yields:
        The environment's Python.

    Raises:
        InstallError: Some package cannot be installed, or would bring another torch.
    """
    if not library.packages and not library.alone:
        yield Path(sys.executable)
        return
    try:
        venv.create(folder, clear=True, with_pip=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "base.pth").write_text("\n".join(_package_folders()))
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(_installed()))
        python = folder / "bin" / "python"
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if library.packages:
            _run([*pip, "--constraint", str(constraints), *library.packages])
        if library.alone:
            _run([*pip, "--no-deps", *library.alone])
        if again := [name for name in _BASE if (packages / name).exists()]:
            raise InstallError(f"another {', '.join(again)} would be installed")
        yield python
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _package_folders() -> list[str]:
    own = [path for path in sys.path if path.rstrip("/").endswith(("site-packages", "dist-packages"))]
    return list(dict.fromkeys([*own, *(path for path in site.getsitepackages() if path not in own)]))


def _installed() -> list[str]:
    """The base environment's packages, so that none is replaced."""
    leave = ("pip", "setuptools", "lightning-mimic", "lightning_mimic")
    found = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    return [f"{name}=={version.partition('+')[0]}" for name, version in sorted(found.items()) if name not in leave]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise InstallError("; ".join(errors)[:400] or done.stderr[-400:])
