"""Workers over a real Ray: order, streams, errors."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest
import ray

from tests.helpers import make_samples, starting_warm, warm_children, warm_python
from verl.cluster import WorkerGroup, reserve_devices, start_ray
from verl.protocol import ARRAYS, Sample, SampleBatch


class Echo:
    """A worker that knows its number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def add(self, value: int) -> int:
        return self.number + value

    def receive(self, samples: list[Sample]) -> tuple[list[tuple[int, bool]], np.ndarray]:
        """Address of each array of token ids and whether it is a copy; an array to send back."""
        arrays = [s.response_ids for s in samples]
        seen = [(a.__array_interface__["data"][0], a.flags.owndata) for a in arrays]
        return seen, np.concatenate([s.old_log_probs for s in samples]) + self.number

    def fail_or_hang(self) -> None:
        if self.number == 1:
            raise ValueError("worker 1 says no")
        time.sleep(600)

    def connect(self, rank: int, world_size: int, address: str, timeout_s: None) -> None:
        self.joined = rank, world_size, address, os.environ["GLOO_SOCKET_IFNAME"]

    def where_it_joined(self) -> tuple[int, int, str, str]:
        return self.joined

    def environment(self) -> tuple[str | None, ...]:
        return os.environ.get("OMP_WAIT_POLICY"), os.environ.get("ASKED_FOR")


@pytest.fixture(scope="module")
def workers() -> Iterator[WorkerGroup]:
    with starting_warm():
        start_ray(2, runtime_env={"env_vars": {"ASKED_FOR": "this"}})
    yield WorkerGroup(Echo, reserve_devices(1, 2, "cpu"), "cpu", [(0,), (1,)])
    ray.shutdown()


def test_calls_go_to_all_and_come_back_in_order(workers: WorkerGroup) -> None:
    assert workers.call("add", 10) == [10, 11]
    assert workers.scatter("add", [(1,), (2,)]) == [1, 3]
    assert workers.call("environment") == [("PASSIVE", "this")] * 2


def test_no_token_array_is_copied_more_than_once_on_its_way(workers: WorkerGroup) -> None:
    samples = make_samples([30_000, 0, 20_000, 10_000])
    for s in samples:
        for name, dtype in ARRAYS.items():
            if getattr(s, name) is None:
                setattr(s, name, np.ones(len(s.response_ids), dtype))
    results = workers.call("receive", SampleBatch(samples))
    context = ray._private.worker.global_worker.get_serialization_context()
    message = context.serialize(SampleBatch(samples)).total_bytes
    arrays = sum(getattr(s, name).nbytes for s in samples for name in ARRAYS)
    assert arrays < message < 1.01 * arrays  # in the message once
    for number, (seen, log_probs) in enumerate(results):
        # Each array is a view, and all of them lie in the memory of that one message.
        assert [copied for _, copied in seen] == [False] * 4
        filled = [address for address, _ in seen[:1] + seen[2:]]
        assert max(filled) + 10_000 * 8 - min(filled) <= message
        assert not log_probs.flags.owndata
        sent = np.concatenate([s.old_log_probs for s in samples])
        np.testing.assert_array_equal(log_probs, sent + number)


def test_ranks_meet_at_the_address_that_nodes_know_each_other_by(workers: WorkerGroup) -> None:
    import psutil  # comes with ray

    workers.connect()
    (*first, address, interface), second = workers.call("where_it_joined")
    assert [first, list(second)] == [[0, 2], [1, 2, address, interface]]
    ip = ray.util.get_node_ip_address()
    assert address.rpartition(":")[0] == f"tcp://{ip}"
    assert ip in [a.address for a in psutil.net_if_addrs()[interface]]


def test_an_interpreter_that_ray_cannot_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/my files/.venv/bin/python")
    with pytest.raises(ValueError, match=r"'/my files/\.venv/bin/python': move it"):
        start_ray(1)


def test_a_ray_of_its_own_says_nothing_about_tokens() -> None:
    code = "from verl.cluster import start_ray; start_ray(1)"
    environment = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_MODE"} | warm_children()
    done = subprocess.run([warm_python(), "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0 and b"oken" not in done.stderr


def test_the_first_error_is_raised_while_others_hang(workers: WorkerGroup) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match="worker 1 says no"):
        workers.call("fail_or_hang")
    assert time.monotonic() - started < 300
