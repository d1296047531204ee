"""Mutation check: break the package in one place at a time, and see whether its tests notice.

The faults of ``mutations.toml`` were picked by hand; every one must be caught by the tests that it names. Faults that
are generated (``--random``) may change nothing that anyone could observe, so their survivors are for people to look at.
All happens in a copy of the checkout, uncommitted changes included. Run it with the Python that runs the tests:

    python tests/mutations/run.py
    python tests/mutations/run.py --only ledger/ --out results.json
    python tests/mutations/run.py --random 100 --seed 20250101 --out results.json

Exit status: 0, all were caught (or generated); 1, some survived; 2, the result means nothing, because a snippet is not
found just once, the tests fail without any fault, or a fault prevents a test file from being collected.
"""

import argparse
import ast
import contextlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from textwrap import shorten
from typing import Any

from candidates import candidates

PASSED, FAILED = 0, 1  # pytest's exit codes
_BLAMED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)


@dataclass(frozen=True)
class Mutation:
    """One fault.

    Attributes:
        name: What is broken.
        file: Path in the checkout.
        start: Offset of the replaced text in the file.
        old: The text that is replaced.
        new: What takes its place.
        tests: Arguments of pytest that should catch it.
        line: Where the text starts, from 1.
    """

    name: str
    file: str
    start: int
    old: str
    new: str
    tests: tuple[str, ...]
    line: int


def read_list(root: Path, path: Path) -> tuple[list[Mutation], list[str]]:
    """Return the listed mutations, and what is wrong with the list."""
    found, problems, names = [], [], Counter[str]()
    for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mutation"]:
        name, file, old, new = (entry[key] for key in ("name", "file", "old", "new"))
        names[name] += 1
        text = (root / file).read_text(encoding="utf-8") if (root / file).is_file() else ""
        if text.count(old) != 1:
            problems.append(f"{name}: the snippet occurs {text.count(old)} times in {file}: {old!r}")
            continue
        if not compiles(changed := text.replace(old, new)) or changed == text:
            problems.append(f"{name}: {file} does not compile with {new!r}, or is the same")
        for test in entry["tests"]:
            path, _, function = test.partition("::")
            if not (root / path).is_file() or f"def {function}" not in (root / path).read_text(encoding="utf-8"):
                problems.append(f"{name}: there is no {test}")
        start = text.index(old)
        found.append(Mutation(name, file, start, old, new, tuple(entry["tests"]), text.count("\n", 0, start) + 1))
    return found, problems + [f"{name}: there are {count} of this name" for name, count in names.items() if count > 1]


def generate(root: Path, listed: Sequence[Mutation], count: int, seed: int) -> list[Mutation]:
    """Draw mutations from the files of the list, each with all tests that the list names for its file."""
    tests: dict[str, dict[str, None]] = {}
    for each in listed:
        tests.setdefault(each.file, {}).update(dict.fromkeys(each.tests))
    texts = {file: (root / file).read_text(encoding="utf-8") for file in sorted(tests)}
    places = [(file, place) for file, text in texts.items() for place in candidates(text)]
    random.Random(seed).shuffle(places)
    drawn: list[Mutation] = []
    for file, (start, old, new) in places:
        if len(drawn) == count:
            break
        if compiles(texts[file][:start] + new + texts[file][start + len(old) :]):
            line = texts[file].count("\n", 0, start) + 1
            name = f"{file}:{line}: {shorten(old, 80)} -> {shorten(new, 80)}"
            drawn.append(Mutation(name, file, start, old, new, tuple(tests[file]), line))
    return drawn


def compiles(text: str) -> bool:
    """Return whether a text is Python."""
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


