"""What the keys of each model say reaches that model, and the cluster what its keys say."""

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch.distributed as dist

from tests.helpers import free_address, make_samples, make_step
from tests.rollout.test_hf import make_prompts
from tests.trainer.test_ray_trainer import build, in_process
from verl.config.base import Section
from verl.config.load import load_config
from verl.config.schema import RolloutConfig
from verl.models.policy import PolicyWorker
from verl.rollout.hf import HFEngine
from verl.trainer.ppo.workers import Workers

Keys = dict[str, Any]
FSDP: Keys = {
    "model_dtype": "bfloat16",
    "param_offload": True,
    "optimizer_offload": True,
    "fsdp_size": 1,
    "reshard_after_forward": False,
    "full_determinism": True,
    "mixed_precision.param_dtype": "bfloat16",
    "mixed_precision.reduce_dtype": "bfloat16",
}
OPTIM: Keys = {
    "lr": 0.5,
    "betas": [0.5, 0.75],
    "weight_decay": 0.125,
    "eps": 0.25,
    "lr_warmup_steps": 3,
    "lr_warmup_steps_ratio": 0.5,
    "warmup_style": "linear",
    "min_lr_ratio": 0.75,
    "num_cycles": 2.0,
}
CLASSIFIER: Keys = {
    "path": "a model",
    "override_config": {"rope_theta": 5},
    "use_remove_padding": False,
    "trust_remote_code": True,
}
CRITIC = CLASSIFIER | {"enable_gradient_checkpointing": False, "external_lib": "a module"}
MODEL = CRITIC | {
    "enable_activation_offload": True,
    "tokenizer_path": "a tokenizer",
    "lora_rank": 3,
    "lora_alpha": 7,
    "target_modules": ["q_proj"],
    "exclude_modules": ["k_proj"],
    "lora_adapter_path": "an adapter",
    "lora.merge": True,
}
"""Values that are no default, of all keys of each section."""


def overrides(prefix: str, keys: Keys) -> list[str]:
    return [f"{prefix}.{key}={value}".replace("'", "") for key, value in keys.items()]


def given(section: Section, keys: Keys, *others: str) -> bool:
    """Whether it has these values, and no key beside them but `others`."""
    found = {key: value for key, value, _ in section.walk()}
    assert found.keys() == {*keys, *others}
    return {key: found[key] for key in keys} == keys


def built(*keys: str) -> dict[str, tuple[Any, ...]]:
    """What the ranks are asked to build, by role."""
    workers, calls = in_process(load_config(keys), PolicyWorker("cpu")), dict[str, Any]()

    def call(method: str, *args: Any) -> list[Any]:
        role, *rest = args if method == "build_beside" else ("actor", *args)
        calls[role] = tuple(rest)
        return [(None, None)]

    workers.actor.call, workers.actor.connect = call, lambda *args: None  # type: ignore[attr-defined]
    workers.engines = SimpleNamespace(wait_ready=lambda: None)  # type: ignore[assignment]
    workers.colocated, workers.update_engines = False, lambda: None  # type: ignore[assignment]
    Workers.build(workers, 9, None)
    return calls


def test_actor_and_reference_share_prompts_on_request() -> None:
    keys = ["actor_rollout_ref.actor.use_kl_loss=True"]
    assert [args[-1] for args in built(*keys).values()] == [True, True]
    keys.append("actor_rollout_ref.actor.use_prefix_grouper=False")
    assert [args[-1] for args in built(*keys).values()] == [False, False]


