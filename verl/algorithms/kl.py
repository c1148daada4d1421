"""Divergence from the reference policy, and the coefficient of the KL term in the reward."""

from collections.abc import Callable

import numpy as np
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


def kl_of_response(log_probs: np.ndarray, ref_log_probs: np.ndarray, estimator: str) -> float:
    """Σ_t kl_t of one response, from its tokens' log-probabilities, [L] each."""
    d = kl_divergence(torch.as_tensor(log_probs), torch.as_tensor(ref_log_probs), estimator)
    return d.double().sum().item()


def adapted_kl_coef(
    kl_coef: float, current_kl: float, num_responses: int, horizon: int, target_kl: float
) -> float:
    """The next coefficient β of the KL term in the reward, steered towards a target divergence
    (arXiv 1909.08593, section 2.2): β · (1 + clip(d/target − 1, −0.2, 0.2) · n / horizon), with
    this batch's mean divergence per token d, in nats, and its number of responses n."""
    error = min(max(current_kl / target_kl - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_responses / horizon)
