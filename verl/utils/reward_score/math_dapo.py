"""DAPO's reward under verl's names."""

from typing import Any

from verl.rewards import math_strings
from verl.rewards.answers import boxes


def compute_score(
    solution_str: str, ground_truth: Any, strict_box_verify: bool = False
) -> dict[str, Any]:
    """`math_strings.dapo_score`. `strict_box_verify`: the last box of the last 100 characters must
    be the ground truth, character by character. Raises: as that."""
    result = math_strings.dapo_score(solution_str, ground_truth)
    if strict_box_verify:
        found = boxes(solution_str[-100:])
        pred = found[-1][2] if found else None
        right = pred == str(ground_truth)
        result = {"score": 1.0 if right else -1.0, "acc": float(right), "pred": pred}
    return result
