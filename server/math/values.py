"""Two expressions, compared by value, with the conventions of per cent signs and decimals.

``75%`` equals both ``75`` and ``0.75``, but ``1/2`` isn't ``1/2%``. A degree sign may be missing.
A decimal of at least six significant digits equals what it abbreviates: 0.333333, not 0.33 is 1/3.
General solutions are families, whatever the names and multiples of their constants.
"""

from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction

from . import evaluate
from .evaluate import INFINITY, Undecided, equal, exact, find, has, symbols, value
from .tokens import PATTERNS
from .tree import Node, number, rewritten

MIN_SIGNIFICANT, MIN_PLACES = 6, 4
UNKNOWN = Node("sym", ("'",))  # what an expression is the value of
_VARIABLES = frozenset("xyztuw'") | {"theta"}
FLOAT_DIGITS = 16  # the last one of a printed float is rounding


def same_values(a: Node, b: Node) -> bool:
    """Whether two expressions have the same value, percent signs and decimals understood."""
    if any(side.op == "ratio" and len(side.args) > 2 for side in (a, b)):
        own, its = ([Node("mul", (x, y.args[0])) for x in s.args] for s, y in ((a, b), (b, a)))
        return a.op == b.op and len(own) == len(its) and all(map(same_values, own, its))
    endless = [any(s.args[2] == INFINITY for s in find(side, "sum")) for side in (a, b)]
    if any(endless):
        alike = all(endless) and equal(a, b)  # in their first terms
        if not alike and not (all(endless) and symbols(a)):
            raise Undecided("no sum of all terms")
        return alike
    if has(a, "sym", "oo") or has(b, "sym", "oo"):
        return a == b
    return any(_same(*sides) for sides in _readings(a, b)) or same_solutions(a, b)


def _readings(a: Node, b: Node) -> Iterator[tuple[Node, Node]]:
    r"""Both sides without a ° or % that one of them lacks, with a decimal \log, as they are."""
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


def same_solutions(a: Node, b: Node, left: Node = UNKNOWN, right: Node = UNKNOWN) -> bool:
    """Whether left = a and right = b have the same solutions, for all constants such as C: points
    of one of the first give the constants of the second, which has to hold at more of them."""
    gold, pred = (Node("add", (x, Node("neg", (y,)))) for x, y in ((left, a), (right, b)))
    names, others = symbols(gold), symbols(pred)
    own, its = sorted(names - _VARIABLES), sorted(others - _VARIABLES)
    unknowns = sorted(names & _VARIABLES)
    heads = {name[0] for name in own}, {name[0] for name in its}
    called = any(some <= {*"Cc"} for some in heads) or "C" in heads[0] | heads[1] <= {*"ABCD"}
    if (
        not called or len(own) != len(its) or not own or own == its == ["c"] or not unknowns[1:]
        or (names ^ others) & _VARIABLES or not all(map(PATTERNS.constant.fullmatch, own + its))
    ):  # fmt: skip
        return False
    values = {name: 0.83 + 0.31 * n for n, name in enumerate(own)}
    for unknown in unknowns[: 1 if UNKNOWN.args[0] in names else None]:
        with suppress(Undecided):
            points = []
            for k in range(len(own) + 2):
                point = {name: 0.37 + 0.23 * k + 0.4 * n * k for n, name in enumerate(unknowns, 1)}
                points.append({**point, unknown: evaluate.root(gold, {**values, **point}, unknown)})
            found = evaluate.solution(pred, points[: len(its)], its)
            return all(abs(value(pred, {**point, **found})) < 1e-9 for point in points)
    return False
