"""verl's own advantages and losses with the plug-in, in verl's environment.

    python verl_job.py IN OUT

IN holds a batch of padded responses and cases, OUT the loss and gradient of each case.
"""

import sys
from typing import Any

import numpy as np
import ray
import torch
import verl  # finds the plug-in by itself
from hydra import compose, initialize_config_module
from verl import DataProto
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.utils.config import omega_conf_to_dataclass

OVERRIDES = [
    "algorithm.adv_estimator=delta_l",
    "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm",
    "actor_rollout_ref.actor.loss_scale_factor=${data.max_response_length}",
    "actor_rollout_ref.actor.use_dynamic_bsz=True",
    "actor_rollout_ref.rollout.name=vllm",
]


def loss_and_gradient(batch: dict[str, Any], case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """As the trainer's driver and its actor's ranks compute them."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=OVERRIDES + case["overrides"])
    mask = batch["mask"]
    rewards = torch.zeros(mask.shape)
    rewards[:, 0] = batch["rewards"]
    data = DataProto.from_single_dict(
        {
            "token_level_rewards": rewards,
            "response_mask": mask,
            "uid": np.array([str(g) for g in batch["groups"].tolist()], dtype=object),
        }
    )
    data = compute_advantage_for_multi_trajectories(
        data,
        [f"{uid}_{i}_0" for i, uid in enumerate(data.non_tensor_batch["uid"])],
        config.algorithm.adv_estimator,
        norm_adv_by_std_in_grpo=config.algorithm.norm_adv_by_std_in_grpo,
        config=config.algorithm,
    )
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    log_probs = batch["log_probs"].clone().requires_grad_()
    total = torch.zeros(())
    ranks = torch.arange(len(mask)).chunk(case["ranks"])
    for step in batch["steps"]:
        actor.global_batch_info.update(
            dp_size=len(ranks),
            batch_num_tokens=int(mask[step].sum()),
            global_batch_size=len(step),
            loss_scale_factor=actor.loss_scale_factor,
        )
        for rank in range(len(ranks)):
            for part in step[rank :: len(ranks)].split(case["micro_batch"]):
                loss, _ = get_policy_loss_fn(actor.policy_loss.loss_mode)(
                    old_log_prob=batch["old_log_probs"][part],
                    log_prob=log_probs[part],
                    advantages=data.batch["advantages"][part],
                    response_mask=mask[part],
                    loss_agg_mode=actor.loss_agg_mode,
                    config=actor,
                )
                total = total + loss / len(ranks)  # gradients are averaged over ranks
    total.backward()
    return {"loss": total.detach(), "gradient": log_probs.grad}


@ray.remote
def known_to_worker() -> bool:
    """Whether a worker of Ray knows the estimator, having imported nothing but verl."""
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    return "delta_l" in ADV_ESTIMATOR_REGISTRY


if __name__ == "__main__":
    batch, cases = torch.load(sys.argv[1])
    results = {name: loss_and_gradient(batch, case) for name, case in cases.items()}
    ray.init(num_cpus=1, include_dashboard=False)
    results["worker"] = ray.get(known_to_worker.remote())
    results["verl"] = verl.__version__
    torch.save(results, sys.argv[2])
