r"""Answers in words: numbers spelt out, and stock phrases for what has a symbol too."""

import re

from .tokens import PATTERNS, VOCABULARY

_ONES, _TENS, _ORDINALS = (text.split() for text in VOCABULARY["numbers"].values())
VALUES = dict(zip((*_ONES, *_TENS), (*range(20), *range(20, 100, 10)), strict=True))
POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
PARTS = {"half": 2, "halve": 2, "quarter": 4} | {w: n for n, w in enumerate(_ORDINALS, 1) if n > 2}
_SMALL = VALUES | {
    f"{tens} {ones}": VALUES[tens] + n
    for tens in _TENS for n, ones in enumerate(_ONES[1:10], 1)
}  # fmt: skip
_STOCK = [(re.compile(text), meaning) for meaning, text in VOCABULARY["phrases"].items()]


def number_in_words(text: str) -> str | None:
    """``21`` for "twenty-one", ``3/4`` for "three quarters", None for "two one"."""
    text = text.replace("-", " ")
    whole, plus, part = text.rpartition(" plus ")
    count, _, name = part.rpartition(" ")
    size = PARTS.get(name.removesuffix("s"))
    if size and (name[-1] == "s") != (count in ("a", "one")):  # the twenty-third is no fraction
        numbers = _whole(whole) if plus else 0, 1 if count == "a" else _whole(count)
        return None if None in numbers else f"{numbers[0] * size + numbers[1]}/{size}"
    number = _whole(text)
    return None if number is None else str(number)


def _whole(text: str) -> int | None:
    """A whole number: so many of its highest power of ten, and a rest."""
    for word, power in reversed(POWERS.items()):
        head, found, tail = text.partition(f" {word}")
        if found:
            count, rest = _whole(head), _whole(tail[1:]) if tail else 0
            fits = count is not None and rest is not None and rest < 10**power
            return count * 10**power + rest if fits else None
    return _SMALL.get(text)


def phrase(text: str) -> str | None:
    """What a phrase in lower case stands for, or None if it has no other form."""
    if (exactly := PATTERNS.exactly.sub("", text)) != text:
        return phrase(exactly) or exactly
    bare = PATTERNS.article.sub("", text)
    found = (to for pattern, to in _STOCK for some in (bare, text) if pattern.fullmatch(some))
    if stock := next(found, None) or number_in_words(bare) or number_in_words(text):
        return stock
    head, _, counted = bare.partition(" ")
    if counted and (number := number_in_words(head)):
        return f"{number} {counted}"  # eight weeks
    return str(_ORDINALS.index(bare) + 1) if bare in _ORDINALS else None
