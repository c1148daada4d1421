"""A critic's values are those of plain transformers, and its gradient is one sum over responses."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForSequenceClassification

from tests.helpers import free_address, make_samples, make_tiny_model, make_tiny_reward_model
from tests.models.test_policy import distance, gradient_and_sums, log_probs_of, weighted_step
from verl.algorithms.losses import LossConfig
from verl.config.base import CriticModelConfig, FSDPConfig, OptimConfig
from verl.models.policy import MicroBatchLimit, PolicyWorker
from verl.models.score import check_score_model
from verl.protocol import OptimizerStep, Sample

LENGTHS = [3, 9, 0, 1, 20, 7, 12, 2]
LIMITS = [MicroBatchLimit(1), MicroBatchLimit(3), MicroBatchLimit(9), MicroBatchLimit(None, 40)]
LOSS = LossConfig(kind="value", cliprange_value=0.2)
ONE_LABEL = {"num_labels": 1}

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a head of one number."""
    return make_tiny_reward_model(tmp_path_factory.mktemp("critic"), "Qwen2")


def build(folder: Path, packed: bool = True, split: int = 1, lr: float = 1e-3) -> PolicyWorker:
    worker = PolicyWorker("cpu")
    model = CriticModelConfig(
        path=str(folder), use_remove_padding=packed, override_config=ONE_LABEL
    )
    worker.build_beside("critic", model, FSDPConfig(), OptimConfig(lr=lr), 10, split)
    return worker.beside["critic"]


def step_with_values() -> OptimizerStep:
    """One response has tokens of a tool, which have no value. Some values move too far."""
    samples, rng = make_samples(LENGTHS), np.random.default_rng(1)
    samples[4].loss_mask = np.arange(20) % 5 != 2
    for s in samples:
        s.values, s.returns = rng.normal(0, 0.5, (2, len(s.response_ids))).astype(np.float32)
    return weighted_step("delta-l", samples)


def plain_values(folder: Path, sample: Sample) -> torch.Tensor:
    """By transformers' own forward pass of one response, of tokens that count, [L]."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval().double()
    ids = torch.tensor(np.concatenate([sample.prompt.token_ids, sample.response_ids]))[None]
    hidden = model.model(ids).last_hidden_state[0, len(sample.prompt.token_ids) - 1 : -1]
    values = hidden @ model.score.weight[0]
    return values if sample.loss_mask is None else values[torch.tensor(sample.loss_mask)]


@pytest.mark.parametrize("packed", [True, False])
def test_values_and_gradient_are_those_of_transformers(packed: bool, folder: Path) -> None:
    critic, step = build(folder, packed), step_with_values()
    expected, total = [], torch.zeros((), dtype=torch.float64)
    for s, w in zip(step.samples, step.weights.tolist(), strict=True):
        assert s.values is not None and s.returns is not None
        V = plain_values(folder, s)
        expected.append(V.detach().numpy())
        old, R = (torch.tensor(s.counted(x)).double() for x in (s.values, s.returns))
        near = torch.minimum(torch.maximum(V.detach(), old - 0.2), old + 0.2)
        worse = (near - R).abs() > (V.detach() - R).abs()
        total = total + w / 2 * torch.where(worse, near - R, V - R).square().sum()
    for limit in LIMITS:
        found = log_probs_of(critic, step.samples, 1.0, limit)
        for s, values, theirs in zip(step.samples, found, expected, strict=True):
            np.testing.assert_allclose(s.counted(values), theirs, atol=1e-5)
        sums = gradient_and_sums(critic, step, limit, LOSS)[1]
        assert sums["w/vf_loss"] == pytest.approx(total.item(), rel=1e-5)
        assert 0 < sums["vf_clipfrac"] < sums["tokens"]
    first, *others = (gradient_and_sums(critic, step, limit, LOSS)[0] for limit in LIMITS)
    assert all(distance(other, first) < 1e-6 for other in others)


def test_the_gradient_is_that_of_finite_differences(folder: Path) -> None:
    """Of the head's weights, in which the values are linear."""
    critic, step = build(folder), step_with_values()

    def loss_at(move: float) -> float:
        weight = critic.model.lm.score.weight.data.to_local()
        weight[0, 7] += move
        found = gradient_and_sums(critic, step, LIMITS[1], LOSS)[1]["w/vf_loss"]
        weight[0, 7] -= move
        return found

    gradient_and_sums(critic, step, LIMITS[1], LOSS)
    slope = critic.model.lm.score.weight.grad.full_tensor()[0, 7].item()
    assert slope == pytest.approx((loss_at(1e-2) - loss_at(-1e-2)) / 2e-2, rel=1e-2)


def _rank_learns(rank: int, address: str, folder: Path, out: Path) -> None:
    """One of two processes: with its own responses, and with a half of each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    step, found = step_with_values(), {}
    for split in (1, 2):
        critic = build(folder, split=split)
        mine = step if split == 2 else step.share(range(rank, len(LENGTHS), 2))
        for i, limit in enumerate(LIMITS):
            found[split, i] = gradient_and_sums(critic, mine, limit, LOSS)[0]
    if rank == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as in test_policy.py


def test_neither_ranks_nor_split_sequences_change_the_gradient(
    folder: Path, tmp_path: Path
) -> None:
    mp.spawn(_rank_learns, (free_address(), folder, tmp_path / "found"), nprocs=2)
    expected = gradient_and_sums(build(folder), step_with_values(), LIMITS[2], LOSS)[0]
    found = torch.load(tmp_path / "found", weights_only=True)
    assert len(found) == 2 * len(LIMITS)
    assert max(distance(gradient, expected) for gradient in found.values()) < 1e-6


def test_the_head_of_a_language_model_begins_at_zero_and_learns(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "lm")
    model = CriticModelConfig(path=str(folder), override_config=ONE_LABEL)
    check_score_model(model, 100, vocabulary=110)
    with pytest.raises(ValueError, match=r"critic\.model\.path=.* knows \d+ tokens, and the"):
        check_score_model(model, 100, vocabulary=10**6)
    with pytest.raises(ValueError, match="attention heads: take a number that divides them"):
        check_score_model(model, 100, split=3)
    critic, step = build(folder, lr=1e-2), step_with_values()
    assert not critic.log_probs(step.samples, 1.0, LIMITS[2]).any()
    losses = [critic.update([step], LOSS, LIMITS[2], 1.0)[0]["w/vf_loss"] for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]
    critic.save(tmp_path / "saved")
    again = build(folder)
    assert again.load(tmp_path / "saved") == {"model", "optimizer"}
    values = [c.log_probs(step.samples, 1.0, LIMITS[0]) for c in (critic, again)]
    np.testing.assert_array_equal(*values)
