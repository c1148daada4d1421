"""Wall-clock time of the phases of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timer:
    """Adds up seconds by name. A phase inside another one is not counted in it.

    Example: ``with timer("gen"): …`` then ``timer.seconds["gen"]``.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self_time = spent - self._inner.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + self_time
            if self._inner:
                self._inner[-1] += spent
