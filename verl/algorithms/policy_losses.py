"""The loss of a token ℓ_it by name, `actor_rollout_ref.actor.policy_loss.loss_mode`. Each function
takes log_probs, old ones and advantages, [T] of N responses one after another, and what it needs of
`lengths` [N], `selected` [T] and the constants `c`. The gradient flows through `log_probs` only; r
is π/π_old, sg(·) a constant. The loss of a step is Σ_i w_i Σ_t ℓ_it, whatever ℓ is: the weights
that verl 0.9 or TRL 1.10 fix for a loss, such as seq-mean-token-mean, are `loss_agg_mode` here."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from verl.algorithms.rollout_correction import response_of_token

Loss = tuple[Tensor, dict[str, Tensor]]
"""ℓ, and what is reported per token by name, [T] each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """What the losses have beside tensors: verl's keys; those of VESPO are TRL's."""

    loss_mode: str = "vanilla"  # a key of POLICY_LOSSES
    top_entropy_quantile: float = 1.0
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_ratio_c: float = 3.0
    clip_cov_ratio: float = 0.0002
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0
    kl_cov_ratio: float = 0.0002
    ppo_kl_coef: float = 0.1
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0


def _log_ratio(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    return (log_probs - old_log_probs).clamp(-20, 20)  # keeps exp finite


def _clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """max(−A·r, −A·clip(r, 1 − low, 1 + high)), and where the clip cut."""
    plain, bounded = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
    return torch.maximum(plain, bounded), bounded > plain


def _sum(values: Tensor, lengths: Tensor) -> Tensor:
    """Each token's sum over all tokens of its response, [T] → [T]."""
    response = response_of_token(lengths)
    return values.new_zeros(len(lengths)).index_add(0, response, values)[response]


def _mean(values: Tensor, lengths: Tensor) -> Tensor:
    """Each token's mean over all tokens of its response, [T] → [T]."""
    return _sum(values, lengths) / lengths.repeat_interleave(lengths)


def _by_sign(up: Tensor, positive: float, negative: float, like: Tensor) -> Tensor:
    return torch.where(up, like.new_tensor(positive), like.new_tensor(negative))


def _reported(log_ratio: Tensor, upper: Tensor | None = None, lower: Tensor | None = None) -> Any:
    """−log r, and 1 where a bound cut."""
    cut = {"pg_clipfrac": upper, "pg_clipfrac_lower": lower}
    found = {name: x.float() for name, x in cut.items() if x is not None}
    return {"ppo_kl": -log_ratio.detach()} | found


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    clip_ratio_c: float = 3.0,
) -> Loss:
    """PPO's clipped loss per token (arXiv 1707.06347, eq. 7), with separate bounds ("clip-higher",
    arXiv 2503.14476, eq. 10) and dual clip (arXiv 1912.09729, eq. 5); and what it reports per
    token: −log r as `ppo_kl`, and 1 where the upper or lower clip or the dual clip (`…_lower`) cut.
    With r = π/π_old: ``max(−A·r, −A·clip(r, 1−low, 1+high))``, and where A < 0 at most ``−A·c``.
    All tensors are [T]; the gradient flows through `log_probs` only, and into the loss only."""
    log_ratio = _log_ratio(log_probs, old_log_probs)
    loss, cut = _clipped(log_ratio.exp(), advantages, clip_ratio_low, clip_ratio_high)
    negative, ceiling = advantages < 0, -advantages * clip_ratio_c
    cut_lower = negative & (loss > ceiling)
    loss = torch.where(negative, torch.minimum(loss, ceiling), loss)
    return loss, _reported(log_ratio, cut, cut_lower)


def vanilla(log_probs: Tensor, old: Tensor, advantages: Tensor, *, c: Constants, **_: Any) -> Loss:
    """`policy_loss`."""
    bounds = c.clip_ratio_low, c.clip_ratio_high, c.clip_ratio_c
    return policy_loss(log_probs, old, advantages, *bounds)


def gspo(
    log_probs: Tensor, old: Tensor, advantages: Tensor, *, lengths: Tensor, c: Constants, **_: Any
) -> Loss:
    """GSPO (arXiv 2507.18071, eq. 5 to 7), in the form of GSPO-token (eq. 13 and 14): PPO's clip of
    s_it = sg(s_i)·π/sg(π) with s_i = exp(mean_t log r_it). With one advantage a response value and
    gradient are those of s_i itself. The paper averages as seq-mean-token-mean, which verl's code
    always does; with seq-mean-token-sum it is LUSPO (arXiv 2602.05261). No dual clip, as there."""
    log_ratio = _log_ratio(log_probs, old)
    level = _mean(log_ratio, lengths).detach()
    ratio = (log_probs - log_probs.detach() + level).clamp(max=10).exp()
    low, high = c.clip_ratio_low, c.clip_ratio_high
    loss, cut = _clipped(ratio, advantages, low, high)
    return loss, _reported(log_ratio, cut)


