"""The loss of a token, and its weighted sum over a micro-batch."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from verl.algorithms.kl import kl_divergence


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    clip_ratio_c: float = 3.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped loss per token (arXiv 1707.06347, eq. 7), with separate bounds ("clip-higher",
    arXiv 2503.14476, eq. 10) and dual clip (arXiv 1912.09729, eq. 5); and what it reports per
    token: −log r as `ppo_kl`, and 1 where the upper or lower clip or the dual clip (`…_lower`) cut.
    With r = π/π_old: ``max(−A·r, −A·clip(r, 1−low, 1+high))``, and where A < 0 at most ``−A·c``.
    All tensors are [T]; the gradient flows through `log_probs` only, and into the loss only."""
    # Beyond ±20 the ratio is clipped anyway; the bound keeps exp finite.
    log_ratio = (log_probs - old_log_probs).clamp(-20, 20)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high)
    loss = torch.maximum(plain, bounded)
    ceiling = -advantages * clip_ratio_c
    negative = advantages < 0
    cut = {"pg_clipfrac": bounded > plain, "pg_clipfrac_lower": negative & (loss > ceiling)}
    loss = torch.where(negative, torch.minimum(loss, ceiling), loss)
    return loss, {"ppo_kl": -log_ratio.detach()} | {name: x.float() for name, x in cut.items()}


def rollout_is_weights(log_ratio: Tensor, lengths: Tensor, level: str, threshold: float) -> Tensor:
    """Truncated importance-sampling weights between the engine that drew the tokens and the actor,
    min(π_old/π_rollout, threshold), constants, [T] (Ionides 2008, doi:10.1198/106186008X320456, eq.
    4; Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training").
    `log_ratio`: log π_old − log π_rollout, [T]. `level`: `token`, or `sequence`: the product of the
    ratios over the tokens of a response; their `lengths`, [N], add up to T."""
    log_ratio = log_ratio.detach()
    if level == "sequence":
        response = _response_of_token(lengths)
        log_ratio = log_ratio.new_zeros(len(lengths)).index_add(0, response, log_ratio)[response]
    return log_ratio.clamp(max=math.log(threshold)).exp()


def _response_of_token(lengths: Tensor) -> Tensor:
    """Which response each token belongs to, [N] → [T]."""
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


@dataclass(frozen=True, slots=True)
class LossConfig:
    """What an update minimizes."""

    kind: str = "ppo"  # a key of LOSSES
    temperature: float = 1.0  # logits are divided by it
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_ratio_c: float = 3.0
    entropy_coeff: float = 0.0
    kl_coef: float = 0.0  # of the divergence from the reference; 0: no reference needed
    kl_type: str = "low_var_kl"  # a key of KL_ESTIMATORS
    rollout_is: str | None = None  # the level of rollout_is_weights; None: no correction
    rollout_is_threshold: float = 2.0


@dataclass(slots=True)
class LossInputs:
    """All that a loss may see of N responses, one after another, with T counted tokens in all."""

    log_probs: Tensor  # under the policy that is trained, with gradient, [T]
    entropy: Tensor  # of the distribution at each token, with gradient, [T]
    lengths: Tensor  # counted tokens of each response, [N]
    weights: Tensor  # w_i, repeated for each token, [T]
    advantages: Tensor  # A_i, repeated for each token, [T]
    old_log_probs: Tensor | None = None  # before the step; None: the same as log_probs, [T]
    ref_log_probs: Tensor | None = None  # under the reference policy, [T]
    rollout_log_probs: Tensor | None = None  # as the engine reported them, [T]


Sums = dict[str, Tensor]
"""What a loss reports: sums over tokens, weighted like the loss if ``w/…``; ``…_max``: largest."""


def ppo_loss(x: LossInputs, config: LossConfig) -> tuple[Tensor, Sums]:
    """Σ_i w_i Σ_t ℓ_it of a micro-batch, with ℓ = clipped loss − entropy bonus + KL."""
    old = x.log_probs.detach() if x.old_log_probs is None else x.old_log_probs
    clip = config.clip_ratio_low, config.clip_ratio_high, config.clip_ratio_c
    loss, reported = policy_loss(x.log_probs, old, x.advantages, *clip)
    sums = {name: value.sum() for name, value in (reported | {"entropy": x.entropy}).items()}
    if x.rollout_log_probs is not None:
        factors, compared = _rollout_factors(old - x.rollout_log_probs, x, config)
        loss, sums = loss * factors, sums | compared
    sums["w/pg_loss"] = (x.weights * loss).sum()
    if config.entropy_coeff:
        loss = loss - config.entropy_coeff * x.entropy
    if config.kl_coef:
        assert x.ref_log_probs is not None
        kl = kl_divergence(x.log_probs, x.ref_log_probs, config.kl_type)
        loss = loss + config.kl_coef * kl
        sums["w/kl_loss"] = (x.weights * kl).sum()
    return (x.weights * loss).sum(), sums


def _rollout_factors(log_ratio: Tensor, x: LossInputs, config: LossConfig) -> tuple[Tensor, Sums]:
    """The factor of each token's loss, [T], and how far engine and actor are apart."""
    compared = torch.ones_like(log_ratio, dtype=torch.bool)
    if x.old_log_probs is not None:  # those that are the engine's own have nothing to report
        response = _response_of_token(x.lengths)
        compared = torch.isin(response, response[log_ratio != 0])
    sums = {
        "rollout/logprob_diff_mean": log_ratio.abs().sum(),
        "rollout/kl": -log_ratio.sum(),
        "rollout/tokens": compared.sum(),
    }
    if len(log_ratio):
        sums["rollout/logprob_diff_max"] = log_ratio.abs().max()
    level, threshold = config.rollout_is, config.rollout_is_threshold
    if level is None:
        return torch.ones_like(log_ratio), sums
    factors = rollout_is_weights(log_ratio, x.lengths, level, threshold)
    return factors, sums | {"rollout/is_weight_mean": factors[compared].sum()}


def nll_loss(x: LossInputs, config: LossConfig) -> tuple[Tensor, Sums]:
    """−Σ_i w_i Σ_t log π(a_it): supervised learning."""
    loss = -(x.weights * x.log_probs).sum()
    return loss, {"w/nll_loss": loss, "entropy": x.entropy.sum()}


LOSSES: dict[str, Callable[..., tuple[Tensor, Sums]]] = {"ppo": ppo_loss, "nll": nll_loss}
"""Kind → the loss of a micro-batch and what it reports."""
