"""The loader: what it accepts, what it rejects, and what it says."""

import ast
import itertools
import logging
import operator
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

import verl.config.load as loader
from verl.algorithms.weights import WEIGHTS, LossAggregation, resolve_aggregation
from verl.config.base import count_gpus
from verl.config.load import ConfigError, compose_config, entry_point, load_config
from verl.config.schema import LOSS_AGG_MODES, WITHOUT_GROUPS

ACTOR = "actor_rollout_ref.actor."
ROLLOUT = "actor_rollout_ref.rollout."
CORRECTION = "algorithm.rollout_correction."
REF = "actor_rollout_ref.ref."


def load(*overrides: str) -> Any:
    return load_config(overrides)


def error_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    return str(caught.value)


def test_the_defaults_run() -> None:
    config = load("data.max_response_length=512")
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert (config.data.train_batch_size, actor.ppo_mini_batch_size, rollout.n) == (32, 32, 8)
    assert config.trainer.logger == ["console"]
    # By a token budget, and log-probabilities likewise.
    assert actor.ppo_micro_batch_size_per_gpu is rollout.log_prob_micro_batch_size_per_gpu is None
    assert actor.use_dynamic_bsz and rollout.log_prob_use_dynamic_bsz
    assert actor.ppo_max_token_len_per_gpu == rollout.log_prob_max_token_len_per_gpu == 16384


@pytest.mark.parametrize(
    ("overrides", "key", "expected"),
    [
        (["data.train_batch_size=48"], f"{ACTOR}ppo_mini_batch_size", 48),
        (["data.train_batch_size=48"], "data.gen_batch_size", 48),
        (["data.gen_batch_size=96", "data.gen_batch_size=null"], "data.gen_batch_size", 32),
        ([f"{ACTOR}ppo_mini_batch_size=null"], f"{ACTOR}ppo_mini_batch_size", 32),
        ([f"{ACTOR}ppo_micro_batch_size_per_gpu=4"], f"{ACTOR}use_dynamic_bsz", False),
        (["data.max_response_length=20000"], f"{ACTOR}ppo_max_token_len_per_gpu", 20512),
        (
            [
                "data.max_response_length=65000",  # and 512 of the prompt: a half for each
                f"{ACTOR}ulysses_sequence_parallel_size=2",
                "trainer.n_gpus_per_node=2",
            ],
            f"{REF}log_prob_max_token_len_per_gpu",
            32756,
        ),
        (
            [f"{ACTOR}ulysses_sequence_parallel_size=2", "trainer.n_gpus_per_node=2"],
            f"{REF}ulysses_sequence_parallel_size",
            2,
        ),
        (
            ["data.max_response_length=20000", f"{ACTOR}ppo_max_token_len_per_gpu=null"],
            f"{ROLLOUT}log_prob_max_token_len_per_gpu",
            20512,
        ),
        (["trainer.default_local_dir=null"], "trainer.default_local_dir", "checkpoints/verl_"),
    ],
)
def test_what_is_null_follows_other_keys(overrides: list[str], key: str, expected: Any) -> None:
    value = OmegaConf.select(compose_config(overrides), key)
    assert value.startswith(expected) if isinstance(expected, str) else value == expected
    assert operator.attrgetter(key)(load(*overrides)) == value


