"""Divergence from the reference policy, and the coefficient of the KL term in the reward."""

from collections.abc import Callable

import torch
from torch import Tensor


def _k3(log_ratio: Tensor) -> Tensor:
    inverse = (-log_ratio).clamp(-20, 20)
    return (inverse.exp() - inverse - 1).clamp(-10, 10)


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("kl", "k1"), lambda d: d),
    "abs": torch.abs,
    **dict.fromkeys(("mse", "k2"), lambda d: 0.5 * d**2),
    **dict.fromkeys(("low_var_kl", "k3"), _k3),
}


def kl_divergence(log_probs: Tensor, ref_log_probs: Tensor, estimator: str) -> Tensor:
    """Per-token estimates of KL(π‖π_ref) in nats, [T] → [T] (Schulman, "Approximating KL
    divergence", 2020). With d = log π − log π_ref: ``kl``/``k1`` d, ``abs`` |d|, ``mse``/``k2``
    d²/2, ``low_var_kl``/``k3`` e^(−d) + d − 1, clamped to [−10, 10]."""
    return KL_ESTIMATORS[estimator](log_probs - ref_log_probs)


def adapted_kl_coef(
    kl_coef: float, current_kl: float, num_responses: int, horizon: int, target_kl: float
) -> float:
    """β · (1 + clip(d/target − 1, −0.2, 0.2) · n / horizon) (arXiv 1909.08593, section 2.2), after
    a batch of n responses with a mean divergence per token of d, in nats."""
    error = min(max(current_kl / target_kl - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_responses / horizon)
