"""Two expressions, compared by value, with the conventions of per cent signs and decimals.

* ``75%`` equals both ``75`` and ``0.75``; a degree sign may be missing on one side.
* A decimal of at least six significant digits equals the exact value it abbreviates, that is,
  one less than one unit in its last place away. So 0.333333 is 1/3, and 0.33 isn't.
"""

from fractions import Fraction

from .evaluate import CONSTANTS, Undecided, equal, exact, has, symbols, value
from .tree import Node, rewritten

MIN_SIGNIFICANT, MIN_PLACES = 6, 4
FLOAT_DIGITS = 16  # the last one of a printed float is rounding


def same_values(a: Node, b: Node) -> bool:
    """Whether two expressions have the same value, percent signs and decimals understood."""
    if any(side.op == "ratio" and len(side.args) > 2 for side in (a, b)):
        return a.op == b.op and _same_ratios(a, b)
    if has(a, "sym", "oo") or has(b, "sym", "oo"):
        return a == b
    signs = [{op for op in ("degree", "percent") if has(side, op)} for side in (a, b)]
    if signs[0] != signs[1] and not signs[0] & signs[1]:
        if signs[0] | signs[1] == {"degree"}:
            if same_values(rewritten(a, _undegreed), rewritten(b, _undegreed)):
                return True
        elif same_values(*((_without_percent(a), b) if signs[0] else (a, _without_percent(b)))):
            return True
    exact_a, exact_b = exact(a), exact(b)
    if exact_a is not None and exact_b is not None:
        return exact_a == exact_b or _abbreviates(a, b)
    if {a.op, b.op} == {"sym", "mul"} and _letters(a) == _letters(b) != ["p", "i"]:
        return True  # \text{red} and the product of r, e and d
    if a.op == b.op == "sym" and not {a.args[0], b.args[0]} <= CONSTANTS.keys():
        name, other = a.args[0], b.args[0]  # words without regard to case
        return len(name) > 1 and "_" not in name + other and name.lower() == other.lower()
    if equal(a, b):
        return True
    names = symbols(a), symbols(b)
    small = [{name.lower() for name in own - other} for own, other in (names, names[::-1])]
    if small[0] == small[1] and small[0] and all(name[0] == "c" for name in small[0]):
        return equal(rewritten(a, _small_constants), rewritten(b, _small_constants))
    if not (has(a, "fn", "ln") or has(b, "fn", "ln")):
        common_a, common_b = rewritten(a, _common_logarithm), rewritten(b, _common_logarithm)
        if (common_a, common_b) != (a, b) and equal(common_a, common_b):
            return True
    return not (names[0] or names[1]) and _abbreviates(a, b)


def _without_percent(node: Node) -> Node:
    """A tree without the % at its end."""
    if node.op == "neg":
        return Node("neg", (_without_percent(node.args[0]),))
    return node.args[0] if node.op == "percent" else node


def _undegreed(node: Node) -> Node:
    return node.args[0] if node.op == "degree" else node


def _common_logarithm(node: Node) -> Node:
    """The other reading of \\log without a base: 10 where it was e."""
    common = node.op == "fn" and node.args[0] == "log" and len(node.args) == 2
    return Node("fn", ("lg", node.args[1])) if common else node


def _small_constants(node: Node) -> Node:
    """c for C, of which one answer has the one and one the other."""
    constant = node.op == "sym" and node.args[0][0] == "C"
    return Node("sym", (node.args[0].lower(),)) if constant else node


def _letters(node: Node) -> list[object]:
    """The letters of a word, or of a product of variables."""
    if node.op == "sym":
        return list(node.args[0])
    return [part.args[0] if part.op == "sym" else None for part in node.args]


def _same_ratios(a: Node, b: Node) -> bool:
    first_a, first_b = a.args[0], b.args[0]
    return len(a.args) == len(b.args) and all(
        same_values(Node("mul", (x, first_b)), Node("mul", (y, first_a)))
        for x, y in zip(a.args, b.args, strict=True)
    )


def _abbreviates(a: Node, b: Node) -> bool:
    """Whether one side is a decimal that stands for the other's value."""
    decimal, other = (_decimal(a), b) if _decimal(a) else (_decimal(b), a)
    if not decimal or _decimal(other):
        return False
    written, places, significant = decimal
    if significant < MIN_SIGNIFICANT or places < MIN_PLACES:
        return False
    unit = Fraction(999_999 * (10 if significant >= FLOAT_DIGITS else 1), 10 ** (places + 6))
    written, unit = (value(Node("num", (number, 0, 1))) for number in (written, unit))
    try:
        return bool(abs(value(other) - written) < unit)
    except Undecided:
        return False


def _decimal(node: Node) -> tuple[Fraction, int, int] | None:
    """A signed decimal numeral's (value, places, significant digits), or None."""
    if node.op == "neg" and (inner := _decimal(node.args[0])):
        return -inner[0], inner[1], inner[2]
    return node.args if node.op == "num" and node.args[1] > 0 else None
