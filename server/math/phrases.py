r"""Answers in words: numbers spelt out, and stock phrases for what has a symbol too."""

import re

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
PARTS = {"half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6,
          "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10}  # fmt: skip
VALUES = {word: n for n, word in enumerate(_ONES.split())} | {
    word: 20 + 10 * n for n, word in enumerate(_TENS.split())
}
POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth "
    "fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth"
)
_NUMBER = re.compile(
    rf"(?P<tens>{_TENS.replace(' ', '|')})?(?:(?<=y)[ -](?=[a-z]))?"
    rf"(?P<ones>{_ONES.replace(' ', '|')})?"
    rf"(?: (?P<power>{'|'.join(POWERS)})|[ -](?P<part>{'|'.join(PARTS)})s?)?"
)
_ARTICLE = re.compile(r"(?:an?|the) (?=[a-z]{3})")
_STOCK = {
    "infinitely many solutions": r"\text{infinitely many}", "infinity": r"\infty", "true": "yes",
    "positive infinity": r"\infty", "negative infinity": r"-\infty", "minus infinity": r"-\infty",
    "empty set": r"\emptyset", "no solution": r"\emptyset", "no solutions": r"\emptyset",
    "no real solution": r"\emptyset", "no real solutions": r"\emptyset", "false": "no",
    "all real numbers": r"\mathbb{R}", "all reals": r"\mathbb{R}", "real numbers": r"\mathbb{R}",
    "all real values": r"\mathbb{R}", "does not exist": "dne",
}  # fmt: skip


def number_in_words(text: str) -> str | None:
    """The digits of a number up to 99, alone or times a power of ten, or of so many parts.

    >>> number_in_words("twenty-one"), number_in_words("three quarters"), number_in_words("two one")
    ('21', '3/4', None)
    """
    match = _NUMBER.fullmatch(text)
    tens, ones = (VALUES.get(match[n], 0) for n in ("tens", "ones")) if match else (0, 0)
    unspelt = not match or not (match["tens"] or match["ones"])
    if unspelt or (tens and match["ones"] and not 0 < ones < 10):
        return None
    if match["part"]:
        return f"{tens + ones}/{PARTS[match['part']]}"
    return str((tens + ones) * 10 ** POWERS.get(match["power"], 0))


def phrase(text: str) -> str | None:
    """What a phrase in lower case stands for, or None if it has no other form."""
    text = without_article(text)
    if found := _STOCK.get(text) or number_in_words(text):
        return found
    head, _, counted = text.rpartition(" ")
    if counted[-1:] == "s" and (number := number_in_words(head)):
        return f"{number} {counted}"  # eight weeks
    ordinals = _ORDINALS.split()
    return str(ordinals.index(text) + 1) if text in ordinals else None


def without_article(text: str) -> str:
    """A phrase in lower case without the a, an or the before it."""
    return _ARTICLE.sub("", text, count=1) if _ARTICLE.match(text) else text
