"""What verl's own scripts ask for: accepted, or refused by one message that names all of it.

`data/verl_scripts.jsonl` holds the overrides of the example scripts and DAPO recipes for text with
FSDP in verl's repository (github.com/volcengine/verl, Apache 2.0), at v0.4.1, v0.7.0 and commit
b178a3c, as their shell hands them over with HOME=/home/user.
"""

import json
import logging
import re
from collections import Counter
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT
from verl.config.load import ConfigError, compose_config, load_config
from verl.config.schema import Config
from verl.config.verl_keys import (
    NOT_SUPPORTED,
    OF_ALL_RANKS,
    SAME_AS,
    WITHOUT_EFFECT,
    refusal,
    without_effect,
)

LINES = (Path(__file__).parent / "data" / "verl_scripts.jsonl").read_text().splitlines()
SCRIPTS = [json.loads(line) for line in LINES]
SOURCES = {
    "verl.trainer.main_ppo": (),
    "recipe.dapo.main_dapo": ("dapo_trainer", ROOT / "recipe/dapo/config"),
}
KNOWN = {key: value for key, value, _ in Config().walk()}
VALUES: dict[str, tuple[Any, Any]] = {  # two that are not the default
    "actor_rollout_ref.actor.checkpoint.save_contents": (["model"], ["hf_model"]),
    "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype": ("float32", "bfloat16"),
    "actor_rollout_ref.actor.grad_clip": (0.5, 2.0),
    "actor_rollout_ref.actor.optim.eps": (1e-5, 1e-6),
    "actor_rollout_ref.actor.optim.warmup_style": ("cosine", "linear"),
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size": (2, 1),
    "actor_rollout_ref.model.lora_adapter_path": ("a", "b"),
    "actor_rollout_ref.model.lora_alpha": (32, 8),
    "actor_rollout_ref.model.lora_rank": (8, 4),
    "actor_rollout_ref.model.use_remove_padding": (False, True),
    "actor_rollout_ref.ref.ulysses_sequence_parallel_size": (2, 1),
    "algorithm.bypass_old_log_prob": (True, False),
    "actor_rollout_ref.ref.fsdp_config.mixed_precision.param_dtype": ("float32", "bfloat16"),
    "critic.grad_clip": (0.5, 2.0),
    "critic.model.fsdp_config.mixed_precision.param_dtype": ("float32", "bfloat16"),
    "critic.optim.eps": (1e-5, 1e-6),
    "critic.optim.warmup_style": ("cosine", "linear"),
    "critic.ulysses_sequence_parallel_size": (2, 1),
    "custom_reward_function.name": ("f", "g"),
    "custom_reward_function.path": ("a.py", "b.py"),
    "custom_reward_function.reward_kwargs": ({"x": 1}, {"x": 2}),
    "data.max_prompt_length": (77, 78),
    "data.max_response_length": (99, 98),
    "data.tokenizer": ("a", "b"),
    "ray_init.num_cpus": (5, 6),
    "reward_model.enable": (False, True),
    "reward_model.model.path": ("a", "b"),
    "ray_init.runtime_env": ({"env_vars": {"A": "b"}}, {"env_vars": {}}),
    "reward_model.num_workers": (3, 4),
    "reward_model.overlong_buffer.enable": (False, True),
    "reward_model.overlong_buffer.len": (7, 8),
    "reward_model.overlong_buffer.log": (True, False),
    "reward_model.overlong_buffer.penalty_factor": (0.5, 2.0),
    "reward_model.reward_manager": ("dapo", "naive"),
}


def problems(script: dict[str, Any]) -> list[str]:
    try:
        compose_config(script["overrides"], *SOURCES[script["program"]])
    except ConfigError as error:
        return str(error).splitlines()
    return []


def test_all_that_verls_scripts_ask_for_is_accepted_or_known() -> None:
    """No key is called unknown; each refusal says what to use."""
    accepted = Counter[str]()
    for script in SCRIPTS:
        lines = problems(script)
        for name in script["scripts"]:
            accepted[name.partition(" ")[0]] += not lines
        assert not [line for line in lines if "there is no key" in line], script["scripts"]
    assert accepted >= Counter({"b178a3c": 44, "v0.7.0": 58, "v0.4.1": 38})


