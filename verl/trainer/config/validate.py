"""Rules that a type can't express: ranges, choices, and keys that contradict each other."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from verl.trainer.config.model_schema import OptimConfig
from verl.trainer.config.schema import Config
from verl.trainer.config.section import Section
from verl.trainer.config.sft_schema import SFTConfig

LOGGERS = ("console", "wandb", "tensorboard", "file")
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
LIMITS = {
    "low": (operator.ge, "at least"),
    "above": (operator.gt, "more than"),
    "high": (operator.le, "at most"),
}
IDLE = {
    "actor.use_grpopp=True": (f"{ACTOR}.loss_agg_mode",),
    "actor.use_dr_grpo=True": (f"{ACTOR}.loss_agg_mode",),
    "use_kl_loss=False": (f"{ACTOR}.kl_loss_",),
    "adv_estimator=rloo": ("algorithm.norm_adv_by_std_in_grpo",),
    "adv_estimator=reinforce_plus_plus_baseline": ("algorithm.norm_adv_by_std_in_grpo",),
    "kl_ctrl.type=fixed": ("algorithm.kl_ctrl.horizon", "algorithm.kl_ctrl.target_kl"),
    "use_dynamic_bsz=True": (f"{ACTOR}.ppo_micro_batch_size_per_gpu",),
    "use_dynamic_bsz=False": (f"{ACTOR}.ppo_max_token_len_per_gpu",),
    "log_prob_use_dynamic_bsz=True": (f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu",),
    "log_prob_use_dynamic_bsz=False": (f"{ROLLOUT}.log_prob_max_token_len_per_gpu",),
    "save_freq=-1": ("trainer.max_actor_ckpt_to_keep",),
    "use_kl_in_reward=False": ("algorithm.kl_ctrl.", "algorithm.kl_penalty"),
    "use_grpopp=False": ("algorithm.grpopp_config.", f"{ACTOR}.grpopp_config."),
    "custom_reward_function.path=None": (
        "reward_model.num_workers",
        "custom_reward_function.timeout_s",
    ),
    "overlong_buffer.enable=False": ("reward_model.overlong_buffer.",),
    "filter_groups.enable=False": ("algorithm.filter_groups.", "data.gen_batch_size"),
    "rollout.name=hf": (
        f"{ROLLOUT}.tensor_model_parallel_size",
        f"{ROLLOUT}.gpu_memory_utilization",
        f"{ROLLOUT}.max_num_batched_tokens",
        f"{ROLLOUT}.enable_chunked_prefill",
        f"{ROLLOUT}.enforce_eager",
        f"{ROLLOUT}.free_cache_engine",
        f"{ROLLOUT}.engine_kwargs.",
    ),
    "verify_weights=False": (f"{ROLLOUT}.verify_weights_tolerance",),
    "rollout_is=None": ("algorithm.rollout_correction.rollout_is_threshold",),
    "bypass_old_log_prob=True": ("algorithm.rollout_correction.",),
    "async_rollout=True": ("algorithm.rollout_correction.",),
}
"""Setting (the end of its key, and its value) → beginnings of the keys that then can't matter."""


def validate(config: Config) -> None:
    """Raises ValueError, which names the key and the remedy, for a configuration that can't run."""
    _raise_first(
        _values(config),
        _aggregation(config),
        _sizes(config),
        _common(config, config.actor_rollout_ref.actor.optim, f"{ACTOR}.optim"),
        _trainer(config),
        _algorithm(config),
        _engines(config),
        _rewards(config),
    )


def validate_sft(config: SFTConfig) -> None:
    """The same for the supervised warm-up."""
    _raise_first(_values(config), _common(config, config.optim, "optim"))


