"""The value of a tree: exactly if it is a rational, else with 60 digits; nothing too large."""

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from math import comb, factorial, isqrt, prod

import mpmath
from mpmath.libmp.libhyper import NoConvergence

from .tree import Node

MAX_BITS = 4_096
MAX_EXPONENT = 1_000_000  # of two: what may come out of a power or a factorial
DIGITS, CONFIRMING_DIGITS = 60, 1_000
GUARD = 15  # digits that rounding errors may spoil
MAX_KINKS, MAX_TERMS, FIRST, MAX_STEPS = 16, 200, 20, 30
INFINITY = Node("sym", ("oo",))
NEGLIGIBLE = 1e-40  # next to numbers of ordinary size
SAMPLES = 12  # positive points; three times as many of any sign follow
INTEGERS = frozenset("nmk")
_COUNTING = ("fact", "binom", "sum", "prod")
_CONTEXT = mpmath.MPContext()
CONSTANTS = {"pi": _CONTEXT.pi, "e": _CONTEXT.e, "i": _CONTEXT.j, "oo": _CONTEXT.inf}
_ERRORS = (ZeroDivisionError, ValueError, OverflowError, TypeError, AttributeError, NoConvergence)


class Undecided(ValueError):
    """The value can't be computed within the limits, or the tree has none."""


class TooLarge(Undecided):
    """A number beyond the limits: no other library should try it either."""


def exact(node: Node) -> Fraction | None:
    """The rational value of a tree, or None if it has none or one of over ``MAX_BITS`` bits."""
    op, args = node
    if op == "num":
        return args[0]
    if op not in _EXACT:
        return None
    values = [exact(arg) for arg in args]
    if None in values:
        return None
    try:
        result = _EXACT[op](*values)
    except ZeroDivisionError:
        return None
    return result if result is not None and _bits(result) <= MAX_BITS else None


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _exact_root(value: Fraction, index: Fraction) -> Fraction | None:
    root = Fraction(isqrt(abs(value.numerator)), isqrt(value.denominator))
    return root if index == 2 and root**2 == value else None


_EXACT = {
    "add": lambda *terms: sum(terms, Fraction(0)), "neg": lambda a: -a,
    "mul": lambda *factors: prod(factors) if sum(map(_bits, factors)) <= 2 * MAX_BITS else None,
    "div": lambda a, b: a / b, "root": _exact_root, "abs": abs, "percent": lambda a: a / 100,
    "pow": lambda a, n: a**n.numerator if n.denominator == 1 and abs(n) * _bits(a) <= MAX_BITS
        else None,
    "binom": lambda n, k: Fraction(comb(int(n), int(k))) 
        if n.denominator == k.denominator == 1 and 0 <= k <= n < 400 else None,
    "fact": lambda n: Fraction(factorial(int(n))) if n.denominator == 1 and 0 <= n < 400 else None,
}  # fmt: skip


def symbols(node: Node) -> frozenset[str]:
    """The free variables of a tree: not pi, e, i, nor R, nor x in {x | x > 1}, nor an index."""
    if node.op == "sym":
        return frozenset(name for name in node.args if name not in CONSTANTS and name[:4] != "set:")
    inner = [symbols(arg) for arg in node.args if isinstance(arg, Node) and node.op != "such"]
    index = inner[0] if node.op in ("sum", "prod") else frozenset()
    return frozenset().union(*inner) - index


def find(node: Node, op: str) -> Iterator[Node]:
    """The subtrees of a tree that are this operation, nested ones included."""
    if node.op == op:
        yield node
    for arg in node.args:
        if isinstance(arg, Node):
            yield from find(arg, op)


def has(node: Node, op: str, name: str | None = None) -> bool:
    """Whether a tree holds an operation (with ``name`` as its first argument, if given)."""
    return any(name in (None, found.args[0]) for found in find(node, op))


@contextmanager
def _computing(digits: int = DIGITS) -> Iterator[None]:
    """With so many digits; what can't be computed is :class:`Undecided`."""
    with _CONTEXT.workdps(digits):
        try:
            yield
        except Undecided:
            raise
        except _ERRORS as error:
            raise Undecided(str(error)) from error


