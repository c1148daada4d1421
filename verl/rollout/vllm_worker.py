"""What vLLM's workers get from here, where alone it is imported: the tokenizer's vocabulary, and a
weight transfer (https://docs.vllm.ai/en/latest/training/weight_transfer) from the actor."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory, ipc_engine
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.v1.sample.logits_processor import LogitsProcessor

from verl.protocol import WeightChunk
from verl.utils.device import broadcast_group

BACKEND = "verl"
VOCABULARY_SIZE = "verl_vocabulary_size"  # key of vLLM's `additional_config`


@dataclass
class GroupInfo(ipc_engine.IPCWeightTransferInitInfo):
    """The group of actor rank 0 and all vLLM workers; `rank` is that of the engine's first."""

    rank: int = 0
    world_size: int = 1
    address: str = ""


class ActorWeights(ipc_engine.IPCWeightTransferEngine):
    """Takes chunks of weights by any of the three transfers of `verl.weight_sync`: vLLM's CUDA IPC
    (`ipc_handles`), tensors on the host (`tensors`), or a broadcast (neither)."""

    init_info_cls = GroupInfo

    def init_transfer_engine(self, init_info: ipc_engine.IPCWeightTransferInitInfo) -> None:
        """Joins the group of the broadcast."""
        assert isinstance(init_info, GroupInfo)
        rank, size = init_info.rank + self.parallel_config.rank, init_info.world_size
        self.process_group = broadcast_group(self.device, init_info.address, rank, size)

    def start_weight_update(self) -> None:
        """Has vLLM's CPU kernels for experts make their copy anew, too."""
        methods: list[Any] = [getattr(m, "quant_method", None) for m in self.model.modules()]
        if methods := [m for m in methods if getattr(m, "moe_kernel", None)]:
            from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

            for method in methods:
                if isinstance(method.moe_kernel.fused_experts, CPUUnquantizedExperts):
                    method.moe_kernel = None  # as before the first weights
        super().start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Loads `update_info["chunk"]`."""
        chunk: WeightChunk = update_info["chunk"]
        if chunk.ipc_handles is not None:
            info = {"names": chunk.names, "shapes": chunk.shapes, "ipc_handles": chunk.ipc_handles}
            super().update_weights(info | {"dtype_names": [chunk.dtype] * len(chunk.names)})
        else:
            tensors = chunk.tensors or (self._receive(chunk.dtype, s) for s in chunk.shapes)
            cast(Any, self.model).load_weights(zip(chunk.names, tensors, strict=True))

    def _receive(self, dtype: str, shape: list[int]) -> torch.Tensor:
        value = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
        self.process_group.broadcast(value, 0).wait()
        return value

    def finish_weight_update(self) -> None:
        """Renews, too, the copy of tied embeddings that vLLM's CPU kernels keep for the output."""
        super().finish_weight_update()
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)


class OwnVocabulary(LogitsProcessor):
    """Nothing that the tokenizer doesn't know is sampled."""

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        self.size = vllm_config.additional_config[VOCABULARY_SIZE]

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Masks [B, V] in place."""
        logits[:, self.size :] = -torch.inf
        return logits

    def is_argmax_invariant(self) -> bool:
        """No: the most probable token may be one of those."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Nothing depends on the requests."""


def finish_open_update(worker: Any) -> None:
    """Ends an update that vLLM's `worker` has begun: until then it begins no other."""
    if worker._weight_update_active:
        worker.finish_weight_update()


def check_update(worker: Any) -> None:
    """Before an update ends. Raises: ValueError if vLLM's model has not taken all new weights."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    model = worker.weight_transfer_engine.model
    for name, module in model.named_modules():
        info = get_layerwise_info(module)
        stale = info.can_load() and not info.load_numel and [*module.parameters(recurse=False)]
        if stale and not isinstance(module, ParallelLMHead):  # which may be tied
            problem = f"vLLM's {type(model).__name__} takes no new weights of {name}"
            raise ValueError(f"{problem}: set actor_rollout_ref.rollout.name=hf")


def register() -> None:
    """Tells vLLM of `ActorWeights`; for vLLM's own workers a `vllm.general_plugins` entry point."""
    with suppress(ValueError):  # it was registered before
        WeightTransferEngineFactory.register_engine(BACKEND, ActorWeights)
