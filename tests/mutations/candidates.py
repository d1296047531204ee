"""Places in a source text where a small change makes a fault, for the generated mutations."""

import ast
from collections.abc import Callable, Iterator

Place = tuple[int, str, str]
Span = Callable[[ast.AST], tuple[int, int]]

_SWAPPED = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.BitAnd: ("&", "|"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}
#: Methods that return what they are called on, in other memory or without its history.
_KEEP_VALUES = ("detach", "clone", "contiguous", "float", "copy")


def candidates(text: str) -> list[Place]:
    """Return places as offset, text and what takes its place, in the order of the text.

    Messages of errors and f-strings are left out; some changes break the syntax, and some change nothing.

    Example:
        >>> candidates("x = a.detach() + 1")
        [(4, 'a.detach()', 'a'), (4, 'a.detach() + 1', 'a.detach() - 1'), (17, '1', '2')]
    """
    lines = [0]
    for line in text.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))

    def at(line: int, column: int) -> int:  # ast counts columns in bytes
        begun = text[lines[line - 1] : lines[line]].encode()[:column]
        return lines[line - 1] + len(begun.decode())

    def span(node: ast.AST) -> tuple[int, int]:
        return at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset)

    found = []
    for node in _walk(ast.parse(text)):
        for old, new in _changes(node, text, span):
            found.append((span(node)[0], old, new))
    return sorted(found)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.JoinedStr | ast.Raise | ast.Assert):
            yield from _walk(child)


def _changes(node: ast.AST, text: str, span: Span) -> Iterator[tuple[str, str]]:
    """Yield the node's text, and what it becomes."""
    match node:
        case (
            ast.Compare(left=left, ops=[op], comparators=[right])
            | ast.BinOp(left=left, op=op, right=right)
            | ast.BoolOp(op=op, values=[left, right, *_])
        ) if type(op) in _SWAPPED:
            (start, end), a, b = span(node), span(left)[1], span(right)[0]
            yield text[start:end], text[start:a] + text[a:b].replace(*_SWAPPED[type(op)], 1) + text[b:end]
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            old = text[slice(*span(node))]
            yield old, old.removeprefix("not").removeprefix("-").lstrip()
        case ast.Constant(value=bool() as value):
            yield str(value), str(not value)
        case ast.Constant(value=int() | float() as value):
            yield text[slice(*span(node))], repr(value + 1 if isinstance(value, int) else 2 * value or 1.0)
        case ast.Call(func=ast.Attribute(value=inner, attr=attr), args=[]) if attr in _KEEP_VALUES:
            yield text[slice(*span(node))], text[slice(*span(inner))]
        case ast.Call(args=[ast.Name() | ast.Attribute() as first, ast.Name() | ast.Attribute() as second, *_]):
            start, (a, b), (c, d), end = span(node)[0], span(first), span(second), span(node)[1]
            yield text[start:end], text[start:a] + text[c:d] + text[b:c] + text[a:b] + text[d:end]
        case ast.If(test=test, body=[ast.Raise()], orelse=[]):  # what is refused is accepted
            start, (a, b) = span(node)[0], span(test)
            yield text[start:b], text[start:a] + "False"
