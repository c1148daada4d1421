"""The policy that learns: one FSDP2 rank of the actor, and of the reference beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

from verl.models import fsdp
from verl.models.packing import Batch, pack, per_token, split_per_sample
from verl.protocol import Ragged, Sample
from verl.trainer.config.model_schema import FSDPConfig, ModelConfig, OptimConfig
from verl.trainer.ppo.core_algos import kl_divergence, policy_loss, rollout_is_weights
from verl.utils.device import (
    empty_cache,
    get_device,
    memory_metrics,
    peak_flops,
    process_group_backend,
)
from verl.utils.safe_load import SafePlanner, SafeReader
from verl.utils.seqlen_balancing import micro_batches
from verl.workers.weight_sync import WeightExporter


@dataclass(frozen=True, slots=True)
class MicroBatchLimit:
    """How much goes into one pass: `size` sequences or, where that is None, `max_tokens`."""

    size: int | None = None
    max_tokens: int = 16384


@dataclass(frozen=True, slots=True)
class LossConfig:
    """What `PolicyWorker.update` minimizes. The weights stand in the samples."""

    kind: str = "ppo"
    """A key of `LOSSES`."""
    temperature: float = 1.0
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_ratio_c: float = 3.0
    entropy_coeff: float = 0.0
    kl_coef: float = 0.0
    """Weight of the divergence from the reference; 0: no reference needed."""
    kl_type: str = "low_var_kl"
    rollout_is: str | None = None
    """A key of `verl.trainer.ppo.core_algos.rollout_is_weights`; None: no correction."""
    rollout_is_threshold: float = 2.0


Sums = dict[str, Tensor]


def ppo_loss(
    log_probs: Tensor, entropy: Tensor, samples: Sequence[Sample], config: LossConfig
) -> tuple[Tensor, Sums]:
    """Σ_i w_i Σ_t ℓ_it of a micro-batch, ℓ = clipped loss − entropy bonus + KL; and sums to report.

    Where samples have no old log-probabilities, the policy is the one that is being updated for
    the first time: old = current. Sums named `w/…` are weighted like the loss, the others are
    over tokens.
    """
    device = log_probs.device
    weights = per_token(samples, "weight", device)
    known = bool(samples) and samples[0].old_log_probs is not None
    old = per_token(samples, "old_log_probs", device) if known else log_probs.detach()
    pg = policy_loss(
        log_probs,
        old,
        per_token(samples, "advantage", device),
        config.clip_ratio_low,
        config.clip_ratio_high,
        config.clip_ratio_c,
    )
    loss = pg.loss
    rollout = {}
    if len(log_probs) and samples[0].rollout_log_probs is not None:
        difference = old - per_token(samples, "rollout_log_probs", device)
        # Of responses whose old log-probabilities are the engine's there is nothing to report.
        theirs = [known and np.array_equal(s.old_log_probs, s.rollout_log_probs) for s in samples]
        own = ~torch.tensor(np.repeat(theirs, [s.length for s in samples]), device=device)
        if config.rollout_is is not None:
            lengths = torch.tensor([s.length for s in samples], device=device)
            factors = rollout_is_weights(
                difference, lengths, config.rollout_is, config.rollout_is_threshold
            )
            loss = loss * factors
            rollout["rollout/is_weight_mean"] = factors[own].sum()
        rollout |= {
            "rollout/logprob_diff_mean": difference[own].abs().sum(),
            "rollout/logprob_diff_max": difference.abs().max(),
            "rollout/kl": -difference[own].sum(),
            "rollout/tokens": own.sum(),
        }
    sums = rollout | {
        "w/pg_loss": (weights * loss).sum(),
        "ppo_kl": -pg.log_ratio.sum(),
        "pg_clipfrac": pg.clipped.sum(),
        "pg_clipfrac_lower": pg.clipped_lower.sum(),
        "entropy": entropy.sum(),
    }
    if config.entropy_coeff:
        loss = loss - config.entropy_coeff * entropy
    if config.kl_coef:
        reference = per_token(samples, "ref_log_probs", device)
        kl = kl_divergence(log_probs, reference, config.kl_type)
        loss = loss + config.kl_coef * kl
        sums["w/kl_loss"] = (weights * kl).sum()
    return (weights * loss).sum(), sums


def nll_loss(
    log_probs: Tensor, entropy: Tensor, samples: Sequence[Sample], config: LossConfig
) -> tuple[Tensor, Sums]:
    """−Σ_i w_i Σ_t log π(a_it): supervised learning, with w_i = 1/Σ_j L_j the mean over tokens."""
    loss = -(per_token(samples, "weight", log_probs.device) * log_probs).sum()
    return loss, {"w/nll_loss": loss, "entropy": entropy.sum()}


LOSSES: dict[str, Callable[..., tuple[Tensor, Sums]]] = {"ppo": ppo_loss, "nll": nll_loss}


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
    """One rank's part of a sharded model, with an optimizer if `optim` is given.

    Methods are collective: all ranks call them together, each with its own samples.
    """

    def __init__(
        self,
        model: ModelConfig,
        fsdp_config: FSDPConfig,
        device: torch.device,
        optim: OptimConfig | None = None,
        total_steps: int = 1,
    ) -> None:
        self.device, self.config, self.model_config = device, fsdp_config, model
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self.model = fsdp.build_policy(model, fsdp_config, mesh)
        self.optim, self.total_steps = optim, total_steps
        self.optimizer, self.schedule = None, None
        if optim is not None:
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(),
                lr=optim.lr,
                betas=(optim.betas[0], optim.betas[1]),
                weight_decay=optim.weight_decay,
            )
            self.schedule = self._schedule_from(0)
        self.offload()

    def _schedule_from(self, step: int) -> torch.optim.lr_scheduler.LambdaLR:
        """The learning rate from training step `step` on (0 is the first), and the optimizer's
        other settings, as the configuration says: a resumed run may change them."""
        optim, total_steps = self.optim, self.total_steps
        for group in self.optimizer.param_groups:
            group["initial_lr"], group["weight_decay"] = optim.lr, optim.weight_decay
            group["betas"] = (optim.betas[0], optim.betas[1])
        return torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda s: learning_rate_factor(s, optim, total_steps),
            last_epoch=step - 1,
        )

    def onload(self, optimizer: bool = False) -> None:
        """Brings the parameters (and the optimizer's states) to the device."""
        if self.config.param_offload:
            self.model.to(self.device)
        if optimizer and self.optimizer is not None and self.config.optimizer_offload:
            fsdp.move_optimizer(self.optimizer, self.device)

    def offload(self) -> None:
        """Sends what the configuration says to host memory."""
        if self.config.param_offload:
            self.model.to("cpu")
        if self.optimizer is not None and self.config.optimizer_offload:
            fsdp.move_optimizer(self.optimizer, torch.device("cpu"))
        empty_cache(self.device)

    def pack(self, samples: Sequence[Sample]) -> Batch:
        """The tensors of one forward pass, in the form the model was built for."""
        return pack(samples, self.device, self.model_config.use_remove_padding)

    def micro_batches(
        self, samples: Sequence[Sample], limit: MicroBatchLimit
    ) -> list[tuple[list[int], list[Sample]]]:
        """This rank's passes; every rank gets as many, the last of which may be empty."""
        parts = micro_batches([s.num_tokens for s in samples], limit.size, limit.max_tokens)
        count = torch.tensor(len(parts))
        dist.all_reduce(count, dist.ReduceOp.MAX)
        parts += [[] for _ in range(int(count) - len(parts))]
        return [(part, [samples[i] for i in part]) for part in parts]

    @torch.no_grad()
    def log_probs(
        self, samples: Sequence[Sample], temperature: float, limit: MicroBatchLimit
    ) -> list[np.ndarray]:
        """Log-probabilities of each sample's response tokens, float32 [L_i] per sample."""
        self.onload()
        results: list[np.ndarray] = [np.zeros(0, np.float32)] * len(samples)
        for indices, part in self.micro_batches(samples, limit):
            values, _ = self.model(self.pack(part), temperature)
            for i, result in zip(indices, split_per_sample(values, part), strict=True):
                results[i] = result
        self.model.reshard()  # without a backward pass the root's parameters stay gathered
        self.offload()
        return results

    def update(
        self,
        mini_batches: Sequence[Sequence[Sample]],
        loss: LossConfig,
        limit: MicroBatchLimit,
        grad_clip: float,
    ) -> list[dict[str, float]]:
        """One optimizer step per mini-batch (this rank's share of each), then one of the schedule.

        Returns: per mini-batch this rank's sums, and the global `grad_norm`, `lr` and `skipped`: 1
        if the loss of a rank or the gradient was not finite, and no step was made.
        """
        assert self.optimizer is not None and self.schedule is not None
        self.onload(optimizer=True)
        results = []
        for samples in mini_batches:
            sums = self.accumulate_gradient(samples, loss, limit)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), grad_clip)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            numbers = [norm.item(), *(x for name, x in sums.items() if name.startswith("w/"))]
            skipped = torch.tensor(float(not all(map(math.isfinite, numbers))))
            dist.all_reduce(skipped, dist.ReduceOp.MAX)
            if not skipped:
                self.optimizer.step()
            self.optimizer.zero_grad()
            lr = self.optimizer.param_groups[0]["lr"]
            figures = {"grad_norm": norm.item(), "lr": lr, "skipped": skipped.item()}
            results.append(sums | figures)
        self.schedule.step()
        self.offload()
        return results

    def accumulate_gradient(
        self, samples: Sequence[Sample], loss: LossConfig, limit: MicroBatchLimit
    ) -> dict[str, float]:
        """Adds the gradient of Σ_i w_i Σ_t ℓ_it over all ranks' samples; returns this rank's sums.

        FSDP averages gradients over ranks; the loss is a sum, hence the factor.
        """
        totals: dict[str, Tensor] = {}
        for _, part in self.micro_batches(samples, limit):
            log_probs, entropy = self.model(self.pack(part), loss.temperature)
            value, sums = LOSSES[loss.kind](log_probs, entropy, part, loss)
            (value * dist.get_world_size()).backward()
            for name, number in sums.items():
                merge = torch.maximum if name.endswith("_max") else torch.add
                number = number.detach()
                totals[name] = merge(totals[name], number) if name in totals else number
        tokens = sum(s.length for s in samples)
        return {name: value.item() for name, value in totals.items()} | {"tokens": tokens}

    def save(self, folder: Path) -> None:
        """Writes parameters, optimizer and schedule below `folder`, each rank its part.

        Raises: OSError, on all ranks, if one can't.
        """
        try:
            dcp.save(self._state(), checkpoint_id=folder)
        except CheckpointException as error:  # no Exception, and too long to read
            raise OSError(f"{folder}: {_reasons(error)}") from None

    def load(self, folder: Path) -> None:
        """The inverse of `save`, for any number of ranks. The learning rate and the optimizer's
        other settings are those of the configuration.

        Raises: ValueError, on all ranks, if the checkpoint is not one of this model.
        """
        self.onload(optimizer=True)
        state = self._state()
        try:
            dcp.load(state, storage_reader=SafeReader(folder), planner=SafePlanner())
        except CheckpointException as error:
            raise ValueError(f"{folder}: {_reasons(error)}") from None
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.schedule = self._schedule_from(state["training_steps"])
        self.offload()

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        steps = self.schedule.last_epoch
        return {"model": model, "optimizer": optimizer, "training_steps": steps}


