r"""A small parser of answers: LaTeX or plain text to a tree of :class:`Node`.

It raises :class:`ParseError` on all it doesn't know, so ``5`` and ``5)`` are never the same tree.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from . import tokens
from .tokens import CLOSERS, FUNCTIONS, NOT_A_FACTOR, RELATIONS, ParseError, TooComplex

MAX_DEPTH = 30
_OTHERWISE = (("otherwise",), ("else",), ("elsewhere",))
MAX_DIGITS = 400


class Node(NamedTuple):
    """``Node("pow", (x, 2))``; a number is ``Node("num", (Fraction, decimals, significant))``."""

    op: str
    args: tuple


DOTS = Node("dots", ("",))


def rewritten(node: Node, change: Callable[[Node], Node]) -> Node:
    """The tree with every node changed, the innermost first."""
    args = (rewritten(arg, change) if isinstance(arg, Node) else arg for arg in node.args)
    return change(Node(node.op, tuple(args)))


@lru_cache(maxsize=256)  # one stage after the other asks
def parse(text: str, thousands: bool = True) -> Node:
    """The tree of a normalised answer; ``thousands`` reads 1,234 as one number."""
    parser = _Parser(tokens.split(text, thousands))
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

    def chain(self, operation: str, sign: str, part: Callable[[], Node]) -> Node:
        """Parts with a sign between them, or the only part."""
        parts = [part()]
        while self.accept(sign):
            parts.append(part())
        return _together(operation, parts)

    def answer(self) -> Node:
        """Relations between commas, groups of them between semicolons, unions and intersections."""
        return self.chain("list", ";", self.items)

    def items(self) -> Node:
        start = self.at
        node = self.chain("list", ",", self.either)
        together = r"\land" in self.tokens[start : self.at] and node.op == "list"
        together = together and all(item.op in ("rel", "cap") for item in node.args)
        parts = (item.args if item.op == "cap" else (item,) for item in node.args)
        return Node("cap", tuple(chain.from_iterable(parts))) if together else node

    def either(self) -> Node:
        return self.chain("cup", r"\lor", self.both)

    def both(self) -> Node:
        return self.chain("cap", r"\land", self.relation)

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
        while self.peek() in tokens.SET_OPERATIONS:
            operation, part = tokens.SET_OPERATIONS[self.next()], self.ratio()
            parts = node.args if node.op == operation != "minus" else (node,)
            node = Node(operation, (*parts, part))
        return node

    def ratio(self) -> Node:
        return self.sum() if self.such else self.chain("ratio", ":", self.sum)

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
        """Factors, left to right: ``1/2x`` is ``(1/2)x``. ``implicit``: only those side by side."""
        top, bottom = [self.factor()], []
        while token := self.peek():
            goes_on = token[1:] not in FUNCTIONS or (token == r"\sqrt" and self.peek(-1).isdigit())
            if token in tokens.TIMES and not implicit:
                self.next()
                (bottom if token in ("/", r"\div") else top).append(self.factor(signed=True))
            elif self._starts_factor(token) and (goes_on or not implicit):
                previous = self.peek(-1) if top[-1].op == "num" else ""
                zero = previous.strip("0.") == "" != previous and self._is_word()
                if zero or (token[0].isdigit() and (previous[:1].isdigit() or self._after_word())):
                    raise TooComplex("two numbers side by side, or words after one")
                if token.isalpha() and token[2:] and (last := self.peek(-1)).isalpha() and last[2:]:
                    raise ParseError("words don't commute")
                factor = self.factor()
                if previous.isdigit() and token == r"\frac":
                    factor = _mixed(top, factor)
                top.append(factor)
            else:
                break
        node = _together("mul", [*map(_inner, top)] if len(top) > 1 else top)
        return Node("div", (node, _together("mul", bottom))) if bottom else node

    def _is_word(self) -> bool:
        token, letters = self.peek(), self.peek() + self.peek(1)
        return token.startswith(r"\text{") or (token.isalpha() and letters[1:].isalpha())

    def _after_word(self) -> bool:
        """Whether the last token ends a word: the numbers around "out of" don't commute."""
        before, last = self.peek(-2) if self.at > 1 else "", self.peek(-1)
        return (last.isalpha() and (last[1:] or before).isalpha()) or last.startswith(r"\text{")

    def _starts_factor(self, token: str) -> bool:
        if token == "|":
            return self.bars == 0 and not self.such
        if token[0] == "\\":
            return token not in NOT_A_FACTOR
        bracket = token in ("(", "{", "°")
        bracket = bracket or (token == "[" and self.peek(1) and self.peek(1) not in NOT_A_FACTOR)
        return bracket or token[0].isalnum() or token[0] == "."

    def factor(self, signed: bool = False) -> Node:
        """A primary with its postfix signs and powers."""
        negative = False
        while signed and (sign := self.accept("-", "+")):
            negative ^= sign == "-"
        node = self.primary()
        while token := self.accept("!", "%", "°", "^", "_"):
            if token == "%" and node.op == "percent":
                raise TooComplex("two per cent signs")
            if token == "^":
                node = Node("pow", (node, self.argument(signed=True)))
            elif token == "_":
                if node.op not in ("sym", "num"):
                    raise ParseError("a subscript on an expression")
                node = Node("sym", (f"{node.args[0]}_{self.raw_group()}",))
            else:
                node = Node({"!": "fact", "%": "percent", "°": "degree"}[token], (node,))
        return Node("neg", (node,)) if negative else node

    def argument(self, signed: bool = False) -> Node:
        """What follows ``^``, or a function without brackets: a group or one factor."""
        sign = self.accept("-", "+") if signed else ""
        node = self.primary()
        if self.accept("^"):
            node = Node("pow", (node, self.argument(signed=True)))
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
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooComplex("nested too deeply")
        bracket = self.peek() in CLOSERS and not (self.peek() == "|" and self.bars)
        node = self.bracketed() if bracket else self.atom()
        self.depth -= 1
        return node

    def atom(self) -> Node:
        """What stands outside brackets, with the brackets of a call."""
        token = self.next()
        if token[0] in "0123456789" or (token[0] == "." and len(token) > 1):
            return number(token)
        if token.isalpha() or token[1:] in tokens.NAMES:
            name = token.lower() if token.isalpha() and token[1:] else token
            while self.accept("'"):
                name += "'"
            if token in "fg" and "".join(self.tokens[self.at : self.at + 6]) == "^{-1}(":
                self.at += 5
                name += "^-1"
            called = tokens.PATTERNS.call.match("".join(self.tokens[self.at : self.at + 12]))
            if called or (self.peek() == "(" and token in ("f", "g")):
                return Node("apply", (name, self.bracketed()))
            return Node("sym", (name,))
        if token == r"\ldots":
            return DOTS
        if token[0] != "\\" or token in NOT_A_FACTOR:
            raise ParseError(f"unexpected {token!r}")
        return self.command(token)

    def command(self, token: str) -> Node:
        name = token[1:]
        if name in ("frac", "binom"):
            operation = "div" if name == "frac" else "binom"
            return Node(operation, (self.digit_or_group(), self.digit_or_group()))
        if name in ("sqrt", "cbrt"):
            usual = (number("2" if name == "sqrt" else "3"),)
            index = self.bracketed().args[2:] if self.peek() == "[" else usual
            if len(index) != 1:
                raise ParseError("a root without an index")
            return Node("root", (self.argument(), *index))
        if name in ("sum", "prod"):
            return self.series(name)
        if name in FUNCTIONS:
            return self.function(name)
        if name == "begin":
            return self.environment()
        if name.startswith("text{"):
            return Node("sym", (re.sub(r"\s", "", name[5:-1]).lower(),))
        if token in tokens.ACCENTS:
            inner = self.raw_group()
            bare = len(inner) == 1 and (name == "vec" or (name == "hat" and inner in "ijk"))
            name = "bar" if name == "overline" else name
            return Node("sym", (inner if bare else f"{name}:{inner}",))
        if name in ("emptyset", "varnothing"):
            return Node("set", ())
        if name == "mathbb":
            return Node("sym", (f"set:{self.raw_group()}",))
        if token in tokens.SYMBOLS:
            return Node("sym", (tokens.SYMBOLS[token],))
        raise ParseError(f"unknown command {token!r}")

    def series(self, name: str) -> Node:
        """``\\sum_{k=1}^{n} k^2``: what is added or multiplied goes on to the next sign."""
        bounds = {self.accept("_", "^"): self.primary() for _ in range(2)}
        start, end = bounds.get("_"), bounds.get("^")
        if not (start and end and start.op == "rel" and start.args[1].op == "sym"):
            raise ParseError("bounds that are no first and last number")
        _, index, low = start.args[:3]

        def indexed(part: Node) -> Node:
            head, _, below = str(part.args[0]).partition("_") if part.op == "sym" else ("", "", "")
            if part.op in ("sum", "prod") or below != index.args[0] in below:
                raise ParseError("a sum in a sum, or an index with more to it")
            return Node("apply", (head, index)) if below == index.args[0] else part

        return Node(name, (index, low, end, rewritten(self.product(), indexed)))

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
        base = number("10") if name == "lg" else base
        arguments = argument.args if argument.op in ("set", "list") else (argument,)
        arguments = argument.args[2:] if argument.op == "group" else arguments
        node = Node("fn", (name.replace("lg", "log"), *arguments, *([base] if base else [])))
        node = Node("abs", (argument,)) if name in ("abs", "Abs") else node
        return Node("pow", (node, power)) if power else node

    def bracketed(self) -> Node:
        r"""Everything that opens and closes: ( ) [ ] { } \{ \} | | and the named pairs."""
        opener = self.next()
        outer = self.bars, self.such
        self.bars, self.such = int(opener == "|"), opener == r"\{"
        if opener != "|" and (close := self.accept(CLOSERS[opener][0])):
            content: Node | None = None
        else:
            content = self.answer()
            if opener == r"\{" and self.accept("|", r"\mid", ":"):
                element, conditions = content, self.answer()
                parts = conditions.args if conditions.op == "list" else (conditions,)
                content = Node("such", parts if element.op == "sym" else (element, *parts))
            close = self.accept(*CLOSERS[opener])
        self.bars, self.such = outer
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
        alone = opener == "(" and close == ")" and content.op != "list"
        if opener == "{" or content.op == "matrix" or alone:
            return content
        rows = [item.args[2 * (item.op == "group") :] for item in items
                if item.op == "list" or (item.op == "group" and item.args[0] == "[")]  # fmt: skip
        if opener == "[" and len(rows) == len(items) and len({*map(len, rows)}) == 1:
            return Node("matrix", tuple(Node("row", row) for row in rows))  # [1, 2; 3, 4]
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
        conditions = [row[1] for row in rows if len(row) == 2 and row[1].op != "sym"]
        rest = Node("minus", (Node("sym", ("set:R",)), Node("cup", tuple(conditions))))
        rows = [[rest if cell.args in _OTHERWISE else cell for cell in row] for row in rows]
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