def ignored_keys(config: Config, given: Iterable[str]) -> list[str]:
    """Those of the overridden keys that can't matter in this run, each with its reason."""
    actor, custom = config.actor_rollout_ref.actor, config.custom_reward_function.path
    settings = [f".{key}={value}" for key, value, _ in config.walk()]
    rules = {
        reason: beginnings
        for reason, beginnings in IDLE.items()
        if any(setting.endswith(f".{reason}") for setting in settings)
    }
    if actor.loss_agg_mode == "token-mean-legacy":  # which averages over micro-batches
        rules.pop("use_dynamic_bsz=True", None)
    rules["there is no critic"] = ("critic.", "trainer.critic_warmup")
    if None not in (actor.clip_ratio_low, actor.clip_ratio_high):
        rules["clip_ratio_low and clip_ratio_high are set"] = (f"{ACTOR}.clip_ratio=",)
    if not (actor.use_kl_loss or config.algorithm.use_kl_in_reward):
        rules["no KL term needs a reference policy"] = ("actor_rollout_ref.ref.",)
    if not {"wandb", "tensorboard"} & set(_loggers(config)):
        reason = "only the loggers wandb and tensorboard show them; validation_data_dir keeps all"
        rules[reason] = ("trainer.log_val_generations",)
    if custom is not None:
        rules["custom_reward_function scores everything"] = ("reward_model.math_server.",)
    found = []
    for key in dict.fromkeys(given):
        reasons = [why for why, beginnings in rules.items() if f"{key}=".startswith(beginnings)]
        if reasons and not key.endswith(".enable"):
            found.append(f"{key} ({reasons[0]})")
    return found


def _raise_first(*checks: Iterator[str]) -> None:
    """Each check yields what is wrong, and may rely on those before it."""
    for problem in chain(*checks):
        raise ValueError(problem)


def _values(config: Section) -> Iterator[str]:
    for key, value, rule in config.walk():
        # The actor's copies of algorithm.grpopp_config have the values of this one.
        if value is None or key.startswith(f"{ACTOR}.grpopp_config."):
            continue
        if "choices" in rule and value not in rule["choices"]:
            yield f"{key}={value}: choose one of {', '.join(map(str, rule['choices']))}"
        for name, (holds, words) in LIMITS.items():
            limit = rule.get(name)
            if limit is not None and not holds(value, limit):
                yield f"{key}={value}: must be {words} {limit}"


def _aggregation(config: Config) -> Iterator[str]:
    algorithm, actor = config.algorithm, config.actor_rollout_ref.actor
    for name in ("use_grpopp", "use_dr_grpo", "grpopp_config.alpha", "grpopp_config.scope"):
        ours, copy = map(operator.attrgetter(name), (algorithm, actor))
        if ours != copy:
            yield (
                f"algorithm.{name}={ours} contradicts {ACTOR}.{name}={copy}: set "
                f"algorithm.{name} alone, the actor follows it"
            )
    if algorithm.use_grpopp and algorithm.use_dr_grpo:
        yield "algorithm.use_grpopp and algorithm.use_dr_grpo are two methods: turn one of them off"
    if actor.loss_agg_mode != "token-mean" and (algorithm.use_grpopp or algorithm.use_dr_grpo):
        flag = "use_grpopp" if algorithm.use_grpopp else "use_dr_grpo"
        yield (
            f"algorithm.{flag}=True chooses the loss aggregation, and so does "
            f"{ACTOR}.loss_agg_mode={actor.loss_agg_mode}: drop one of them"
        )
    if actor.loss_agg_mode == "token-mean-legacy" and not actor.ppo_micro_batch_size_per_gpu:
        yield (
            "loss_agg_mode=token-mean-legacy averages over micro-batches of "
            f"{ACTOR}.ppo_micro_batch_size_per_gpu responses: set that key"
        )


