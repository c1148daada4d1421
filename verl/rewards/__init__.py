"""Rewards that are functions: `compute_score` chooses one by the sample's data source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl.rewards import countdown, gsm8k

REWARDS: dict[str, Callable[[str, Any], dict[str, Any]]] = {
    "countdown": countdown.compute_score,
    "gsm8k": gsm8k.compute_score,
    "openai/gsm8k": gsm8k.compute_score,
}
"""Data source → `fn(solution_str, ground_truth)`, which returns at least `score` and `acc`."""


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Scores one response (verl's signature, also that of `custom_reward_function`).

    Args:
        data_source: a key of `REWARDS`.
        solution_str: the decoded response.
        ground_truth: what the function of this data source expects.
        extra_info: unused by the built-in functions.

    Returns:
        `score` and `acc`, both 0 or 1.

    Raises:
        ValueError: unknown data source, or a ground truth of the wrong form.
    """
    if data_source not in REWARDS:
        raise ValueError(
            f"no reward function for data_source={data_source!r} (known: {', '.join(REWARDS)}); "
            "set custom_reward_function.path to a Python file with your own"
        )
    return REWARDS[data_source](solution_str, ground_truth)
