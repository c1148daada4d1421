"""Metrics of training and validation, on numbers worked out by hand."""

from itertools import combinations
from math import sqrt

import numpy as np
import pytest

from verl.protocol import Prompt, Sample
from verl.trainer.ppo.metrics import (
    age_metrics,
    best_of,
    data_metrics,
    loss_agg_metrics,
    majority_of,
    speed_metrics,
    validation_metrics,
    validation_scores,
)


def sample(length, prompt_length=3, group=0, source="countdown", finish="stop", **fields):
    prompt = Prompt(group, np.arange(prompt_length), source, ground_truth=None)
    return Sample(prompt, group, np.arange(length), finish, **fields)


def answers(group, accs, preds=None, source="countdown"):
    """One prompt's responses in a validation."""
    preds = preds or [None] * len(accs)
    extras = [{"acc": a} | ({"pred": p} if p else {}) for a, p in zip(accs, preds, strict=True)]
    return [sample(4, group=group, source=source, score=2 * e["acc"], extras=e) for e in extras]


BATCH = [
    sample(2, 4, score=1.0, reward=0.5, advantage=1.5, extras={"acc": True, "pred": 7}),
    sample(6, 8, score=0.0, reward=-1.0, advantage=-0.5, finish="length", extras={"acc": False}),
]


def test_data_metrics_are_per_response():
    m = data_metrics(BATCH, max_prompt_length=8)
    assert [m[f"critic/score/{f}"] for f in ("mean", "max", "min")] == [0.5, 1.0, 0.0]
    assert [m[f"critic/rewards/{f}"] for f in ("mean", "max", "min")] == [-0.25, 0.5, -1.0]
    # By tokens it would be (2·1.5 − 6·0.5)/8 = 0.
    assert [m[f"critic/advantages/{f}"] for f in ("mean", "max", "min")] == [0.5, 1.5, -0.5]
    assert [m[f"critic/returns/{f}"] for f in ("mean", "max", "min")] == [0.5, 1.5, -0.5]
    assert [m[f"response_length/{f}"] for f in ("mean", "max", "min")] == [4, 6, 2]
    assert m["response_length/cv"] == 2 / 4
    assert [m[f"prompt_length/{f}"] for f in ("mean", "max", "min")] == [6, 8, 4]
    assert m["prompt_length/clip_ratio"] == 0.5
    assert all(type(v) is float for v in m.values())


def test_clip_ratio_counts_truncated_responses_not_full_columns():
    full_but_finished, cut = sample(8, finish="stop"), sample(8, finish="length")
    m = data_metrics([full_but_finished, full_but_finished, cut, sample(1)], 16)
    assert m["response_length/clip_ratio"] == m["response_length_non_aborted/clip_ratio"] == 0.25


def test_responses_that_ended_at_once_are_left_out_of_those_not_aborted():
    m = data_metrics([sample(0), sample(2), sample(6, finish="length"), sample(0)], 16)
    assert m["response/aborted_ratio"] == 0.5 and m["response_length/mean"] == 2
    found = [m[f"response_length_non_aborted/{f}"] for f in ("mean", "max", "min", "clip_ratio")]
    assert found == [4, 6, 2, 0.5]
    assert [m[f"num_turns/{f}"] for f in ("mean", "max", "min")] == [2, 2, 2]
    nothing = data_metrics([sample(0)], 16)
    assert nothing["response/aborted_ratio"] == 1
    assert not [name for name in nothing if "non_aborted" in name]


def test_numeric_extras_are_averaged_over_the_responses_that_have_them():
    batch = [
        sample(1, extras={"acc": True, "overlong_reward": -0.5, "pred": 24, "why": "ok"}),
        sample(1, extras={"acc": np.bool_(False), "format": np.float32(0.25), "pred": None}),
    ]
    m = {k: v for k, v in data_metrics(batch, 16).items() if k.startswith("reward/")}
    assert m == {"reward/acc": 0.5, "reward/overlong_reward": -0.5, "reward/format": 0.25}


def test_responses_of_no_tokens():
    m = data_metrics([sample(0)], 16)
    assert m["response_length/mean"] == 0 and m["response_length/cv"] == 0
    assert timings([sample(0)], {"gen": 1.0, "step": 1.0}) == {
        "timing_s/gen": 1.0,
        "timing_s/step": 1.0,
    }


def timings(samples, seconds, **options):
    """What `speed_metrics` says about the phases."""
    metrics = speed_metrics(samples, seconds, num_devices=2, **options)
    return {name: value for name, value in metrics.items() if name.startswith("timing_")}


