"""Match a reference's tensors to a model's parameters."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lightning_mimic.errors import ReferenceLoadError, nearest_names
from lightning_mimic.reference.weights import equal_tensors
from lightning_mimic.sharding import is_sharded

_log = logging.getLogger("lightning_mimic")

# Wrappers that put a segment of their own into names, anywhere.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def aliases_of(module: nn.Module) -> dict[str, list[str]]:
    """The other names of every tied parameter.

    Example:
        >>> first, second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> second.weight = first.weight
        >>> aliases_of(nn.Sequential(first, second))
        {'0.weight': ['1.weight'], '1.weight': ['0.weight']}
    """
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: [n for n in tied if n != name] for tied in names.values() if len(tied) > 1 for name in tied}


def match_reference(
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    aliases: Mapping[str, Sequence[str]] = MappingProxyType({}),
    *,
    argument: str = "reference",
) -> dict[str, Tensor]:
    """Finds the reference's tensor for each parameter, whatever prefix the names were saved under.

    A prefix (``model.``, ``module.`` ...) is dropped or added only if exactly one makes every name fit. One prefix is
    read as another (``backbone.`` as ``net.``), which is logged, only if exactly one such reading makes every name and
    shape fit, keeps the names of the layers, and concerns most of the reference.

    Args:
        tensors: The reference, as :func:`~lightning_mimic.reference.read_reference` returns it.
        parameters: Name to parameter of the model; the reference may hold more.
        aliases: Other names of tied parameters (:func:`aliases_of`); some formats keep only one of them.
        argument: Name of the caller's argument that holds the reference, for messages.

    Returns:
        The model's names to the reference's tensors; float16 and bfloat16 become float32.

    Raises:
        ReferenceLoadError: A name that is missing or fits twice, a shape that differs, a tensor that is not
            floating-point, has no data or is not finite, a parameter that is tied in the model but not there.

    Example:
        >>> saved = {"model.head.weight": torch.ones(1, 2, dtype=torch.float16)}
        >>> match_reference(saved, {"head.weight": torch.zeros(1, 2)})
        {'head.weight': tensor([[1., 1.]])}
    """
    cleaned: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = _unwrapped(name)
        if plain in cleaned and cleaned[plain] is not tensor:
            raise ReferenceLoadError(f"`{argument}` holds {plain!r} twice, once as {name!r}. Keep one of the two.")
        cleaned[plain] = tensor
    wanted = {name: _unwrapped(_stored(name, aliases.get(name, ()), cleaned)) for name in parameters}
    found = _names(cleaned, {plain: parameters[name] for name, plain in wanted.items()}, argument)
    for name, plain in wanted.items():
        for alias in map(_unwrapped, aliases.get(name, ())):
            other = found[plain].removesuffix(plain) + alias
            if other in cleaned and not equal_tensors(cleaned[other], cleaned[found[plain]]):
                raise ReferenceLoadError(
                    f"`{argument}`: {found[plain]!r} and {other!r} differ, but the model holds them as one tied "
                    "parameter. Both must come from the same architecture."
                )
    return {
        name: _checked(found[plain], cleaned[found[plain]], parameters[name], argument)
        for name, plain in wanted.items()
    }


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A short hash of named tensors, equal for equal names, shapes, dtypes and values.

    Example:
        >>> fingerprint({"w": torch.zeros(2)}) == fingerprint({"w": torch.ones(2)})
        False
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _stored(name: str, aliases: Sequence[str], tensors: Mapping[str, Tensor]) -> str:
    """The one of a tied parameter's names under which it was saved."""
    for candidate in (name, *aliases):
        plain = _unwrapped(candidate)
        if any(key == plain or key.endswith(f".{plain}") for key in tensors):
            return candidate
    return name


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _names(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], argument: str) -> dict[str, str]:
    """The model's names to the reference's, by one common prefix."""
    wanted = list(parameters)
    same = {name: name for name in wanted}
    if all(name in tensors for name in wanted):
        return same
    first = wanted[0]
    # A wrapper's prefix stands before most names; another branch that ends alike is not meant.
    longer = {key[: -len(first)] for key in tensors if key.endswith(f".{first}")}
    whole = {prefix for prefix in longer if all(prefix + name in tensors for name in wanted)}
    usual = {prefix for prefix in longer if 2 * sum(key.startswith(prefix) for key in tensors) >= len(tensors)}
    # Beside the usual one, another whole set that is no part of it (an averaged copy) may as well be meant.
    longer = usual | {p for p in whole if usual and not any(p.startswith(one) for one in usual)}
    shorter = {first[: -len(key)] for key in tensors if first.endswith(f".{key}")}
    fits = [{name: prefix + name for name in wanted} for prefix in sorted(longer)]
    fits += [
        {name: name.removeprefix(prefix) for name in wanted}
        for prefix in sorted(shorter)
        if all(name.startswith(prefix) for name in wanted)
    ]
    # The fit that finds most names is the one to speak of when something is missing.
    best = max([same, *fits], key=lambda fit: sum(key in tensors for key in fit.values()))
    fits = [fit for fit in fits if all(key in tensors for key in fit.values())]
    if len(fits) == 1:
        return fits[0]
    if fits:
        candidates = ", ".join(repr(fit[first]) for fit in fits)
        raise ReferenceLoadError(
            f"`{argument}`: {first!r} fits several of its tensors: {candidates}. Give a state dict that holds one of "
            "them under the model's name."
        )
    renamed = _renamed(tensors, parameters)
    if len(renamed) == 1:
        ((here, there), fit) = next(iter(renamed.items()))
        layers_agree = all("." in name.removeprefix(here) for name in wanted)
        if layers_agree and 2 * sum(key.startswith(there) for key in tensors) >= len(tensors):
            _log.info("`%s`: %r of it is read as the model's %r; every name and shape fits.", argument, there, here)
            return fit
    missing = next(key for key in best.values() if key not in tensors)
    nearest = nearest_names(missing, tensors)
    raise ReferenceLoadError(f"`{argument}` has no tensor for {missing!r}; {nearest}.{_renaming_hint(list(renamed))}")


