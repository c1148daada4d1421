"""Strings to strings, in linear scans: one spelling for each way to typeset an answer."""

import re
from collections.abc import Callable
from functools import lru_cache
from itertools import permutations
from unicodedata import normalize

from . import tokens
from .phrases import PARTS, VALUES, number_in_words, phrase
from .tokens import FUNCTIONS, PATTERNS, RULES, VOCABULARY
from .units import CHANGES


def _names(table: str) -> dict[str, str]:
    """Each name of a table of the vocabulary with what it stands for."""
    return {name: sign for sign, names in VOCABULARY[table].items() for name in names.split()}


_WORDS, _SYNONYMS, _OPERATORS = map(_names, ("words", "commands", "operators"))
UNIT_LETTERS = frozenset("mgshLlKNJWVCFA")

_SIGNS = re.findall(r"(\S) (\S+)", VOCABULARY["signs"])
_CHARACTERS = {sign: plain + " " * plain[1:].isalpha() for sign, plain in _SIGNS}
_TABLE = str.maketrans(
    _CHARACTERS
    | dict.fromkeys(map(chr, range(32)), " ") | dict.fromkeys('"“”`', "")
    | {sign: _CHARACTERS.get(plain := normalize("NFKC", sign), plain)
       for sign in map(chr, (*range(0xFF01, 0xFF5F), *range(0x1D400, 0x1D800)))}  # ＋, 𝑥
)  # fmt: skip

_FOREIGN = _names("foreign")
_FOREIGN_UNIT = re.compile(r"(?<=[\d}]) ?(\\(?:text|mathrm) ?\{ ?)?[个名位只本颗支棵朵]?"
    rf"({'|'.join(sorted(_FOREIGN, reverse=True))})(?![^\x00-\x7f])(?(1) ?}})")  # fmt: skip


@lru_cache(maxsize=1024)  # a reference comes with each answer to its question
def normalise(text: str) -> str:
    r"""The canonical spelling of an answer: layout, fonts and filler removed.

    >>> normalise(r"$\left( \dfrac{1}{2},\, 3 \right)$.")
    '(\\frac{1}{2},3)'
    """
    text = text.translate(_TABLE)
    if r"\begin" not in text:  # in an environment a double backslash ends a row
        text = re.sub(r"\\\\(?=[A-Za-z()\[\]{}])", r"\\", text)
    if "circled" in text:
        text = PATTERNS.circled.sub(lambda match: chr(0x245F + int(match[1])), text)
    if not text.isascii():
        text = PATTERNS.foreign_label.sub("", PATTERNS.foreign_text.sub(r"\1", text))
        text = choice[1] if (choice := PATTERNS.foreign_choice.fullmatch(text)) else text
        text = _FOREIGN_UNIT.sub(lambda match: rf"\text{{{_FOREIGN[match[2]]}}}", text)
    text = unbox(text)
    if PATTERNS.only_circled.fullmatch(text):  # in another answer a footnote, or nothing
        bare = re.sub(r"\\text|[{}和与及]", "", text)
        text = PATTERNS.circled_digit.sub(lambda match: f"({ord(match[0]) - 0x245F})", bare)
    for sign, pattern, new in _RULES:  # a pattern is searched only where its sign is
        text = pattern.sub(new, text) if sign in text else text
    text = text.lstrip(" ,;:=").rstrip(" .,;:")
    text = text if text[:1] != "." or text[1:2].isdigit() else text.lstrip(".")
    return phrase(spelt) or text if (spelt := _in_words(text)) else text


def _connectives(text: str) -> str:
    """Between inequalities "and" and "or" keep their meaning; in a list both are a comma."""
    text = PATTERNS.connective.sub(r"\\\1 ", text)
    parts = PATTERNS.connective.split(text)[::2]
    names = [PATTERNS.assigned.match(part) for part in parts]
    if r"\land" not in text and all(names) and len({name[0] for name in names if name}) > 1:
        return text  # x = 1 or y = 2
    if all(map(PATTERNS.statement.fullmatch, parts)):
        return text
    if all(map(PATTERNS.function.match, parts)):
        return PATTERNS.connective.sub(", ", text)
    if not all(map(PATTERNS.inequality.search, parts)):
        text = re.sub(r"\\land ", ", ", text)
    return text if any(map(PATTERNS.inequality.search, parts)) else re.sub(r"\\lor ", ", ", text)


