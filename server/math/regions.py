"""Sets of real numbers, compared by membership.

Regions, of one variable, are equal if they agree at every end, between them, and beyond. Families
such as π/4 + kπ are equal if members of each near 0 are among more members of the other.
"""

from collections.abc import Iterator
from itertools import pairwise
from math import ceil, floor

from .evaluate import INTEGERS, NEGLIGIBLE, Undecided, crossings, exact, has, symbols, value
from .tidy import name_of, tidy, value_of
from .tree import DOTS, Node, number, rewritten

OPERATIONS = ("cup", "cap", "minus", "such")
MAX_ENDS, MAX_SIDES = 200, 4
_SUBSETS = {"list": ("rel", "group"), "set": ("rel",)}  # in braces, (1, 2) is a point
_NUMBERS = frozenset({"set:R"})
FEW, MORE = 7, 25
_INTEGERS = Node("sym", ("set:Z",))
_LOWEST = {"set:Z": None, "set:N": 1, "set:N_0": 0, r"set:Z_\ge0": 0}  # of some sets of integers


def same(a: Node, b: Node) -> bool:
    """Whether two regions hold the same real numbers; :class:`Undecided` if a side is none."""
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


def listed(node: Node) -> Node:
    """{x in Z | -2 < x < 1} as the set of its members; anything else, or many, as it is."""
    parts = [part for part in node.args if node.op == "such" and part.args[-1:] != (_INTEGERS,)]
    if not 0 < len(parts) < len(node.args):
        return node
    members = [n for n in range(-MAX_ENDS, MAX_ENDS) if all(_holds(part, n) for part in parts)]
    few = members and members[0] > -MAX_ENDS and members[-1] < MAX_ENDS - 1
    return Node("set", tuple(number(str(n)) for n in members)) if few else node


def written_out(node: Node) -> Node:
    """What lists with dots stand for: 1, 2, …, 9 for nine numbers, 2, 4, 8, … for 2·2^k, k >= 0."""
    return rewritten(node, lambda p: _undotted(p) if DOTS in p.args and p.op in _SUBSETS else p)


def _undotted(node: Node) -> Node:
    signed = [item.op == "pm" for item in node.args if item != DOTS]
    items = [item.args[0] if item.op == "pm" else item for item in node.args if item != DOTS]
    at, count, k = node.args.index(DOTS), len(items), Node("sym", ("k",))
    values, finite = [*map(value, items)], node.args[-1] != DOTS and at > 1 and not any(signed)
    mirrored = not any(signed) or (all(signed[1:]) and near(values[1], values[0] * 3) == signed[0])
    fits = (finite or node.args[-1] == DOTS) and count > 2
    if not fits or not mirrored or (any(signed[1:]) and not (signed[0] or values[0] == 0)):
        raise Undecided("dots for no members")
    first, second, *_, final = items
    step, all_of_it = (Node("add", (item, Node("neg", (first,)))) for item in (second, final))
    even = Node("add", (first, Node("mul", (k, step))))
    growing = Node("mul", (first, Node("pow", (Node("div", (second, first)), k))))
    both = not finite and (at == 0 or any(signed))
    whole = range(int(min(MAX_ENDS, abs(value(Node("div", (all_of_it, step)))))) + 1)
    where = [*whole[:at], *whole[at - count :]] if finite else range(count)
    for form in (even,) if finite or both else (even, growing):
        if [*map(near, values, (value(form, {"k": n}) for n in where))] == [True] * count:
            numbers = Node("set", (*map(number, map(str, whole)),)) if finite else _INTEGERS
            which = (("in",), k, numbers) if both or finite else ((">=",), k, number("0"))
            return Node("list" if finite else node.op, (form, Node("rel", which)))
    raise Undecided("neither one difference nor one ratio")


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
        if len(symbols(node)) != 1 or len(node.args) > MAX_SIDES + 1:
            raise Undecided("not one variable, or too long a chain")
        for operator, left, right in zip(node.args[0], node.args[1:], node.args[2:], strict=False):
            if operator in ("in", "notin") and left.op == "sym":
                yield from _ends(right)
            elif symbols(left) | symbols(right) and operator not in ("in", "notin"):
                yield from crossings(Node("add", (left, Node("neg", (right,)))), *symbols(node))
            else:
                raise Undecided("not a variable, or a part that says nothing")
    elif not (node.op == "sym" and node.args[0] in _NUMBERS):
        raise Undecided(f"{node.op} is no region")


