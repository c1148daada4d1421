"""Workers over Ray: start, placement, calls to all of them, results as they come."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from threading import Lock
from typing import Any, TypeVar

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verl.utils.device import worker_resources

T = TypeVar("T")

WORKER_ENV = {
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads slow down whoever shares the cores
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
}
WORKERS_PER_DEVICE = 2
"""Colocated, an actor rank and a generation engine share each device, in turns."""

DEATH_S = 5
"""After one worker's error, so many seconds may pass until Ray knows that another had died."""

MAX_DEATHS = 3
"""An engine that dies as often without having done anything ends the run."""

CONTROL = "control"
"""Ray's concurrency group of calls that don't wait for those that run."""


def start_ray(devices: int, num_cpus: int | None = None) -> None:
    """Joins the cluster at RAY_ADDRESS, or starts one on this machine that ends with this process.

    A cluster of our own offers as many CPUs as `devices` hold workers: they are slots, not cores.

    Raises: ValueError if the interpreter's path holds a space.
    """
    if " " in sys.executable:  # Ray's workers would wait for ever
        raise ValueError(f"Ray can't start {sys.executable!r}: move it to a path without spaces")
    if os.environ.get("RAY_ADDRESS"):
        # Workers there have the environment of `ray start`, but must find the same code.
        path = {k: v for k, v in os.environ.items() if k == "PYTHONPATH"}
        ray.init(runtime_env={"env_vars": path})
        return
    cpus = num_cpus or max(WORKERS_PER_DEVICE * devices, os.cpu_count() or 1)
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level="warning")


def place(nodes: int, devices_per_node: int, device: str | None, timeout_s: float = 300) -> Slots:
    """Reserves `devices_per_node` devices on each of `nodes` different machines.

    Raises: ValueError if the cluster doesn't have them, or they are not free after `timeout_s`
    seconds.
    """
    need = worker_resources(device, 1)
    bundle = {"CPU": float(WORKERS_PER_DEVICE), "GPU": need.get("num_gpus", 0.0)}
    bundle = {name: amount for name, amount in bundle.items() if amount}
    share = {name: amount * devices_per_node for name, amount in bundle.items()}
    deadline = time.monotonic() + timeout_s
    wanted = (
        f"trainer.nnodes={nodes} × {devices_per_node} devices (trainer.n_gpus_per_node and "
        f"trainer.rollout_gpus_per_node) needs {nodes} "
        f"machine(s) with {', '.join(f'{amount:g} {name}' for name, amount in share.items())} each"
    )
    machines = [node for node in ray.nodes() if node["Alive"]]
    totals = [machine["Resources"] for machine in machines]
    enough = sum(all(total.get(k, 0) >= share[k] for k in share) for total in totals)
    if enough < nodes:
        raise ValueError(
            f"{wanted}; the cluster has {enough}: lower the keys, or start Ray on more machines "
            f"(docs/multi_node.md){_free_resources(machines, bundle)}"
        )
    # Asked for whole shares, Ray itself picks machines that have them free, all at once. The shares
    # then make way for a bundle per device: only there are two workers sure to get the same GPU.
    shares = _reserve([share] * nodes, "STRICT_SPREAD", deadline)
    if shares:
        chosen = placement_group_table(shares)["bundles_to_node_id"]
        remove_placement_group(shares)
        order = [chosen[node] for node in range(nodes) for _ in range(devices_per_node)]
        labels = [{"ray.io/node-id": node_id} for node_id in order]
        if group := _reserve([bundle] * len(order), "PACK", deadline, labels):
            return [(group, index) for index in range(len(order))]
    raise ValueError(
        f"{wanted}; after {timeout_s:.0f} s they are not free: lower the keys, or stop other jobs"
        + _free_resources(machines, bundle)
    )


def _reserve(
    bundles: list[dict[str, float]],
    strategy: str,
    deadline: float,
    labels: list[dict[str, str]] | None = None,
) -> PlacementGroup | None:
    group = placement_group(bundles, strategy, bundle_label_selector=labels)
    if ray.wait([group.ready()], timeout=max(0, deadline - time.monotonic()))[0]:
        return group
    remove_placement_group(group)
    return None


def _free_resources(machines: list[dict[str, Any]], names: Iterable[str]) -> str:
    """A line per machine."""
    free = available_resources_per_node()
    text = ""
    for node in machines:
        left, total = free.get(node["NodeID"], {}), node["Resources"]
        parts = [f"{left.get(n, 0):g} of {total.get(n, 0):g} {n} free" for n in names]
        text += f"\n  {node['NodeManagerAddress']}: {', '.join(parts)}"
    return text