def test_each_model_is_built_as_its_own_sections_say() -> None:
    """Of four on the same ranks, one at a time has other values."""
    models, reward = "actor_rollout_ref", "reward_model.model"
    all_four = [f"{models}.actor.use_kl_loss=True", "algorithm.adv_estimator=gae"]
    all_four += ["reward_model.enable=True", f"{reward}.path=judge", "trainer.n_gpus_per_node=2"]
    plain = built(*all_four)
    split = "ulysses_sequence_parallel_size=2"
    own = {
        "actor": overrides(f"{models}.actor.fsdp_config", FSDP)
        + overrides(f"{models}.actor.optim", OPTIM)
        + [f"{models}.actor.{split}", f"{models}.ref.ulysses_sequence_parallel_size=1"],
        "ref": [*overrides(f"{models}.ref.fsdp_config", FSDP), f"{models}.ref.{split}"],
        "critic": overrides("critic.model.fsdp_config", FSDP)
        + overrides("critic.optim", OPTIM)
        + overrides("critic.model", CRITIC),
        "reward_model": overrides(f"{reward}.fsdp_config", FSDP) + overrides(reward, CLASSIFIER),
    }
    assert plain.keys() == own.keys()
    for role, keys in own.items():
        found = built(*all_four, *keys)
        assert {r for r in plain if found[r] != plain[r]} == {role}
        model, fsdp, *rest = found[role]
        assert given(fsdp, FSDP)
        if role in ("actor", "critic"):
            assert given(rest[0], OPTIM) and rest[1] == 9
        if role in ("actor", "ref"):
            assert rest[2] == 2
        elif role == "critic":
            assert given(
                model,
                CRITIC | {"override_config": {"rope_theta": 5, "num_labels": 1}},
                *(MODEL.keys() - CRITIC),
            )
        else:
            assert given(model, CLASSIFIER, *(MODEL.keys() - CLASSIFIER))
    assert built(*all_four, f"critic.{split}")["critic"][4] == 2
    (policy, *_) = built(*overrides(f"{models}.model", MODEL))["actor"]
    assert given(policy, MODEL)
    follows = f"{models}.model.path=a", f"{models}.model.external_lib=b"
    critic = built(*all_four, *follows)["critic"][0]
    assert (critic.path, critic.external_lib) == ("a", "b")


@pytest.fixture(scope="module")
def worker(tiny_model: Path) -> Iterator[PolicyWorker]:
    worker = PolicyWorker("cpu")
    worker.connect(0, 1, free_address())
    build(worker, tiny_model)
    yield worker
    dist.destroy_process_group()