def value(node: Node, point: dict | None = None, digits: int = DIGITS):
    """The value of a tree with its variables at ``point``; :class:`Undecided` if it has none."""
    with _computing(digits):
        return +_evaluate(node, point or {})


def _evaluate(node: Node, point: dict):
    op, args = node
    if op == "num":
        return _CONTEXT.mpf(args[0].numerator) / args[0].denominator
    if op == "sym":
        if args[0] in point:
            return _CONTEXT.convert(point[args[0]])
        if args[0] not in CONSTANTS:
            raise Undecided(f"no value for {args[0]}")
        return +CONSTANTS[args[0]]
    if op == "known":
        return args[0]
    if op == "fn":
        return _function(args[0], [_evaluate(arg, point) for arg in args[1:]])
    if op == "apply":
        # An unknown function: any fixed smooth one, the same on both sides.
        return _CONTEXT.cos(_bounded(_evaluate(args[1], point)) + sum(map(ord, args[0]))) + 3
    if op in ("sum", "prod"):
        return _series(node, point)
    if op not in _OPERATIONS:
        raise Undecided(f"{op} has no value")
    if op == "pow" and args[1].op == "div" and point:  # x^{1/3} is as real as a root
        base, part = _evaluate(args[0], point), exact(args[1])
        if part and part.denominator % 2 and _CONTEXT.im(base) == 0 > _CONTEXT.re(base):
            return _power(-base, _evaluate(args[1], point)) * (-1) ** part.numerator
    return _OPERATIONS[op](*(_evaluate(arg, point) for arg in args))


def _series(node: Node, point: dict):
    """A sum or product of at most ``MAX_TERMS`` terms; of one without an end, the first."""
    (name,), low, high = node.args[0].args, *(_evaluate(end, point) for end in node.args[1:3])
    count = FIRST if high == _CONTEXT.inf else int(high - low) + 1
    if not (0 <= count <= MAX_TERMS and low == int(low)):
        raise Undecided("too many terms, or no number of terms")
    terms = (_evaluate(node.args[3], {**point, name: int(low) + k}) for k in range(count))
    return _OPERATIONS["add" if node.op == "sum" else "mul"](*terms)


def _bounded(x):
    """``x``, if a function of it can be computed: not over ``MAX_EXPONENT``."""
    if not _CONTEXT.isfinite(x) or abs(x) > MAX_EXPONENT:
        raise TooLarge("too large an argument")
    return x


def _power(base, exponent):
    if base == 0 and _CONTEXT.re(exponent) <= 0 and exponent != 0:
        raise ZeroDivisionError("a negative power of 0")
    if base != 0 and base != 1:
        _bounded(exponent * (abs(_CONTEXT.mag(base)) + 1))
    return base**exponent


def _root(x, index):
    """The real root where there is one: the cube root of -8 is -2."""
    if index == 0 or index != _CONTEXT.floor(_CONTEXT.re(index)):
        raise Undecided("a root of this index")
    if _CONTEXT.im(x) == 0 and _CONTEXT.re(x) < 0 and index % 2 == 1:
        return -_power(-x, 1 / index)
    return _CONTEXT.sqrt(x) if index == 2 else _power(x, 1 / index)


_OPERATIONS = {
    "add": lambda *terms: _CONTEXT.fsum(terms), "mul": lambda *factors: _CONTEXT.fprod(factors),
    "div": lambda a, b: a / b, "ratio": lambda a, b: a / b, "neg": lambda a: -a, "abs": abs,
    "pow": _power, "root": _root, "percent": lambda a: a / 100,
    "det": lambda *rows: _CONTEXT.det(_CONTEXT.matrix(rows)), "row": lambda *cells: list(cells),
    "degree": lambda a: a * _CONTEXT.pi / 180,
    "fact": lambda n: _CONTEXT.factorial(_bounded(n)),
    "binom": lambda n, k: _CONTEXT.binomial(_bounded(n), _bounded(k)),
}  # fmt: skip


def _function(name: str, args: list):
    if name in ("max", "min"):
        return max(args) if name == "max" else min(args)
    name = re.sub("^ar?c?(?=sin|cos|tan|cot|sec|csc)", "a", name.lower())
    name = {"ln": "log", "cis": "expj"}.get(name, name)
    return getattr(_CONTEXT, name)(*map(_bounded, args))


