"""General solutions compared as families: neither the names of their constants matter, nor what
multiple or function of one stands for it."""

import re
from collections.abc import Sequence
from itertools import combinations

from .evaluate import Undecided, derivative, in_span, root, symbols, value
from .tree import Node

UNKNOWN = Node("sym", ("'",))  # what an expression is the value of
_VARIABLES = frozenset("xyztuw'") | {"theta"}
_CONSTANT = re.compile(r"[A-DKa-dk](_\w+)?")


def same(a: Node, left: Node, b: Node, right: Node) -> bool:
    """Whether the equations a = left and b = right have the same solutions, for all values of
    constants with names such as C. False if there are none, or if that can't be told."""
    sides = tuple(Node("add", (x, Node("neg", (y,)))) for x, y in ((a, left), (b, right)))
    names = [*map(symbols, sides)]
    variables = sorted(names[0] & _VARIABLES)
    own, its = constants = [sorted(some - _VARIABLES) for some in names]
    heads = [{name[0] for name in some} for some in constants]
    called = any(some <= {*"Cc"} for some in heads) or heads[0] | heads[1] <= {*"ABCD"}
    if not (
        called and (heads[0] | heads[1]) & {*"Cc"} and len(own) == len(its) > 0
        and not own == its == ["c"] and all(map(_CONSTANT.fullmatch, own + its))
        and len(variables) > 1 and variables == sorted(names[1] & _VARIABLES)
    ):  # fmt: skip
        return False
    try:
        return (_same_spans if len(own) > 1 else _same_curves)(sides, constants, variables)
    except Undecided:
        return False


def _points(variables: Sequence[str], count: int) -> list[dict]:
    return [
        {name: 0.37 + 0.61 * n + 0.23 * k + 0.11 * n * k for n, name in enumerate(variables)}
        for k in range(count)
    ]


def _same_curves(sides: tuple[Node, Node], constants: list, variables: Sequence[str]) -> bool:
    """With one constant each: at any point, both curves through it have the same direction."""
    for point in _points(variables, 3):
        slopes = []
        for side, (name,) in zip(sides, constants, strict=True):
            there = {**point, name: root(side, point, name)}
            slopes.append([derivative(side, there, variable) for variable in variables])
        for (a, b), (c, d) in combinations(zip(*slopes, strict=True), 2):
            if abs(a * d - b * c) > 1e-12 * (abs(a * d) + abs(b * c)):
                return False
        if not all(max(map(abs, slope)) > 1e-12 for slope in slopes):
            return False
    return True


def _same_spans(sides: tuple[Node, Node], constants: list, variables: Sequence[str]) -> bool:
    """With several, in which both are linear: the functions beside them span the same space."""
    count = len(constants[0])
    points = _points(variables, 2 * count + 2)

    def column(side: int, weights: Sequence[int]) -> list:
        fixed = dict(zip(constants[side], weights, strict=True))
        return [value(sides[side], {**point, **fixed}) for point in points]

    rest = [column(side, [0] * count) for side in (0, 1)]
    spans: list[list] = [[], []]
    for side in (0, 1):
        weights = [[int(n == k) for k in range(count)] for n in range(count)]
        for own in [column(side, some) for some in weights]:
            spans[side].append([x - y for x, y in zip(own, rest[side], strict=True)])
        whole = zip(column(side, [3] * count), rest[side], *spans[side], strict=True)
        if any(abs(x - y - 3 * sum(parts)) > 1e-9 * (abs(x) + 1) for x, y, *parts in whole):
            return False
    between = [x - y for x, y in zip(*rest, strict=True)]
    return all(in_span(spans[1 - n], column) for n in (0, 1) for column in (*spans[n], between))
