"""GSM8K's reward under verl's names."""

from typing import Any

from verl.rewards import gsm8k
from verl.rewards.gsm8k import extract_solution

__all__ = ["compute_score", "extract_solution"]


def compute_score(
    solution_str: str,
    ground_truth: Any,
    method: str = "strict",
    format_score: float = 0.0,
    score: float = 1.0,
) -> float:
    """`score` for the right number, `format_score` for another, 0 without one. Raises: as
    `verl.rewards.gsm8k.compute_score`."""
    right = gsm8k.compute_score(solution_str, ground_truth, method)["acc"]
    answered = extract_solution(solution_str, method) is not None
    return score if right else format_score * answered
