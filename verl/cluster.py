"""Workers over Ray: their devices, start and calls. Only this module makes Ray actors."""

import logging
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Lock
from typing import Any

import psutil
import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verl.utils.device import worker_resources

logger = logging.getLogger(__name__)

WORKER_ENV = {
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads slow down whoever shares the cores
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
}
WORKERS_PER_DEVICE = 2  # colocated, an actor rank and an engine share each device, in turns
ANSWER_S = 12  # longest time that a cluster may take to say that it is there
DEATH_S = 5  # seconds after one worker's error in which Ray gets to know that another had died
MAX_DEATHS = 3  # an engine that dies as often without having done anything ends the run
CONTROL = "control"  # Ray's concurrency group of calls that don't wait for those that run

Slots = list[tuple[PlacementGroup, int]]  # a bundle of one device each, in the order of ranks


def start_ray(
    devices: int, num_cpus: int | None = None, runtime_env: dict[str, Any] | None = None
) -> None:
    """Joins the cluster at RAY_ADDRESS, or starts one on this machine that ends with this process
    and offers as many CPUs as `devices` hold workers: they are slots, not cores. Raises: ValueError
    if the interpreter's path holds a space, or nobody answers at RAY_ADDRESS."""
    if " " in sys.executable:  # Ray's workers would wait for ever
        raise ValueError(f"Ray can't start {sys.executable!r}: move it to a path without spaces")
    if address := os.environ.get("RAY_ADDRESS"):
        _check_cluster(address)
        # Workers there have the environment of `ray start`, but must find the same code.
        path = {k: v for k, v in os.environ.items() if k == "PYTHONPATH"}
        given = dict(runtime_env or {})
        ray.init(runtime_env=given | {"env_vars": path | given.get("env_vars", {})})
        return
    # It says that it makes a token, as it does for every cluster of its own.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel("ERROR")
    cpus = num_cpus or max(WORKERS_PER_DEVICE * devices, os.cpu_count() or 1)
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # one for each core
    options: Any = {"include_dashboard": False, "logging_level": logging.WARNING}
    own = {name: os.environ[name] for name in WORKER_ENV if name in os.environ}
    # Ray's processes live until this one has ended in order, also where a terminal is closed.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        os.environ |= WORKER_ENV  # which its workers inherit
        ray.init(address="local", num_cpus=cpus, runtime_env=runtime_env or None, **options)
    finally:
        for name in WORKER_ENV:
            del os.environ[name]
        os.environ |= own
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


