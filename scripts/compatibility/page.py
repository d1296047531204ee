"""The page of docs/: a section for each library, and what was found for each of its cases."""

from collections.abc import Iterator, Mapping
from typing import Any

from scripts.compatibility.libraries import Library

_PLAIN = "the loss is not shown to be a plain mean over samples: "


def section(library: Library, found: Mapping[str, Any]) -> str:
    """Return a library's section as Markdown.

    Args:
        library: Its description.
        found: What :mod:`~scripts.compatibility.trial` has written, with ``facts``.
    """
    versions = ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items())
    lines = [f"## {library.title}", "", versions or "Not tried.", ""]
    if "error" in found:
        lines += [f"Cannot be run here: {found['error'].strip().splitlines()[-1]}", ""]
    cases = found.get("cases", [])
    if cases:
        lines += ["| module and loss | `parameters` | result | largest deviation |", "| --- | --- | --- | --- |"]
    for case in cases:
        lines += _rows(case)
    lines += ["", *_reasons(cases), *_remarks(cases), *_added(cases)]
    facts = "; ".join(f"{name}: {value}" for name, value in found["facts"].items())
    return "\n".join([*lines, f"<sub>{facts}</sub>"])


def counts(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of all libraries: how many choices of parameters work, need a line, or are refused.

    Args:
        found: By library's name.
    """
    lines = ["| library | works | needs lines | refused | wrong or failed |", "| --- | --- | --- | --- | --- |"]
    for name, each in found.items():
        trials = [trial for case in each.get("cases", []) for trial in case.get("trials", [])]
        words = [_word(trial) for trial in trials]
        failed = sum("error" in case for case in each.get("cases", [])) + ("error" in each)
        of = [words.count("works"), words.count("needs"), words.count("refused"), failed]
        of[3] += words.count("wrong") + words.count("fails")
        lines.append(f"| {name} | {' | '.join(map(str, of))} |")
    return "\n".join(lines)


def gist(reason: str) -> str:
    """Return the part of a sentence that says what was found."""
    if _PLAIN in reason:
        return "not shown to be a plain mean: " + reason.partition(_PLAIN)[2].partition(". Give the module")[0]
    first = reason.strip().splitlines()[0] if not reason.startswith("Traceback") else reason.strip().splitlines()[-1]
    first = first.partition(". Leave them out")[0].partition(". Average each")[0]
    return first if len(first) < 300 else f"{first[:300]} …"


def _word(trial: Mapping[str, Any]) -> str:
    return "needs" if trial["result"] == "refused" and trial["needs"] else trial["result"]


def _rows(case: Mapping[str, Any]) -> Iterator[str]:
    if "error" in case:
        yield f"| {case['name']} | | cannot be tried: {gist(case['error'])} | |"
        return
    for trial in case["trials"]:
        result = {"works": "works", "wrong": "**wrong**", "fails": "**fails**", "refused": "refused"}[trial["result"]]
        if _word(trial) == "needs":
            result = f"needs `{trial['needs']}`"
        if trial["training"]:
            result += ", not with batch statistics"
        deviation = "" if trial["deviation"] is None else f"{trial['deviation']:.0e}"
        parameters = '`"all"`' if trial["parameters"] == "all" else f"`{trial['parameters']}`"
        yield f"| {case['name']} | {parameters} | {result} | {deviation} |"


def _reasons(cases: list[Mapping[str, Any]]) -> Iterator[str]:
    """Every reason once, with the cases for which it was given."""
    found: dict[str, list[str]] = {}
    for case in cases:
        for trial in case.get("trials", []):
            for reason in filter(None, (trial["reason"], trial["training"])):
                names = found.setdefault(gist(reason), [])
                names += [case["name"]] if case["name"] not in names else []
    if found:
        yield from ("Why:", "")
        yield from (f"- {'; '.join(names)}: {reason}" for reason, names in found.items())
        yield ""


def _remarks(cases: list[Mapping[str, Any]]) -> Iterator[str]:
    for case in cases:
        if case.get("note"):
            yield from (f"{case['name']}: {case['note']}", "")


def _added(cases: list[Mapping[str, Any]]) -> Iterator[str]:
    """The lines that make cases work, each once."""
    for lines in dict.fromkeys(case["lines"] for case in cases if case.get("lines")):
        names = [case["name"] for case in cases if case.get("lines") == lines]
        yield from (f"What makes {'; '.join(names)} work:", "", "```python", lines.strip(), "```", "")
