r"""Answers to math problems compared as strings, spelled in one way; nothing is computed.

The rules are those of verl's `math_reward` (its `data_source` of MATH) and `math_dapo` (the DAPO
recipe), whose verdicts they share but where two spellings are plainly the same, or not."""

import re
from typing import Any

from verl.rewards.answers import boxes, reference

MATH = ("lighteval/MATH", "DigitalLearningGmbH/MATH-lighteval", "HuggingFaceH4/MATH-500")
DAPO = ("math_dapo", "math", "math_dapo_reasoning")
WINDOW = 300  # last characters of a response that DAPO's rule reads
_ANSWER = re.compile(r"answer[ \t*]*:\s*(.+)", re.I)
_TEXT = r"\\(?:text(?:bf|it|rm)?|mathrm|mathbf|mbox)\s*\{"
_WORDS = (
    "units?|degrees?|dollars?|cents?|inch(?:es)?|feet|miles?|meters?|[ckm]?m|kg|g|pounds?|mph|"
    "hours?|minutes?|seconds?|ways|points?|digits|integers|edges|people|students"
)
_UNIT = re.compile(
    rf"(?<=[\d}})])[\s\\,;!$]*({_TEXT}[A-Za-z/. ]+\}}|(?:(?:square|cubic) +)?(?:{_WORDS}))"
    r"(\^\{?[23]\}?)?[\s$.]*\Z"
)
_SPELLINGS = [
    (r"\.(?=[\s$]*\Z)", ""),  # of a sentence
    (r"\\\\(?=[A-Za-z])", r"\\"),
    (r"\\[dt]frac", r"\\frac"),
    (_TEXT + r"([^{}]*)\}", r"\1"),
    (r"\\(?:left|right|displaystyle)(?![A-Za-z])|\^\{?\\circ\}?|\\[!,;: ]|\\?[$%]|[\s\"°]", ""),
    (r"\{,\}", ","),
    (r"(?<![\d.])\.(?=\d)", "0."),
    (r"\\sqrt(\w)", r"\\sqrt{\1}"),
    (r"\\frac(?:\{([^{}]*)\}|(\w))(?:\{([^{}]*)\}|(\w))", r"\\frac{\1\2}{\3\4}"),
    (r"\A(-?)(\d+)/(\d+)\Z", r"\1\\frac{\2}{\3}"),
    (r"\A0\.5\Z", r"\\frac{1}{2}"),
]
_PATTERNS = [(re.compile(pattern), new) for pattern, new in _SPELLINGS]
_NAME = re.compile(r"[A-Za-z](?:_\w|\([A-Za-z]\))?=")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")


def spelled(answer: str) -> str:
    r"""LaTeX without a unit, spaces and what else means nothing: ``\dfrac12``, ``1/2``, ``$.5$``
    and ``0.5\text{ cm}`` are all ``\frac{1}{2}``; ``1,234`` is ``1234``."""
    answer = _UNIT.sub("", answer.strip().strip("*"))  # of Markdown
    for pattern, new in _PATTERNS:
        answer = pattern.sub(new, answer)
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer


def is_equiv(answer: str, gold: str) -> bool:
    """Whether both are the same but for spelling. One may lack a unit. An answer may say what it is
    (``m + n = 5``); so may a reference, by a name (``x = 5``, ``f(x) = x^2``)."""
    units = {re.sub(r"\\[a-z]+|[^a-z23]", "", m[0]) for m in map(_UNIT.search, (answer, gold)) if m}
    one, other = spelled(answer), spelled(gold)
    if "=" in one and "=" not in other:
        one = spelled(answer.rpartition("=")[2])
    elif "=" not in one and _NAME.match(other):
        other = spelled(gold.partition("=")[2])
    return one == other != "" and len(units) < 2


def math_score(solution_str: str, ground_truth: Any) -> dict[str, Any]:
    """`score` and `acc`, 0 or 1: whether the last complete box is the ground truth; `pred`, what it
    holds. Raises: ValueError for a ground truth that is neither LaTeX nor a number."""
    gold, found = reference("math", ground_truth), boxes(solution_str)
    right = bool(found) and is_equiv(found[-1][2], gold)
    pred = spelled(found[-1][2]) if found else ""
    return {"score": float(right), "acc": float(right), "pred": pred}


def dapo_score(solution_str: str, ground_truth: Any) -> dict[str, Any]:
    """DAPO's rule (arXiv 2503.14476, section 2.4): what follows the last ``Answer:``, in a box or
    not, of the last 300 characters. `score` is 1 or -1, `acc` 1 or 0. Raises: as above."""
    gold, found = reference("math", ground_truth), _ANSWER.findall(solution_str[-WINDOW:])
    line = found[-1] if found else ""
    answer = next((text for *_, text in reversed(boxes(line))), line)
    right = bool(found) and is_equiv(answer, gold)
    return {"score": 1.0 if right else -1.0, "acc": float(right), "pred": spelled(answer)}