def unbox(text: str) -> str:
    r"""The contents of ``\boxed{…}``, several as a list; what belongs to the only box stays."""
    boxes, last = [], 0
    while match := PATTERNS.box.search(text, last):
        end = closing_brace(text, match.end())
        boxes.append(PATTERNS.box.sub("{", text[match.end() : end]))  # around a box in a box
        last = end + 1
    tail = text[last:].strip(" $.")
    if len(boxes) == 1 and PATTERNS.unit_after_box.match(tail):
        boxes[0] += tail
    return ",".join(boxes) if boxes else text


def closing_brace(text: str, start: int) -> int:
    """The index of the brace that closes the one before ``start``; the end if none does."""
    depth = 1
    for match in PATTERNS.brace.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return len(text)


def words(text: str) -> str | None:
    r"""Letters of an answer made of words only, in lower case (``\text{Even}`` → even)."""
    spelt = _in_words(text)
    bare = re.sub(r"\b(?:an?|the) (?=[a-z]{3})", "", PATTERNS.article.sub("", spelt or ""))
    bare = PATTERNS.idle.sub("", bare)
    bare = re.sub(r"verges?\b", "vergent", re.sub(r"\bno such [a-z ]*", "no such", bare))
    bare = re.sub(r"\A(mon|tue|wed|thu|fri|sat|sun)(?:n?e?u?r?s?day|r?s)?\Z", r"\1", bare)
    if PATTERNS.unordered.search(bare):
        bare = "".join(sorted(re.findall(r"[a-z]+|\d+", bare)))
    bare = re.sub(r"(?<!\d)[ ,]+|[ ,]+(?!\d)", "", bare)
    return bare if len(bare) > 1 else None


def _in_words(text: str) -> str | None:
    bare = " ".join(re.sub(r"\\text\{|\}", " ", text).lower().split())
    spoken = re.search("[a-z]{3}", bare) or not re.search(r"\d", bare)
    return bare if spoken and PATTERNS.spelt.fullmatch(text) else None


def _plain_text(match: re.Match[str]) -> str:
    r"""What ``\text{…}`` stands for: a function, a letter, a separator, a number, or words."""
    inner = PATTERNS.answer_is.sub("", match[1], count=1).strip(" .")
    lowered = inner.lower().strip(" ,")
    start = match.string[: match.start()].rstrip()
    before, multiplied = start[-1:], start.endswith(r"}\cdot")
    time = inner in ("min", "sec") and (before.isdigit() or before in ("/", "}"))
    if inner in FUNCTIONS and not time:
        return f"\\{inner} "
    if lowered in _WORDS:
        return _WORDS[lowered]
    if inner in UNIT_LETTERS and (before.isdigit() or before in ("}", "°") or multiplied):
        return rf"\text{{{inner}}}"
    if unit := PATTERNS.power_of_unit.fullmatch(inner):
        return rf"\text{{{unit[1]}}}{unit[2] or ''}"
    if PATTERNS.formula.fullmatch(inner) or PATTERNS.choices.fullmatch(inner):
        return inner
    if digits := number_in_words(lowered):
        return f" {digits} "
    parts = re.split(r"(?:, | |^)(?:and|or) ?(?![A-Za-z])|, ", inner)
    if len(parts) > 1 and match[0][:5] == r"\text":
        joined = ",".join(rf"\text{{{part.strip()}}}" if part else "" for part in parts)
        return PATTERNS.text.sub(_plain_text, joined)
    return rf"\text{{{inner}}}" if match[0][:5] != r"\math" or " " in inner else f" {inner}"


