"""Two expressions, compared by value, with the conventions of per cent signs and decimals.

* ``75%`` equals both ``75`` and ``0.75``; a degree sign may be missing on one side.
* A decimal of at least six significant digits equals the exact value it abbreviates, that is,
  one less than one unit in its last place away. So 0.333333 is 1/3, and 0.33 isn't.
"""

from fractions import Fraction

from .evaluate import CONSTANTS, Undecided, equal, exact, has, symbols, value
from .tree import Node

MIN_SIGNIFICANT, MIN_PLACES = 6, 4
FLOAT_DIGITS = 16  # the last one of a printed float is rounding


def same_values(a: Node, b: Node) -> bool:
    """Whether two expressions have the same value, percent signs and decimals understood."""
    if any(side.op == "ratio" and len(side.args) > 2 for side in (a, b)):
        return a.op == b.op and _same_ratios(a, b)
    signs = [{op for op in ("degree", "percent") if has(side, op)} for side in (a, b)]
    if (
        signs[0] ^ signs[1] == {"degree"}
        and not signs[0] & signs[1]
        and same_values(_undegreed(a), _undegreed(b))
    ):
        return True
    bare_a, bare_b = _without_sign(a), _without_sign(b)
    once = bool(bare_a) != bool(bare_b) and "degree" not in signs[0] | signs[1]
    if once and same_values(bare_a or a, bare_b or b):
        return True
    exact_a, exact_b = exact(a), exact(b)
    if exact_a is not None and exact_b is not None:
        return exact_a == exact_b or _abbreviates(a, b, exact_a, exact_b)
    if {a.op, b.op} == {"sym", "mul"} and _letters(a) == _letters(b) != ["p", "i"]:
        return True  # \text{red} and the product of r, e and d
    if a.op == b.op == "sym" and not {a.args[0], b.args[0]} <= CONSTANTS.keys():
        return _same_symbols(a.args[0], b.args[0])
    if equal(a, b):
        return True
    names = symbols(a), symbols(b)
    small = [{name.lower() for name in own - other} for own, other in (names, names[::-1])]
    if small[0] == small[1] and small[0] and all(name[0] == "c" for name in small[0]):
        return equal(_small_constants(a), _small_constants(b))  # x + C, x + c
    if not (has(a, "fn", "ln") or has(b, "fn", "ln")):
        common_a, common_b = _common_logarithms(a), _common_logarithms(b)
        if (common_a, common_b) != (a, b) and equal(common_a, common_b):
            return True
    return not (symbols(a) or symbols(b)) and _abbreviates(a, b, exact_a, exact_b)


def _without_sign(node: Node) -> Node | None:
    """A tree without the % at its end, or None if it has none."""
    if node.op == "neg" and (inner := _without_sign(node.args[0])):
        return Node("neg", (inner,))
    return node.args[0] if node.op == "percent" else None


def _undegreed(node: Node) -> Node:
    """The tree without degree signs."""
    if node.op == "degree":
        return node.args[0]
    return Node(node.op, tuple(_undegreed(x) if isinstance(x, Node) else x for x in node.args))


def _common_logarithms(node: Node) -> Node:
    """The tree with the other reading of \\log without a base: 10 where it was e."""
    args = tuple(_common_logarithms(arg) if isinstance(arg, Node) else arg for arg in node.args)
    if node.op == "fn" and args[0] == "log" and len(args) == 2:
        args = ("lg", args[1])
    return Node(node.op, args)


def _small_constants(node: Node) -> Node:
    if node.op == "sym" and node.args[0][0] == "C":
        return Node("sym", (node.args[0].lower(),))
    args = (_small_constants(arg) if isinstance(arg, Node) else arg for arg in node.args)
    return Node(node.op, tuple(args))


def _letters(node: Node) -> list[object]:
    """The letters of a word, or of a product of variables."""
    if node.op == "sym":
        return list(node.args[0])
    return [part.args[0] if part.op == "sym" else None for part in node.args]


def _same_symbols(a: str, b: str) -> bool:
    """Letters as they are; words without regard to case."""
    return a == b or (len(a) > 1 and "_" not in a + b and a.lower() == b.lower())


def _same_ratios(a: Node, b: Node) -> bool:
    if len(a.args) != len(b.args):
        return False
    first_a, first_b = a.args[0], b.args[0]
    return all(
        same_values(Node("mul", (x, first_b)), Node("mul", (y, first_a)))
        for x, y in zip(a.args, b.args, strict=True)
    )


def _abbreviates(a: Node, b: Node, exact_a: Fraction | None, exact_b: Fraction | None) -> bool:
    """Whether one side is a decimal that stands for the other's value."""
    decimal_a, decimal_b = _decimal(a), _decimal(b)
    if decimal_a and decimal_b and decimal_a[1] == decimal_b[1]:
        return False
    for number, other, other_exact in ((decimal_a, b, exact_b), (decimal_b, a, exact_a)):
        if number is None:
            continue
        written, places, significant = number
        if significant < MIN_SIGNIFICANT or places < MIN_PLACES:
            continue
        units = 10 if significant >= FLOAT_DIGITS else 1
        if other_exact is not None:
            if abs(written - other_exact) < Fraction(units, 10**places) and _decimal(other) is None:
                return True
            continue
        try:
            exact_value = value(other)
        except Undecided:
            continue
        difference = abs(exact_value - written.numerator / _mpf(written.denominator))
        if difference < _mpf(units) / 10**places:
            return True
    return False


def _mpf(x: int):
    return value(Node("num", (Fraction(x), 0, 1)))


def _decimal(node: Node) -> tuple[Fraction, int, int] | None:
    """A signed decimal numeral's (value, places, significant digits), or None."""
    if node.op == "neg" and (inner := _decimal(node.args[0])):
        return -inner[0], inner[1], inner[2]
    return node.args if node.op == "num" and node.args[1] > 0 else None
