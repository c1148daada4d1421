"""What the driver computes between generation and update, without any worker."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from tests.helpers import free_address, make_samples
from tests.workers.test_actor import distance, gradient
from verl.protocol import Sample, column, fill
from verl.trainer.config import load_config
from verl.trainer.config.model_schema import FSDPConfig, ModelConfig, OptimConfig
from verl.trainer.config.schema import LOSS_AGG_MODES
from verl.trainer.ppo.core_algos import response_weights
from verl.trainer.ppo.metrics import reduce_update_metrics
from verl.trainer.ppo.ray_trainer import (
    RayPPOTrainer,
    loss_config,
)
from verl.utils.timer import Timer
from verl.workers.actor import ActorWorker, MicroBatchLimit

LENGTHS = [2, 4, 5, 10, 1, 1, 3, 4]  # four prompts, two responses each
TRUNCATED = (3, 4)
USED = ([0, 1, 2], [5, 6, 7])  # what they leave of each mini-batch

METHODS = {mode: [f"actor_rollout_ref.actor.loss_agg_mode={mode}"] for mode in LOSS_AGG_MODES} | {
    "dr-grpo": ["algorithm.use_dr_grpo=True"],
    **{
        f"delta-l over {scope}": [
            "algorithm.use_grpopp=True",
            "algorithm.grpopp_config.alpha=1",
            f"algorithm.grpopp_config.scope={scope}",
        ]
        for scope in ("batch", "mini_batch")
    },
}


def make_trainer(model: Path, folder: Path, *overrides: str) -> RayPPOTrainer:
    row = {
        "data_source": "countdown",
        "prompt": "1 2",
        "reward_model": {"ground_truth": {"target": 3, "numbers": [1, 2]}},
    }
    pq.write_table(pa.Table.from_pylist([row] * 4), folder / "data.parquet")
    settings = [
        f"data.train_files={folder}/data.parquet",
        "data.val_files=null",
        "trainer.val_before_train=False",
        "data.apply_chat_template=False",
        "data.train_batch_size=4",
        "data.max_response_length=10",
        f"actor_rollout_ref.model.path={model}",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
        "actor_rollout_ref.rollout.n=2",
        f"trainer.default_local_dir={folder}",
    ]
    config = load_config([*settings, *overrides])
    return RayPPOTrainer(config, AutoTokenizer.from_pretrained(model))


def weights(trainer: RayPPOTrainer, samples: list[Sample]) -> list[list[float]]:
    fill(samples, "weight", [0.0] * len(samples))
    steps = list(trainer.add_weights(samples))
    assert sum(len(step) for step in steps) == sum(s.weight > 0 for s in samples)
    return [[s.weight for s in samples[:4]], [s.weight for s in samples[4:]]]


def weights_of_used(trainer: RayPPOTrainer, used: list[int]) -> list[float]:
    """The weights of these responses of a mini-batch, where no others count."""
    a, everywhere = trainer.aggregation, [LENGTHS[i] for part in USED for i in part]
    rollout_lengths = everywhere if a.scope == "batch" else None
    lengths = [LENGTHS[i] for i in used]
    w = response_weights(lengths, a.mode, 10, a.alpha, rollout_lengths, a.group_size)
    return w.tolist()


class InProcess:
    """A worker group whose ranks are one worker of this process."""

    def __init__(self, worker: ActorWorker) -> None:
        self.worker = worker

    def scatter(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        return [getattr(self.worker, method)(*args) for args in arguments]


@pytest.fixture(scope="module")
def worker(tiny_model: Path) -> Iterator[ActorWorker]:
    worker = ActorWorker("cpu")
    worker.connect(0, 1, free_address())
    worker.build(ModelConfig(path=str(tiny_model)), FSDPConfig(), OptimConfig(), 10)
    yield worker
    dist.destroy_process_group()


def test_weights_are_those_of_each_optimizer_step(tiny_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_model, tmp_path)
    first, second = weights(trainer, make_samples(LENGTHS))
    assert first == pytest.approx([1 / 21] * 4) and second == pytest.approx([1 / 9] * 4)


@pytest.mark.parametrize("scope", ["batch", "mini_batch"])
def test_scope_of_delta_l(scope: str, tiny_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        tiny_model,
        tmp_path,
        "algorithm.use_grpopp=True",
        "algorithm.grpopp_config.alpha=1",
        f"algorithm.grpopp_config.scope={scope}",
    )
    steps = weights(trainer, make_samples(LENGTHS))
    inverse = 1 / np.array(LENGTHS)
    for found, part in zip(steps, (inverse[:4], inverse[4:]), strict=True):
        mean = inverse.mean() if scope == "batch" else part.mean()
        assert found == pytest.approx(part / mean / (4 * 10))


def some_truncated(name: str, model: Path, folder: Path) -> tuple[RayPPOTrainer, list[Sample]]:
    """A trainer of method `name` that filters truncated responses, and a batch with some."""
    filtering = "algorithm.filter_overlong_response.enable=True"
    samples = make_samples(LENGTHS)
    for i in TRUNCATED:
        samples[i].finish_reason = "length"
    return make_trainer(model, folder, filtering, *METHODS[name]), samples


@pytest.mark.parametrize("name", METHODS)
def test_truncated_responses_leave_every_denominator(
    name: str, tiny_model: Path, tmp_path: Path
) -> None:
    trainer, samples = some_truncated(name, tiny_model, tmp_path)
    for found, used in zip(weights(trainer, samples), USED, strict=True):
        expected = dict(zip(used, weights_of_used(trainer, used), strict=True))
        first = 0 if 0 in used else 4
        assert found == pytest.approx([expected.get(i, 0) for i in range(first, first + 4)])
        assert min(expected.values()) > 0
    # The figures about the loss are those of a batch without them.
    reported = trainer.add_advantages(samples)
    used_only = [s for s in samples if not s.truncated]
    alone = make_trainer(tiny_model, tmp_path, *METHODS[name]).add_advantages(used_only)
    assert reported == pytest.approx(alone) and len(reported) >= 5
    # Nothing is left: nothing to report, nothing to divide by.
    fill(samples, "finish_reason", ["length"] * 8)
    assert weights(trainer, samples) == [[0.0] * 4, [0.0] * 4]
    assert list(trainer.add_weights(samples)) == [[], []]
    assert trainer.add_advantages(samples) == {}


def test_truncated_responses_leave_the_mean_over_tokens(tiny_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_model, tmp_path, "algorithm.filter_overlong_response.enable=True")
    samples = make_samples(LENGTHS)
    samples[3].finish_reason = "length"
    first, second = weights(trainer, samples)
    assert first == pytest.approx([1 / 11, 1 / 11, 1 / 11, 0])
    assert second == pytest.approx([1 / 9] * 4)


@pytest.mark.parametrize("name", METHODS)
def test_truncated_responses_change_no_other_gradient_beyond_the_denominators(
    name: str, worker: ActorWorker, tiny_model: Path, tmp_path: Path
) -> None:
    trainer, samples = some_truncated(name, tiny_model, tmp_path)
    for step, used in zip(trainer.add_weights(samples), USED, strict=True):
        found = gradient(worker.actor, step, MicroBatchLimit(3))
        expected = torch.zeros_like(found)
        for i, weight in zip(used, weights_of_used(trainer, used), strict=True):
            alone = replace(make_samples(LENGTHS)[i], weight=1.0)
            expected += weight * gradient(worker.actor, [alone], MicroBatchLimit(1))
        assert distance(found, expected) < 1e-5


def test_every_method_is_compared_with_its_own_exponent(tiny_model: Path, tmp_path: Path) -> None:
    """Also where ∆L is not the method in use."""
    samples = make_samples(LENGTHS)
    found = make_trainer(tiny_model, tmp_path).add_advantages(samples)
    L = np.array(LENGTHS, float)
    for key, w in {
        "loss_agg/cv": np.ones(8),
        "loss_agg/cv/dr-grpo": np.ones(8),
        "loss_agg/cv/delta-l": L**-0.75,
        "loss_agg/cv/seq-mean-token-mean": 1 / L,
    }.items():
        assert found[key] == pytest.approx(np.sqrt((w**2 * L).sum()) / w.sum()), key
    assert found["loss_agg/effective_batch"] == pytest.approx(8)


def test_advantages_compare_responses_to_one_prompt(tiny_model: Path, tmp_path: Path) -> None:
    samples = make_samples(LENGTHS)
    fill(samples, "reward", [1, 0, 0, 0, 3, 1, 1, 1])
    make_trainer(tiny_model, tmp_path).add_advantages(samples)
    half = np.sqrt(0.5)
    expected = [half, -half, 0, 0, half, -half, 0, 0]
    np.testing.assert_allclose(column(samples, "advantage"), expected, atol=1e-5)
    make_trainer(tiny_model, tmp_path, "algorithm.use_dr_grpo=True").add_advantages(samples)
    assert column(samples, "advantage").tolist() == [0.5, -0.5, 0, 0, 1, -1, 0, 0]


def test_kl_is_subtracted_from_the_reward(tiny_model: Path, tmp_path: Path) -> None:
    overrides = ["algorithm.use_kl_in_reward=True", "algorithm.kl_ctrl.kl_coef=0.5"]
    trainer = make_trainer(tiny_model, tmp_path, *overrides)
    samples = make_samples([2, 4], reward=1.0)
    samples[0].old_log_probs = np.array([-1.0, -2.0], np.float32)
    samples[0].ref_log_probs = np.array([-1.5, -2.5], np.float32)
    samples[1].old_log_probs = samples[1].ref_log_probs
    metrics = trainer._subtract_kl(samples)
    assert column(samples, "reward").tolist() == [0.5, 1.0]  # 1 − 0.5·(0.5 + 0.5), 1 − 0
    assert metrics["actor/reward_kl_penalty"] == 0.25  # means over tokens of 0.5 and 0
    assert metrics["actor/reward_kl_penalty_coeff"] == 0.5


def test_update_metrics_of_two_ranks() -> None:
    """Weighted sums add up, the others become means over tokens, and mini-batches are averaged."""
    first = {"w/pg_loss": 1.0, "entropy": 6.0, "tokens": 2, "grad_norm": 3.0, "lr": 0.1}
    second = {"w/pg_loss": 0.5, "entropy": 2.0, "tokens": 6, "grad_norm": 3.0, "lr": 0.1}
    later = {"w/pg_loss": 0.0, "entropy": 0.0, "tokens": 4, "grad_norm": 1.0, "lr": 0.1}
    memory = "perf/max_memory_gb"
    ranks = [[first, later | {memory: 2.0}], [second, later | {memory: 5.0}]]
    assert reduce_update_metrics(ranks) == pytest.approx(
        {
            "actor/pg_loss": (1.5 + 0) / 2,
            "actor/entropy": (8 / 8 + 0) / 2,
            "actor/grad_norm": 2.0,
            "actor/lr": 0.1,
            "perf/max_memory_gb": 5.0,
        }
    )


def test_clip_ratio_stands_in_for_the_bounds(tiny_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        tiny_model,
        tmp_path,
        "actor_rollout_ref.actor.clip_ratio=0.1",
        "actor_rollout_ref.actor.clip_ratio_high=0.3",
        "actor_rollout_ref.actor.kl_loss_coef=0.5",
    )
    loss = loss_config(trainer.config)
    assert (loss.clip_ratio_low, loss.clip_ratio_high, loss.kl_coef) == (0.1, 0.3, 0.0)


def test_engines_are_compared_over_the_tokens_that_tell() -> None:
    told = {"tokens": 4, "rollout/tokens": 2, "rollout/kl": 1.0, "rollout/logprob_diff_max": 0.5}
    others = {"tokens": 6, "rollout/tokens": 3, "rollout/kl": 1.5, "rollout/logprob_diff_max": 2.0}
    assert reduce_update_metrics([[told], [others], [{"tokens": 5}]]) == {
        "rollout/kl": 0.5,
        "rollout/logprob_diff_max": 2.0,
    }
    silent = {"tokens": 4, "rollout/tokens": 0, "rollout/kl": 0.0, "rollout/logprob_diff_max": 0.0}
    assert reduce_update_metrics([[silent]]) == {}


def test_bypass_takes_the_engines_log_probs(tiny_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_model, tmp_path, "algorithm.bypass_old_log_prob=True")
    trainer.step = 1
    samples = make_samples(LENGTHS, old_log_probs=None)  # two optimizer steps
    assert trainer.add_log_probs(samples, Timer()) == {}  # without asking the actor
    assert all(sample.old_log_probs is sample.rollout_log_probs for sample in samples)


def test_responses_of_an_older_policy_keep_the_log_probs_they_were_drawn_with(
    tiny_model: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_model, tmp_path, "data.train_batch_size=2")
    trainer.step = 2
    carried, fresh = (make_samples([3, 2], old_log_probs=None, policy_version=v) for v in (0, 1))
    assert trainer.add_log_probs(carried, Timer()) == {}  # without asking the actor
    for sample in carried:
        assert sample.old_log_probs is sample.rollout_log_probs
    trainer.add_log_probs(fresh, Timer())
    assert all(sample.old_log_probs is None for sample in fresh)  # one update: its own forward pass


@pytest.mark.parametrize("enable", [True, False])
def test_generation_has_a_price_per_token_without_the_filter_only(
    enable: bool, tiny_model: Path, tmp_path: Path
) -> None:
    rule = f"algorithm.filter_groups={{enable:{enable},metric:acc}}"
    timer = Timer()
    for name in ("gen", "update_actor"):
        with timer(name):
            pass
    trainer, samples = make_trainer(tiny_model, tmp_path, rule), make_samples(LENGTHS)
    metrics = trainer.step_metrics(samples, timer, [samples])
    assert ("timing_per_token_ms/gen" in metrics) is not enable
    assert {"timing_s/gen", "timing_per_token_ms/update_actor", "perf/throughput"} <= {*metrics}


def test_fresh_responses_beside_them_get_the_actors(
    worker: ActorWorker, tiny_model: Path, tmp_path: Path
) -> None:
    two_ranks = "trainer.n_gpus_per_node=2"
    trainer = make_trainer(tiny_model, tmp_path, "data.train_batch_size=2", two_ranks)
    trainer.step, trainer.actor = 2, InProcess(worker)
    carried = make_samples([3, 2], seed=1, old_log_probs=None, policy_version=0)
    fresh = make_samples([4, 1, 6, 3], seed=2, old_log_probs=None, policy_version=1)
    timer = Timer()
    trainer.add_log_probs([*carried, *fresh], timer)
    assert set(timer.seconds) == {"old_log_prob"}
    for sample in carried:
        assert sample.old_log_probs is sample.rollout_log_probs
    actors = worker.log_probs(fresh, "actor", 1.0, MicroBatchLimit(1))
    for sample, expected in zip(fresh, actors, strict=True):
        np.testing.assert_allclose(sample.old_log_probs, expected, atol=1e-5)
        assert np.abs(sample.old_log_probs - sample.rollout_log_probs).max() > 0.01
