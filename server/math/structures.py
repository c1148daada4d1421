r"""Two trees, compared part by part: lists, tuples, intervals, sets, matrices, relations.

A list is unordered and may lack brackets, a tuple is ordered. ``x = 2`` equals ``2``, but
``2x + z = 1`` isn't ``1``. Names matter where both sides have them, order where one lacks them.
"""

import re
from collections.abc import Sequence
from math import log2

from . import regions
from .evaluate import Undecided, equal, has, sample, symbols, value
from .tidy import COLLECTIONS, entries, is_numbered, is_rounded, name_of, only_names, tidy, value_of
from .tree import Node, number, rewritten
from .values import same_solutions, same_values

MAX_ITEMS, MAX_PARTS = 64, 12
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
_UNIT_VECTORS = [frozenset(letters) for letters in ("j", "k", "jk")]
_VECTORS = (("(", ")"), ("[", "]"))
COMPOUND = (*COLLECTIONS, *regions.OPERATIONS, "rel")


def same(a: Node, b: Node) -> bool:
    """Whether two answers are the same, the reference first; or :class:`Undecided`."""
    a, b = regions.listed(tidy(a)), regions.listed(tidy(b))
    if a == b or "contradiction" in (a.op, b.op):
        return a == b
    if "mod" in (a.op, b.op):  # 3 (mod 5) for 3; others are families
        bare = [tidy(side.args[0]) if side.op == "mod" else side for side in (a, b)]
        if "rel" in (bare[0].op, bare[1].op, b.op) or a.op == b.op:
            return False
        return (a.op == "mod" or 0 <= value(bare[1]) < value(b.args[1])) and same(*bare)
    if a.op == "rel" or b.op == "rel":
        return _same_relations(a, b)
    if regions.is_region(a) or regions.is_region(b):
        return _same_regions(a, b)
    ops = {a.op, b.op}
    if ops & {*COMPOUND} == {"matrix"}:
        a, b = _scalar(a, b), _scalar(b, a)
    compare = _same_matrices if "matrix" in ops else same_values
    compare = _same_groups if "group" in ops else compare
    return (_same_lists if ops & {"list", "set"} else compare)(a, b)


def forms(gold: Node) -> list[Node]:
    """A reference that is given in two forms, as these: 1/2 or 0.5, 5/7 = 0.714, 5/7 ≈ 0.7."""
    if gold.op == "rel" and is_rounded(*gold.args[-2:]):
        return [gold, gold.args[-1]]
    if gold.op == "rel" and gold.args[1].op in ("group", "cup") and set(gold.args[0]) == {"="}:
        return [gold, gold.args[-1]]  # [2\ln 3, 9) = [\ln 9, 9)
    first, *rest = gold.args if gold.op == "list" else (gold,)
    if name_of(first) and [(part.op, name_of(part)) for part in rest] == [("rel", None)]:
        return [gold, first] if symbols(rest[0]) <= symbols(value_of(first)) else [gold]
    try:
        twice = gold.op in ("list", "cup") and len(gold.args) == 2 and gold.args[0] != gold.args[1]
        return [gold.args[0] if twice and same(*gold.args) else gold]
    except Undecided:
        return [gold]


def _same_lists(a: Node, b: Node) -> bool:
    if {"group", "matrix"} & {a.op, b.op}:
        group, listed = (b, a) if a.op in ("list", "set") else (a, b)
        if listed.op == "set":
            only = listed.args[0] if len(listed.args) == 1 else listed
            return only.op == "group" and same(group, only)
        if any(item.op == "rel" and set(item.args[0]) != {"="} for item in listed.args):
            return _same_regions(group, listed)
        names = [name_of(item) for item in listed.args]
        if None not in names and len(set(names)) < len(names):
            unordered = group.args[:2] == ("[", "]") and len(group.args) > 4  # a list, no interval
            return unordered and _matched(entries(group), listed.args, as_set=False)
        shapes = _VECTORS if None not in names or len(names) > 2 else _VECTORS[:1]  # no interval
        fits = group.op == "matrix" or group.args[:2] in shapes
        in_space = set(names) <= {Node("sym", (letter,)) for letter in "xyz"}
        items = sorted(listed.args, key=lambda item: name_of(item)) if in_space else listed.args
        return fits and _pairwise(entries(group), items)
    sides = [side.args if side.op in ("list", "set") else (side,) for side in (a, b)]
    if len(sides[0]) == len(sides[1]) == 1 and a.op != b.op:
        return False  # {2} isn't 2
    names = [[name_of(item) for item in side] for side in sides]
    assigned = all(name_of(item) for side in sides for item in side if item.op == "rel")
    if any(all(side) and side for side in names) and names[0] != names[1] and assigned:
        settled = _same_named(sides, names)
        if settled is not None:
            return settled
    as_set = "set" in (a.op, b.op) or any(item.op == "group" for item in sides[0])
    return _matched(*sides, as_set=as_set)


