"""GSM8K: the number after ``####`` (or the last number) compared with the reference, exactly."""

import re
from fractions import Fraction
from numbers import Real
from typing import Any

WINDOW = 300  # last characters of the response, as in verl, so that the cost has a limit
# An exponent belongs to the number (and makes it unreadable); the lookbehind keeps a search from
# starting inside a number, also inside one that begins before the window.
_NUMBER = r"(?<![0-9])(?<![0-9][.,])(\$?-?\$?\.?[0-9][0-9.,]*(?:[eE][-+]?[0-9]+)?)"
METHODS = {"strict": re.compile("#### +" + _NUMBER), "flexible": re.compile(_NUMBER)}
_PLAIN = re.compile(r"-?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")


def compute_score(solution_str: str, ground_truth: Any, method: str = "strict") -> dict[str, float]:
    """1 if the answer equals the reference as a number (18 = 18.0, 1,000 = 1000), else 0. `method`:
    ``strict`` takes the last ``#### <number>``, ``flexible`` the last number. Raises: ValueError
    for another, or a ground truth that is no number (also as text, ``"1,000"``). Example:
    ``compute_score("so 18\\n#### 18", "18")`` is ``{"score": 1.0, "acc": 1.0}``."""
    known = isinstance(ground_truth, (str, Real)) and not isinstance(ground_truth, bool)
    expected = parse_number(str(ground_truth).strip()) if known else None
    if expected is None:
        form = "a number in plain decimal notation such as '18' or '1,000.5'"
        raise ValueError(f"the ground truth of gsm8k must be {form}, not {ground_truth!r:.200}")
    answer = extract_solution(solution_str, method)
    correct = float(answer is not None and parse_number(answer) == expected)
    return {"score": correct, "acc": correct}


def extract_solution(solution_str: str, method: str = "strict") -> str | None:
    """What is compared: the answer's text, without commas and dollars; None without an answer."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}: choose one of {', '.join(METHODS)}")
    found = METHODS[method].findall(solution_str, max(len(solution_str) - WINDOW, 0))
    return re.sub("[,$]", "", found[-1]) if found else None


def parse_number(text: str) -> Fraction | None:
    """Exact value of plain decimal notation, ``$1,234.50`` or ``18.``; None for anything else."""
    text = text.replace(",", "").replace("$", "").removesuffix(".")
    return Fraction(text) if _PLAIN.fullmatch(text) else None
