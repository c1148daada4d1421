"""Workers over Ray: start, placement, calls to all of them, results as they come."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verl.utils.device import worker_resources

WORKER_ENV = {
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads slow down whoever shares the cores
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
}
WORKERS_PER_DEVICE = 2
"""An actor rank and a generation engine share each device, in turns."""


def start_ray(num_workers: int, num_cpus: int | None = None) -> None:
    """Joins the cluster at RAY_ADDRESS, or starts one on this machine that ends with this process.

    A cluster of our own offers as many CPUs as there are workers: they are slots, not cores.
    """
    if os.environ.get("RAY_ADDRESS"):
        ray.init()
        return
    cpus = num_cpus or max(WORKERS_PER_DEVICE * num_workers, os.cpu_count() or 1)
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level="warning")


def place(nodes: int, devices_per_node: int, device: str | None, timeout_s: float = 300) -> Slots:
    """Reserves `devices_per_node` devices on each of `nodes` machines.

    Raises: ValueError if the cluster doesn't have them, or they are not free within `timeout_s`
    seconds.
    """
    need = worker_resources(device, 1)
    bundle = {"CPU": float(WORKERS_PER_DEVICE), "GPU": need.get("num_gpus", 0.0)}
    bundle = {name: amount for name, amount in bundle.items() if amount}
    wanted = (
        f"trainer.nnodes={nodes} × trainer.n_gpus_per_node={devices_per_node} needs {bundle} each"
    )
    total = ray.cluster_resources()
    if any(total.get(name, 0) < nodes * devices_per_node * x for name, x in bundle.items()):
        has = {name: total.get(name, 0) for name in bundle}
        raise ValueError(f"{wanted}; the cluster has {has} in all: lower the keys")
    groups = [placement_group([bundle] * devices_per_node, "STRICT_PACK") for _ in range(nodes)]
    ready, _ = ray.wait([g.ready() for g in groups], num_returns=nodes, timeout=timeout_s)
    if len(ready) < nodes:
        raise ValueError(
            f"{wanted}; after {timeout_s:.0f} s that many are not free on {nodes} machine(s): "
            "lower the keys, or stop the jobs that hold the rest"
        )
    return [(group, index) for group in groups for index in range(devices_per_node)]


Slots = list[tuple[PlacementGroup, int]]
"""(placement group, bundle) of each device, in the order of ranks."""


class WorkerGroup:
    """One Ray actor per slot, made from an ordinary class, and calls to all of them."""

    def __init__(
        self, cls: type, slots: Slots, device: str | None, arguments: Sequence[tuple[Any, ...]]
    ) -> None:
        """Starts `cls(*arguments[i])` in slot i."""
        resources = worker_resources(device, 1 / WORKERS_PER_DEVICE)
        self.workers = [
            ray.remote(cls)
            .options(
                **resources,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=index
                ),
                runtime_env={"env_vars": WORKER_ENV},
            )
            .remote(*args)
            for (group, index), args in zip(slots, arguments, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.workers)

    def call(self, method: str, *args: Any) -> list[Any]:
        """`method(*args)` on every worker; results in order. The first error is raised at once."""
        return self.scatter(method, [args] * len(self))

    def scatter(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """`method(*arguments[i])` on worker i; results in order. The first error is raised at once:
        ranks that wait for the failed one would never answer."""
        refs = [
            getattr(worker, method).remote(*args)
            for worker, args in zip(self.workers, arguments, strict=True)
        ]
        pending = list(refs)
        while pending:
            ready, pending = ray.wait(pending)
            ray.get(ready)
        return ray.get(refs)

    def references(
        self, method: str, arguments: Sequence[tuple[Any, ...]], ahead: int = -1
    ) -> Iterator[Any]:
        """References to what the generators `method(*arguments[i])` on worker i yield, as it comes.

        A generator waits while `ahead` of its results are unread; -1: it never waits. The error of
        a worker comes as the last reference of its stream.
        """
        options = {"num_returns": "streaming", "_generator_backpressure_num_objects": ahead}
        open_streams = [
            getattr(worker, method).options(**options).remote(*args)
            for worker, args in zip(self.workers, arguments, strict=True)
        ]
        while open_streams:
            ready, _ = ray.wait(open_streams)
            for stream in ready:
                try:
                    yield next(stream)
                except StopIteration:
                    open_streams.remove(stream)

    def stream(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """What those generators yield, in the order in which it arrives; raises the first error."""
        for reference in self.references(method, arguments):
            yield ray.get(reference)

    def connect(self) -> None:
        """Makes the workers ranks of one process group; rank 0's machine is the meeting point."""
        address = ray.get(self.workers[0].__ray_call__.remote(_free_address))
        self.scatter("connect", [(rank, len(self), address) for rank in range(len(self))])


def _free_address(_: Any) -> str:
    with socket.socket() as s:
        s.bind(("", 0))
        return f"tcp://{ray.util.get_node_ip_address()}:{s.getsockname()[1]}"
