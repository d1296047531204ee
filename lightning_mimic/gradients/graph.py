"""Analysis of the autograd graph: cuts between the loss and the parameters, and uses of parameters.

The graph is analysed before the backward pass; nothing here touches a gradient.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import nn
from torch.autograd.graph import GradientEdge, Node

from lightning_mimic.gradients.nodes import (
    EXCHANGED,
    in_same_order,
    is_contiguous_view,
    is_leaf,
    kind_of,
    leaf_below,
    shape_of,
)

_NORMS = ("BatchNorm", "BatchNormalization")


@dataclass(frozen=True)
class Terminal:
    """Where a parameter, after views and casts, enters an operation.

    Attributes:
        chain: The views and casts on the way, from the parameter on.
        node: The operation.
        argument: Which of its arguments it is.
    """

    chain: tuple[Node, ...]
    node: Node
    argument: int


class Graph:
    """The autograd graph below one node, walked once; lives as long as a step.

    Args:
        root: ``grad_fn`` of a loss or of any tensor above the parameters.

    Example:
        >>> import torch
        >>> weight = nn.Parameter(torch.ones(2, 2))
        >>> losses = (torch.ones(3, 2) @ weight).square().sum(1)
        >>> graph = Graph(losses.grad_fn)
        >>> [kind_of(end.node) for end in graph.terminals(weight)]
        ['Mm']
        >>> kind_of(graph.cuts(graph.leaves, samples=3)[-1].node)
        'Mm'
    """

    def __init__(self, root: Node) -> None:
        self.root = root
        self.parents: dict[Node, list[tuple[Node, int]]] = {root: []}
        finished: list[Node] = []
        stack: list[tuple[Node, bool]] = [(root, False)]
        opened: set[Node] = set()
        while stack:
            node, done = stack.pop()
            if done:
                finished.append(node)
                continue
            if node in opened:
                continue
            opened.add(node)
            stack.append((node, True))
            for argument, (child, _) in enumerate(node.next_functions):
                if child is not None:
                    self.parents.setdefault(child, []).append((node, argument))
                    if child not in opened:
                        stack.append((child, False))
        #: Every node, those nearer to the root first.
        self.order = finished[::-1]
        self.leaves = {node for node in finished if is_leaf(node)}
        self._leaf_of = {id(node.variable): node for node in self.leaves}  # type: ignore[attr-defined]
        self._terminals: dict[Node | None, list[Terminal]] = {}

    def __contains__(self, node: Node) -> bool:
        return node in self.parents

    def terminals(self, parameter: nn.Parameter) -> list[Terminal]:
        """Every operation that uses the parameter; none for a frozen or unused one."""
        leaf = self._leaf_of.get(id(parameter))
        if leaf in self._terminals:
            return self._terminals[leaf]
        found: list[Terminal] = []
        stack: list[tuple[Node, tuple[Node, ...]]] = [] if leaf is None else [(leaf, ())]
        while stack:
            node, chain = stack.pop()
            for parent, argument in self.parents[node]:
                if in_same_order(parent) or kind_of(parent) in EXCHANGED:
                    stack.append((parent, (*chain, parent)))
                else:
                    found.append(Terminal(chain, parent, argument))
        self._terminals[leaf] = found
        return found

    def shapes(self, node: Node) -> list[tuple[int, ...]]:
        """The shapes under which an operation's output is seen: its own and those of its views."""
        own, stack = shape_of(node), [node]
        found = [own]
        while stack:
            for parent, argument in self.parents[stack.pop()]:
                if kind_of(parent) == "CopySlices" and argument == 0:
                    stack.append(parent)  # what an in-place operation on a view has made of the output
                elif in_same_order(parent) or is_contiguous_view(parent, own):
                    found.append(shape_of(parent))
        return found

    def nodes_reaching(self, marks: Collection[Node]) -> set[Node]:
        """Return the nodes from which a mark is reached, the marks included."""
        leading = set(marks)
        for node in reversed(self.order):
            if any(child in leading for child, _ in node.next_functions):
                leading.add(node)
        return leading

    def deepest(self, marks: Collection[Node]) -> list[Node]:
        """The marks from which no other mark is reached: with their gradients, all marks' are computed."""
        marks, leading = set(marks), set[Node]()
        for node in reversed(self.order):
            if any(child in marks or child in leading for child, _ in node.next_functions):
                leading.add(node)
        return [mark for mark in marks if mark not in leading]

    def cuts(self, wanted: Collection[Node], samples: int) -> list[GradientEdge]:
        """The tensors with one row per sample through which every path from the root to ``wanted`` leads.

        None below the first parameter or normalisation over the batch: there the axes may mean something else.

        Args:
            wanted: Nodes of this graph.
            samples: Leading size that the tensors must have.

        Returns:
            Where their gradients arrive, from the root on.
        """
        leading = self.nodes_reaching(wanted)
        found: list[GradientEdge] = []
        ahead = {self.root}
        for node in self.order:
            if node not in leading:
                continue
            ahead.discard(node)
            one_output = not is_leaf(node) and len(node._input_metadata) == 1
            # All other paths have come together in this node.
            if not ahead and one_output and shape_of(node)[:1] == (samples,):
                found.append(GradientEdge(node, 0))
            if node in wanted or normalises_batch(node) or any(leaf_below(child) for child, _ in node.next_functions):
                break
            ahead |= {child for child, _ in node.next_functions if child in leading}
        return found


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


