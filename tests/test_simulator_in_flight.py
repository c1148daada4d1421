"""The simulator of `trainer.max_policy_age`, on cases that can be worked out by hand."""

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from cluster import Run, Trainer, simulate
from cluster_engine import Engine, EngineRun, batch_seconds, deal
from cluster_in_flight import AtOnce, Line, Queued, Rows, one_step, simulate_in_flight
from simulate_cluster import AGES, Gpu, in_flight, lognormal, make_plan

SECOND = Engine(step_s=1.0)
"""Draws a token a second for each response, however many there are."""


def repeating(lengths: Any) -> Any:
    """Groups of these lengths, one after the other, over and over."""
    lengths, at = np.array(lengths), 0

    def draw(count: int) -> Any:
        nonlocal at
        rows = (at + np.arange(count)) % len(lengths)
        at += count
        return lengths[rows], np.ones(count, bool)

    return draw


def run_of(age: int, split: bool, prompts: int = 1, **options: Any) -> Run:
    """One engine, one rank, prompts without tokens."""
    options = {"engines": 1, "ranks": 1, "prompt": 0, "mini_batch": prompts} | options
    return Run(age=age, split=split, prompts=prompts, **options)


def test_equal_lengths_on_shared_devices() -> None:
    """Two groups of 10 tokens draw side by side, so the second is complete when the first is, and
    its step needn't wait: waits are 10, 0, 10, 0. Training takes 4 s, and the weights 1 s."""
    trainer = Trainer(token_s=0.4, sync_s=1.0)
    result = simulate_in_flight(run_of(1, False), SECOND, trainer, repeating([[10]]))
    assert (result.gen_s, result.train_s, result.step_s) == (5, 4, 5 + 4 + 1)
    assert result.idle_engines == pytest.approx(1 - 9 / 10) == result.idle_trainer
    assert (result.mean_age, result.max_age, result.mixed, result.cost) == (0.5, 1, 0, 10)


@pytest.mark.parametrize("age", AGES)
def test_engines_that_never_wait_draw_a_batch_a_step(age: int) -> None:
    """An engine works 20 s on a batch: two groups of 1,000 tokens at 0.01 s each. Training takes 8
    or 30 s. The remainder: decoding steps that an update cuts short. A line of k + 1 batches that
    draw side by side is complete at once, so that means are over multiples of k + 1 steps."""
    engine = Engine(0.0, sequence_s=0.01)
    for token_s, split, expected in ((4e-3, True, 20), (15e-3, True, 30), (4e-3, False, 28)):
        run, draw = run_of(age, split, 2), repeating([[1000]])
        result = simulate_in_flight(run, engine, Trainer(token_s), draw, steps=30)
        assert result.step_s == pytest.approx(expected, rel=0.01)
        idle = 1 - 20 / expected if split else 0
        assert result.idle_engines == pytest.approx(idle, abs=0.01)


@pytest.mark.parametrize(
    ("age", "step_s", "mean_age"),
    [
        (1, (3 * 12 + 30) / 4, (3 * 1 + 12 / 30) / 4),  # the long one has 12 s, and is waited for
        (2, (3 * 12 + 18) / 4, (3 * 2 + (12 * 2 + 12) / 30) / 4),
        (4, 12, (3 * 4 + (12 * 4 + 12 * 3 + 6 * 2) / 30) / 4),
    ],
)
def test_one_long_response(age: int, step_s: float, mean_age: float) -> None:
    """One group of four has 30 tokens, the others have 5. Training takes 12 s: with four batches
    under way nobody waits for the long one, and a step takes as long as training."""
    trainer, draw = Trainer(token_s=0.0, update_s=12.0), repeating([[5], [5], [5], [30]])
    result = simulate_in_flight(run_of(age, True), SECOND, trainer, draw)
    assert result.step_s == pytest.approx(step_s)
    assert result.mean_age == pytest.approx(mean_age) and result.max_age == age
    assert result.mixed == 1 / 4


@pytest.mark.parametrize("train_s", [4, 15])
def test_one_batch_at_a_time_is_one_step_ahead(train_s: float) -> None:
    """Engines with places for one batch of equal lengths; what is read again comes on top."""
    engine, trainer = Engine(step_s=1.0, max_num_seqs=4), Trainer(0.0, train_s, sync_s=2.0)
    run, draw = run_of(1, True, 2, prompt=3), repeating([[10, 10]])
    ahead = simulate(replace(run, ahead=True), engine, trainer, draw)
    assert simulate_in_flight(run, engine, trainer, draw).step_s == ahead.step_s
    reading = replace(engine, prefill_s=0.1)
    more = simulate_in_flight(run, reading, trainer, draw).step_s - ahead.step_s
    # While it trains for 4 s: 0.6 s for two prompts, and 3 steps. Then 4 · (3 + 3) tokens are read.
    assert more == pytest.approx(0.0 if train_s == 15 else 2.4 + 7 + 4 - 10)


