r"""Families of numbers, such as π/4 + kπ for all integers k, or 11 modulo 15: equal as sets.

Two families are equal if a few members of each, those near 0, are among more members of the other.
"""

from collections.abc import Iterator

from .evaluate import INTEGERS, Undecided, has, symbols, value
from .regions import near
from .tidy import name_of, tidy, value_of
from .tree import Node

FEW, MORE = 7, 25
_INTEGERS = Node("sym", ("set:Z",))


def same(gold: Node, pred: Node) -> bool | None:
    r"""Whether two answers are the same family; None unless both are families, and one says so.

    ``3n`` alone is a formula. What says more is ``k \in \mathbb{Z}``, a modulus or, in the
    reference, a name or π.
    """
    letters, names = (set(), set()), (set(), set())  # those that stand for integers; of either side
    forms = [[*_members(side, letters[n], names[n])] for n, side in enumerate((gold, pred))]
    used = [frozenset().union(*map(symbols, side)) for side in forms]
    if not any(letters) or not (letters[0] or names[0] or has(gold, "sym", "pi")):
        return None
    if any(len(used[n]) != 1 or used[n] - letters[n] - INTEGERS for n in (0, 1)):
        return None
    if all(names) and names[0] != names[1]:
        return False
    members: list[list[tuple]] = [[], []]
    try:
        for n, (letter,) in enumerate(used):
            for k in sorted(range(-MORE, MORE + 1), key=abs):
                members[n] += (_at(form, {letter: k}) for form in forms[n])
    except Undecided:
        return None
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


def _members(node: Node, letters: set[str], names: set[Node]) -> Iterator[Node]:
    """The forms of an answer, without their names; notes which letters stand for integers."""
    node = tidy(node)
    if node.op in ("list", "cup", "set", "such"):
        for part in node.args:
            yield from _members(part, letters, names)
    elif node.op == "mod":
        letters.add("k")
        for form in _members(node.args[0], letters, names):
            yield Node("add", (form, Node("mul", (node.args[1], Node("sym", ("k",))))))
    elif node.op == "rel" and node.args[0] == ("in",) and node.args[2] == _INTEGERS:
        letters |= symbols(node.args[1])
    elif node.op == "rel" and (name := name_of(node)):
        names.add(name)
        yield value_of(node)
    else:
        yield node
