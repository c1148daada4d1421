"""The simulator of a cluster, on cases that can be worked out by hand."""

import sys
from typing import Any

import numpy as np
import pytest

from tests.helpers import ROOT
from verl.rollout import hf

sys.path.insert(0, str(ROOT / "benchmarks"))

from cluster import Run, Trainer, draw_batch, generate, simulate, train_seconds
from cluster_engine import FILL_SHARE, KEEP_SHARE, Engine, batch_seconds
from simulate_cluster import Gpu, lognormal, make_plan, placements

SECOND = Engine(step_s=1.0)
"""Draws a token a second, whatever else it does."""


def drawing(lengths: Any, keeps: Any = None) -> Any:
    """The same groups for each step: the first so many of `lengths`."""
    lengths = np.array(lengths)
    keeps = np.ones(len(lengths), bool) if keeps is None else np.array(keeps, bool)
    return lambda count: (lengths[:count], keeps[:count])


def test_one_engine_equal_lengths() -> None:
    """Four sequences of 10 tokens: 10 steps of 1 s + 4 · 0.1 s; the cache grows 8, 12, … 44."""
    engine = Engine(step_s=1.0, sequence_s=0.1, token_s=0.001, prefill_s=0.5, call_s=3.0)
    round_ = generate(engine, 1, np.full((2, 2), 10), prompt=2)
    cache = sum(range(8, 45, 4)) * 0.001
    assert round_.seconds == pytest.approx(3 + 2 * 2 * 0.5 + 10 * 1.4 + cache)
    assert round_.busy.tolist() == [round_.seconds]


def test_sequences_that_end_make_room_for_the_others() -> None:
    """2, 4 and 6 tokens: two steps with three, two with two, two with one."""
    engine = Engine(step_s=1.0, sequence_s=0.1)
    round_ = generate(engine, 1, np.array([[2], [4], [6]]), 0)
    assert round_.finish.tolist() == pytest.approx([2.6, 5.0, 7.2])


def test_two_engines_share_one_queue() -> None:
    """One prompt at a time each: 5 and 1 first; the engine that is free takes 1 and then 1."""
    one = Engine(step_s=1.0, max_num_seqs=1)
    round_ = generate(one, 2, np.array([[5], [1], [1], [1]]), 0)
    assert round_.finish.tolist() == [5, 1, 2, 3]
    assert round_.busy.tolist() == [5, 3]


@pytest.mark.parametrize("continuous", [True, False])
def test_equal_lengths_leave_no_engine_idle(continuous: bool) -> None:
    engine = Engine(step_s=0.1, sequence_s=0.01, max_num_seqs=8, continuous=continuous)
    round_ = generate(engine, 4, np.full((16, 4), 7), 3)
    assert round_.busy == pytest.approx(round_.seconds)
    run = Run(engines=4, ranks=4, prompts=16, mini_batch=16)
    result = simulate(run, engine, Trainer(token_s=0.001), drawing(np.full((16, 4), 7)))
    assert result.idle_engines == pytest.approx(0) == result.idle_trainer


@pytest.mark.parametrize("engines", [1, 3, 8])
def test_every_token_is_drawn_once(engines: int) -> None:
    """At a cost per sequence and step alone, the engines' work is the number of tokens."""
    lengths = np.random.default_rng(0).integers(1, 50, (20, 4))
    round_ = generate(Engine(0.0, sequence_s=1.0, max_num_seqs=12), engines, lengths, 5)
    assert round_.busy.sum() == pytest.approx(lengths.sum())
    assert (round_.finish > 0).all()


def test_the_cache_bounds_what_runs() -> None:
    """30 tokens hold two sequences of 10 + 5: two after two."""
    engine = Engine(step_s=1.0, cache_tokens=30)
    assert generate(engine, 1, np.full((1, 4), 10), 5).seconds == 20


def test_the_engine_hf_is_the_trainers() -> None:
    assert (KEEP_SHARE, FILL_SHARE) == (hf.KEEP_SHARE, hf.FILL_SHARE)


def test_batches_drop_what_is_finished() -> None:
    """Two finished rows are at least 5 % of up to 40, one is not; of 20 rows one is."""
    times = batch_seconds(SECOND, np.arange(1, 27), 0)
    assert times.tolist() == [2, 2, 4, 4, 6, 6, *range(7, 27)]
    mixed = batch_seconds(SECOND, np.array([*range(26, 5, -1), 3, 1, 4, 2, 5]), 0)
    assert mixed.tolist() == [*range(26, 6, -1), 6, 4, 2, 4, 2, 6]


def test_dynamic_sampling_stops_in_the_order_of_the_prompts() -> None:
    """Kept: the 1st, 2nd and 4th prompt. Two are needed: known after 9 s, as the 1st takes 9."""
    draw = drawing([[9], [2], [3], [20]], [1, 1, 0, 1])
    batch = draw_batch(SECOND, 4, draw, 0, needed=2, round_size=4)
    assert batch.seconds == 9 and batch.busy == 9 + 2 + 3 + 9
    assert batch.lengths.tolist() == [[9], [2]] and len(batch.carried) == 0


