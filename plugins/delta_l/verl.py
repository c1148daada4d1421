"""∆L Normalization in verl (0.9): the advantage estimator `delta_l`.

verl imports this by itself, in each process that imports verl, wherever the distribution
`delta-l-norm` is installed (entry point `verl.plugins`), so on every node of a Ray cluster. Where
it only lies in a folder: PYTHONPATH, and VERL_USE_EXTERNAL_MODULES=delta_l.verl for all of them.
"""

import inspect
from typing import Any

import numpy as np
from torch import Tensor
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, register_adv_est

from delta_l.weights import advantage_scales


@register_adv_est("delta_l")
def delta_l_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    config: Any = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Advantages of verl's estimator `algorithm.delta_l.base` [grpo], times N·M·w_i with ∆L's
    weights for `algorithm.delta_l.alpha` [0.75], and its returns; [N, T] each. verl calls this once
    for a rollout batch. The loss is ∆L's with ``loss_agg_mode=seq-mean-token-sum-norm`` and
    ``loss_scale_factor=M`` of `actor_rollout_ref.actor`, which average over N·M cells. Raises:
    ValueError for keys that it doesn't know, or a negative alpha."""
    settings = dict((config.get("delta_l") if config else None) or {})
    base, alpha = settings.pop("base", "grpo"), float(settings.pop("alpha", 0.75))
    if settings or not alpha >= 0:
        problem = f"no key {', '.join(settings)}" if settings else f"no alpha of {alpha}"
        raise ValueError(f"algorithm.delta_l has base and alpha (0 or more), and {problem}")
    estimator = get_adv_estimator_fn(base)
    if "norm_adv_by_std_in_grpo" in inspect.signature(estimator).parameters and config:
        others["norm_adv_by_std_in_grpo"] = config.get("norm_adv_by_std_in_grpo", True)
    advantages, returns = estimator(
        token_level_rewards=token_level_rewards,
        response_mask=response_mask,
        index=index,
        config=config,
        **others,
    )
    scales = advantage_scales(response_mask.sum(-1).cpu(), alpha).to(advantages.device)
    return advantages * scales[:, None], returns
