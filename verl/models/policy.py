"""The policy: one FSDP2 rank of the actor, and of the reference beside it."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft.helpers import rescale_adapter_scale
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import reduce_tensor
from transformers.core_model_loading import revert_weight_conversion

from verl.algorithms.losses import LOSSES, LossConfig
from verl.config.schema import FSDPConfig, ModelConfig, OptimConfig
from verl.models.folder import write_folder
from verl.models.fsdp import build_policy, load_weights
from verl.models.hf import model_size
from verl.models.lora import adapters, merged_weight, plain_parameters, whole, write_adapter
from verl.models.packing import loss_inputs, pack, per_token_of_response
from verl.protocol import OptimizerStep, Sample, WeightChunk, by_prompt
from verl.utils import device as devices
from verl.utils import own_functions
from verl.utils.flops import ModelSize
from verl.utils.safe_load import SafePlanner, SafeReader
from verl.utils.seqlen_balancing import micro_batches, micro_batches_of_prompts

HOST = torch.device("cpu")
HF_FOLDER, ADAPTER = "huggingface", "lora_adapter"
OTHER_LORA = "give the model the lora_rank and target_modules that it was written with"


@dataclass(frozen=True, slots=True)
class MicroBatchLimit:
    """How much goes into one pass: `size` sequences or, where that is None, `max_tokens` of each
    rank that takes part in it."""

    size: int | None = None
    max_tokens: int = 16384


def learning_rate_factor(step: int, optim: OptimConfig, total_steps: int) -> float:
    """Share of the peak learning rate in training step `step` (from 0): linear warm-up that
    already moves in the first step, then constant, linear down to `min_lr_ratio`, or `num_cycles`
    waves of a cosine from the peak to there (0.5: down once)."""
    warmup = optim.lr_warmup_steps
    if warmup < 0:
        warmup = int(optim.lr_warmup_steps_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if optim.warmup_style == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    waves = 2 * math.pi * optim.num_cycles * done
    left = (1 + math.cos(waves)) / 2 if optim.warmup_style == "cosine" else 1 - done
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * left


class HostMemory:
    """Keeps sharded tensors of a device in host memory, each in a place of its own."""

    def __init__(self) -> None:
        self.places: dict[Any, Tensor] = {}

    def store(self, value: Tensor, key: Any = None, changed: bool = True) -> Tensor:
        """A sharded `value` in the place of `key` (None: of this parameter object, which lasts);
        one that has not `changed` is there already. Other tensors are copied to the host."""
        if not isinstance(value, DTensor):
            return value.to(HOST)
        local, key = value.to_local(), key or id(value)
        if key not in self.places:
            self.places[key] = torch.empty_like(local, device=HOST)
            changed = True
        if changed:
            self.places[key].copy_(local)
        # Not from_local, which would bring it back to the mesh's device.
        return DTensor(self.places[key], value._spec, requires_grad=False)


class PolicyWorker:
    """One rank's part of a sharded model. Methods are collective: all ranks call them together."""

    def __init__(
        self, device: str, transfer: str = "host", timeout: timedelta | None = None
    ) -> None:
        if transfer == "ipc":
            devices.forbid_expandable_segments()
        self.device = devices.get_device(device)
        self.host = HostMemory()
        self.version = 0  # training steps
        self.beside: dict[str, PolicyWorker] = {}  # other models on the same device, by role
        self.engines_group: Any = None
        self.timeout = timeout  # of process groups
        self.shared: Sequence[Tensor] = ()

    def connect(
        self, rank: int, world_size: int, address: str, timeout_s: int | None = None
    ) -> None:
        """Joins the ranks' process group, which meets at `address` (`tcp://host:port`). In all its
        groups ranks wait `timeout_s` seconds for each other; None: as long as torch lets them."""
        self.timeout = timedelta(seconds=timeout_s) if timeout_s else None
        backend = devices.process_group_backend(self.device)
        dist.init_process_group(backend, address, self.timeout, world_size, rank)

    def build(
        self,
        model: ModelConfig,
        fsdp_config: FSDPConfig,
        optim: OptimConfig | None = None,
        total_steps: int = 0,
        sequence_parallel: int = 1,
        share_prompts: bool = True,
    ) -> tuple[ModelSize | None, float | None]:
        """Loads and shards the model, to be trained by AdamW as `optim` says. `sequence_parallel`:
        ranks in a row that get the same samples and split them; `share_prompts`: a packed prompt is
        computed once for its responses, if it can be. Returns the model's matrix products, and the
        device's peak in operations a second, if known."""
        self.model_config, self.config = model, fsdp_config
        self.optim, self.total_steps, self.split = optim, total_steps, sequence_parallel
        group = dist.new_subgroups(self.split, timeout=self.timeout)[0] if self.split > 1 else None
        self.pack = partial(
            pack, device=self.device, remove_padding=model.use_remove_padding, group=group
        )
        if fsdp_config.full_determinism:
            devices.be_deterministic()
        self.model = build_policy(model, fsdp_config, self.device, self.pack, share_prompts)
        self.shares = self.model.shares_prompts
        self.pack = partial(self.pack, share=self.shares)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if self.timeout:  # which the groups of a mesh don't take over
            for of_mesh in parameters[0].device_mesh.get_all_groups():
                dist.distributed_c10d._set_pg_timeout(self.timeout, of_mesh)
        adamw = partial(devices.adamw, parameters, device=self.device)
        self.optimizers = [adamw(optim.lr, optim.eps)] if optim else []
        self.move(HOST)
        return model_size(self.model.lm) if optim else None, devices.peak_flops(self.device)

    def build_beside(self, role: str, *args: Any) -> None:
        """`build` of another model on the same device, such as `ref`, the policy that KL terms
        compare with (LoRA's is the policy itself without adapters), `critic` or `reward_model`."""
        self.beside[role] = PolicyWorker(self.device.type, timeout=self.timeout)
        self.beside[role].build(*args)

    def ask(self, role: str, method: str, *args: Any) -> Any:
        """`method(*args)` of a model beside this one."""
        return getattr(self.beside[role], method)(*args)

    def move(self, device: torch.device, optimizer: bool = False, changed: bool = True) -> None:
        """Brings to the device, or back, parameters (and states) that are kept in host memory;
        `changed`: the parameters have other values than when they left it."""
        to_host, to_device = self.host.store, partial(Tensor.to, device=device, non_blocking=True)

        def leave(parameter: Tensor) -> Tensor:
            return to_host(parameter, changed=changed and parameter.requires_grad)

        if self.config.param_offload:
            model: Any = self.model
            model._apply(leave if device == HOST else to_device)
        if optimizer and self.config.optimizer_offload:
            for parameter, state in [item for o in self.optimizers for item in o.state.items()]:
                for name, value in state.items():
                    if value.dim():
                        key = id(parameter), name
                        state[name] = to_host(value, key) if device == HOST else to_device(value)
        if device == HOST:
            devices.empty_cache(self.device)

    def micro_batches(self, samples: Sequence[Sample], limit: MicroBatchLimit) -> list[list[int]]:
        """Which samples go through each pass: as many passes on every rank, at least one, the last
        ones empty. Without samples a gradient is 0, and the optimizer's step a step."""
        tokens = limit.max_tokens * self.split
        if self.shares and limit.size is None and len(by_prompt(samples)) < len(samples):
            parts = micro_batches_of_prompts(samples, tokens)
        else:
            parts = micro_batches([s.num_tokens for s in samples], limit.size, tokens)
        count = torch.tensor(max(1, len(parts)))
        dist.all_reduce(count, dist.ReduceOp.MAX)
        return parts + [[] for _ in range(int(count) - len(parts))]

    @torch.no_grad()
    def log_probs(
        self,
        samples: Sequence[Sample],
        temperature: float,
        limit: MicroBatchLimit,
        entropies: bool = False,
    ) -> np.ndarray:
        """Of all response tokens, float32 [ΣR], which travels fast; 0 where one doesn't count. With
        `entropies` those, too, [2, ΣR]. Of a `ScoreModel`: what it returns instead."""
        self.move(self.device)
        results = [[np.zeros(0, np.float32)] * len(samples) for _ in range(1 + entropies)]
        for indices in self.micro_batches(samples, limit):
            part = [samples[i] for i in indices]
            found = self.model(self.pack(part), temperature)
            for row, values in zip(results, found, strict=False):
                for i, of_sample in zip(indices, per_token_of_response(values, part), strict=True):
                    row[i] = of_sample
        self.model.reshard()  # without a backward pass the root's parameters stay gathered
        self.move(HOST, changed=False)
        rows = [np.concatenate([np.zeros(0, np.float32), *row]) for row in results]
        return np.stack(rows) if entropies else rows[0]

    def ref_log_probs(self, *args: Any) -> np.ndarray:
        """`log_probs` under the reference policy."""
        if "ref" in self.beside:
            return self.beside["ref"].log_probs(*args)
        with rescale_adapter_scale(self.model, 0.0):
            return self.log_probs(*args)

    def define_loss(self, name: str, source: str) -> None:
        """Makes a policy loss of the user's known to this process (`own_functions.define`)."""
        own_functions.define(own_functions.LOSS, name, source)

    def accumulate_gradient(
        self, step: OptimizerStep, loss: LossConfig, limit: MicroBatchLimit
    ) -> dict[str, float]:
        """Adds the gradient of Σ_i w_i Σ_t ℓ_it of all ranks' shares; returns this rank's sums, of
        ranks that split the same samples the first one's."""
        totals: dict[str, Tensor] = {}
        for indices in self.micro_batches(step.samples, limit):
            part = step.share(indices)
            log_probs, entropy = self.model(self.pack(part.samples), loss.temperature)
            value, sums = LOSSES[loss.kind](loss_inputs(part, log_probs, entropy), loss)
            # FSDP averages gradients over ranks; the loss is a sum, which `split` ranks each take.
            (value * (dist.get_world_size() // self.split)).backward()
            for name, number in sums.items():
                merge = torch.maximum if name.endswith("_max") else torch.add
                number = number.detach()
                totals[name] = merge(totals[name], number) if name in totals else number
        if dist.get_rank() % self.split:
            return {}
        tokens = sum(s.length for s in step.samples)
        return {name: value.item() for name, value in totals.items()} | {"tokens": tokens}

    def clip_gradient(self, longest: float) -> float:
        """Scales the gradient of all ranks down to a norm of `longest`; returns what it was."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), longest)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def gradient_norms(
        self, steps: list[OptimizerStep], loss: LossConfig, limit: MicroBatchLimit
    ) -> list[float]:
        """The norm of all ranks' gradient of each optimizer step, [N], of which this is the rank's
        share; the present weights stay as they are."""
        self.move(self.device)
        norms = []
        for step in steps:
            self.accumulate_gradient(step, loss, limit)
            norms.append(self.clip_gradient(math.inf))
            self.optimizers[0].zero_grad()
        self.move(HOST, changed=False)
        return norms

    def update(
        self, steps: list[OptimizerStep], loss: LossConfig, limit: MicroBatchLimit, grad_clip: float
    ) -> list[dict[str, float]]:
        """One training step: makes optimizer steps, of each this rank's share. Returns of each
        this rank's sums, and the global `grad_norm`, `lr` and `skipped`: 1 if the loss of a rank or
        the gradient was not finite, and no step was made; in the last one `memory_metrics`."""
        if not steps:  # the critic may be trained alone at first
            self.version += 1
            return []
        self.move(self.device, optimizer=True)
        optim, (optimizer,) = self.optim, self.optimizers
        assert optim is not None
        lr = optim.lr * learning_rate_factor(self.version, optim, self.total_steps)
        for group in optimizer.param_groups:  # a resumed run may change its settings
            group.update(lr=lr, weight_decay=optim.weight_decay, betas=tuple(optim.betas))
            group["eps"] = optim.eps
            group["fused"] = optimizer.defaults["fused"]  # not that of a checkpoint's device
        results = []
        for step in steps:
            sums = self.accumulate_gradient(step, loss, limit)
            norm = self.clip_gradient(grad_clip)
            numbers = [norm, *(x for name, x in sums.items() if name.startswith("w/"))]
            skipped = torch.tensor(float(not all(map(math.isfinite, numbers))))
            dist.all_reduce(skipped, dist.ReduceOp.MAX)
            if not skipped:
                optimizer.step()
            optimizer.zero_grad()
            results.append(sums | {"grad_norm": norm, "lr": lr, "skipped": skipped.item()})
        self.version += 1
        self.move(HOST, optimizer=True)
        results[-1] |= devices.memory_metrics(self.device)
        return results

    def save(
        self,
        folder: str | Path,
        contents: Collection[str] = ("model", "optimizer"),
        hf_dtype: str | None = None,
    ) -> None:
        """Writes the version and, of `checkpoint.save_contents`, these; `hf_model` as `save_hf`
        with `hf_dtype`. Raises: OSError, on all ranks, if one can't."""
        try:
            dcp.save(self._state(contents), checkpoint_id=folder)
        except CheckpointException as error:  # no Exception, and too long to read
            raise OSError(f"{folder}: {_reasons(error)}") from None
        if "hf_model" in contents:
            self.save_hf(Path(folder) / HF_FOLDER, hf_dtype)

    def load(
        self, folder: str | Path, contents: Collection[str] = ("model", "optimizer", "hf_model")
    ) -> set[str]:
        """The inverse of `save`, for any number of ranks: loads those of `contents` that are there,
        and returns which these are. Without `model`, weights are those of `hf_model`. Raises:
        ValueError, on all ranks, for a checkpoint with neither, or of another model."""
        self.move(self.device, optimizer=True)
        reader, hf_folder = SafeReader(folder), Path(folder) / HF_FOLDER
        try:
            names = {*reader.read_metadata().state_dict_metadata}
            held = {name.partition(".")[0] for name in names}
            held |= {"hf_model"} if hf_folder.is_dir() else set()
            found = held & {*contents}
            if not found & {"model", "hf_model"}:
                text = f"the checkpoint holds {', '.join(sorted(held))}, but no weights among "
                raise ValueError(f"{text}checkpoint.load_contents={[*contents]}")
            state = self._state(found)
            own = {f"model.{name}" for name in state.get("model", ())}
            if own and (other := {n for n in names if n.startswith("model.")} ^ own):
                text = f"its weights are others than the model's, such as {min(other)}: "
                raise ValueError(f"{text}{OTHER_LORA}")
            dcp.load(state, storage_reader=reader, planner=SafePlanner())
        except (CheckpointException, UnpicklingError, ValueError) as error:
            reason = _reasons(error) if isinstance(error, CheckpointException) else str(error)
            reason += f": {OTHER_LORA}" * ("Size mismatch" in reason)
            raise ValueError(f"{folder}: {reason}") from None
        if "model" in found:
            options = states.StateDictOptions(strict=False)  # what is frozen is in no checkpoint
            states.set_model_state_dict(self.model, state["model"], options=options)
        else:
            self._load_hf(hf_folder)
        if "optimizer" in state:
            states.set_optimizer_state_dict(self.model, self.optimizers, state["optimizer"])
        self.version = state["training_steps"]
        self.move(HOST, optimizer=True)
        return found

    def _load_hf(self, folder: Path) -> None:
        """Loads what `save_hf` wrote to a checkpoint. Raises: ValueError if it can't."""
        lora, merged = self.model_config.uses_lora, (folder / ADAPTER).is_dir()
        place = str(folder / ADAPTER if lora and merged else folder)
        changes: Any = {"path": place, "override_config": {}}
        model = replace(self.model_config, **{"lora_adapter_path": place} if lora else changes)
        if Path(place, "adapter_config.json").is_file() != lora:
            held = "no adapter" if lora else "an adapter"
            raise ValueError(f"{folder} holds {held}: {OTHER_LORA}")
        try:
            load_weights(self.model, model, getattr(torch, self.config.model_dtype))
        except (ValueError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            if lora and isinstance(error, RuntimeError):  # which names all weights
                reason = f"its adapter has another rank or other layers: {OTHER_LORA}"
            raise ValueError(f"{folder}: {reason}") from error

    def _state(self, contents: Collection[str]) -> dict[str, Any]:
        state: dict[str, Any] = {"training_steps": self.version}
        if "model" in contents:
            state["model"] = states.get_model_state_dict(self.model)
            for name, parameter in self.model.named_parameters(remove_duplicate=False):
                if not parameter.requires_grad:
                    state["model"].pop(name)
        if "optimizer" in contents and self.optimizers:
            state["optimizer"] = states.get_optimizer_state_dict(self.model, self.optimizers)
        return state

    def save_hf(self, folder: str | Path, dtype: str | None = None) -> None:
        """Writes the model in Hugging Face format, as `write_folder`; of LoRA the adapters, as
        `write_adapter`, with `lora.merge` in lora_adapter/ beside the merged model."""
        self.move(self.device)
        lm, model, first = self.model.lm, self.model_config, dist.get_rank() == 0
        if model.uses_lora:
            trained = {name: whole(p) for name, p in adapters(lm).items()}
            if first:
                place = Path(folder, ADAPTER) if model.lora.merge else folder
                write_adapter(lm, model, place, trained, dtype)
        if model.lora.merge or not model.uses_lora:
            state = lm.state_dict().items()
            weights = {name: value for name, value in state if not isinstance(value, DTensor)}
            for name, _ in plain_parameters(lm):
                weight = merged_weight(lm, name)
                if first:
                    weights[name] = weight.cpu()
            if first:
                write_folder(model, folder, weights, dtype)
        self.move(HOST, changed=False)

    def join_engines(self, address: str, world_size: int) -> None:
        """Becomes rank 0 of the process group in which weights are broadcast to the engines."""
        place = address, 0, world_size
        self.engines_group = devices.broadcast_group(self.device, *place, self.timeout)

    def plan_export(
        self, dtype: str | None, chunk_bytes: int, stored: bool = False
    ) -> tuple[int, list[WeightChunk]]:
        """The policy's version, and what will be exported: all weights, tied ones once, in chunks
        of about `chunk_bytes`; as `dtype` (null: the device's usual one), and the buffers that are
        part of a checkpoint as they are. `stored`: in the names and shapes of the checkpoint."""
        dtype = dtype or devices.default_dtype(self.device.type)
        lm, kept = self.model.lm, self.model.lm.state_dict().keys()
        weights = [(name, value, dtype) for name, value in plain_parameters(lm)]
        for name, value in lm.named_buffers():
            weights += [(name, value, str(value.dtype).removeprefix("torch."))] * (name in kept)
        chunks: list[WeightChunk] = []
        left = -1
        for name, value, kind in weights:
            size = value.numel() * getattr(torch, kind).itemsize
            if size > left or chunks[-1].dtype != kind:
                chunks.append(WeightChunk([], kind, []))
                left = chunk_bytes
            left -= size
            chunks[-1].sources.append(name)
        shapes = {name: value.shape for name, value, _ in weights}
        for chunk in chunks:
            empty = {name: torch.empty(shapes[name], device="meta") for name in chunk.sources}
            sent = revert_weight_conversion(lm, empty) if stored else empty
            chunk.names, chunk.shapes = [*sent], [[*value.shape] for value in sent.values()]
        return self.version, chunks

    def export(self, chunk: WeightChunk, transfer: str) -> WeightChunk:
        """Gathers and sends these weights; returns the chunk with what this rank adds to it."""
        self.move(self.device)
        lm, dtype = self.model.lm, getattr(torch, chunk.dtype)
        found = {name: merged_weight(lm, name) for name in chunk.sources}
        if chunk.names != chunk.sources:
            found = revert_weight_conversion(lm, found)
        weights = [found[name].to(dtype).contiguous() for name in chunk.names]
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
        self.move(HOST, changed=False)


def _reasons(error: CheckpointException) -> str:
    """What went wrong on the ranks, each thing once."""
    return "; ".join(sorted({f"{type(e).__name__}: {e}" for e, _ in error.failures.values()}))
