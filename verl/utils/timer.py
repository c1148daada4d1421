"""Wall-clock time of the phases of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timer:
    """``with timer("gen"): …`` adds to ``timer.seconds["gen"]``. Phases must not be nested."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
