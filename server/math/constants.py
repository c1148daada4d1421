"""General solutions compared as families, whatever the names and multiples of their constants."""

from contextlib import suppress

from .evaluate import Undecided, root, solution, symbols, value
from .tokens import PATTERNS
from .tree import Node

UNKNOWN = Node("sym", ("'",))  # what an expression is the value of
_VARIABLES = frozenset("xyztuw'") | {"theta"}


def same(a: Node, b: Node, left: Node = UNKNOWN, right: Node = UNKNOWN) -> bool:
    """Whether the equations left = a and right = b have the same solutions, for all values of
    constants with names such as C: False if there are none, or if that can't be told. Points of one
    solution of the first give the constants of the second, which has to hold at more of them."""
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
                points.append({**point, unknown: root(gold, {**values, **point}, unknown)})
            found = solution(pred, points[: len(its)], its)
            return all(abs(value(pred, {**point, **found})) < 1e-9 for point in points)
    return False
