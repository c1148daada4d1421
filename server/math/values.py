"""Two expressions, compared by value, with the conventions of per cent signs and decimals.

* ``75%`` equals both ``75`` and ``0.75``, but ``1/2`` isn't ``1/2%``.
* A degree sign may be missing on one side.
* A decimal of at least six significant digits equals the exact value it abbreviates, that is,
  one less than one unit in its last place away. So 0.333333 is 1/3, and 0.33 isn't.
"""

from collections.abc import Iterator
from fractions import Fraction

from . import constants
from .evaluate import INFINITY, Undecided, equal, exact, find, has, symbols, value
from .tree import Node, number, rewritten

MIN_SIGNIFICANT, MIN_PLACES = 6, 4
FLOAT_DIGITS = 16  # the last one of a printed float is rounding


def same_values(a: Node, b: Node) -> bool:
    """Whether two expressions have the same value, percent signs and decimals understood."""
    if any(side.op == "ratio" and len(side.args) > 2 for side in (a, b)):
        return a.op == b.op and _same_ratios(a, b)
    endless = [any(s.args[2] == INFINITY for s in find(side, "sum")) for side in (a, b)]
    if any(endless):
        alike = all(endless) and equal(a, b)  # in their first terms
        if not alike and not (all(endless) and symbols(a)):
            raise Undecided("no sum of all terms")
        return alike
    if has(a, "sym", "oo") or has(b, "sym", "oo"):
        return a == b
    return any(_same(*sides) for sides in _readings(a, b)) or constants.same(a, b)


def _readings(a: Node, b: Node) -> Iterator[tuple[Node, Node]]:
    r"""Both sides without a degree or per cent sign that only one of them has, with
    \log to the base 10, and as they are."""
    for op in ("degree", "percent"):
        if has(a, op) != has(b, op):
            if op == "percent" and not has(a, op) and (a.op == "div" or abs(exact(a) or 0) <= 1):
                continue  # 12 may be meant as 12%, 1/2 can't
            yield _without(a, op), _without(b, op)
    logarithms = has(a, "fn", "log") or has(b, "fn", "log")
    if logarithms and not (has(a, "fn", "ln") or has(b, "fn", "ln")):
        yield rewritten(a, _common_logarithm), rewritten(b, _common_logarithm)
    yield a, b


def _same(a: Node, b: Node) -> bool:
    exact_a, exact_b = exact(a), exact(b)
    if exact_a is not None and exact_b is not None:
        return exact_a == exact_b or _abbreviates(a, b)
    close = not symbols(a) | symbols(b) and _abbreviates(a, b)
    return {a.op, b.op} != {"sym"} and (close or equal(a, b))


def _without(node: Node, op: str) -> Node:
    """A tree without its degree signs outside functions, or without the % at its end."""
    if node.op == op:
        return node.args[0]
    inner = node.op in (("neg", "add", "mul", "div") if op == "degree" else ("neg",))
    return Node(node.op, tuple(_without(arg, op) for arg in node.args)) if inner else node


def _common_logarithm(node: Node) -> Node:
    common = node.op == "fn" and node.args[0] == "log" and len(node.args) == 2
    return Node("fn", (*node.args, number("10"))) if common else node


def _same_ratios(a: Node, b: Node) -> bool:
    return len(a.args) == len(b.args) and all(
        same_values(Node("mul", (x, b.args[0])), Node("mul", (y, a.args[0])))
        for x, y in zip(a.args, b.args, strict=True)
    )


def _abbreviates(a: Node, b: Node) -> bool:
    """Whether one side is a decimal that stands for the other's value."""
    numerals = [side.args[0] if side.op == "neg" else side for side in (a, b)]
    decimals = [numeral.args for numeral in numerals if numeral.op == "num" and numeral.args[1]]
    if len(decimals) != 1:
        return False
    _, places, significant = decimals[0]
    rounded = numerals[0].args == decimals[0] and significant >= 4 and places >= 3
    if not rounded and (significant < MIN_SIGNIFICANT or places < MIN_PLACES):
        return False
    last = Fraction(999_999 * (10 if significant >= FLOAT_DIGITS else 1), 10 ** (places + 6))
    near = max(last, Fraction(5001 * rounded, 10 ** (places + 4)))  # a reference is rounded
    return bool(abs(value(a) - value(b)) < value(Node("num", (near, 0, 1))))
