"""The public names and their signatures are those of tests/data/public_api.txt; a change there is a change for users.

``python tests/test_public_api.py`` writes the file anew.
"""

import importlib
import inspect
import pkgutil
from pathlib import Path

import lightning_mimic

SNAPSHOT = Path(__file__).parent / "data" / "public_api.txt"


def public_modules():
    """The package and its rooms that have ``__all__``."""
    yield "lightning_mimic"
    for each in pkgutil.iter_modules(lightning_mimic.__path__, "lightning_mimic."):
        module = importlib.import_module(each.name)
        if each.ispkg and hasattr(module, "__all__"):
            yield each.name


def described():
    """A line for each public name: arguments of functions and classes, public members of classes."""
    lines = []
    for module in sorted(public_modules()):
        imported = importlib.import_module(module)
        for name in sorted(imported.__all__):
            lines += _described(f"{module}.{name}", getattr(imported, name))
    return lines


def _described(name, thing):
    if not callable(thing) or not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return [f"{name}: {type(thing).__name__}"]
    lines = [name + arguments(thing)]
    if inspect.isclass(thing) and not issubclass(thing, Exception):
        for member, value in sorted(vars(thing).items()):
            if member.startswith("_"):
                continue
            plain = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            lines.append(f"  .{member}{arguments(plain) if inspect.isfunction(plain) else ''}")
    return lines


def arguments(thing):
    """Names, kinds and defaults; annotations are written differently by Python's versions."""
    try:
        signature = inspect.signature(thing)
    except ValueError:  # written in C
        return "(...)"
    # A default that is an object has its address in its text.
    kept = [p.replace(annotation=p.empty, default=shown(p)) for p in signature.parameters.values()]
    return str(signature.replace(parameters=kept, return_annotation=signature.empty))


PLAIN = str | int | float | bool | tuple | None


def shown(parameter):
    default = parameter.default
    return default if default is parameter.empty or isinstance(default, PLAIN) else "..."


def test_public_names_and_signatures_are_the_recorded_ones():
    recorded = SNAPSHOT.read_text().splitlines()
    assert described() == recorded, (
        "The public API has changed. If that is meant: CONTRIBUTING.md has the rules for names that go, CHANGELOG.md "
        "needs a line, and `python tests/test_public_api.py` records it."
    )


def test_every_documented_front_has_all():
    assert {"lightning_mimic", "lightning_mimic.scorers", "lightning_mimic.curation"} <= set(public_modules())


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(described()) + "\n")
