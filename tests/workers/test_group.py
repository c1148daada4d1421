"""Workers over a real Ray: order, streams, errors, placement."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import ray

from verl.workers.group import WorkerGroup, place, start_ray


class Echo:
    """A worker that knows its number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def add(self, value: int) -> int:
        return self.number + value

    def count(self, start: int) -> Iterator[int]:
        for i in range(3):
            yield start + i

    def fail_or_hang(self) -> None:
        if self.number == 1:
            raise ValueError("worker 1 says no")
        time.sleep(600)

    def spinning(self) -> str | None:
        return os.environ.get("OMP_WAIT_POLICY")


@pytest.fixture(scope="module")
def group() -> Iterator[WorkerGroup]:
    start_ray(2)
    yield WorkerGroup(Echo, place(1, 2, "cpu"), "cpu", [(0,), (1,)])
    ray.shutdown()


def test_calls_go_to_all_and_come_back_in_order(group: WorkerGroup) -> None:
    assert group.call("add", 10) == [10, 11]
    assert group.scatter("add", [(1,), (2,)]) == [1, 3]
    assert group.call("spinning") == ["PASSIVE", "PASSIVE"]


def test_streams_deliver_everything(group: WorkerGroup) -> None:
    assert sorted(group.stream("count", [(0,), (10,)])) == [0, 1, 2, 10, 11, 12]


def test_too_many_devices_are_refused_at_once(group: WorkerGroup) -> None:
    with pytest.raises(ValueError, match=r"trainer\.n_gpus_per_node=999 .* lower the keys"):
        place(1, 999, "cpu")
    with pytest.raises(ValueError, match=r"'GPU': 0.* in all"):
        place(1, 1, "cuda")


def test_devices_that_others_hold_are_refused_after_a_while(group: WorkerGroup) -> None:
    with pytest.raises(ValueError, match="not free"):
        place(1, 1, "cpu", timeout_s=1)


def test_the_first_error_is_raised_while_others_hang(group: WorkerGroup) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match="worker 1 says no"):
        group.call("fail_or_hang")
    assert time.monotonic() - started < 300
