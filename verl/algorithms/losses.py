"""The losses of a micro-batch: weighted sums over its tokens."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verl.algorithms.kl import kl_divergence
from verl.algorithms.policy_losses import MULTIPLES_OF_ADVANTAGE, POLICY_LOSSES, Constants
from verl.algorithms.rollout_correction import response_of_token, rollout_is_weights


@dataclass(frozen=True, slots=True)
class LossConfig(Constants):
    """What an update minimizes."""

    kind: str = "ppo"  # a key of LOSSES
    temperature: float = 1.0  # logits are divided by it
    entropy_coeff: float = 0.0
    kl_coef: float = 0.0  # of the divergence from the reference; 0: no reference needed
    kl_type: str = "low_var_kl"  # a key of KL_ESTIMATORS
    rollout_is: str | None = None  # the level of rollout_is_weights; None: no correction
    rollout_is_threshold: float = 2.0
    cliprange_value: float = 0.5  # of the critic's loss

    @property
    def scales_with_advantage(self) -> bool:
        """Whether a response whose advantage is 0 has no gradient."""
        other_terms = self.entropy_coeff or self.kl_coef
        return self.loss_mode in MULTIPLES_OF_ADVANTAGE and not other_terms


@dataclass(slots=True)
class LossInputs:
    """All that a loss may see of N responses, one after another, with T counted tokens in all."""

    # Under the policy that is trained, with gradient, [T]; of a critic its values.
    log_probs: Tensor
    entropy: Tensor  # of the distribution at each token, with gradient, [T]
    lengths: Tensor  # counted tokens of each response, [N]
    weights: Tensor  # w_i of the policy loss, repeated for each token, [T]
    regularizer_weights: Tensor  # those of KL loss and entropy bonus, [T]
    advantages: Tensor  # A_i, repeated for each token; with a critic the token's own, [T]
    old_log_probs: Tensor | None = None  # before the step; None: the same as log_probs, [T]
    ref_log_probs: Tensor | None = None  # under the reference policy, [T]
    rollout_log_probs: Tensor | None = None  # as the engine reported them, [T]
    selected: Tensor | None = None  # 1 where `SELECTIONS` chose the token, else 0, [T]
    values: Tensor | None = None  # the critic's before the step, [T]
    returns: Tensor | None = None  # what it is to learn, [T]
    frozen: Tensor | None = None  # 1 where the policy loss has no gradient, else 0, [T]


Sums = dict[str, Tensor]
"""What a loss reports: sums over tokens, weighted like the loss if ``w/…``; ``…_max``: largest."""


def ppo_loss(x: LossInputs, config: LossConfig) -> tuple[Tensor, Sums]:
    """The policy loss `loss_mode` of a micro-batch, with entropy bonus and KL loss."""
    log_probs, old = x.log_probs, x.old_log_probs
    old = log_probs.detach() if old is None else old
    if x.frozen is not None:
        log_probs = torch.where(x.frozen.bool(), log_probs.detach(), log_probs)
    whole = replace(x, log_probs=log_probs, old_log_probs=old)
    more = {"lengths": x.lengths, "selected": x.selected, "c": config, "inputs": whole}
    loss, reported = POLICY_LOSSES[config.loss_mode](log_probs, old, x.advantages, **more)
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


def value_loss(x: LossInputs, config: LossConfig) -> tuple[Tensor, Sums]:
    """½ Σ_i w_i Σ_t max((V − R)², (V_clip − R)²) with returns R, and V_clip: V, but at most
    `cliprange_value` away from the value before the step (arXiv 2005.12729, section 3)."""
    assert x.values is not None and x.returns is not None
    bound, V = config.cliprange_value, x.log_probs
    plain = (V - x.returns) ** 2
    clipped = (x.values + (V - x.values).clamp(-bound, bound) - x.returns) ** 2
    loss = (x.weights * torch.maximum(plain, clipped)).sum() / 2
    return loss, {"w/vf_loss": loss, "vf_clipfrac": (clipped > plain).sum(), "vpred_mean": V.sum()}


LOSSES: dict[str, Callable[..., tuple[Tensor, Sums]]] = {
    "ppo": ppo_loss,
    "reinforce": reinforce_loss,
    "nll": nll_loss,
    "value": value_loss,
}
"""Kind → the loss of a micro-batch and what it reports."""