def _renamed(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[tuple[str, str], dict[str, str]]:
    """Pairs of prefixes, the model's and the reference's, that make every name and shape fit, with what fits."""
    first = next(iter(parameters))
    found: dict[tuple[str, str], dict[str, str]] = {}
    parts = first.split(".")
    # The shortest of the model's prefixes: a longer one with the same effect is the same reading.
    for count in range(1, len(parts)):
        here, rest = ".".join(parts[:count]) + ".", ".".join(parts[count:])
        if not all(name.startswith(here) for name in parameters):
            break
        for there in sorted({key.removesuffix(rest) for key in tensors if key.endswith(f".{rest}")}):
            fit = {name: there + name.removeprefix(here) for name in parameters}
            fits = all(key in tensors and tensors[key].shape == parameters[name].shape for name, key in fit.items())
            if fits and fit not in found.values():
                found[here, there] = fit
    return found


def _renaming_hint(prefixes: list[tuple[str, str]]) -> str:
    if not prefixes:
        return ""
    here, there = prefixes[0]
    same = ", ".join(f"{there!r} were {here!r}" for here, there in prefixes[:4])
    renamed = f"{{{here!r} + k.removeprefix({there!r}): t for k, t in state_dict.items() if k.startswith({there!r})}}"
    several = "one of these were the same: " if len(prefixes) > 1 else ""
    return f" Every name and shape would fit if {several}{same}. If so, give the state dict renamed: `{renamed}`."


def _checked(name: str, tensor: Tensor, parameter: Tensor, argument: str) -> Tensor:
    if tensor.shape != parameter.shape:
        raise ReferenceLoadError(
            f"`{argument}`: {name!r} has shape {tuple(tensor.shape)}, the model's has {tuple(parameter.shape)}. Both "
            "must come from the same architecture and number of classes."
        )
    if is_sharded(tensor):
        raise ReferenceLoadError(
            f"`{argument}`: {name!r} is a DTensor, of which this process may hold a part only; expected whole "
            "tensors, as `get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))` gives them."
        )
    if tensor.is_meta or tensor.is_quantized or not tensor.is_floating_point():
        kind = "on the meta device, without data" if tensor.is_meta else f"of dtype {tensor.dtype}"
        raise ReferenceLoadError(f"`{argument}`: {name!r} is {kind}; expected a floating-point tensor.")
    if tensor.layout != torch.strided:
        raise ReferenceLoadError(f"`{argument}`: {name!r} has the layout {tensor.layout}; expected a dense tensor.")
    # A copy: the reference must stay where it is when the module that it came from moves on.
    tensor = tensor.detach().clone() if tensor.dtype == torch.float64 else tensor.detach().to(torch.float32, copy=True)
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ReferenceLoadError(
            f"`{argument}`: {name!r} holds {bad} of {tensor.numel()} values that are NaN or infinite; this checkpoint "
            "is damaged or its training diverged. Give another."
        )
    return tensor
