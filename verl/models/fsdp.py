"""A Hugging Face causal model as an FSDP2 policy: build and shard."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from verl.config.base import ClassifierConfig
from verl.config.schema import FSDPConfig, ModelConfig
from verl.models.folder import skeleton
from verl.models.hf import (
    architecture,
    load_hf_config,
    load_hf_model,
    num_embeddings,
    vocabulary_size,
)
from verl.models.logprobs import PolicyModel
from verl.models.lora import add_adapters
from verl.models.reward import RewardModel
from verl.utils.device import default_dtype, default_packed_attention, saved_on_host


def build_policy(model: ModelConfig, fsdp: FSDPConfig, device: torch.device) -> Any:
    """A `PolicyModel`, or the `RewardModel` of a classifier: every rank shards an empty skeleton,
    and gets its part of what rank 0 loads. Raises: ValueError for a model that can't be sharded, or
    packed."""
    precision = fsdp.mixed_precision
    compute_dtype = getattr(torch, precision.param_dtype or default_dtype(device.type))
    attention = "sdpa"
    if model.use_remove_padding:
        _check_packable(model)
        attention = default_packed_attention(device, compute_dtype)
    lm = skeleton(model, attn_implementation=attention, dtype=getattr(torch, fsdp.model_dtype))
    lm = add_adapters(lm, model)
    if model.enable_gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    if isinstance(model, ClassifierConfig):
        policy: Any = RewardModel(lm)
    else:
        size = min(vocabulary_size(model), num_embeddings(model))
        offload = model.enable_gradient_checkpointing and model.enable_activation_offload
        policy = PolicyModel(lm, size, saved_on_host(device) if offload else nullcontext)
    dtypes = MixedPrecisionPolicy(compute_dtype, getattr(torch, precision.reduce_dtype))
    ranks, size = dist.get_world_size(), max(1, fsdp.fsdp_size)
    shape = (ranks,) if fsdp.fsdp_size in (-1, ranks) else (ranks // size, size)
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    shard = partial(fully_shard, mesh=mesh, mp_policy=dtypes)
    layers = [m for m in lm.modules() if type(m).__name__ in (lm._no_split_modules or ())]
    if not layers:
        raise ValueError(f"{type(lm).__name__} does not name its decoder layers: not supported")
    for layer in layers:
        shard(layer, reshard_after_forward=fsdp.reshard_after_forward)
    shard(policy, reshard_after_forward=False)
    policy.to_empty(device=device)  # else the weights would be sent by way of the host
    load_weights(policy, model, getattr(torch, fsdp.model_dtype))
    return policy.train()


def load_weights(policy: Any, model: ModelConfig, dtype: torch.dtype) -> None:
    """Every rank gets its part of what rank 0 loads from the model's folder, as `dtype`, and of
    LoRA's adapters."""
    wrap: Any = RewardModel if isinstance(model, ClassifierConfig) else PolicyModel
    loaded = None
    if dist.get_rank() == 0:
        loaded = wrap(add_adapters(load_hf_model(model, dtype), model))
    options = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dcp.set_model_state_dict(policy, loaded.state_dict() if loaded else {}, options=options)
    policy.lm.tie_weights()
    # Buffers (rotary frequencies, …) are in no state dict.
    buffers: list[Any] = [dict(loaded.named_buffers()) if loaded else None]
    dist.broadcast_object_list(buffers, 0)
    assert buffers[0].keys() == {name for name, _ in policy.named_buffers()}
    for name, value in buffers[0].items():
        parent, _, leaf = name.rpartition(".")
        module = policy.get_submodule(parent)
        setattr(module, leaf, value.to(module.get_buffer(leaf).device))


def _check_packable(model: ModelConfig) -> None:
    """Raises ValueError for layers that carry state from one packed sequence into the next."""
    config, path = load_hf_config(model), model.path
    others = {*(getattr(config, "layer_types", None) or ())}
    others -= {"full_attention", "sliding_attention"}
    kind = architecture(model)._model_mapping.get(type(config), None)
    if others or getattr(kind, "_is_stateful", False):  # Mamba, RWKV, …
        raise ValueError(
            f"{path}: a {config.model_type} model has layers that are not attention "
            f"({', '.join(sorted(others)) or 'recurrent'}), and those mix packed sequences: set "
            f"{model.section}.use_remove_padding=False"
        )