def _sizes(config: Config) -> Iterator[str]:
    data, actor = config.data, config.actor_rollout_ref.actor
    rollout = config.actor_rollout_ref.rollout
    if data.train_batch_size % actor.ppo_mini_batch_size:
        yield (
            f"{ACTOR}.ppo_mini_batch_size={actor.ppo_mini_batch_size} must divide "
            f"data.train_batch_size={data.train_batch_size} (both count prompts)"
        )
    if actor.ppo_micro_batch_size_per_gpu is None and not actor.use_dynamic_bsz:
        yield (
            f"set {ACTOR}.ppo_micro_batch_size_per_gpu (responses per pass), or "
            f"{ACTOR}.use_dynamic_bsz=True with ppo_max_token_len_per_gpu"
        )
    longest = data.max_prompt_length + data.max_response_length
    sequence = "data.max_prompt_length + data.max_response_length"
    small = f"can't hold one sequence of {sequence} = {longest} tokens"
    budget = actor.ppo_max_token_len_per_gpu
    if actor.use_dynamic_bsz and budget < longest:
        yield f"{ACTOR}.ppo_max_token_len_per_gpu={budget} {small}"
    budget = rollout.log_prob_max_token_len_per_gpu
    if rollout.log_prob_use_dynamic_bsz and budget < longest:
        yield f"{ROLLOUT}.log_prob_max_token_len_per_gpu={budget} {small}"


def _common(config: Config | SFTConfig, optim: OptimConfig, section: str) -> Iterator[str]:
    yield from _files("data.train_files", config.data.train_files)
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        yield f"{section}.betas={optim.betas}: give two numbers from 0 to below 1"
    given, names = config.trainer.logger, _loggers(config)
    if not isinstance(names, list) or any(name not in LOGGERS for name in names):
        yield f"trainer.logger={given}: choose from {', '.join(LOGGERS)}"


def _loggers(config: Config | SFTConfig) -> Any:
    """The list that trainer.logger should be."""
    given = config.trainer.logger
    return [given] if isinstance(given, str) else given


def _files(key: str, given: Any) -> Iterator[str]:
    paths = [given] if isinstance(given, str) else given
    if not (isinstance(paths, list) and paths and all(p and isinstance(p, str) for p in paths)):
        yield f"{key}={given}: give a path or a list of paths"


def _trainer(config: Config) -> Iterator[str]:
    trainer = config.trainer
    if trainer.val_before_train or trainer.val_only or trainer.test_freq > 0:
        yield from _files("data.val_files", config.data.val_files)
    if trainer.default_hdfs_dir is not None:
        yield (
            "trainer.default_hdfs_dir: only null is supported; checkpoints go to "
            "trainer.default_local_dir, which may be a mounted folder"
        )
    if trainer.resume_mode == "resume_path" and not trainer.resume_from_path:
        yield "trainer.resume_mode=resume_path needs trainer.resume_from_path"


def _algorithm(config: Config) -> Iterator[str]:
    algorithm, rollout = config.algorithm, config.actor_rollout_ref.rollout
    control, groups = algorithm.kl_ctrl, algorithm.filter_groups
    if rollout.n < 2:
        yield (
            f"{ROLLOUT}.n={rollout.n}: advantages compare the responses of a prompt, so n must be "
            "at least 2"
        )
    if not rollout.do_sample or rollout.temperature <= 0:
        yield (
            f"{ROLLOUT}: training needs do_sample=True and temperature > 0 (greedy responses to a "
            "prompt are all the same)"
        )
    if control.type == "adaptive" and control.target_kl <= 0:
        yield (
            f"algorithm.kl_ctrl.target_kl={control.target_kl}: kl_ctrl.type=adaptive steers "
            "towards a divergence above 0"
        )
    if groups.enable and groups.metric is None:
        yield "algorithm.filter_groups.enable=True needs algorithm.filter_groups.metric, like acc"
    if algorithm.use_kl_in_reward and groups.metric == "seq_final_reward":
        yield (
            "algorithm.filter_groups.metric=seq_final_reward with algorithm.use_kl_in_reward=True: "
            "the KL term makes all rewards differ, so nothing would be dropped; take seq_reward"
        )