class Copy:
    """A copy of a checkout, in which tests run.

    Args:
        root: The checkout.
        folder: Where the copy goes; made here.
        timeout: Seconds per test file after which a run of tests is stopped.
    """

    def __init__(self, root: Path, folder: Path, timeout: float) -> None:
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=root, capture_output=True, check=True).stdout.decode().split("\0")
        for name in filter(None, names):
            if (root / name).is_file():  # one that was deleted is listed until that is committed
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, folder / name)
        self.folder, self._timeout = folder, timeout
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONHASHSEED": "0"} | one_thread

    def check_import(self, package: str) -> None:
        """Stop unless the copy's package is the one that tests import, also those that start other processes."""
        command = [sys.executable, "-c", f"import {package}; print({package}.__file__)"]
        found = subprocess.run(command, cwd="/", env=self._environment, capture_output=True, text=True, check=True)
        if not Path(found.stdout.strip()).resolve().is_relative_to(self.folder.resolve()):
            sys.exit(f"the tests would import {found.stdout.strip()}, which is not the copy's")

    def run(self, tests: Sequence[str], *options: str) -> tuple[int | None, str, float]:
        """Run tests, and return pytest's exit code (``None``: stopped by the timeout), its output and the seconds."""
        command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "--durations=0"]
        started = time.perf_counter()
        process = subprocess.Popen(
            [*command, *options, *tests],
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the processes that tests start end with them
        )
        code: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=self._timeout * len(tests))
            code = process.returncode
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return code, process.communicate()[0].decode(errors="replace"), time.perf_counter() - started

    @contextlib.contextmanager
    def mutated(self, mutation: Mutation) -> Iterator[None]:
        """Break the package in one place within a block."""
        path = self.folder / mutation.file
        whole = path.read_text(encoding="utf-8")
        end = mutation.start + len(mutation.old)
        assert whole[mutation.start : end] == mutation.old
        self._write(path, whole[: mutation.start] + mutation.new + whole[end:])
        try:
            yield
        finally:
            self._write(path, whole)

    def judge(self, mutation: Mutation) -> dict[str, Any]:
        """Return what the tests make of a mutation.

        Returns:
            ``outcome``: caught, survived, timeout (which counts as caught) or not collected; ``by``: the first test
            that failed; ``seconds``.
        """
        with self.mutated(mutation):
            code, output, seconds = self.run(mutation.tests, "-x")
        blamed = _BLAMED.search(output)
        by = blamed[1] if blamed else output.strip().rpartition("\n")[2]
        outcome = {None: "timeout", PASSED: "survived", FAILED: "caught"}.get(code, "not collected")
        by = by if outcome in ("caught", "not collected") else ""
        return {"outcome": outcome, "by": by, "seconds": round(seconds, 1)}

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")
        # Of the same length and second, the compiled file would pass for that of this text.
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def judge_all(copies: Sequence[Copy], mutations: Sequence[Mutation]) -> list[dict[str, Any]]:
    """Judge every mutation, as many at a time as there are copies, and print each result when it is there."""
    free: SimpleQueue[Copy] = SimpleQueue()
    for copy in copies:
        free.put(copy)

    def judge(mutation: Mutation) -> dict[str, Any]:
        copy = free.get()
        try:
            result = copy.judge(mutation)
        finally:
            free.put(copy)
        by = f"  [{result['by'].rpartition('/')[2]}]" if result["by"] else ""
        print(f"{result['outcome']:13} {result['seconds']:6.1f} s  {mutation.name}{by}", flush=True)
        return asdict(mutation) | result

    with ThreadPoolExecutor(len(copies)) as pool:
        return list(pool.map(judge, mutations))


def main() -> int:
    """Run the check, and return the exit status."""
    here = Path(__file__).resolve()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=here.parents[2], help="the checkout; by default the script's own")
    parser.add_argument("--only", metavar="TEXT", default="", help="mutations whose name or file has this text")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many at a time, each in its own copy")
    parser.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="per test file")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--check", action="store_true", help="check the list and run nothing")
    parser.add_argument("--random", type=int, metavar="N", help="generate so many mutations instead")
    parser.add_argument("--seed", type=int, default=0, help="of those that are generated")
    options = parser.parse_args()
    root = options.root.resolve()

    mutations, problems = read_list(root, root / "tests" / "mutations" / "mutations.toml")
    if problems or options.check:
        print("\n".join([*problems, f"{len(mutations)} mutations, {len(problems)} problems"]))
        return 2 if problems else 0
    mutations = [each for each in mutations if options.only in each.name or options.only in each.file]
    if options.random is not None:
        mutations = generate(root, mutations, options.random, options.seed)
    if not mutations:
        print("no mutation was chosen")
        return 2
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copies = [Copy(root, Path(folder) / str(number), options.timeout) for number in range(options.jobs)]
        for package in sorted({Path(each.file).parts[0] for each in mutations}):
            copies[0].check_import(package)
        code, output, seconds = copies[0].run(sorted({test for each in mutations for test in each.tests}))
        if code != PASSED:
            print(f"{output}\nthe tests do not pass without any mutation, or took longer than --timeout")
            return 2
        print(f"the tests pass without any mutation in {seconds:.0f} s", flush=True)
        results = judge_all(copies, mutations)
    counts = Counter(result["outcome"] for result in results)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    if options.out is not None:
        facts = {"seed": None if options.random is None else options.seed, "outcomes": counts, "mutations": results}
        options.out.write_text(json.dumps(facts, indent=2), encoding="utf-8")
    if options.random is not None:
        return 0
    return 2 if counts["not collected"] else int(counts["survived"] > 0)


if __name__ == "__main__":
    sys.exit(main())
