"""Selection of the scored parameters by name."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from lightning_mimic.errors import MimicError, join_names, nearest_names


def select_parameters(module: nn.Module, patterns: str | Sequence[str]) -> dict[str, nn.Parameter]:
    """Chooses parameters of ``module`` by module path, parameter name or glob.

    Args:
        module: The module that is trained.
        patterns: ``"all"`` (every trainable parameter), a module path (``"head"``: every parameter below it), a
            parameter name (``"head.weight"``), a glob with ``*``, ``?`` or ``[...]`` (``"blocks.*.weight"``), any of
            these with ``!`` in front to leave them out (``"!*.pos_embed"``; alone, from all), or a list of these.

    Returns:
        Name to parameter, in the module's order; a tied parameter once, under the first of its names.

    Raises:
        MimicError: A pattern that matches nothing, or nothing is left; the message has the nearest names.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> list(select_parameters(net, "2"))
        ['2.weight', '2.bias']
        >>> list(select_parameters(net, ["*.bias"]))
        ['0.bias', '2.bias']
        >>> list(select_parameters(net, ["all", "!0"]))
        ['2.weight', '2.bias']
    """
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    if not given:
        raise MimicError("`parameters` is empty; name a module ('head'), a parameter ('head.weight') or 'all'.")
    wanted = [pattern for pattern in given if not pattern.startswith("!")] or ["all"]
    excluded = [pattern.removeprefix("!") for pattern in given if pattern.startswith("!")]
    # remove_duplicate=False: a tied parameter must answer to each of its names.
    named = dict(module.named_parameters(remove_duplicate=False))
    chosen = set().union(*(_matches(module, named, pattern) for pattern in wanted))
    left_out = {id(named[n]) for pattern in excluded for n in _matches(module, named, pattern)}
    parameters: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, parameter in named.items():
        if name in chosen and id(parameter) not in left_out | seen:
            parameters[name] = parameter
            seen.add(id(parameter))
    if not parameters:
        raise MimicError(f"`parameters`: nothing is left of {', '.join(map(repr, given))}.")
    return parameters


def named_parameters(module: nn.Module, patterns: str | Sequence[str]) -> set[str]:
    """Return the names of the parameters that patterns select otherwise than by ``"all"``.

    Args:
        module: The module that is trained.
        patterns: As :func:`select_parameters` takes them.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> sorted(named_parameters(net, ["all", "2"])), named_parameters(net, "!0")
        (['2.bias', '2.weight'], set())
    """
    given = [patterns] if isinstance(patterns, str) else patterns
    named = [pattern for pattern in given if pattern != "all" and not pattern.startswith("!")]
    return set(select_parameters(module, [*named, *(p for p in given if p.startswith("!"))])) if named else set()


def _matches(module: nn.Module, named: Mapping[str, nn.Parameter], pattern: str) -> set[str]:
    if pattern == "all":
        trainable = {name for name, parameter in named.items() if parameter.requires_grad}
        if not trainable:
            raise MimicError(f"`parameters`: no parameter of {type(module).__name__} is trainable.")
        return trainable
    matches = {n for n in named if n == pattern or n.startswith(f"{pattern}.") or fnmatch.fnmatchcase(n, pattern)}
    if matches:
        return matches
    modules = {name for name, _ in module.named_modules(remove_duplicate=False) if name}
    if pattern in modules:
        raise MimicError(f"`parameters`: the module {pattern!r} has no parameters of its own or below it.")
    hint = nearest_names(pattern, modules | named.keys())
    raise MimicError(f"`parameters`: {pattern!r} names no module and no parameter of {type(module).__name__}; {hint}.")


def owning_layer(module: nn.Module, names: Iterable[str]) -> tuple[str, nn.Module]:
    """The one layer that owns all the named parameters.

    Args:
        module: The module that is trained.
        names: Parameter names, as :func:`select_parameters` returns them.

    Returns:
        The layer's path within ``module`` and the layer.

    Raises:
        MimicError: The names belong to several layers.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> owning_layer(net, ["2.weight", "2.bias"])
        ('2', Linear(in_features=3, out_features=2, bias=True))
    """
    paths = sorted({name.rpartition(".")[0] for name in names})
    if len(paths) > 1:
        raise MimicError(
            f"`parameters` selects {len(paths)} layers ({join_names(paths)}), but the scorer needs one nn.Linear."
        )
    return paths[0], module.get_submodule(paths[0])
