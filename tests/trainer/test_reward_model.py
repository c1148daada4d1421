"""The main job end to end with a reward model: its scores are those of plain transformers."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.helpers import make_tiny_model, make_tiny_reward_model, make_tokenizer, whole_run
from tests.trainer.test_main_ppo import read, run
from verl.cluster import WorkerGroup

TEMPLATE = "{% for m in messages %}( {{ m.content }} ) {% endfor %}"
SYSTEM = {"role": "system", "content": "99"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A policy that takes chat messages, and a reward model."""
    policy = make_tiny_model(tmp_path_factory.mktemp("policy"))
    make_tokenizer(chat_template=TEMPLATE).save_pretrained(policy)
    return policy, make_tiny_reward_model(tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def settings(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {
            "data_source": "chat" if i % 2 else "countdown",
            "prompt": [SYSTEM, {"role": "user", "content": f"{i} + {i}"}],
            "reward_model": {"style": "model"}
            if i % 2
            else {"style": "rule", "ground_truth": {"target": 3, "numbers": [1, 2]}},
        }
        for i in range(20)
    ]
    pq.write_table(pa.Table.from_pylist(rows[:16]), folder / "train.parquet")
    pq.write_table(pa.Table.from_pylist(rows[16:]), folder / "test.parquet")
    return [
        f"data.train_files={folder}/train.parquet",
        f"data.val_files={folder}/test.parquet",
        "data.train_batch_size=8",
        "data.max_prompt_length=16",
        "data.max_response_length=12",
        f"actor_rollout_ref.model.path={models[0]}",
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        "actor_rollout_ref.actor.optim.lr=1e-2",
        "actor_rollout_ref.rollout.n=8",
        "reward_model.enable=True",
        f"reward_model.model.path={models[1]}",
        "algorithm.use_grpopp=True",
        "algorithm.filter_groups.enable=True",
        "algorithm.filter_groups.metric=score",
        "algorithm.filter_groups.carry_over=False",
        "data.gen_batch_size=4",
        "trainer.logger=console",
        "trainer.save_hf_model=False",
    ]


def dumped(folder: Path, step: int) -> list[dict]:
    return pq.read_table(folder / f"{step}.parquet").to_pylist()


def plain_scores(models: tuple[Path, Path], rows: list[dict]) -> list[float]:
    """By transformers' own forward pass, from the texts that were written."""
    model = AutoModelForSequenceClassification.from_pretrained(models[1]).eval()
    tokenizer, scores = AutoTokenizer.from_pretrained(models[1]), []
    for row in rows:
        (question,) = re.findall(r"^\( 99 \) \( (.*) \) $", row["prompt"] + " ")
        chat = [SYSTEM, {"role": "user", "content": question}]
        chat.append({"role": "assistant", "content": row["response"]})
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            scores.append(model(ids).logits.item())
    return scores


@whole_run
def test_a_policy_learns_from_a_reward_model(
    settings: list[str], models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the engines' devices, in rounds of generation; resumed with engines of their own, whose
    responses a thread draws ahead and has scored by the ranks that train meanwhile; and again with
    generation that has no end, which the reward model interrupts."""
    limits = []

    def scatter(self: WorkerGroup, method: str, arguments: list) -> list:
        limits.extend(of_rank[-1] for of_rank in arguments if method == "ask")
        return original(self, method, arguments)

    original = WorkerGroup.scatter
    monkeypatch.setattr(WorkerGroup, "scatter", scatter)
    options = [
        f"trainer.default_local_dir={tmp_path}",
        f"trainer.rollout_data_dir={tmp_path}/rollouts",
        f"trainer.validation_data_dir={tmp_path}/validation",
        "trainer.save_freq=3",
        "trainer.test_freq=3",
    ]
    shared = ["trainer.n_gpus_per_node=2", "reward_model.model.fsdp_config.param_offload=True"]
    shared += ["trainer.total_training_steps=3", "reward_model.micro_batch_size=6"]
    run(settings, *options, *shared)
    ahead = ["trainer.n_gpus_per_node=1", "trainer.rollout_gpus_per_node=1"]
    ahead += ["trainer.async_rollout=True", "trainer.total_training_steps=6"]
    ahead += ["reward_model.model.use_remove_padding=False"]
    ahead += ["reward_model.forward_max_token_len_per_gpu=100"]
    run(settings, *options, *ahead)
    endless = ["trainer.max_policy_age=1", "trainer.total_training_steps=2", *shared[:2]]
    run(settings, *(o.replace(str(tmp_path), f"{tmp_path}/endless") for o in options), *endless)
    sizes = {(limit.size, limit.max_tokens) for limit in limits}
    assert sizes > {(3, 16384), (None, 100)}
    records = {record["step"]: record for record in read(tmp_path)}
    assert sorted(records) == list(range(7))
    for step in (1, 2):
        rows = dumped(tmp_path / "endless" / "rollouts", step)
        found = [row["score"] for row in rows]
        np.testing.assert_allclose(found, plain_scores(models, rows), atol=1e-5)
    for step in range(1, 7):
        rows = dumped(tmp_path / "rollouts", step)
        expected = plain_scores(models, rows)
        np.testing.assert_allclose([row["score"] for row in rows], expected, atol=1e-5)
        found = records[step]["critic/score/mean"]
        assert found == pytest.approx(np.mean(expected), abs=1e-5)
        assert records[step]["train/num_gen_batches"] == 2
    means = [records[step]["critic/score/mean"] for step in range(1, 7)]
    assert np.mean(means[-2:]) > np.mean(means[:2]) + 0.05
    # A function scores those validation rows that name no model.
    for step in (0, 3, 6):
        rows = dumped(tmp_path / "validation", step)
        by_model = [row for row in rows if row["data_source"] == "chat"]
        expected = plain_scores(models, by_model)
        np.testing.assert_allclose([row["score"] for row in by_model], expected, atol=1e-5)
        mean = records[step]["val-core/chat/reward/mean@1"]
        assert mean == pytest.approx(np.mean(expected), abs=1e-5)
        assert records[step]["val-core/countdown/acc/mean@1"] == 0
        assert records[step]["val-core/best_acc"] == 0
        assert "val-core/chat/acc/mean@1" not in records[step]
