"""The main job end to end with options that test_main_ppo.py leaves alone."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.helpers import whole_run
from tests.trainer.test_main_ppo import finished, read, run, settings  # noqa: F401  fixtures
from verl.algorithms import exponent
from verl.trainer.main_export import export

pytestmark = whole_run


def test_two_ranks_that_split_sequences_train_as_two_that_do_not(
    finished: Path,  # noqa: F811
    settings: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    """The actor's sequences alone; the reference has the usual batches."""
    run(
        settings,
        f"trainer.default_local_dir={tmp_path}",
        "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2",
        "actor_rollout_ref.ref.ulysses_sequence_parallel_size=1",
        "trainer.total_training_steps=2",
        "trainer.save_freq=-1",
    )
    expected = read(finished)[:3]
    assert [line["step"] for line in expected] == [0, 1, 2]
    for line, found in zip(expected, read(tmp_path), strict=True):
        assert found == pytest.approx(line, rel=1e-3, abs=1e-5)


def test_remax_filters_and_kl_in_reward(
    settings: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    """What a response is compared with is what a greedy validation before the first step shows."""
    run(
        settings,
        f"trainer.default_local_dir={tmp_path}",
        settings[0].replace("train_files", "val_files"),
        "actor_rollout_ref.rollout.val_kwargs={do_sample:False,n:1}",
        "algorithm.adv_estimator=remax",
        "algorithm.use_kl_in_reward=True",
        "algorithm.kl_ctrl.type=adaptive",
        "algorithm.filter_groups.enable=True",
        "algorithm.filter_groups.metric=score",
        "algorithm.filter_groups.carry_over=False",
        "algorithm.filter_overlong_response.enable=True",
        "reward_model.reward_manager=dapo",
        "reward_model.overlong_buffer.enable=True",
        "reward_model.overlong_buffer.len=8",
        "reward_model.overlong_buffer.log=True",
        "reward_model.overlong_buffer.penalty_factor=1.0",
        "actor_rollout_ref.actor.ppo_epochs=2",
        "actor_rollout_ref.actor.shuffle=True",
        "actor_rollout_ref.actor.use_dynamic_bsz=True",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=128",
        "actor_rollout_ref.rollout.top_k=50",
        f"trainer.rollout_data_dir={tmp_path}/rollouts",
        f"trainer.validation_data_dir={tmp_path}/validation",
        "trainer.total_training_steps=2",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
    )
    first, second = read(tmp_path)[1:]
    assert [p.name for p in (tmp_path / "validation").glob("*.parquet")] == ["0.parquet"]
    dumped = sorted(path.name for path in (tmp_path / "rollouts").glob("*.parquet"))
    assert dumped == ["1.parquet", "2.parquet"]
    rows = pq.read_table(tmp_path / "rollouts" / "1.parquet").to_pylist()
    assert len(rows) == first["train/num_prompts"] * 8
    rewards = [row["reward"] for row in rows]
    assert sum(rewards) / len(rewards) == pytest.approx(first["critic/rewards/mean"])
    greedy = pq.read_table(tmp_path / "validation" / "0.parquet").to_pylist()
    baselines = {row["prompt"]: row["reward"] for row in greedy}
    assert len({*baselines.values()}) > 1
    for row in rows:
        assert row["advantage"] == pytest.approx(row["reward"] - baselines[row["prompt"]])
    kept = [row for row in rows if row["finish_reason"] == "stop"]
    assert all(row["weight"] > 0 for row in kept if row["response_length"])
    for row in rows:  # the token that ended it is no part of the text
        words = row["response_length"] - (row["finish_reason"] == "stop")
        assert len(row["response"].split()) == words
    assert first["train/num_gen_batches"] >= 1
    assert first["reward/overlong_reward"] < 0
    assert first["critic/rewards/mean"] < first["critic/score/mean"]
    assert first["actor/reward_kl_penalty"] == 0  # the policy is still the reference
    assert second["actor/reward_kl_penalty"] != 0
    assert second["actor/reward_kl_penalty_coeff"] != first["actor/reward_kl_penalty_coeff"]


def test_alpha_that_follows_the_measured_exponent_resumes_exactly(
    settings: list[str],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the third step on, when enough responses are measured; which the checkpoint holds."""
    options = ["algorithm.grpopp_config.alpha=auto", "trainer.save_hf_model=False"]
    options += ["trainer.val_before_train=False", "trainer.test_freq=-1"]
    monkeypatch.setattr(exponent, "FEWEST", 2 * exponent.PER_STEP)
    monkeypatch.setattr(exponent, "NARROWEST", 1e-9)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(settings, *options, f"trainer.default_local_dir={whole}")
    steps = read(whole)
    alphas = [line["loss_agg/alpha"] for line in steps]
    exponents = [line.get("loss_agg/length_exponent") for line in steps]
    assert alphas[:2] == [0.75] * 2 and exponents[:2] == [None] * 2
    assert alphas[2:] == [min(max(b, 0), 2) for b in exponents[2:]]
    assert exponents[2] != exponents[3]
    path = f"trainer.resume_from_path={whole}/global_step_2"
    more = ["trainer.resume_mode=resume_path", path, f"trainer.default_local_dir={resumed}"]
    run(settings, *options, *more)
    assert read(resumed) == steps[2:]


def test_lora_against_its_own_base(
    settings: list[str],  # noqa: F811
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    """Engines follow the adapters, the reference stays, and what is written is PEFT's."""
    run(
        settings,
        f"trainer.default_local_dir={tmp_path}/run",
        "actor_rollout_ref.model.lora_rank=4",
        "actor_rollout_ref.actor.optim.lr=1e-2",
        "actor_rollout_ref.actor.use_kl_loss=True",
        "actor_rollout_ref.actor.ppo_mini_batch_size=16",
        "actor_rollout_ref.rollout.verify_weights=True",
        "trainer.total_training_steps=2",
        "trainer.test_freq=-1",
        "trainer.save_freq=1",
    )
    first, second = read(tmp_path / "run")[1:]
    assert first["actor/kl_loss"] == 0 < second["actor/kl_loss"]
    assert second["rollout/verify_logprob_diff"] < 1e-4
    export(tmp_path / "run/global_step_2", tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    for folder in ("run/huggingface", "merged/lora_adapter"):
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        written = PeftModel.from_pretrained(base, tmp_path / folder).merge_and_unload()
        for name, value in written.named_parameters():
            torch.testing.assert_close(merged.get_parameter(name), value, rtol=0, atol=1e-6)
    weights = [lm.get_parameter("model.layers.0.mlp.up_proj.weight") for lm in (merged, plain)]
    assert not torch.equal(*weights)
