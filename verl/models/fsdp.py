"""A Hugging Face causal model as an FSDP2 policy: build and shard."""

from collections.abc import Callable
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
from verl.models.guard import check_policy, decoder_layers
from verl.models.hf import load_hf_model, num_embeddings, vocabulary_size
from verl.models.kv_cache import DECODE_ATTENTION
from verl.models.logprobs import PolicyModel
from verl.models.lora import add_adapters
from verl.models.packing import Batch, packed_attention
from verl.models.score import ScoreModel
from verl.utils.device import default_dtype, default_packed_attention, saved_on_host


def build_policy(
    model: ModelConfig,
    fsdp: FSDPConfig,
    device: torch.device,
    packer: Callable[..., Batch],
    share_prompts: bool = False,
) -> Any:
    """A `PolicyModel`, or the `ScoreModel` of a classifier: every rank shards an empty skeleton,
    and gets its part of what rank 0 loads. Raises: ValueError for a model whose passes over batches
    of `packer` are not those of transformers. `share_prompts`: see `check_policy`."""
    precision = fsdp.mixed_precision
    compute_dtype = getattr(torch, precision.param_dtype or default_dtype(device.type))
    lm = skeleton(model, dtype=getattr(torch, fsdp.model_dtype))
    packed = default_packed_attention(device, compute_dtype)
    if getattr(lm, "_compatible_flash_implementations", None):  # and no other, as for sinks
        packed = packed_attention.__name__
    if lm._can_set_attn_implementation():
        lm.set_attn_implementation(packed if model.use_remove_padding else DECODE_ATTENTION)
    if model.enable_gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    if isinstance(model, ClassifierConfig):
        policy: Any = ScoreModel(lm)
    else:
        trained = {*lm.get_decoder().parameters(), *lm.get_output_embeddings().parameters()}
        for parameter in lm.parameters():  # the others belong to images, and are never used
            parameter.requires_grad_(parameter in trained)
        size = min(vocabulary_size(model), num_embeddings(model))
        offload = model.enable_gradient_checkpointing and model.enable_activation_offload
        policy = PolicyModel(lm, size, saved_on_host(device) if offload else nullcontext)
        add_adapters(lm, model)
    dtypes = MixedPrecisionPolicy(compute_dtype, getattr(torch, precision.reduce_dtype))
    ranks, size = dist.get_world_size(), max(1, fsdp.fsdp_size)
    shape = (ranks,) if fsdp.fsdp_size in (-1, ranks) else (ranks // size, size)
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    shard = partial(fully_shard, mesh=mesh, mp_policy=dtypes)
    for layer in decoder_layers(lm):
        shard(layer, reshard_after_forward=fsdp.reshard_after_forward)
    shard(policy, reshard_after_forward=False)
    policy.to_empty(device=device)  # else the weights would be sent by way of the host
    load_weights(policy, model, getattr(torch, fsdp.model_dtype))
    policy.eval()  # no dropout, no noise of a router
    for layer in policy.modules():
        layer.training = getattr(layer, "gradient_checkpointing", False)
    if isinstance(policy, PolicyModel):
        found = check_policy(policy, model, compute_dtype, packer, share_prompts)
        policy.shares_prompts = bool(found)
    return policy


def load_weights(policy: Any, model: ModelConfig, dtype: torch.dtype) -> None:
    """Every rank gets its part of what rank 0 loads from the model's folder, as `dtype`, and of
    LoRA's adapters."""
    wrap: Any = ScoreModel if isinstance(model, ClassifierConfig) else PolicyModel
    loaded = None
    if dist.get_rank() == 0:
        loaded = wrap(load_hf_model(model, dtype))
        add_adapters(loaded.lm, model)
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
