"""The rewards under verl's names, for data scripts and reward functions that import them."""

from typing import Any

from verl.rewards import compute_score, rule
from verl.rewards.math_strings import dapo_score

__all__ = ["default_compute_score"]


def default_compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, **_: Any
) -> float | dict[str, Any]:
    """`verl.rewards.compute_score`; as in verl the score alone, but a dict for DAPO's sources. What
    verl passes for its sandboxes has no effect. Raises: as that."""
    result = compute_score(data_source, solution_str, ground_truth, extra_info)
    return result if rule(data_source) is dapo_score else float(result["score"])