def _same_named(sides: list, names: list) -> bool | None:
    """Lists of assignments: by name, or in order where one side leaves distinct names out."""
    if all(all(side) for side in names):
        heads = [sorted(str(name.args[0]) for name in side) for side in names]  # v and v(t)
        return None if heads[0] == heads[1] or any(map(is_numbered, names[0] + names[1])) else False
    side = 0 if all(names[0]) else 1
    heads = [Node("sym", (str(name.args[0]).partition("_")[0],)) for name in names[side]]
    if all(map(is_numbered, names[side])) and len({*heads}) > 1:  # x_1, y_1, x_2, y_2
        names = [heads, heads]
    values = [value_of(item) for item in sides[side]]
    others = list(sides[1 - side])
    distinct = len(set(names[side])) == len(values)
    if distinct and not any(map(is_numbered, names[side])):
        flat = [item for other in others for item in
                (other.args[2:] if other.op == "group" else (other,))]  # fmt: skip
        return _pairwise(values, others if len(others) == len(values) else flat)
    if not distinct and names[side].count(names[side][0]) == len(others) < len(values):
        # p=5, q=2; p=7, q=2 against (5,2), (7,2): as many tuples as there are p's
        width = len(values) // len(others)
        rows = (values[at : at + width] for at in range(0, len(values), width))
        values = [Node("group", ("(", ")", *row)) for row in rows]
    return _matched(values, others, as_set=False)


def _pairwise(left: Sequence[Node], right: Sequence[Node]) -> bool:
    return len(left) == len(right) and all(map(same, left, right))


def _matched(left: Sequence[Node], right: Sequence[Node], as_set: bool) -> bool:
    """Each item has its equal on the other side; once each, or at least once if ``as_set``."""
    if max(len(left), len(right)) > MAX_ITEMS or (not as_set and len(left) != len(right)):
        return len(left) == len(right) and all(map(same, left, right))
    unused = list(right)
    for item in left:
        found = next((other for other in unused if same(item, other)), None)
        if found is not None:
            unused.remove(found)
        elif not as_set or not any(same(item, other) for other in right):
            return False
    return all(any(same(item, other) for item in left) for other in unused)


def _same_groups(a: Node, b: Node) -> bool:
    if a.op != b.op:
        group, other = (a, b) if a.op == "group" else (b, a)
        items = group.args[2:]
        if other.op == "matrix":
            return bool(items) and group.args[:2] in _VECTORS and _pairwise(items, entries(other))
        if other.op == "fn" and other.args[0] == "floor":  # Gauss's brackets
            return group.args[0] == "[" and _pairwise(items, other.args[1:])
        terms = (Node("mul", (x, Node("sym", (c,)))) for x, c in zip(items, "ijk", strict=False))
        fits = symbols(other) - symbols(group) in _UNIT_VECTORS and group.args[:2] in _VECTORS
        return fits and 1 < len(items) < 4 and equal(other, Node("add", tuple(terms)))
    ends = [(side.args[0] == "[", side.args[1] == "]") for side in (a, b)]
    if len(a.args) == len(b.args) == 4 and ends[0] != ends[1]:
        return False
    return _pairwise(a.args[2:], b.args[2:])


def _same_matrices(a: Node, b: Node) -> bool:
    if a.op != b.op:  # 2i + 3j
        flat = (Node("group", ("(", ")", *entries(s))) if s.op == "matrix" else s for s in (a, b))
        return _same_groups(*flat)
    alike = len(a.args) == len(b.args)
    return alike and all(_pairwise(x.args, y.args) for x, y in zip(a.args, b.args, strict=True))


def _scalar(node: Node, other: Node) -> Node:
    """2I_3 or 0 as a matrix, if the other one is a square matrix."""
    size = len(other.args)
    unit = Node("sym", ("I",)), Node("sym", (f"I_{size}",))
    if node.op == "matrix" or not all(len(row.args) == size for row in other.args):
        return node
    on, off = (rewritten(node, lambda part, x=x: number(x) if part in unit else part) for x in "10")
    cells = [[on if i == j else off for j in range(size)] for i in range(size)]
    return Node("matrix", tuple(Node("row", tuple(row)) for row in cells))


