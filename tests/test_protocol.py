"""Samples on their way to another process: nothing is lost, and no token array is copied twice."""

import pickle
from dataclasses import fields

import numpy as np
import pytest

from tests.helpers import make_samples
from verl.protocol import ARRAYS, OptimizerStep, Sample, SampleBatch, response_lengths


def sent(value: object) -> tuple[object, list[pickle.PickleBuffer]]:
    """What arrives, and the buffers that travelled beside the pickle."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[bytes(b.raw()) for b in buffers]), buffers


def equal(a: Sample, b: Sample, but: tuple[str, ...] = ("prompt",)) -> None:
    for f in fields(Sample):
        if f.name not in but:
            np.testing.assert_equal(getattr(a, f.name), getattr(b, f.name), f.name)


def test_a_batch_arrives_as_the_list_that_was_sent() -> None:
    samples = make_samples([3, 0, 7, 1], finish_reason="length", response_index=2, policy_version=5)
    samples[1].ref_log_probs = samples[2].rollout_log_probs = None
    samples[1].prompt = samples[0].prompt
    samples[3].extras = {"acc": 1.0, "pred": None}
    arrived, _ = sent(SampleBatch(samples))
    assert type(arrived) is list and len(arrived) == 4
    for a, b in zip(arrived, samples, strict=True):
        equal(a, b)
        assert a.response_ids.dtype == np.int32
        assert a.prompt.index == b.prompt.index
        np.testing.assert_array_equal(a.prompt.token_ids, b.prompt.token_ids)
    assert arrived[0].prompt is arrived[1].prompt  # still one object for a group's samples
    assert sent(SampleBatch([]))[0] == []


def test_a_batch_without_buffers_beside_the_pickle() -> None:
    samples = make_samples([3, 0])
    for a, b in zip(
        pickle.loads(pickle.dumps(SampleBatch(samples), protocol=5)), samples, strict=True
    ):
        equal(a, b)


def test_arrays_that_nobody_reads_stay_behind() -> None:
    samples = make_samples([3, 5])
    arrived, buffers = sent(SampleBatch(samples, omit=("old_log_probs", "rollout_log_probs")))
    assert (
        [a.old_log_probs for a in arrived] == [a.rollout_log_probs for a in arrived] == [None] * 2
    )
    for a, b in zip(arrived, samples, strict=True):
        equal(a, b, but=("prompt", "old_log_probs", "rollout_log_probs"))
    # 8 response ids and 8 float32 log-probabilities, and prompts of 5 and 6 tokens.
    assert sum(b.raw().nbytes for b in buffers) == 8 * 4 + 8 * 4 + (5 + 6) * 8


def test_slices_and_other_dtypes_travel_as_the_declared_ones() -> None:
    samples = make_samples([4])
    samples[0].response_ids = np.arange(8)[::2]
    samples[0].old_log_probs = np.arange(8.0)[::2]
    (arrived,), _ = sent(SampleBatch(samples))
    assert arrived.response_ids.dtype == np.int32 and arrived.old_log_probs.dtype == np.float32
    np.testing.assert_array_equal(arrived.response_ids, [0, 2, 4, 6])
    np.testing.assert_array_equal(arrived.old_log_probs, [0, 2, 4, 6])


@pytest.mark.parametrize("name", ARRAYS)
def test_the_message_takes_its_numbers_from_the_arrays_themselves(name: str) -> None:
    samples = make_samples([3, 6])
    for sample in samples:
        sample.loss_mask, sample.selected, sample.frozen = np.ones((3, sample.length), bool)
        sample.token_versions = np.zeros(sample.length, np.int32)
        for other in ("token_rewards", "values", "returns", "token_advantages"):
            setattr(sample, other, np.zeros(sample.length, np.float32))
    _, buffers = sent(SampleBatch(samples))
    memory = [np.frombuffer(b, np.uint8) for b in buffers]
    for sample in samples:
        array = getattr(sample, name)
        assert sum(np.shares_memory(array, m) for m in memory) == 1


def test_a_share_of_an_optimizer_step_keeps_each_response_with_its_weight() -> None:
    step = OptimizerStep(make_samples([3, 0, 7]), np.array([0.1, 0.0, 0.3], np.float32))
    (arrived, _), empty = sent(step.share([2, 0])), step.share([])
    assert [s.length for s in arrived.samples] == [7, 3]
    np.testing.assert_array_equal(arrived.weights, np.array([0.3, 0.1], np.float32))
    assert empty.samples == [] and len(empty.weights) == 0


def test_lengths_count_the_tokens_of_the_loss_mask() -> None:
    samples = make_samples([3, 4])
    samples[1].loss_mask = np.array([True, False, False, True])
    assert response_lengths(samples).tolist() == [s.length for s in samples] == [3, 2]
    assert samples[1].num_tokens == len(samples[1].prompt.token_ids) + 4
    assert samples[1].counted(np.arange(4)).tolist() == [0, 3]
    assert samples[0].counted(np.arange(3)).tolist() == [0, 1, 2]


def test_a_batch_is_asked_for_its_lengths_once() -> None:
    batch = SampleBatch(make_samples([3, 0, 4]))
    batch[2].loss_mask = np.array([True, False, False, True])
    assert response_lengths(batch).tolist() == response_lengths(list(batch)).tolist() == [3, 0, 2]
    assert response_lengths(batch) is batch.lengths
    assert response_lengths([]).dtype == response_lengths(SampleBatch([])).dtype == np.int64
