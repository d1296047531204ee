"""Where figures come from: machine, versions, commit and command; and their section of a page of docs/."""

import datetime
import functools
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import lightning as L
import torch

ROOT = Path(__file__).parents[1]


def facts(module: str) -> dict[str, str]:
    """What must be known to obtain the figures again.

    Args:
        module: That was run, such as ``"scripts.studies"``.
    """
    return {
        "machine": machine(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, lightning {L.__version__}",
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "command": f"`{shlex.join(['python', '-m', module, *sys.argv[1:]])}`",
    }


def machine() -> str:
    """Processor, cores and GPU."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{names[0] if names else platform.processor() or 'CPU'}, {len(os.sched_getaffinity(0))} cores, {gpu}"


@functools.cache  # of the code that this process runs, whatever is checked out later
def commit() -> str:
    """The commit of this code, and whether it has been changed since; without Git, the package's version."""
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, check=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        from lightning_mimic import __version__

        return f"release {__version__}"
    return name.stdout.strip() + (" and changes that are not committed" if changed.stdout else "")


def write_section(page: Path, name: str, text: str) -> None:
    """Replace one section of a Markdown page, between two comments that name it, or append it.

    Args:
        page: Made if need be; all else of it stays.
        name: Of the section.
        text: Markdown.
    """
    first, last = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    section = f"{first}\n\n{text.strip()}\n\n{last}"
    before = page.read_text() if page.exists() else ""
    if first in before:
        head, _, rest = before.partition(first)
        after = head + section + rest.partition(last)[2]
    else:
        after = f"{before.rstrip()}\n\n{section}\n".lstrip()
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(after)
