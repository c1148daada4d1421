"""Train batches while generation has no end: order, ages, filter, and what a resumed run has."""

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
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
                for row in waiting.values():
                    own = row.prompt, row.group, np.array([7]), "unfinished", row.number
                    yield [row.begun or Sample(*own, policy_version=self.version)]
                return
            wanted = [s for s in samples if (s.group, s.response_index) in waiting]
            for s in wanted:
                begun = waiting.pop((s.group, s.response_index)).begun
                s.policy_version = begun.policy_version if begun else self.version
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
    write_samples(tmp_path / "carried.feather", [s for group in state.carried for s in group])
    state.carried = split_groups(read_samples(tmp_path / "carried.feather", first.prompts))
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


def test_a_run_neither_begins_nor_ends_to_generate_in_flight_when_it_resumes():
    plain, (line, _) = make_batches(make_config(), Engine(mixed_every(1)), 40), in_flight(1)
    with pytest.raises(ValueError, match=r"max_policy_age=1, but the run had 0: keep it, or begin"):
        line.load(plain.state())
    with pytest.raises(ValueError, match=r"max_policy_age=0, but the run had more than 0"):
        plain.load(line.state())
    for batches in (plain, line):
        batches.close()


def test_resumed_with_a_lower_limit_what_would_be_too_old_is_drawn_again():
    first, _ = in_flight(4)
    first.next(1, Timer())
    first.policy_updated(1)
    first.line.wait_generated(16)
    second, engine = in_flight(1)
    engine.version = 1
    second.load(copy.deepcopy(first.state()), 1)
    for step in range(2, 9):
        samples = second.next(step, Timer()).samples
        assert indices(samples) == [4 * step - 4 + i for i in range(4)]
        assert max(step - 1 - s.policy_version for s in samples) <= 1
        second.policy_updated(step)
    first.close()
    second.close()


def test_a_validation_leaves_what_waits_for_the_reward_model():
    batches, _ = in_flight(1)
    batches.val_prompts = prompts(3)
    waiting = [(["of the line"], Future())]
    batches.rewards.waiting[:] = waiting
    batches.rewards.ask_model = lambda: None
    batches.validation(0)
    assert batches.rewards.waiting == waiting
    batches.close()


def test_the_epoch_is_that_of_what_is_trained_on():
    batches, _ = in_flight(2, count=8)
    for step in range(1, 5):
        batches.next(step, Timer())
        assert batches.epoch == step // 2
        batches.policy_updated(step)
    batches.close()