def crossings(sides: Node, name: str) -> list:
    """Where an expression in ``name``, piecewise linear or ``Undecided``, is 0 or has a kink."""
    inner = [found.args[0] for found in find(sides, "abs")]
    if len(inner) > MAX_KINKS or any(has(part, "abs") for part in inner):
        raise Undecided("too many kinks, or bars in bars")
    kinks = sorted(x for part in inner for x in crossings(part, name))
    found = list(kinks)
    with _CONTEXT.workdps(DIGITS):
        edges = [kinks[0] - 9, *kinks, kinks[-1] + 9] if kinks else [_CONTEXT.mpf(-5), 4]
        for low, high in pairwise(edges):
            x, *_ = points = [low + (high - low) * part / 7 for part in (1, 2, 5)]
            a, b, c = (value(sides, {name: point}) for point in points)
            bend = abs(4 * b - 3 * a - c)
            if not (all(map(_is_real, (a, b, c))) and bend <= NEGLIGIBLE * max(1, abs(a), abs(c))):
                raise Undecided("not linear")
            if a == b == 0:
                raise Undecided("always 0")
            if abs(b - a) > NEGLIGIBLE:
                found.append(x - a * (points[1] - x) / (b - a))
    return found


def settled(node: Node, point: dict | None = None):
    """The value with ``DIGITS`` digits, and 0 where it is nothing but rounding errors."""
    number = value(node, point)
    if 0 < abs(number) < _CONTEXT.mpf(10) ** (GUARD - DIGITS):
        return number if close(number, value(node, point, CONFIRMING_DIGITS)) else _CONTEXT.zero
    return number


def root(node: Node, point: dict, name: str):
    """A value of one variable for which the tree is 0, the others being at ``point``."""
    with _computing():
        starts = map(_CONTEXT.mpmathify, (0.7, 0.8 + 0.1j, 1.1))
        found = [(x, value(node, {**point, name: x})) for x in starts]
        while abs(found[-1][1]) > NEGLIGIBLE and len(found) < MAX_STEPS:
            (x, f), (y, g), (z, h) = found[-3:]  # lie on a hyperbola, or a line
            ratio = g * (f - h) * (x - y) / (h * (f - g) * (x - z))
            new = (y - ratio * z) / (1 - ratio)
            found.append((new, value(node, {**point, name: new})))
    if abs(found[-1][1]) > NEGLIGIBLE:
        raise Undecided("no root found")
    return found[-1][0]


def solution(node: Node, points: list[dict], names: list[str]) -> dict:
    """The values of ``names`` for which the tree is 0 at the points, if it is linear in several."""
    if len(names) == 1:
        return {names[0]: root(node, points[0], names[0])}
    units = [dict.fromkeys(names, 0), *({n: int(n == name) for n in names} for name in names)]
    rest, *columns = ([value(node, {**point, **unit}) for point in points] for unit in units)
    with _computing():
        rows = [[x - y for x, y in zip(column, rest, strict=True)] for column in columns]
        found = _CONTEXT.lu_solve(_CONTEXT.matrix(rows).T, -_CONTEXT.matrix(rest))
    return dict(zip(names, found, strict=True))


def close(a, b, digits: int = DIGITS) -> bool:
    """Equal to all but the last ``GUARD`` of ``digits`` significant digits."""
    with _CONTEXT.workdps(digits):
        tolerance = _CONTEXT.mpf(10) ** (GUARD - digits)
        if not (_CONTEXT.isfinite(a) and _CONTEXT.isfinite(b)):
            return a == b
        return abs(a - b) <= tolerance * max(abs(a), abs(b))


@lru_cache(maxsize=64)
def _points(names: tuple, integers: frozenset[str], positive: frozenset[str]) -> list[dict]:
    """Where expressions are compared: positive points at several scales first, then any sign."""
    generator, scales = random.Random("sample points"), [1, 3, 0.4, 10, 2, 0.8, 30, 5]
    sizes = [*range(1, SAMPLES - 2), 13, 31, 64, 101, 150]
    wholes = {name: generator.sample(sizes, SAMPLES) for name in names}
    points = []
    for n in range(4 * SAMPLES):
        points.append({
            name: generator.choice((1,) if n < SAMPLES or name in positive else (1, -1)) * (
                wholes[name][n % SAMPLES] if name in integers
                else scales[n % len(scales)] * (0.1 + generator.random())
            ) for name in names
        })  # fmt: skip
    return points


