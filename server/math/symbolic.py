r"""The last stage: math-verify, for what the parser of answers doesn't read (sums, integrals …).

It is used as documented (the reference first, both within ``$``), and only its LaTeX reader: its
plain-expression reader evaluates Python. Time limits are the caller's, so its own, which need the
signals of the main thread, are off.
"""

import logging
import re
from collections import Counter

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its limits are off

MAX_LENGTH = 300  # its parser may take time exponential in the number of brackets
_LETTER = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])")
_BARE_SCRIPT = re.compile(r"(?<=[_^])([A-Za-z])")  # it doesn't read \int_1^e
_EQUALS = re.compile(r"(?<![<>!])=(?![^{}]*\}|[^()]*\))")
_NAME = re.compile(r"[A-Za-z](?:_?\w|[(\[][^()\[\]]*[)\]])?")
_PROSE = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{3,}")


def readable(gold: str, pred: str) -> bool:
    """Whether math-verify may be trusted with a pair: short, no prose, as many
    ellipses and derivatives, letters alike in case."""
    if max(len(gold), len(pred)) > MAX_LENGTH:
        return False
    if Counter(_PROSE.findall(gold)) != Counter(_PROSE.findall(pred)):
        return False
    if any(gold.count(sign) != pred.count(sign) for sign in (r"\ldots", r"\partial")):
        return False
    letters = [set(_LETTER.findall(text)) for text in (gold, pred)]
    return letters[0] == letters[1] or {c.lower() for c in letters[0]} != {
        c.lower() for c in letters[1]
    }


def unread(gold: str, pred: str) -> bool:
    """Whether a normalised answer has words beside numbers that the reference hasn't."""
    return bool(re.search(r"\d", pred) and {*_PROSE.findall(pred)} - {*_PROSE.findall(gold)})


def equal(gold: str, pred: str) -> bool | None:
    """What math-verify says of two normalised answers; None if it can't read one of them.

    It would compare only the last sides of equations: here each side has its equal, and where one
    answer is no equation, all sides of the other but names equal it.
    """
    if not readable(gold, pred):
        return False
    sides = [_EQUALS.split(text) for text in (gold, pred)]
    if len(sides[0]) != len(sides[1]):
        sides = [[side for side in part if not _NAME.fullmatch(side)] or part for part in sides]
        longer = max(map(len, sides))
        if min(map(len, sides)) > 1:
            return False
        sides = [part * (longer // len(part)) for part in sides]
    verdicts = [_verified(*pair) for pair in zip(*sides, strict=True)]
    return None if None in verdicts else all(verdicts)


def _verified(gold: str, pred: str) -> bool | None:
    from math_verify import LatexExtractionConfig, parse, verify

    trees = [
        parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback",
              parsing_timeout=None)
        for text in (_BARE_SCRIPT.sub(r"{\1}", gold), _BARE_SCRIPT.sub(r"{\1}", pred))
    ]  # fmt: skip
    if not all(trees):
        return None
    return bool(verify(*trees, timeout_seconds=None))