def despite_deaths(action: Callable[[], T], after_death: Callable[[], Any]) -> T:
    """`action()`; again after `after_death()`, should a worker die meanwhile. Raises: RayActorError
    at the death number `MAX_DEATHS`."""
    for _ in range(MAX_DEATHS - 1):
        try:
            return action()
        except RayActorError:
            after_death()
    return action()


Slots = list[tuple[PlacementGroup, int]]
"""(placement group, bundle) of each device, node by node: the order of ranks."""


class WorkerGroup:
    """One Ray actor per slot, made from an ordinary class, and calls to all of them."""

    def __init__(
        self,
        cls: type,
        slots: Slots,
        device: str | None,
        arguments: Sequence[tuple[Any, ...]],
        share: float = 1 / WORKERS_PER_DEVICE,
        environments: Sequence[dict[str, str]] | None = None,
        max_restarts: int = 0,
    ) -> None:
        """Starts `cls(*arguments[i])` in slot i, with `share` of the slot's device and with the
        variables `environments[i]`; again, `max_restarts` times (-1: always), should it die."""
        environments = environments or [{}] * len(slots)
        self.workers = [
            ray.remote(concurrency_groups={CONTROL: 1})(cls)
            .options(
                **worker_resources(device, share),
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group,
                    placement_group_bundle_index=index,
                    placement_group_capture_child_tasks=True,
                ),
                runtime_env={"env_vars": WORKER_ENV | variables},
                max_restarts=max_restarts,
            )
            .remote(*args)
            for (group, index), args, variables in zip(slots, arguments, environments, strict=True)
        ]
        self._submission = Lock()
        self.exclusive = Lock()
        """For whoever needs that nothing else happens to the workers between two calls."""

    def __len__(self) -> int:
        return len(self.workers)

    def call(self, method: str, *args: Any, only: int | None = None) -> list[Any]:
        """`method(*args)` on every worker, or `only` on the one with this number; results in order.
        The first error is raised at once."""
        return self.wait(self.submit(method, [args] * len(self), only))

    def scatter(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """`method(*arguments[i])` on worker i; results in order. The first error is raised at
        once."""
        return self.wait(self.submit(method, arguments))

    def submit(
        self, method: str, arguments: Sequence[tuple[Any, ...]], only: int | None = None
    ) -> list[Any]:
        """Starts `method(*arguments[i])` on worker i; references to the results. All workers get
        their calls in the same order, from whatever threads these come."""
        with self._submission:
            return [
                getattr(worker, method).remote(*args)
                for i, (worker, args) in enumerate(zip(self.workers, arguments, strict=True))
                if only in (None, i)
            ]

    @staticmethod
    def wait(references: Sequence[Any]) -> list[Any]:
        """The results, in order. The first error is raised at once: ranks that wait for the failed
        one would never answer. A worker's death is raised rather than the errors it causes."""
        pending = list(references)
        while pending:
            ready, pending = ray.wait(pending)
            try:
                ray.get(ready)
            except RayTaskError:
                for reference in ray.wait(pending, timeout=DEATH_S)[0] if pending else ():
                    with suppress(RayTaskError):
                        ray.get(reference)
                raise
        return ray.get(list(references))

    def connect(self) -> None:
        """Makes the workers ranks of one process group; rank 0's machine is the meeting point."""
        address = self.free_address()
        self.scatter("connect", [(rank, len(self), address) for rank in range(len(self))])

    def free_address(self) -> str:
        """`tcp://host:port` of the first worker's machine; makes all workers use the addresses that
        nodes know each other by."""
        ask = [worker.__ray_call__.remote(_network_address) for worker in self.workers]
        return ray.get(ask)[0]


def _network_address(_: Any) -> str:
    """`tcp://` with a free port of the address that the other nodes know this one by.

    gloo gets to use that address's interface, too: by itself it takes what the host's name stands
    for, which is often 127.0.1.1.
    """
    import psutil  # comes with ray

    ip = ray.util.get_node_ip_address()
    for interface, addresses in psutil.net_if_addrs().items():
        if ip in [a.address for a in addresses]:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    with socket.socket() as s:
        s.bind(("", 0))
        return f"tcp://{ip}:{s.getsockname()[1]}"
