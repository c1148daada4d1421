r"""Families of numbers, such as π/4 + kπ for all integers k, or 11 modulo 15: equal as sets.

Two families are equal if a few members of each, those near 0, are among more members of the other.
"""

from collections.abc import Iterator

from .evaluate import INTEGERS, Undecided, has, symbols, value
from .regions import near
from .tidy import name_of, tidy, value_of
from .tree import Node

FEW, MORE = 3, 25
_INTEGERS = Node("sym", ("set:Z",))


def same(gold: Node, pred: Node) -> bool | None:
    r"""Whether two answers are the same family; None unless both are families, and one says so.

    ``3n`` alone is a formula. What says more is ``k \in \mathbb{Z}``, a modulus or, in the
    reference, a name or π.
    """
    letters: list[set[str]] = [set(), set()]  # that stand for integers
    names: list[set[Node]] = [set(), set()]
    sides = [
        [*_members(side, *found)] for side, *found in zip((gold, pred), letters, names, strict=True)
    ]
    used = [frozenset().union(*map(symbols, side)) for side in sides]
    if not any(letters) or not (letters[0] or names[0] or has(gold, "sym", "pi")):
        return None
    if any(
        len(own) != 1 or not own <= said | INTEGERS for own, said in zip(used, letters, strict=True)
    ):
        return None
    if all(names) and names[0] != names[1]:
        return False
    try:
        few, more = (
            [
                [_at(form, {letter: k}) for form in side for k in range(-reach, reach + 1)]
                for side, (letter,) in zip(sides, used, strict=True)
            ]
            for reach in (FEW, MORE)
        )
    except Undecided:
        return None
    return all(
        any(len(x) == len(y) and all(map(near, x, y)) for y in others)
        for some, others in zip(few, reversed(more), strict=True)
        for x in some
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