def test_timing_per_token():
    # 8 response tokens, 12 prompt tokens.
    m = timings(BATCH, {"gen": 4.0, "update_actor": 5.0, "reward": 1.0, "step": 10.0})
    assert m == {
        "timing_s/gen": 4.0,
        "timing_s/update_actor": 5.0,
        "timing_s/reward": 1.0,
        "timing_s/step": 10.0,
        "timing_per_token_ms/gen": 500.0,
        "timing_per_token_ms/update_actor": 250.0,
    }


def test_generation_has_no_price_per_token_where_other_responses_are_generated():
    m = timings(BATCH, {"gen": 4.0, "update_actor": 5.0, "step": 9.0}, filtering=True)
    assert m == {
        "timing_s/gen": 4.0,
        "timing_s/update_actor": 5.0,
        "timing_s/step": 9.0,
        "timing_per_token_ms/update_actor": 250.0,
    }


def test_throughput_is_per_device():
    assert speed_metrics(BATCH, {"step": 5.0}, num_devices=2) == {
        "timing_s/step": 5.0,
        "perf/total_num_tokens": 20.0,
        "perf/time_per_step": 5.0,
        "perf/throughput": 2.0,
    }


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_best_of_is_the_mean_over_all_subsets(k):
    values = [0.5, -1.0, 2.0, 0.5, 0.0]
    subsets = list(combinations(values, k))
    assert best_of(values, k) == pytest.approx(sum(map(max, subsets)) / len(subsets))


def test_best_of_zero_one_values_is_pass_at_k():
    # 1 − C(3, 2)/C(4, 2) = 1/2
    assert best_of([0, 0, 1, 0], 2) == pytest.approx(0.5)
    assert best_of([0] * 999 + [1], 500) == pytest.approx(0.5)


def test_validation_names_and_values():
    a, b = "12+12", "8*3"
    samples = [
        *answers(0, [1, 0, 0, 0], [a, b, b, a]),  # a tie: the answers' first values are 1 and 0
        *answers(1, [0, 1, 1, 1], [a, b, b, a]),
    ]
    assert validation_metrics(samples) == pytest.approx(
        {
            "val-core/countdown/acc/mean@4": 0.5,
            "val-core/countdown/acc/best@4/mean": 1.0,
            "val-core/countdown/acc/best@4/std": 0.0,
            "val-core/countdown/acc/maj@4/mean": 0.5,
            "val-aux/countdown/acc/std@4": sqrt(3) / 4,
            # One of four right: 1/2 of the pairs hold it. Three of four: every pair does.
            "val-aux/countdown/acc/best@2/mean": 0.75,
            "val-aux/countdown/acc/best@2/std": 0.25,
            "val-aux/countdown/acc/maj@2/mean": 0.5,
            "val-aux/countdown/reward/mean@4": 1.0,
            "val-aux/countdown/response_length/mean": 4.0,
            "val-aux/countdown/response_length/clip_ratio": 0.0,
        }
    )


def test_scores_take_the_place_of_accuracies_that_a_reward_model_does_not_give():
    samples = answers(0, [1, 0]) + answers(1, [1, 1])
    for sample, score in zip(samples, (0.5, -1.5, 2.0, 3.0), strict=True):
        sample.score = score
        del sample.extras["acc"]
    found = validation_metrics(samples)
    del found["val-aux/countdown/response_length/mean"]
    assert found == {
        "val-core/countdown/reward/mean@2": 1.0,
        "val-core/countdown/reward/best@2/mean": 1.75,
        "val-core/countdown/reward/best@2/std": 0.0,
        "val-aux/countdown/reward/std@2": 0.75,
        "val-aux/countdown/response_length/clip_ratio": 0.0,
    }
    assert validation_scores(found) == {}


def test_majority_of_some_is_the_mean_over_subsets():
    votes, right = ["x", "y", "x", "z", "x", "y"], np.array([1.0, 0, 1, 0, 1, 0])
    # Of 20 triples: xxx 1; xxy, xxz 3·3 = 9; yy with x or z 4; xyz 3·2·1 = 6, x in a third.
    assert majority_of(votes, right, 3) == pytest.approx((1 + 9 + 6 / 3) / 20)
    assert majority_of(votes, right, 6) == 1
    assert majority_of(["y", "x"], np.array([0.0, 1.0]), 2) == 0.5
    # Of 32 with half of them right, 2,000 of the 10,518,300 eights are right as often as not.
    many = majority_of(["x", "y"] * 16, np.array([1.0, 0] * 16), 8)
    assert many == pytest.approx(0.5, abs=0.03)


def test_the_spread_of_the_best():
    # Of the pairs of 0, 1, 3: maxima 1, 3, 3.
    assert best_of([0, 1, 3], 2) == pytest.approx(7 / 3)
    assert best_of([0, 1, 3], 2, power=2) == pytest.approx(19 / 3)
    m = validation_metrics(answers(0, [0, 1, 3]))
    assert m["val-aux/countdown/acc/best@2/std"] == pytest.approx(sqrt(19 / 3 - 49 / 9))


