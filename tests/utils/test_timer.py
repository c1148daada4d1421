"""The timer, on a clock that only moves when told."""

from types import SimpleNamespace

import pytest

from verl.utils.timer import Timer


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("verl.utils.timer.time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_seconds_add_up_by_name(clock):
    timer = Timer()
    for seconds in (1.0, 2.5):
        with timer("gen"):
            clock.sleep(seconds)
        clock.sleep(10)  # outside
    with timer("adv"):
        clock.sleep(0.25)
    assert timer.seconds == {"gen": 3.5, "adv": 0.25}


def test_an_inner_phase_is_not_counted_in_the_outer_one(clock):
    timer = Timer()
    with timer("gen"):
        clock.sleep(1)
        with timer("reward"):
            clock.sleep(2)
            with timer("http"):
                clock.sleep(4)
            clock.sleep(8)
        clock.sleep(16)
        with timer("reward"):
            clock.sleep(32)
    assert timer.seconds == {"gen": 17, "reward": 42, "http": 4}
    assert sum(timer.seconds.values()) == clock.now - 100


def test_a_phase_within_itself_is_counted_once(clock):
    timer = Timer()
    with timer("gen"):
        clock.sleep(1)
        with timer("gen"):
            clock.sleep(2)
    assert timer.seconds == {"gen": 3}


def test_a_phase_that_fails_is_counted_and_closed(clock):
    timer = Timer()
    with timer("step"):
        with pytest.raises(RuntimeError), timer("gen"):
            clock.sleep(1)
            raise RuntimeError
        clock.sleep(2)
    assert timer.seconds == {"gen": 1, "step": 2}


def test_timers_are_independent_of_each_other(clock):
    first, second = Timer(), Timer()
    with first("gen"), second("gen"):
        clock.sleep(1)
    assert first.seconds == second.seconds == {"gen": 1}


def test_the_real_clock_runs():
    timer = Timer()
    with timer("gen"):
        sum(range(1000))
    assert 0 < timer.seconds["gen"] < 5