def equal(a: Node, b: Node) -> bool:
    """Whether two expressions have the same value wherever both are real, and both are at most of
    the positive points where one is: n! isn't (-n)!. With ``i``, or if none are, also elsewhere."""
    names = tuple(sorted(symbols(a) | symbols(b)))
    if not names:
        return _equal_constants(a, b)
    counting = (part for op in _COUNTING for side in (a, b) for part in find(side, op))
    integers = INTEGERS.union(*(symbols(Node("", part.args[:3])) for part in counting))
    complex_too = any(has(side, *part) for side in (a, b) for part in (("sym", "i"), ("fn", "cis")))
    real, apart, other, seen, too_large = 0, 0, [], set(), None
    roots = [] if has(a, "abs") or has(b, "abs") else [*find(a, "root"), *find(b, "root")]
    factors = [_factors(part.args[0]) for part in roots]  # a square root of q/s: both positive
    positive = frozenset().union(*(some for some in factors if len(some) > 1))
    powers = (part.args[1].op for side in (a, b) for part in find(side, "pow"))
    whole = has(a, "abs") != has(b, "abs") and (has(a, "root") or has(b, "root") or "div" in powers)
    for n, point in enumerate(_points(names, integers, positive)):
        try:
            left, right = sample(a, point), sample(b, point)
        except TooLarge as error:
            too_large = error
            continue
        seen |= {n for n, side in enumerate((left, right)) if side is not None}
        reals = [side is not None and _is_real(side) for side in (left, right)]
        apart += (whole or n < SAMPLES) and reals[0] != reals[1]
        if left is None or right is None:
            continue
        same = close(left, right)
        # no real values if a square root of a negative number was on the way
        both_real = all(reals) and (same or (_all_real(a, point) and _all_real(b, point)))
        if not (complex_too or both_real):
            other.append(same)
        elif not same:
            return False
        else:
            real += 1
            if real == 2 * SAMPLES:
                break
    if apart > real * (not whole) and len(seen) == 2 and not complex_too:
        return False
    if real >= 3 or len(other) >= 3:
        return real >= 3 or all(other)
    raise too_large or Undecided("no point where both sides have a value")


def _factors(node: Node) -> frozenset[str]:
    """The variables that a product or quotient has as factors."""
    if node.op in ("mul", "div", "pow"):
        return frozenset().union(*map(_factors, node.args[: 1 if node.op == "pow" else None]))
    return symbols(node) if node.op == "sym" else frozenset()


def sample(node: Node, point: dict):
    """The value at a point, or None where there is none that is finite."""
    try:
        number = settled(node, point)
    except TooLarge:
        raise
    except Undecided:
        return None
    return number if _CONTEXT.isfinite(number) else None


def _all_real(node: Node, point: dict) -> bool:
    r"""Whether no part of an expression leaves the real line, as ``\sqrt{x}`` does for x = -1."""
    number = sample(node, point)  # None for a part that is no number, such as arguments
    real = number is None or _is_real(number)
    return real and all(_all_real(part, point) for part in node.args if isinstance(part, Node))


def _is_real(x) -> bool:
    return abs(_CONTEXT.im(x)) <= abs(x) * _CONTEXT.mpf(10) ** -45


def _equal_constants(a: Node, b: Node) -> bool:
    left, right = settled(a), settled(b)
    size = max(abs(left), abs(right))
    if not close(left, right) or size == 0 or not _CONTEXT.isfinite(size):
        return left == right
    # Large numbers may differ in their last digit: as many digits as they have, and some.
    digits = CONFIRMING_DIGITS + max(0, int(_CONTEXT.log(size + 1, 10)))
    if digits > 20 * CONFIRMING_DIGITS:
        raise TooLarge("too large to compare to the last digit")
    return close(value(a, None, digits), value(b, None, digits), digits)
