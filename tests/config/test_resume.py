"""Which keys may change when a run resumes, and what the trainer says about the others."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.trainer.test_ray_trainer import make_trainer
from verl.config.load import load_config
from verl.config.validate import changed_keys
from verl.trainer.ppo.ray_trainer import RayPPOTrainer

BASE = [
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.n=2",
    "algorithm.use_grpopp=True",
]


def changes(*overrides: str) -> tuple[list[str], list[str]]:
    saved = json.loads(json.dumps(asdict(load_config(BASE))))
    found = changed_keys(saved, load_config([*BASE, *overrides]))
    return found["error"], found["warn"]


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("algorithm.grpopp_config.alpha=1", "algorithm.grpopp_config.alpha: 0.75 → 1.0"),
        ("algorithm.grpopp_config.alpha=auto", "algorithm.grpopp_config.alpha: 0.75 → auto"),
        ("data.seed=2", "data.seed: 1 → 2"),
        ("data.train_files=[a,b]", "data.train_files: ~/data/countdown_nochat/train.parquet → "),
        ("actor_rollout_ref.model.path=x", "actor_rollout_ref.model.path: Qwen/Qwen2.5-3B → x"),
        ("actor_rollout_ref.rollout.n=9", "actor_rollout_ref.rollout.n: 2 → 9"),
        (
            "+actor_rollout_ref.model.override_config.rope_theta=9",
            "actor_rollout_ref.model.override_config: {} → {'rope_theta': 9}",
        ),
        ("reward_model.math_server.max_answer_length=9", "reward_model.math_server.max_answer_"),
        ("custom_reward_function.path=f.py", "custom_reward_function.path: None → f.py"),
        (
            "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bfloat16",
            "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype: None → bfloat16",
        ),
    ],
)
def test_a_key_that_alters_the_training(override: str, text: str) -> None:
    (found,), deliberate = changes(override)
    assert found.startswith(text) and not deliberate


@pytest.mark.parametrize(
    "override",
    [
        "trainer.logger=console",
        "trainer.experiment_name=other",
        "trainer.default_local_dir=/elsewhere",
        "trainer.save_freq=7",
        "trainer.n_gpus_per_node=2",
        "trainer.nnodes=2",
        "trainer.max_restarts=2",
        "data.val_files=other.parquet",
        "actor_rollout_ref.rollout.val_kwargs.top_k=9",
        "actor_rollout_ref.rollout.max_num_seqs=9",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
        "critic.optim.lr=1",
        "algorithm.kl_ctrl.horizon=9",  # without effect in this run
        "data.gen_batch_size=7",
    ],
)
def test_a_key_that_does_not(override: str) -> None:
    assert changes(override) == ([], [])


@pytest.mark.parametrize(
    "override", ["trainer.total_training_steps=9", "actor_rollout_ref.actor.optim.lr=0.5"]
)
def test_a_key_that_is_changed_on_purpose(override: str) -> None:
    other, (text,) = changes(override)
    assert not other and text.startswith(override.partition("=")[0])


def test_micro_batches_matter_where_the_method_averages_over_them() -> None:
    legacy = "actor_rollout_ref.actor.loss_agg_mode=token-mean-legacy"
    micro = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"
    saved = asdict(load_config([BASE[1], f"{micro}=4", legacy]))
    found = changed_keys(saved, load_config([BASE[1], f"{micro}=2", legacy]))
    assert found["error"] == [f"{micro}: 4 → 2"]


def test_micro_batches_matter_there_with_a_token_budget_too() -> None:
    base = [
        BASE[1],
        "actor_rollout_ref.actor.loss_agg_mode=token-mean-legacy",
        "actor_rollout_ref.actor.use_dynamic_bsz=True",
    ]
    micro = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"
    saved = asdict(load_config([*base, f"{micro}=4"]))
    found = changed_keys(saved, load_config([*base, f"{micro}=2"]))
    assert found["error"] == [f"{micro}: 4 → 2"]


def test_the_references_type_matters_where_there_is_one() -> None:
    key = "actor_rollout_ref.ref.fsdp_config.mixed_precision.param_dtype"
    assert changes(f"{key}=bfloat16") == ([], [])
    base = [*BASE, "actor_rollout_ref.actor.use_kl_loss=True"]
    saved = asdict(load_config(base))
    offload = "actor_rollout_ref.ref.fsdp_config.param_offload=True"
    idle = "actor_rollout_ref.ref.fsdp_config.mixed_precision.reduce_dtype=bfloat16"
    found = changed_keys(saved, load_config([*base, f"{key}=bfloat16", offload, idle]))
    assert found["error"] == [f"{key}: None → bfloat16"]


def test_a_key_that_the_checkpoint_does_not_know_is_no_change() -> None:
    saved = asdict(load_config(BASE))
    del saved["data"]["seed"]
    assert changed_keys(saved, load_config([*BASE, "data.seed=5"])) == {}


def saved_by(trainer: RayPPOTrainer) -> Path:
    """A checkpoint without an actor."""
    best = {"val-core/best_acc": 0.5, "val-core/best_step": 2}
    state = replace(trainer.state, step=3, kl_coef=0.25, skipped_by_model={"actor": 1}, best=best)
    return trainer.checkpoints.save(state, lambda folder: None)


def test_another_method_is_an_error_and_may_be_taken_over(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved_by(make_trainer(tiny_model, tmp_path))
    resumed = make_trainer(tiny_model, tmp_path)
    state = resumed.state
    assert (state.step, state.kl_coef, state.skipped_by_model) == (3, 0.25, {"actor": 1})
    assert state.best["val-core/best_acc"] == 0.5
    assert resumed.how_to_resume == f"the same command goes on from {folder}"
    other = ["algorithm.use_grpopp=True", "actor_rollout_ref.actor.clip_ratio=0.1"]
    with pytest.raises(ValueError) as error:
        make_trainer(tiny_model, tmp_path, *other)
    for text in (
        "algorithm.use_grpopp: False → True",
        "actor_rollout_ref.actor.clip_ratio: 0.2 → 0.1",
        "trainer.experiment_name",
        f"trainer.resume_mode=resume_path trainer.resume_from_path={folder}",
    ):
        assert text in str(error.value)
    assert not caplog.records
    path = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={folder}"]
    taken = make_trainer(tiny_model, tmp_path, *other, *path)
    assert (
        taken.state.step == 3
        and taken.state.best == {}
        and taken.how_to_resume.startswith("the same command goes on from")
    )
    again = make_trainer(tiny_model, tmp_path, *other, "trainer.resume_mode=disable")
    again.checkpoints.latest = folder  # as after a restart
    assert again.how_to_resume.endswith(f"with trainer.resume_mode=auto goes on from {folder}")
    taken.checkpoints.latest = own = taken.checkpoints.root / "global_step_4"
    assert taken.how_to_resume.endswith(f"with trainer.resume_mode=auto goes on from {own}")
    assert "algorithm.use_grpopp: False → True" in caplog.text
    assert make_trainer(tiny_model, tmp_path, *other, "trainer.resume_mode=disable").state.step == 0


def test_the_best_of_another_validation_is_forgotten(tiny_model: Path, tmp_path: Path) -> None:
    saved_by(make_trainer(tiny_model, tmp_path))
    other = "actor_rollout_ref.rollout.val_kwargs.top_k=2"
    assert make_trainer(tiny_model, tmp_path, other).state.best == {}
    assert make_trainer(tiny_model, tmp_path, "data.val_batch_size=7").state.best != {}