def limits_of(worker: PolicyWorker, *keys: str) -> dict[str, Any]:
    """What goes to the first of two ranks with the critic's values and update, and with
    conversations for a reward model."""
    config = load_config(["algorithm.adv_estimator=gae", "trainer.n_gpus_per_node=2", *keys])
    workers, sent = in_process(config, worker), dict[str, Any]()
    workers.colocated = False

    def scatter(method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        role, asked, *rest = arguments[0]
        sent[f"{role} {asked}"] = rest
        if asked == "update":
            return []
        return [np.zeros(sum(len(s.response_ids) for s in args[2])) for args in arguments]

    workers.actor.scatter = scatter  # type: ignore[method-assign]
    samples = make_samples([9, 2, 3, 4])
    workers.add_values(samples)
    workers.update_critic([make_step(samples)])
    workers.reward_scores(make_samples([1, 1]))
    return sent


def sizes(sent: dict[str, Any]) -> list[tuple[int | None, int]]:
    """Of the passes of the critic's values, its update, and the reward model."""
    names = ("critic log_probs", "critic update", "reward_model log_probs")
    values, update, scores = (sent[name] for name in names)
    found = values[2], update[2], scores[2]
    return [(limit.size, limit.max_tokens) for limit in found]


CASES: dict[str, tuple[list[str], list[tuple[int | None, int]]]] = {
    "budgets": (
        [
            "critic.ppo_max_token_len_per_gpu=2000",
            "critic.forward_max_token_len_per_gpu=3000",
            "reward_model.forward_max_token_len_per_gpu=4000",
        ],
        [(None, 3000), (None, 2000), (None, 4000)],
    ),
    "counts": (
        [
            "critic.ppo_micro_batch_size_per_gpu=3",
            "critic.forward_micro_batch_size_per_gpu=5",
            "reward_model.micro_batch_size_per_gpu=7",
        ],
        [(5, 16384), (3, 16384), (7, 16384)],
    ),
    "budgets in spite of counts": (
        [
            "critic.ppo_micro_batch_size_per_gpu=3",
            "critic.use_dynamic_bsz=True",
            "reward_model.micro_batch_size_per_gpu=7",
            "reward_model.use_dynamic_bsz=True",
        ],
        [(None, 16384)] * 3,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_sizes_of_passes_of_critic_and_reward_model(name: str, worker: PolicyWorker) -> None:
    keys, expected = CASES[name]
    reward = ["reward_model.enable=True", "reward_model.model.path=judge"]
    assert sizes(limits_of(worker, *reward, *keys)) == expected


def test_the_critics_update_is_as_its_keys_say(worker: PolicyWorker) -> None:
    keys = ["cliprange_value=0.125", "grad_clip=0.25", "ulysses_sequence_parallel_size=2"]
    sent = limits_of(worker, *(f"critic.{key}" for key in keys))
    steps, loss, _, clip = sent["critic update"]
    assert (loss.kind, loss.cliprange_value, clip) == ("value", 0.125, 0.25)
    (step,) = steps  # of which both ranks get all
    assert len(step.samples) == len(sent["critic log_probs"][0]) == 4


class Engine:
    """A group of one engine in this process."""

    def __init__(self, engine: HFEngine) -> None:
        self.engine = engine

    def call(self, method: str, *args: Any) -> list[Any]:
        return [getattr(self.engine, method)(*args)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_engines_are_compared_by_the_tolerance_of_the_key(
    dtype: str, worker: PolicyWorker, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rollout = "actor_rollout_ref.rollout."
    engine = HFEngine()
    policy = load_config([f"actor_rollout_ref.model.path={tiny_model}"]).actor_rollout_ref.model
    engine.build(policy, RolloutConfig(dtype=dtype), "cpu", 100)

    def verify(*keys: str, strict: bool = False) -> dict[str, float]:
        given = ["trainer.n_gpus_per_node=2", *(rollout + key for key in keys)]
        workers = in_process(load_config(given), worker)
        workers.engines, workers.colocated = Engine(engine), False  # type: ignore[assignment]
        return workers.verify_engines(make_prompts([3])[0], 1, strict)

    assert verify() == verify("verify_weights=False") == {}
    difference = verify("verify_weights=True", "verify_weights_tolerance=1")
    (found,) = difference.values()
    assert found > 0 and not caplog.records
    below = f"verify_weights_tolerance={found / 2:.3g}"
    with caplog.at_level(logging.WARNING):
        assert verify("verify_weights=True", below) == difference
    assert "actor_rollout_ref.rollout.verify_weights_tolerance" in caplog.text
    with pytest.raises(ValueError, match="engine 0 is not the actor's model"):
        verify("verify_weights=True", below, strict=True)


def test_the_cluster_is_asked_for_what_the_keys_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Ray itself here; a machine that has nothing says what was asked for."""
    asked: list[dict[str, Any]] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options))
    monkeypatch.setattr(ray, "nodes", lambda: [])
    places = ["trainer.nnodes=2", "trainer.n_gpus_per_node=50", "trainer.rollout_gpus_per_node=3"]
    device = "trainer.device=cuda"
    with pytest.raises(ValueError, match=r"needs 2 machine.* with 106 CPU, 53 GPU each; .* has 0"):
        Workers(load_config([*places, device]), lambda: None)
    keys = ["ray_init.num_cpus=7", "+ray_init.runtime_env.env_vars.A=b", "trainer.device=cpu"]
    with pytest.raises(ValueError, match=r"needs 1 machine.* with 8 CPU each; the cluster has 0"):
        Workers(load_config([*keys, "trainer.n_gpus_per_node=4"]), lambda: None)
    assert [(a["num_cpus"], a["runtime_env"]) for a in asked] == [
        (2 * 2 * 53, None),
        (7, {"env_vars": {"A": "b"}}),
    ]
