"""The maths of a training step: response weights, advantages, policy loss, divergences.

Pure functions of tensors; every denominator is an argument. The one idea: whatever the method,

    loss = Σ_i w_i Σ_t ℓ_it

with one weight w_i per response, computed once for the whole optimizer step. Micro-batches and
ranks only sum, so they can't change the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# ---------------------------------------------------------------------------- response weights


def response_weights(
    lengths: Sequence[int] | Tensor,
    mode: str,
    max_response_length: int,
    alpha: float = 0.0,
    rollout_lengths: Sequence[int] | Tensor | None = None,
    group_size: int | None = None,
) -> Tensor:
    """The weights w_i of `loss = Σ_i w_i Σ_t ℓ_it`.

    Args:
        lengths: response lengths L_i of the optimizer step, in tokens, [N].
        mode: a key of `WEIGHTS`.
        max_response_length: the configured M, in tokens; a constant, not the width of a tensor.
        alpha: exponent of `delta-l`.
        rollout_lengths: lengths of the whole rollout batch, over which `delta-l` averages
            L_j^(−α); default: `lengths`.
        group_size: responses per group of `token-mean-legacy`.

    Returns: float32 tensor [N]; 0 where L_i = 0. Raises: ValueError for an unknown mode, a
    negative length, or a missing group_size.

    Example: ``response_weights([2, 8], "token-mean", 10)`` is ``[0.1, 0.1]``.
    """
    if mode not in WEIGHTS:
        raise ValueError(f"mode={mode!r}: choose one of {', '.join(WEIGHTS)}")
    L = _lengths(lengths)
    rollout_L = L if rollout_lengths is None else _lengths(rollout_lengths)
    weights = WEIGHTS[mode](
        L, M=max_response_length, alpha=alpha, rollout_L=rollout_L, group_size=group_size
    )
    return torch.where(L > 0, weights, 0.0).float()


def _lengths(lengths: Sequence[int] | Tensor) -> Tensor:
    L = torch.as_tensor(lengths, dtype=torch.float64)
    if (L < 0).any():
        raise ValueError("response lengths must not be negative")
    return L


def token_mean(L: Tensor, **_: Any) -> Tensor:
    """DAPO Norm (arXiv 2503.14476, eq. 8): 1 / Σ_j L_j, the mean over all tokens. [N] → [N]."""
    return torch.ones_like(L) / L.sum().clamp(min=1)


def token_mean_legacy(L: Tensor, *, group_size: int | None, **_: Any) -> Tensor:
    """1 / (G · Σ_{j in group} L_j) for G consecutive groups of `group_size` responses.

    What averaging each micro-batch on its own amounts to: the baseline called "DAPO Norm" in the
    published experiments of arXiv 2509.07558. For comparison only. [N] → [N].
    """
    if not group_size:
        raise ValueError("token-mean-legacy needs group_size, the responses of a micro-batch")
    groups = L.split(group_size)
    return torch.cat([token_mean(group) for group in groups]) / max(len(groups), 1)


def seq_mean_token_mean(L: Tensor, **_: Any) -> Tensor:
    """GRPO Norm (arXiv 2402.03300, eq. 3): 1 / (N·L_i), the mean over responses of the mean over
    a response's tokens. [N] → [N]."""
    return 1 / (len(L) * L.clamp(min=1))


def seq_mean_token_sum(L: Tensor, **_: Any) -> Tensor:
    """1 / N: the mean over responses of the sum over a response's tokens. [N] → [N]."""
    return torch.full_like(L, 1 / max(len(L), 1))


def dr_grpo(L: Tensor, *, M: int, **_: Any) -> Tensor:
    """Dr. GRPO (arXiv 2503.20783): 1 / (N·M), a constant. [N] → [N].

    The sum over tokens divided by N·M is the mean over *all* N·M cells of the padded batch, masked
    ones included (as zeros): what the published code of arXiv 2509.07558 calls
    ``masked_mean_allavg``.
    """
    return seq_mean_token_sum(L) / M