def _check_cluster(address: str) -> None:
    """Raises ValueError if no cluster answers, for which `ray.init` would wait for ever."""
    if "://" in address or address == "local":  # Ray itself doesn't wait long for these
        return
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
    try:
        subprocess.run(command, capture_output=True, timeout=ANSWER_S, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        said = (error.stderr or b"").decode().strip().rpartition("\n")[2] or "nothing"
        remedy = "start one there with `ray start --head`, or unset the variable"
        raise ValueError(
            f"RAY_ADDRESS={address}: no Ray cluster answers (`ray status`: {said}): {remedy}"
        ) from None


def reserve_devices(
    nodes: int, devices_per_node: int, device: str, timeout_s: float = 300
) -> Slots:
    """Reserves `devices_per_node` devices on each of `nodes` different machines. Raises: ValueError
    if the cluster doesn't have them, or they are not free after `timeout_s` seconds."""
    per_device = {"CPU": float(WORKERS_PER_DEVICE)}
    if gpus := worker_resources(device, 1).get("num_gpus"):
        per_device["GPU"] = gpus
    per_node = {name: amount * devices_per_node for name, amount in per_device.items()}
    machines = [node for node in ray.nodes() if node["Alive"]]
    enough = sum(all(m["Resources"].get(k, 0) >= per_node[k] for k in per_node) for m in machines)
    remedy = "lower the keys, or start Ray on more, or with more --num-cpus (docs/multi_node.md)"
    problem = f"the cluster has {enough} (`ray status -v`): {remedy}"
    if enough >= nodes:
        deadline = time.monotonic() + timeout_s
        # Asked for whole shares, Ray itself picks machines that have them free, all at once. They
        # then make way for a bundle per device: only there do two workers get the same GPU.
        if shares := _placement_group(deadline, [per_node] * nodes, "STRICT_SPREAD"):
            chosen = placement_group_table(shares)["bundles_to_node_id"]
            remove_placement_group(shares)
            order = [chosen[node] for node in range(nodes) for _ in range(devices_per_node)]
            labels = [{"ray.io/node-id": node_id} for node_id in order]
            bundles = [per_device] * len(order)
            if reserved := _placement_group(deadline, bundles, bundle_label_selector=labels):
                return [(reserved, index) for index in range(len(order))]
        remedy = "lower the keys, or stop other jobs (`ray status -v`)"
        problem = f"after {timeout_s:.0f} s they are not free: {remedy}"
    raise ValueError(
        f"trainer.nnodes={nodes} × {devices_per_node} devices (trainer.n_gpus_per_node and "
        f"trainer.rollout_gpus_per_node) needs {nodes} machine(s) with "
        f"{', '.join(f'{amount:g} {name}' for name, amount in per_node.items())} each; {problem}"
    )


def _placement_group(deadline: float, *args: Any, **options: Any) -> PlacementGroup | None:
    """None if Ray can't make it in time."""
    made = placement_group(*args, **options)
    if ray.wait([made.ready()], timeout=max(0, deadline - time.monotonic()))[0]:
        return made
    remove_placement_group(made)
    return None


def despite_deaths(action: Callable[..., Any], *args: Any) -> Any:
    """`action(*args)`; again, should a worker die. Raises: RayActorError at death `MAX_DEATHS`."""
    for _ in range(MAX_DEATHS - 1):
        try:
            return action(*args)
        except RayActorError as error:
            logger.warning("a worker died: %s", error)
    return action(*args)


class WorkerGroup:
    """One Ray actor per slot, made from an ordinary class, and calls to all of them."""

    def __init__(
        self,
        cls: type,
        slots: Slots,
        device: str,
        arguments: Sequence[tuple[Any, ...]],
        share: float = 1 / WORKERS_PER_DEVICE,
        **options: Any,
    ) -> None:
        """Starts `cls(*arguments[i])` in slot i, with `share` of its device and Ray's `options`."""
        options |= worker_resources(device, share) | {"concurrency_groups": {CONTROL: 1}}
        if os.environ.get("RAY_ADDRESS"):  # else they inherit it, which starts them sooner
            options["runtime_env"] = {"env_vars": WORKER_ENV}  # beside what `ray.init` got
        actor: Any = ray.remote(**options)(cls)
        self.workers: list[Any] = []
        for (reserved, bundle), args in zip(slots, arguments, strict=True):
            # True: what the worker itself starts is placed there, too.
            strategy = PlacementGroupSchedulingStrategy(reserved, bundle, True)
            self.workers.append(actor.options(scheduling_strategy=strategy).remote(*args))
        self._submission = Lock()
        self.exclusive = Lock()  # held by whoever needs that nothing else happens between two calls

    def __len__(self) -> int:
        return len(self.workers)

    def call(self, method: str, *args: Any, only: int | None = None) -> list[Any]:
        """`method(*args)` on every worker, or on worker number `only` (see `wait`)."""
        return self.wait(self.submit(method, *args, only=only))

    def submit(self, method: str, *args: Any, only: int | None = None) -> list[Any]:
        """`call` without the waiting. Workers get all calls in the same order, from any thread."""
        with self._submission:
            workers = self.workers if only is None else [self.workers[only]]
            return [getattr(worker, method).remote(*args) for worker in workers]

    def scatter(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """`method(*arguments[i])` on worker i (see `wait`)."""
        with self._submission:
            pairs = zip(self.workers, arguments, strict=True)
            calls = [getattr(worker, method).remote(*args) for worker, args in pairs]
        return self.wait(calls)

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

    def connect(self, timeout_s: int | None = None) -> None:
        """Makes the workers ranks of one process group; rank 0's machine is the meeting point."""
        rest = len(self), self.free_address(), timeout_s
        self.scatter("connect", [(rank, *rest) for rank in range(len(self))])

    def free_address(self) -> str:
        """`tcp://host:port` of the first worker's machine; all workers get `_network_address`."""
        return self.call("__ray_call__", _network_address)[0]


def _network_address(_: Any) -> str:
    """`tcp://` with a free port of the address that the other nodes know this one by; makes gloo
    use it, too, instead of what the host's name stands for, which is often 127.0.1.1."""
    ip = ray.util.get_node_ip_address()
    for interface, addresses in psutil.net_if_addrs().items():
        if any(a.address == ip for a in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return f"tcp://{ip}:{free_port()}"


def free_port() -> int:
    """A port that nobody listens at, and that the system gives to no connection of its own."""
    while True:
        with socket.socket() as s, suppress(OSError):
            s.bind(("", port := random.randrange(20_000, 32_768)))
            return port
