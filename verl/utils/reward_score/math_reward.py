"""MATH's reward, and what data scripts take from it, under verl's names."""

from typing import Any

from verl.rewards import math_strings
from verl.rewards.answers import boxes


def compute_score(solution_str: str, ground_truth: Any) -> float:
    """1 if the last box is the ground truth, else 0. Raises: as `math_strings.math_score`."""
    return float(math_strings.math_score(solution_str, ground_truth)["score"])


def is_equiv(str1: str | None, str2: str | None, verbose: bool = False) -> bool:
    """Whether two answers are the same but for spelling; nothing equals only nothing."""
    if verbose:
        print(str1, str2)
    return str1 == str2 if str1 is None or str2 is None else math_strings.is_equiv(str1, str2)


def last_boxed_only_string(string: str) -> str | None:
    r"""The last complete ``\boxed{…}``, ``\fbox{…}`` or ``\boxed 5``, whole; None without one."""
    found = boxes(string)
    return string[slice(*found[-1][:2])] if found else None


def remove_boxed(s: str | None) -> str:
    r"""``5`` of ``\boxed{5}``. Raises: ValueError for what isn't one box and nothing else."""
    match boxes(s or ""):
        case [(0, end, content)] if end == len(s or ""):
            return content
    raise ValueError(f"not one box: {s!r:.200}")
