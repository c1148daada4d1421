"""An answer as a list of tokens, and the words and signs that answers are made of."""

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def word_set(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


def table(name: str) -> dict[str, Any]:
    """A TOML file beside this module."""
    return tomllib.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def filled(text: str) -> str:
    """A pattern with other ones in the places that are named after them: <ARGUMENT>."""
    return re.sub("<([A-Z_]+)>", lambda match: filled(PARTS[match[1]]), text)


VOCABULARY, RULES = table("vocabulary.toml"), table("rules.toml")
UNITS = word_set(VOCABULARY["units"]["known"])
PARTS = {name.upper(): text for name, text in RULES["patterns"].items()}  # of other patterns
PARTS["KNOWN"] = "|".join(sorted(UNITS, key=lambda unit: (-len(unit), unit)))
PATTERNS = SimpleNamespace(**{name.lower(): re.compile(filled(PARTS[name])) for name in PARTS})
FUNCTIONS, GREEK = word_set(VOCABULARY["functions"]), word_set(VOCABULARY["greek"])
NAMES = GREEK | word_set(VOCABULARY["names"])
ACCENTS = frozenset(map("\\{}".format, VOCABULARY["accents"].split()))
SYMBOLS = {r"\infty": "oo", r"\pi": "pi", r"\imath": "i"}
RELATIONS, CLOSERS = (VOCABULARY[name] for name in ("relations", "closers"))
SET_OPERATIONS = {r"\cup": "cup", r"\cap": "cap", r"\setminus": "minus", r"\backslash": "minus"}
TIMES = frozenset(["*", r"\cdot", r"\times", r"\ast", r"\div", "/"])
NOT_A_FACTOR = word_set(VOCABULARY["not_a_factor"]) | {*RELATIONS} | TIMES
MAX_TOKENS = 4_000
_WORDS = FUNCTIONS | {"pi"} | {name for name in GREEK if len(name) > 2}


class ParseError(ValueError):
    """The text is not an answer of a form this parser knows."""


class TooComplex(ParseError):
    """The text exceeds a limit: no other parser should try it either."""


def split(text: str, thousands: bool) -> list[str]:
    """The tokens of an answer; words that are no function fall into letters."""
    if not text.isascii() and not text.replace("°", "").isascii():
        raise ParseError("words of another language")
    found: list[str] = []
    position = depth = 0
    alone = re.sub(r"\\text\{[^{}]*\}|[ ,]", "", text).isalpha()
    while position < len(text):
        match = PATTERNS.thousands.match(text, position) if thousands and depth == 0 else None
        match = match or PATTERNS.token.match(text, position)
        if match is None or len(found) > MAX_TOKENS:
            raise TooComplex("too many tokens, or not text")
        position = match.end()
        token, kind = match[0], match.lastgroup
        if token == r"\text" and position < len(text) and text[position] == "{":
            position = text.find("}", position) + 1
            if not position:
                raise TooComplex("text without an end")
            token = text[match.start() : position]
        depth += (token in ("(", "[", r"\{")) - (token in (")", "]", r"\}"))
        if kind is None:
            token = token.replace(",", "")
        if kind == "word" and token not in _WORDS:
            found += _letters(token, alone)
            argument = found[-2:-1] in ([r"\frac"], [r"\binom"])
            if not argument and PATTERNS.subscript.match(text, position):
                found.append("_")  # x1 is x_1, but n2^n a product
        elif kind != "space":
            found.append("\\" + token if kind == "word" else token)
    return found


def _letters(word: str, alone: bool) -> list[str]:
    """A run of letters: a product of variables if short, in lower case and no word; else a name."""
    spoken = alone and len(word) > 1 and not {*"eio"}.isdisjoint(word)
    if (word.isupper() and len(word) > 1) or len(word) > 4 or spoken:
        return [word]
    return list(word)
