"""Rewards that are functions: `compute_score` chooses one by the sample's data source."""

from collections.abc import Callable
from typing import Any

from verl.rewards import countdown, gsm8k, math, math_strings
from verl.rewards.math import MATH_SOURCES, RewardError, RewardServerError

__all__ = ["MATH_SOURCES", "RewardError", "RewardServerError", "compute_score"]

RULES: dict[str, Callable[[str, Any], dict[str, Any]]] = {
    "countdown": countdown.compute_score,
    **dict.fromkeys(("gsm8k", "openai/gsm8k"), gsm8k.compute_score),
    **dict.fromkeys(math_strings.MATH, math_strings.math_score),
    **dict.fromkeys(math_strings.DAPO, math_strings.dapo_score),
}
"""Data source → its function of response and ground truth; those in `MATH_SOURCES` ask a server."""

NOT_JUDGED = {
    **dict.fromkeys(("codecontests", "apps", "codeforces", "taco"), "programs are not run"),
    "hiyouga/geometry3k": "there are only text models",
    "searchR1": "nothing is searched",
}
"""Data sources of verl's, or what their names begin with, and why they have no reward here."""


def rule(data_source: str) -> Callable[[str, Any], dict[str, Any]] | None:
    """The function of `RULES` for a data source; ``aime…`` is DAPO's, but of `MATH_SOURCES`."""
    if data_source in MATH_SOURCES:
        return None
    return RULES.get("math_dapo" if data_source.startswith("aime") else data_source)


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None
) -> dict[str, Any]:
    """`score` and `acc` of a response by the rule of its data source (verl's signature): 0 or 1,
    but DAPO's `score` is -1 or 1. Of `MATH_SOURCES` as `MathClient.compute_score`. Raises:
    ValueError for an unknown source or a wrong ground truth; RewardServerError without a server."""
    if data_source in MATH_SOURCES:
        return math.compute_score(data_source, solution_str, ground_truth, extra_info)
    if found := rule(data_source):
        return found(solution_str, ground_truth)
    remedy = "set custom_reward_function.path to a Python file with your own"
    if why := NOT_JUDGED.get(data_source, NOT_JUDGED.get(data_source.partition("_")[0])):
        raise ValueError(f"no reward function for {data_source=}: {why}; {remedy}")
    known = ", ".join([*RULES, "aime*", *MATH_SOURCES])
    raise ValueError(f"no reward function for {data_source=} (known: {known}); {remedy}")