def test_ranks_are_the_gpus_of_this_machine_or_two(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    few = min(2, os.cpu_count() or 1)
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: H100"; echo "  MIG 1g"; done\n')
    smi.chmod(0o755)
    for path, visible, overrides, expected in (
        ("", None, [], few),
        (str(tmp_path), None, [], 4),
        (str(tmp_path), None, ["trainer.rollout_gpus_per_node=1"], 3),
        (str(tmp_path), None, ["trainer.device=cpu"], few),
        (str(tmp_path), None, ["trainer.n_gpus_per_node=7"], 7),
        ("", "3,5,6", [], 3),
        (str(tmp_path), "", [], few),
    ):
        monkeypatch.setenv("PATH", path)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        count_gpus.cache_clear()
        assert load(*overrides).trainer.n_gpus_per_node == expected
    assert load_config([], "sft_trainer").trainer.n_gpus_per_node == few
    count_gpus.cache_clear()


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("data.trian_batch_size", "data.train_batch_size"),
        ("algorithm.grpopp_config.alhpa", "algorithm.grpopp_config.alpha"),
        # The name alone, or in the wrong place.
        ("loss_agg_mode", f"{ACTOR}loss_agg_mode"),
        ("algorithm.loss_agg_mode", f"{ACTOR}loss_agg_mode"),
        # A section is no answer.
        ("trainer.foo", "trainer.nnodes"),
        ("foo.override_config.x", "algorithm.grpopp_config.scope"),
        # The right section, with or without Hydra's plus sign.
        ("+trainer.total_epoch", "trainer.total_epochs"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(key: str, nearest: str) -> None:
    assert (
        error_of(f"{key}=1")
        == f"there is no key {key.lstrip('+')!r}; the nearest one is {nearest!r}"
    )


@pytest.mark.parametrize(
    "override",
    [
        "data.train_batch_size=many",
        "data.train_batch_size=1.5",
        "data.train_batch_size=null",
        "data.shuffle=often",
        f"{ACTOR}optim.betas=0.9",
        f"{ACTOR}optim.lr=fast",
        "algorithm.grpopp_config.alpha=[1]",
    ],
)
def test_a_value_of_the_wrong_type(override: str) -> None:
    assert override.partition("=")[0] in error_of(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.max_prompt_length=0", "data.max_prompt_length=0: must be at least 1"),
        ("algorithm.grpopp_config.alpha=-1", "grpopp_config.alpha=-1.0: must be at least 0"),
        ("algorithm.grpopp_config.alpha=fast", "alpha=fast: give a number, or auto"),
        ("algorithm.grpopp_config.alpha=null", "alpha=null: give a number, or auto"),
        (f"{ROLLOUT}gpu_memory_utilization=1.1", "gpu_memory_utilization=1.1: must be at most 1"),
        (f"{ROLLOUT}val_kwargs.top_p=-0.5", f"{ROLLOUT}val_kwargs.top_p=-0.5: must be more than 0"),
        (f"{ACTOR}loss_agg_mode=mean", f"{ACTOR}loss_agg_mode=mean: choose from token-mean, "),
        (f"{ROLLOUT}name=sglang", "take vllm, or hf on a CPU; choose from hf, vllm"),
        ("algorithm.adv_estimator=gea", "adv_estimator=gea: choose from grpo, "),
        ("trainer.device=tpu", "trainer.device=tpu: choose from "),
    ],
)
def test_a_value_out_of_range(override: str, message: str) -> None:
    assert message in error_of(override)


SCORED = ["reward_model.enable=True", "reward_model.model.path=model"]
GDPO = ["algorithm.adv_estimator=gdpo", "algorithm.gdpo_reward_keys=[correct,format]"]
AHEAD = ["trainer.async_rollout=True", "trainer.rollout_gpus_per_node=1"]
CONTRADICTIONS: dict[str, tuple[list[str], str]] = {
    "actor's use_grpopp": (
        ["algorithm.use_grpopp=True", f"{ACTOR}use_grpopp=False"],
        f"algorithm.use_grpopp=True contradicts {ACTOR}use_grpopp=False",
    ),
    "actor's use_dr_grpo": (
        [f"{ACTOR}use_dr_grpo=True"],
        f"algorithm.use_dr_grpo=False contradicts {ACTOR}use_dr_grpo=True",
    ),
    "actor's alpha": (
        ["algorithm.grpopp_config.alpha=1", f"{ACTOR}grpopp_config.alpha=0.5"],
        f"algorithm.grpopp_config.alpha=1.0 contradicts {ACTOR}grpopp_config.alpha=0.5",
    ),
    "actor's scope": (
        [f"{ACTOR}grpopp_config.scope=mini_batch"],
        f"algorithm.grpopp_config.scope=batch contradicts {ACTOR}grpopp_config.scope=mini_batch",
    ),
    "two methods": (
        ["algorithm.use_grpopp=True", "algorithm.use_dr_grpo=True"],
        "are two methods: turn one of them off",
    ),
    "flag and mode": (
        ["algorithm.use_grpopp=True", f"{ACTOR}loss_agg_mode=seq-mean-token-mean"],
        f"chooses the loss aggregation: drop {ACTOR}loss_agg_mode=seq-mean-token-mean",
    ),
    "token-mean-legacy by tokens": (
        [
            f"{ACTOR}loss_agg_mode=token-mean-legacy",
            f"{ACTOR}ppo_micro_batch_size_per_gpu=null",
            f"{ACTOR}use_dynamic_bsz=True",
        ],
        "token-mean-legacy averages over micro-batches",
    ),
    "mini-batch": (
        ["data.train_batch_size=100", f"{ACTOR}ppo_mini_batch_size=30"],
        f"{ACTOR}ppo_mini_batch_size=30 must divide data.train_batch_size=100",
    ),
    "no micro-batch": (
        [f"{ACTOR}use_dynamic_bsz=False"],
        f"set {ACTOR}ppo_micro_batch_size_per_gpu",
    ),
    "token budget": (
        [f"{ACTOR}use_dynamic_bsz=True", f"{ACTOR}ppo_max_token_len_per_gpu=1023"],
        f"{ACTOR}ppo_max_token_len_per_gpu=1023 can't hold one sequence",
    ),
    "token budget of log-probabilities": (
        [f"{ROLLOUT}log_prob_use_dynamic_bsz=True", f"{ROLLOUT}log_prob_max_token_len_per_gpu=9"],
        f"{ROLLOUT}log_prob_max_token_len_per_gpu=9 can't hold one sequence",
    ),
    "one response": ([f"{ROLLOUT}n=1"], "n must be at least 2"),
    "greedy": ([f"{ROLLOUT}do_sample=False"], "training needs do_sample=True"),
    "temperature 0": ([f"{ROLLOUT}temperature=0"], "temperature > 0"),
    "no reward model": (["reward_model.enable=True"], "needs reward_model.model.path"),
    "two rewards": ([*SCORED, "custom_reward_function.path=a.py"], "are two rewards: drop one"),
    "acc of a reward model": (
        [*SCORED, "algorithm.filter_groups.enable=True", "algorithm.filter_groups.metric=acc"],
        "algorithm.filter_groups.metric=acc: a reward model only gives a score: set it to score",
    ),
    "another tokenizer": (
        [*SCORED, "reward_model.model.input_tokenizer=other"],
        "responses are the policy's: set it to policy",
    ),
    "reward model of strings": (
        [*SCORED, "data.apply_chat_template=False"],
        "a reward model reads chat messages",
    ),
    "reward model without a limit": (
        [*SCORED, "reward_model.use_dynamic_bsz=False"],
        "use_dynamic_bsz=False: set reward_model.micro_batch_size_per_gpu",
    ),
    "reward model's shards": (
        [*SCORED, "reward_model.model.fsdp_config.fsdp_size=3", "trainer.n_gpus_per_node=2"],
        "reward_model.model.fsdp_config.fsdp_size=3 must divide the 2 ranks",
    ),
    "overlong manager": (
        ["reward_model.overlong_buffer.enable=True", "reward_model.overlong_buffer.len=8"],
        "needs reward_model.reward_manager=dapo",
    ),
    "overlong length": (
        [
            "reward_model.reward_manager=dapo",
            "reward_model.overlong_buffer.enable=True",
            "reward_model.overlong_buffer.len=513",
        ],
        "reward_model.overlong_buffer.len=513 must be between 1 and data.max_response_length=512",
    ),
    "filter metric": (
        ["algorithm.filter_groups.enable=True"],
        "needs algorithm.filter_groups.metric",
    ),
    "carry-over after top-k": (
        ["algorithm.filter_groups={enable:True,metric:acc}", f"{ROLLOUT}top_k=50"],
        "top_k=50 change the engines': set algorithm.filter_groups.carry_over=False",
    ),
    "carry-over after top-p": (
        ["algorithm.filter_groups={enable:True,metric:acc}", f"{ROLLOUT}top_p=0.9"],
        "set algorithm.filter_groups.carry_over=False",
    ),
    "importance sampling after top-k": (
        ["algorithm.rollout_correction.rollout_is=token", f"{ROLLOUT}top_k=5"],
        "set algorithm.rollout_correction.rollout_is=null, or top_p=1 and top_k=-1",
    ),
    "rejection after top-k": (
        [
            f"{CORRECTION}rollout_rs=token",
            f"{CORRECTION}rollout_rs_threshold=2",
            f"{ROLLOUT}top_k=5",
        ],
        f"set {CORRECTION}rollout_rs=null, or top_p=1 and top_k=-1",
    ),
    "rejection without bounds": (
        [f"{CORRECTION}rollout_rs=geometric"],
        f"{CORRECTION}rollout_rs=geometric needs {CORRECTION}rollout_rs_threshold",
    ),
    "no such rejection": (
        [f"{CORRECTION}rollout_rs=seq_max_k1", f"{CORRECTION}rollout_rs_threshold=2"],
        f"{CORRECTION}rollout_rs=seq_max_k1: choose from geometric, seq_max_k2, ",
    ),
    "bounds of a divergence": (
        [f"{CORRECTION}rollout_rs=token_k3", f"{CORRECTION}rollout_rs_threshold=0.5_2"],
        f"{CORRECTION}rollout_rs_threshold=0.5_2: '0.5_2' must be a positive number",
    ),
    "bounds the wrong way round": (
        [f"{CORRECTION}rollout_rs=token", f"{CORRECTION}rollout_rs_threshold=2_0.5"],
        "'2_0.5' must be lower_upper, two positive numbers, or the upper alone",
    ),
    "two lower bounds": (
        [
            f"{CORRECTION}rollout_rs=token",
            f"{CORRECTION}rollout_rs_threshold=0.5_2",
            f"{CORRECTION}rollout_rs_threshold_lower=0.4",
        ],
        "'0.5_2' must be lower_upper",
    ),
    "bounds for three of two": (
        [f"{CORRECTION}rollout_rs='token,geometric'", f"{CORRECTION}rollout_rs_threshold='2,3,4'"],
        f"give one, or one for each of {CORRECTION}rollout_rs=token,geometric",
    ),
    "an estimator of verl's": (
        ["algorithm.adv_estimator=optimal_token_baseline"],
        "algorithm.adv_estimator=optimal_token_baseline is known in verl, but not supported here: "
        "its baseline differs from token to token; opo has one for a response; choose from grpo, ",
    ),
    "gdpo without rewards": (
        ["algorithm.adv_estimator=gdpo"],
        "algorithm.adv_estimator=gdpo needs algorithm.gdpo_reward_keys",
    ),
    "gdpo's weights": (
        [*GDPO, "algorithm.gdpo_reward_weights=[1]"],
        "algorithm.gdpo_reward_weights=[1.0]: give one number for each of algorithm.gdpo_reward_k",
    ),
    "gdpo and KL": (
        [*GDPO, "algorithm.use_kl_in_reward=True"],
        f"takes no KL term in its rewards: set {ACTOR}use_kl_loss=True",
    ),
    "gdpo and a reward model": ([*GDPO, *SCORED], "a reward model gives a score alone"),
    "gdpo and the overlong punishment": (
        [*GDPO, "reward_model={reward_manager:dapo,overlong_buffer:{enable:True,len:8}}"],
        "add overlong_reward to algorithm.gdpo_reward_keys",
    ),
    "groups of one": (
        [f"{ROLLOUT}n=1"],
        "so n must be at least 2, or algorithm.adv_estimator one of reinforce_plus_plus, remax",
    ),
    "a filter of groups of one": (
        [
            f"{ROLLOUT}n=1",
            "algorithm.adv_estimator=remax",
            "algorithm.filter_groups={enable:True,metric:acc}",
        ],
        f"compares a prompt's responses: set {ROLLOUT}n to 2 or more",
    ),
    "an exponent below 0": (
        ["algorithm.use_grpopp=True", "algorithm.grpopp_config.alpha=-1"],
        "algorithm.grpopp_config.alpha=-1.0: must be at least 0, but for lambda-grpo",
    ),
    "an exponent that is measured, of another aggregation": (
        [f"{ACTOR}loss_agg_mode=lambda-grpo", "algorithm.grpopp_config.alpha=auto"],
        f"alpha=auto is for ∆L alone: give {ACTOR}loss_agg_mode=lambda-grpo a number",
    ),
    "the other flag's mode": (
        ["algorithm.use_grpopp=True", f"{ACTOR}loss_agg_mode=dr-grpo"],
        f"chooses the loss aggregation: drop {ACTOR}loss_agg_mode=dr-grpo",
    ),
    "standard deviation of what": (
        ["algorithm.norm_adv_by_std_in_grpo=all"],
        "algorithm.norm_adv_by_std_in_grpo=all: choose from True, False, batch",
    ),
    "ahead without engines of their own": (
        ["trainer.async_rollout=True"],
        "set trainer.rollout_gpus_per_node",
    ),
    "ahead and carry-over": (
        [*AHEAD, "algorithm.filter_groups={enable:True,metric:acc}"],
        "would be too old; set algorithm.filter_groups.carry_over=False",
    ),
    "one step ahead and in flight": (
        [*AHEAD, "trainer.max_policy_age=1"],
        "trainer.async_rollout=True is one way and trainer.max_policy_age=1 another",
    ),
    "in flight and top-p": (
        ["trainer.max_policy_age=1", f"{ROLLOUT}top_p=0.9"],
        "set trainer.max_policy_age=0, or top_p=1 and top_k=-1",
    ),
    "in flight and steps that draw too little": (
        [
            "trainer.max_policy_age=1",
            "algorithm.filter_groups={enable:True,metric:acc,max_num_gen_batches:1}",
            "data.train_batch_size=64",
            "data.gen_batch_size=32",
        ],
        "raise algorithm.filter_groups.max_num_gen_batches=1 or data.gen_batch_size=32",
    ),
    "decoupled without a factor": (
        ["algorithm.rollout_correction.decoupled=True"],
        "corrects by algorithm.rollout_correction.rollout_is: set it to token",
    ),
    "weights of hf by nccl": (
        [f"{ROLLOUT}weight_transfer=nccl", "trainer.rollout_gpus_per_node=1"],
        f"{ROLLOUT}weight_transfer=nccl is for rollout.name=vllm",
    ),
    "ipc between GPUs": (
        [*AHEAD, f"{ROLLOUT}name=vllm", f"{ROLLOUT}weight_transfer=ipc"],
        f"{ROLLOUT}weight_transfer=ipc: take ipc without trainer.rollout_gpus_per_node, nccl with",
    ),
    "nccl on one GPU": (
        [f"{ROLLOUT}name=vllm", f"{ROLLOUT}weight_transfer=nccl"],
        f"{ROLLOUT}weight_transfer=nccl: take ipc without trainer.rollout_gpus_per_node, nccl",
    ),
    "engines over three of eight GPUs": (
        [
            f"{ROLLOUT}name=vllm",
            f"{ROLLOUT}tensor_model_parallel_size=3",
            "trainer.n_gpus_per_node=8",
        ],
        f"{ROLLOUT}tensor_model_parallel_size=3 must divide the 8 devices",
    ),
    "engines over two of three machines": (
        [
            f"{ROLLOUT}name=vllm",
            f"{ROLLOUT}tensor_model_parallel_size=16",
            "trainer.n_gpus_per_node=8",
            "trainer.nnodes=3",
        ],
        f"{ROLLOUT}tensor_model_parallel_size=16 must divide the 8 devices for engines of a "
        "machine, or be all of several of the trainer.nnodes=3",
    ),
    "sequences over three of eight ranks": (
        [f"{ACTOR}ulysses_sequence_parallel_size=3", "trainer.n_gpus_per_node=8"],
        f"{ACTOR}ulysses_sequence_parallel_size=3 must divide the 8 ranks",
    ),
    "padded sequences over ranks": (
        [
            f"{REF}ulysses_sequence_parallel_size=2",
            "actor_rollout_ref.model.use_remove_padding=False",
            "trainer.n_gpus_per_node=2",
        ],
        f"{REF}ulysses_sequence_parallel_size=2 splits packed sequences: set "
        "actor_rollout_ref.model.use_remove_padding=True",
    ),
    "a reference that splits less": (
        [
            f"{ACTOR}ulysses_sequence_parallel_size=4",
            f"{REF}ulysses_sequence_parallel_size=2",
            f"{ACTOR}ppo_max_token_len_per_gpu=3000",
            "data.max_prompt_length=1000",
            "data.max_response_length=8000",
            "trainer.n_gpus_per_node=4",
        ],
        f"{REF}log_prob_max_token_len_per_gpu=3000 can't hold one sequence of 9000 tokens",
    ),
    "prompts in one piece": (
        [
            f"{ROLLOUT}name=vllm",
            f"{ROLLOUT}enable_chunked_prefill=False",
            "data.max_prompt_length=1000",
            "data.max_response_length=8000",
        ],
        f"{ROLLOUT}max_num_batched_tokens=8192 can't hold one sequence of 9000 tokens",
    ),
    "fewer tokens than sequences": (
        [f"{ROLLOUT}name=vllm", f"{ROLLOUT}max_num_batched_tokens=1000"],
        f"{ROLLOUT}max_num_batched_tokens=1000 is less than max_num_seqs",
    ),
    "vLLM's own name of a key": (
        [f"{ROLLOUT}name=vllm", f"{ROLLOUT}engine_kwargs.vllm.max_model_len=9"],
        f"{ROLLOUT}engine_kwargs.vllm.max_model_len is set by other keys",
    ),
    "betas": ([f"{ACTOR}optim.betas=[0.9,1.0]"], "betas=[0.9, 1.0]: give two numbers"),
    "files": (["data.train_files=null"], "data.train_files=None: give a path"),
    "validation files": (
        ["data.val_files=null"],
        "data.val_files=None: give a path or a list of paths, or set "
        "trainer.val_before_train=False "
        "and trainer.test_freq=-1",
    ),
    "its own model": (
        ["trainer.default_local_dir=a/b", "actor_rollout_ref.model.path=a/x/../b/huggingface/"],
        "actor_rollout_ref.model.path=a/x/../b/huggingface/ is where the run writes its model",
    ),
    "metric": (
        [
            "algorithm.use_kl_in_reward=True",
            "algorithm.filter_groups={enable:True,metric:seq_final_reward}",
        ],
        "take seq_reward",
    ),
    "no names of layers": (
        ["actor_rollout_ref.model.target_modules=[]"],
        "actor_rollout_ref.model.target_modules=[]: give names of layers as a list",
    ),
    "no logger": (["trainer.logger=3"], "trainer.logger=3: choose from console"),
    "logger": (
        ["trainer.logger=[console,neptune]"],
        "'neptune']: choose from console, wandb, tensorboard, file, mlflow",
    ),
    "no policy": (
        [f"{ACTOR}checkpoint.save_contents=[optimizer]"],
        "must share a policy: model or hf_model",
    ),
    "contents": ([f"{ACTOR}checkpoint.load_contents=[weights]"], "choose from model, optimizer"),
    "resume path": (["trainer.resume_mode=resume_path"], "needs trainer.resume_from_path"),
}


@pytest.mark.parametrize(
    ("key", "written", "meant"),
    [
        (f"{ACTOR}fsdp_config.mixed_precision.param_dtype", "fp32", "float32"),
        (f"{ACTOR}fsdp_config.mixed_precision.reduce_dtype", "fp16", "float16"),
        (f"{ACTOR}fsdp_config.model_dtype", "bf16", "bfloat16"),
        ("actor_rollout_ref.ref.fsdp_config.model_dtype", "bf16", "bfloat16"),
        (f"{ROLLOUT}dtype", "half", "float16"),
        ("trainer.hf_model_dtype", "float", "float32"),
    ],
)
def test_types_have_short_names(key: str, written: str, meant: str) -> None:
    assert operator.attrgetter(key)(load(f"{key}={written}")) == meant
    assert load(f"{key}={written}") == load(f"{key}={meant}")


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictory_keys(name: str) -> None:
    overrides, message = CONTRADICTIONS[name]
    assert message in error_of(*overrides)


def test_an_evaluation_needs_only_what_it_uses() -> None:
    overrides = [
        "data.train_files=null",
        "data.train_batch_size=7",
        "actor_rollout_ref.actor.ppo_mini_batch_size=3",
        f"{ROLLOUT}n=1",
        f"{ROLLOUT}do_sample=False",
        "trainer.default_local_dir=run",
        "actor_rollout_ref.model.path=run/huggingface",
    ]
    with pytest.raises(ConfigError) as error:
        load_config(overrides)
    assert len(str(error.value).splitlines()) == 5
    assert load_config([*overrides, "trainer.val_only=True"]).trainer.val_only
    with pytest.raises(ConfigError, match=r"data\.val_files"):
        load_config([*overrides, "trainer.val_only=True", "data.val_files=null"])


@pytest.mark.parametrize("rule", ["{enable:True,metric:acc,carry_over:False}", "{enable:False}"])
def test_top_k_and_top_p_are_for_runs_that_carry_nothing_over(rule: str) -> None:
    load(f"algorithm.filter_groups={rule}", f"{ROLLOUT}top_k=50", f"{ROLLOUT}top_p=0.9")
    load("algorithm.filter_groups={enable:True,metric:acc}", f"{ROLLOUT}top_k=0")


def test_all_errors_come_together() -> None:
    lines = error_of(
        "data.trian_batch_size=64",
        "data.max_lenght=1",
        "data={sed:1}",
        f"{ACTOR}optim.lr=fast",
        "data.seed=x",
        "trainer.nnodes=0",
        "data.shuffle",
        "algorithm.use_grpopp=True",
        "algorithm.use_dr_grpo=True",
        f"{ACTOR}ppo_mini_batch_size=24",  # of the batch size that was meant, maybe
    ).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "there is no key 'data.trian_batch_size'; the nearest one is 'data.train_batch_size'",
        "there is no key 'data.max_lenght'; the nearest one is 'data.max_prompt_length'",
        "'data.shuffle' is not an override",
        "there is no key 'data.sed'; the nearest one is 'data.seed'",
        f"{ACTOR}optim.lr",
        "data.seed",
        "trainer.nnodes=0",
        "algorithm.use_grpopp and algorithm.use_dr_grpo are two methods",
    ]


