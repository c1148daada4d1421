"""Train batches while generation has no end: order, ages, filter, and what a resumed run has."""

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from tests.trainer.test_batches import (
    Engine,
    indices,
    make_batches,
    make_config,
    mixed_every,
    prompts,
)
from verl.protocol import Sample
from verl.rewards import RewardError, compute_score
from verl.rollout.engine import Row, SamplingParams
from verl.trainer.ppo.batches import Batches, split_groups
from verl.utils.samples import read_samples, write_samples
from verl.utils.timer import Timer
from verl.utils.user_function import UserFunction


class Slow(Engine):
    """Finishes a group every millisecond, the first of a call last, until it is interrupted."""

    def __init__(self, text: Callable[[int, int], str]) -> None:
        super().__init__(text)
        self.interrupted, self.version = Event(), 0

    def generate_rows(self, rows: Sequence[Row], params: SamplingParams) -> Iterator[list[Sample]]:
        groups = {row.group: row.prompt for row in rows}
        waiting = {(row.group, row.number): row for row in rows}
        answers = self([*groups.values()], [*groups], params)
        for samples in answers:
            if self.interrupted.wait(0.001):
                yield [
                    Sample(
                        row.prompt, row.group, np.array([7]), "unfinished", row.number, row.group
                    )
                    for row in waiting.values()
                ]
                return
            wanted = [s for s in samples if waiting.pop((s.group, s.response_index), None)]
            for sample in wanted:
                sample.policy_version = self.version
            yield wanted

    def interrupt(self) -> None:
        self.interrupted.set()

    def update(self) -> None:
        self.version += 1


def in_flight(age: int, text: Any = None, count: int = 40, **rule: Any) -> tuple[Batches, Slow]:
    config, engine = make_config(**rule), Slow(text or mixed_every(1))
    config.trainer.max_policy_age, config.trainer.total_training_steps = age, 9
    batches = make_batches(config, engine, count)
    batches.line.engines, batches.update_engines = engine, engine.update
    return batches, engine


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("age", [1, 2, 3])
def test_no_token_is_older_than_allowed_and_prompts_keep_order(age: int, shared: bool):
    batches, engine = in_flight(age)
    batches.shares_devices = shared
    plain = make_batches(make_config(), Engine(mixed_every(1)), 40)
    ages: set[int] = set()
    for step in range(1, 10):
        samples = batches.next(step, Timer()).samples
        assert indices(samples) == indices(plain.next(step, Timer()).samples)
        assert [s.group for s in samples] == [i // 3 for i in range(12)]
        ages |= {step - 1 - s.policy_version for s in samples}
        assert len(batches.line.line) == 4 * min(age, 9 - step)
        batches.policy_updated(step)
    assert max(ages) == age and min(ages) >= 0
    assert sum(len(call[0]) for call in engine.calls) > 36  # some were interrupted
    batches.close()


def test_in_flight_the_filter_takes_what_is_first_and_leaves_the_rest_in_line():
    batches, _ = in_flight(1, mixed_every(3), 200, enable=True, metric="acc")
    plain = make_batches(
        make_config(enable=True, metric="acc", carry_over=True), Engine(mixed_every(3)), 200
    )
    for step in range(1, 8):
        batch, expected = batches.next(step, Timer()), plain.next(step, Timer())
        assert (
            indices(batch.samples)
            == indices(expected.samples)
            == [12 * (step - 1) + i for i in (0, 3, 6, 9)]
        )
        assert all(step - 2 <= s.policy_version <= step - 1 for s in batch.samples)
        assert batch.metrics["train/kept_prompts_ratio"] == pytest.approx(1 / 3, abs=0.1)
        assert {"async/complete_groups", "async/responses_under_way"} <= batch.metrics.keys()
        batches.policy_updated(step)
    batches.close()


def test_a_resumed_run_keeps_complete_groups_and_draws_the_others_again(tmp_path: Path):
    first, _ = in_flight(2)
    first.next(1, Timer())
    first.policy_updated(1)
    first.line.wait_generated(3)
    first.line.pause()
    state = first.state()
    kept = [group[0].prompt.index for group in state.carried]
    assert state.taken == 4 and {4, 5, 6} <= set(kept) <= set(range(4, 12))
    write_samples(tmp_path / "carried.parquet", [s for group in state.carried for s in group])
    state.carried = split_groups(read_samples(tmp_path / "carried.parquet", first.prompts))
    second, again = in_flight(2)
    again.version = 7
    second.load(copy.deepcopy(state))
    for step in (2, 3, 4):
        samples = second.next(step, Timer()).samples
        assert indices(samples) == [4 * step - 4 + i for i in range(4)]
        for s in samples:
            assert (s.policy_version < 7) == (s.prompt.index in kept)
        second.policy_updated(step)
    drawn = [index for call in again.calls for index in call[0]]
    assert not set(kept) & set(drawn) and set(drawn) | set(kept) >= set(range(4, 16))
    first.close()
    second.close()


def test_in_flight_an_error_of_a_reward_leaves_all_groups_for_the_next_run():
    batches, _ = in_flight(1)

    def failing(**arguments: Any) -> Any:
        if arguments["extra_info"].get("bad"):
            raise ValueError("no reward")
        return compute_score(**arguments)

    batches.rewards.custom = UserFunction("custom_reward_function", failing, 8, 60)
    batches.prompts[2].extra_info["bad"] = True
    with pytest.raises(RewardError, match="no reward"):
        batches.next(1, Timer())
    batches.line.wait_generated(8)
    state = batches.state()
    assert state.taken == 0
    assert sorted(group[0].prompt.index for group in state.carried) == [0, 1, 3, 4, 5, 6, 7]
    batches.close()


def test_a_validation_interrupts_what_is_in_flight_and_lets_it_go_on():
    batches, engine = in_flight(1)
    batches.val_prompts = prompts(3)
    batches.next(1, Timer())
    batches.policy_updated(1)
    assert len(batches.validation(1)) == 3 and not engine.interrupted.is_set()
    assert indices(batches.next(2, Timer()).samples) == [4, 5, 6, 7]
    batches.close()


@pytest.mark.parametrize("ahead", [False, True])
def test_a_resumed_run_may_generate_in_another_way(ahead: bool):
    """What waited for the next step is drawn again: no prompt is left out."""
    config = make_config()
    config.trainer.async_rollout, config.trainer.total_training_steps = ahead, 9
    plain = make_batches(config, Engine(mixed_every(1)), 40)
    for step in (1, 2):
        plain.next(step, Timer())
    line, _ = in_flight(1)
    line.load(copy.deepcopy(plain.state()))
    assert indices(line.next(3, Timer()).samples) == [8, 9, 10, 11]
    back = make_batches(make_config(), Engine(mixed_every(1)), 40)
    back.load(copy.deepcopy(line.state()))
    assert indices(back.next(4, Timer()).samples) == [12, 13, 14, 15]
    for batches in (plain, line, back):
        batches.close()
