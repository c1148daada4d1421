"""Rules that a type can't express: ranges, choices, and keys that contradict each other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from verl.trainer.config.model_schema import OptimConfig
from verl.trainer.config.schema import Config, TrainerConfig
from verl.trainer.config.section import Section
from verl.trainer.config.sft_schema import SFTConfig

LOGGERS = ("console", "wandb", "file")


def validate(config: Config) -> None:
    """Raises ValueError, which names the key and the remedy, for a configuration that can't run."""
    _check_values(config)
    _check_aggregation(config)
    _check_sizes(config)
    _check_trainer(config.trainer)
    _check_betas("actor_rollout_ref.actor.optim", config.actor_rollout_ref.actor.optim)
    _check_files("data.train_files", config.data.train_files)
    trainer = config.trainer
    if trainer.val_before_train or trainer.val_only or trainer.test_freq > 0:
        _check_files("data.val_files", config.data.val_files)
    algorithm, rollout, rewards = (
        config.algorithm,
        config.actor_rollout_ref.rollout,
        config.reward_model,
    )
    _require(
        rollout.n >= 2,
        f"actor_rollout_ref.rollout.n={rollout.n}: advantages compare the responses of a prompt, "
        "so n must be at least 2",
    )
    _require(
        rollout.do_sample and rollout.temperature > 0,
        "actor_rollout_ref.rollout: training needs do_sample=True and temperature > 0 (greedy "
        "responses to a prompt are all the same)",
    )
    control = algorithm.kl_ctrl
    _require(
        control.type != "adaptive" or control.target_kl > 0,
        f"algorithm.kl_ctrl.target_kl={control.target_kl}: kl_ctrl.type=adaptive steers towards a "
        "divergence above 0",
    )
    _require(
        not rewards.enable,
        "reward_model.enable=True: rewards are functions here; use custom_reward_function.path",
    )
    buffer = rewards.overlong_buffer
    if buffer.enable:
        _require(
            rewards.reward_manager == "dapo",
            "reward_model.overlong_buffer.enable=True needs reward_model.reward_manager=dapo",
        )
        _require(
            1 <= buffer.len <= config.data.max_response_length,
            f"reward_model.overlong_buffer.len={buffer.len} must be between 1 and "
            f"data.max_response_length={config.data.max_response_length}",
        )
    _require(
        not algorithm.filter_groups.enable or algorithm.filter_groups.metric is not None,
        "algorithm.filter_groups.enable=True needs algorithm.filter_groups.metric, such as acc",
    )
    _require(
        not (algorithm.filter_groups.enable and algorithm.filter_groups.carry_over)
        or (rollout.top_p == 1 and rollout.top_k <= 0),
        f"actor_rollout_ref.rollout.top_p={rollout.top_p}, top_k={rollout.top_k}: prompts that are "
        "carried over keep the engine's log-probabilities, which differ from the actor's after "
        "top-p and top-k; set algorithm.filter_groups.carry_over=False",
    )
    _require(
        not (algorithm.use_kl_in_reward and algorithm.filter_groups.metric == "seq_final_reward"),
        "algorithm.filter_groups.metric=seq_final_reward with algorithm.use_kl_in_reward=True: the "
        "KL term makes all rewards differ, so nothing would be dropped; take seq_reward",
    )


def validate_sft(config: SFTConfig) -> None:
    """The same for the supervised warm-up."""
    _check_values(config)
    _check_logger(config.trainer.logger)
    _check_betas("optim", config.optim)
    _check_files("data.train_files", config.data.train_files)