NOTHING_TO_LEARN = {
    "data.": [],
    ACTOR: ["optim.lr=0", "grad_clip=0", "clip_ratio=0", "clip_ratio_high=0", "clip_ratio_c=1"],
    ROLLOUT: ["val_kwargs.top_p=0"],
    "algorithm.": ["grpopp_config.alpha=1000", "kl_ctrl.target_kl=0"],
}


@pytest.mark.parametrize("text", [p + x for p, texts in NOTHING_TO_LEARN.items() for x in texts])
def test_values_with_which_nothing_would_be_learned_are_refused(text: str) -> None:
    assert error_of(text).startswith(f"{text}.0: must be ")


NUMBERS = [
    (name, key)
    for name in ("ppo_trainer", "sft_trainer")
    for key, value, _ in loader.load_config((), name).walk()
    if isinstance(value, float) and ".actor.grpopp_config." not in key  # a copy
]


@pytest.mark.parametrize(("name", "key"), NUMBERS)
def test_every_number_is_finite(name: str, key: str) -> None:
    given = ["algorithm.adv_estimator=gae"] if key.startswith("critic.") else []
    for value in ("inf", "-inf", "nan"):
        with pytest.raises(ConfigError, match=re.escape(f"{key}={value}: must be ")):
            loader.load_config([*given, f"{key}={value}"], name)