def test_dynamic_sampling_carries_the_rest_over() -> None:
    draw = drawing([[9], [2], [3], [20]], [1, 1, 0, 1])
    batch = draw_batch(SECOND, 4, draw, 0, needed=2, round_size=4, carry_over=True)
    assert batch.seconds == 20 and batch.carried.tolist() == [[20]]
    more = draw_batch(SECOND, 4, draw, 0, 2, 4, carried=batch.carried, carry_over=True)
    assert more.lengths.tolist() == [[20], [9]]
    assert more.carried.tolist() == [[2], [20]] and more.seconds == 20


def test_dynamic_sampling_takes_as_many_rounds_as_it_needs() -> None:
    batch = draw_batch(SECOND, 2, drawing([[4], [6]], [1, 0]), 0, needed=3, round_size=2)
    assert batch.seconds == 6 + 6 + 4 and batch.generated == 6


def test_training_waits_for_the_rank_with_most_tokens() -> None:
    """Shares of 7 + 1 and 4 + 3 tokens with a prompt of 1 each: 10 and 9."""
    trainer = Trainer(token_s=1.0, update_s=5.0)
    lengths = np.array([[7, 4], [3, 1]])
    assert train_seconds(trainer, 2, lengths, 1, 2) == (15, 5 + 9.5)
    # Two optimizer steps: 8 against 5, and 4 against 2.
    assert train_seconds(trainer, 2, lengths, 1, 1)[0] == 5 + 8 + 5 + 4


def test_micro_batches_take_their_collectives_at_least() -> None:
    trainer = Trainer(token_s=1.0, micro_s=30.0, micro_tokens=10)
    assert train_seconds(trainer, 1, np.array([[25]]), 0, 1)[0] == 3 * 30


def test_log_probabilities_take_collectives_of_their_own() -> None:
    """Two passes over 20 tokens for log-probabilities, two for the update: 2 · 1 and 2 · 4."""
    trainer = Trainer(token_s=0.0, micro_s=4.0, micro_tokens=10, log_prob_micro_s=1.0)
    assert train_seconds(trainer, 1, np.array([[20]]), 0, 1, np.array([20]))[0] == 2 + 8


def test_placements() -> None:
    """Generation takes 10 s, training 4 s, the weights 1 s."""
    draw, trainer = drawing([[10]]), Trainer(token_s=0.4, sync_s=1.0)
    options: dict[str, Any] = dict(prompts=1, prompt=0, mini_batch=1)
    together = simulate(Run(1, 1, **options), SECOND, trainer, draw)
    assert together.step_s == 15 and together.cost == 15
    split = simulate(Run(1, 1, split=True, **options), SECOND, trainer, draw)
    assert split.step_s == 15 and split.cost == 30
    assert split.idle_engines == pytest.approx(1 / 3)
    ahead = simulate(Run(1, 1, ahead=True, **options), SECOND, trainer, draw)
    assert ahead.step_s == 11 and ahead.idle_trainer == pytest.approx(1 - 4 / 11)


def test_placements_are_compared_on_the_same_lengths() -> None:
    """Colocated, and seven splits in turns and ahead; two steps each, which differ."""
    seen: list[list[Any]] = []

    def draws() -> Any:
        draw, mine = lognormal(50, 1.0, 4, 200, 0.5, 1.0, seed=0), []
        seen.append(mine)
        return lambda count: mine.append(draw(count)) or mine[-1]

    run = Run(0, 0, prompts=8, mini_batch=4)
    assert len(list(placements(make_plan("3B"), Gpu(), 8, draws, run, steps=2))) == 3
    lengths = np.array([[step[0] for step in steps] for steps in seen])
    assert lengths.shape == (15, 2, 8, 4) and (lengths == lengths[0]).all()
    assert (lengths[0, 0] != lengths[0, 1]).any()


def test_log_probabilities_of_older_responses_are_known() -> None:
    """Each pass over a response's tokens takes 100 s a token, and an update nothing."""
    trainer, lengths = Trainer(token_s=0.0, log_prob_s=100.0), [[10], [20]]
    options: dict[str, Any] = dict(prompts=2, prompt=0)
    draw = drawing(lengths)
    for mini_batch, ahead, expected in ((1, False, 3000), (2, False, 0), (1, True, 0)):
        run = Run(2, 1, mini_batch=mini_batch, ahead=ahead, **options)
        assert simulate(run, SECOND, trainer, draw, 1).train_s == expected
    # One prompt is carried over into the second step, with the log-probabilities it has: the pass
    # is over the other one. The first step, of one optimizer step on its own responses, has none.
    run = Run(3, 1, mini_batch=2, round_size=3, carry_over=True, **options)
    draw = drawing([[10], [20], [40]])
    assert simulate(run, SECOND, trainer, draw, 2).train_s == (0 + 1000) / 2
