"""The line of groups: responses that are interrupted again and again, and their order."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from tests.rollout.test_hf import build, make_prompts
from verl.protocol import Prompt, Sample
from verl.rollout.engine import Row, SamplingParams
from verl.rollout.hf import HFEngine
from verl.rollout.in_flight import InFlight

PROMPTS = make_prompts([3, 9, 5, 4, 6, 8, 7, 3, 5, 6])
PARAMS = SamplingParams(4, 60)


class Engines:
    """One engine in this process, where a pool has several in others."""

    def __init__(self, engine: HFEngine) -> None:
        self.engine, self.interrupted = engine, Event()
        self.calls: list[list[Row]] = []
        self.error: Exception | None = None

    def generate_rows(self, rows: Sequence[Row], params: SamplingParams) -> Iterator[list[Sample]]:
        self.calls.append(list(rows))
        for samples in self.engine.generate_rows(rows, params):
            yield samples
            if self.error:
                raise self.error
            if self.interrupted.is_set():
                self.engine.stop()

    def interrupt(self) -> None:
        self.interrupted.set()
        self.engine.stop()


def scored(samples: list[Sample]) -> Future[list[Sample]]:
    future: Future[list[Sample]] = Future()
    for s in samples:
        s.score = float(s.length)
    future.set_result(samples)
    return future


@pytest.fixture
def flight(tiny_model: Path) -> InFlight:
    line = InFlight(scored, PARAMS)
    line.engines = Engines(build(tiny_model, max_num_seqs=16))
    return line


def names(samples: list[Sample]) -> list[tuple[int, int, list[int]]]:
    return [(s.prompt.index, s.response_index, s.response_ids.tolist()) for s in samples]


def whole(model: Path, prompts: list[Prompt]) -> list[tuple[int, int, list[int]]]:
    """What an engine draws that nobody interrupts."""
    samples = build(model).generate_all(prompts, list(range(len(prompts))), PARAMS)
    return sorted(names(samples))


def test_interruptions_change_nothing_and_groups_leave_in_order(
    flight: InFlight, tiny_model: Path
) -> None:
    flight.add(PROMPTS[:4])
    found = []
    for version in range(len(PROMPTS)):
        flight.start()
        if version % 2:
            found.append(flight.next())
        flight.pause()
        flight.engines.engine.finish_update(version + 1)
        flight.add(PROMPTS[4 + version : 5 + version])
    while flight.line:
        found.append(flight.next())
    assert names([s for group in found for s in group]) == whole(tiny_model, PROMPTS)
    assert all(s.score == s.length for group in found for s in group)
    samples = [s for group in found for s in group]
    assert any(s.token_versions is not None for s in samples)
    assert all((np.diff(s.versions) >= 0).all() for s in samples)
    assert flight.first == len(PROMPTS)


def test_what_goes_on_is_not_drawn_again(flight: InFlight) -> None:
    flight.add(PROMPTS)
    flight.start()
    flight.wait_generated(1)
    flight.pause()
    unfinished = [row for group in flight.line for row in group.missing.values()]
    begun = {(row.group, row.number): row.num_begun for row in unfinished}
    assert any(begun.values()) and flight.metrics()["async/responses_under_way"] == len(begun)
    flight.wait_generated(len(PROMPTS))
    again = flight.engines.calls[-1]
    assert {(row.group, row.number): row.num_begun for row in again} == begun
    assert flight.metrics() == {"async/complete_groups": 10.0, "async/responses_under_way": 0.0}


def test_lengths_of_those_that_leave_are_those_of_all(flight: InFlight) -> None:
    """Were the groups that are complete first to leave first, the short ones would."""
    flight.add(PROMPTS)
    flight.start()
    first = []
    for _ in range(5):
        first += flight.next()
        flight.pause()
    rest = [s for _ in range(5) for s in flight.next()]
    everything = {s.length for s in first} | {s.length for s in rest}
    assert max(s.length for s in first) == max(everything) == 60
    assert [s.prompt.index for s in first + rest] == sorted(list(range(10)) * 4)


def test_groups_that_were_taken_can_be_put_back(flight: InFlight) -> None:
    flight.add(PROMPTS[:3])
    taken = [flight.next(), flight.next()]
    flight.put_back(taken)
    assert flight.first == 0
    assert [flight.next(), flight.next()] == taken
    assert {s.prompt.index for s in flight.next()} == {2}


def test_an_error_of_the_engines_is_raised_to_whoever_waits_and_work_goes_on_after_it(
    flight: InFlight, tiny_model: Path
) -> None:
    flight.add(PROMPTS[:3])
    flight.engines.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        flight.wait_generated(3)
    flight.engines.error = None
    found = [s for _ in range(3) for s in flight.next()]
    assert names(found) == whole(tiny_model, PROMPTS[:3])


def test_an_error_of_scoring_leaves_the_group_in_the_line(tiny_model: Path) -> None:
    def failing(samples: list[Sample]) -> Future[list[Sample]]:
        future: Future[list[Sample]] = Future()
        future.set_exception(ValueError("no score"))
        return future if samples[0].group == 1 else scored(samples)

    flight = InFlight(failing, PARAMS)
    flight.engines = Engines(build(tiny_model))
    flight.add(PROMPTS[:3])
    flight.next()
    flight.wait_generated(2)
    with pytest.raises(ValueError, match="no score"):
        flight.next()
    assert flight.first == 1 and [g.complete for g in flight.line] == [False, True]