def ignored_keys(config: Config, given: Iterable[str]) -> list[str]:
    """Those of the overridden keys that can't matter in this run, each with its reason."""
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    reference = actor.use_kl_loss or algorithm.use_kl_in_reward
    hf = config.actor_rollout_ref.rollout.name == "hf"
    dynamic = config.actor_rollout_ref.rollout.log_prob_use_dynamic_bsz
    rollout = "actor_rollout_ref.rollout."
    rules = {
        "critic.": "there is no critic",
        "trainer.critic_warmup": "there is no critic",
    }
    if not actor.use_kl_loss:
        rules["actor_rollout_ref.actor.kl_loss_"] = "use_kl_loss=False"
    if algorithm.adv_estimator != "grpo":
        rules["algorithm.norm_adv_by_std_in_grpo"] = "adv_estimator is not grpo"
    if algorithm.kl_ctrl.type == "fixed":
        rules |= dict.fromkeys(
            ("algorithm.kl_ctrl.horizon", "algorithm.kl_ctrl.target_kl"), "kl_ctrl.type=fixed"
        )
    if None not in (actor.clip_ratio_low, actor.clip_ratio_high):
        rules["actor_rollout_ref.actor.clip_ratio="] = "clip_ratio_low and clip_ratio_high are set"
    size = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"
    budget = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
    rules[size if actor.use_dynamic_bsz else budget] = f"use_dynamic_bsz={actor.use_dynamic_bsz}"
    size, budget = "log_prob_micro_batch_size_per_gpu", "log_prob_max_token_len_per_gpu"
    rules[rollout + (size if dynamic else budget)] = f"log_prob_use_dynamic_bsz={dynamic}"
    if config.trainer.save_freq < 0:
        rules["trainer.max_actor_ckpt_to_keep"] = "save_freq=-1"
    if not algorithm.use_kl_in_reward:
        rules |= dict.fromkeys(
            ("algorithm.kl_ctrl.", "algorithm.kl_penalty"), "use_kl_in_reward=False"
        )
    if not reference:
        rules["actor_rollout_ref.ref."] = "no KL term needs a reference policy"
    if not algorithm.use_grpopp:
        for prefix in ("algorithm.", "actor_rollout_ref.actor."):
            rules[f"{prefix}grpopp_config."] = "use_grpopp=False"
    if config.custom_reward_function.path is None:
        rules["reward_model.num_workers"] = "there is no custom_reward_function"
    else:
        rules["reward_model.math_server."] = "custom_reward_function scores everything"
    if not config.reward_model.overlong_buffer.enable:
        rules["reward_model.overlong_buffer."] = "overlong_buffer.enable=False"
    if not algorithm.filter_groups.enable:
        rules |= dict.fromkeys(
            ("algorithm.filter_groups.", "data.gen_batch_size"), "filter_groups.enable=False"
        )
    if hf:
        for name in (
            "tensor_model_parallel_size",
            "gpu_memory_utilization",
            "max_num_batched_tokens",
            "enable_chunked_prefill",
            "enforce_eager",
            "free_cache_engine",
        ):
            rules[rollout + name] = "rollout.name=hf"
    found = []
    for key in dict.fromkeys(given):
        reasons = [why for start, why in rules.items() if f"{key}=".startswith(start)]
        if reasons and not key.endswith(".enable"):
            found.append(f"{key} ({reasons[0]})")
    return found


def _check_values(config: Section) -> None:
    for key, value, rule in config.walk():
        if key.startswith("actor_rollout_ref.actor.grpopp_config."):
            continue  # the copies of algorithm.grpopp_config, which is checked itself
        if "choices" in rule and value is not None:
            _require(
                value in rule["choices"],
                f"{key}={value}: choose one of {', '.join(map(str, rule['choices']))}",
            )
        if value is not None and rule.get("low") is not None:
            _require(value >= rule["low"], f"{key}={value}: must be at least {rule['low']}")
        if value is not None and rule.get("above") is not None:
            _require(value > rule["above"], f"{key}={value}: must be more than {rule['above']}")
        if value is not None and rule.get("high") is not None:
            _require(value <= rule["high"], f"{key}={value}: must be at most {rule['high']}")


