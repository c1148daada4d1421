"""Optimizer steps that were skipped, and engines that disagree with the actor."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.helpers import make_samples, make_step
from verl.config.load import load_config
from verl.trainer.ppo.checks import count_skipped, warn_of_disagreement


def flags(*skipped: int) -> list[list[dict[str, float]]]:
    """What two ranks say about as many mini-batches."""
    return [[{"skipped": float(s), "tokens": 1.0} for s in skipped] for _ in range(2)]


def test_skipped_steps_are_counted_and_three_in_a_row_stop_the_run(tmp_path: Path) -> None:
    samples = make_samples([3, 0, 2])
    samples[0].old_log_probs[1] = np.nan
    samples[0].extras = {"acc": 1.0}
    step, dump = make_step(samples), tmp_path / "dump.parquet"
    in_a_row = 0
    for ranks, expected in ((flags(1, 1, 0), 0), (flags(0, 1), 1), (flags(1), 2)):
        in_a_row = count_skipped(ranks, in_a_row, 3, [step], dump)
        assert in_a_row == expected
    assert not dump.exists()
    with pytest.raises(FloatingPointError, match=rf"max_skipped_steps=3.*{dump}"):
        count_skipped(flags(1), in_a_row, 3, [step.share([0, 1]), step.share([2])], dump)
    rows = pq.read_table(dump).to_pylist()
    assert [row["response_ids"] for row in rows] == [s.response_ids.tolist() for s in samples]
    assert np.isnan(rows[0]["old_log_probs"][1]) and rows[0]["extras"] == '{"acc": 1.0}'
    assert [row["prompt_index"] for row in rows] == [0, 0, 1]
    assert [row["optimizer_step"] for row in rows] == [0, 0, 1]
    assert [row["weight"] for row in rows] == step.weights.tolist()


def test_a_dump_that_fails_does_not_hide_why_the_run_stops(tmp_path: Path) -> None:
    dump = tmp_path / "missing" / "dump.parquet"
    with pytest.raises(FloatingPointError, match=rf"not finite .*could not be written to {dump}"):
        count_skipped(flags(1), 0, 1, [make_step(make_samples([3]))], dump)


@pytest.mark.parametrize(
    ("found", "overrides", "warned"),
    [
        (5e-4, [], False),
        (2e-3, [], True),
        (float("nan"), [], True),
        (None, [], False),
        (2e-3, ["actor_rollout_ref.rollout.dtype=bfloat16"], False),
        (0.06, ["actor_rollout_ref.rollout.dtype=bfloat16"], True),
        (2.0, ["actor_rollout_ref.rollout.top_p=0.9"], False),
    ],
)
def test_engines_that_disagree_are_warned_about(
    found: float | None, overrides: list[str], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    micro = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1"
    config = load_config([micro, "trainer.device=cpu", "actor_rollout_ref.rollout.n=2", *overrides])
    metrics = {} if found is None else {"rollout/logprob_diff_mean": found}
    warn_of_disagreement(config, metrics, "cpu")
    assert ("rollout/logprob_diff_mean" in caplog.text) is warned