def _engines(config: Config) -> Iterator[str]:
    algorithm, trainer = config.algorithm, config.trainer
    rollout, split = config.actor_rollout_ref.rollout, trainer.rollout_gpus_per_node
    groups = algorithm.filter_groups
    if trainer.async_rollout and not split:
        yield (
            "trainer.async_rollout=True needs engines on devices of their own: set "
            "trainer.rollout_gpus_per_node"
        )
    if trainer.async_rollout and groups.enable and groups.carry_over:
        yield (
            "trainer.async_rollout=True: what algorithm.filter_groups carries over would be two "
            "policy versions old; set algorithm.filter_groups.carry_over=False"
        )
    flags = {
        "trainer.async_rollout": trainer.async_rollout,
        "algorithm.bypass_old_log_prob": algorithm.bypass_old_log_prob,
        "algorithm.filter_groups.carry_over": groups.enable and groups.carry_over,
        "algorithm.rollout_correction.rollout_is": algorithm.rollout_correction.rollout_is,
    }
    if rollout.top_p < 1 or rollout.top_k > 0:
        for key in [key for key, value in flags.items() if value]:
            yield (
                f"{key}={flags[key]} compares the engines' log-probabilities with the actor's, but "
                f"{ROLLOUT}.top_p={rollout.top_p} and top_k={rollout.top_k} change the engines': "
                f"set {key}={'null' if key.endswith('_is') else False}, or top_p=1 and top_k=-1"
            )
    way = rollout.weight_transfer
    if way in ("ipc", "nccl") and rollout.name == "hf":
        yield f"{ROLLOUT}.weight_transfer={way} is for rollout.name=vllm: set it to null"
    if (way == "ipc" and split) or (way == "nccl" and not split):
        yield (
            f"{ROLLOUT}.weight_transfer={way} does not fit trainer.rollout_gpus_per_node={split}: "
            "ipc is for engines that share the actor's GPUs, nccl for those on their own"
        )
    if rollout.name == "vllm":
        yield from _vllm(config)


def _vllm(config: Config) -> Iterator[str]:
    data, trainer, rollout = config.data, config.trainer, config.actor_rollout_ref.rollout
    devices = trainer.rollout_gpus_per_node or trainer.n_gpus_per_node
    if devices % rollout.tensor_model_parallel_size:
        yield (
            f"{ROLLOUT}.tensor_model_parallel_size={rollout.tensor_model_parallel_size} must "
            f"divide the {devices} devices of each machine that engines have"
        )
    longest = data.max_prompt_length + data.max_response_length
    budget = rollout.max_num_batched_tokens
    if budget < rollout.max_num_seqs:
        yield f"{ROLLOUT}.max_num_batched_tokens={budget} is less than max_num_seqs: raise it"
    own = {"tensor_parallel_size", "weight_transfer_config", "logprobs_mode", "max_model_len"}
    if taken := own & rollout.engine_kwargs.vllm.keys():
        yield f"{ROLLOUT}.engine_kwargs.vllm.{min(taken)} is set by other keys: drop it"
    if trainer.device == "cpu":
        if rollout.tensor_model_parallel_size > 1:
            yield f"{ROLLOUT}.tensor_model_parallel_size: vLLM has one process per engine on a CPU"
        if rollout.weight_transfer == "ipc":
            yield f"{ROLLOUT}.weight_transfer=ipc is for GPUs: set it to null"
    if budget < longest and not rollout.enable_chunked_prefill:
        yield (
            f"{ROLLOUT}.max_num_batched_tokens={budget} can't hold one sequence of {longest} "
            f"tokens: raise it, or set {ROLLOUT}.enable_chunked_prefill=True"
        )


def _rewards(config: Config) -> Iterator[str]:
    rewards, longest = config.reward_model, config.data.max_response_length
    buffer = rewards.overlong_buffer
    if rewards.enable:
        yield "reward_model.enable=True: rewards are functions; use custom_reward_function.path"
    if buffer.enable and rewards.reward_manager != "dapo":
        yield "reward_model.overlong_buffer.enable=True needs reward_model.reward_manager=dapo"
    if buffer.enable and not 1 <= buffer.len <= longest:
        yield (
            f"reward_model.overlong_buffer.len={buffer.len} must be between 1 and "
            f"data.max_response_length={longest}"
        )
