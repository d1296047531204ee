"""Pages of the API, one for each package: every name in its ``__all__``, read without importing it.

A name that several packages offer is documented once, in the package that defines it; the others link to it.
"""

from pathlib import Path

import griffe

from scripts.docs.docstrings import for_site

ROOT = Path(__file__).parents[2]
PACKAGE = "lightning_mimic"


def pages() -> dict[str, str]:
    """Return the pages' Markdown by path relative to docs/, with `api/SUMMARY.md` for the navigation."""
    package = griffe.load(PACKAGE, search_paths=[ROOT])
    rooms = {
        path: module
        for path, module in [(PACKAGE, package), *((each.path, each) for each in package.modules.values())]
        if module.is_init_module and module.exports
    }
    homes = _homes(rooms)
    made = {_page(path): _markdown(path, rooms[path], homes) for path in rooms}
    links = [f"* [{path}]({Path(_page(path)).name})" for path in [PACKAGE, *sorted(set(rooms) - {PACKAGE})]]
    return made | {"api/SUMMARY.md": "\n".join(links) + "\n"}


def _page(room: str) -> str:
    return "api/index.md" if room == PACKAGE else f"api/{room.rpartition('.')[2]}.md"


def _homes(rooms: dict[str, griffe.Module]) -> dict[str, str]:
    """Rooms that document a name, by the path of its definition: the one that defines it, or the first to offer it."""
    homes: dict[str, str] = {}
    for room, module in rooms.items():  # the package itself comes first
        for name in _names(module):
            defined = _defined(module, name)
            if defined not in homes or defined.startswith(f"{room}."):
                homes[defined] = room
    return homes


def _defined(module: griffe.Module, name: str) -> str:
    """The path of a name's definition; a function may have the name of the module that defines it."""
    member = module[name]
    return f"{member.canonical_path}.{name}" if member.is_module else member.canonical_path


def _names(module: griffe.Module) -> list[str]:
    return sorted((str(name) for name in module.exports or ()), key=str.lower)


def _markdown(room: str, module: griffe.Module, homes: dict[str, str]) -> str:
    here, elsewhere = [], []
    for name in _names(module):
        member, defined = module[name], _defined(module, name)
        if homes[defined] == room:
            path = defined if member.is_module else f"{room}.{name}"
            here.append(f"## ::: {path}\n{_remark(member)}")
        else:
            elsewhere.append(f"| [`{name}`][{defined}] | {_summary(member)} |\n")
    listed = "".join(["| name | |\n| --- | --- |\n", *elsewhere, "\n"]) if elsewhere else ""
    text = for_site(module.docstring.value) if module.docstring else ""
    return f"# {room}\n\n{text}\n\n{listed}" + "\n".join(here)


def _summary(member: griffe.Object | griffe.Alias) -> str:
    return for_site(member.docstring.value).partition("\n")[0] if member.docstring else ""


def _remark(member: griffe.Object | griffe.Alias) -> str:
    """The `#:` comment above a constant, which the parser of docstrings does not read."""
    target = member.final_target if isinstance(member, griffe.Alias) else member
    if not target.is_attribute or not target.lineno:
        return ""
    lines = Path(str(target.filepath)).read_text().splitlines()[: target.lineno - 1]
    comments = []
    while lines and lines[-1].startswith("#:"):
        comments.insert(0, lines.pop().removeprefix("#:").strip())
    return "\n" + " ".join(comments) + "\n"