def test_keys_of_verl_without_effect_take_any_value() -> None:
    for value in ("0", "1e-6", "null", "fast"):
        assert load(f"trainer.default_hdfs_dir={value}") == load()
    assert load("critic.optim.lr=0").critic.optim.lr == 0  # no critic: it needn't be possible


def test_every_condition_of_a_key_names_other_keys() -> None:
    """`holds` asserts that a key has that end."""
    for config in load(), load_config([], "sft_trainer"):
        for key, _, rules in config.walk():
            resume, *conditions = rules.on_resume.split(" unless ")
            assert resume in ("", "error", "warn", "free", "validation"), key
            for condition in (*rules.idle_if, *conditions):
                config.holds(condition)


def test_something_that_is_no_override() -> None:
    assert "is not an override: write key=value" in error_of("data.train_batch_size")


def test_the_configuration_is_read_only() -> None:
    config = load()
    for section, name in (
        (config, "data"),
        (config.data, "train_batch_size"),
        (config.actor_rollout_ref.actor.optim, "lr"),
    ):
        with pytest.raises(AttributeError, match=f"read-only after start: {name}"):
            setattr(section, name, 1)


def test_the_actors_copies_follow_the_algorithm() -> None:
    config = load(
        "algorithm.use_grpopp=True", "algorithm.grpopp_config={alpha:0.5,scope:mini_batch}"
    )
    actor = config.actor_rollout_ref.actor
    assert actor.use_grpopp and not actor.use_dr_grpo
    assert (actor.grpopp_config.alpha, actor.grpopp_config.scope) == (0.5, "mini_batch")
    assert load("algorithm.use_dr_grpo=True").actor_rollout_ref.actor.use_dr_grpo


