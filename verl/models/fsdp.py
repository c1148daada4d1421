"""A Hugging Face causal model as an FSDP2 policy: build, shard, offload, export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from verl.models.hf import load_generation_config, load_hf_config, load_hf_model
from verl.models.logprobs import chunked_log_probs
from verl.models.packing import Batch, register_packed_attention
from verl.trainer.config.model_schema import FSDPConfig, ModelConfig
from verl.utils.device import default_dtype, default_packed_attention

ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
"""Layer types that see nothing but what attention lets them see."""


class PolicyModel(nn.Module):
    """Decoder and output embedding with one forward pass: log-probabilities of given tokens."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
        """(log_probs, entropy) of `batch.targets`, float32 [R] each."""
        output = self.lm.get_decoder()(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            **batch.model_kwargs,
        )
        hidden = output.last_hidden_state.flatten(0, 1)[batch.predictors]  # [R, H]
        head = self.lm.get_output_embeddings()
        return chunked_log_probs(hidden, head.weight, batch.targets, temperature, head.bias)


def build_policy(model: ModelConfig, fsdp: FSDPConfig, mesh: DeviceMesh) -> PolicyModel:
    """Loads the model on rank 0 and shards it over `mesh`; fp32 master weights.

    Every rank makes an empty skeleton, shards it, and receives its part of rank 0's weights.
    """
    device = torch.device(mesh.device_type)
    precision = fsdp.mixed_precision
    compute_dtype = getattr(torch, precision.param_dtype or default_dtype(device))
    attention = "sdpa"
    if model.use_remove_padding:
        _check_packable(load_hf_config(model), model.path)
        register_packed_attention()
        attention = default_packed_attention(device, compute_dtype)
    lm = _skeleton(model, attn_implementation=attention, dtype=torch.float32)
    if model.enable_gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy = PolicyModel(lm)
    dtypes = MixedPrecisionPolicy(compute_dtype, getattr(torch, precision.reduce_dtype))
    shard = partial(fully_shard, mesh=mesh, mp_policy=dtypes)
    for layer in _decoder_layers(lm):
        shard(layer, reshard_after_forward=fsdp.reshard_after_forward)
    shard(policy, reshard_after_forward=False)

    loaded = PolicyModel(load_hf_model(model, torch.float32)) if dist.get_rank() == 0 else None
    set_model_state_dict(
        policy,
        loaded.state_dict() if loaded else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    lm.tie_weights()
    _broadcast_buffers(policy, loaded, device)
    return policy.train()


def _skeleton(model: ModelConfig, **options: Any) -> nn.Module:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            load_hf_config(model), trust_remote_code=model.trust_remote_code, **options
        )


def _check_packable(config: Any, path: str) -> None:
    """Raises ValueError for layers that carry state from one packed sequence into the next."""
    others = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    architecture = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if others or getattr(architecture, "_is_stateful", False):  # Mamba, RWKV, …
        raise ValueError(
            f"{path}: a {config.model_type} model has layers that are not attention "
            f"({', '.join(sorted(others)) or 'recurrent'}), and those mix packed sequences: set "
            "actor_rollout_ref.model.use_remove_padding=False"
        )


def _decoder_layers(lm: nn.Module) -> list[nn.Module]:
    """The blocks that are sharded one by one: those that transformers never splits."""
    names = set(lm._no_split_modules or ())
    layers = [m for m in lm.modules() if type(m).__name__ in names]
    if not layers:
        raise ValueError(f"{type(lm).__name__} does not name its decoder layers: not supported")
    return layers


def _broadcast_buffers(policy: nn.Module, loaded: nn.Module | None, device: torch.device) -> None:
    """Fills the skeleton's buffers (rotary frequencies, …), which no state dict holds."""
    source = dict(loaded.named_buffers()) if loaded else {}
    for name, buffer in list(policy.named_buffers()):
        value = torch.empty_like(buffer, device=device)
        if loaded:
            value.copy_(source[name])
        dist.broadcast(value, 0)
        parent, _, leaf = name.rpartition(".")
        setattr(policy.get_submodule(parent), leaf, value)


def move_optimizer(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Moves the optimizer's states to `device`."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                # Towards the host, a copy that doesn't block would take pinned memory.
                state[name] = value.to(device, non_blocking=device.type == "cuda")


def full_weights(
    policy: PolicyModel, names: Sequence[str], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor) of each named weight, one at a time. All ranks must
    iterate: gathering a tensor is collective."""
    for name in names:
        value = policy.lm.get_parameter(name).detach()
        yield name, (value.full_tensor() if isinstance(value, DTensor) else value).to(dtype)


def save_hf_model(policy: PolicyModel, model: ModelConfig, folder: Path, tokenizer: Any) -> None:
    """Writes the gathered model in Hugging Face format (rank 0), with its tokenizer."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(policy, options=options)
    if dist.get_rank() != 0:
        return
    shell = _skeleton(model)
    shell.generation_config = load_generation_config(model)
    state = {name.removeprefix("lm."): value for name, value in weights.items()}
    shell.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