def uncovered_parameters(root: Node, gate: Node, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Return the trainable parameters that the loss reaches without passing the gate.

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


def used_beyond(root: Node, gate: Node, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Return the parameters that also meet data on a way that does not pass the gate.

    A regulariser does not count: a function of parameters alone, the scalar value of which is added to the loss. What
    cannot be seen to be one does count.

    Args:
        root: ``grad_fn`` of the loss or the losses.
        gate: ``grad_fn`` of the gated tensor.
        parameters: By name.

    Returns:
        Names, in the order of ``parameters``.
    """
    parents: dict[Node, list[Node]] = {}
    for node in walk(root, stop=gate):
        for child, _ in node.next_functions if node is not gate else ():
            if child is not None:
                parents.setdefault(child, []).append(node)
    leaves = {id(node.variable): node for node in parents if is_leaf(node)}  # type: ignore[attr-defined]
    around = {name: leaves[id(p)] for name, p in parameters.items() if id(p) in leaves}
    return [name for name, leaf in around.items() if not _regularises(leaf, parents)]


#: Operations element by element, in which an operand may be repeated.
ELEMENTWISE = ("Add", "Sub", "Rsub", "Mul", "Div", "Pow", "Where", "Maximum", "Minimum")
# Operations that look rows up for data.
_LOOK_UPS = ("Embedding", "EmbeddingBag", "Index", "IndexSelect", "Gather", "Take")


def _regularises(leaf: Node, parents: Mapping[Node, Sequence[Node]]) -> bool:
    """Whether everything made of a leaf is a function of parameters alone, until its value is added to the loss."""
    seen, stack = {leaf}, [leaf]
    while stack:
        for node in parents.get(stack.pop(), ()):
            if node in seen:
                continue
            seen.add(node)
            if _of_parameters_alone(node):
                stack.append(node)
            elif kind_of(node) not in ("Add", "Sub") or shape_of(node) != ():  # it is not a term of the total
                return False
    return True


def _of_parameters_alone(root: Node) -> bool:
    """Whether nothing below a node shows data: a contraction with a constant, a look-up, or a spread over rows."""
    for node in walk(root):
        if is_leaf(node):
            continue
        arguments = [child for child, _ in node.next_functions]
        shapes = [_shape(child) for child in arguments if child is not None]
        own = shape_of(node)
        if None in arguments and (kind_of(node) not in ELEMENTWISE or own not in shapes):
            return False
        if kind_of(node) in _LOOK_UPS or (len(shapes) == 1 and prod(own) > prod(shapes[0])):
            return False
    return True


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node.variable.shape) if is_leaf(node) else shape_of(node)  # type: ignore[attr-defined]


def is_compiled(node: Node) -> bool:
    """Whether torch.compile made the node, which can then be gone through only once."""
    return kind_of(node).startswith("CompiledFunction")


def normalises_batch(node: Node) -> bool:
    """Whether the node is a batch normalisation in training mode, which makes samples depend on each other."""
    if not any(norm in node.name() for norm in _NORMS) or not getattr(node, "_saved_training", True):
        return False
    inputs = getattr(node, "_saved_input", None)  # torch's own keeps it; SyncBatchNorm's does not show it
    return inputs is None or len(inputs) > 1  # instance normalisation runs as one batch row


def mixes_samples(root: Node, gate: Node) -> bool:
    """Whether a batch normalisation in training mode lies between the loss and the gate."""
    return any(normalises_batch(node) for node in walk(root, stop=gate) if node is not gate)
