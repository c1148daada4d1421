"""The first signal asks, the second one ends."""

import signal
import subprocess
import sys

import pytest

from verl.utils.signals import SIGNALS, StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_asks_and_the_second_ends(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    stop = StopSignals()
    stop.install()
    stop.install()  # again, after somebody else may have taken them
    try:
        stop.patient = True
        signal.raise_signal(number)
        assert stop.number == number
        assert "stopping after this step" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    finally:
        stop.restore()
    assert signal.getsignal(number) is before


def test_a_closed_terminal_is_nothing_to_nohup() -> None:
    code = "from verl.utils.signals import SIGNALS; print(len(SIGNALS))"
    for command, number in ([], len(SIGNALS)), (["nohup"], 2):
        done = subprocess.run([*command, sys.executable, "-c", code], capture_output=True)
        assert int(done.stdout) == number


@pytest.mark.skipif(signal.SIGHUP not in SIGNALS, reason="started by nohup")
def test_a_closed_terminal_sends_two_that_count_as_one() -> None:
    stop = StopSignals()
    stop.install()
    try:
        stop.patient = True
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert stop.number == signal.SIGHUP
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        stop.restore()


def test_nobody_is_asked_who_does_not_look() -> None:
    stop = StopSignals()
    stop.install()
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert stop.number == signal.SIGTERM
    finally:
        stop.restore()