def _repeating(match: re.Match[str]) -> str:
    """0.1(6) as a fraction: the digits up to the end of a period, less those before it."""
    whole, fixed, period = match.groups()
    numerator = int(whole + fixed + period) - int((whole + fixed) or 0)
    denominator = (10 ** len(period) - 1) * 10 ** len(fixed)
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def _listed(match: re.Match[str]) -> str:
    """For which numbers there is a member: k = 0, 1, ..., 5."""
    if match[1] not in re.sub(r"\\[a-z]+", "", match.string[: match.start()]):
        return match[0]
    low, dots = match[2].partition(",")[0], r"\ldots" in match[0]
    between = map(str, range(int(low), min(int(match[3]) + 1, 99)))
    numbers = ",".join(between) if dots else match[2] + match[3]
    return rf",{match[1]}\in\{{{numbers}\}}"


def _cases(match: re.Match[str]) -> str:
    """A function in pieces as an environment of cases; of one piece, value and condition."""
    rows = [row.split(r"\text{for}") for row in PATTERNS.piece.split(match[0])]
    name = PATTERNS.defined.match(next(row[0] for row in rows if row[1:]))
    for row in rows:
        if name and row[0].startswith(name[0]):
            row[0] = row[0].removeprefix(name[0])
        elif name and not row[1:] and (at := re.match(rf"{name[1]}_\{{?(\d+)\}}?=", row[0])):
            row[:] = row[0].removeprefix(at[0]), f"{name[2]}={at[1]}"  # a_1 = 2
        if len(row) != 2 or "=" in row[0] * len(rows[1:]):
            return match[0]
    if len(rows) == 1:
        return f"{rows[0][1]},{name[0] if name else ''}{rows[0][0]}"
    lines = r"\\".join(map("&".join, rows))
    return rf"{name[0] if name else ''}\begin{{cases}}{lines}\end{{cases}}"


def _permuted(match: re.Match[str]) -> str:
    """Tuples with all that their entries make in another order."""
    tuples = re.findall(r"\(([^()]*)\)", match[1])[:9]
    every = (p for some in tuples if some.count(",") < 5 for p in permutations(some.split(",")))
    return ",".join(f"({','.join(p)})" for p in dict.fromkeys(every)) if tuples else match[0]


_MAKERS: dict[str, Callable[[re.Match[str]], str]] = {
    "group": lambda m: m[m.lastindex] if m.lastindex else " ",  # unlike a template, free if unused
    "text": _plain_text, "repeating": _repeating, "listed": _listed, "cases": _cases,
    "permuted": _permuted, "connectives": lambda m: _connectives(m[0]),
    "parts": lambda m: ";".join(filter(None, m.groups())),
    "command": lambda m: _SYNONYMS.get(m[1], m[0]), "word": lambda m: _WORDS[m[1]],
    "operator": lambda m: _OPERATORS[m[0]], "primes": lambda m: "''" if m[1] else "'",
    "currency": lambda m: rf"{m[2] or ''}\text{{{VOCABULARY['currencies'][m[1] or m[3]]}}}",
    "base": lambda m: f"{m[1].upper()}_{m[2]}", "joined": lambda m: m[0].replace(" ", ""),
    "residue": lambda m: rf"\pmod{{{m[2].strip('{}')}}}", "unmarked": lambda m: "" if m[1] else " ",
    "pairs": lambda m: m[0].replace(")(", "),("), "braced": lambda m: rf"\text{{{m[m.lastindex]}}}",
    "mapped": lambda m: f"{m[1]}({m[2]})={m[3]}" if m[1] else m[3] if m[2] in m[3] else m[0],
    "tangent": lambda m: VOCABULARY["tangents"][m[1]] + " " * len(m[2]),
    "derivative": lambda m: f"\0{m[3]}'{m[2] and chr(39)}_{m[5]}{m[4] or ''}",
    "said": lambda m: m[0] if CHANGES.search(m[1].lower()) else "",
    "dots": lambda m: f"\0{m[3]}'{m[1] and chr(39)}{m[4] or ''}",
}  # fmt: skip
tokens.PARTS["WORD"] = "|".join(sorted(_WORDS, reverse=True))
tokens.PARTS |= {"VALUES": "|".join(VALUES), "PARTS": "|".join(PARTS)}
_RULES = [
    (sign, re.compile(tokens.filled(pattern)), _MAKERS[new[1:]] if new[:1] == "@" else new)
    for sign, pattern, new in RULES["rules"]
]
