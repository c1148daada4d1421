r"""A small parser of answers: LaTeX or plain text to a tree of :class:`Node`.

It reads what answers are made of (numbers, expressions, lists, tuples, intervals, sets, matrices,
relations) and raises :class:`ParseError` on everything else: nothing is skipped, so ``5`` and
``5)`` never become the same tree. Depth and sizes are limited, work is linear in the length.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from . import vocabulary
from .tokens import ParseError, TooComplex, tokens
from .vocabulary import CLOSERS, FUNCTIONS, NOT_A_FACTOR, RELATIONS, TIMES

MAX_DEPTH = 50
MAX_DIGITS = 400
MAX_SET_TOKENS = 400
MAX_POSTFIX = 6


class Node(NamedTuple):
    """One operation and its operands: ``Node("pow", (x, 2))``.

    Numbers are ``("num", (Fraction, decimals, significant))``, symbols ``("sym", (name,))``.
    """

    op: str
    args: tuple


def rewritten(node: Node, change: Callable[[Node], Node]) -> Node:
    """The tree with every node changed, the innermost first."""
    args = (rewritten(arg, change) if isinstance(arg, Node) else arg for arg in node.args)
    return change(Node(node.op, tuple(args)))


@lru_cache(maxsize=256)  # one stage after the other asks
def parse(text: str, thousands: bool = True) -> Node:
    """The tree of a normalised answer.

    ``thousands`` reads commas between groups of three digits outside brackets as separators
    within a number (1,234 is one number), otherwise every comma separates.

    Raises:
        ParseError: for unknown commands, unbalanced brackets, or limits exceeded.
    """
    parser = _Parser(tokens(text, thousands))
    node = parser.answer()
    if parser.peek():
        raise ParseError(f"unexpected {parser.peek()!r}")
    return node


def _together(operation: str, parts: list[Node]) -> Node:
    return parts[0] if len(parts) == 1 else Node(operation, tuple(parts))


class _Parser:
    """Recursive descent over the tokens; each method takes one level of precedence."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.at = self.depth = self.bars = 0
        self.such = False  # within { }, a colon is "such that" and not a ratio

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else ""

    def next(self) -> str:
        token = self.peek()
        if not token:
            raise ParseError("unexpected end")
        self.at += 1
        return token

    def accept(self, *tokens: str) -> str:
        return self.next() if self.peek() and self.peek() in tokens else ""

    def enter(self) -> None:
        """One level deeper; whoever calls it subtracts it again."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooComplex("nested too deeply")

    def answer(self) -> Node:
        """Relations separated by commas, groups of them by semicolons.

        Inequalities with an "or" between them are a union, with an "and" an intersection, for
        which commas stand as well: x > 0, y > 0 and z > 0.
        """
        groups: list[Node] = []
        while not groups or self.accept(";"):
            start, items = self.at, []
            while not items or self.accept(","):
                items.append(self.joined(r"\lor", "cup"))
            together = r"\land" in self.tokens[start : self.at]
            kind = "cap" if together and all(i.op in ("rel", "cap") for i in items) else "list"
            groups.append(_together(kind, items))
        return _together("list", groups)

    def joined(self, connective: str, operation: str) -> Node:
        """Relations with "or" between them, or, which binds closer, with "and"."""
        parts = []
        while not parts or self.accept(connective):
            both = connective == r"\lor"
            parts.append(self.joined(r"\land", "cap") if both else self.relation())
        return _together(operation, parts)

    def relation(self) -> Node:
        """A chain of sides: ``1 < x <= 2`` is one node with three sides and two operators."""
        self.accept(r"\approx")
        sides, operators = [self.union()], []
        while self.peek() in RELATIONS:
            operators.append(RELATIONS[self.next()])
            sides.append(self.union())
        node = Node("rel", (tuple(operators), *sides)) if operators else sides[0]
        return Node("mod", (node, self.argument())) if self.accept(r"\pmod") else node

    def union(self) -> Node:
        node = self.ratio()
        while self.peek() in vocabulary.SET_OPERATIONS:
            operation, part = vocabulary.SET_OPERATIONS[self.next()], self.ratio()
            more = node.op == operation != "minus"
            node = Node(operation, (*node.args, part) if more else (node, part))
            if len(self.tokens) > MAX_SET_TOKENS:
                raise TooComplex("too long a union")
        return node

    def ratio(self) -> Node:
        parts = [self.sum()]
        while not self.such and self.accept(":"):
            parts.append(self.sum())
        return _together("ratio", parts)

    def sum(self) -> Node:
        terms: list[Node] = []
        while not terms or self.peek() in ("+", "-", r"\pm", r"\mp"):
            sign, plus_minus = 1, ""
            while token := self.accept("+", "-", r"\pm", r"\mp"):
                sign = -sign if token == "-" else sign
                plus_minus = token if token in (r"\pm", r"\mp") else plus_minus
            term = self.product()
            term = Node("neg", (term,)) if sign < 0 else term
            terms.append(Node(plus_minus[1:], (term,)) if plus_minus else term)
        return _together("add", terms)

    def product(self, implicit: bool = False) -> Node:
        """Factors with * and /, or side by side; left to right, so ``1/2x`` is ``(1/2)x``.

        With ``implicit``, only what stands side by side: the argument of ``\\sin 2x``.
        """
        top, bottom = [self.factor()], []
        while token := self.peek():
            if token in TIMES and not implicit:
                self.next()
                (bottom if token in ("/", r"\div") else top).append(self.factor(signed=True))
            elif self._starts_factor(token) and not (implicit and token[1:] in FUNCTIONS):
                previous = self.peek(-1) if top[-1].op == "num" else ""
                if token[0].isdigit() and (previous[:1].isdigit() or self._after_word()):
                    raise TooComplex("two numbers side by side, or with a word between them")
                factor = self.factor()
                if previous.isdigit() and token == r"\frac":
                    factor = _mixed(top, factor)
                top.append(factor)
            else:
                break
        node = _together("mul", top)
        return Node("div", (node, _together("mul", bottom))) if bottom else node

    def _after_word(self) -> bool:
        """Whether the last token ends a word: the numbers around "out of" don't commute."""
        before, last = self.peek(-2) if self.at > 1 else "", self.peek(-1)
        return (last.isalpha() and (last[1:] or before).isalpha()) or last.startswith(r"\text{")

    def _starts_factor(self, token: str) -> bool:
        if token == "|":
            return self.bars == 0 and not self.such
        if token[0] == "\\":
            return token not in NOT_A_FACTOR
        return token[0].isalnum() or token[0] == "." or token in ("(", "{", "°")

    def factor(self, signed: bool = False) -> Node:
        """A primary with its postfix signs and powers."""
        negative = False
        while signed and (sign := self.accept("-", "+")):
            negative ^= sign == "-"
        node, signs = self.primary(), 0
        while token := self.accept("!", "%", "°", "^", "_"):
            signs += 1
            if signs > MAX_POSTFIX:
                raise TooComplex("too many signs")
            if token == "^":
                node = Node("pow", (node, self.argument(signed=True)))
            elif token == "_":
                node = Node("sym", (f"{_name(node)}_{self.raw_group()}",))
            else:
                node = Node({"!": "fact", "%": "percent", "°": "degree"}[token], (node,))
        return Node("neg", (node,)) if negative else node

    def argument(self, signed: bool = False) -> Node:
        """What follows ``^``, or a function without brackets: a group or one factor."""
        if self.peek() == "{":
            return self.primary()
        sign = self.accept("-", "+") if signed else ""
        node = self.primary()
        if self.accept("^"):
            self.enter()
            node = Node("pow", (node, self.argument(signed=True)))
            self.depth -= 1
        return Node("neg", (node,)) if sign == "-" else node

    def digit_or_group(self) -> Node:
        r"""The argument of ``\frac``: a group, or one digit (``\frac12`` is a half)."""
        token = self.peek()
        if token.isdigit() and len(token) > 1:
            self.tokens[self.at] = token[1:]
            return number(token[0])
        return self.primary()

    def raw_group(self) -> str:
        """The text of a subscript, which is part of a name and not an expression."""
        if self.peek() != "{":
            return self.next()
        start, level = self.at, 0
        while True:
            level += {"{": 1, "}": -1}.get(self.next(), 0)
            if level == 0:
                return "".join(self.tokens[start + 1 : self.at - 1])

    def primary(self) -> Node:
        """A number, a symbol, a command with its arguments, or something in brackets."""
        self.enter()
        node = self._primary()
        self.depth -= 1
        return node

    def _primary(self) -> Node:
        token = self.peek()
        if token in CLOSERS and not (token == "|" and self.bars):
            return self.bracketed()
        self.next()
        if token[0] in "0123456789" or (token[0] == "." and len(token) > 1):
            return number(token)
        if token.isalpha():
            name = token
            while self.accept("'"):
                name += "'"
            if token in "fg" and "".join(self.tokens[self.at : self.at + 6]) == "^{-1}(":
                self.at += 5
                name += "^-1"
            if token in ("f", "g") and self.peek() == "(":
                return Node("apply", (name, self.bracketed()))
            called = (
                self.peek() + self.peek(2) == "()" and (self.peek(1) or "+") in "xtnkz0123456789"
            )
            if called and (self.peek(1) == "0" or self.peek(3) == "="):
                point = self.bracketed()  # a value at 0 and h(2) = 7 are no products
                if point.op == "sym":
                    return Node("apply", (name, point))
                name += f"({point.args[0]})"
            return Node("sym", (name,))
        if token[0] != "\\" or token in NOT_A_FACTOR:
            raise ParseError(f"unexpected {token!r}")
        return self.command(token)

    def command(self, token: str) -> Node:
        name = token[1:]
        if name in ("frac", "binom"):
            operation = "div" if name == "frac" else "binom"
            return Node(operation, (self.digit_or_group(), self.digit_or_group()))
        if name == "sqrt":
            index = self.bracketed().args[2:] if self.peek() == "[" else (number("2"),)
            if len(index) != 1:
                raise ParseError("a root without an index")
            return Node("root", (self.argument(), *index))
        if name in FUNCTIONS:
            return self.function(name)
        if name == "begin":
            return self.environment()
        if name.startswith("text{"):
            return Node("sym", (re.sub(r"\s", "", name[5:-1]).lower(),))
        if token in vocabulary.ACCENTS:
            inner = self.raw_group()
            bare = len(inner) == 1 and (name == "vec" or (name == "hat" and inner in "ijk"))
            name = "bar" if name == "overline" else name
            return Node("sym", (inner if bare else f"{name}:{inner}",))
        if name == "mathbb":
            return Node("sym", (f"set:{self.raw_group()}",))
        if token in vocabulary.SYMBOLS:
            return Node("sym", (vocabulary.SYMBOLS[token],))
        if name in vocabulary.NAMES:
            return Node("sym", (token,))
        raise ParseError(f"unknown command {token!r}")

    def function(self, name: str) -> Node:
        base = power = None
        while token := self.accept("_", "^"):
            if token == "_":
                base = self.digit_or_group()
            else:
                power = self.argument(signed=True)
        bracket = self.peek() in CLOSERS and self.peek() != "|"
        argument = self.bracketed() if bracket else self.product(implicit=True)
        if power == Node("neg", (number("1"),)) and "arc" + name in FUNCTIONS:
            name, power = "arc" + name, None
        node = Node("fn", (name, argument, *([base] if base else [])))
        return Node("pow", (node, power)) if power else node

    def bracketed(self) -> Node:
        r"""Everything that opens and closes: ( ) [ ] { } \{ \} | | and the named pairs."""
        opener = self.next()
        self.enter()
        outer = self.bars, self.such
        self.bars, self.such = int(opener == "|"), opener == r"\{"
        if opener != "|" and (close := self.accept(CLOSERS[opener][0])):
            content: Node | None = None
        else:
            content = self.answer()
            if opener == r"\{" and self.accept("|", r"\mid", ":"):
                content = _such(content, self.answer())
            close = self.accept(*CLOSERS[opener])
        self.bars, self.such = outer
        self.depth -= 1
        if not close or (opener == "{" and content is None):
            raise ParseError(f"{opener!r} is not closed, or empty")
        items = () if content is None else content.args if content.op == "list" else (content,)
        if opener == r"\{":
            return content if content and content.op == "such" else Node("set", items)
        if content is None:
            return Node("group", (opener, close))
        if opener in ("|", r"\lvert", r"\|"):
            return Node("abs", (content,))
        if opener in (r"\lfloor", r"\lceil"):
            return Node("fn", ("floor" if opener == r"\lfloor" else "ceil", content))
        if opener == r"\langle":
            return Node("group", ("(", ")", *items))
        alone = opener == "(" and close == ")" and content.op != "list"
        if opener == "{" or content.op == "matrix" or alone:
            return content
        widths = {len(item.args) if item.op == "list" else 0 for item in items}
        if opener == "[" and len(widths) == 1 and 0 not in widths:  # [1, 2; 3, 4]
            return Node("matrix", tuple(Node("row", item.args) for item in items))
        return Node("group", (opener, close, *items))

    def environment(self) -> Node:
        """``\\begin{…} … \\end{…}``: a matrix, or a list of the lines of a system."""
        name = self.raw_group()
        if name in ("array", "tabular") and self.peek() == "{":
            self.raw_group()
        rows: list[list[Node]] = [[]]
        while not self.accept(r"\end"):
            if self.accept(r"\\"):
                rows.append([])
            elif not self.accept("&"):
                rows[-1].append(self.answer())
        if self.raw_group() != name:
            raise ParseError(f"environment {name!r} is not closed")
        rows = [
            list(row[0].args) if len(row) == 1 and row[0].op == "list" and len(row[0].args) == 2
            and row[0].args[0].op != "rel" else row for row in rows if row
        ]  # fmt: skip
        pairs = bool(rows) and all(len(row) == 2 for row in rows)
        if pairs and (name == "cases" or all(row[1].op == "rel" != row[0].op for row in rows)):
            return Node("list", tuple(Node("group", ("(", ")", *row)) for row in rows))
        lines = name == "array" and any(cell.op == "rel" for row in rows for cell in row)
        if lines or name in ("cases", "aligned", "align", "align*", "gathered"):
            return _together("list", [node for row in rows for node in row])
        if ("matrix" not in name and name != "array") or len({len(row) for row in rows}) != 1:
            raise ParseError(f"environment {name!r}")
        kind = "det" if name == "vmatrix" else "matrix"
        return Node(kind, tuple(Node("row", tuple(row)) for row in rows))