def test_both_copies_may_be_set_alike() -> None:
    """As the published scripts do."""
    keys = ("use_grpopp=True", "grpopp_config.alpha=0.5")
    both = load(*(prefix + key for prefix in ("algorithm.", ACTOR) for key in keys))
    assert both == load(*(f"algorithm.{key}" for key in keys))


def test_sizes_follow_one_another() -> None:
    config = load(
        "data.train_batch_size=512",
        f"{ACTOR}use_dynamic_bsz=True",
        f"{ACTOR}ppo_max_token_len_per_gpu=2048",
    )
    rollout = config.actor_rollout_ref.rollout
    assert config.data.gen_batch_size == 512
    assert load("data.gen_batch_size=2048").data.gen_batch_size == 2048
    assert (rollout.log_prob_use_dynamic_bsz, rollout.log_prob_max_token_len_per_gpu) == (
        True,
        2048,
    )


def test_keys_without_effect_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, loader.__name__):
        load("critic.optim.lr=1e-6", f"{ACTOR}kl_loss_coef=0.0", "data.train_batch_size=512")
    (message,) = caplog.messages
    assert message.count("critic.optim.lr (adv_estimator!=gae)") == 1
    assert message.count(f"{ACTOR}kl_loss_coef (use_kl_loss=False)") == 1
    assert "train_batch_size" not in message