def delta_l(L: Tensor, *, M: int, alpha: float, rollout_L: Tensor, **_: Any) -> Tensor:
    """∆L Normalization (arXiv 2509.07558; "VL Norm" in its version 2):

        w_i = 1/(N·M) · (L_i/L̄)^(−α) / mean_j (L_j/L̄)^(−α)

    The gradient of a response has a variance that grows like its length, so the unbiased
    combination of least variance has α = 1; a smaller α keeps more of the long responses.
    α = 0 is Dr. GRPO; α = 1 is GRPO Norm times one scalar per batch. The mean over j runs over
    `rollout_L`: the rollout batch in the published code, the mini-batch in the paper. L̄, the mean
    length, cancels out; it keeps the powers near 1. Responses of length 0 have no gradient and
    stay out of the mean. [N] → [N].
    """
    present = rollout_L > 0
    count = present.sum()
    if not count:
        return torch.zeros_like(L)
    mean_length = rollout_L.sum() / count
    powers = (L.clamp(min=1) / mean_length) ** -alpha
    same = rollout_L is L  # powers take the most time here
    others = powers if same else (rollout_L.clamp(min=1) / mean_length) ** -alpha
    scale = torch.where(present, others, 0.0).sum() / count
    return dr_grpo(L, M=M) * powers / scale


WEIGHTS: dict[str, Callable[..., Tensor]] = {
    "token-mean": token_mean,
    "token-mean-legacy": token_mean_legacy,
    "seq-mean-token-mean": seq_mean_token_mean,
    "seq-mean-token-sum": seq_mean_token_sum,
    "seq-mean-token-sum-norm": dr_grpo,
    "dr-grpo": dr_grpo,
    "delta-l": delta_l,
}

# ---------------------------------------------------------------------------------- advantages


def group_statistics(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, unbiased standard deviation and size of each response's group.

    Args:
        values: [N]. groups: any integers; equal ones are responses to the same prompt, [N].

    Returns: three tensors [N]. The deviation of a group of one is 0.
    """
    ordered = bool((groups[1:] >= groups[:-1]).all())  # as a trainer's are: no need to sort
    unique = torch.unique_consecutive if ordered else torch.unique
    index = unique(groups, return_inverse=True)[1]
    count = torch.bincount(index).to(values.dtype)
    mean = (torch.bincount(index, values) / count).index_select(0, index)
    squares = torch.bincount(index, (values - mean) ** 2)
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    return mean, std.index_select(0, index), count.index_select(0, index)


def grpo_advantages(rewards: Tensor, groups: Tensor, *, norm_by_std: bool, **_: Any) -> Tensor:
    """(r − mean of the group) / (std of the group + 1e-6) (arXiv 2402.03300, section 4.1.2).

    Dr. GRPO (arXiv 2503.20783) leaves the division out: `norm_by_std=False`. [N] → [N].
    """
    mean, std, _count = group_statistics(rewards, groups)
    return (rewards - mean) / (std + 1e-6) if norm_by_std else rewards - mean


def rloo_advantages(rewards: Tensor, groups: Tensor, **_: Any) -> Tensor:
    """r − mean of the *other* responses of the group (arXiv 2402.14740, eq. 8). [N] → [N].

    A group of one has nothing to compare with: its advantage is 0.
    """
    mean, _std, count = group_statistics(rewards, groups)
    return (rewards - mean) * count / (count - 1).clamp(min=1)


def reinforce_plus_plus_baseline_advantages(
    rewards: Tensor, groups: Tensor, *, lengths: Tensor, **_: Any
) -> Tensor:
    """r − mean of the group, then whitened over all tokens of the batch (arXiv 2501.03262).

    Tokens share their response's value, so the batch mean and the unbiased variance are weighted
    by response length. [N] → [N].
    """
    centred = rewards - group_statistics(rewards, groups)[0]
    L = lengths.to(rewards.dtype)
    tokens = L.sum().clamp(min=1)
    batch_mean = (L * centred).sum() / tokens
    variance = (L * (centred - batch_mean) ** 2).sum() / (tokens - 1).clamp(min=1)
    return (centred - batch_mean) * torch.rsqrt(variance + 1e-8)


ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    "grpo": grpo_advantages,
    "rloo": rloo_advantages,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline_advantages,
}


def advantages(
    rewards: Sequence[float] | Tensor,
    groups: Sequence[int] | Tensor,
    lengths: Sequence[int] | Tensor,
    estimator: str = "grpo",
    norm_by_std: bool = True,
) -> Tensor:
    """One advantage per response, from outcome rewards: float64 [N].

    Args:
        rewards: [N]. groups: equal integers mark responses to the same prompt, [N].
        lengths: in tokens, [N]. estimator: a key of `ADVANTAGES`. norm_by_std: for `grpo`.

    Example: ``advantages([1, 0], [7, 7], [3, 5], norm_by_std=False)`` is ``[0.5, -0.5]``.
    """
    return ADVANTAGES[estimator](
        torch.as_tensor(rewards, dtype=torch.float64),
        torch.as_tensor(groups),
        lengths=torch.as_tensor(lengths),
        norm_by_std=norm_by_std,
    )


# --------------------------------------------------------------------------------- policy loss


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """Per-token losses, with what the clipping did."""

    loss: Tensor
    """ℓ, [T]."""
    log_ratio: Tensor
    """log π(a)/π_old(a), without gradient, [T]."""
    clipped: Tensor
    """1 where the upper or lower clip replaced the loss, [T]."""
    clipped_lower: Tensor
    """1 where the dual clip replaced it, [T]."""


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    clip_ratio_c: float = 3.0,
) -> PolicyLoss:
    """PPO's clipped loss per token (arXiv 1707.06347, eq. 7), with separate bounds ("clip-higher",
    arXiv 2503.14476, eq. 10) and dual clip (arXiv 1912.09729, eq. 5).

    With r = π/π_old: ``max(−A·r, −A·clip(r, 1−low, 1+high))``, and where A < 0 at most ``−A·c``.
    All tensors are [T]; the gradient flows through `log_probs` only.
    """
    # Beyond ±20 the ratio is clipped anyway; the bound keeps exp finite.
    log_ratio = (log_probs - old_log_probs).clamp(-20, 20)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high)
    loss = torch.maximum(plain, bounded)
    ceiling = -advantages * clip_ratio_c
    negative = advantages < 0
    with torch.no_grad():
        clipped = (bounded > plain).float()
        clipped_lower = (negative & (loss > ceiling)).float()
    loss = torch.where(negative, torch.minimum(loss, ceiling), loss)
    return PolicyLoss(loss, log_ratio.detach(), clipped, clipped_lower)


# ------------------------------------------------------------------------------------------- KL


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
    divergence", 2020: k1, k2, k3; `k3` is clamped to [−10, 10]).

    With d = log π − log π_ref: ``kl``/``k1`` d, ``abs`` |d|, ``mse``/``k2`` d²/2,
    ``low_var_kl``/``k3`` e^(−d) + d − 1.

    Raises: KeyError for an unknown estimator (the configuration checks it before).
    """
    return KL_ESTIMATORS[estimator](log_probs - ref_log_probs)


