"""The answer of a math response, and what can be said about it without the LaTeX server."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

MATH_SOURCES = ("open_reasoner_zero", "math500", "aime2024", "gpqa", "minerva", "amc")
"""Data sources whose answers are LaTeX."""

# A box opens, a brace opens or closes; escaped braces and the line break `\\` are neither (but
# `\\boxed` is a box with its backslash doubled).
_BRACES = re.compile(r"(?P<box>\\boxed\s*\{)|\\\\(?!boxed)|\\[{}]|(?P<brace>[{}])")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_LETTER = re.compile(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])")


@dataclass(frozen=True, slots=True)
class Comparison:
    """An answer and its reference, as `compare` leaves them.

    Example: ``Comparison(pred="0.6", gold="\\\\frac{3}{5}", equal=None)``: the server must say.
    """

    pred: str
    gold: str
    equal: bool | None
    """None: not known without the LaTeX server."""


def compare(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    max_answer_length: int = 30,
) -> Comparison:
    r"""What a response answers, and whether that is right as far as strings can tell.

    * The answer is the last box; with `extra_info["find_maj"]` the most frequent one, the latest of
      them on a tie. Without a box it is the whole response.
    * Identical to the reference: right. Else longer than `max_answer_length` characters: wrong.
    * `gpqa`: the first letter that stands alone is the choice.

    These are the published rules (arXiv 2509.07558, its repository).

    >>> compare("amc", r"so \boxed{\frac{3}{5}}", "0.6")
    Comparison(pred='\\frac{3}{5}', gold='0.6', equal=None)

    Args:
        data_source: one of `MATH_SOURCES`. solution_str: the decoded response.
        ground_truth: LaTeX, in a box or not, or a number. extra_info: may hold `find_maj`.

    Raises: ValueError if the ground truth is something else, or empty, or no letter for `gpqa`.
    """
    gold = reference(data_source, ground_truth)
    boxes = boxed_answers(solution_str)
    if not boxes:
        pred = solution_str.strip()
    elif (extra_info or {}).get("find_maj"):
        pred = most_frequent(boxes)
    else:
        pred = boxes[-1]
    if pred != gold and len(pred) > max_answer_length:
        return Comparison(pred, gold, False)
    if data_source == "gpqa":
        pred, gold = choice(pred), choice(gold)
        return Comparison(pred, gold, pred == gold)
    return Comparison(pred, gold, True if pred == gold else None)


def boxed_answers(text: str) -> list[str]:
    r"""What stands in each ``\boxed{…}`` with balanced braces, in order; nested: the innermost.

    Takes time in proportion to the text, whatever its braces do.

    >>> boxed_answers(r"\boxed{1}, no: \boxed{\frac{1}{2}}, \boxed{3")
    ['1', '\\frac{1}{2}']
    """
    answers: list[str] = []
    opened: list[int] = []  # where the content of each open brace starts
    newest = -1  # the same for the box that was opened last
    for match in _BRACES.finditer(text):
        if match["box"]:
            newest = match.end()
            opened.append(newest)
        elif match["brace"] == "{":
            opened.append(match.end())
        elif match["brace"] and opened and opened.pop() == newest:
            answers.append(text[newest : match.start()].strip())
    return answers


def most_frequent(answers: list[str]) -> str:
    """The answer that stands most often; of several, the one whose last occurrence is the latest.

    >>> most_frequent(["1", "2", "3", "2", "1"])
    '1'
    """
    # Of equal counts `most_common` takes the first that it has seen, so it starts at the end.
    return Counter(reversed(answers)).most_common(1)[0][0]


def choice(text: str) -> str:
    r"""The first letter that stands alone, as a capital; empty without one.

    >>> choice(r"\text{(b)} because"), choice("Because")
    ('B', '')
    """
    match = _LETTER.search(_COMMAND.sub(" ", text))
    return match[0].upper() if match else ""


def reference(data_source: str, ground_truth: Any) -> str:
    """The right answer, as `compare` takes it; raises ValueError like `compare`."""
    number = isinstance(ground_truth, Real) and not isinstance(ground_truth, bool)
    text = str(ground_truth) if number else ground_truth
    if isinstance(text, str):
        gold = (boxed_answers(text) or [text.strip()])[-1]
        if gold and (data_source != "gpqa" or choice(gold)):
            return gold
    wanted = "a letter such as 'B'" if data_source == "gpqa" else r"LaTeX such as '\frac{3}{5}'"
    raise ValueError(f"the ground truth of {data_source} must be {wanted}, not {ground_truth!r}")
