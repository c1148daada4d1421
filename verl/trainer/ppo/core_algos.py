"""The names by which users of verl know the maths of a step; it stands in `verl.algorithms`. What
takes tensors [batch, time] and a mask is a form of it for scripts and notebooks: the trainer never
pads, and divides by nothing that depends on a micro-batch."""
# ruff: noqa: F401

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verl.algorithms.advantages import ADVANTAGES, advantages, gae, whitened
from verl.algorithms.kl import KL_ESTIMATORS, adapted_kl_coef, kl_divergence
from verl.algorithms.losses import LossConfig, LossInputs, value_loss
from verl.algorithms.policy_losses import POLICY_LOSSES, policy_loss
from verl.algorithms.rollout_correction import rollout_is_weights
from verl.algorithms.weights import WEIGHTS, response_weights
from verl.utils.torch_functional import masked_mean, masked_sum


def _register(table: dict[str, Any], name: str) -> Callable[[Any], Any]:
    """A decorator. Raises: ValueError if there is another function of this name."""

    def add(function: Any) -> Any:
        if table.setdefault(name, function) is not function:
            raise ValueError(f"there is another {name} already")
        return function

    return add


register_adv_est = partial(_register, ADVANTAGES)
"""`@register_adv_est(name)` puts a function with the arguments of those there into `ADVANTAGES`,
for code that reads it. A run's key takes `path/to/file.py:function` (docs/your_own_method.md)."""
register_policy_loss = partial(_register, POLICY_LOSSES)
"""The same for `POLICY_LOSSES`."""


