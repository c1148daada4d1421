"""The training loop. `fit` is the algorithm."""

from __future__ import annotations

import gc
import logging
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from verl.data.dataset import load_prompts, locate
from verl.protocol import ARRAYS, Parcel, Prompt, Sample, column, fill, response_lengths
from verl.rewards.manager import RewardManager
from verl.trainer.config.schema import Config, resolve_aggregation
from verl.trainer.ppo.ahead import BatchesAhead
from verl.trainer.ppo.batching import (
    TrainBatches,
    mini_batches,
    score_while_generating,
    validation_sampling,
)
from verl.trainer.ppo.core_algos import (
    WEIGHTS,
    KLController,
    advantages,
    kl_divergence,
    response_weights,
)
from verl.trainer.ppo.guard import SkippedSteps, warn_of_disagreement
from verl.trainer.ppo.metrics import (
    data_metrics,
    loss_agg_metrics,
    mfu_metrics,
    reduce_update_metrics,
    throughput_metrics,
    timing_metrics,
    validation_metrics,
)
from verl.trainer.ppo.resumable import Resumable
from verl.utils.checkpoint import CheckpointFolder
from verl.utils.device import default_weight_transfer
from verl.utils.memory import KINDS, read_model
from verl.utils.samples import some_generations, write_responses
from verl.utils.seqlen_balancing import balanced_partitions, equal_partitions
from verl.utils.signals import StopSignals
from verl.utils.timer import Timer
from verl.utils.tracking import Tracking, validation_scores
from verl.workers.actor import ActorWorker, LossConfig, MicroBatchLimit
from verl.workers.engines import EngineGroup
from verl.workers.group import WORKERS_PER_DEVICE, WorkerGroup, place, start_ray
from verl.workers.rollout.base import SamplingParams, engine_class
from verl.workers.weight_sync import WeightSync

logger = logging.getLogger(__name__)


