"""The actor's weights → the generation engines, in buckets of bounded size, in one of three ways:

host   through host memory and Ray's object store: everywhere, and the only one for the engine `hf`
ipc    CUDA IPC: each engine reads the copy of the actor rank on its own GPU (colocated)
nccl   a broadcast from actor rank 0 to engines on devices of their own (on CPUs by gloo)
"""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
import torch
import torch.distributed as dist
from torch import Tensor

from verl.models.fsdp import full_weights
from verl.utils.device import broadcast_group, default_dtype
from verl.workers.group import WorkerGroup, despite_deaths

if TYPE_CHECKING:
    from verl.workers.actor import Policy
    from verl.workers.engines import EngineGroup

logger = logging.getLogger(__name__)

BUCKET_BYTES = 256 * 2**20
"""About the size of one bucket; a larger tensor stands alone."""

Bucket = dict[str, Any]
"""Some weights: `names`, `dtype_names`, `shapes`, and for the ways host and ipc what holds them."""


class WeightExporter:
    """The sending side, which an actor rank inherits."""

    device: torch.device
    actor: Policy | None
    group: Any = None
    shared: Sequence[Tensor] = ()

    def join_engines(self, address: str, world_size: int) -> None:
        """Actor rank 0 becomes rank 0 of the group of the way `nccl`."""
        self.group = broadcast_group(self.device, address, 0, world_size)

    def start_export(
        self, way: str, dtype: str | None, bucket_bytes: int
    ) -> tuple[int, list[Bucket]]:
        """Returns the training steps that the policy has made, and all weights, tied ones once, in
        buckets of about `bucket_bytes`; as `dtype` (null: the device's usual one)."""
        self.way, dtype = way, dtype or default_dtype(self.device)
        self.dtype = getattr(torch, dtype)
        buckets: list[Bucket] = []
        left = -1
        for name, parameter in self.actor.model.lm.named_parameters():
            size = parameter.numel() * self.dtype.itemsize
            if size > left:
                buckets.append({"names": [], "dtype_names": [], "shapes": []})
                left = bucket_bytes
            left -= size
            row = (name, dtype, list(parameter.shape))
            for column, value in zip(buckets[-1].values(), row, strict=True):
                column.append(value)
        return self.actor.schedule.last_epoch, buckets

    def export(self, names: Sequence[str]) -> Bucket:
        """Gathers these weights, on all ranks together, and sends them; returns what this rank adds
        to the bucket."""
        self.actor.onload()
        weights = dict(full_weights(self.actor.model, names, self.dtype))
        if self.way == "ipc":
            # Kept until the next bucket; torch itself keeps what an engine has not let go of.
            self.shared = [value.contiguous() for value in weights.values()]
            return {"ipc_handles": [_ipc_handle(value) for value in self.shared]}
        if dist.get_rank() != 0:
            return {}
        if self.way == "host":
            return {"weights": {name: value.cpu() for name, value in weights.items()}}
        for value in weights.values():
            self.group.broadcast(value.contiguous(), 0).wait()
        return {}

    def finish_export(self) -> None:
        """Once all engines have loaded all buckets."""
        self.shared = ()
        self.actor.offload()


def _ipc_handle(value: Tensor) -> dict[str, tuple[Any, ...]]:
    """What vLLM's `ipc` weight transfer opens, by the GPU's id."""
    from torch.multiprocessing.reductions import reduce_tensor

    gpu = torch.cuda.get_device_properties(value.device).uuid
    return {str(gpu): reduce_tensor(value)[1]}


class WeightSync:
    """The driver's side. Calling it gives the engines the actor's current weights."""

    def __init__(
        self, actor: WorkerGroup, engines: EngineGroup, way: str, dtype: str | None
    ) -> None:
        self.actor, self.engines, self.way, self.dtype = actor, engines, way, dtype
        self.connected = False

    def __call__(self, only: int | None = None) -> None:
        """Updates all engines, again should one of them die meanwhile, or `only` the one with this
        number, which was started anew."""
        with self.actor.exclusive:
            if only is not None:
                return self._send(only)
            text = "a worker died while the engines got weights"
            despite_deaths(lambda: self._send(None), lambda: logger.warning(text))

    def _send(self, only: int | None) -> None:
        way = self.way
        if only is not None:
            way, self.connected = "host", False  # it belongs to no group
        elif self.engines.find_restarted():
            self.connected = False
        if way == "nccl" and not self.connected:
            self._connect()
        version, buckets = self.actor.call("start_export", way, self.dtype, BUCKET_BYTES)[0]
        self.engines.call("start_update", only=only)
        pending: list[Any] = []
        for bucket in buckets:
            calls = self._move(bucket, way, only)
            # Copies on the host are made while the engines still read those before them.
            self.engines.wait(pending if way == "host" else calls)
            pending = calls
        self.engines.wait(pending)
        self.actor.call("finish_export")
        self.engines.call("finish_update", version, only=only)

    def _move(self, bucket: Bucket, way: str, only: int | None) -> list[Any]:
        """Starts the way of one bucket; returns all calls to wait for."""
        exported = self.actor.submit("export", [(bucket["names"],)] * len(self.actor))
        load: Any = bucket
        if way == "host":
            load = exported[0]
        elif way == "ipc":
            ranks = [part["ipc_handles"] for part in ray.get(exported)]
            handles = [dict(ChainMap(*same)) for same in zip(*ranks, strict=True)]
            load = bucket | {"ipc_handles": handles}
        arguments = [(load,)] * len(self.engines)
        return exported + self.engines.submit("load_weights", arguments, only)

    def _connect(self) -> None:
        ranks = self.engines.ranks
        address, size = self.actor.free_address(), 1 + len(self.engines) * ranks
        self.engines.free_address()  # so that they use the addresses that nodes know each other by
        calls = self.actor.submit("join_engines", [(address, size)] * len(self.actor), only=0)
        places = [(1 + i * ranks, size, address) for i in range(len(self.engines))]
        self.engines.wait(calls + self.engines.submit("connect", places))
        self.connected = True