def _reasons(error: CheckpointException) -> str:
    """What went wrong on the ranks, each thing once."""
    return "; ".join(sorted({f"{type(e).__name__}: {e}" for e, _ in error.failures.values()}))


class ActorWorker(WeightExporter):
    """Everything that one actor rank does; a plain class, made a Ray actor in `group.py`."""

    def __init__(self, device: str | None = None) -> None:
        self.device = get_device(device)
        self.actor: Policy | None = None
        self.ref: Policy | None = None

    def connect(self, rank: int, world_size: int, address: str) -> None:
        """Joins the ranks' process group, which meets at `address` (`tcp://host:port`)."""
        dist.init_process_group(
            process_group_backend(self.device),
            init_method=address,
            rank=rank,
            world_size=world_size,
        )

    def build(
        self,
        model: ModelConfig,
        fsdp_config: FSDPConfig,
        optim: OptimConfig,
        total_steps: int,
        ref_fsdp_config: FSDPConfig | None = None,
    ) -> None:
        """Loads and shards the policy and, with `ref_fsdp_config`, the reference policy."""
        self.actor = Policy(model, fsdp_config, self.device, optim, total_steps)
        if ref_fsdp_config is not None:
            self.ref = Policy(model, ref_fsdp_config, self.device)

    def log_probs(
        self, samples: Sequence[Sample], role: str, temperature: float, limit: MicroBatchLimit
    ) -> list[np.ndarray]:
        """Log-probabilities under the policy (`role="actor"`) or the reference (`"ref"`)."""
        return Ragged(getattr(self, role).log_probs(samples, temperature, limit))

    def update(self, mini_batches: Any, *args: Any) -> list[dict[str, float]]:
        """`Policy.update` of the policy, with `memory_metrics` in the last mini-batch's figures."""
        results = self.actor.update(mini_batches, *args)
        results[-1] |= memory_metrics(self.device)
        return results

    def peak_flops(self) -> float | None:
        """Operations a second that the device can do at most; None where that isn't known."""
        return peak_flops(self.device)

    def save(self, folder: str) -> None:
        """Writes parameters, optimizer and schedule below `folder`, each rank its part."""
        self.actor.save(Path(folder))

    def load(self, folder: str) -> None:
        """The inverse of `save`, for any number of ranks."""
        self.actor.load(Path(folder))

    def save_hf(self, folder: str, tokenizer: Any) -> None:
        """Writes the policy in Hugging Face format."""
        self.actor.onload()
        fsdp.save_hf_model(self.actor.model, self.actor.model_config, Path(folder), tokenizer)
        self.actor.offload()