def geo_mean(
    log_probs: Tensor, old: Tensor, advantages: Tensor, *, lengths: Tensor, c: Constants, **_: Any
) -> Loss:
    """GMPO (arXiv 2507.20673, eq. 4 and its algorithm 1): −A·exp(mean_t k_it) at each token, where
    k is log r, at most `clip_ratio_high` if A > 0 and at least −`clip_ratio_low` if A < 0. Under
    seq-mean-token-mean it is the paper's and verl's mean over responses, which verl's code always
    takes. Factors of `rollout_is` multiply the tokens; in verl their geometric mean the response.
    """
    log_ratio, sign = _log_ratio(log_probs, old), advantages.sign()
    bounded = log_ratio.clamp(-c.clip_ratio_low, c.clip_ratio_high)
    taken = sign * torch.minimum(sign * log_ratio, sign * bounded)
    cut = log_ratio != bounded
    loss = -advantages * _mean(taken, lengths).exp()
    return loss, _reported(log_ratio, cut & (advantages > 0), cut & (advantages < 0))


def clip_cov(
    log_probs: Tensor, old: Tensor, advantages: Tensor, *, selected: Tensor, c: Constants, **_: Any
) -> Loss:
    """Clip-Cov (arXiv 2505.22617, eq. 11 and 12): PPO's clipped loss, 0 at the tokens that
    `clip_cov_tokens` chose, whose share is reported as `pg_clipfrac`. No dual clip, as in verl."""
    log_ratio = _log_ratio(log_probs, old)
    low, high = c.clip_ratio_low, c.clip_ratio_high
    loss, _cut = _clipped(log_ratio.exp(), advantages, low, high)
    return loss * (1 - selected), _reported(log_ratio, selected)


def kl_cov(
    log_probs: Tensor, old: Tensor, advantages: Tensor, *, selected: Tensor, c: Constants, **_: Any
) -> Loss:
    """KL-Cov (arXiv 2505.22617, eq. 13 and 14): −A·r, unclipped, + `ppo_kl_coef`·|log r| at the
    tokens that `kl_cov_tokens` chose. verl reports the mean |log r| as `ppo_kl`."""
    log_ratio = _log_ratio(log_probs, old)
    penalty = c.ppo_kl_coef * log_ratio.abs() * selected
    return -advantages * log_ratio.exp() + penalty, _reported(log_ratio)


def gpg(log_probs: Tensor, old: Tensor, advantages: Tensor, **_: Any) -> Loss:
    """GPG (arXiv 2504.02546): −A·log π, without a ratio. How it scales A is the estimator's."""
    return -advantages * log_probs, _reported(_log_ratio(log_probs, old))


def cispo(log_probs: Tensor, old: Tensor, advantages: Tensor, *, c: Constants, **_: Any) -> Loss:
    """CISPO (arXiv 2506.13585, eq. 4 and 5): −sg(clip(r, 1 − low, 1 + high))·A·log π. The paper has
    no lower bound: `clip_ratio_low` of 1 or more, as verl's script sets it."""
    log_ratio = _log_ratio(log_probs, old)
    ratio = log_ratio.detach().exp()
    bounded = ratio.clamp(1 - c.clip_ratio_low, 1 + c.clip_ratio_high)
    return -bounded * advantages * log_probs, _reported(log_ratio, ratio != bounded)


def sapo(log_probs: Tensor, old: Tensor, advantages: Tensor, *, c: Constants, **_: Any) -> Loss:
    """SAPO (arXiv 2511.20347): −A·(4/τ)·sigmoid(τ·(r − 1)) with τ = `tau_pos` where A > 0, else
    `tau_neg`. verl's code always averages as seq-mean-token-mean, as the paper does."""
    log_ratio = _log_ratio(log_probs, old)
    tau = _by_sign(advantages > 0, c.tau_pos, c.tau_neg, log_ratio)
    gate = torch.sigmoid(tau * (log_ratio.exp() - 1)) * 4 / tau
    return -advantages * gate, _reported(log_ratio)


def _dppo(log_probs: Tensor, old: Tensor, advantages: Tensor, excess: Tensor, c: Constants) -> Loss:
    """−A·sg(min(r, c))·log π, 0 where `excess`, a divergence with the sign of π − π_old, is more
    than `clip_ratio_high` and A > 0, or less than −`clip_ratio_low` and A ≤ 0."""
    log_ratio = _log_ratio(log_probs, old)
    ratio = log_ratio.detach().exp()
    within = torch.where(advantages > 0, excess <= c.clip_ratio_high, excess >= -c.clip_ratio_low)
    loss = -advantages * ratio.clamp(max=c.clip_ratio_c) * log_probs * within
    return loss, _reported(log_ratio, ~within, within & (ratio > c.clip_ratio_c))


def dppo_tv(log_probs: Tensor, old: Tensor, advantages: Tensor, *, c: Constants, **_: Any) -> Loss:
    """DPPO (arXiv 2602.04879) with binary total variation: −A·sg(min(r, `clip_ratio_c`))·log π, 0
    where the update would lead further away and |π − π_old| is beyond the clip ratios."""
    excess = log_probs.detach().exp() - old.exp()
    return _dppo(log_probs, old, advantages, excess, c)


