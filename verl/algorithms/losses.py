"""The loss of a token, and its weighted sum over a micro-batch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from verl.algorithms.kl import kl_divergence
from verl.algorithms.rollout_correction import response_of_token, rollout_is_weights


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
    weights: Tensor  # w_i of the policy loss, repeated for each token, [T]
    regularizer_weights: Tensor  # those of KL loss and entropy bonus, [T]
    advantages: Tensor  # A_i, repeated for each token, [T]
    old_log_probs: Tensor | None = None  # before the step; None: the same as log_probs, [T]
    ref_log_probs: Tensor | None = None  # under the reference policy, [T]
    rollout_log_probs: Tensor | None = None  # as the engine reported them, [T]


Sums = dict[str, Tensor]
"""What a loss reports: sums over tokens, weighted like the loss if ``w/…``; ``…_max``: largest."""


def ppo_loss(x: LossInputs, config: LossConfig) -> tuple[Tensor, Sums]:
    """PPO's clipped loss of a micro-batch, with entropy bonus and KL loss."""
    old = x.log_probs.detach() if x.old_log_probs is None else x.old_log_probs
    clip = config.clip_ratio_low, config.clip_ratio_high, config.clip_ratio_c
    loss, reported = policy_loss(x.log_probs, old, x.advantages, *clip)
    sums = {name: value.sum() for name, value in reported.items()}
    if x.rollout_log_probs is not None:
        factors, compared = _rollout_factors(old - x.rollout_log_probs, x, config)
        loss, sums = loss * factors, sums | compared
    return _regularized(loss, sums, x, config)


def reinforce_loss(x: LossInputs, config: LossConfig) -> tuple[Tensor, Sums]:
    """−A·log π per token, times `rollout_is_weights` of the current policy π from the engine, and
    the same terms: verl's `loss_type=reinforce`."""
    assert x.rollout_log_probs is not None
    log_ratio = x.log_probs.detach() - x.rollout_log_probs
    loss, sums = -x.advantages * x.log_probs, {"ppo_kl": -log_ratio.sum()}
    if level := config.rollout_is:
        factors = rollout_is_weights(log_ratio, x.lengths, level, config.rollout_is_threshold)
        loss = loss * factors
        sums |= {"rollout/is_weight_mean": factors.sum(), "rollout/tokens": x.lengths.sum()}
    return _regularized(loss, sums, x, config)


def _regularized(
    loss: Tensor, sums: Sums, x: LossInputs, config: LossConfig
) -> tuple[Tensor, Sums]:
    """Σ_i w_i Σ_t ℓ_it − entropy bonus + KL loss, which may have weights of their own."""
    total = (x.weights * loss).sum()
    sums |= {"w/pg_loss": total, "entropy": x.entropy.sum()}
    if config.entropy_coeff:
        total = total - config.entropy_coeff * (x.regularizer_weights * x.entropy).sum()
    if config.kl_coef:
        assert x.ref_log_probs is not None
        kl = kl_divergence(x.log_probs, x.ref_log_probs, config.kl_type)
        sums["w/kl_loss"] = (x.regularizer_weights * kl).sum()
        total = total + config.kl_coef * sums["w/kl_loss"]
    return total, sums


def _rollout_factors(log_ratio: Tensor, x: LossInputs, config: LossConfig) -> tuple[Tensor, Sums]:
    """The factor of each token's loss, [T], and how far engine and actor are apart."""
    compared = torch.ones_like(log_ratio, dtype=torch.bool)
    if x.old_log_probs is not None:  # those that are the engine's own have nothing to report
        response = response_of_token(x.lengths)
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


LOSSES: dict[str, Callable[..., tuple[Tensor, Sums]]] = {
    "ppo": ppo_loss,
    "reinforce": reinforce_loss,
    "nll": nll_loss,
}
"""Kind → the loss of a micro-batch and what it reports."""