@pytest.mark.parametrize("flag", ["use_grpopp", "use_dr_grpo"])
def test_a_mode_beside_the_flag_that_chooses_one(
    flag: str, caplog: pytest.LogCaptureFixture
) -> None:
    load(f"algorithm.{flag}=True", f"{ACTOR}loss_agg_mode=token-mean")
    assert f"{ACTOR}loss_agg_mode (actor.{flag}=True)" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["algorithm.grpopp_config.alpha=1"], "algorithm.grpopp_config.alpha"),
        (["algorithm.grpopp_config.alpha=auto"], "algorithm.grpopp_config.alpha"),
        (["algorithm.kl_ctrl.kl_coef=0.1"], "algorithm.kl_ctrl.kl_coef"),
        (["actor_rollout_ref.ref.fsdp_config.param_offload=True"], "actor_rollout_ref.ref."),
        (["reward_model.overlong_buffer.len=8"], "reward_model.overlong_buffer.len"),
        (["data.gen_batch_size=2048"], "data.gen_batch_size"),
        ([f"{ROLLOUT}gpu_memory_utilization=0.8"], "gpu_memory_utilization"),
        (["trainer.logger=console", "trainer.log_val_generations=4"], "log_val_generations"),
    ],
)
def test_when_a_key_has_no_effect(
    overrides: list[str], key: str, caplog: pytest.LogCaptureFixture
) -> None:
    load(*overrides)
    assert key in caplog.text
    caplog.clear()
    load(
        *overrides,
        f"{ACTOR}use_kl_loss=True",
        "algorithm.use_kl_in_reward=True",
        "algorithm.use_grpopp=True",
        "algorithm.filter_groups={enable:True,metric:acc}",
        "reward_model={reward_manager:dapo,overlong_buffer:{enable:True,len:8}}",
        f"{ROLLOUT}name=vllm",
        "trainer.logger=[console,tensorboard]",
    )
    assert key not in caplog.text


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], LossAggregation("token-mean", 512, alpha=0.75)),
        (
            [f"{ACTOR}loss_agg_mode=seq-mean-token-mean"],
            LossAggregation("seq-mean-token-mean", 512, alpha=0.75),
        ),
        (
            [f"{ACTOR}loss_agg_mode=seq-mean-token-sum"],
            LossAggregation("seq-mean-token-sum", 512, alpha=0.75),
        ),
        (
            [f"{ACTOR}loss_agg_mode=seq-mean-token-sum-norm", "data.max_response_length=99"],
            LossAggregation("seq-mean-token-sum-norm", 99, alpha=0.75),
        ),
        (
            [f"{ACTOR}loss_agg_mode=token-mean-legacy", f"{ACTOR}ppo_micro_batch_size_per_gpu=4"],
            LossAggregation("token-mean-legacy", 512, group_size=4, alpha=0.75),
        ),
        (
            ["algorithm.use_dr_grpo=True"],
            LossAggregation("dr-grpo", 512, norm_by_std=False, alpha=0.75),
        ),
        (["algorithm.use_grpopp=True"], LossAggregation("delta-l", 512, alpha=0.75)),
        (
            ["algorithm.use_grpopp=True", "algorithm.grpopp_config.alpha=auto"],
            LossAggregation("delta-l", 512, alpha=0.75, auto=True),
        ),
        (["algorithm.grpopp_config.alpha=auto"], LossAggregation("token-mean", 512, alpha=0.75)),
        (
            [f"{ACTOR}loss_agg_mode=delta-l", "algorithm.grpopp_config.alpha=1"],
            LossAggregation("delta-l", 512, alpha=1.0),
        ),
        (
            ["algorithm.use_grpopp=True", f"{ACTOR}loss_agg_mode=delta-l"],
            LossAggregation("delta-l", 512, alpha=0.75),
        ),
        ([f"{ACTOR}loss_agg_mode=dr-grpo"], LossAggregation("dr-grpo", 512, alpha=0.75)),
        (
            [f"{ACTOR}loss_agg_mode=lambda-grpo", "algorithm.grpopp_config.alpha=-1"],
            LossAggregation("lambda-grpo", 512, alpha=-1.0),
        ),
        (
            ["algorithm.use_grpopp=True", "algorithm.grpopp_config={alpha:0,scope:mini_batch}"],
            LossAggregation("delta-l", 512, alpha=0.0, scope="mini_batch"),
        ),
        (
            ["algorithm.norm_adv_by_std_in_grpo=batch", f"{ACTOR}regularizer_agg_mode=token-mean"],
            LossAggregation(
                "token-mean", 512, norm_by_std="batch", alpha=0.75, regularizer_mode="token-mean"
            ),
        ),
        (
            ["algorithm.norm_adv_by_std_in_grpo=False"],
            LossAggregation("token-mean", 512, norm_by_std=False, alpha=0.75),
        ),
    ],
)
def test_the_flags_become_one_aggregation(overrides: list[str], expected: LossAggregation) -> None:
    assert resolve_aggregation(load(*overrides)) == expected