def dppo_kl(log_probs: Tensor, old: Tensor, advantages: Tensor, *, c: Constants, **_: Any) -> Loss:
    """The same by the binary divergence KL(π_old‖π): of the token against all others."""
    now, before = log_probs.detach().exp(), old.exp()
    others = torch.log((1 - before + 1e-8) / (1 - now + 1e-8))
    divergence = before * (old - log_probs.detach()) + (1 - before) * others
    return _dppo(log_probs, old, advantages, divergence * (now - before).sign(), c)


def vespo(
    log_probs: Tensor, old: Tensor, advantages: Tensor, *, lengths: Tensor, c: Constants, **_: Any
) -> Loss:
    """VESPO (arXiv 2602.10693; TRL's `loss_type="vespo"`): −sg(φ(W))·A·log π with the product W of
    r over the response, and φ(W) = W^k·exp(λ·(1 − W)); k and λ are `vespo_k_pos` and
    `vespo_lambda_pos` where A ≥ 0, else `…_neg`. Engines' factors multiply it; TRL's are in W."""
    log_ratio, up = _log_ratio(log_probs, old), advantages >= 0
    log_W = _sum(log_ratio, lengths).detach().clamp(math.log(1e-8), 20)
    k = _by_sign(up, c.vespo_k_pos, c.vespo_k_neg, log_ratio)
    rate = _by_sign(up, c.vespo_lambda_pos, c.vespo_lambda_neg, log_ratio)
    phi = (k * log_W + rate * (1 - log_W.exp())).exp()
    return -phi * advantages * log_probs, _reported(log_ratio)


POLICY_LOSSES: dict[str, Callable[..., Loss]] = {
    "vanilla": vanilla,
    "gspo": gspo,
    "gspo-token": gspo,
    "geo_mean": geo_mean,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "gpg": gpg,
    "cispo": cispo,
    "sapo": sapo,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "vespo": vespo,
}
MULTIPLES_OF_ADVANTAGE = {"vanilla", "gspo", "gspo-token", "geo_mean", "clip_cov", "gpg", "cispo"}
MULTIPLES_OF_ADVANTAGE |= {"sapo", "dppo_tv", "dppo_kl", "vespo"}
"""Those without a gradient where the advantage is 0."""


def _covariance(old_log_probs: Tensor, advantages: Tensor, share: float) -> tuple[Tensor, int]:
    """(A − mean A)·(log π_old − mean log π_old) of each token (arXiv 2505.22617, eq. 10), [T], and
    how many tokens a share of them is: at least one."""
    centred = (x - x.mean() for x in (advantages, old_log_probs))
    number = max(1, int(share * len(advantages)))
    return next(centred) * next(centred), min(len(advantages), number)


def clip_cov_tokens(
    old_log_probs: Tensor, advantages: Tensor, c: Constants, random: np.random.Generator
) -> Tensor:
    """`clip_cov_ratio` of all tokens, by chance among those with a covariance between `clip_cov_lb`
    and `clip_cov_ub`, 1 or 0 each, [T] → [T]."""
    covariance, number = _covariance(old_log_probs, advantages, c.clip_cov_ratio)
    between = np.flatnonzero((covariance > c.clip_cov_lb) & (covariance < c.clip_cov_ub))
    selected = torch.zeros_like(covariance)
    selected[random.permutation(between)[:number]] = 1
    return selected


def kl_cov_tokens(
    old_log_probs: Tensor, advantages: Tensor, c: Constants, random: np.random.Generator
) -> Tensor:
    """`kl_cov_ratio` of all tokens, those with the largest covariance, 1 or 0 each, [T] → [T]."""
    covariance, number = _covariance(old_log_probs, advantages, c.kl_cov_ratio)
    return torch.zeros_like(covariance).index_fill(0, covariance.topk(number).indices, 1)


def low_entropy(entropies: NDArray[Any], share: float) -> NDArray[np.bool_]:
    """Which of a step's tokens are not among the `share` of largest entropy, bool [T] → [T]: those
    below the threshold of arXiv 2506.01939, by the quantile of TRL's `top_entropy_quantile`, which
    looks at each micro-batch. Their loss counts, but has no gradient; weights stay as they are."""
    if not len(entropies):
        return np.zeros(0, bool)
    return entropies < np.quantile(entropies, 1 - share)


SELECTIONS: dict[str, Callable[..., Tensor]] = {
    "clip_cov": clip_cov_tokens,
    "kl_cov": kl_cov_tokens,
}
"""Losses that treat some tokens of an optimizer step otherwise → which. The driver asks once, of
all tokens of the step and by the policy before the update, so that micro-batches and ranks change
nothing. verl's code asks in each micro-batch, by the policy as it is by then; its `clip_cov` leaves
out tokens that PPO's clip cuts, which have no gradient anyway. In the first optimizer step, where
the policy is still the old one, both choose from the same covariances."""
