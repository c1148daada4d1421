"""The policy: one FSDP2 rank of the actor, and of the reference beside it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.reductions import reduce_tensor

from verl.algorithms.losses import LOSSES, LossConfig
from verl.config.schema import FSDPConfig, ModelConfig, OptimConfig
from verl.models.fsdp import build_policy, save_hf_model
from verl.models.hf import model_size
from verl.models.packing import loss_inputs, pack, per_token_of_response
from verl.protocol import OptimizerStep, Sample, WeightChunk
from verl.utils import device as devices
from verl.utils.flops import ModelSize
from verl.utils.safe_load import SafePlanner, SafeReader
from verl.utils.seqlen_balancing import micro_batches

HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class MicroBatchLimit:
    """How much goes into one pass: `size` sequences or, where that is None, `max_tokens`."""

    size: int | None = None
    max_tokens: int = 16384


def learning_rate_factor(step: int, optim: OptimConfig, total_steps: int) -> float:
    """Share of the peak learning rate in training step `step` (from 0): linear warm-up that
    already moves in the first step, then constant, cosine or linear down to `min_lr_ratio`."""
    warmup = optim.lr_warmup_steps
    if warmup < 0:
        warmup = int(optim.lr_warmup_steps_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if optim.warmup_style == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    left = (1 + math.cos(math.pi * done)) / 2 if optim.warmup_style == "cosine" else 1 - done
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * left


class Policy:
    """One rank's part of a sharded model. Methods are collective: all ranks call them together."""

    def __init__(self, model: ModelConfig, fsdp_config: FSDPConfig, device: torch.device) -> None:
        self.device, self.config, self.model_config = device, fsdp_config, model
        self.pack = partial(pack, device=device, remove_padding=model.use_remove_padding)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self.model = build_policy(model, fsdp_config, mesh)
        self.move(HOST)

    def move(self, device: torch.device) -> None:
        """Brings parameters that are kept in host memory to the device, or back."""
        if self.config.param_offload:
            self.model.to(device)
        devices.empty_cache(self.device)

    def micro_batches(self, samples: Sequence[Sample], limit: MicroBatchLimit) -> list[list[int]]:
        """Which samples go through each pass: as many passes on every rank, the last ones empty."""
        parts = micro_batches([s.num_tokens for s in samples], limit.size, limit.max_tokens)
        count = torch.tensor(len(parts))
        dist.all_reduce(count, dist.ReduceOp.MAX)
        return parts + [[] for _ in range(int(count) - len(parts))]

    @torch.no_grad()
    def log_probs(
        self, samples: Sequence[Sample], temperature: float, limit: MicroBatchLimit
    ) -> list[np.ndarray]:
        """Of each sample's response tokens, float32 [R] per sample; 0 where one doesn't count."""
        self.move(self.device)
        results: dict[int, np.ndarray] = {}
        for indices in self.micro_batches(samples, limit):
            part = [samples[i] for i in indices]
            values, _ = self.model(self.pack(part), temperature)
            results.update(zip(indices, per_token_of_response(values, part), strict=True))
        self.model.reshard()  # without a backward pass the root's parameters stay gathered
        self.move(HOST)
        return [results[i] for i in range(len(samples))]

    def load_parameters(self, folder: str | Path) -> None:
        """Takes the parameters alone from what `TrainedPolicy.save` wrote. Raises:
        ValueError, on all ranks, if the checkpoint is not one of this model."""
        state = {"model": states.get_model_state_dict(self.model)}
        _read(state, folder)
        states.set_model_state_dict(self.model, state["model"])

    def accumulate_gradient(
        self, step: OptimizerStep, loss: LossConfig, limit: MicroBatchLimit
    ) -> dict[str, float]:
        """Adds the gradient of Σ_i w_i Σ_t ℓ_it of all ranks' shares; returns this rank's sums."""
        totals: dict[str, Tensor] = {}
        for indices in self.micro_batches(step.samples, limit):
            part = step.share(indices)
            log_probs, entropy = self.model(self.pack(part.samples), loss.temperature)
            value, sums = LOSSES[loss.kind](loss_inputs(part, log_probs, entropy), loss)
            # FSDP averages gradients over ranks; the loss is a sum.
            (value * dist.get_world_size()).backward()
            for name, number in sums.items():
                merge = torch.maximum if name.endswith("_max") else torch.add
                number = number.detach()
                totals[name] = merge(totals[name], number) if name in totals else number
        tokens = sum(s.length for s in step.samples)
        return {name: value.item() for name, value in totals.items()} | {"tokens": tokens}


