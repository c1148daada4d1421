"""Sets of real numbers (intervals, unions, inequalities in one variable), compared by membership.

Between two neighbouring ends nothing changes, so two sets are equal if they agree at every end,
between every two neighbours, and beyond the outermost.
"""

from collections.abc import Iterator
from itertools import pairwise, repeat

from .evaluate import NEGLIGIBLE, Undecided, crossings, symbols, value
from .tree import Node

OPERATIONS = ("cup", "cap", "minus", "such")
MAX_ENDS, MAX_SIDES = 200, 4
_SUBSETS = {"list": ("rel", "group"), "set": ("rel",)}  # in braces, (1, 2) is a point
_NUMBERS = frozenset({"set:R"})


def same(a: Node, b: Node) -> bool:
    """Whether two regions hold the same real numbers.

    Raises:
        Undecided: if an end isn't a number, or a side is no region of the real line.
    """
    names = [symbols(a), symbols(b)]
    if max(map(len, names)) > 1:
        raise Undecided("not one variable")
    if all(names) and names[0] != names[1]:
        return False
    ends = sorted({*_ends(a), *_ends(b)})
    if len(ends) > MAX_ENDS:
        raise Undecided("too many ends")
    between = [(low + high) / 2 for low, high in pairwise(ends)]
    outside = [ends[0] - 1, ends[-1] + 1] if ends else [0]
    return all(_holds(a, x) == _holds(b, x) for x in [*ends, *between, *outside])


def is_region(node: Node) -> bool:
    """Whether a tree can only be a set of numbers, unlike (1, 2), which may be a point."""
    return node.op in OPERATIONS or (node.op == "sym" and node.args[0] in _NUMBERS)


def parts(node: Node) -> Iterator[Node]:
    """The operands of nested operations of one kind."""
    for arg in node.args:
        if arg.op == node.op:
            yield from parts(arg)
        else:
            yield arg


def near(a, b) -> bool:
    """Equal but for rounding errors."""
    return a == b or abs(a - b) <= NEGLIGIBLE * max(1, min(abs(a), abs(b)))


def _real(node: Node):
    number = value(node)
    if getattr(number, "imag", 0) != 0:
        raise Undecided("a complex end")
    return number.real


def _ends(node: Node) -> Iterator:
    """The finite numbers where membership may change."""
    if node.op in OPERATIONS:
        for arg in node.args:
            yield from _ends(arg)
    elif node.op in ("list", "set"):
        for item in node.args:
            yield from _ends(item) if item.op in _SUBSETS[node.op] else [_real(item)]
    elif node.op == "group" and len(node.args) == 4:
        yield from (end for end in map(_real, node.args[2:]) if abs(end) < float("inf"))
    elif node.op == "rel":
        yield from _relation_ends(node)
    elif not (node.op == "sym" and node.args[0] in _NUMBERS):
        raise Undecided(f"{node.op} is no region")


def _relation_ends(node: Node) -> Iterator:
    sides = node.args[1:]
    if len(symbols(node)) != 1 or len(sides) > MAX_SIDES:
        raise Undecided("not one variable, or too long a chain")
    for operator, left, right in zip(node.args[0], sides[:-1], sides[1:], strict=True):
        if operator in ("in", "notin"):
            if left.op != "sym":
                raise Undecided("not a variable")
            yield from _ends(right)
        else:
            if not symbols(left) | symbols(right):
                raise Undecided("a part that says nothing")
            yield from crossings(Node("add", (left, Node("neg", (right,)))), *symbols(node))


def _holds(node: Node, x) -> bool:
    """Whether the number ``x`` is in the region."""
    if node.op == "minus":
        return _holds(node.args[0], x) and not _holds(node.args[1], x)
    if node.op in ("cap", "such"):
        return all(_holds(arg, x) for arg in node.args)
    if node.op in ("cup", "list", "set"):
        kinds = _SUBSETS.get(node.op)
        return any(
            _holds(item, x) if not kinds or item.op in kinds else near(_real(item), x)
            for item in node.args
        )
    if node.op == "group":
        opener, closer, low, high = node.args
        left, right = "<=" if opener == "[" else "<", "<=" if closer == "]" else "<"
        return _compare(left, _real(low), x) and _compare(right, x, _real(high))
    if node.op == "rel":
        return all(map(_satisfied, node.args[0], node.args[1:], node.args[2:], repeat(x)))
    return True


def _satisfied(operator: str, left: Node, right: Node, x) -> bool:
    if operator in ("in", "notin"):
        return _holds(right, x) == (operator == "in")
    sides = (value(side, dict.fromkeys(symbols(side), x)) for side in (left, right))
    return _compare(operator, *sides)


def _compare(operator: str, a, b) -> bool:
    equal = near(a, b)
    if operator in ("=", "!="):
        return equal == (operator == "=")
    return operator in ("<=", ">=") if equal else (a < b) == (operator in ("<", "<="))