class RayPPOTrainer(Resumable):
    """Trains one policy. Everything that can be wrong with the input is found before Ray starts."""

    def __init__(self, config: Config, tokenizer: Any, latest: Path | None = None) -> None:
        """Reads the data and finds the checkpoint to resume from; starts no process.

        `latest`: the checkpoint that this run wrote before a worker died.

        Raises: ValueError or FileNotFoundError for data or keys that can't be used.
        """
        self.config, self.tokenizer = config, tokenizer
        data, trainer = config.data, config.trainer
        self.engine = engine_class(config.actor_rollout_ref.rollout.name)
        self.aggregation = resolve_aggregation(config)
        self.kl_controller = KLController(**asdict(config.algorithm.kl_ctrl))
        self.rewards = RewardManager(
            config.reward_model, config.custom_reward_function, tokenizer, data.max_response_length
        )
        validates = trainer.val_before_train or trainer.val_only or trainer.test_freq > 0
        self.val_prompts = load_prompts(data.val_files, data, tokenizer) if validates else []
        self.prompts = load_prompts(data.train_files, data, tokenizer)
        batches = TrainBatches(config, self.prompts, self.generate, self.rewards)
        self.order = batches.order
        self.total_steps = (
            trainer.total_training_steps or trainer.total_epochs * self.order.steps_per_epoch
        )
        self.batches: TrainBatches | BatchesAhead = batches
        if trainer.async_rollout:
            self.batches = BatchesAhead(batches, self.total_steps, self.update_engines)
        self.num_workers = trainer.nnodes * trainer.n_gpus_per_node
        self.num_devices = self.num_workers + trainer.nnodes * (trainer.rollout_gpus_per_node or 0)
        self.checkpoints = CheckpointFolder(trainer)
        self.step = self.saved_step = 0
        self.validation_missing = False
        self.best: dict[str, float] = {}
        self.engine_metrics: dict[str, float] = {}
        self.architecture: dict[str, Any] = {}
        self.peak_flops: float | None = None
        self.skipped = SkippedSteps(trainer.max_skipped_steps)
        self.stop = StopSignals()
        self.resumed = self.latest = latest or self.checkpoints.find(self.run_id)
        if self.resumed:
            self.load_state(self.resumed)

    def start_workers(self) -> None:
        """Starts Ray, the actor ranks and the engines, with the weights to begin from.

        Raises: ValueError or RewardServerError, before that, if the data can't be scored.
        """
        trainer, model, data = self.config.trainer, self.config.actor_rollout_ref, self.config.data
        self.checkpoints.make_root()
        validated = {id(prompt) for prompt in self.val_prompts}
        self.rewards.connect(
            [*self.prompts, *self.val_prompts],
            self.checkpoints.root,
            lambda p: locate(data.val_files if id(p) in validated else data.train_files, p.index),
        )
        device, own = trainer.device, trainer.n_gpus_per_node
        per_node = own + (trainer.rollout_gpus_per_node or 0)
        start_ray(trainer.nnodes * per_node, self.config.ray_init.num_cpus)
        self.stop.install()  # Ray takes SIGTERM
        slots = place(trainer.nnodes, per_node, device)
        share, engine_slots = 1 / WORKERS_PER_DEVICE, slots
        if trainer.rollout_gpus_per_node:
            share = 1.0
            engine_slots = [slot for i, slot in enumerate(slots) if i % per_node >= own]
            slots = [slot for i, slot in enumerate(slots) if i % per_node < own]
        self.actor = WorkerGroup(ActorWorker, slots, device, [(device,)] * len(slots), share)
        longest = data.max_prompt_length + data.max_response_length
        self.rollout = EngineGroup(
            self.engine, engine_slots, device, share, model.model, model.rollout, longest
        )
        way = model.rollout.weight_transfer or default_weight_transfer(
            device, model.rollout.name, bool(trainer.rollout_gpus_per_node)
        )
        self.weight_sync = WeightSync(self.actor, self.rollout, way, model.rollout.dtype)
        self.rollout.on_restart = self.weight_sync
        self.rollout.find_restarted()  # waits for them: vLLM measures how much memory is free
        self.actor.connect()
        ref = model.ref.fsdp_config if self.needs_reference else None
        self.actor.call(
            "build", model.model, model.actor.fsdp_config, model.actor.optim, self.total_steps, ref
        )
        self.find_peak_flops()
        if self.resumed:
            logger.info("resuming from %s", self.resumed)
            self.actor.call("load", str(self.resumed / "actor"))
        verify = model.rollout.verify_weights
        if self.resumed or verify:
            self.weight_sync()
        if verify:
            self.verify_engines(strict=True)
        # What is here now stays: walking it again for garbage takes longer than a step's samples.
        gc.freeze()

    def fit(self) -> None:
        """Trains from the current step to the last one."""
        trainer, settings = self.config.trainer, asdict(self.config)
        root = self.checkpoints.root
        if not self.resumed:
            self.checkpoints.forget()
        with Tracking(trainer, root, self.total_steps, settings, self.step) as tracking:
            self.tracking = tracking
            (root / "config.yaml").write_text(OmegaConf.to_yaml(settings))
            new = trainer.val_before_train and not self.resumed
            if trainer.val_only or new or (self.validation_missing and self.val_prompts):
                self.validate()
            self.validation_missing = False
            if trainer.val_only:
                return
            self.stop.patient = True
            while self.step < self.total_steps:
                timer = Timer()
                with self.saved_on_error():
                    samples, metrics = self.batches.next(self.step + 1, timer)
                self.step += 1
                if not trainer.rollout_gpus_per_node:
                    self.rollout.call_all("sleep")
                metrics |= self.add_log_probs(samples, timer)
                with timer("adv"):
                    metrics |= self.add_advantages(samples)
                    steps = list(self.add_weights(samples))
                with timer("update_actor"):
                    metrics |= self.update_actor(steps)
                if not trainer.async_rollout:
                    with timer("update_weights"):
                        self.update_engines()
                if trainer.rollout_data_dir:
                    with timer("dump"):
                        write_responses(
                            trainer.rollout_data_dir, self.step, samples, self.tokenizer
                        )
                metrics |= self.step_metrics(samples, timer, steps)
                with self.saved_on_error(validation_missing=True), ExitStack() as complete:
                    complete.callback(tracking.log, metrics, self.step)
                    if self.stop.number:
                        self.validation_missing = self._due(trainer.test_freq)
                    elif self._due(trainer.test_freq):
                        with timer("testing"):
                            self.validate()
                        metrics["timing_s/testing"] = timer.seconds["testing"]
                stopping = self.stop.number is not None
                if self._due(trainer.save_freq) or stopping:
                    self.save_checkpoint()
                if stopping:
                    raise KeyboardInterrupt
        self.stop.patient = False
        if trainer.save_hf_model:
            self.save_hf_model()

    # ------------------------------------------------------------------------------- the stages

    def generate(
        self, prompts: list[Prompt], groups: list[int], params: SamplingParams
    ) -> Generator[list[Sample], None, None]:
        """Samples from all engines, as they are finished. Closing it stops the engines."""
        return self.rollout.generate(prompts, groups, params)

    def update_engines(self) -> None:
        """Gives the engines the policy's weights and, on request, checks that they have them."""
        self.weight_sync()
        if self.config.actor_rollout_ref.rollout.verify_weights:
            self.verify_engines(strict=False)

    def add_log_probs(self, samples: list[Sample], timer: Timer) -> dict[str, float]:
        """Log-probabilities under the policy before its update and under the reference.

        The policy's are left out where one optimizer step on its own responses follows: they are
        those of its forward pass.
        """
        model, algorithm = self.config.actor_rollout_ref, self.config.algorithm
        rollout, actor = model.rollout, model.actor
        prompts = actor.ppo_mini_batch_size * rollout.n
        metrics: dict[str, float] = {}
        # A response of an older policy keeps the log-probabilities it was drawn with.
        bypass = algorithm.bypass_old_log_prob
        known = [s for s in samples if bypass or s.policy_version < self.step - 1]
        fresh = [s for s in samples if not bypass and s.policy_version >= self.step - 1]
        several_updates = len(samples) > prompts or actor.ppo_epochs > 1
        size = rollout.log_prob_micro_batch_size_per_gpu or actor.ppo_micro_batch_size_per_gpu
        ref_size = model.ref.log_prob_micro_batch_size_per_gpu or size
        if several_updates or algorithm.use_kl_in_reward or known:
            fill(known, "old_log_probs", [s.rollout_log_probs for s in known])
            if fresh:
                with timer("old_log_prob"):
                    fill(fresh, "old_log_probs", self._log_probs(fresh, "actor", size))
        if self.needs_reference:
            with timer("ref"):
                fill(samples, "ref_log_probs", self._log_probs(samples, "ref", ref_size))
        if algorithm.use_kl_in_reward:
            metrics |= self._subtract_kl(samples)
        return metrics

    def add_advantages(self, samples: list[Sample]) -> dict[str, float]:
        """One advantage per response; metrics of rewards and aggregation."""
        lengths = response_lengths(samples)
        values = advantages(
            column(samples, "reward"),
            column(samples, "group").astype(np.int64),
            lengths,
            self.config.algorithm.adv_estimator,
            self.aggregation.norm_by_std,
        )
        fill(samples, "advantage", values.tolist())
        used = response_lengths(s for s in samples if self._counts(s))
        modes = dict.fromkeys((*WEIGHTS_TO_COMPARE, self.aggregation.mode))
        weights = {mode: self._weights(used, mode, used).numpy() for mode in modes}
        return loss_agg_metrics(used, weights, self.aggregation.mode)

    def add_weights(self, samples: list[Sample]) -> Iterator[list[Sample]]:
        """The samples of each optimizer step, with the weights w_i of its loss."""
        used = response_lengths(s for s in samples if self._counts(s))
        scope = used if self.aggregation.scope == "batch" else None
        steps = list(mini_batches(self.config, samples, self.step))
        for step in steps:
            counting = [s for s in step if self._counts(s)]
            weights = self._weights(response_lengths(counting), self.aggregation.mode, scope)
            fill(counting, "weight", weights.tolist())
            yield [s for s in counting if s.weight > 0]

    def update_actor(self, steps: list[list[Sample]]) -> dict[str, float]:
        """One optimizer step per element of `steps`; means over them."""
        actor = self.config.actor_rollout_ref.actor
        limit = MicroBatchLimit(
            None if actor.use_dynamic_bsz else actor.ppo_micro_batch_size_per_gpu,
            actor.ppo_max_token_len_per_gpu,
        )
        shares = [self._partition(samples) for samples in steps]  # [step][rank] → indices
        arguments = []
        for rank in range(self.num_workers):
            mine = [
                Parcel(samples[i] for i in share[rank])
                for samples, share in zip(steps, shares, strict=True)
            ]
            arguments.append((mine, loss_config(self.config), limit, actor.grad_clip))
        with self.actor.exclusive:  # else an engine that starts again could get half an update
            by_rank = self.actor.scatter("update", arguments)
        dump = self.checkpoints.root / f"skipped_step_{self.step}.parquet"
        skipped = self.skipped.count(by_rank, steps, dump)
        metrics = reduce_update_metrics(by_rank) | skipped
        warn_of_disagreement(self.config, metrics)
        return metrics

    def validate(self) -> None:
        """Logs the accuracy on the validation prompts, and some of the responses."""
        self.batches.wait()
        if self.config.trainer.async_rollout:
            self.update_engines()
        size = self.config.data.val_batch_size or len(self.val_prompts)
        params = validation_sampling(self.config, self.step)
        samples: list[Sample] = []
        for start in range(0, len(self.val_prompts), size):
            prompts = self.val_prompts[start : start + size]
            generated = self.generate(prompts, list(range(start, start + len(prompts))), params)
            for _, scores in score_while_generating(generated, self.rewards, Timer()):
                samples += scores.result()
        samples.sort(key=lambda s: (s.group, s.draw))
        if folder := self.config.trainer.validation_data_dir:
            write_responses(folder, self.step, samples, self.tokenizer)
        metrics = validation_metrics(samples)
        accuracy = float(np.mean(list(validation_scores(metrics).values())))
        if accuracy > self.best.get("val-core/best_acc", -np.inf):
            self.best = {"val-core/best_acc": accuracy, "val-core/best_step": self.step}
        shown = some_generations(samples, self.config.trainer.log_val_generations, self.tokenizer)
        self.tracking.log_validation(metrics | self.best, self.step, shown)

    def close(self) -> None:
        """Ends what scores and what generates; Ray belongs to the caller."""
        if isinstance(self.batches, BatchesAhead) and hasattr(self, "rollout"):
            self.rollout.cancelled = True
            self.batches.close()
        self.rewards.close()
        self.stop.restore()
        gc.unfreeze()

    # ---------------------------------------------------------------------------------- details

    @property
    def needs_reference(self) -> bool:
        """Whether a KL term needs the reference policy."""
        config = self.config
        return config.actor_rollout_ref.actor.use_kl_loss or config.algorithm.use_kl_in_reward

    def step_metrics(
        self, samples: list[Sample], timer: Timer, steps: list[list[Sample]]
    ) -> dict[str, float]:
        """What the samples and the clock say about a step, validation and checkpoint apart."""
        seconds = sum(timer.seconds.values())
        mfu = {}
        if self.peak_flops:
            mfu = mfu_metrics(
                self.architecture, steps, timer.seconds["update_actor"], self.peak_flops
            )
        filtering = self.config.algorithm.filter_groups.enable
        ages = self.step - 1 - column(samples, "policy_version")
        return (
            {
                "training/global_step": self.step,
                "training/epoch": self.order.epoch,
                "rollout/policy_age_mean": float(ages.mean()),
                "rollout/policy_age_max": float(ages.max()),
            }
            | self.engine_metrics
            | data_metrics(samples, self.config.data.max_prompt_length)
            | timing_metrics(samples, timer.seconds | {"step": seconds}, filtering)
            | throughput_metrics(samples, seconds, self.num_devices)
            | mfu
        )

    def find_peak_flops(self) -> None:
        """Learns what `perf/mfu` needs; it is left out where model or GPU are not known here."""
        model = self.config.actor_rollout_ref.model
        self.architecture = (read_model(model.path) or {}) | model.override_config
        peaks = self.actor.call("peak_flops")
        if self.architecture.get("model_type") in KINDS and all(peaks):
            self.peak_flops = sum(peaks)
        else:
            logger.info("perf/mfu is left out: the FLOPs of this model or of this GPU are unknown")

    def verify_engines(self, strict: bool) -> None:
        """Has each engine draw a few tokens, and compares their log-probabilities with the actor's.

        Raises: ValueError, if `strict`, for a mean difference above `verify_weights_tolerance`.
        """
        rollout = self.config.actor_rollout_ref.rollout
        params = SamplingParams(1, 8, rollout.temperature, seed=(rollout.seed, 2, self.step))
        drawn = self.rollout.call("draw", self.prompts[0], params)
        samples = [sample for samples in drawn for sample in samples]
        actual = self._log_probs(samples, "actor", len(samples))
        means = [
            float(np.abs(s.rollout_log_probs - a).mean())
            for s, a in zip(samples, actual, strict=True)
        ]
        worst, limit = max(means), rollout.verify_weights_tolerance
        self.engine_metrics["rollout/verify_logprob_diff"] = worst
        if worst > limit:
            text = (
                f"engine {means.index(worst)} is not the actor's model: their log-probabilities "
                f"differ by {worst:.3g} nats a token (verify_weights_tolerance={limit:g})"
            )
            if strict:
                raise ValueError(text)
            logger.warning(text)

    def save_hf_model(self) -> None:
        """Writes the policy in Hugging Face format."""
        folder = self.checkpoints.root / "huggingface"
        self.rollout.call_all("sleep")
        self.actor.call("save_hf", str(folder), self.tokenizer)
        logger.info("the model is in %s", folder)

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.total_steps)

    def _counts(self, sample: Sample) -> bool:
        """Whether a response takes part in the loss and its denominators."""
        return not (self.config.algorithm.filter_overlong_response.enable and sample.truncated)

    def _weights(
        self, lengths: np.ndarray, mode: str, rollout_lengths: np.ndarray | None
    ) -> torch.Tensor:
        a = self.aggregation
        return response_weights(
            lengths, mode, a.max_response_length, a.alpha, rollout_lengths, a.group_size
        )

    def _partition(self, samples: list[Sample]) -> list[list[int]]:
        if self.config.trainer.balance_batch:
            return balanced_partitions([s.num_tokens for s in samples], self.num_workers)
        return equal_partitions(len(samples), self.num_workers)

    def _log_probs(
        self, samples: list[Sample], role: str, size: int | None
    ) -> list[np.ndarray | None]:
        rollout = self.config.actor_rollout_ref.rollout
        limit = MicroBatchLimit(
            None if rollout.log_prob_use_dynamic_bsz else size,
            rollout.log_prob_max_token_len_per_gpu,
        )
        shares = self._partition(samples)
        unread = [name for name in ARRAYS if name != "response_ids"]
        arguments = [
            (Parcel((samples[i] for i in share), unread), role, rollout.temperature, limit)
            for share in shares
        ]
        results: list[np.ndarray | None] = [None] * len(samples)
        for share, values in zip(shares, self.actor.scatter("log_probs", arguments), strict=True):
            for i, value in zip(share, values, strict=True):
                results[i] = value
        return results

    def _subtract_kl(self, samples: list[Sample]) -> dict[str, float]:
        """reward_i −= β Σ_t kl_it, with the estimator `algorithm.kl_penalty`."""
        estimator = self.config.algorithm.kl_penalty
        per_response = []
        for sample in samples:
            old, ref = torch.tensor(sample.old_log_probs), torch.tensor(sample.ref_log_probs)
            per_response.append(kl_divergence(old, ref, estimator).double().sum().item())
        beta = self.kl_controller.value
        lengths = response_lengths(samples).clip(min=1)
        for sample, kl in zip(samples, per_response, strict=True):
            sample.reward -= beta * kl
        per_token = float(np.mean(per_response / lengths))
        self.kl_controller.update(per_token, len(samples))
        return {"actor/reward_kl_penalty": per_token, "actor/reward_kl_penalty_coeff": beta}


WEIGHTS_TO_COMPARE = tuple(
    mode for mode in WEIGHTS if mode not in ("token-mean-legacy", "seq-mean-token-sum-norm")
)
"""Methods whose gradient noise is predicted from the lengths of every step."""


def loss_config(config: Config) -> LossConfig:
    """The actor's loss, as the configuration says."""
    actor = config.actor_rollout_ref.actor
    low, high = actor.clip_ratio_low, actor.clip_ratio_high
    return LossConfig(
        kind="ppo",
        temperature=config.actor_rollout_ref.rollout.temperature,
        clip_ratio_low=actor.clip_ratio if low is None else low,
        clip_ratio_high=actor.clip_ratio if high is None else high,
        clip_ratio_c=actor.clip_ratio_c,
        entropy_coeff=actor.entropy_coeff,
        kl_coef=actor.kl_loss_coef if actor.use_kl_loss else 0.0,
        kl_type=actor.kl_loss_type,
        rollout_is=config.algorithm.rollout_correction.rollout_is,
        rollout_is_threshold=config.algorithm.rollout_correction.rollout_is_threshold,
    )
