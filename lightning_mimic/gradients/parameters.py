"""Which parameters a score is taken over, chosen by name."""

import difflib
import fnmatch
from collections.abc import Iterable, Sequence

from torch import nn


def nearest_names(name: str, candidates: Iterable[str], count: int = 4) -> str:
    """The candidates most like ``name``, as a phrase for an error message.

    Example:
        >>> nearest_names("haed", ["head", "body"])
        "nearest: 'head'"
    """
    names = sorted(set(candidates))
    close = difflib.get_close_matches(name, names, n=count, cutoff=0.4)
    if close:
        return "nearest: " + ", ".join(repr(c) for c in close)
    shown = ", ".join(repr(c) for c in names[:count])
    return f"there are: {shown}" + (f" and {len(names) - count} more" if len(names) > count else "")


def select_parameters(module: nn.Module, patterns: str | Sequence[str]) -> dict[str, nn.Parameter]:
    """Chooses parameters of ``module`` by module path, parameter name or glob.

    Args:
        module: The module that is trained.
        patterns: A module path (``"head"``: every parameter below it), a parameter name
            (``"head.weight"``), a glob with ``*``, ``?`` or ``[...]`` (``"blocks.*.weight"``),
            or a list of these.

    Returns:
        Name to parameter, in the module's order, without repeats.

    Raises:
        ValueError: A pattern that matches nothing; the message has the nearest names.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> list(select_parameters(net, "2"))
        ['2.weight', '2.bias']
        >>> list(select_parameters(net, ["*.bias"]))
        ['0.bias', '2.bias']
    """
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    if not wanted:
        raise ValueError("`parameters` is empty; name a module ('head') or a parameter ('head.weight').")
    # remove_duplicate=False: a tied parameter must answer to each of its names.
    named = dict(module.named_parameters(remove_duplicate=False))
    modules = {name for name, _ in module.named_modules(remove_duplicate=False) if name}
    chosen: set[str] = set()
    for pattern in wanted:
        matches = {n for n in named if n == pattern or n.startswith(f"{pattern}.") or fnmatch.fnmatchcase(n, pattern)}
        if not matches:
            if pattern in modules:
                raise ValueError(f"`parameters`: the module {pattern!r} has no parameters of its own or below it.")
            hint = nearest_names(pattern, modules | named.keys())
            raise ValueError(
                f"`parameters`: {pattern!r} names no module and no parameter of {type(module).__name__}; {hint}."
            )
        chosen |= matches
    return {name: parameter for name, parameter in named.items() if name in chosen}


def owning_layer(module: nn.Module, names: Iterable[str]) -> tuple[str, nn.Module]:
    """The one layer that owns all the named parameters.

    Args:
        module: The module that is trained.
        names: Parameter names, as :func:`select_parameters` returns them.

    Returns:
        The layer's path within ``module`` and the layer.

    Raises:
        ValueError: The names belong to several layers, or a parameter is tied, so that the inputs and
            output gradients of one layer do not hold its whole gradient.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> owning_layer(net, ["2.weight", "2.bias"])
        ('2', Linear(in_features=3, out_features=2, bias=True))
    """
    names = list(names)
    paths = sorted({name.rpartition(".")[0] for name in names})
    if len(paths) > 1:
        shown = ", ".join(repr(p) for p in paths[:6]) + (" ..." if len(paths) > 6 else "")
        raise ValueError(
            f"`parameters` selects {len(paths)} layers ({shown}); the scores are taken from one layer's input and "
            "output gradient, so name one layer, usually the last one."
        )
    every = list(module.named_parameters(remove_duplicate=False))
    for name in names:
        parameter = module.get_parameter(name)
        aliases = [other for other, p in every if p is parameter and other != name]
        if aliases:
            raise ValueError(
                f"`parameters`: {name!r} is tied to {', '.join(map(repr, aliases))}; one layer's input and output "
                "gradient do not hold the whole gradient of a tied parameter. Name a layer that is not tied."
            )
    return paths[0], module.get_submodule(paths[0])
