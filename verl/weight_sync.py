"""The policy's weights → the generation engines, in chunks of bounded size: by host memory and
Ray's object store, CUDA IPC from the actor rank on the same GPU, or a broadcast from actor rank 0
(`host`, `ipc` and `nccl` of `actor_rollout_ref.rollout.weight_transfer`)."""

from collections import ChainMap
from dataclasses import replace
from typing import Any

import ray

from verl.cluster import WorkerGroup, despite_deaths
from verl.rollout.pool import EnginePool

CHUNK_BYTES = 256 * 2**20  # about the size of one chunk; a larger tensor stands alone


class WeightSync:
    """Calling it gives the engines the policy's current weights."""

    def __init__(
        self, actor: WorkerGroup, engines: EnginePool, transfer: str, dtype: str | None
    ) -> None:
        """`dtype`: of the engines' weights; None: the device's usual one."""
        self.actor, self.engines, self.transfer, self.dtype = actor, engines, transfer, dtype
        self.connected: dict[int, int] = {}  # `engines.processes` in the broadcast's group

    def __call__(self, only: int | None = None) -> None:
        """Updates all engines, despite deaths, or number `only`, which was started anew."""
        with self.actor.exclusive:
            if only is None:
                despite_deaths(self._update_all)
            else:
                self._send("host", only)

    def _update_all(self) -> None:
        self.engines.wait_ready()
        if self.transfer == "nccl" and self.connected != self.engines.processes:
            self._connect()
        self._send(self.transfer)
        self.engines.stale.clear()
        self.engines.asleep = False

    def _connect(self) -> None:
        """Makes actor rank 0 and all engines one process group, for the broadcast."""
        address, size = self.actor.free_address(), 1 + len(self.engines) * self.engines.ranks
        self.engines.free_address()  # so that they use the addresses that nodes know each other by
        calls = self.actor.submit("join_engines", address, size, only=0)
        for i in range(len(self.engines)):
            rank = 1 + i * self.engines.ranks
            calls += self.engines.submit("connect", rank, size, address, only=i)
        self.engines.wait(calls)
        self.connected = self.engines.processes.copy()

    def _send(self, transfer: str, only: int | None = None) -> None:
        stored = self.engines.stored
        version, chunks = self.actor.call("plan_export", self.dtype, CHUNK_BYTES, stored)[0]
        self.engines.call("start_update", only=only)
        pending: list[Any] = []
        for chunk in chunks:
            exported = self.actor.submit("export", chunk, transfer)
            filled: Any = exported[0] if transfer == "host" else chunk
            if transfer == "ipc":
                by_rank = [part.ipc_handles for part in ray.get(exported)]
                # Of each weight, the handles of all ranks, by GPU.
                handles = [dict(ChainMap(*weight)) for weight in zip(*by_rank, strict=True)]
                filled = replace(chunk, ipc_handles=handles)
            calls = exported + self.engines.submit("load_weights", filled, only=only)
            # Copies on the host are made while the engines still read those before them.
            self.engines.wait(pending if transfer == "host" else calls)
            pending = calls
        self.engines.wait(pending)
        self.actor.call("finish_export")
        self.engines.call("finish_update", version, only=only)
