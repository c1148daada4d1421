r"""The last stage: math-verify, for what the parser of answers doesn't read (sums, integrals …).

Only its LaTeX reader is used: the other one evaluates Python. Time limits are the caller's.
"""

import logging
import re

from .tokens import FUNCTIONS, NAMES, PATTERNS, VOCABULARY, word_set

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its limits are off

MAX_LENGTH = 300  # its parser may take time exponential in the number of brackets
_KNOWN = FUNCTIONS | NAMES | word_set(VOCABULARY["math_verify"])


def readable(gold: str, pred: str) -> bool:
    """Whether math-verify may be trusted with a pair: short, no prose, letters alike in case."""
    pair = gold, pred
    prose = [re.findall(rf"{PATTERNS.prose.pattern}|\\ldots|\\partial|'", text) for text in pair]
    letters = [{*PATTERNS.letter.findall(text)} for text in pair]
    lowered = [{letter.lower() for letter in own} for own in letters]
    alike = prose[0] == prose[1] and (letters[0] == letters[1] or lowered[0] != lowered[1])
    own, its = ({*PATTERNS.command.findall(text)} for text in pair)
    known = its <= own | _KNOWN and "{}" not in pred
    return max(map(len, pair)) <= MAX_LENGTH and alike and known and (gold + pred).isascii()


def unread(gold: str, pred: str) -> bool:
    """Whether a normalised answer has words beside numbers that the reference hasn't."""
    bare = (re.sub(r"\\(?:begin|end)\{\w+", "", text) for text in (pred, gold))
    words, known = ({*PATTERNS.prose.findall(text)} for text in bare)
    return bool(re.search(r"\d", pred) and words - known)


def unfinished(gold: str, pred: str) -> bool:
    """Whether an answer leaves a limit, an integral or a sum to do that the reference doesn't."""
    left = {*PATTERNS.operation.findall(pred)} - {*PATTERNS.operation.findall(gold)}
    left -= {"sum", "prod"} if PATTERNS.letter.search(gold) else set()  # n(n+1)/2 may be a sum
    return bool(left) and all(map(PATTERNS.operation.search, PATTERNS.equals.split(pred)))


def equal(gold: str, pred: str) -> bool | None:
    """What math-verify says of two normalised answers; None if it can't read one. It compares only
    the last sides of equations: here each has its equal, and all but names equal a lone one."""
    if not readable(gold, pred):
        return False
    braced = (PATTERNS.bare_script.sub(r"{\1}", text) for text in (gold, pred))
    sides = [*map(PATTERNS.equals.split, braced)]
    if len(sides[0]) != len(sides[1]):
        named = PATTERNS.short_name.fullmatch
        sides = [[side for side in part if not named(side)] or part for part in sides]
        if min(map(len, sides)) > 1:
            return False
        sides = [part * (max(map(len, sides)) // len(part)) for part in sides]
    verdicts = [_verified(*pair) for pair in zip(*sides, strict=True)]
    return None if None in verdicts else all(verdicts)


def _verified(gold: str, pred: str) -> bool | None:
    from math_verify import LatexExtractionConfig, parse, verify

    reader = {"fallback_mode": "no_fallback", "parsing_timeout": None}
    trees = [parse(f"${text}$", [LatexExtractionConfig()], **reader) for text in (gold, pred)]
    return bool(verify(*trees, timeout_seconds=None)) if all(trees) else None