class TrainedPolicy(Policy):
    """A policy with its optimizer, AdamW; `version` counts its training steps."""

    def __init__(
        self,
        model: ModelConfig,
        fsdp_config: FSDPConfig,
        device: torch.device,
        optim: OptimConfig,
        total_steps: int,
    ) -> None:
        super().__init__(model, fsdp_config, device)
        self.optim, self.total_steps, self.version = optim, total_steps, 0
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=optim.lr)

    def _move_all(self, device: torch.device) -> None:
        for state in self.optimizer.state.values() if self.config.optimizer_offload else ():
            for name, value in state.items():
                if value.dim():
                    # Towards the host, a copy that doesn't block would take pinned memory.
                    state[name] = value.to(device, non_blocking=device.type == "cuda")
        self.move(device)

    def update(
        self, steps: list[OptimizerStep], loss: LossConfig, limit: MicroBatchLimit, grad_clip: float
    ) -> list[dict[str, float]]:
        """One training step: makes optimizer steps, of each this rank's share. Returns of each
        this rank's sums, and the global `grad_norm`, `lr` and `skipped`: 1 if the loss of a rank or
        the gradient was not finite, and no step was made."""
        self._move_all(self.device)
        optim = self.optim
        lr = optim.lr * learning_rate_factor(self.version, optim, self.total_steps)
        for group in self.optimizer.param_groups:  # a resumed run may change its settings
            group.update(lr=lr, weight_decay=optim.weight_decay, betas=tuple(optim.betas))
        results = []
        for step in steps:
            sums = self.accumulate_gradient(step, loss, limit)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), grad_clip)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            numbers = [norm.item(), *(x for name, x in sums.items() if name.startswith("w/"))]
            skipped = torch.tensor(float(not all(map(math.isfinite, numbers))))
            dist.all_reduce(skipped, dist.ReduceOp.MAX)
            if not skipped:
                self.optimizer.step()
            self.optimizer.zero_grad()
            results.append(sums | {"grad_norm": norm.item(), "lr": lr, "skipped": skipped.item()})
        self.version += 1
        self._move_all(HOST)
        return results

    def save(self, folder: str | Path) -> None:
        """Writes parameters, optimizer, version. Raises: OSError, on all ranks, if one can't."""
        try:
            dcp.save(self._state(), checkpoint_id=folder)
        except CheckpointException as error:  # no Exception, and too long to read
            raise OSError(f"{folder}: {_reasons(error)}") from None

    def load(self, folder: str | Path) -> None:
        """The inverse of `save`, for any number of ranks. Raises: as `load_parameters`."""
        self._move_all(self.device)
        state = self._state()
        _read(state, folder)
        parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        states.set_state_dict(self.model, self.optimizer, **parts)
        self.version = state["training_steps"]
        self._move_all(HOST)

    def _state(self) -> dict[str, Any]:
        model, optimizer = states.get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "training_steps": self.version}


def _read(state: dict[str, Any], folder: str | Path) -> None:
    """Fills `state` from a checkpoint. Raises: ValueError, on all ranks, if it doesn't fit."""
    try:
        dcp.load(state, storage_reader=SafeReader(folder), planner=SafePlanner())
    except CheckpointException as error:
        raise ValueError(f"{folder}: {_reasons(error)}") from None


def _reasons(error: CheckpointException) -> str:
    """What went wrong on the ranks, each thing once."""
    return "; ".join(sorted({f"{type(e).__name__}: {e}" for e, _ in error.failures.values()}))