def test_majority_outvotes_the_first_answer():
    m = validation_metrics(answers(0, [1, 0, 0], ["x", "y", "y"]))
    assert m["val-core/countdown/acc/maj@3/mean"] == 0.0


def test_no_majority_without_answers_and_none_of_one():
    m = validation_metrics(answers(0, [1, 0]) + answers(1, [1, 1], ["x", "y"]))
    assert not [name for name in m if "maj@" in name]
    assert m["val-core/countdown/acc/best@2/mean"] == 1.0
    core = [n for n in validation_metrics(answers(0, [1], ["x"])) if n.startswith("val-core")]
    assert core == ["val-core/countdown/acc/mean@1"]


def test_every_source_stands_alone():
    m = validation_metrics(answers(0, [1]) + answers(1, [0]) + answers(2, [0], source="openai/gsm"))
    assert m["val-core/countdown/acc/mean@1"] == 0.5
    assert m["val-core/openai/gsm/acc/mean@1"] == 0.0


def test_accuracy_is_the_core_variable_and_the_score_stands_beside_it():
    one = sample(2, score=0.25, extras={"acc": 1.0})
    m = validation_metrics([one, sample(4, score=0.75, finish="length", extras={"acc": 0.0})])
    assert m["val-core/countdown/acc/mean@2"] == 0.5
    assert m["val-core/countdown/acc/best@2/mean"] == 1.0
    assert m["val-aux/countdown/reward/mean@2"] == 0.5
    assert m["val-aux/countdown/response_length/clip_ratio"] == 0.5
    assert {name for name in m if "/reward/" in name} == {"val-aux/countdown/reward/mean@2"}


def test_equal_group_numbers_of_two_rollout_batches_stay_apart():
    samples = answers(0, [1, 0]) + answers(1, [0, 0])
    for s in samples:
        s.group = 0
    assert validation_metrics(samples)["val-core/countdown/acc/best@2/mean"] == 0.5


def test_loss_agg_metrics():
    weights = {
        "seq-mean-token-mean": np.array([1 / 2, 1 / 8]),
        "dr-grpo": np.array([1.0, 1.0]),
        "nothing": np.zeros(2),
    }
    m = loss_agg_metrics([2, 8], weights, "seq-mean-token-mean")
    assert m == pytest.approx(
        {
            "loss_agg/cv": sqrt(1 / 4 * 2 + 1 / 64 * 8) / (5 / 8),
            "loss_agg/cv/dr-grpo": sqrt(10) / 2,
            "loss_agg/effective_batch": (5 / 8) ** 2 / (17 / 64),
        }
    )


def test_loss_agg_metrics_do_not_depend_on_scale_and_drop_zero_weights():
    w = np.array([3.0, 1.0, 0.0])
    m = loss_agg_metrics([4, 4, 100], {"a": w, "b": 1e-6 * w}, "a")
    assert m["loss_agg/cv"] == pytest.approx(m["loss_agg/cv/b"])
    assert m["loss_agg/cv"] == pytest.approx(sqrt(10 * 4) / 4)
    assert m["loss_agg/effective_batch"] == pytest.approx(1.6)
    assert loss_agg_metrics([4], {"a": [0.0]}, "a") == {}


def test_weights_inverse_to_length_have_the_smallest_cv():
    lengths = np.array([10, 100, 1000])
    weights = {str(alpha): lengths**-alpha for alpha in (0.0, 0.5, 0.75, 1.0)}
    m = loss_agg_metrics(lengths, weights, "1.0")
    others = [v for k, v in m.items() if k.startswith("loss_agg/cv/")]
    assert len(others) == 3 and all(m["loss_agg/cv"] < v for v in others)


def test_cv_describes_simulated_gradients():
    rng = np.random.default_rng(0)
    lengths, w = np.array([1, 4, 16]), np.array([1.0, 0.5, 0.1])
    # g_i has mean 1 and variance L_i, as a sum over L_i tokens would.
    g = 1 + rng.normal(size=(200_000, 3)) * np.sqrt(lengths)
    total = g @ w
    measured = total.std() / total.mean()
    assert loss_agg_metrics(lengths, {"a": w}, "a")["loss_agg/cv"] == pytest.approx(
        measured, rel=0.02
    )


def test_ages_are_those_of_tokens() -> None:
    """Three tokens of version 5; two of 3 and two of 4: ages 2 × 3, 4, 4, 3, 3 at version 7."""
    new, mixed = sample(3, policy_version=5), sample(4, policy_version=3)
    mixed.token_versions = np.array([3, 3, 4, 4], np.int32)
    assert age_metrics([new, mixed], 7) == {
        "rollout/policy_age_mean": pytest.approx(20 / 7),
        "rollout/policy_age_max": 4.0,
    }