def _same_relations(a: Node, b: Node) -> bool:
    name_a, name_b = name_of(a), name_of(b)
    if a.op != b.op:
        relation, other, name = (a, b, name_a) if a.op == "rel" else (b, a, name_b)
        if name is not None:
            if all(re.fullmatch("[a-z]{2,3}", str(side.args[0])) for side in relation.args[1:]):
                return False  # AB = CD isn't CD
            other = other.args[0] if other.op == "set" and len(other.args) == 1 else other
            return same(value_of(a), other) if a is relation else same(other, value_of(b))
        values = [side for side in relation.args[1:] if only_names(side)]
        if relation is b and len(values) == 1 and "=" not in b.args[0]:  # 0 < AM/BN < 1
            relation = b = rewritten(b, lambda p: Node("sym", ("x",)) if p == values[0] else p)
        if relation.args[0] == ("in",) and relation.args[1].op == "sym":
            return same(relation.args[2], other)
        if set(relation.args[0]) == {"="}:
            first, *sides = relation.args[1:]
            named = relation is b and only_names(first)  # m + n = 5 for 5
            sides = sides if named else [first, *sides]  # 1 + 1 = 2 for 2
            says = len({*sides}) == len(sides) and not any(map(symbols, sides))
            return says and all(same(side, other) for side in sides)
        numbers = other.op == "list" and not any(item.op in COMPOUND for item in other.args)
        return not numbers and _same_regions(a, b)  # 1, 2 or \pm 3 is no region
    chains = len(a.args) == len(b.args) > 3 and set(a.args[0]) == set(b.args[0]) == {"="}
    if chains and _matched(a.args[1:], b.args[1:], as_set=False):  # a = b = c
        return True
    if name_a and name_b and name_a.op == name_b.op == "apply" and name_a.args[0] == name_b.args[0]:
        new, old = name_a.args[1], name_b.args[1]  # f(x) and f(t)
        if new.op == old.op == "sym" and not symbols(new) & symbols(value_of(b)):
            return same(value_of(a), rewritten(value_of(b), lambda p: new if p == old else p))
    if name_a is not None and name_b is not None and _compatible(name_a, name_b):
        sides = a.args[1], b.args[1], a.args[2], b.args[2]
        return same(value_of(a), value_of(b)) or same_solutions(*sides)
    if name_a and name_b and (has(name_a, "rel") or has(name_b, "rel")):  # P(X = 0)
        alike = name_a.op == name_b.op and _pairwise(name_a.args, name_b.args)
        return alike and same(value_of(a), value_of(b))
    if set(a.args[0]) == set(b.args[0]) == {"="} and len(a.args) == len(b.args) == 3:
        return _same_equations(a.args[1:], b.args[1:])
    return _same_inequalities(a, b) or _same_regions(a, b)


def _compatible(a: Node, b: Node) -> bool:
    """The same name, up to y or a_n for f(x), x for x_1, and AB for |AB|."""
    a, b = (s.args[0] if s.op == "abs" and len(str(s.args[0].args[0])) > 1 else s for s in (a, b))
    heads = [str(name.args[0]).partition("_")[0] for name in (a, b)]
    if {a.op, b.op} == {"apply", "sym"}:
        return heads[0] == heads[1] or Node("sym", ("y",)) in (a, b)
    bare = any(name.op == "sym" and "_" not in name.args[0] for name in (a, b))
    return a == b or (a.op == b.op == "sym" and heads[0] == heads[1] and bare)


def _same_equations(a: tuple[Node, Node], b: tuple[Node, Node]) -> bool:
    """Two equations: the same sides, or differences of their sides that are proportional."""
    if not symbols(a[0]) | symbols(a[1]):  # f(3) = 10
        return all(map(same, a, b))
    if symbols(a[0]) | symbols(a[1]) != symbols(b[0]) | symbols(b[1]):
        return same_solutions(a[0], b[0], a[1], b[1])
    alike = all(map(same, a, b)) or all(map(same, a, reversed(b)))  # of identities, too
    alike = alike or _proportional(a, b) is not None or _multiplied(a, b)
    return alike or same_solutions(a[0], b[0], a[1], b[1])


