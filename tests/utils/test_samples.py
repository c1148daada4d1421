"""Samples in a checkpoint: what a reward function returned means the same after a resume."""

from collections.abc import Callable
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.helpers import make_samples, make_tokenizer
from verl.protocol import OptimizerStep, Sample
from verl.trainer.ppo.metrics import data_metrics
from verl.utils.samples import (
    plain,
    read_samples,
    some_generations,
    write_responses,
    write_samples,
)

Resumed = Callable[[list[Sample]], list[Sample]]


@pytest.fixture
def resumed(tmp_path: Path) -> Resumed:
    """What is read of samples that were written."""

    def write_and_read(samples: list[Sample]) -> list[Sample]:
        write_samples(tmp_path / "samples.feather", samples)
        return read_samples(tmp_path / "samples.feather", [s.prompt for s in samples])

    return write_and_read


def test_extras_of_every_kind_can_be_saved(resumed: Resumed) -> None:
    samples = make_samples([2])
    samples[0].extras = plain(
        {
            "acc": 1.0,
            "correct": np.bool_(True),
            "count": np.int64(3),
            "f": Fraction(1, 4),
            "long": np.longdouble(0.5),
            "pred": [Fraction(1, 2), (3, "x"), None],
            "parts": {1: np.float32(0.5), (2, 3): {None: Decimal("0.1")}},
            "array": np.array([1, 2]),
            7: True,
        }
    )
    assert resumed(samples)[0].extras == {
        "acc": 1.0,
        "correct": True,
        "count": 3,
        "f": 0.25,
        "long": 0.5,
        "pred": [0.5, [3, "x"], None],
        "parts": {"1": 0.5, "(2, 3)": {"None": "0.1"}},
        "array": "[1 2]",
        "7": True,
    }


def test_metrics_are_the_same_after_a_resume(resumed: Resumed) -> None:
    samples = make_samples([2, 3])
    for sample, numerator in zip(samples, (1, 3), strict=True):
        sample.extras = plain({"acc": np.float32(1), "f": Fraction(numerator, 4), "ok": True})
        sample.advantage, sample.prompt = 0.0, samples[0].prompt
    before = data_metrics(samples, 16)
    assert before["reward/f"] == 0.5
    assert data_metrics(resumed(samples), 16) == before


def test_token_arrays_are_the_same_after_a_resume(resumed: Resumed) -> None:
    samples = make_samples([3, 0, 5, 2])
    samples[0].response_ids = np.array([2**31 - 1, 0, -1])
    samples[2].rollout_log_probs = None
    samples[0].loss_mask = np.array([True, False, True])
    samples[1].loss_mask = np.array([], bool)
    for before, after in zip(samples, resumed(samples), strict=True):
        np.testing.assert_array_equal(after.response_ids, before.response_ids)
        assert after.response_ids.dtype == np.int32
        for name, dtype in (("rollout_log_probs", np.float32), ("loss_mask", np.bool_)):
            old, new = getattr(before, name), getattr(after, name)
            assert (old is None) == (new is None)
            if old is not None:
                np.testing.assert_array_equal(new, old)
                assert new.dtype == dtype
    assert resumed([]) == []


def test_responses_for_people_are_texts(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    (sample,) = make_samples([2])
    sample.prompt.token_ids = np.array(tokenizer.encode("7 * 3"))
    sample.prompt.ground_truth = {"target": np.int64(21)}
    sample.response_ids = np.array(tokenizer.encode("21 <eos>"))
    sample.extras, sample.score = {"acc": 1.0, "pred": 21}, 1.0
    steps = [OptimizerStep([sample], np.array([w], np.float32)) for w in (0.25, 0.5)]
    write_responses(tmp_path / "new", 3, [sample], tokenizer, steps)
    (row,) = pq.read_table(tmp_path / "new" / "3.parquet").to_pylist()
    assert (row["step"], row["prompt"], row["response"]) == (3, "7 * 3", "21")
    assert (row["answer"], row["ground_truth"], row["extras"]) == (
        "21",
        '{"target": 21}',
        '{"acc": 1.0, "pred": 21}',
    )
    assert (row["score"], row["weight"], row["prompt_length"], row["response_length"]) == (
        1.0,
        0.25,
        3,
        2,
    )


def test_responses_have_a_weight_where_a_step_gave_them_one(tmp_path: Path) -> None:
    first, second, unused = make_samples([2, 3, 4])
    steps = [OptimizerStep([second, first], np.array([0.5, 0.25], np.float32))]
    write_responses(tmp_path, 1, [first, second, unused], make_tokenizer(), steps)
    assert pq.read_table(tmp_path / "1.parquet")["weight"].to_pylist() == [0.25, 0.5, None]
    write_responses(tmp_path, 2, [first], make_tokenizer())
    assert "weight" not in pq.read_table(tmp_path / "2.parquet").column_names


def test_all_of_a_sample_is_read_again(resumed: Resumed) -> None:
    first, second = make_samples([2, 3])
    second.prompt = first.prompt
    first.loss_mask, first.ref_log_probs = np.array([True, False]), np.zeros(2, np.float32)
    second.score, second.reward, second.advantage = 0.5, 0.25, np.nan
    for before, after in zip((first, second), resumed([first, second]), strict=True):
        for name in (f.name for f in fields(Sample)):
            np.testing.assert_equal(getattr(after, name), getattr(before, name), name)


def test_each_validation_shows_the_same_prompts() -> None:
    tokenizer = make_tokenizer()
    first, second = (make_samples([2] * 12, seed=seed) for seed in (1, 2))
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        a.prompt.token_ids = b.prompt.token_ids = np.array(tokenizer.encode(f"{i} ="))
        a.score, b.score = float(i), -float(i)
    shown, later = (some_generations(samples, 4, tokenizer) for samples in (first, second))
    prompts = [prompt for prompt, _, _ in shown]
    assert prompts == [prompt for prompt, _, _ in later] and len(set(prompts)) == 4
    assert prompts != [f"{i} =" for i in range(4)]
    for (prompt, response, score), (_, _, negative) in zip(shown, later, strict=True):
        i = int(prompt.split()[0])
        assert (score, negative) == (i, -i)
        assert response == tokenizer.decode(first[i].response_ids[:1])  # without the stop token
    assert len(some_generations(first, 99, tokenizer)) == 12
    assert some_generations(first, 0, tokenizer) == []


def test_an_id_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    samples = make_samples([2])
    samples[0].response_ids = np.array([0, 2**31])
    with pytest.raises(ValueError, match="2147483648"):
        write_samples(tmp_path / "samples.parquet", samples)