@pytest.mark.parametrize(("name", "key"), SAME_AS.items())
def test_another_name_is_the_same_key(name: str, key: str) -> None:
    assert name not in KNOWN and key in KNOWN
    new, other = VALUES[key]
    text = json.dumps(new).replace('"', "") if isinstance(new, dict) else new
    ranks = "trainer.n_gpus_per_node=2"
    config = load_config([f"{name}={text}", ranks])
    assert attrgetter(key)(config) == new
    config = load_config([f"{key}={text}", f"++{name}={text}", ranks])
    assert attrgetter(key)(config) == new
    text_2 = json.dumps(other).replace('"', "") if isinstance(other, dict) else other
    with pytest.raises(ConfigError, match=f"{re.escape(name)}=.* contradicts {re.escape(key)}="):
        compose_config([f"{key}={text}", f"{name}={text_2}"])


def test_what_stands_below_another_name_is_passed_on() -> None:
    names = "+ray_kwargs.ray_init.runtime_env.env_vars", "+reward.custom_reward_function"
    config = load_config([f"{names[0]}.NCCL_DEBUG=WARN", f"{names[1]}.reward_kwargs.bonus=2"])
    assert config.ray_init.runtime_env == {"env_vars": {"NCCL_DEBUG": "WARN"}}
    assert config.custom_reward_function.reward_kwargs == {"bonus": 2}
    with pytest.raises(ConfigError, match=r"ray_init.num_gpus is known .* variable RAY_ADDRESS"):
        compose_config(["+ray_kwargs.ray_init.num_gpus=8"])


