"""The training loop: `RayPPOTrainer.fit` is the algorithm, and its stages follow below it."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from verl.algorithms import advantages, exponent, kl, rollout_correction, weights
from verl.algorithms.policy_losses import SELECTIONS, low_entropy
from verl.config.schema import Config
from verl.protocol import OptimizerStep, Sample, SampleBatch, response_lengths
from verl.trainer.ppo import checks, metrics
from verl.trainer.ppo.batches import Batches, component, mini_batches, reward_components
from verl.trainer.ppo.checkpoint import CheckpointFolder, TrainState
from verl.trainer.ppo.tracking import Tracking
from verl.trainer.ppo.workers import Workers, loss_config, needs_critic, needs_reference
from verl.utils import own_functions
from verl.utils.signals import StopSignals
from verl.utils.timer import Timer

COMPARED_WEIGHTS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "dr-grpo", "delta-l")
"""Aggregations whose gradient noise is predicted from the lengths of every step."""


class RayPPOTrainer:
    """Trains one policy. Bad input is found before Ray starts, the engine's arguments excepted."""

    def __init__(self, config: Config, tokenizer: Any, latest: Path | None = None) -> None:
        """Reads the data and finds the checkpoint to resume from (`latest`: what this run wrote
        before a worker died). Raises: ValueError or OSError for input that can't be used."""
        self.config, self.tokenizer = config, tokenizer
        self.aggregation, self.loss = weights.resolve_aggregation(config), loss_config(config)
        own_functions.check(config, self.loss)
        self.critic = needs_critic(config)
        self.batches = Batches.from_config(config, tokenizer)
        self.total_steps = self.batches.total_steps
        if self.critic and config.trainer.critic_warmup > self.total_steps:
            key = f"trainer.critic_warmup={config.trainer.critic_warmup}"
            raise ValueError(
                f"{key}: the actor would rest in all {self.total_steps} steps; lower it"
            )
        self.checkpoints = CheckpointFolder(config)
        self.state = TrainState(self.batches.state(), kl_coef=config.algorithm.kl_ctrl.kl_coef)
        self.resumed = latest or self.checkpoints.find()
        if self.resumed:
            self.state = self.checkpoints.load(self.resumed, self.batches.prompts)
            if not config.trainer.val_only:
                self.batches.load(self.state.batches, self.state.step)
        self.engine_metrics: dict[str, float] = {}
        self.stop = StopSignals()

    def start_workers(self) -> None:
        """Starts Ray, the actor ranks and the engines, with the weights to begin from. Raises:
        ValueError or RewardServerError if data can't be scored, or the cluster lacks devices."""
        prompts = [*self.batches.prompts, *self.batches.val_prompts]
        self.batches.rewards.connect(prompts, self.checkpoints.root)
        self.workers = Workers(self.config, self.stop.install)
        self.workers.build(self.total_steps, self.resumed)
        self.batches.generate = self.workers.engines.generate
        self.batches.line.engines = self.workers.engines
        self.batches.update_engines = self.update_engines
        self.batches.rewards.reward_model = self.workers.reward_scores
        self.probe = prompts[0]  # what engines are compared on
        self.engine_metrics = self.workers.verify_engines(self.probe, self.state.step, strict=True)
        self.engines_busy = 0.0, time.monotonic()  # their seconds, and when they were read

    def fit(self) -> None:
        """Trains from the current step to the last one, or until a signal asks for an end."""
        trainer, state, root = self.config.trainer, self.state, self.checkpoints.root
        run = self.checkpoints.run_id, self.total_steps, state.step, self.tokenizer
        with Tracking(self.config, root, *run) as self.tracking:
            if trainer.val_only or (trainer.val_before_train and not self.resumed):
                state.validation_due = True
            if state.validation_due and self.batches.val_prompts:
                self.validate()
            if trainer.val_only:
                return
            self.stop.patient = True
            while state.step < self.total_steps and not self.stop.number:
                timer = Timer()
                batch = self.rescue(self.batches.next, state.step + 1, timer)
                state.step += 1
                samples = SampleBatch(batch.samples)
                if state.step == 1:
                    checks.warn_of_equal_scores(samples, self.batches.rewards)
                self.workers.free_devices()
                if self.advantages_first:
                    with timer("adv"):
                        self.add_advantages(samples)
                record = batch.metrics | self.add_log_probs(samples, timer)
                if self.critic:
                    with timer("values"):
                        self.workers.add_values(samples)
                with timer("adv"):
                    if not self.advantages_first:
                        self.add_advantages(samples)
                    record |= self.aggregation_metrics(samples)
                    mean_factor = record.get("rollout_corr/rollout_is_batch_norm_factor", 1.0)
                    rests = self.critic and state.step < trainer.critic_warmup
                    steps = [] if rests else self.optimizer_steps(samples, mean_factor)
                    passes = [self.with_gradient(step) for step in steps]
                if self.aggregation.auto and steps:
                    with timer("gradient_norms"):
                        self.measure_gradients(steps)
                if self.critic:
                    with timer("update_critic"):
                        record |= self.update_critic(samples)
                with timer("update_actor"):
                    record |= self.update_actor(passes)
                with timer("update_weights"):
                    self.batches.policy_updated(state.step)
                if trainer.rollout_data_dir:
                    with timer("dump"):
                        self.tracking.dump("rollout", samples, state.step, *steps)
                record |= self.step_metrics(samples, passes, timer)
                self.rescue(self.end_step, record)
            if trainer.save_hf_model and not self.stop.number:
                self.rescue(self.workers.save_hf_model, root / "huggingface")
            if self.stop.number:
                self.save_checkpoint()
            self.stop.patient = False

    def add_log_probs(self, samples: list[Sample], timer: Timer) -> dict[str, float]:
        """Log-probabilities under the reference, and before the update: those that old responses
        were sampled with; None where the loss takes its own or has no gradient."""
        config, correction = self.config.algorithm, self.config.algorithm.rollout_correction
        before, reinforce = self.state.step - 1, self.loss.kind == "reinforce"
        stale = [not correction.decoupled and s.policy_version < before for s in samples]
        old = [config.bypass_old_log_prob or is_stale for is_stale in stale]
        weighted = {id(s): reinforce or not o for s, o in zip(samples, old, strict=True)}
        normalized = correction.rollout_is and correction.rollout_is_batch_normalize
        judged = correction.rollout_rs or correction.rollout_token_veto_threshold
        masked = not reinforce and self.loss.top_entropy_quantile < 1
        # Of the whole batch where the actor's word decides: who is judged, who has a gradient.
        if masked or judged or (normalized and any(weighted.values())):
            needed = samples
        elif any(old) or self.loss.loss_mode in SELECTIONS or config.use_kl_in_reward:
            needed = [s for s, is_old in zip(samples, old, strict=True) if not is_old]
        else:
            needed = self.after_first_step(samples)
        record: dict[str, float] = {}
        if needed:
            with timer("old_log_prob"):
                self.workers.add_log_probs(needed, "actor", masked)
            record = self.correct_rollout(needed, [weighted[id(s)] for s in needed])
        for sample, is_old in zip(samples, old, strict=True):
            if is_old:
                sample.old_log_probs = sample.rollout_log_probs
        if needs_reference(self.config):
            with timer("ref"):
                self.workers.add_log_probs(samples, "ref")
        return record | (self.subtract_kl(samples) if config.use_kl_in_reward else {})

    def after_first_step(self, samples: list[Sample]) -> list[Sample]:
        """Those with a gradient in optimizer steps after the first one, in which the policy is
        still the old one: its own forward pass gives what they are compared with."""
        actor = self.config.actor_rollout_ref.actor
        steps = [*mini_batches(actor, samples, self.mini_batch_seed)]
        later = {id(s) for mini_batch in steps[1:] for s in mini_batch}
        return [s for s in self.trained(samples) if id(s) in later and self.has_gradient(s)]

    def correct_rollout(self, samples: list[Sample], weighted: list[bool]) -> dict[str, float]:
        """Takes the tokens that `algorithm.rollout_correction` rejects out of the loss; says how
        far engines and actor are apart. `weighted`: which samples have the factors of rollout_is.
        """
        lengths = response_lengths(samples)
        old, rollout = (
            torch.from_numpy(np.concatenate([s.counted(getattr(s, name)) for s in samples]))
            for name in ("old_log_probs", "rollout_log_probs")
        )
        kept, record = rollout_correction.correct(
            old,
            rollout,
            torch.tensor(lengths),
            torch.tensor(weighted),
            self.config.algorithm.rollout_correction,
        )
        if not kept.all():
            masks = np.split(kept.numpy(), lengths.cumsum()[:-1])
            for sample, mask in zip(samples, masks, strict=True):
                if not mask.all():
                    sample.reject(mask)
        return {f"rollout_corr/{name}": value for name, value in record.items()}

    def subtract_kl(self, samples: list[Sample]) -> dict[str, float]:
        """reward_i −= β Σ_t kl_it, by the estimator `kl_penalty`; moves β if it is adaptive."""
        config, beta, divergences = self.config.algorithm, self.state.kl_coef, []
        for s in samples:
            assert s.old_log_probs is not None and s.ref_log_probs is not None
            old, ref = s.counted(s.old_log_probs), s.counted(s.ref_log_probs)
            kl_t = kl.kl_divergence(torch.tensor(old), torch.tensor(ref), config.kl_penalty)
            divergences.append(kl_t.double().sum().item())
            s.reward -= beta * divergences[-1]
            s.token_rewards = s.spread(-beta * kl_t.float().numpy()) if self.critic else None
        per_token = float(np.mean(divergences / response_lengths(samples).clip(min=1)))
        if config.kl_ctrl.type == "adaptive":
            horizon, target = config.kl_ctrl.horizon, config.kl_ctrl.target_kl
            self.state.kl_coef = kl.adapted_kl_coef(beta, per_token, len(samples), horizon, target)
        return {"actor/reward_kl_penalty": per_token, "actor/reward_kl_penalty_coeff": beta}

    @property
    def advantages_first(self) -> bool:
        """Whether they depend on nothing that actor, reference or critic say of the responses."""
        algorithm = self.config.algorithm
        correction = algorithm.rollout_correction
        rejects = correction.rollout_rs or correction.rollout_token_veto_threshold
        return not (self.critic or algorithm.use_kl_in_reward or rejects)

    def add_advantages(self, samples: list[Sample]) -> None:
        """One advantage per response, with a critic one per token."""
        if self.critic:
            self.add_token_advantages(samples)
        else:
            self.add_response_advantages(samples)

    def aggregation_metrics(self, samples: list[Sample]) -> dict[str, float]:
        """Of the weights of all responses; with `alpha=auto` this step's α is chosen first."""
        chosen = self.choose_alpha() if self.aggregation.auto else {}
        counting = self.trained(samples)
        lengths, groups = response_lengths(counting), [s.group for s in counting]
        modes = dict.fromkeys((*COMPARED_WEIGHTS, self.aggregation.mode))
        by_method = {mode: self.aggregation.weights(lengths, groups, mode=mode) for mode in modes}
        return chosen | metrics.loss_agg_metrics(lengths, by_method, self.aggregation.mode)

    def choose_alpha(self) -> dict[str, float]:
        """With `alpha=auto`, the α of this step; by earlier ones' gradients alone, so that weights
        don't depend on what they weigh."""
        found = exponent.length_exponent(self.state.measured)
        alpha = exponent.chosen_alpha(found)
        self.aggregation = replace(self.aggregation, alpha=alpha)
        return {"loss_agg/alpha": alpha} | (
            {} if found is None else {"loss_agg/length_exponent": found}
        )

    def measure_gradients(self, steps: list[OptimizerStep]) -> None:
        """Notes lengths and squared gradient norms of some of the responses with an advantage."""
        once = steps[: len(steps) // self.config.actor_rollout_ref.actor.ppo_epochs]
        samples = [s for step in once for s in step.samples if s.advantages().any()]
        random = np.random.default_rng([self.config.data.seed, self.state.step, 0, 2])
        chosen = exponent.spread(response_lengths(samples), exponent.PER_STEP, random)
        norms = self.workers.gradient_norms([samples[i] for i in chosen])
        pairs = zip(chosen, norms, strict=True)
        new = [[samples[i].length, norm**2] for i, norm in pairs if np.isfinite(norm)]
        self.state.measured = [*self.state.measured, *new][-exponent.WINDOW :]

    def add_token_advantages(self, samples: list[Sample]) -> None:
        """By the critic's values: the reward belongs to a response's last token, KL terms to their
        own. Returns, which the critic learns, come from advantages that are not whitened yet."""
        lengths, algorithm = response_lengths(samples), self.config.algorithm
        rewards, values = [], []
        for s in samples:
            assert s.values is not None
            values.append(s.counted(s.values).astype(np.float64))
            rewards.append(np.zeros(s.length))
            if s.token_rewards is not None:
                rewards[-1] += s.counted(s.token_rewards)
            rewards[-1][-1:] += s.reward - rewards[-1].sum()
        r, V = (torch.tensor(np.concatenate(x)) for x in (rewards, values))
        found = advantages.gae(r, V, torch.tensor(lengths), algorithm.gamma, algorithm.lam)
        kept = [
            s.counted(m) if (m := s.trained_mask) is not None else np.ones(s.length)
            for s in samples
        ]
        white = advantages.whitened(found, torch.tensor(np.concatenate(kept)))
        ends = lengths.cumsum()[:-1]
        parts = (np.split(x.float().numpy(), ends) for x in (found, white))
        for s, value, own, whitened in zip(samples, values, *parts, strict=True):
            s.returns = s.spread(own + value.astype(np.float32))
            s.token_advantages = s.spread(whitened)
            s.advantage = float(whitened.mean()) if s.length else 0.0

    def add_response_advantages(self, samples: list[Sample]) -> None:
        """By the rewards of a prompt's responses, or of the batch."""
        rewards, groups = [s.reward for s in samples], [s.group for s in samples]
        estimator, by_std = self.config.algorithm.adv_estimator, self.aggregation.norm_by_std
        as_is = self.advantages_first  # nothing is rejected
        lengths = response_lengths(samples if as_is else [s.trained() for s in samples])
        keys = reward_components(self.config)
        values = advantages.advantages(
            rewards,
            groups,
            lengths,
            estimator,
            by_std,
            baselines=[s.baseline for s in samples],
            components=[[component(s, key) for s in samples] for key in keys],
            component_weights=self.config.algorithm.gdpo_reward_weights,
        )
        for sample, value in zip(samples, values.tolist(), strict=True):
            sample.advantage = value

    def optimizer_steps(
        self, samples: list[Sample], mean_factor: float = 1.0, of_critic: bool = False
    ) -> list[OptimizerStep]:
        """The responses of each optimizer step that have a part in its loss, with their weights.
        Those of the policy loss are divided by `mean_factor`."""
        rollout_lengths, steps = response_lengths(self.trained(samples)), []
        part = self.config.critic if of_critic else self.config.actor_rollout_ref.actor
        for number, mini_batch in enumerate(mini_batches(part, samples, self.mini_batch_seed)):
            counting = self.trained(mini_batch)
            counting = counting if of_critic else self.select_tokens(counting, number)
            given = response_lengths(counting), [s.group for s in counting], rollout_lengths
            w = others = self.aggregation.weights(*given)
            if mode := self.aggregation.regularizer_mode:
                others = self.aggregation.weights(*given, mode)
            step = OptimizerStep(counting, w / np.float32(mean_factor), others)
            steps.append(step.share(np.flatnonzero(w).tolist()))
        return steps

    def with_gradient(self, step: OptimizerStep) -> OptimizerStep:
        """The part of an actor's step that goes through the model, with the weights as they are."""
        return step.share([i for i, s in enumerate(step.samples) if self.has_gradient(s)])

    @property
    def mini_batch_seed(self) -> tuple[int, int]:
        """Of the order in which mini-batches take the prompts of this step."""
        return self.config.data.seed, self.state.step

    def has_gradient(self, sample: Sample) -> bool:
        """Whether the actor's loss may have one there: a response whose advantage is 0 counts in
        denominators, but need not go through the model where all terms are multiples of it."""
        return self.critic or sample.advantage != 0 or not self.loss.scales_with_advantage

    def select_tokens(self, samples: list[Sample], number: int) -> list[Sample]:
        """With the tokens that the policy loss treats otherwise in optimizer step `number`, if any;
        by the policy before the update."""
        lengths = response_lengths(samples)
        if samples and samples[0].entropies is not None:
            entropies = np.concatenate([s.counted(np.asarray(s.entropies)) for s in samples])
            low = low_entropy(entropies, self.loss.top_entropy_quantile)
            parts = np.split(low, lengths.cumsum()[:-1])
            samples = [s.marking("frozen", p) for s, p in zip(samples, parts, strict=True)]
        if not samples or not (select := SELECTIONS.get(self.loss.loss_mode)):
            return samples
        old = np.concatenate([s.counted(np.asarray(s.old_log_probs)) for s in samples])
        each = torch.tensor(np.concatenate([s.advantages() for s in samples]))
        random = np.random.default_rng([self.config.data.seed, self.state.step, number, 1])
        chosen = select(torch.tensor(old).double(), each, self.loss, random).bool().numpy()
        parts = np.split(chosen, lengths.cumsum()[:-1])
        return [s.marking("selected", part) for s, part in zip(samples, parts, strict=True)]

    def trained(self, samples: list[Sample]) -> list[Sample]:
        """The responses that have a part in the loss and its denominators, as the loss sees them:
        without those that are filtered out, and those of which rejection leaves nothing."""
        if self.config.algorithm.filter_overlong_response.enable:
            samples = [s for s in samples if not s.truncated]
        if all(s.trained_mask is None for s in samples):
            return samples
        left = [(s, s.trained()) for s in samples]
        return [trained for s, trained in left if trained is s or trained.length]

    def update_actor(self, steps: list[OptimizerStep]) -> dict[str, float]:
        """Makes the optimizer steps; returns means over them. Raises: as `count_skipped`."""
        record = self.count_skipped(self.workers.update(steps), steps, "actor")
        checks.warn_of_disagreement(self.config, record, self.workers.device)
        return record

    def count_skipped(
        self, by_rank: list[list[dict[str, float]]], steps: list[OptimizerStep], role: str
    ) -> dict[str, float]:
        """Means over optimizer steps of the model `role`. Raises: as `checks.count_skipped`."""
        before, limit = self.state.skipped_by_model, self.config.trainer.max_skipped_steps
        dump = self.checkpoints.root / f"skipped_step_{self.state.step}.parquet"
        so_far = before.get(role, 0)
        before[role] = checks.count_skipped(by_rank, so_far, limit, steps, dump, role)
        return metrics.update_metrics(by_rank, role)

    def update_critic(self, samples: list[Sample]) -> dict[str, float]:
        """The critic's optimizer steps; returns means over them. Raises: as `count_skipped`."""
        steps = self.optimizer_steps(samples, of_critic=True)
        return self.count_skipped(self.workers.update_critic(steps), steps, "critic")

    def update_engines(self) -> None:
        """Gives the engines the policy's weights and, on request, checks that they have them."""
        self.workers.update_engines()
        self.engine_metrics = self.workers.verify_engines(self.probe, self.state.step)

    def step_metrics(
        self, samples: list[Sample], steps: list[OptimizerStep], timer: Timer
    ) -> dict[str, float]:
        """What the samples and the clock say about a step, validation and checkpoint apart."""
        seconds = timer.seconds | {"step": sum(timer.seconds.values())}
        update_s, workers = seconds["update_actor"], self.workers
        filtering = self.config.algorithm.filter_groups.enable
        return {
            "training/global_step": self.state.step,
            "training/epoch": self.batches.epoch,
            **metrics.age_metrics(samples, self.state.step - 1),
            **(self.async_metrics(samples, seconds) if self.batches.age else {}),
            **self.engine_metrics,
            **metrics.data_metrics(samples, self.config.data.max_prompt_length),
            **metrics.speed_metrics(samples, seconds, workers.num_devices, filtering),
            **metrics.mfu_metrics(workers.model_size, steps, update_s, workers.peak_flops),
        }

    def async_metrics(
        self, samples: list[Sample], seconds: Mapping[str, float]
    ) -> dict[str, float]:
        """The share of responses that several policies drew; and shares of the time since the last
        step's in which engines, and the trainer, did nothing (where they share devices, in turns).
        """
        engines, now = self.workers.engines, time.monotonic()
        busy, since = self.engines_busy
        self.engines_busy = engines.busy_s, now
        idle = 1 - (engines.busy_s - busy) / max(1e-9, (now - since) * len(engines))
        waiting = seconds["gen"] / max(1e-9, seconds["step"])
        return {
            "async/several_versions": metrics.several_versions(samples),
            "async/engine_idle_share": max(0.0, idle),
            "async/trainer_idle_share": waiting,
        }

    def end_step(self, record: dict[str, float]) -> None:
        """Validates if due (a run that is to stop leaves that to the next one), logs, and saves."""
        trainer = self.config.trainer
        self.state.validation_due = self.is_due(trainer.test_freq)
        timer = Timer()
        try:
            if self.state.validation_due and not self.stop.number:
                with timer("testing"):
                    self.validate()
                record |= {"timing_s/testing": timer.seconds["testing"]}
        finally:  # whatever happens to the validation, the step is complete
            self.tracking.log(record, self.state.step)
        if self.is_due(trainer.save_freq):
            self.save_checkpoint()

    def validate(self) -> None:
        """Logs the accuracy on the validation prompts (what a reward model scores has none), and
        some of the responses."""
        step = self.state.step
        samples = self.batches.validation(step)
        record = metrics.validation_metrics(samples)
        if accuracies := list(metrics.validation_scores(record).values()):
            accuracy = float(np.mean(accuracies))
            if accuracy > self.state.best.get("val-core/best_acc", -np.inf):
                self.state.best = {"val-core/best_acc": accuracy, "val-core/best_step": step}
        self.tracking.log_validation(record | self.state.best, step, samples)
        self.state.validation_due = False

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and after the last, happens now."""
        return every > 0 and (self.state.step % every == 0 or self.state.step == self.total_steps)

    def save_checkpoint(self) -> None:
        """Writes what a resumed run needs, if that is new, or logs why it can't be done."""
        if self.state.step in (0, self.checkpoints.saved_step):  # without a step: starts anew
            return
        state = replace(self.state, batches=self.batches.state())
        durable = self.tracking.file.flush()  # a checkpoint is never newer than the metrics
        self.checkpoints.try_to_save(state, self.workers.save, durable)

    def rescue(self, action: Any, *args: Any) -> Any:
        """`action(*args)` between two steps; if it fails, no step is lost."""
        try:
            return action(*args)
        except Exception:
            self.save_checkpoint()
            raise

    @property
    def how_to_resume(self) -> str:
        """What to tell users when the run ends too early."""
        trainer, latest = self.config.trainer, self.checkpoints.latest
        if latest is None:
            return "no step was saved: the same command starts anew"
        named = trainer.resume_mode == "resume_path" and latest == self.checkpoints.named
        how = "" if trainer.resume_mode == "auto" or named else " with trainer.resume_mode=auto"
        text = f"the same command{how} goes on from {latest}"
        exports = trainer.save_hf_model and not trainer.val_only
        if exports and self.checkpoints.saved_step >= self.total_steps:
            text += f": only the export is left (or `python -m verl.trainer.main_export {latest}`)"
        return text

    def close(self) -> None:
        """Ends what generates and what scores; Ray belongs to the caller."""
        if hasattr(self, "workers"):
            self.workers.close()
        self.batches.close()
        self.stop.restore()
