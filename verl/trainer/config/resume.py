"""Which keys a run may change when it resumes from a checkpoint."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from contextlib import suppress
from functools import reduce
from typing import Any

from verl.trainer.config.schema import Config
from verl.trainer.config.validate import ignored_keys

FREE = (
    "trainer.",
    "ray_init.",
    "critic.",
    "data.val_",
    "actor_rollout_ref.model.enable_gradient_checkpointing",
    "actor_rollout_ref.model.use_remove_padding",
    "actor_rollout_ref.actor.strategy",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "actor_rollout_ref.actor.use_dynamic_bsz",
    "actor_rollout_ref.actor.fsdp_config.param_offload",
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload",
    "actor_rollout_ref.actor.fsdp_config.reshard_after_forward",
    "actor_rollout_ref.ref.log_prob_",
    "actor_rollout_ref.ref.fsdp_config.param_offload",
    "actor_rollout_ref.ref.fsdp_config.optimizer_offload",
    "actor_rollout_ref.ref.fsdp_config.reshard_after_forward",
    "actor_rollout_ref.rollout.max_num_seqs",
    "actor_rollout_ref.rollout.log_prob_",
    "actor_rollout_ref.rollout.tensor_model_parallel_size",
    "actor_rollout_ref.rollout.gpu_memory_utilization",
    "actor_rollout_ref.rollout.max_num_batched_tokens",
    "actor_rollout_ref.rollout.enable_chunked_prefill",
    "actor_rollout_ref.rollout.enforce_eager",
    "actor_rollout_ref.rollout.free_cache_engine",
    "actor_rollout_ref.rollout.weight_transfer",
    "actor_rollout_ref.rollout.verify_weights",
    "actor_rollout_ref.rollout.val_kwargs.",
    "custom_reward_function.timeout_s",
    "reward_model.num_workers",
    "reward_model.math_server.url",
    "reward_model.math_server.autostart",
    "reward_model.math_server.max_wait_s",
    "reward_model.math_server.batch_size",
    "reward_model.math_server.max_connections",
)
"""Beginnings of keys that change nothing but speed, memory, place or rounding; nobody is told."""
COPIES = tuple(
    f"actor_rollout_ref.actor.{key}" for key in ("use_dr_grpo", "use_grpopp", "grpopp_config.")
)
"""Beginnings of the actor's keys that follow those of `algorithm`."""
DELIBERATE = (
    "trainer.total_training_steps",
    "trainer.total_epochs",
    "trainer.async_rollout",
    "actor_rollout_ref.actor.optim.",
    "actor_rollout_ref.rollout.name",
    "actor_rollout_ref.rollout.dtype",
    "actor_rollout_ref.rollout.engine_kwargs.",
)
"""Beginnings of keys that users change in mid-run on purpose: a warning."""
VALIDATION = ("data.val_files", "actor_rollout_ref.rollout.val_kwargs.")
"""Beginnings of keys without which a validation can't be compared with an earlier one."""


def changed_keys(saved: Mapping[str, Any], config: Config) -> tuple[list[str], list[str]]:
    """What differs between the configuration of a checkpoint and that of the run that resumes.

    Args:
        saved: the configuration as nested dicts, of a version with fewer keys perhaps.

    Returns: keys that make it another training, and those that are changed on purpose, each as
    ``key: old → new``.
    """
    found = _differing(saved, config)
    idle = {text.partition(" ")[0] for text in ignored_keys(config, found)}
    other, deliberate = [], []
    for key, (old, new) in found.items():
        text = f"{key}: {old} → {new}"
        if key.startswith(DELIBERATE):
            deliberate.append(text)
        elif not (key in idle or _is_free(key, config)):
            other.append(text)
    return other, deliberate


def same_validation(saved: Mapping[str, Any], config: Config) -> bool:
    """Whether what a run has validated may be compared with what the resumed one will."""
    return not any(key.startswith(VALIDATION) for key in _differing(saved, config))


def _differing(saved: Mapping[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """Key → old and new value, where both have the key and the values differ."""
    found = {}
    for key, value, _ in config.walk():
        with suppress(KeyError):
            old = reduce(operator.getitem, key.split("."), saved)
            if old != (new := json.loads(json.dumps(value))):
                found[key] = old, new
    return found


def _is_free(key: str, config: Config) -> bool:
    # One method alone averages over micro-batches.
    if key == "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu":
        return config.actor_rollout_ref.actor.loss_agg_mode != "token-mean-legacy"
    return key.startswith(FREE + COPIES)