class PolicyWorker:
    """Everything that one actor rank does; a plain class, made a Ray actor in `verl.cluster`."""

    def __init__(self, device: str | None = None) -> None:
        self.device = devices.get_device(device)
        self.actor: TrainedPolicy
        self.ref: Policy
        self.engines_group: Any = None
        self.shared: Sequence[Tensor] = ()

    def connect(self, rank: int, world_size: int, address: str) -> None:
        """Joins the ranks' process group, which meets at `address` (`tcp://host:port`)."""
        backend = devices.process_group_backend(self.device)
        dist.init_process_group(backend, address, rank=rank, world_size=world_size)

    def build(
        self,
        model: ModelConfig,
        fsdp_config: FSDPConfig,
        optim: OptimConfig,
        total_steps: int,
        ref_fsdp_config: FSDPConfig | None = None,
    ) -> None:
        """Loads and shards the policy and, with `ref_fsdp_config`, the reference policy."""
        self.actor = TrainedPolicy(model, fsdp_config, self.device, optim, total_steps)
        if ref_fsdp_config is not None:
            self.ref = Policy(model, ref_fsdp_config, self.device)

    def log_probs(self, samples: Sequence[Sample], role: str, *args: Any) -> np.ndarray:
        """`Policy.log_probs` of `role`, `actor` or `ref`, as one array: it travels faster, [ΣR]."""
        values = getattr(self, role).log_probs(samples, *args)
        return np.concatenate([np.zeros(0, np.float32), *values])

    def update(self, *args: Any) -> list[dict[str, float]]:
        """`TrainedPolicy.update`, with `memory_metrics` in the last step's figures."""
        results = self.actor.update(*args)
        results[-1] |= devices.memory_metrics(self.device)
        return results

    def size_and_speed(self) -> tuple[ModelSize | None, float | None]:
        """The model's matrix products, and the device's peak in operations a second, if known."""
        return model_size(self.actor.model.lm), devices.peak_flops(self.device)

    def save(self, folder: str | Path) -> None:
        """`TrainedPolicy.save`."""
        self.actor.save(folder)

    def load(self, folder: str | Path) -> None:
        """`TrainedPolicy.load`."""
        self.actor.load(folder)

    def save_hf(self, folder: str | Path, dtype: str | None = None) -> None:
        """Writes the policy in Hugging Face format."""
        self.actor.move(self.device)
        save_hf_model(self.actor.model, self.actor.model_config, folder, dtype)
        self.actor.move(HOST)

    def join_engines(self, address: str, world_size: int) -> None:
        """Becomes rank 0 of the process group in which weights are broadcast to the engines."""
        self.engines_group = devices.broadcast_group(self.device, address, 0, world_size)

    def plan_export(self, dtype: str | None, chunk_bytes: int) -> tuple[int, list[WeightChunk]]:
        """The policy's version, and what will be exported: all weights, tied ones once, in chunks
        of about `chunk_bytes`; as `dtype` (null: the device's usual one)."""
        dtype = dtype or devices.default_dtype(self.device)
        itemsize = getattr(torch, dtype).itemsize
        chunks: list[WeightChunk] = []
        left = -1
        for name, parameter in self.actor.model.lm.named_parameters():
            size = parameter.numel() * itemsize
            if size > left:
                chunks.append(WeightChunk([], dtype, []))
                left = chunk_bytes
            left -= size
            chunks[-1].names.append(name)
            chunks[-1].shapes.append(list(parameter.shape))
        return self.actor.version, chunks

    def export(self, chunk: WeightChunk, transfer: str) -> WeightChunk:
        """Gathers and sends these weights; returns the chunk with what this rank adds to it."""
        self.actor.move(self.device)
        lm, dtype = self.actor.model.lm, getattr(torch, chunk.dtype)
        sharded = (lm.get_parameter(name).detach() for name in chunk.names)
        weights = [value.full_tensor().to(dtype).contiguous() for value in sharded]
        if transfer == "ipc":
            # Kept until the next chunk; torch itself keeps what an engine has not let go of.
            self.shared = weights
            gpu = str(torch.cuda.get_device_properties(weights[0].device).uuid)
            return replace(chunk, ipc_handles=[{gpu: reduce_tensor(w)[1]} for w in weights])
        if transfer == "host" and dist.get_rank() == 0:
            return replace(chunk, tensors=[value.cpu() for value in weights])
        if transfer == "nccl" and dist.get_rank() == 0:
            for value in weights:
                self.engines_group.broadcast(value, 0).wait()
        return chunk

    def finish_export(self) -> None:
        """Once all engines have loaded all chunks."""
        self.shared = ()
        self.actor.move(HOST)
