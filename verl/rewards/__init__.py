"""Rewards that are functions: `compute_score` chooses one by the sample's data source."""

from collections.abc import Callable
from typing import Any

from verl.rewards import countdown, gsm8k, math
from verl.rewards.math import MATH_SOURCES, RewardError, RewardServerError

__all__ = ["MATH_SOURCES", "RewardError", "RewardServerError", "compute_score"]

RULES: dict[str, Callable[[str, Any], dict[str, Any]]] = {
    "countdown": countdown.compute_score,
    "gsm8k": gsm8k.compute_score,
    "openai/gsm8k": gsm8k.compute_score,
}
"""Data source → its function of response and ground truth; those in `MATH_SOURCES` ask a server."""


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None
) -> dict[str, Any]:
    """`score` and `acc`, 0 or 1, of a response by the rule of its data source (verl's signature);
    for math as `MathClient.compute_score`. Raises: ValueError for an unknown data source or a wrong
    ground truth; RewardServerError without a LaTeX server."""
    if data_source in MATH_SOURCES:
        return math.compute_score(data_source, solution_str, ground_truth, extra_info)
    if data_source in RULES:
        return RULES[data_source](solution_str, ground_truth)
    known = ", ".join([*RULES, *MATH_SOURCES])
    remedy = "set custom_reward_function.path to a Python file with your own"
    raise ValueError(f"no reward function for {data_source=} (known: {known}); {remedy}")