def compute_outcome_advantage(
    estimator: str,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any = None,
    norm_adv_by_std_in_grpo: bool | str = True,
    config: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """An estimator of `ADVANTAGES` on tensors [batch, time]: the advantages, twice, as verl returns
    two tensors. `index`, [batch]: equal for responses to the same prompt; `options`: what the
    estimator takes beside; `config` has no effect. Raises: TypeError for other options."""
    if unknown := options.keys() - {"baselines", "components", "component_weights"}:
        raise TypeError(f"{estimator} takes no {', '.join(sorted(unknown))}")
    rewards = token_level_rewards.sum(-1)
    groups = np.zeros(len(rewards)) if index is None else np.unique(index, return_inverse=True)[1]
    lengths, by_std = response_mask.sum(-1), norm_adv_by_std_in_grpo
    each = advantages(rewards, groups, lengths, estimator, by_std, **options)
    values = each[:, None].to(token_level_rewards) * response_mask
    return values, values


def compute_grpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    *,
    norm_adv_by_std_in_grpo: bool | str = True,
    use_dr_grpo: bool = False,
    use_grpopp: bool = False,
    grpopp_config: Mapping[str, Any] | None = None,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """`grpo`. With `use_grpopp` as in the code of arXiv 2509.07558 times N·M·w_i, the factor of ∆L
    with `grpopp_config["alpha"]`, so that `masked_mean_allavg` of the loss of a whole batch is
    Σ_i w_i Σ_t ℓ_it. A prompt's only response gets 0; there and in verl it gets its reward."""
    if use_dr_grpo and use_grpopp:
        raise ValueError("use_dr_grpo and use_grpopp are two methods: turn one of them off")
    by_std = norm_adv_by_std_in_grpo and not use_dr_grpo
    given = token_level_rewards, response_mask, index
    values, _ = compute_outcome_advantage("grpo", *given, by_std)
    if use_grpopp:
        lengths, alpha = response_mask.sum(-1), (grpopp_config or {"alpha": 0.75})["alpha"]
        factors = len(lengths) * response_weights(lengths, "delta-l", 1, alpha)
        values = values * factors[:, None].to(values)
    return values, values


def compute_remax_outcome_advantage(
    token_level_rewards: Tensor, reward_baselines: Tensor, response_mask: Tensor, config: Any = None
) -> tuple[Tensor, Tensor]:
    """`remax`; `reward_baselines`: the rewards of greedy responses, [batch]."""
    given = token_level_rewards, response_mask
    return compute_outcome_advantage("remax", *given, baselines=reward_baselines)


compute_rloo_outcome_advantage = partial(compute_outcome_advantage, "rloo")
compute_opo_outcome_advantage = partial(compute_outcome_advantage, "opo")
compute_gpg_outcome_advantage = partial(compute_outcome_advantage, "gpg")
compute_grpo_passk_outcome_advantage = partial(compute_outcome_advantage, "grpo_passk")
compute_reinforce_plus_plus_outcome_advantage = partial(
    compute_outcome_advantage, "reinforce_plus_plus"
)
compute_reinforce_plus_plus_baseline_outcome_advantage = partial(
    compute_outcome_advantage, "reinforce_plus_plus_baseline"
)


def agg_loss(
    loss_mat: Tensor, loss_mask: Tensor, loss_agg_mode: str, loss_scale_factor: int | None = None
) -> Tensor:
    """Σ_i w_i Σ_t ℓ_it of losses [batch, time] as if they were a whole optimizer step, [], with the
    w_i of `response_weights`; M is `loss_scale_factor`, or else the width of the tensor."""
    M = loss_scale_factor or loss_mat.shape[-1]
    weights = response_weights(loss_mask.sum(-1), loss_agg_mode, M)
    return masked_sum(weights[:, None].to(loss_mat) * loss_mat, loss_mask)


def compute_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    cliprange: float = 0.2,
    cliprange_low: float | None = None,
    cliprange_high: float | None = None,
    clip_ratio_c: float = 3.0,
    loss_agg_mode: str = "token-mean",
    use_dr_grpo: bool = False,
    use_grpopp: bool = False,
    grpopp_config: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`policy_loss` of tensors [batch, time]: the loss, the share of tokens that the clip cut, the
    mean of −log r, and the share that the dual clip cut, [] each. `use_grpopp`: of advantages that
    have their weights already (`compute_grpo_outcome_advantage`), and so a mean over all cells."""
    low, high = (cliprange if x is None else x for x in (cliprange_low, cliprange_high))
    losses, reported = policy_loss(log_prob, old_log_prob, advantages, low, high, clip_ratio_c)
    mode = "dr-grpo" if use_dr_grpo or use_grpopp else loss_agg_mode
    names = "pg_clipfrac", "ppo_kl", "pg_clipfrac_lower"
    means = (masked_mean(reported[name], response_mask) for name in names)
    clipped, kl, clipped_lower = means
    return agg_loss(losses, response_mask, mode), clipped, kl, clipped_lower


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """`gae` of tensors [batch, time]: advantages, `whitened`, and returns, 0 where masked."""
    mask = response_mask.bool()
    found = gae(token_level_rewards[mask], values[mask], mask.sum(-1), float(gamma), float(lam))
    columns = whitened(found, torch.ones_like(found)), found + values[mask]
    white, returns = (torch.zeros_like(values).masked_scatter(mask, x) for x in columns)
    return white, returns


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
) -> tuple[Tensor, Tensor]:
    """`value_loss` of tensors [batch, time] as if they were a whole optimizer step, and the share
    of tokens where the clip raised it, [] each."""
    mask = response_mask.bool()
    new, lengths = vpreds[mask], mask.sum(-1)
    weights = response_weights(lengths, loss_agg_mode, mask.shape[-1]).to(new)
    each = weights.repeat_interleave(lengths)
    x = LossInputs(new, new, lengths, each, each, each, values=values[mask], returns=returns[mask])
    loss, sums = value_loss(x, LossConfig(cliprange_value=cliprange_value))
    return loss, sums["vf_clipfrac"] / mask.sum()


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """`kl_divergence`, of tensors of any shape."""
    return kl_divergence(logprob, ref_logprob, kl_penalty)
