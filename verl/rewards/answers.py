"""What a response to a math problem answers, and whether it is right where strings alone tell."""

import re
from collections import Counter
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple

# A box opens, or holds a number; a brace opens or closes. `\{` and `\\` do neither; `\\boxed` does.
_PARTS = re.compile(
    r"(?P<box>\\(?:boxed|fbox|framebox)\s*\{)|\\boxed\s*(?P<word>[-+]?\d(?:[^\s{}$\\]*[^\s{}$\\.,;:!?])?)|"
    r"\\\\(?!boxed)|\\[{}]|(?P<brace>[{}])"
)
_SPACE = r"(?:[\s$]|\\[,;:! ]|\\q?quad\b|\\text\s*\{|\})"
_SAME_ANSWER = re.compile(rf"{_SPACE}*(?:,|and\b|or\b)(?:{_SPACE}|and\b|or\b)*")  # between boxes
_COMMAND = re.compile(r"\\[A-Za-z]+")
_FIRST_LETTER = re.compile(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])")
_CAPITAL = re.compile(r"(?<![A-Za-z])(?!I\s+[a-z])[A-Z](?![A-Za-z'])")
# In parentheses, before a full stop at the start, or after a word that says that it is the choice.
_CHOICE = re.compile(
    r"\([A-Z]\)|\A\W*[A-Z]\W*[.:)]|\b(?:answer|option|choice|is)\b\W*(?:is\b)?\W*[A-Z](?![\w'])",
    re.I,
)
_SPACING = re.compile(r"\s|\$|\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,;:!]")
SLACK = 20  # characters that an answer may have more than the reference, whatever the limit
MOST = 5000  # characters that the LaTeX server reads


class Comparison(NamedTuple):
    """An answer, and what strings alone tell of it."""

    pred: str
    gold: str  # the reference
    equal: bool | None  # None: only the LaTeX server can tell
    too_long: bool = False  # whether the length alone has decided


def compare(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    published: bool = False,
    max_answer_length: int = 30,
) -> Comparison:
    r"""What a response to one of `MATH_SOURCES` answers, and whether it is right, if strings tell.

    * The answer is the last of `final_answers`; with `extra_info["find_maj"]` the most frequent, of
      them the latest. Of `gpqa` it is a letter (`choice`).
    * Identical to the reference: right. Else wrong if it has more characters, not counting spaces,
      than `max_answer_length` and than the reference with `SLACK`, or than `MOST` in all.
    * `published` (arXiv 2509.07558, its repository): the last innermost box, else the whole
      response; `max_answer_length` alone, spaces included; of `gpqa` the first letter.
    Raises: as `reference`. Example: ``compare("amc", r"so \boxed{\frac{3}{5}}", "0.6")`` is
    ``Comparison(pred=r"\frac{3}{5}", gold="0.6", equal=None, too_long=False)``."""
    gold = reference(data_source, ground_truth)
    if published:
        answers = [text for *_, text in boxes(solution_str, True)] or [solution_str.strip()]
    else:
        answers = final_answers(solution_str)
    pred = answers[-1]
    if (extra_info or {}).get("find_maj"):
        # Of equal counts `most_common` takes the first that it has seen, so it starts at the end.
        pred = Counter(reversed(answers)).most_common(1)[0][0]
    size, most = len(pred), max_answer_length
    if not published:
        size, most = len(_SPACING.sub("", pred)), max(most, len(gold) + SLACK)
    if pred != gold and (size > most or len(pred) > MOST):
        return Comparison(pred, gold, False, True)
    if data_source == "gpqa":
        pred, gold = choice(pred, published), choice(gold, published)
        return Comparison(pred, gold, pred == gold)
    return Comparison(pred, gold, True if pred == gold else None)


def reference(data_source: str, ground_truth: Any) -> str:
    """The right answer. Raises: ValueError if neither LaTeX nor a number; of gpqa, no letter."""
    number = isinstance(ground_truth, Real) and not isinstance(ground_truth, bool)
    text = str(ground_truth) if number else ground_truth
    if isinstance(text, str):
        gold = final_answers(text)[-1]
        if gold and (data_source != "gpqa" or choice(gold)):
            return gold
    wanted = "a letter such as 'B'" if data_source == "gpqa" else r"LaTeX such as '\frac{3}{5}'"
    raise ValueError(f"the ground truth of {data_source} must be {wanted}, not {ground_truth!r}")


def final_answers(text: str) -> list[str]:
    r"""What a response answers after its thinking: what stands in its complete, outermost boxes or,
    if they end later, in its last ``<answer>`` tags; without either, all that is left. The last one
    decides. Boxes with nothing but a comma, "and" or "or" between them are one answer. Example:
    ``final_answers(r"<think>\boxed{7}</think>So \boxed{2} or $\boxed{3}$.")`` is ``["2, 3"]``."""
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    found, end = boxes(text), text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    tagged = text[start + len("<answer>") : end] if start >= 0 else ""
    if tagged.strip() and (not found or found[-1][1] < end):
        text = tagged
        found = boxes(text)
    answers: list[dict[str, None]] = []  # sets that keep their order
    last = 0
    for start, end, content in found:
        if not (answers and _SAME_ANSWER.fullmatch(text, last, start)):
            answers.append({})
        answers[-1][content] = None
        last = end
    return list(map(", ".join, answers)) or [text.strip()]


def boxes(text: str, published: bool = False) -> list[tuple[int, int, str]]:
    r"""Start, end and content of each complete box, in order: ``\boxed{…}`` with balanced braces,
    ``\boxed 5``, ``\fbox{…}``; of nested ones the outermost. `published`: ``\boxed{…}`` alone, and
    the innermost. Takes time in proportion to the text, whatever its braces do. Example:
    ``boxes(r"\boxed{1}, no: \boxed{2}, \boxed{3")`` is ``[(0, 9, "1"), (15, 24, "2")]``."""
    found: list[tuple[int, int, slice]] = []
    opened: list[tuple[int, int]] = []  # where each open brace's content starts; of a box: its own
    newest = -1  # content of the box that was opened last
    for match in _PARTS.finditer(text):
        if match["word"] and not published:
            found.append((match.start(), match.end(), slice(*match.span("word"))))
        elif (box := match["box"]) and (not published or box.startswith(r"\boxed")):
            newest = match.end()
            opened.append((newest, match.start()))
        elif box or match["brace"] == "{":
            opened.append((match.end(), -1))
        elif match["brace"] and opened:
            inside, start = opened.pop()
            if start >= 0 and (not published or inside == newest):
                while found and found[-1][0] > start:
                    del found[-1]
                found.append((start, match.end(), slice(inside, match.start())))
    return [(start, end, text[content].strip()) for start, end, content in found]


def choice(text: str, published: bool = False) -> str:
    r"""The letter that a text chooses, as a capital: all of it, ``\text{(b)}``, or the only capital
    that stands alone, if it is said to be the choice. `published`: the first letter. Else empty."""
    bare = _COMMAND.sub(" ", text)
    alone = bare.strip(" \t\n$(){}[].:*")
    if published or len(alone) == 1:
        match = _FIRST_LETTER.search(bare)
        return match[0].upper() if match else ""
    letters = set(_CAPITAL.findall(bare))
    return letters.pop() if len(letters) == 1 and _CHOICE.search(bare) else ""