class KLController:
    """The coefficient β of the KL term in the reward: fixed, or steered towards a target.

    Adaptive (arXiv 1909.08593, section 2.2): after a batch of n responses whose mean divergence
    per token is d, β ← β · (1 + clip(d/target − 1, −0.2, 0.2) · n / horizon).
    """

    def __init__(
        self, type: str, kl_coef: float, horizon: int = 10000, target_kl: float = 0.1
    ) -> None:
        self.adaptive, self.value = type == "adaptive", kl_coef
        self.horizon, self.target_kl = horizon, target_kl

    def update(self, current_kl: float, num_responses: int) -> None:
        """Moves β after a batch; nothing if it is fixed."""
        if self.adaptive:
            error = min(max(current_kl / self.target_kl - 1, -0.2), 0.2)
            self.value *= 1 + error * num_responses / self.horizon


def rollout_is_weights(log_ratio: Tensor, lengths: Tensor, level: str, threshold: float) -> Tensor:
    """Truncated importance-sampling weights between the engine that drew the tokens and the actor,
    min(π_old/π_rollout, threshold); constants, by which the loss of each token is multiplied.

    Args:
        log_ratio: log π_old − log π_rollout of each token, [R]. lengths: tokens of each response,
            [N], which add up to R. level: `token`, or `sequence`: the ratio of the whole response,
            which is the product over its tokens.
        threshold: largest weight.

    Returns: [R].

    Source: truncation, Ionides 2008 (doi:10.1198/106186008X320456, eq. 4); between a rollout engine
    and a trainer, Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training".
    """
    log_ratio = log_ratio.detach()
    if level == "sequence":
        of_token = torch.repeat_interleave(
            torch.arange(len(lengths), device=lengths.device), lengths
        )
        sums = torch.zeros(len(lengths), device=log_ratio.device, dtype=log_ratio.dtype)
        log_ratio = sums.index_add(0, of_token, log_ratio)[of_token]
    return log_ratio.clamp(max=math.log(threshold)).exp()
