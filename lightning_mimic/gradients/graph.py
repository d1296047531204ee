"""Questions to the autograd graph: is a tensor a cut, and is the loss a plain mean over samples?

They are asked before the backward pass and never touch a gradient: :func:`targets_left_out` at every step, the
others once per epoch.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

# Nodes that hand a parameter on unchanged, to which autocast or a transpose may lead.
_PASSED_ON = ("TBackward", "ToCopyBackward", "TransposeBackward", "PermuteBackward", "ViewBackward", "AliasBackward")
_NORMS = ("BatchNormBackward", "BatchNormalizationBackward")
_MEAN, _SUM = 1, 2  # torch's codes for a loss's reduction


def walk(root: Node, stop: Node | None = None) -> Iterator[Node]:
    """Every node reachable from ``root``, itself included, without going through ``stop``."""
    seen: set[Node] = {root}
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        if node is stop:
            continue
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)


def reaches(root: Node, target: Node) -> bool:
    """Whether the gradient of ``root`` arrives at ``target``."""
    return any(node is target for node in walk(root))


def escaping_parameters(root: Node, gate: Node, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Trainable parameters that the loss reaches without passing the gate.

    The gate's weights reach everything exactly when this list is empty: the gated tensor is then a *cut*.

    Args:
        root: ``loss.grad_fn``.
        gate: ``grad_fn`` of the gated tensor, taken where that tensor was made (a later in-place operation
            replaces it).
        parameters: Names for the message.

    Returns:
        Sorted names.
    """
    names = {id(p): name for name, p in parameters.items()}
    reached = {id(v) for node in walk(root, stop=gate) if (v := getattr(node, "variable", None)) is not None}
    return sorted(names.get(i, "a tensor outside the module") for i in reached)


def uses(root: Node, parameter: nn.Parameter) -> int:
    """How often ``parameter`` is used in the graph below ``root``; 0 for a frozen or unused one."""
    parents: dict[Node, list[Node]] = defaultdict(list)
    leaf: Node | None = None
    for node in walk(root):
        if getattr(node, "variable", None) is parameter:
            leaf = node
        for child, _ in node.next_functions:
            if child is not None:
                parents[child].append(node)
    if leaf is None:
        return 0
    while len(parents[leaf]) == 1 and parents[leaf][0].name().startswith(_PASSED_ON):
        leaf = parents[leaf][0]
    return len(parents[leaf])


def used_beyond(root: Node, gate: Node, parameter: nn.Parameter) -> bool:
    """Whether ``parameter`` also meets data on a way that does not pass the gate.

    A regulariser, which sees the parameter alone, does not count.
    """

    def is_parameter(node: Node) -> bool:
        while node.name().startswith(_PASSED_ON) and node.next_functions[0][0] is not None:
            node = node.next_functions[0][0]
        return getattr(node, "variable", None) is parameter

    for node in walk(root, stop=gate):
        children = [child for child, _ in node.next_functions if child is not None and node is not gate]
        others = [child for child in children if not is_parameter(child)]
        if len(others) < len(children) and any(
            n is gate or getattr(n, "variable", None) is not None for child in others for n in walk(child)
        ):
            return True
    return False


def mixes_samples(root: Node, gate: Node) -> bool:
    """Whether a batch normalisation in training mode lies between the loss and the gate."""
    return any(
        any(norm in node.name() for norm in _NORMS)
        and getattr(node, "_saved_training", True)
        and len(node._saved_input) > 1  # type: ignore[attr-defined]  # instance normalisation runs as one batch row
        for node in walk(root, stop=gate)
    )


def not_a_plain_mean(root: Node, gate: Node) -> str | None:
    """Says why the loss is not a plain mean of per-sample losses, where torch's loss nodes show it.

    A sum that was written by hand does not show.

    Returns:
        The reason as a phrase, or ``None`` where nothing speaks against it.
    """
    for node, reduction in _reductions(root, gate):
        if reduction == _SUM:
            return f"{node.name().removesuffix('Backward0')} sums over the batch (reduction='sum')"
        if reduction == _MEAN and node.name().startswith("NllLoss") and node._saved_weight is not None:  # type: ignore[attr-defined]
            return "it divides by the sum of its class weights"
    left_out = int(targets_left_out(root, gate))
    return f"it left out {left_out} targets (ignore_index)" if left_out else None


def targets_left_out(root: Node, gate: Node) -> Tensor:
    """How many targets an averaging cross-entropy between the loss and the gate did not count, a scalar.

    Stays on the device, so that it can be asked at every step and looked at later.
    """
    left_out = torch.zeros(())
    for node, reduction in _reductions(root, gate):
        if reduction == _MEAN and node.name().startswith("NllLoss") and node._saved_weight is None:  # type: ignore[attr-defined]
            left_out = node._saved_target.numel() - node._saved_total_weight  # type: ignore[attr-defined]
    return left_out


def _reductions(root: Node, gate: Node) -> Iterator[tuple[Node, int]]:
    """The loss nodes of torch on the way to the gate; a regulariser beside it may be reduced as it likes."""
    for node in walk(root, stop=gate):
        reduction = getattr(node, "_saved_reduction", None)
        if reduction is not None and reaches(node, gate):
            yield node, reduction