def _check_aggregation(config: Config) -> None:
    algorithm, actor = config.algorithm, config.actor_rollout_ref.actor
    for name in ("use_grpopp", "use_dr_grpo"):
        ours, copy = getattr(algorithm, name), getattr(actor, name)
        _require(
            ours == copy,
            f"algorithm.{name}={ours} contradicts actor_rollout_ref.actor.{name}={copy}: set "
            f"algorithm.{name} alone, the actor follows it",
        )
    for name in ("alpha", "scope"):
        ours, copy = getattr(algorithm.grpopp_config, name), getattr(actor.grpopp_config, name)
        _require(
            ours == copy,
            f"algorithm.grpopp_config.{name}={ours} contradicts "
            f"actor_rollout_ref.actor.grpopp_config.{name}={copy}: set "
            f"algorithm.grpopp_config.{name} alone, the actor follows it",
        )
    _require(
        not (algorithm.use_grpopp and algorithm.use_dr_grpo),
        "algorithm.use_grpopp and algorithm.use_dr_grpo are two methods: turn one of them off",
    )
    flag = "use_grpopp" if algorithm.use_grpopp else "use_dr_grpo"
    _require(
        not (algorithm.use_grpopp or algorithm.use_dr_grpo) or actor.loss_agg_mode == "token-mean",
        f"algorithm.{flag}=True chooses the loss aggregation, and so does "
        f"actor_rollout_ref.actor.loss_agg_mode={actor.loss_agg_mode}: drop one of them",
    )
    _require(
        actor.loss_agg_mode != "token-mean-legacy" or actor.ppo_micro_batch_size_per_gpu,
        "loss_agg_mode=token-mean-legacy averages over micro-batches of "
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu responses: set that key",
    )


def _check_sizes(config: Config) -> None:
    data, actor = config.data, config.actor_rollout_ref.actor
    _require(
        data.train_batch_size % actor.ppo_mini_batch_size == 0,
        f"actor_rollout_ref.actor.ppo_mini_batch_size={actor.ppo_mini_batch_size} must divide "
        f"data.train_batch_size={data.train_batch_size} (both count prompts)",
    )
    _require(
        actor.use_dynamic_bsz or actor.ppo_micro_batch_size_per_gpu is not None,
        "set actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu (responses per pass), or "
        "actor_rollout_ref.actor.use_dynamic_bsz=True with ppo_max_token_len_per_gpu",
    )
    longest = data.max_prompt_length + data.max_response_length
    budgets = {
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": (
            actor.use_dynamic_bsz,
            actor.ppo_max_token_len_per_gpu,
        ),
        "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu": (
            config.actor_rollout_ref.rollout.log_prob_use_dynamic_bsz,
            config.actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu,
        ),
    }
    for key, (used, budget) in budgets.items():
        _require(
            not used or budget >= longest,
            f"{key}={budget} can't hold one sequence of data.max_prompt_length + "
            f"data.max_response_length = {longest} tokens",
        )


def _check_files(key: str, value: Any) -> None:
    paths = [value] if isinstance(value, str) else value
    _require(
        isinstance(paths, list) and paths and all(isinstance(p, str) and p for p in paths),
        f"{key}={value}: give a path or a list of paths",
    )


def _check_betas(section: str, optim: OptimConfig) -> None:
    _require(
        len(optim.betas) == 2 and all(0 <= beta < 1 for beta in optim.betas),
        f"{section}.betas={optim.betas}: give two numbers from 0 to below 1",
    )


def _check_logger(value: Any) -> None:
    names = [value] if isinstance(value, str) else value
    _require(
        isinstance(names, list) and all(name in LOGGERS for name in names),
        f"trainer.logger={value}: choose from {', '.join(LOGGERS)}",
    )


def _check_trainer(trainer: TrainerConfig) -> None:
    _check_logger(trainer.logger)
    _require(
        trainer.default_hdfs_dir is None,
        "trainer.default_hdfs_dir: only null is supported; checkpoints go to "
        "trainer.default_local_dir, which may be a mounted folder",
    )
    _require(
        trainer.resume_mode != "resume_path" or bool(trainer.resume_from_path),
        "trainer.resume_mode=resume_path needs trainer.resume_from_path",
    )


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(message)
