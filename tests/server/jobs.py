"""What the pool's tests run in real workers: each of the things that go wrong."""

import os
import signal
import time
from pathlib import Path


def run(action: str, value: object = None) -> object:
    """Do `action`; the answer holds the process id where the test needs it."""
    return ACTIONS[action](value)


def _die_once(marker: str) -> str:
    if Path(marker).exists():
        return "alive"
    Path(marker).touch()
    os.kill(os.getpid(), signal.SIGKILL)


ACTIONS = {
    "echo": lambda value: value,
    "pid": lambda _: os.getpid(),
    "sleep": lambda seconds: time.sleep(seconds) or os.getpid(),
    "power": lambda exponent: 9**9**exponent,  # one C call: no signal handler of Python's gets in
    "hoard": lambda gigabytes: len(bytearray(gigabytes << 30)),
    "crash": lambda _: os.abort(),
    "die once": _die_once,
    "die once then sleep": lambda marker: time.sleep(0.5 * (_die_once(marker) == "alive")),
    "raise": lambda text: int(text),
    "not JSON": lambda _: {1, 2},
    "deep": lambda _: (lambda f: f(f))(lambda f: f(f)),
}
