"""∆L Normalization in SkyRL: an advantage estimator for its registry.

Call `register` in the task that trains, before the trainer is made; SkyRL hands what is registered
on to its other processes. The loss is ∆L's with these keys of `trainer.algorithm`:
``advantage_estimator=delta_l loss_reduction=seq_mean_token_sum_norm max_seq_len=M``. Not for
`step_wise_trajectories`, where estimators don't see the lengths, nor `advantage_batch_normalize`.
"""

from typing import Any

import numpy as np
from skyrl.backends.skyrl_train.utils.ppo_utils import AdvantageEstimatorRegistry
from torch import Tensor

from delta_l.weights import advantage_scales


def register(alpha: float = 0.75, base: str = "grpo", name: str = "delta_l") -> None:
    """Registers `name`: the advantages of SkyRL's estimator `base`, times N·M·w_i with ∆L's weights
    for the exponent `alpha`, and its returns. Lengths are those of the whole rollout batch. Raises:
    ValueError for a `base` that isn't there, a `name` that is, or a negative alpha."""
    if not alpha >= 0:
        raise ValueError(f"alpha={alpha}: choose 0 or more; the paper's are 0.75 and 1")
    estimator = AdvantageEstimatorRegistry.get(base)

    def delta_l(
        token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, **others: Any
    ) -> tuple[Tensor, Tensor]:
        advantages, returns = estimator(token_level_rewards, response_mask, index, **others)
        scales = advantage_scales(response_mask.sum(-1).cpu(), alpha).to(advantages.device)
        return advantages * scales[:, None], returns

    AdvantageEstimatorRegistry.register(name, delta_l)