@pytest.mark.parametrize(("name", "key"), OF_ALL_RANKS.items())
def test_a_count_of_all_ranks_is_shared_out(
    name: str, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        config = load_config([f"{name}=128", "trainer.n_gpus_per_node=4", "trainer.nnodes=2"])
    assert attrgetter(key)(config) == 16
    assert f"{key}=16: 128 of all 8 ranks" in caplog.text
    assert attrgetter(key)(load_config([f"{name}=null"])) is None
    split = "actor_rollout_ref.actor.ulysses_sequence_parallel_size=4"  # two groups of ranks
    config = load_config([f"{name}=128", split, "trainer.n_gpus_per_node=8"])
    assert attrgetter(key)(config) == (16 if key.startswith("reward_model.") else 64)


def test_no_name_stands_twice_and_none_is_a_key_here() -> None:
    names = Counter([*SAME_AS, *OF_ALL_RANKS, *{n.partition("=")[0] for n in WITHOUT_EFFECT}])
    assert set(names.values()) == {1}
    untrained = "actor_rollout_ref.ref", "reward_model.model"
    idle = "optimizer_offload", "mixed_precision.reduce_dtype"
    expected = {f"{model}.fsdp_config.{key}" for model in untrained for key in idle}
    assert names.keys() & KNOWN.keys() == expected
    assert {*OF_ALL_RANKS.values()} <= KNOWN.keys()
    only_with_a_value = {n.partition("=")[0] for n in WITHOUT_EFFECT if "=" in n}
    assert not NOT_SUPPORTED.keys() & (names.keys() - only_with_a_value)


def test_keys_without_effect_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    given = [
        "data.return_raw_chat=True",
        "+actor_rollout_ref.rollout.mode=async",
        "algorithm.lam=1.0",
        "actor_rollout_ref.ref.fsdp_config.optimizer_offload=False",
        "reward_model.model.fsdp_config.mixed_precision.reduce_dtype=float32",
    ]
    with caplog.at_level(logging.WARNING):
        assert load_config(given) == load_config()
    for key in [text.strip("+").partition("=")[0] for text in given]:
        assert caplog.text.count(key) == 1


def test_all_that_is_refused_stands_in_one_message() -> None:
    given = ["actor_rollout_ref.model.mtp.enable=True", "data.trian_files=x", "data.sampler.x=1"]
    with pytest.raises(ConfigError) as refused:
        compose_config([*given, "critic.model.use_shm=x", " ", "transfer_queue.enable=False"])
    mtp, typo, sampler = str(refused.value).splitlines()
    precision = "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype"
    with pytest.raises(ConfigError) as values:
        compose_config(["trainer.device=npu", f"{precision}=fp16"])
    float16, npu = str(values.value).splitlines()
    assert npu == (
        "trainer.device=npu is known in verl, but not supported here: only GPUs of CUDA, or CPUs; "
        "choose from cuda, cpu"
    )
    assert float16.startswith(f"{precision}=float16 is known in verl") and "bfloat16" in float16
    assert mtp.startswith("actor_rollout_ref.model.mtp.enable is known in verl, but not supported")
    assert typo == "there is no key 'data.trian_files'; the nearest one is 'data.train_files'"
    assert sampler.startswith("data.sampler.x is known in verl, but not supported here: ")


def test_keys_of_the_schema_are_never_said_to_have_no_effect(
    caplog: pytest.LogCaptureFixture,
) -> None:
    actor = "actor_rollout_ref.actor"
    with caplog.at_level(logging.WARNING):
        config = load_config(
            [
                f"{actor}.optim.weight_decay=0",
                f"{actor}.fsdp_config.reshard_after_forward=False",
                f"{actor}.fsdp_config={{param_offload: False}}",
                "algorithm.rollout_correction.rollout_is=null",
            ]
        )
    assert caplog.text == "" and config.actor_rollout_ref.actor.optim.weight_decay == 0
    for key in NOT_SUPPORTED | WITHOUT_EFFECT:  # nor hides a table what is misspelled beside them
        assert not [known for known in KNOWN if known.startswith(f"{key}.")]
    with pytest.raises(ConfigError, match=r"there is no key .*; the nearest one is '.*offload'"):
        compose_config([f"{actor}.fsdp_config.param_ofload=False"])


def test_policy_losses(caplog: pytest.LogCaptureFixture) -> None:
    actor = "actor_rollout_ref.actor"
    mode = f"{actor}.policy_loss.loss_mode"
    with pytest.raises(
        ConfigError, match=r"luspo is known .* gspo with loss_agg_mode=seq-mean-tok"
    ):
        compose_config([f"{mode}=luspo"])
    bounds = [f"{actor}.policy_loss.clip_cov_lb=2", f"{actor}.policy_loss.clip_cov_ub=2"]
    with pytest.raises(ConfigError, match=r"clip_cov_lb=2.0 must be less than .*clip_cov_ub=2.0"):
        compose_config([f"{mode}=clip_cov", *bounds])
    given = ["tau_pos=2", "clip_ratio=0.1", "clip_ratio_c=2", "policy_loss.kl_cov_ratio=0.1"]
    idle = {"sapo": [1, 2, 3], "vanilla": [0, 3], "kl_cov": [0, 1, 2], "dppo_tv": [0, 3]}
    for name, expected in idle.items():
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load_config([f"{mode}={name}", *(f"{actor}.{text}" for text in given)])
        keys = [text.partition("=")[0] for text in given]
        assert [i for i, key in enumerate(keys) if f"{actor}.{key} (" in caplog.text] == expected
    accepted = [s for s in SCRIPTS if "policy_loss.loss_mode" in str(s) and not problems(s)]
    assert len(accepted) == 5  # CISPO's, GMPO's and GPG's


def test_counts_of_all_ranks_that_contradict_or_are_none() -> None:
    all_ranks, each = next(iter(OF_ALL_RANKS.items()))
    ranks = "trainer.n_gpus_per_node=4"
    assert attrgetter(each)(load_config([ranks, f"{each}=4", f"{all_ranks}=null"])) == 4
    assert attrgetter(each)(load_config([ranks, f"{each}=4", f"{all_ranks}=16"])) == 4
    with pytest.raises(ConfigError, match=r"=64 on 4 ranks contradicts .*_per_gpu=4"):
        compose_config([ranks, f"{all_ranks}=64", f"{each}=4"])
    with pytest.raises(ConfigError, match="must be a whole number"):
        compose_config([ranks, f"{all_ranks}=many"])
    with pytest.raises(ConfigError, match=r"trainer\.n_gpus_per_node=0"):
        compose_config(["trainer.n_gpus_per_node=0", f"{all_ranks}=64"])


def test_what_asks_for_nothing_is_accepted() -> None:
    assert without_effect("actor_rollout_ref.model.lora.dropout", 0.0) == "dropout is always off"
    assert without_effect("critic.checkpoint.anything", None)
    assert without_effect("reward_model.profiler.tool", None) == "it asks for nothing"
    assert without_effect("actor_rollout_ref.model.lora.dropout", 0.1) is None
    assert refusal("actor_rollout_ref.actor.megatron.anything.else")
    assert refusal("actor_rollout_ref.ref.megatron.anything.else")
    for nothing in ({}, [], None, False):
        assert without_effect("actor_rollout_ref.rollout.trace", nothing) == "it asks for nothing"
    assert refusal("actor_rollout_ref.nothing") is None
