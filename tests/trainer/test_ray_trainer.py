"""What the driver computes between generation and update, without any worker."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import free_address, make_samples, make_step
from tests.models.test_policy import distance, gradient, gradient_and_sums, log_probs_of
from verl.algorithms import exponent
from verl.algorithms.losses import LossConfig
from verl.algorithms.policy_losses import MULTIPLES_OF_ADVANTAGE, SELECTIONS, Constants
from verl.algorithms.weights import response_weights
from verl.config.load import load_config
from verl.config.schema import LOSS_AGG_MODES, Config, FSDPConfig, ModelConfig, OptimConfig
from verl.models.policy import MicroBatchLimit, PolicyWorker
from verl.protocol import OptimizerStep, Sample
from verl.trainer.ppo.batches import TrainBatch, split_groups
from verl.trainer.ppo.metrics import update_metrics
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.tracking import read_metrics
from verl.trainer.ppo.workers import Workers, loss_config, needs_reference
from verl.utils.timer import Timer

LENGTHS = [2, 4, 5, 10, 1, 1, 3, 4]  # four prompts, two responses each
TRUNCATED = (3, 4)
USED = ([0, 1, 2], [5, 6, 7])  # what they leave of each mini-batch

METHODS = {mode: [f"actor_rollout_ref.actor.loss_agg_mode={mode}"] for mode in LOSS_AGG_MODES} | {
    "use_dr_grpo": ["algorithm.use_dr_grpo=True"],
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
    """The weights in both optimizer steps; 0 for a response that is not in them."""
    steps = trainer.optimizer_steps(samples)
    assert all((step.weights > 0).all() for step in steps)
    found = [
        {id(s): w for s, w in zip(step.samples, step.weights.tolist(), strict=True)}
        for step in steps
    ]
    assert not found[0].keys() & found[1].keys()
    halves = samples[:4], samples[4:]
    return [[f.get(id(s), 0.0) for s in half] for f, half in zip(found, halves, strict=True)]


def weights_of_used(trainer: RayPPOTrainer, used: list[int]) -> list[float]:
    """The weights of these responses of a mini-batch, where no others count."""
    a, everywhere = trainer.aggregation, [LENGTHS[i] for part in USED for i in part]
    rollout_lengths = everywhere if a.scope == "batch" else None
    lengths, groups = [LENGTHS[i] for i in used], [i // 2 for i in used]
    w = response_weights(lengths, a.mode, 10, a.alpha, rollout_lengths, a.group_size, groups)
    return w.tolist()


class InProcess:
    """A worker group whose two ranks are one worker of this process."""

    def __init__(self, worker: PolicyWorker) -> None:
        self.worker, self.exclusive = worker, nullcontext()

    def __len__(self) -> int:
        return 2

    def scatter(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        return [getattr(self.worker, method)(*args) for args in arguments]


def in_process(config: Config, worker: PolicyWorker) -> Workers:
    """What the driver sees of a run with that worker alone, and without engines."""
    workers = object.__new__(Workers)
    workers.config, workers.actor = config, InProcess(worker)
    workers.num_devices, workers.model_size, workers.peak_flops = 2, None, None
    workers.device = "cpu"
    return workers


@pytest.fixture(scope="module")
def worker(tiny_model: Path) -> Iterator[PolicyWorker]:
    worker = PolicyWorker("cpu")
    worker.connect(0, 1, free_address())
    build(worker, tiny_model)
    yield worker
    dist.destroy_process_group()


def build(worker: PolicyWorker, folder: Path) -> Any:
    return worker.build(ModelConfig(path=str(folder)), FSDPConfig(), OptimConfig(), 10)


def test_weights_are_those_of_each_optimizer_step(tiny_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_model, tmp_path)
    first, second = weights(trainer, make_samples(LENGTHS))
    assert first == pytest.approx([1 / 21] * 4) and second == pytest.approx([1 / 9] * 4)
    mode = "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean"
    first, second = weights(make_trainer(tiny_model, tmp_path, mode), make_samples(LENGTHS))
    assert [*first, *second] == pytest.approx([1 / (4 * length) for length in LENGTHS])


@pytest.mark.parametrize("name", METHODS)
def test_each_step_of_several_shuffled_epochs_has_its_own_weights(
    name: str, tiny_model: Path, tmp_path: Path
) -> None:
    """The same response has another weight in each epoch: none may take the place of another."""
    shuffled = ["actor_rollout_ref.actor.ppo_epochs=4", "actor_rollout_ref.actor.shuffle=True"]
    trainer = make_trainer(tiny_model, tmp_path, *METHODS[name], *shuffled)
    samples = make_samples(LENGTHS)
    a, differ = trainer.aggregation, set()
    steps = trainer.optimizer_steps(samples)
    assert len(steps) == 8
    for step in steps:
        lengths = [s.length for s in step.samples]
        options = LENGTHS if a.scope == "batch" else lengths, a.group_size
        groups = [s.group for s in step.samples]
        expected = response_weights(lengths, a.mode, 10, a.alpha, *options, groups)
        np.testing.assert_array_equal(step.weights, expected)
        if name == "token-mean":
            assert step.weights @ lengths == pytest.approx(1)
        differ |= set(zip(map(id, step.samples), step.weights.tolist(), strict=True))
    if name in ("token-mean", "delta-l over mini_batch"):
        assert len(differ) > len(samples)


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
    trainer.add_advantages(samples)
    reported = trainer.aggregation_metrics(samples)
    used_only = [s for s in samples if not s.truncated]
    alone = make_trainer(tiny_model, tmp_path, *METHODS[name]).aggregation_metrics(used_only)
    assert reported == pytest.approx(alone) and len(reported) >= 5
    # Nothing is left: nothing to report, nothing to divide by.
    for sample in samples:
        sample.finish_reason = "length"
    assert weights(trainer, samples) == [[0.0] * 4, [0.0] * 4]
    assert [step.samples for step in trainer.optimizer_steps(samples)] == [[], []]
    assert trainer.aggregation_metrics(samples) == {}


def test_truncated_responses_leave_the_mean_over_tokens(tiny_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_model, tmp_path, "algorithm.filter_overlong_response.enable=True")
    samples = make_samples(LENGTHS)
    samples[3].finish_reason = "length"
    first, second = weights(trainer, samples)
    assert first == pytest.approx([1 / 11, 1 / 11, 1 / 11, 0])
    assert second == pytest.approx([1 / 9] * 4)


@pytest.mark.parametrize("name", METHODS)
def test_truncated_responses_change_no_other_gradient_beyond_the_denominators(
    name: str, worker: PolicyWorker, tiny_model: Path, tmp_path: Path
) -> None:
    trainer, samples = some_truncated(name, tiny_model, tmp_path)
    for step, used in zip(trainer.optimizer_steps(samples), USED, strict=True):
        found = gradient(worker, step, MicroBatchLimit(3))
        expected = torch.zeros_like(found)
        for i, weight in zip(used, weights_of_used(trainer, used), strict=True):
            alone = OptimizerStep([make_samples(LENGTHS)[i]], np.ones(1, np.float32))
            expected += weight * gradient(worker, alone, MicroBatchLimit(1))
        assert distance(found, expected) < 1e-5


def test_every_method_is_compared_with_its_own_exponent(tiny_model: Path, tmp_path: Path) -> None:
    """Also where ∆L is not the method in use."""
    samples = make_samples(LENGTHS)
    found = make_trainer(tiny_model, tmp_path).aggregation_metrics(samples)
    L = np.array(LENGTHS, float)
    for key, w in {
        "loss_agg/cv": np.ones(8),
        "loss_agg/cv/dr-grpo": np.ones(8),
        "loss_agg/cv/delta-l": L**-0.75,
        "loss_agg/cv/seq-mean-token-mean": 1 / L,
    }.items():
        assert found[key] == pytest.approx(np.sqrt((w**2 * L).sum()) / w.sum()), key
    assert found["loss_agg/effective_batch"] == pytest.approx(8)


AUTO = "algorithm.use_grpopp=True", "algorithm.grpopp_config.alpha=auto"


def test_alpha_follows_the_exponent_of_earlier_steps(tiny_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_model, tmp_path, *AUTO)
    L, samples = np.array(LENGTHS, float), make_samples(LENGTHS)
    for measured, alpha in ([], 0.75), ([[x, 2 * x**1.25] for x in LENGTHS * 8], 1.25):
        trainer.state.measured = measured
        found = trainer.aggregation_metrics(samples)
        assert found["loss_agg/alpha"] == pytest.approx(alpha)
        assert found.get("loss_agg/length_exponent", 0.75) == pytest.approx(alpha)
        w = np.concatenate([step.weights for step in trainer.optimizer_steps(samples)])
        assert w == pytest.approx(L**-alpha / (L**-alpha).mean() / 40, rel=1e-6)
        assert found["loss_agg/cv"] == pytest.approx(np.sqrt((w**2 * L).sum()) / w.sum())
    assert "loss_agg/alpha" not in make_trainer(tiny_model, tmp_path).aggregation_metrics(samples)


def test_gradients_are_measured_of_responses_with_an_advantage(
    worker: PolicyWorker, tiny_model: Path, tmp_path: Path
) -> None:
    """Each once, though two epochs train on it; the same ones for the same seed and step; and no
    more than the window holds."""
    two_epochs = "actor_rollout_ref.actor.ppo_epochs=2"
    kl_term = "actor_rollout_ref.actor.use_kl_loss=True"
    trainer = make_trainer(tiny_model, tmp_path, *AUTO, two_epochs, kl_term)
    workers = trainer.workers = in_process(trainer.config, worker)
    samples = make_samples(LENGTHS * 5, old_log_probs=None)
    for s in samples[::2]:
        s.advantage = 0.0
    trainer.state.step = 3
    worker.model.zero_grad()  # other tests leave one
    for _ in range(2):
        trainer.measure_gradients(trainer.optimizer_steps(samples))
    first, again = np.split(np.array(trainer.state.measured), 2)
    assert len(first) == exponent.PER_STEP and (first == again).all()
    alone = {}
    for s in samples[1::2]:
        step = OptimizerStep([s], np.ones(1, np.float32))
        alone[gradient(worker, step, MicroBatchLimit(1), LossConfig()).norm().item()] = s
    worker.model.zero_grad()
    found = [min(alone, key=lambda x: abs(x - square**0.5)) for _, square in first]
    assert len({*found}) == len(first)  # all different
    for norm, (length, square) in zip(found, first, strict=True):
        assert square == pytest.approx(norm**2, rel=1e-4) and length == alone[norm].length
    trainer.state.step = 4
    for _ in range(20):
        trainer.measure_gradients(trainer.optimizer_steps(samples))
    assert len(trainer.state.measured) == exponent.WINDOW
    assert trainer.state.measured[0] != [*first[0]]
    assert workers.gradient_norms([]) == []


def test_advantages_compare_responses_to_one_prompt(tiny_model: Path, tmp_path: Path) -> None:
    samples = make_samples(LENGTHS)
    for sample, reward in zip(samples, [1, 0, 0, 0, 3, 1, 1, 1], strict=True):
        sample.reward = reward
    make_trainer(tiny_model, tmp_path).add_advantages(samples)
    half = np.sqrt(0.5)
    expected = [half, -half, 0, 0, half, -half, 0, 0]
    np.testing.assert_allclose([s.advantage for s in samples], expected, atol=1e-5)
    make_trainer(tiny_model, tmp_path, "algorithm.use_dr_grpo=True").add_advantages(samples)
    assert [s.advantage for s in samples] == [0.5, -0.5, 0, 0, 1, -1, 0, 0]


def test_gdpo_takes_the_components_and_their_weights(tiny_model: Path, tmp_path: Path) -> None:
    keys = ["gdpo_reward_keys=[score,format]", "gdpo_reward_weights=[1,0.5]"]
    given = ["adv_estimator=gdpo", "norm_adv_by_std_in_grpo=False", *keys]
    trainer = make_trainer(tiny_model, tmp_path, *(f"algorithm.{text}" for text in given))
    samples = make_samples([2] * 8)
    for i, sample in enumerate(samples):
        sample.score, sample.reward = float(i == 0), 7.0
        sample.extras["format"] = 10 * (i == 2)
    trainer.add_advantages(samples)
    # ±1/2 in the first group, ±5 · 0.5 in the second; over two tokens each, the mean is 0.
    centred = np.array([0.5, -0.5, 2.5, -2.5, 0, 0, 0, 0])
    expected = centred / np.sqrt(2 * (centred**2).sum() / 15)
    np.testing.assert_allclose([s.advantage for s in samples], expected, atol=1e-6)


@pytest.mark.parametrize(("penalty", "first"), [("kl", 0.5), ("mse", 0.125)])
def test_kl_is_subtracted_from_the_reward(
    penalty: str, first: float, tiny_model: Path, tmp_path: Path
) -> None:
    overrides = ["algorithm.use_kl_in_reward=True", "algorithm.kl_ctrl.kl_coef=0.5"]
    overrides += [f"algorithm.kl_penalty={penalty}"]
    trainer = make_trainer(tiny_model, tmp_path, *overrides)
    samples = make_samples([2, 4], reward=1.0)
    samples[0].old_log_probs = np.array([-1.0, -2.0], np.float32)
    samples[0].ref_log_probs = np.array([-1.5, -2.5], np.float32)
    samples[1].old_log_probs = samples[1].ref_log_probs
    metrics = trainer.subtract_kl(samples)
    assert [s.reward for s in samples] == [1 - first, 1.0]  # 1 − 0.5·(first + first), 1 − 0
    assert metrics["actor/reward_kl_penalty"] == first / 2  # means over tokens of `first` and 0
    assert metrics["actor/reward_kl_penalty_coeff"] == 0.5


def test_the_coefficient_of_kl_goes_after_its_target(tiny_model: Path, tmp_path: Path) -> None:
    """0.3 nats a token are three times the target: at most a fifth too far in 2 of 5 prompts."""
    keys = ["type=adaptive", "kl_coef=0.5", "target_kl=0.1", "horizon=5"]
    keys = ["algorithm.use_kl_in_reward=True", *(f"algorithm.kl_ctrl.{key}" for key in keys)]
    trainer = make_trainer(tiny_model, tmp_path, *keys)
    samples = make_samples([2, 4])
    for s in samples:
        s.ref_log_probs = s.old_log_probs - np.float32(0.3)
    for coefficient in (0.5, 0.5 * 1.08):
        reported = trainer.subtract_kl(samples)["actor/reward_kl_penalty_coeff"]
        assert reported == pytest.approx(coefficient)
    keys[3:] = ["algorithm.kl_ctrl.target_kl=0.3", "algorithm.kl_ctrl.horizon=5"]
    trainer = make_trainer(tiny_model, tmp_path, *keys)
    trainer.subtract_kl(samples)
    assert trainer.state.kl_coef == pytest.approx(0.5, rel=1e-5)  # it is there


def test_skipped_steps_in_a_row_are_as_many_as_the_key_says(
    tiny_model: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_model, tmp_path, "trainer.max_skipped_steps=2")
    step, reports = make_step(make_samples([2, 3])), [[{"skipped": 1.0, "tokens": 1.0}]]
    trainer.count_skipped(reports, [step], "actor")
    with pytest.raises(
        FloatingPointError, match=r"of 2 optimizer steps of the actor in a row .*_steps=2"
    ):
        trainer.count_skipped(reports, [step], "actor")


def test_update_metrics_of_two_ranks() -> None:
    """Weighted sums add up, the others become means over tokens, and mini-batches are averaged."""
    first = {"w/pg_loss": 1.0, "entropy": 6.0, "tokens": 2, "grad_norm": 3.0, "lr": 0.1}
    second = {"w/pg_loss": 0.5, "entropy": 2.0, "tokens": 6, "grad_norm": 3.0, "lr": 0.1}
    later = {"w/pg_loss": 0.0, "entropy": 0.0, "tokens": 4, "grad_norm": 1.0, "lr": 0.1}
    memory = "perf/max_memory_gb"
    ranks = [[first, later | {memory: 2.0}], [second, later | {memory: 5.0}]]
    assert update_metrics(ranks) == pytest.approx(
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
    kl = ("use_kl_loss=True", "kl_loss_coef=0.5", "kl_loss_type=mse", "entropy_coeff=0.25")
    loss = loss_config(load_config([f"actor_rollout_ref.actor.{text}" for text in kl]))
    assert (loss.kl_coef, loss.kl_type, loss.entropy_coeff) == (0.5, "mse", 0.25)


def test_engines_are_compared_over_the_tokens_that_tell() -> None:
    told = {"tokens": 4, "rollout/tokens": 2, "rollout/kl": 1.0, "rollout/logprob_diff_max": 0.5}
    others = {"tokens": 6, "rollout/tokens": 3, "rollout/kl": 1.5, "rollout/logprob_diff_max": 2.0}
    assert update_metrics([[told], [others], [{"tokens": 5}]]) == {
        "rollout/kl": 0.5,
        "rollout/logprob_diff_max": 2.0,
    }
    silent = {"tokens": 4, "rollout/tokens": 0, "rollout/kl": 0.0, "rollout/logprob_diff_max": 0.0}
    assert update_metrics([[silent]]) == {}


def test_bypass_takes_the_engines_log_probs(tiny_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_model, tmp_path, "algorithm.bypass_old_log_prob=True")
    trainer.state.step = 1
    samples = make_samples(LENGTHS, old_log_probs=None)  # two optimizer steps
    assert trainer.add_log_probs(samples, Timer()) == {}  # without asking the actor
    assert all(sample.old_log_probs is sample.rollout_log_probs for sample in samples)


def test_responses_of_an_older_policy_keep_the_log_probs_they_were_drawn_with(
    tiny_model: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_model, tmp_path, "data.train_batch_size=2")
    trainer.state.step = 2
    carried, fresh = (make_samples([3, 2], old_log_probs=None, policy_version=v) for v in (0, 1))
    assert trainer.add_log_probs(carried, Timer()) == {}  # without asking the actor
    for sample in carried:
        assert sample.old_log_probs is sample.rollout_log_probs
    trainer.add_log_probs(fresh, Timer())
    assert all(sample.old_log_probs is None for sample in fresh)  # one update: its own forward pass


@pytest.mark.parametrize("enable", [True, False])
def test_generation_has_a_price_per_token_without_the_filter_only(
    enable: bool, worker: PolicyWorker, tiny_model: Path, tmp_path: Path
) -> None:
    rule = f"algorithm.filter_groups={{enable:{enable},metric:acc}}"
    timer = Timer()
    for name in ("gen", "update_actor"):
        with timer(name):
            pass
    trainer, samples = make_trainer(tiny_model, tmp_path, rule), make_samples(LENGTHS)
    trainer.workers = in_process(trainer.config, worker)
    metrics = trainer.step_metrics(samples, [make_step(samples)], timer)
    assert ("timing_per_token_ms/gen" in metrics) is not enable
    assert {"timing_s/gen", "timing_per_token_ms/update_actor", "perf/throughput"} <= {*metrics}


def test_mfu_is_reported_where_model_and_device_are_known(
    worker: PolicyWorker, tiny_model: Path, tmp_path: Path
) -> None:
    trainer, samples, timer = make_trainer(tiny_model, tmp_path), make_samples([4, 2]), Timer()
    timer.seconds = {"gen": 1.0, "update_actor": 2.0}
    trainer.workers = in_process(trainer.config, worker)
    size, peak = build(worker, tiny_model)
    assert size is not None and peak is None  # a CPU
    trainer.workers.model_size, trainer.workers.peak_flops = size, 1e9
    metrics = trainer.step_metrics(samples, [make_step(samples)], timer)
    assert 0 < metrics["perf/mfu"] < 1


def test_every_rank_gets_as_many_responses_without_balance(
    worker: PolicyWorker, tiny_model: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_model, tmp_path, "trainer.balance_batch=False")
    workers = in_process(trainer.config, worker)
    workers.actor = [None, None]
    assert workers._shares(make_samples([9, 1, 1, 1]), 1) == [[0, 1], [2, 3]]
    assert workers._shares(make_samples([9]), 1) == [[0], []]


def test_ranks_that_split_sequences_get_the_same_responses(
    worker: PolicyWorker, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The actor's do here, those of the reference don't."""
    key = "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2"
    options = [key, "actor_rollout_ref.ref.ulysses_sequence_parallel_size=1"]
    trainer = make_trainer(tiny_model, tmp_path, *options, "trainer.n_gpus_per_node=2")
    workers, sent = in_process(trainer.config, worker), dict[str, list[list[int]]]()

    def scatter(method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        batches = [args[0] for args in arguments]
        batches = [b[0].samples for b in batches] if method == "update" else batches
        sent[method] = [[len(s.response_ids) for s in batch] for batch in batches]
        return [np.zeros(sum(lengths)) for lengths in sent[method]]

    monkeypatch.setattr(workers.actor, "scatter", scatter)
    samples = make_samples([9, 2, 3, 4])
    workers.add_log_probs(samples, "actor")
    workers.add_log_probs(samples, "ref")
    workers.update([make_step(samples)])
    whole = [9, 2, 3, 4]
    assert sent["log_probs"] == sent["update"] == [whole, whole]
    first, second = sent["ref_log_probs"]
    assert first and second and sorted(first + second) == sorted(whole)


SIZES = "log_prob_micro_batch_size_per_gpu=", "log_prob_max_token_len_per_gpu="


@pytest.mark.parametrize(
    ("overrides", "limits"),
    [
        (["actor.ppo_micro_batch_size_per_gpu=4"], [4, 4, 4]),  # the others follow
        (["actor.ppo_micro_batch_size_per_gpu=4", f"rollout.{SIZES[0]}3"], [3, 3, 4]),
        ([f"rollout.{SIZES[0]}3", f"ref.{SIZES[0]}5"], [3, 5, 4]),
        (
            [
                "actor.use_dynamic_bsz=True",
                "actor.ppo_max_token_len_per_gpu=700",
                f"rollout.{SIZES[1]}900",
                f"ref.{SIZES[1]}800",
            ],
            "auto",
        ),
        (["rollout.log_prob_use_dynamic_bsz=True", "ref.log_prob_use_dynamic_bsz=False"], "mixed"),
    ],
)
def test_sizes_of_passes_go_to_the_ranks(
    overrides: list[str], limits: Any, worker: PolicyWorker, tiny_model: Path, tmp_path: Path
) -> None:
    keys = [f"actor_rollout_ref.{text}" for text in overrides]
    clip = "actor_rollout_ref.actor.grad_clip=0.125"
    trainer = make_trainer(tiny_model, tmp_path, *keys, clip)
    workers, sent = in_process(trainer.config, worker), dict[str, Any]()

    def scatter(method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        sent[method] = arguments[0][2]
        if method == "update":
            assert arguments[0][3] == 0.125
            return []
        return [np.zeros(sum(len(s.response_ids) for s in args[0])) for args in arguments]

    workers.actor.scatter = scatter  # type: ignore[method-assign]
    samples = make_samples([9, 2, 3, 4])
    for role in ("actor", "ref"):
        workers.add_log_probs(samples, role)
    workers.update([make_step(samples)])
    found = [sent[method] for method in ("log_probs", "ref_log_probs", "update")]
    if limits == "auto":
        assert [(m.size, m.max_tokens) for m in found] == [(None, n) for n in (900, 800, 700)]
    elif limits == "mixed":
        assert [m.size for m in found] == [None, 4, 4]
    else:
        assert [m.size for m in found] == limits


def test_what_workers_are_built_and_saved_with(
    worker: PolicyWorker, tiny_model: Path, tmp_path: Path
) -> None:
    keys = ["actor_rollout_ref.nccl_timeout=77", "trainer.hf_model_dtype=float16"]
    trainer = make_trainer(tiny_model, tmp_path, *keys, "trainer.total_epochs=3")
    assert trainer.total_steps == 3  # of one step each
    workers, calls = in_process(trainer.config, worker), list[tuple[Any, ...]]()

    def call(method: str, *args: Any) -> list[Any]:
        calls.append((method, *args))
        return [(None, None)]

    workers.actor.call, workers.actor.connect = call, lambda *args: calls.append(args)
    workers.engines = SimpleNamespace(wait_ready=lambda: None, sleep=lambda: None)
    workers.colocated, workers.update_engines = True, lambda: None
    workers.build(trainer.total_steps, None)
    workers.save_hf_model(tmp_path / "hf")
    assert calls[0] == (77,) and calls[1][0] == "build" and calls[1][4] == 3
    assert calls[2] == ("save_hf", tmp_path / "hf", "float16")


def test_fresh_responses_beside_them_get_the_actors(
    worker: PolicyWorker, tiny_model: Path, tmp_path: Path
) -> None:
    two_ranks = "trainer.n_gpus_per_node=2"
    trainer = make_trainer(tiny_model, tmp_path, "data.train_batch_size=2", two_ranks)
    trainer.state.step, trainer.workers = 2, in_process(trainer.config, worker)
    carried = make_samples([3, 2], seed=1, old_log_probs=None, policy_version=0)
    fresh = make_samples([4, 1, 6, 3], seed=2, old_log_probs=None, policy_version=1)
    timer = Timer()
    trainer.add_log_probs([*carried, *fresh], timer)
    assert set(timer.seconds) == {"old_log_prob"}
    for sample in carried:
        assert sample.old_log_probs is sample.rollout_log_probs
    actors = log_probs_of(worker, fresh, 1.0, MicroBatchLimit(1))
    for sample, expected in zip(fresh, actors, strict=True):
        np.testing.assert_allclose(sample.old_log_probs, expected, atol=1e-5)
        assert np.abs(sample.old_log_probs - sample.rollout_log_probs).max() > 0.01


def test_decoupled_they_get_the_actors_too_and_factors_lead_to_who_drew_them(
    worker: PolicyWorker, tiny_model: Path, tmp_path: Path
) -> None:
    """The factor of a token is min(2, π_old/π_rollout), as of the others."""
    keys = [f"{CORRECTION}.decoupled=True", f"{CORRECTION}.rollout_is=token"]
    trainer = make_trainer(tiny_model, tmp_path, "trainer.n_gpus_per_node=2", *keys)
    trainer.state.step, trainer.workers = 3, in_process(trainer.config, worker)
    samples = make_samples(LENGTHS, old_log_probs=None, policy_version=0)
    samples[0].token_versions = np.arange(samples[0].length, dtype=np.int32)
    record = trainer.add_log_probs(samples, Timer())
    actors = log_probs_of(worker, samples, 1.0, MicroBatchLimit(4))
    for s, expected in zip(samples, actors, strict=True):
        if s.old_log_probs is not None:
            np.testing.assert_allclose(s.old_log_probs, expected, atol=1e-5)
    later = [i for i, s in enumerate(samples) if s.old_log_probs is not None]
    assert later  # those of the first optimizer step take its own pass
    ratios = np.concatenate(
        [np.exp(samples[i].old_log_probs - samples[i].rollout_log_probs) for i in later]
    )
    assert record["rollout_corr/rollout_is_mean"] == pytest.approx(ratios.mean(), rel=1e-4)


CORRECTION = "algorithm.rollout_correction"
REJECTED = {1: [0, 2], 2: [0, 1, 2, 3, 4], 6: [1]}  # of the responses of LENGTHS these tokens


def judged(
    worker: PolicyWorker, model: Path, folder: Path, *overrides: str
) -> tuple[RayPPOTrainer, list[Sample], dict[str, float]]:
    """A trainer that rejects ratios beyond 3; samples that were drawn with the actor's
    probabilities times 0.9, and times 1/4 where `REJECTED` says so; what it reports of them."""
    rules = [f"{CORRECTION}.rollout_rs=token", f"{CORRECTION}.rollout_rs_threshold=3"]
    trainer = make_trainer(model, folder, "trainer.n_gpus_per_node=2", *rules, *overrides)
    trainer.state.step, trainer.workers = 1, in_process(trainer.config, worker)
    samples = make_samples(LENGTHS, old_log_probs=None)
    own = log_probs_of(worker, samples, 1.0, MicroBatchLimit(4))
    for i, (s, values) in enumerate(zip(samples, own, strict=True)):
        s.reward = float(i % 2)
        s.rollout_log_probs = values + np.float32(np.log(0.9))
        s.rollout_log_probs[REJECTED.get(i, [])] += np.float32(np.log(0.25 / 0.9))
    return trainer, samples, trainer.add_log_probs(samples, Timer())


@pytest.mark.parametrize("name", METHODS)
def test_rejected_tokens_have_no_part_in_loss_and_denominators(
    name: str, worker: PolicyWorker, tiny_model: Path, tmp_path: Path
) -> None:
    """The steps are those of responses without these tokens and, where none is left, without the
    response. In all that is reported of responses the tokens remain."""
    trainer, samples, record = judged(worker, tiny_model, tmp_path, *METHODS[name])
    assert record["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(8 / 30)
    assert record["rollout_corr/rollout_rs_seq_masked_fraction"] == 3 / 8
    trainer.add_advantages(samples)
    left = [2, 2, 0, 10, 1, 1, 2, 4]
    a, everywhere = trainer.aggregation, [length for length in left if length]
    parts = [0, 1, 3], [4, 5, 6, 7]
    for step, used in zip(trainer.optimizer_steps(samples), parts, strict=True):
        lengths = [left[i] for i in used]
        assert [s.length for s in step.samples] == lengths
        others = everywhere if a.scope == "batch" else None
        groups = [samples[i].group for i in used]
        w = response_weights(lengths, a.mode, 10, a.alpha, others, a.group_size, groups)
        np.testing.assert_array_equal(step.weights, w)
        masks = [~np.isin(np.arange(LENGTHS[i]), REJECTED.get(i, [])) for i in used]
        masked = [replace(samples[i], loss_mask=mask) for i, mask in zip(used, masks, strict=True)]
        expected = gradient(worker, OptimizerStep(masked, step.weights), MicroBatchLimit(2))
        assert distance(gradient(worker, step, MicroBatchLimit(3)), expected) < 1e-6
    assert [s.length for s in samples] == LENGTHS


def test_a_veto_rejects_responses_that_others_are_compared_with(
    worker: PolicyWorker, tiny_model: Path, tmp_path: Path
) -> None:
    veto = [f"{CORRECTION}.rollout_rs=null", f"{CORRECTION}.rollout_token_veto_threshold=1.5"]
    trainer, samples, record = judged(worker, tiny_model, tmp_path, *veto)
    assert record["rollout_corr/rollout_is_veto_fraction"] == pytest.approx(7 / 8)
    for s, reward in zip(samples, [1, 0] * 4, strict=True):
        s.reward = reward
    trainer.add_advantages(samples)
    (left,) = [s for step in trainer.optimizer_steps(samples) for s in step.samples]
    assert left.response_ids is samples[2].response_ids and left.advantage > 0.5


@pytest.mark.parametrize("bypass", [False, True])
def test_factors_are_normalized_over_the_whole_batch(
    bypass: bool, worker: PolicyWorker, tiny_model: Path, tmp_path: Path
) -> None:
    """8 of 30 factors are 4, cut at 2; the others 1/0.9. KL loss and entropy don't have them."""
    overrides = [
        f"{CORRECTION}.rollout_rs=null",
        f"{CORRECTION}.rollout_is=token",
        f"{CORRECTION}.rollout_is_batch_normalize=True",
        f"{CORRECTION}.bypass_mode={bypass}",
        f"{CORRECTION}.loss_type=reinforce",
    ]
    trainer, samples, record = judged(worker, tiny_model, tmp_path, *overrides)
    mean = record["rollout_corr/rollout_is_batch_norm_factor"]
    assert mean == pytest.approx((8 * 2 + 22 / 0.9) / 30, rel=1e-5)
    assert all((s.old_log_probs is s.rollout_log_probs) is bypass for s in samples)
    assert loss_config(trainer.config).kind == ("reinforce" if bypass else "ppo")
    plain, divided = trainer.optimizer_steps(samples), trainer.optimizer_steps(samples, mean)
    for a, b in zip(plain, divided, strict=True):
        np.testing.assert_allclose(b.weights, a.weights / mean, rtol=1e-6)
        np.testing.assert_array_equal(b.regularizer_weights, a.weights)


def test_bounds_of_factors_and_of_rejection_are_those_of_the_keys(
    worker: PolicyWorker, tiny_model: Path, tmp_path: Path
) -> None:
    """Ratios are 1/0.9 and 4: cut at 3, and with a lower bound of 2 only the 4 stay."""
    overrides = [
        f"{CORRECTION}.rollout_is=token",
        f"{CORRECTION}.rollout_is_threshold=3",
        f"{CORRECTION}.rollout_is_batch_normalize=True",
        f"{CORRECTION}.rollout_rs_threshold=5",
        f"{CORRECTION}.rollout_rs_threshold_lower=2",
    ]
    trainer, _, record = judged(worker, tiny_model, tmp_path, *overrides)
    mean = record["rollout_corr/rollout_is_batch_norm_factor"]
    assert mean == pytest.approx((8 * 3 + 22 / 0.9) / 30, rel=1e-5)
    assert trainer.loss.rollout_is == "token" and trainer.loss.rollout_is_threshold == 3
    assert record["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(22 / 30)


def test_bypass_judges_by_the_actor_and_keeps_the_engines_log_probs(
    worker: PolicyWorker, tiny_model: Path, tmp_path: Path
) -> None:
    bypass = f"{CORRECTION}.bypass_mode=True"
    _, samples, record = judged(worker, tiny_model, tmp_path, bypass)
    assert record["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(8 / 30)
    assert [s.trained().length for s in samples] == [2, 2, 0, 10, 1, 1, 2, 4]
    assert all(s.old_log_probs is s.rollout_log_probs for s in samples)


def test_a_step_with_rejection_and_normalized_factors(
    worker: PolicyWorker, tiny_model: Path, tmp_path: Path
) -> None:
    """What the weights were is kept; the engine's responses are reported as they came."""
    overrides = [
        f"{CORRECTION}.rollout_rs=token_k2",
        f"{CORRECTION}.rollout_rs_threshold=0.3",
        f"{CORRECTION}.rollout_is=sequence",
        f"{CORRECTION}.rollout_is_batch_normalize=True",
        "actor_rollout_ref.actor.policy_loss.loss_mode=kl_cov",  # whose tokens are chosen of these
        "trainer.total_training_steps=1",
        "trainer.save_hf_model=False",
        f"trainer.rollout_data_dir={tmp_path}/kept",
    ]
    trainer = make_trainer(tiny_model, tmp_path, "trainer.n_gpus_per_node=2", *overrides)
    prepare(trainer, worker)
    trainer.fit()
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert 0 < record["rollout_corr/rollout_rs_masked_fraction"] < 0.5
    assert record["response_length/mean"] == np.mean(LENGTHS)
    rows = pq.read_table(tmp_path / "kept" / "1.parquet").to_pydict()
    assert rows["response_length"] == LENGTHS
    rejected = record["rollout_corr/rollout_rs_masked_fraction"] * sum(LENGTHS)
    mean = record["rollout_corr/rollout_is_batch_norm_factor"]
    first, second = ({w for w in rows["weight"][part] if w} for part in (slice(4), slice(4, 8)))
    tokens = sum(1 / (mean * w) for part in (first, second) for w in part)
    assert len(first) == len(second) == 1 and tokens == pytest.approx(sum(LENGTHS) - rejected)


@pytest.mark.parametrize("bypass", [False, True])
def test_entropies_of_a_whole_step_choose_who_has_a_gradient(
    bypass: bool, worker: PolicyWorker, tiny_model: Path, tmp_path: Path
) -> None:
    """Of the tokens that count, by the policy before the update; micro-batches change nothing."""
    overrides = [
        "actor_rollout_ref.actor.policy_loss.top_entropy_quantile=0.3",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.ppo_epochs=1",
        f"algorithm.rollout_correction.bypass_mode={bypass}",
    ]
    trainer = make_trainer(tiny_model, tmp_path, "trainer.n_gpus_per_node=2", *overrides)
    trainer.state.step, trainer.workers = 1, in_process(trainer.config, worker)
    samples = make_samples(LENGTHS, old_log_probs=None)
    trainer.add_log_probs(samples, Timer())
    ids = [torch.tensor(np.concatenate([s.prompt.token_ids, s.response_ids])) for s in samples]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for s, tokens in zip(samples, ids, strict=True):
        logits = model(tokens[None]).logits[0, len(s.prompt.token_ids) - 1 : -1]
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        np.testing.assert_allclose(s.entropies, entropy.detach(), rtol=1e-4)
        assert (s.old_log_probs is s.rollout_log_probs) is bypass
    samples[3].reject(np.arange(10) % 2 == 0)
    (step,) = trainer.optimizer_steps(samples)
    frozen = np.concatenate([s.counted(s.frozen) for s in step.samples])
    entropies = np.concatenate([s.trained().counted(s.entropies) for s in samples])
    assert frozen.sum() == 17 and len(frozen) == 25  # 0.3 · 24 + 1 = 8.2 have a gradient
    assert entropies[frozen].max() < entropies[~frozen].min()
    assert all(s.frozen is None and s.entropies is not None for s in samples)
    loss = loss_config(trainer.config)
    found = [gradient(worker, step, MicroBatchLimit(size), loss) for size in (1, 4, 8)]
    assert max(distance(x, found[0]) for x in found) < 1e-6
    step.samples = [replace(s, frozen=None) for s in step.samples]
    assert distance(gradient(worker, step, MicroBatchLimit(8), loss), found[0]) > 1e-2


LOSS_MODE = "actor_rollout_ref.actor.policy_loss.loss_mode"
REWARDS = [1, 1, 1, 0, 0, 0, 0, 1]  # no advantage for the first and the third prompt


def rewarded(trainer: RayPPOTrainer) -> list[Sample]:
    samples = make_samples(LENGTHS)
    for s, reward in zip(samples, REWARDS, strict=True):
        s.reward = reward
    return samples


@pytest.mark.parametrize(
    ("mode", "name"),
    [("vanilla", name) for name in METHODS]
    + [(mode, "delta-l over batch") for mode in sorted(MULTIPLES_OF_ADVANTAGE - {"vanilla"})],
)
def test_responses_without_advantage_leave_the_passes_but_not_the_denominators(
    mode: str, name: str, worker: PolicyWorker, tiny_model: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_model, tmp_path, *METHODS[name], f"{LOSS_MODE}={mode}")
    samples = rewarded(trainer)
    trainer.add_advantages(samples)
    a = trainer.aggregation
    for number, step in enumerate(trainer.optimizer_steps(samples)):
        step, half = trainer.with_gradient(step), samples[4 * number :][:4]
        taken = [id(s.response_ids) for s in half if s.advantage]
        assert [id(s.response_ids) for s in step.samples] == taken
        lengths, groups = [s.length for s in half], [s.group for s in half]
        everywhere = LENGTHS if a.scope == "batch" else None
        w = response_weights(lengths, a.mode, 10, a.alpha, everywhere, a.group_size, groups)
        whole = OptimizerStep(half, w.numpy())
        if mode in SELECTIONS:
            step, whole = (
                replace(
                    x, samples=[s.marking("selected", np.arange(s.length) == 0) for s in x.samples]
                )
                for x in (step, whole)
            )
        found, expected = (
            gradient(worker, x, MicroBatchLimit(3), trainer.loss) for x in (step, whole)
        )
        assert distance(found, expected) < 1e-6


@pytest.mark.parametrize(
    "term",
    [
        "actor_rollout_ref.actor.entropy_coeff=0.01",
        "actor_rollout_ref.actor.use_kl_loss=True",
        f"{LOSS_MODE}=kl_cov",
    ],
)
def test_other_terms_keep_responses_without_advantage(
    term: str, tiny_model: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_model, tmp_path, term)
    samples = rewarded(trainer)
    trainer.add_advantages(samples)
    steps = [trainer.with_gradient(step) for step in trainer.optimizer_steps(samples)]
    assert [len(step.samples) for step in steps] == [4, 4]
    assert all((s.advantage == 0) == (s.group in (0, 2)) for step in steps for s in step.samples)


def test_log_probs_before_the_update_only_where_the_loss_compares_with_them(
    worker: PolicyWorker, tiny_model: Path, tmp_path: Path
) -> None:
    """The first step takes those of its own pass, for the same loss, gradient and sums."""
    trainer = make_trainer(tiny_model, tmp_path, "trainer.n_gpus_per_node=2")
    trainer.state.step, trainer.workers = 1, in_process(trainer.config, worker)
    samples = rewarded(trainer)
    for s in samples:
        s.old_log_probs = None
    trainer.add_advantages(samples)
    record = trainer.add_log_probs(samples, Timer())
    assert [s.old_log_probs is not None for s in samples] == [False] * 6 + [True] * 2
    assert record["rollout_corr/kl"] == pytest.approx(
        np.concatenate([s.rollout_log_probs - s.old_log_probs for s in samples[6:]]).mean(),
        rel=1e-4,
    )
    first, second = map(trainer.with_gradient, trainer.optimizer_steps(samples))
    assert [s.group for step in (first, second) for s in step.samples] == [1, 1, 3, 3]
    known = replace(first, samples=[replace(s) for s in first.samples])
    own = log_probs_of(worker, known.samples, 1.0, MicroBatchLimit(1))
    for s, values in zip(known.samples, own, strict=True):
        s.old_log_probs = values
    (a, sums), (b, others) = (
        gradient_and_sums(worker, step, MicroBatchLimit(2), trainer.loss) for step in (first, known)
    )
    assert distance(a, b) < 1e-6
    assert sums == pytest.approx(others, abs=1e-5)


def test_two_epochs_compare_all_with_the_policy_before(
    worker: PolicyWorker, tiny_model: Path, tmp_path: Path
) -> None:
    settings = ["trainer.n_gpus_per_node=2", "actor_rollout_ref.actor.ppo_epochs=2"]
    trainer = make_trainer(tiny_model, tmp_path, *settings)
    trainer.state.step, trainer.workers = 1, in_process(trainer.config, worker)
    samples = rewarded(trainer)
    for s in samples:
        s.old_log_probs = None
    trainer.add_advantages(samples)
    trainer.add_log_probs(samples, Timer())
    assert [s.old_log_probs is not None for s in samples] == [bool(s.advantage) for s in samples]


def test_a_step_of_responses_without_advantage_is_one_with_gradient_zero(
    worker: PolicyWorker, tiny_model: Path
) -> None:
    """The optimizer's momentum moves on; means over tokens leave it out."""
    parameters, reports = [], []
    for skipping in (False, True):
        policy = PolicyWorker("cpu")  # in the process group of `worker`
        build(policy, tiny_model)
        first, idle = (
            make_step(make_samples([3, 4])),
            make_step(make_samples([5, 2], advantage=0.0)),
        )
        if skipping:
            idle = idle.share([])
        loss = LossConfig()
        reports.append(policy.update([first, idle], loss, MicroBatchLimit(2), 1.0))
        parameters.append(
            torch.cat([p.full_tensor().flatten().clone() for p in policy.model.parameters()])
        )
    assert torch.equal(*parameters)
    assert reports[1][1]["grad_norm"] == reports[0][1]["grad_norm"] == 0
    means = update_metrics([reports[1]])
    assert means["actor/entropy"] == pytest.approx(reports[1][0]["entropy"] / 7)
    assert means["actor/grad_norm"] == pytest.approx(reports[1][0]["grad_norm"] / 2)


@pytest.mark.parametrize("mode", ["kl_cov", "clip_cov"])
def test_tokens_are_selected_once_for_a_whole_optimizer_step(
    mode: str, worker: PolicyWorker, tiny_model: Path, tmp_path: Path
) -> None:
    """Of those that count: of a response's, some may be rejected. A resumed run selects the same.
    One step on fresh responses needs the actor's log-probabilities, too."""
    overrides = [
        f"actor_rollout_ref.actor.policy_loss.loss_mode={mode}",
        f"actor_rollout_ref.actor.policy_loss.{mode}_ratio=0.2",
        "actor_rollout_ref.actor.policy_loss.clip_cov_lb=0",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.ppo_epochs=1",
    ]
    trainer = make_trainer(tiny_model, tmp_path, "trainer.n_gpus_per_node=2", *overrides)
    trainer.state.step, trainer.workers = 1, in_process(trainer.config, worker)
    samples = make_samples(LENGTHS, old_log_probs=None)
    trainer.add_log_probs(samples, Timer())
    samples[3].reject(np.arange(10) % 2 == 0)
    (step,) = trainer.optimizer_steps(samples)
    lengths = [s.length for s in step.samples]
    old = np.concatenate([s.counted(s.old_log_probs) for s in step.samples]).astype(float)
    each = np.repeat([s.advantage for s in samples], lengths)
    covariance = (each - each.mean()) * (old - old.mean())
    chosen = np.concatenate([s.counted(s.selected) for s in step.samples])
    assert [len(s.selected) for s in step.samples] == LENGTHS and sum(lengths) == 25
    assert not step.samples[3].selected[1::2].any()
    assert chosen.sum() == 5
    if mode == "kl_cov":
        assert covariance[chosen].min() > covariance[~chosen].max()
    assert (covariance[chosen] > 0).all()
    again = [s.selected for s in trainer.optimizer_steps(samples)[0].samples]
    assert all(np.array_equal(s.selected, x) for s, x in zip(step.samples, again, strict=True))
    assert all(s.selected is None for s in samples)
    config = replace(loss_config(trainer.config), ppo_kl_coef=100.0)
    plain = replace(config, loss_mode="vanilla")
    step.samples = [replace(s, old_log_probs=s.old_log_probs + 0.01) for s in step.samples]
    found, other, usual = (
        gradient(worker, step, MicroBatchLimit(size), loss)
        for size, loss in ((1, config), (8, config), (8, plain))
    )
    assert distance(found, other) < 1e-6 < 1e-2 < distance(found, usual)


def test_loss_constants_are_those_of_the_configuration() -> None:
    given = {
        "policy_loss.loss_mode": "vespo",
        "policy_loss.top_entropy_quantile": 0.2,
        "policy_loss.clip_cov_ratio": 0.1,
        "policy_loss.clip_cov_lb": 0.5,
        "policy_loss.clip_cov_ub": 7.0,
        "policy_loss.kl_cov_ratio": 0.3,
        "policy_loss.ppo_kl_coef": 2.0,
        "policy_loss.vespo_k_pos": 1.5,
        "policy_loss.vespo_lambda_pos": 2.5,
        "policy_loss.vespo_k_neg": 3.5,
        "policy_loss.vespo_lambda_neg": 4.5,
        "tau_pos": 1.25,
        "tau_neg": 1.75,
        "clip_ratio_c": 5.0,
        "clip_ratio_low": 0.15,
        "clip_ratio_high": 0.35,
    }
    loss = loss_config(load_config([f"actor_rollout_ref.actor.{k}={v}" for k, v in given.items()]))
    assert {f.name for f in fields(Constants)} == {k.rpartition(".")[2] for k in given}
    for name, value in given.items():
        assert getattr(loss, name.rpartition(".")[2]) == value
    bypass = ["algorithm.bypass_old_log_prob=True", f"{CORRECTION}.loss_type=reinforce"]
    mode = "actor_rollout_ref.actor.policy_loss.loss_mode=kl_cov"
    assert loss_config(load_config([mode, *bypass])).loss_mode == "vanilla"  # selects nothing


def test_kl_loss_and_entropy_may_be_means_over_tokens(tiny_model: Path, tmp_path: Path) -> None:
    mode = "actor_rollout_ref.actor.regularizer_agg_mode=token-mean"
    trainer = make_trainer(tiny_model, tmp_path, "algorithm.use_grpopp=True", mode)
    for step, tokens in zip(trainer.optimizer_steps(make_samples(LENGTHS)), (21, 9), strict=True):
        assert step.regularizer_weights == pytest.approx([1 / tokens] * 4)
        assert len(set(step.weights.tolist())) > 1


def prepare(trainer: RayPPOTrainer, worker: PolicyWorker) -> list[str]:
    """Makes it train on given responses with that worker alone. Returns what the worker writes:
    the list grows."""
    written: list[str] = []

    def write(method: str, *args: Any) -> None:
        written.append(method)
        getattr(worker, method)(*args)

    trainer.workers = in_process(trainer.config, worker)
    trainer.workers.actor.call = write
    trainer.workers.engines = SimpleNamespace(sleep=lambda: None)
    trainer.workers.free_devices = lambda: None
    trainer.batches.policy_updated = lambda step: None
    trainer.batches.next = lambda step, timer: TrainBatch(make_samples(LENGTHS), {})
    return written


def test_a_signal_during_a_validation_ends_the_run_with_a_checkpoint(
    worker: PolicyWorker, tiny_model: Path, tmp_path: Path
) -> None:
    """However it comes: the steps since the last checkpoint are not lost."""
    overrides = ["trainer.test_freq=1", f"data.val_files={tmp_path}/data.parquet"]
    trainer = make_trainer(tiny_model, tmp_path, *overrides)
    assert prepare(trainer, worker) == []

    def validation(step: int) -> list[Sample]:
        trainer.stop.number = signal.SIGTERM
        return make_samples([2, 3], extras={"acc": 1.0})

    trainer.batches.validation = validation
    trainer.fit()
    assert trainer.state.step == 1
    assert trainer.checkpoints.latest == tmp_path / "global_step_1"
    assert not trainer.state.validation_due


TWO_STEPS = "trainer.total_training_steps=2"


@pytest.mark.parametrize("every", [1, 2, 5])
def test_the_last_checkpoint_comes_before_the_export(
    every: int, worker: PolicyWorker, tiny_model: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_model, tmp_path, TWO_STEPS, f"trainer.save_freq={every}")
    written = prepare(trainer, worker)
    trainer.fit()
    assert written == [*["save"] * (2 if every == 1 else 1), "save_hf"]
    assert trainer.checkpoints.latest == tmp_path / "global_step_2"


@pytest.mark.parametrize("save_freq", [-1, 2])
def test_after_a_failed_export_nothing_is_trained_again(
    save_freq: int,
    worker: PolicyWorker,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overrides = [TWO_STEPS, f"trainer.save_freq={save_freq}"]
    trainer = make_trainer(tiny_model, tmp_path, *overrides)
    written = prepare(trainer, worker)
    save_hf, latest = worker.save_hf, tmp_path / "global_step_2"
    monkeypatch.setattr(worker, "save_hf", lambda folder, *args: save_hf("/proc/no/where", *args))
    with pytest.raises(OSError, match="/proc/no"):
        trainer.fit()
    monkeypatch.undo()
    assert written == (["save_hf", "save"] if save_freq < 0 else ["save", "save_hf"])
    assert trainer.how_to_resume == (
        f"the same command goes on from {latest}: only the export is left (or `python -m "
        f"verl.trainer.main_export {latest}`)"
    )
    # The same command exports, and so does the other one.
    again = make_trainer(tiny_model, tmp_path, *overrides)
    written = prepare(again, worker)
    again.fit()
    assert written == ["save_hf"] and again.state.step == 2
    command = [sys.executable, "-m", "verl.trainer.main_export", latest, "-o", tmp_path / "two"]
    subprocess.run(command, check=True)
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("huggingface", "two")
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_signal_during_the_export_waits_for_it_and_for_a_checkpoint(
    worker: PolicyWorker, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_model, tmp_path, TWO_STEPS)
    written, save_hf = prepare(trainer, worker), worker.save_hf

    def interrupted(*args: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        save_hf(*args)

    monkeypatch.setattr(worker, "save_hf", interrupted)
    trainer.stop.install()
    try:
        trainer.fit()
    finally:
        trainer.stop.restore()
    assert written == ["save_hf", "save"] and trainer.stop.number == signal.SIGTERM
    assert (tmp_path / "huggingface" / "model.safetensors").exists()
    assert trainer.checkpoints.latest == tmp_path / "global_step_2"


def test_an_error_that_nobody_knows_costs_no_step_either(
    worker: PolicyWorker, tiny_model: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_model, tmp_path, TWO_STEPS)
    written, given = prepare(trainer, worker), trainer.batches.next

    def fails(step: int, timer: Timer) -> TrainBatch:
        if step == 2:
            raise RuntimeError("an engine's")
        return given(step, timer)

    trainer.batches.next = fails
    with pytest.raises(RuntimeError, match="an engine's"):
        trainer.fit()
    assert written == ["save"]
    assert trainer.how_to_resume == f"the same command goes on from {tmp_path}/global_step_1"


def test_an_evaluation_asks_for_nothing_that_only_training_needs(
    worker: PolicyWorker, tiny_model: Path, tmp_path: Path
) -> None:
    """A checkpoint whose training files are gone is validated beside the run, which stays as it is.
    Groups that it carries over stay there, and no reference is loaded."""
    carrying = "algorithm.filter_groups={enable:True,metric:acc}"
    trainer = make_trainer(tiny_model, tmp_path, TWO_STEPS, "trainer.save_freq=1", carrying)
    prepare(trainer, worker)
    trainer.batches.carried = split_groups(
        make_samples([1, 2], extras={"acc": 1.0}, prompt=trainer.batches.prompts[0])
    )
    trainer.fit()
    (tmp_path / "data.parquet").rename(tmp_path / "test.parquet")
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for step, mode in ((2, "auto"), (1, "resume_path")):
        config = load_config(
            [
                "trainer.val_only=True",
                "data.train_files=null",
                f"data.val_files={tmp_path}/test.parquet",
                "data.train_batch_size=7",
                "data.apply_chat_template=False",
                "data.max_response_length=10",
                f"actor_rollout_ref.model.path={tiny_model}",
                "actor_rollout_ref.actor.ppo_mini_batch_size=3",
                "actor_rollout_ref.actor.use_kl_loss=True",
                "actor_rollout_ref.rollout.n=1",
                "actor_rollout_ref.rollout.do_sample=False",
                f"trainer.default_local_dir={tmp_path}",
                f"trainer.resume_mode={mode}",
                f"trainer.resume_from_path={tmp_path}/global_step_{step}",
            ]
        )
        evaluation = RayPPOTrainer(config, trainer.tokenizer)
        assert prepare(evaluation, worker) == [] and evaluation.batches.prompts == []
        assert not needs_reference(config)
        evaluation.batches.validation = lambda step: make_samples([2, 3], extras={"acc": 1.0})
        evaluation.fit()
        (line,) = read_metrics(tmp_path / "val_only" / "metrics.jsonl")
        assert line["step"] == step and line["val-core/countdown/acc/mean@2"] == 1
        assert {p: p.read_bytes() for p in files} == files
    new = {p for p in tmp_path.rglob("*") if p.is_file()} - set(files)
    assert {p.relative_to(tmp_path).parts[0] for p in new} == {"val_only"}
