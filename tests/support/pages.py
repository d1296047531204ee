"""The code of Markdown pages: found, and run as a reader would type it.

A block of ``python`` runs in the page's own namespace. A block of ``console`` is read by bash, so that variables,
quotes and comments mean what they say; its ``mimic-`` commands then run in this process, which saves importing torch
for each.

Comments in a page steer this, and no reader sees them: ``<!-- not run: REASON -->`` before a block leaves it out, and
``<!-- setup python`` or ``<!-- setup console``, up to ``-->``, holds code that runs before the next block.
"""

import configparser
import importlib
import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]

_BLOCK = re.compile(
    r"^<!-- setup (?P<setup>python|console)\n(?P<hidden>.*?)^-->\n"
    r"|^(?:<!-- not run: (?P<reason>[^>]*) -->\n)?```(?P<kind>\w+)[^\n]*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# For every command of ours a function that writes down its folder and its words.
_SHELL = """set -aeu
[ -e {state} ] && . {state}
command_not_found_handle() {{ printf '%s\\0' "$PWD" "$@" >> {words}; printf '\\n' >> {words}; }}
PATH={path}
{code}
export -p > {state}
printf '%s' "$PWD" > {folder}
"""


@dataclass(frozen=True)
class Block:
    """A block of code.

    Args:
        kind: Its language.
        code: Its text.
        line: Line of the page on which it begins.
        not_run: Why it is not run; empty if it is.
    """

    kind: str
    code: str
    line: int
    not_run: str = ""


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page in their order."""
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        kind, code = (match["setup"], match["hidden"]) if match["setup"] else (match["kind"], match["code"])
        found.append(Block(kind, code, line, match["reason"] or ""))
    return found


def run_page(page: Path, state: Path, shorter: Sequence[str] = ()) -> None:
    """Run the blocks of a page once, in the current folder.

    Args:
        page: The page.
        state: Folder for what is kept between its console blocks.
        shorter: Words that are added to every ``mimic-train``.
    """
    start, names = Path.cwd(), {"__name__": "page"}
    handlers = list(logging.root.handlers)
    state.mkdir(exist_ok=True)
    try:
        for block in blocks(page):
            if block.not_run:
                continue
            if block.kind == "python":
                padded = "\n" * block.line + block.code
                exec(compile(padded, str(page), "exec"), names)
            elif block.kind == "console":
                _run_console(block, state, shorter)
    finally:
        os.chdir(start)
        logging.root.handlers[:] = handlers  # Hydra sets up its own


def _run_console(block: Block, state: Path, shorter: Sequence[str]) -> None:
    words = state / "words"
    words.unlink(missing_ok=True)
    # Without our own commands in its PATH, so that bash hands them to command_not_found_handle.
    script = _SHELL.format(
        state=state / "variables", words=words, folder=state / "folder", path="/usr/bin:/bin", code=block.code
    )
    subprocess.run(["bash", "-c", script], check=True)
    for line in words.read_text().split("\0\n") if words.exists() else []:
        if line:
            folder, *command = line.split("\0")
            os.chdir(folder)
            _run_command([*command, *(shorter if command[0] == "mimic-train" else ())])
    os.chdir((state / "folder").read_text())


def _run_command(words: Sequence[str]) -> None:
    assert words[0] in _entry_points(), f"{words[0]} is no command of this package"
    module, function = _entry_points()[words[0]].split(":")
    with mock.patch.object(sys, "argv", list(words)):
        try:
            getattr(importlib.import_module(module), function)()
        except SystemExit as end:
            if end.code:
                raise AssertionError(f"{' '.join(words)}: {end.code}") from None


def _entry_points() -> dict[str, str]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options.entry_points"]["console_scripts"].strip().splitlines()
    return dict(line.split(" = ") for line in lines)