def test_numbers_in_text_stay_as_they_are_written() -> None:
    """YAML reads 0.5_2 as 0.52, and 2026_01_02 as 20260102."""
    bounds = [f"{CORRECTION}rollout_rs=token", f"{CORRECTION}rollout_rs_threshold=0.5_2"]
    config = load(*bounds, "+trainer.experiment_name=2026_01_02", "data.train_batch_size=1_024")
    assert config.algorithm.rollout_correction.rollout_rs_threshold == "0.5_2"
    assert config.trainer.experiment_name == "2026_01_02"
    assert config.data.train_batch_size == 1024


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_keys_that_exist_may_be_added(plus: str) -> None:
    assert load(f"{plus}data.seed=3").data.seed == 3


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_keys_of_the_model_are_free(plus: str) -> None:
    config = load(
        f"{plus}actor_rollout_ref.model.override_config.x=1",
        f"{plus}actor_rollout_ref.model.override_config.rope.theta=1e4",
    )
    assert config.actor_rollout_ref.model.override_config == {"x": 1, "rope": {"theta": 1e4}}


def test_lists() -> None:
    config = load(
        "trainer.logger=['console','wandb']",
        'data.val_files=["a b.parquet","c.parquet"]',
        f"{ACTOR}optim.betas=[0.9,0.95]",
    )
    assert config.trainer.logger == ["console", "wandb"]
    assert config.data.val_files == ["a b.parquet", "c.parquet"]
    assert config.actor_rollout_ref.actor.optim.betas == [0.9, 0.95]
    assert load("trainer.logger=console").trainer.logger == "console"


