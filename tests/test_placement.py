"""Placement on a real Ray cluster of two large nodes and a small one."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import ray
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from tests.helpers import ray_cluster, starting_warm
from verl import cluster
from verl.cluster import WORKER_ENV, Slots, WorkerGroup, reserve_devices, start_ray
from verl.models.policy import PolicyWorker
from verl.utils.device import cluster_device


class Place:
    """A worker that knows where it is."""

    def get(self) -> tuple[str, list[int]]:
        return ray.get_runtime_context().get_node_id(), ray.get_gpu_ids()


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[str]]:
    """Ids of the nodes. The small one has room for one device, without a GPU."""
    large, small = {"num_cpus": 4, "num_gpus": 2}, {"num_cpus": 2}
    with (
        starting_warm(),
        ray_cluster(large, large, small) as address,
        pytest.MonkeyPatch.context() as environment,
    ):
        environment.setenv("RAY_ADDRESS", address)
        start_ray(2)
        cpus = {node["NodeID"]: node["Resources"]["CPU"] for node in ray.nodes()}
        yield sorted(cpus, key=lambda node: -cpus[node])


@pytest.mark.parametrize("kind", ["a closed port", "a silent one"])
def test_a_cluster_that_does_not_answer_is_named(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    assert cluster.ANSWER_S < 15
    monkeypatch.setattr(cluster, "ANSWER_S", 4)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == "a silent one":
            listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ValueError, match=f"RAY_ADDRESS={address}: no Ray cluster answers"):
            start_ray(1)


@contextmanager
def placed(*args, **kwargs) -> Iterator[Slots]:
    slots = reserve_devices(*args, **kwargs)
    try:
        yield slots
    finally:
        remove_placement_group(slots[0][0])


@contextmanager
def busy(node: str, seconds: float = 0) -> Iterator[None]:
    """Another job holds 3 CPUs of a node; it ends by itself after `seconds`, if they are given."""
    group = placement_group([{"CPU": 3}], bundle_label_selector=[{"ray.io/node-id": node}])
    assert group.wait(30)
    if seconds:
        threading.Timer(seconds, remove_placement_group, [group]).start()
    try:
        yield
    finally:
        remove_placement_group(group)


def nodes_of(slots: Slots) -> list[str]:
    """The node of each slot."""
    return [placement_group_table(group)["bundles_to_node_id"][index] for group, index in slots]


def test_nodes_are_different_machines(nodes: list[str]) -> None:
    with placed(2, 1, "cpu") as slots:  # each of the large ones could hold both
        first, second = nodes_of(slots)
    assert first != second


def test_slots_come_node_by_node(nodes: list[str]) -> None:
    with placed(2, 2, "cpu") as slots:
        a, b, c, d = nodes_of(slots)
    assert a == b and c == d and {a, c} == set(nodes[:2])


def test_workers_of_a_slot_share_its_gpu(nodes: list[str]) -> None:
    """Where Ray only counts GPUs, as here, it still says who gets which."""
    with placed(1, 2, "cuda") as slots:
        actors, engines = (WorkerGroup(Place, slots, "cuda", [()] * 2) for _ in range(2))
        (node, (first,)), (same_node, (second,)) = actors.call("get")
        assert engines.call("get") == actors.call("get")
    assert [node, same_node] == nodes_of(slots)
    assert {first, second} == {0, 1}


def test_workers_of_a_cluster_that_others_started_get_their_variables(nodes: list[str]) -> None:
    with placed(1, 1, "cpu") as slots:
        worker = WorkerGroup(Place, slots, "cpu", [()])
        found = worker.call(
            "__ray_call__", lambda _: {name: os.environ[name] for name in WORKER_ENV}
        )
    assert found == [WORKER_ENV]


def test_a_gpu_that_torch_cannot_use_is_an_error(nodes: list[str]) -> None:
    """Ray sees GPUs that an old driver hides from torch, as it does here: no CPU takes their
    place in silence."""
    assert cluster_device("cpu") == "cpu"
    device = cluster_device(None)
    assert device == "cuda"
    with placed(1, 1, device) as slots:
        ranks = WorkerGroup(PolicyWorker, slots, device, [(device,)])
        with pytest.raises(ray.exceptions.RayActorError, match=r"can't use the GPU: .*CUDA"):
            ranks.free_address()


def test_a_busy_node_is_left_out(nodes: list[str]) -> None:
    for node in nodes[:2]:
        with busy(node), placed(2, 1, "cpu", timeout_s=30) as slots:
            assert set(nodes_of(slots)) == set(nodes) - {node}


def test_it_waits_for_busy_nodes(nodes: list[str]) -> None:
    started = time.monotonic()
    with busy(nodes[0], seconds=2), placed(2, 2, "cpu", timeout_s=60) as slots:
        assert set(nodes_of(slots)) == set(nodes[:2])
    assert time.monotonic() - started > 2


def test_it_gives_up_on_nodes_that_stay_busy(nodes: list[str]) -> None:
    with busy(nodes[0]), pytest.raises(ValueError) as refused:
        reserve_devices(3, 1, "cpu", timeout_s=2)
    message = str(refused.value)
    assert "trainer.nnodes=3" in message and "after 2 s they are not free" in message
    assert message.endswith("lower the keys, or stop other jobs (`ray status -v`)")
    with placed(3, 1, "cpu", timeout_s=30):  # nothing of the refused one is left
        pass


@pytest.mark.parametrize(
    ("arguments", "has"),
    [((4, 1, "cpu"), 3), ((3, 2, "cpu"), 2), ((1, 5, "cpu"), 0), ((3, 1, "cuda"), 2)],
    ids=["too few nodes", "the third is too small", "enough in sum only", "too few GPUs"],
)
def test_what_the_cluster_lacks_is_refused_at_once(
    nodes: list[str], arguments: tuple[int, int, str], has: int
) -> None:
    started = time.monotonic()
    with pytest.raises(
        ValueError, match=f"the cluster has {has} .*: lower the keys, or start Ray on more"
    ):
        reserve_devices(*arguments)
    assert time.monotonic() - started < 10
