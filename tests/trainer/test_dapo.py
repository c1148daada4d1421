"""DAPO's dynamic sampling in the main job: it learns, carries over, stops early and resumes."""

import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from pyarrow import feather
from transformers import AutoTokenizer

from tests.faults.jobs import job
from tests.helpers import ROOT, starting_warm, whole_run
from tests.trainer.test_main_ppo import read
from verl.config.load import load_config
from verl.trainer import main_ppo
from verl.trainer.ppo.batches import sampling
from verl.trainer.ppo.ray_trainer import RayPPOTrainer

REWARD = """
def has_plus(data_source, solution_str, ground_truth, extra_info=None):
    return float("+" in solution_str)
"""


@pytest.fixture(scope="module")
def settings(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A response is right if it has a plus among its four words: 4 % of a random model's."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {
            "data_source": "pluses",
            "prompt": " ".join(str((i * j) % 100) for j in range(1, 3 + i % 4)),
            "reward_model": {"style": "rule", "ground_truth": "+"},
        }
        for i in range(1, 97)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    (folder / "reward.py").write_text(REWARD)
    return [
        f"data.train_files={folder}/train.parquet",
        "data.val_files=null",
        f"custom_reward_function.path={folder}/reward.py",
        "custom_reward_function.name=has_plus",
        "data.apply_chat_template=False",
        "data.train_batch_size=8",
        "data.gen_batch_size=32",
        "data.max_prompt_length=16",
        "data.max_response_length=4",
        f"actor_rollout_ref.model.path={tiny_model}",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=64",
        "actor_rollout_ref.actor.optim.lr=3e-3",
        "actor_rollout_ref.rollout.name=hf",
        "actor_rollout_ref.rollout.n=8",
        "algorithm.filter_groups.enable=True",
        "algorithm.filter_groups.metric=acc",
        "algorithm.use_grpopp=True",
        "trainer.logger=console",
        "trainer.n_gpus_per_node=2",
        "trainer.val_before_train=False",
        "trainer.total_training_steps=6",
        "trainer.save_freq=1",
        "trainer.save_hf_model=False",
    ]


def run(settings: list[str], folder: Path) -> None:
    """`python -m recipe.dapo.main_dapo` in this process."""
    overrides = [*settings, f"trainer.default_local_dir={folder}"]
    with starting_warm():
        main_ppo.run(load_config(overrides, "dapo_trainer", ROOT / "recipe/dapo/config"))


@pytest.fixture(scope="module")
def finished(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run(settings, folder)
    return folder


def test_it_learns_with_the_filter_on(finished: Path) -> None:
    steps = read(finished)
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[5]["critic/score/mean"] > 1.5 * steps[0]["critic/score/mean"]
    for line in steps:
        assert line["train/num_prompts"] == 8
        assert 0 <= line["train/num_gen_batches"] <= 3
        assert 0 < line["critic/score/mean"] < 1
    assert steps[0]["train/num_gen_batches"] >= 1
    assert 0.3 < steps[0]["train/all_wrong_ratio"] < 1
    assert steps[0]["train/kept_prompts_ratio"] + steps[0]["train/all_wrong_ratio"] == 1
    assert any(line["train/carried_prompts"] > 0 for line in steps)


@whole_run
def test_a_killed_run_goes_on_with_what_it_carried(
    settings: list[str], finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    latest = tmp_path / "latest_checkpointed_iteration.txt"
    with job(settings, tmp_path, module="recipe.dapo.main_dapo") as process:
        assert process.until(lambda: latest.exists() and latest.read_text() == "2", pause=0.01)
        process.kill_driver()
    saved = latest.read_text()
    assert feather.read_table(tmp_path / f"global_step_{saved}" / "carried.feather").num_rows
    caplog.set_level("INFO")
    run(settings, tmp_path)
    assert "prompts kept: " in caplog.text
    assert f"resuming from {tmp_path}/global_step_{saved}" in caplog.text
    assert read(tmp_path) == read(finished)


def test_closing_a_generation_frees_the_engines(settings: list[str], tmp_path: Path) -> None:
    overrides = [
        "trainer.n_gpus_per_node=1",
        "data.max_response_length=200",
        "actor_rollout_ref.rollout.ignore_eos=True",
        "actor_rollout_ref.rollout.max_num_seqs=8",
        f"trainer.default_local_dir={tmp_path}",
    ]
    config = load_config([*settings, *overrides])
    tokenizer = AutoTokenizer.from_pretrained(config.actor_rollout_ref.model.path)
    trainer, params = RayPPOTrainer(config, tokenizer), sampling(config, 1)
    prompts = trainer.batches.prompts
    try:
        with starting_warm():
            trainer.start_workers()
        list(trainer.batches.generate(prompts[:2], [0, 1], params))  # warm
        began = time.monotonic()
        stream = trainer.batches.generate(prompts, list(range(96)), params)  # 96 times 8
        assert len(next(stream)) == 8
        one_of_96 = time.monotonic() - began
        stream.close()
        samples = [
            s for part in trainer.batches.generate(prompts[:2], [0, 1], params) for s in part
        ]
        assert len(samples) == 16
        assert time.monotonic() - began < 40 * one_of_96
    finally:
        trainer.close()
        ray.shutdown()