def test_the_warm_up_has_a_schema_of_its_own() -> None:
    config = load_config(["data.train_files=x.parquet"], "sft_trainer")
    assert (config.optim.lr, config.trainer.logger) == (1e-5, ["console"])
    with pytest.raises(ConfigError, match=r"nearest one is 'data\.max_length'"):
        load_config(["data.max_lenght=3"], "sft_trainer")
    with pytest.raises(ConfigError, match=r"data\.max_length=0: must be at least 1"):
        load_config(["data.max_length=0"], "sft_trainer")
    with pytest.raises(ConfigError, match=r"no key 'trainer\.save_freq'"):
        load_config(["trainer.save_freq=1"], "sft_trainer")
    with pytest.raises(ConfigError, match=r"optim\.betas=\[0\.9\]: give two numbers"):
        load_config(["optim.betas=[0.9]"], "sft_trainer")


@pytest.mark.parametrize("estimator", WITHOUT_GROUPS)
def test_one_response_each_is_enough_without_groups(estimator: str) -> None:
    assert load(f"algorithm.adv_estimator={estimator}", f"{ROLLOUT}n=1")


def test_every_aggregation_can_be_chosen() -> None:
    assert set(LOSS_AGG_MODES) == WEIGHTS.keys()


def test_a_yaml_file_of_ones_own(tmp_path: Path) -> None:
    text = "defaults: [schema, _self_]\ndata: {train_batch_size: 8}\n"
    (tmp_path / "mine.yaml").write_text(text)
    config = load_config(["data.gen_batch_size=null"], "mine", tmp_path)
    assert (config.data.train_batch_size, config.data.gen_batch_size) == (8, 8)
    (tmp_path / "mine.yaml").write_text(text.replace("train_batch_size", "foo"))
    with pytest.raises(ConfigError, match=r"In .mine.: .* Key .foo. not in .DataConfig."):
        compose_config([], "mine", tmp_path)


def test_entry_point(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    started: list[Any] = []

    def run(*overrides: str) -> None:
        monkeypatch.setattr(sys, "argv", ["main_ppo", *overrides])
        entry_point(started.append, "ppo_trainer")

    run()
    assert started[0].actor_rollout_ref.rollout.n == 8
    assert capsys.readouterr().out == ""

    monkeypatch.setenv("DRY_RUN", "1")
    run("data.train_batch_size=512")
    output = capsys.readouterr()
    printed = yaml.safe_load(output.out)
    assert "memory estimate" in output.err
    assert printed["data"]["gen_batch_size"] == 512
    monkeypatch.setenv("DRY_RUN", "quiet")
    run()
    output = capsys.readouterr()
    assert "memory estimate" not in output.err and "data:" in output.out
    with pytest.raises(SystemExit) as exit_:
        run("data.n=1")
    assert exit_.value.code == 2 and len(started) == 1
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("error: there is no key 'data.n'")
    with pytest.raises(SystemExit):
        run("data.n=1", "trainer.nnodes=0")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)


SECTIONS = (
    "schema.py",
    "base.py",
    "critic.py",
    "rewards.py",
    "rollout.py",
    "rollout_correction.py",
)


@pytest.mark.parametrize("name", SECTIONS)
def test_every_key_is_documented(name: str) -> None:
    """A string follows each field that isn't a section; a section has its docstring."""
    folder = Path(loader.__file__).parent
    texts = [(folder / file).read_text() for file in (name, *SECTIONS)]
    classes, *others = (
        [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)] for text in texts
    )
    sections = {c.name for c in itertools.chain(*others)}
    missing = [c.name for c in classes if not ast.get_docstring(c)]
    for cls in [c for c in classes if c.bases and ast.unparse(c.bases[0]) != "NamedTuple"]:
        for node, following in zip(cls.body, [*cls.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) not in sections:
                text = getattr(getattr(following, "value", None), "value", None)
                if not (isinstance(text, str) and text.strip()):
                    missing.append(f"{cls.name}.{ast.unparse(node.target)}")
    assert classes and not missing


def test_vllm_takes_arguments_of_its_own() -> None:
    config = load(f"{ROLLOUT}name=vllm", f"{ROLLOUT}engine_kwargs.vllm.block_size=16")
    assert config.actor_rollout_ref.rollout.engine_kwargs.vllm == {"block_size": 16}
