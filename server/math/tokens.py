"""An answer as a list of tokens: numbers, commands, letters, signs."""

import re

from .vocabulary import FUNCTIONS, GREEK

MAX_TOKENS = 4_000
_TOKEN = re.compile(
    r"(?P<num>\d+\.?\d*(?:[eE][+-]?\d+(?![\d.]))?|\.\d+)"
    r"|(?P<cmd>\\[A-Za-z]+|\\.)|(?P<word>[A-Za-z]+)|(?P<space> +)|(?P<op>.)"
)
_THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?(?!,?\d)")
_VOWELS = frozenset("eio")
_SUBSCRIPT = re.compile(r"\d+(?!\d|\^(?:\{[^{}]*)?[-+(]*[A-Za-z])")
_WORDS = FUNCTIONS | {"pi"} | {name for name in GREEK if len(name) > 2}


class ParseError(ValueError):
    """The text is not an answer of a form this parser knows."""


class TooComplex(ParseError):
    """The text exceeds a limit: no other parser should try it either."""


def tokens(text: str, thousands: bool) -> list[str]:
    """The tokens of an answer; words that are no function fall into letters."""
    found: list[str] = []
    position = depth = 0
    while position < len(text):
        match = _THOUSANDS.match(text, position) if thousands and depth == 0 else None
        match = match or _TOKEN.match(text, position)
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
            found += _letters(token, text.isalpha())
            if _SUBSCRIPT.match(text, position) and found[-2:-1] != [r"\frac"]:
                found.append("_")  # x1 is x_1, but n2^n a product
        elif kind != "space":
            found.append("\\" + token if kind == "word" else token)
    return found


def _letters(word: str, alone: bool) -> list[str]:
    """A run of letters: a product of variables if short and lower case, else one name; an answer
    that is a word (``alone``, with a vowel) isn't a product either."""
    spoken = alone and len(word) > 1 and not _VOWELS.isdisjoint(word)
    if (word.isupper() and len(word) > 1) or len(word) > 4 or spoken:
        return [word]
    return list(word)
