"""How a vLLM worker takes the actor's weights: an engine of vLLM's weight-transfer interface
(https://docs.vllm.ai/en/latest/training/weight_transfer). Imported only where vLLM runs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from verl.utils.device import broadcast_group

BACKEND = "verl"


@dataclass
class GroupInfo(WeightTransferInitInfo):
    """The group of actor rank 0 and all vLLM workers; `rank` is that of the engine's first."""

    rank: int
    world_size: int
    address: str


class ActorWeights(IPCWeightTransferEngine):
    """Takes buckets of `verl.workers.weight_sync`, in any of its three ways: vLLM's CUDA IPC
    (`ipc_handles`), tensors on the host (`weights`), or a broadcast (neither)."""

    init_info_cls = GroupInfo

    def init_transfer_engine(self, init_info: GroupInfo) -> None:
        """Joins the group of the broadcast."""
        rank = init_info.rank + self.parallel_config.rank
        self.group = broadcast_group(self.device, init_info.address, rank, init_info.world_size)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Loads one bucket."""
        if "ipc_handles" in update_info:
            super().update_weights(update_info)
        elif "weights" in update_info:
            self.model.load_weights(update_info["weights"].items())
        else:
            self.model.load_weights(self._broadcast(**update_info))

    def _broadcast(self, names: list[str], dtype_names: list[str], shapes: list[list[int]]) -> Any:
        for name, dtype, shape in zip(names, dtype_names, shapes, strict=True):
            value = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            self.group.broadcast(value, 0).wait()
            yield name, value

    def finish_weight_update(self) -> None:
        """Makes the weights ready for use. Of tied embeddings vLLM's CPU kernels keep a copy of
        their own, for the output, which its reload doesn't renew."""
        super().finish_weight_update()
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)


def register() -> None:
    """Makes `ActorWeights` known to vLLM in this process; a `vllm.general_plugins` entry point, so
    that vLLM's own workers know it, too."""
    with suppress(ValueError):  # it was registered before
        WeightTransferEngineFactory.register_engine(BACKEND, ActorWeights)