def _inner(part: Node) -> Node:
    """What square brackets around a factor hold: x[a + b], but no x[a, b]."""
    bracket = part.op == "group" and part.args[0] == "["
    if bracket and (part.args[1] != "]" or len(part.args) != 3):
        raise ParseError("an interval among factors")
    return part.args[2] if bracket else part


def number(token: str) -> Node:
    """A numeral as ``("num", (exact value, digits after the point, significant digits))``."""
    mantissa, _, exponent = token.lower().partition("e")
    whole, _, decimals = mantissa.partition(".")
    if len(token) > MAX_DIGITS or abs(int(exponent or 0)) > MAX_DIGITS:
        raise ParseError("too large a number")
    places = len(decimals) - int(exponent or 0)
    value = int(whole + decimals or 0) / Fraction(10) ** places
    return Node("num", (value, max(0, places), len((whole + decimals).lstrip("0"))))


def _mixed(top: list[Node], factor: Node) -> Node:
    """1\\frac{1}{2} as 3/2, before a sign as well: the integer is taken off the factors."""
    if factor.op in ("percent", "degree"):
        return Node(factor.op, (_mixed(top, factor.args[0]),))
    parts = [part.args[0] for part in factor.args if factor.op == "div" and part.op == "num"]
    proper = len(parts) == 2 and parts[0] < parts[1] and parts[0].denominator == 1
    return Node("add", (top.pop(), factor)) if proper and parts[1].denominator == 1 else factor
