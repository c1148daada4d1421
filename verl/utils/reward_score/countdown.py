"""CountDown's reward under the published code's names."""

from typing import Any

from verl.rewards import countdown


def compute_score(
    solution_str: str,
    ground_truth: Any,
    method: str = "strict",
    format_score: float = 0.0,
    score: float = 1.0,
) -> float:
    """`score` for a right expression, `format_score` for another, 0 without one; there is but one
    `method`. Raises: as `verl.rewards.countdown.compute_score`."""
    right = countdown.compute_score(solution_str, ground_truth)["acc"]
    answered = countdown.extract_answer(solution_str) is not None
    return score if right else format_score * answered
