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


def test_a_phase_that_fails_is_counted(clock):
    timer = Timer()
    with pytest.raises(RuntimeError), timer("gen"):
        clock.sleep(1)
        raise RuntimeError
    with timer("gen"):
        clock.sleep(2)
    assert timer.seconds == {"gen": 3}