@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("age", AGES)
def test_all_that_is_drawn_is_trained_on_in_order(age: int, split: bool, continuous: bool) -> None:
    drawn: list[Any] = []
    lognormals = lognormal(50, 1.0, 4, 200, 0.5, 1.0, seed=0)

    def draw(count: int) -> Any:
        drawn.append(lognormals(count))
        return drawn[-1]

    engine = Engine(0.1, 0.01, 1e-5, prefill_s=1e-4, max_num_seqs=24, continuous=continuous)
    run = run_of(age, split, 8, engines=3, ranks=2, prompt=5, mini_batch=4)
    line, trained, tokens = Line(draw, 8), [], 0
    for step in range(12):
        line.top_up(age + 1)
        trained.append(line.lengths[:8])
        before = line.drawn.sum()
        *_, oldest, mixed = one_step(run, engine, Trainer(1e-3), line, step, 24, 1.0)
        tokens += line.drawn.sum() + trained[-1].sum() - before
        assert 0 <= oldest <= age and 0 <= mixed <= 1
        assert (line.drawn <= line.lengths).all()
    order = np.concatenate([lengths for lengths, _ in drawn])
    assert (np.concatenate(trained) == order[: 12 * 8]).all()
    assert tokens == np.concatenate(trained).sum() + line.drawn.sum()


def test_two_ways_to_simulate_engines_agree() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, (20, 4))
    drawn = rng.integers(0, 70, (20, 4)).clip(max=lengths) * (np.arange(20) < 12)[:, None]
    engine = Engine(0.1, 0.02, 1e-3, prefill_s=2e-3, call_s=0.7)
    rows = Rows.of(lengths, drawn, 5, engine, engines=3)
    table, queue = AtOnce(engine, rows), Queued(engine, rows, 1024)
    for count in (0, 1, 10, len(rows.left)):
        assert table.ready(count) == pytest.approx(queue.ready(count))
    for end in (0.0, 0.5, 1.234, 5.678, 1e3):
        fresh = Queued(engine, rows, 1024)
        (tokens, busy), (others, working) = table.until(end), fresh.until(end)
        assert (tokens == others).all() and busy == pytest.approx(working)
    assert (tokens == rows.left).all()


def test_what_was_drawn_is_read_again() -> None:
    """Two responses of two prompts each; one is complete. Prompts have three tokens."""
    lengths, drawn = np.full((2, 2), 5), np.array([[2, 5], [0, 0]])
    rows = Rows.of(lengths, drawn, 3, SECOND, engines=1)
    assert rows.left.tolist() == [3, 5, 5] and rows.held.tolist() == [5, 3, 3]
    assert rows.reads.tolist() == [5, 3, 0]
    for continuous, tokens in ((True, 5 + 3), (False, 2 * 5)):  # `hf` pads them to the longest
        engine = Engine(1.0, prefill_s=0.1, continuous=continuous)
        run = EngineRun(engine, rows.left, rows.held, rows.reads, limit=4)
        assert run.clock == pytest.approx(0.1 * tokens)


def test_blocks_of_whole_groups() -> None:
    assert deal(np.array([0, 0, 1, 1, 2, 2]), 2, 1024).tolist() == [0, 0, 0, 0, 1, 1]
    assert deal(np.array([0, 0, 1, 1, 2, 2]), 2, 2).tolist() == [0, 0, 1, 1, 0, 0]
    assert deal(np.array([], np.int64), 2, 2).tolist() == []


def test_hf_fills_places_when_a_batch_is_compacted() -> None:
    """Ten places: 1 … 10 tokens, and three rows of 1 that wait. After a step one has ended, and its
    place stays free; after two steps two are free, and two rows begin; after three steps three
    rows end, and the last one begins; it ends beside the 4th."""
    engine = Engine(1.0, continuous=False)
    left = np.array([*range(1, 11), 1, 1, 1])
    run = EngineRun(engine, left, np.zeros_like(left), np.zeros_like(left), limit=10)
    while run.advance():
        pass
    assert run.finish[:4].tolist() == [1, 2, 3, 4] and run.finish[10:].tolist() == [3, 3, 4]
    engine = Engine(0.3, 0.2, 0.01, continuous=False)
    run = EngineRun(engine, left, np.full_like(left, 7), np.zeros_like(left), limit=20)
    while run.advance():
        pass
    assert run.finish == pytest.approx(batch_seconds(engine, left, 7))


def test_log_probabilities_of_responses_of_this_policy() -> None:
    """100 s a token. Two groups of 10 tokens are first in line, then two of 20, half of which the
    first step draws. So only the first two have a pass, if an update has several optimizer steps.
    """
    trainer = Trainer(token_s=0.0, log_prob_s=100.0)
    for mini_batch, expected in ((1, [2000.0, 0.0]), (2, [0.0, 0.0])):
        line = Line(repeating([[10], [10], [20], [20]]), 2)
        run = run_of(1, False, 2, mini_batch=mini_batch)
        found = [one_step(run, SECOND, trainer, line, i, 9, 1.0)[2] for i in range(2)]
        assert found == expected


def test_placements() -> None:
    run, draws = Run(0, 0, prompts=8, mini_batch=4), lambda: lognormal(50, 1.0, 4, 200, 0.5, 1.0, 0)
    found = list(in_flight(make_plan("3B"), Gpu(), 8, draws, run, least=2))
    assert [(p.name, p.age) for p in found] == [
        (name, age) for name in ("colocated", "split") for age in AGES
    ]
    assert all(p.result.max_age <= p.age and p.result.step_s > 0 for p in found)