def _multiplied(a: Sequence[Node], b: Sequence[Node]) -> bool:
    """Whether letters that an equation divides by make the other one of it, solved for no name."""
    names = sorted(symbols(Node("", (*a, *b))))
    variables = {name.partition("'")[0] for name in names if "'" in name}
    solved = not variables and any(side.op == "sym" for side in (*a, *b))
    sides = tuple(Node("add", (left, Node("neg", (right,)))) for left, right in (a, b))
    point = {name: 0.37 + 0.61 * n for n, name in enumerate(names)}
    beside = {name: at + 0.29 for name, at in point.items()}
    start = sample(Node("div", sides), point)
    for name in names:
        other = sample(Node("div", sides), {**point, name: 2 * point[name]})
        if not (start and other):
            return False
        power = round(log2(abs(other / start)))
        variable = name.strip("'").partition("_")[0] in (variables or "xyz")
        at_zero = [[sample(side, {**some, name: 0}) for side in sides] for some in (point, beside)]
        if power and (solved or variable):  # xy = 6 says by itself that x isn't 0
            held = {side for side in zip(*at_zero, strict=True) if None not in side}
            if len(held) != 1 or not all(held := {*held.pop()}) or len(held) != 1:
                return False
        elif power and None not in at_zero[0]:
            return False
        factor = Node("pow", (Node("sym", (name,)), Node("num", (power, 0, 1))))
        b = [Node("mul", (side, factor)) for side in b]
    return _proportional(a, b) is not None


def _proportional(a: Sequence[Node], b: Sequence[Node]) -> int | None:
    """The sign of the constant c with a[0] - a[1] = c·(b[0] - b[1]), 0 if it isn't real."""
    a, b = (Node("add", (left, Node("neg", (right,)))) for left, right in (a, b))
    for shift in range(3):
        names = enumerate(sorted(symbols(a) | symbols(b)))
        point = {name: 0.37 + 0.61 * n + 1.19 * shift for n, name in names}
        if None in (ratio := [sample(side, point) for side in (a, b)]):
            continue
        above, below = ratio
        if above == 0 or below == 0:  # what always or never holds says nothing
            return None
        # a(x)·b(p) = b(x)·a(p) for all x says that a/b is constant
        sides = (Node("mul", (x, Node("known", (y,)))) for x, y in ((a, below), (b, above)))
        sign = 1 if (above / below).real > 0 else -1
        return (0 if (above / below).imag else sign) if equal(*sides) else None
    raise Undecided("no ratio of the two relations")


def _same_inequalities(a: Node, b: Node) -> bool:
    """Chains of inequalities with the same sides, or one with sides in proportion."""
    if a.args[0] != b.args[0]:  # 5 > x is x < 5
        b = Node("rel", (tuple(_FLIPPED.get(op) for op in b.args[0][::-1]), *b.args[:0:-1]))
    if a.args[0] != b.args[0] or not _FLIPPED.keys() >= {*a.args[0]}:
        return False
    if len(a.args) > 3 or not symbols(a) | symbols(b):  # f(2) > 3
        return _pairwise(a.args[1:], b.args[1:])
    sign = _proportional(a.args[1:], b.args[1:])
    return sign is not None and (sign > 0 or a.args[0] == ("!=",))


def _meant(region: Node) -> Node:
    """Inequalities with commas between them all hold or, where they can't, are a union."""
    both = Node("cap", region.args)
    return both if region.op == "list" and not regions.same(both, Node("set", ())) else region


def _is_hedged(region: Node) -> bool:
    """Whether a part of a region is idle: ``x > 1, x > 3`` leaves open which of them it means."""
    if region.op == "rel":  # a chain
        links = zip(region.args[0], region.args[1:], region.args[2:], strict=False)
        region = Node("cap", tuple(Node("rel", ((op,), *sides)) for op, *sides in links))
    parts = region.args if region.op in ("list", "cup", "cap") else ()
    rest = (Node(region.op, (*parts[:n], *parts[n + 1 :])) for n in range(len(parts)))
    return len(parts) > MAX_PARTS or any(regions.same(region, some) for some in rest)


def _same_regions(a: Node, b: Node) -> bool:
    """Sets of real numbers; where they have symbolic ends, part by part."""
    try:
        meant = _meant(a), _meant(b)
        return regions.same(*meant) and not _is_hedged(meant[1])
    except Undecided:
        if a.op == b.op == "minus":
            return _pairwise(a.args, b.args)
        if (a.op == b.op and a.op in regions.OPERATIONS) or {a.op, b.op} == {"cap", "list"}:
            return _matched(a.args, b.args, as_set=True)
        return False