def _holds(node: Node, x) -> bool:
    """Whether the number ``x`` is in the region."""
    if node.op == "minus":
        return _holds(node.args[0], x) and not _holds(node.args[1], x)
    if node.op in ("cap", "such"):
        return all(_holds(arg, x) for arg in node.args)
    if node.op in ("cup", "list", "set"):
        kinds = _SUBSETS.get(node.op)
        inner = ((item, not kinds or item.op in kinds) for item in node.args)
        return any(_holds(item, x) if some else near(_real(item), x) for item, some in inner)
    if node.op == "group":
        opener, closer, low, high = node.args
        left, right = "<=" if opener == "[" else "<", "<=" if closer == "]" else "<"
        return _compare(left, _real(low), x) and _compare(right, x, _real(high))
    if node.op == "rel":
        return all(
            _holds(right, x) == (sign == "in") if sign in ("in", "notin")
            else _compare(sign, *(value(p, dict.fromkeys(symbols(p), x)) for p in (left, right)))
            for sign, left, right in zip(node.args[0], node.args[1:], node.args[2:], strict=False)
        )  # fmt: skip
    return True


def _compare(operator: str, a, b) -> bool:
    equal = near(a, b)
    if operator in ("=", "!="):
        return equal == (operator == "=")
    return operator in ("<=", ">=") if equal else (a < b) == (operator in ("<", "<="))


def same_families(gold: Node, pred: Node) -> bool | None:
    r"""Whether two answers are the same family; None unless both are families, and one says so: by
    ``k \in \mathbb{Z}``, a modulus or, in the reference, a name or π. ``3n`` alone is a formula."""
    # The letters that stand for integers, with the least of them, and the names; of either side.
    letters, names = ({}, {}), (set(), set())
    forms = [[*_members(side, letters[n], names[n])] for n, side in enumerate((gold, pred))]
    used = [frozenset().union(*map(symbols, side)) for side in forms]
    turns = has(gold, "sym", "pi") or has(gold, "degree")
    said = (any(letters) or (turns and used[0] != used[1])) and (letters[0] or names[0] or turns)
    if not said or any(form.op == "rel" for side in forms for form in side):
        return None
    everything = not letters[0] and any(form.op == "sym" for form in forms[1])
    if everything or any(len(used[n]) != 1 or used[n] - {*letters[n]} - INTEGERS for n in (0, 1)):
        return None
    if all(names) and names[0] != names[1]:
        return False
    members: list[list[tuple]] = [[], []]
    for n, (letter,) in enumerate(used):
        low = letters[n].get(letter)
        both = sorted(range(-MORE, MORE + 1), key=abs)
        for k in both if low is None else range(low, low + len(both)):
            members[n] += (_at(form, {letter: k}) for form in forms[n])
        lows = [letters[n][name.args[0]] for name in names[n] if name.args[0] in letters[n]]
        if lows and lows[0] is not None:
            members[n] = [member for member in members[n] if member[0] >= lows[0]]
    return all(
        any(len(x) == len(y) and all(map(near, x, y)) for y in members[1 - n])
        for n in (0, 1)
        for x in members[n][: FEW * len(forms[n])]
    )


def _at(form: Node, point: dict[str, int]) -> tuple:
    """A member of a family: a number, or the ends of an interval."""
    if form.op == "group":
        kind = (form.args[0] == "[", form.args[1] == "]")
        return (*kind, *(value(end, point) for end in form.args[2:]))
    return (value(form, point),)


def _least(node: Node, names: set[Node]) -> tuple[str, int | None] | None:
    """Of which letter a condition says that it stands for integers, and from which one on."""
    if node.op != "rel" or len(node.args) != 3:
        return None
    (sign,), left, right = node.args
    if sign == "in" and right.op == "sym" and right.args[0] in _LOWEST and left.op == "sym":
        return left.args[0], _LOWEST[right.args[0]]
    if sign in ("<", "<="):
        sign, left, right = sign.replace("<", ">"), right, left
    known = left.op == "sym" and (left in names or left.args[0] in INTEGERS)
    bound = exact(right) if known and sign in (">", ">=") else None
    least = None if bound is None else floor(bound) + 1 if sign == ">" else ceil(bound)
    return None if bound is None else (left.args[0], least)


def _members(node: Node, letters: dict[str, int | None], names: set[Node]) -> Iterator[Node]:
    """The forms of an answer, without their names; notes which letters stand for integers."""
    node = tidy(node)
    if node.op in ("list", "cup", "set", "such"):
        for part in node.args:
            yield from _members(part, letters, names)
    elif node.op == "mod":
        letters["k"] = None
        for form in _members(node.args[0], letters, names):
            yield Node("add", (form, Node("mul", (node.args[1], Node("sym", ("k",))))))
    elif least := _least(node, names):
        name, low = least
        letters[name] = max((n for n in (low, letters.get(name)) if n is not None), default=None)
    elif node.op == "rel" and len(node.args) == 4 and {*node.args[0]} <= {"<", "<="}:
        low, name, high = node.args[1:]
        names.add(name)
        ends = ("[" if node.args[0][0] == "<=" else "(", "]" if node.args[0][1] == "<=" else ")")
        yield Node("group", (*ends, low, high))
    elif node.op == "rel" and (name := name_of(node)):
        names.add(name)
        yield value_of(node)
    else:
        yield node
