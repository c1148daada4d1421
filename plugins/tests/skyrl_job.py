"""SkyRL's own advantages and loss with the plug-in, in the environment of verl.

    python skyrl_job.py IN OUT

IN holds a batch of padded responses and exponents, OUT the loss and gradient for each.
"""

import sys
import typing
from typing import Any

import ray
import torch
import typing_extensions

if sys.version_info < (3, 12):  # SkyRL's types, of another part of it, want that
    typing.TypedDict = typing_extensions.TypedDict

from skyrl.backends.skyrl_train.utils import ppo_utils
from skyrl.train.config import AlgorithmConfig

import delta_l.skyrl


def loss_and_gradient(batch: dict[str, Any], alpha: float, M: int) -> dict[str, torch.Tensor]:
    """As the trainer computes them: advantages, then the reduction for each mini-batch."""
    config = AlgorithmConfig(
        advantage_estimator=f"delta_l_{alpha}",
        loss_reduction="seq_mean_token_sum_norm",
        max_seq_len=M,
        policy_loss_type="regular",
    )
    rewards = torch.zeros(batch["mask"].shape)
    rewards[:, 0] = batch["rewards"]
    advantages, _ = ppo_utils.compute_advantages_and_returns(
        rewards, batch["mask"], batch["groups"].tolist(), config.advantage_estimator, config
    )
    log_probs = batch["log_probs"].clone().requires_grad_()
    total = torch.zeros(())
    for step in batch["steps"]:
        mask = batch["mask"][step].float()
        scaled = ppo_utils.apply_loss_reduction_to_advantages_minibatch(
            advantages[step], mask, config.loss_reduction, 2, config.max_seq_len
        )
        loss, _ = ppo_utils.PolicyLossRegistry.get(config.policy_loss_type)(
            log_probs[step], batch["old_log_probs"][step], scaled, config, mask
        )
        total = total + loss
    total.backward()
    return {"loss": total.detach(), "gradient": log_probs.grad}


@ray.remote
def known_to_worker(name: str) -> bool:
    """Whether a worker of Ray gets what was registered here."""
    if sys.version_info < (3, 12):
        typing.TypedDict = typing_extensions.TypedDict
    from skyrl.backends.skyrl_train.utils.ppo_utils import AdvantageEstimatorRegistry

    return name in AdvantageEstimatorRegistry.list_available()


if __name__ == "__main__":
    batch, alphas, M = torch.load(sys.argv[1])
    for alpha in alphas:
        delta_l.skyrl.register(alpha, name=f"delta_l_{alpha}")
    results = {alpha: loss_and_gradient(batch, alpha, M) for alpha in alphas}
    ray.init(num_cpus=1, include_dashboard=False)
    ppo_utils.sync_registries()
    results["worker"] = ray.get(known_to_worker.remote(f"delta_l_{alphas[0]}"))
    torch.save(results, sys.argv[2])
