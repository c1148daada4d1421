"""Ctrl-C, SIGTERM, and a closed terminal's SIGHUP: the first asks for an end, the second ends."""

import os
import signal
import threading
from contextlib import suppress
from typing import Any

SIGNALS = [signal.SIGINT, signal.SIGTERM]
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # else nohup started this
    SIGNALS.append(signal.SIGHUP)


class StopSignals:
    """Knows whether somebody wants the run to end: `number` is the signal that came. Whoever looks
    at it sets `patient`; else, and the second time, a signal raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.patient = False
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Takes the signals over, as far as that can be: Python leaves them to the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before.setdefault(number, signal.signal(number, self._handle))

    def restore(self) -> None:
        """Gives the signals back."""
        while self._before:
            signal.signal(*self._before.popitem())

    def _handle(self, number: int, frame: Any) -> None:
        if number == signal.SIGHUP == self.number:  # a closed terminal sends two
            return
        first, self.number = self.number is None, number
        if not (first and self.patient):
            raise KeyboardInterrupt
        text = "\nstopping after this step, with a checkpoint; once more: at once\n"
        with suppress(OSError):  # the terminal may be gone
            os.write(2, text.encode())  # print could have been interrupted right in a line