def number(token: str) -> Node:
    """A numeral as ``("num", (exact value, digits after the point, significant digits))``."""
    mantissa, _, exponent = token.lower().partition("e")
    whole, _, decimals = mantissa.partition(".")
    if len(token) > MAX_DIGITS or abs(int(exponent or 0)) > MAX_DIGITS:
        raise ParseError("too large a number")
    places = len(decimals) - int(exponent or 0)
    value = int(whole + decimals or 0) / Fraction(10) ** places
    return Node("num", (value, max(0, places), len((whole + decimals).lstrip("0"))))


def _such(element: Node, conditions: Node) -> Node:
    """The set ``{element | conditions}``, as conditions only where the element is a variable."""
    parts = conditions.args if conditions.op == "list" else (conditions,)
    return Node("such", parts if element.op == "sym" else (element, *parts))


def _mixed(top: list[Node], factor: Node) -> Node:
    """1\\frac{1}{2} as 3/2, before a sign as well: the integer is taken off the factors."""
    if factor.op in ("percent", "degree"):
        return Node(factor.op, (_mixed(top, factor.args[0]),))
    return Node("add", (top.pop(), factor)) if _is_proper(factor) else factor


def _is_proper(node: Node) -> bool:
    """Whether a node is the fraction of a mixed number: two integers, the smaller on top."""
    parts = node.args if node.op == "div" else ()
    whole = all(part.op == "num" and part.args[0].denominator == 1 for part in parts)
    return bool(parts) and whole and parts[0].args[0] < parts[1].args[0]


def _name(node: Node) -> str:
    """The name that carries a subscript: a symbol's, or the digits of a based numeral."""
    if node.op == "num" and node.args[0].denominator == 1:
        return str(node.args[0])
    if node.op == "sym":
        return node.args[0]
    raise ParseError("a subscript on an expression")
