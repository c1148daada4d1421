"""What engines finish travels in few messages."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers import make_samples
from verl.protocol import Sample, SampleBatch
from verl.rollout import engine
from verl.rollout.engine import GATHER_S, RolloutEngine, SamplingParams

PARAMS = SamplingParams(1, 9)
PARTS = [SampleBatch(make_samples([i + 1])) for i in range(6)]


class Clocked(RolloutEngine):
    """Finishes a part of `PARTS` after so many tenths of `GATHER_S` each."""

    now = 0.0

    def build(self, *_: Any) -> None:
        pass

    def load_weights(self, *_: Any) -> None:
        pass

    def generate_rows(self, tenths: Any, _: Any) -> Iterator[list[Sample]]:
        for part, duration in zip(PARTS, tenths, strict=False):
            self.now += duration * GATHER_S / 10
            yield part


@pytest.mark.parametrize(
    ("tenths", "expected"),
    [
        ([], []),
        ([25], [[1]]),
        ([25, 25, 11], [[1], [2], [3]]),  # slow ones each at once
        ([1, 1, 1], [[1, 2, 3]]),  # at the end
        ([6, 6, 6, 6, 6, 6], [[1, 2], [3, 4], [5, 6]]),
        ([25, 3, 3, 6, 50], [[1], [2, 3, 4], [5]]),
    ],
)
def test_messages_by_hand(
    tenths: list[int], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    clocked = Clocked()
    monkeypatch.setattr(engine.time, "monotonic", lambda: clocked.now)
    messages = list(clocked.stream(tenths, PARAMS))
    assert [[s.length for s in message] for message in messages] == expected
    assert all(type(message) is SampleBatch for message in messages)
