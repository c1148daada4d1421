"""Rewards that are functions: `compute_score` chooses one by the sample's data source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl.rewards import countdown, gsm8k, math_http
from verl.rewards.math_answer import MATH_SOURCES

RewardFunction = Callable[[str, str, Any, dict[str, Any] | None], Any]
"""`fn(data_source, solution_str, ground_truth, extra_info)` → a number, or a dict with `score`."""


def _rule(score: Callable[[str, Any], dict[str, Any]]) -> RewardFunction:
    """A rule that needs only the response and the ground truth."""
    return lambda source, solution_str, ground_truth, extra: score(solution_str, ground_truth)


REWARDS: dict[str, RewardFunction] = {
    "countdown": _rule(countdown.compute_score),
    "gsm8k": _rule(gsm8k.compute_score),
    "openai/gsm8k": _rule(gsm8k.compute_score),
    **dict.fromkeys(MATH_SOURCES, math_http.compute_score),
}
"""Data source → its reward function, which returns at least `score` and `acc`."""


def check_data_source(data_source: str) -> None:
    """Raises ValueError if there is no reward function for this data source."""
    if data_source not in REWARDS:
        raise ValueError(
            f"no reward function for data_source={data_source!r} (known: {', '.join(REWARDS)}); "
            "set custom_reward_function.path to a Python file with your own"
        )


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Scores one response (verl's signature, also that of `custom_reward_function`).

    Args:
        data_source: a key of `REWARDS`. solution_str: the decoded response.
        ground_truth: what the function of this data source expects.
        extra_info: `find_maj` is read by the math reward (`math_answer.compare`).

    Returns: `score` and `acc`, both 0 or 1; math adds `pred` and `undecided`.

    Raises: ValueError for an unknown data source or a ground truth of the wrong form;
    RewardServerError for math where no LaTeX server answers at MATH_SERVER_URL.
    """
    check_data_source(data_source)
    return REWARDS[data_source](data_source, solution_str, ground_truth, extra_info)
