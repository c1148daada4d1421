"""The processes of a run, and what the driver asks of them: actor ranks and generation engines."""

import gc
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from verl.algorithms.losses import LossConfig
from verl.cluster import WORKERS_PER_DEVICE, WorkerGroup, reserve_devices, start_ray
from verl.config.critic import CriticConfig
from verl.config.schema import ActorConfig, Config, RefConfig, RolloutConfig
from verl.models.policy import MicroBatchLimit, PolicyWorker
from verl.protocol import ARRAYS, OptimizerStep, Prompt, Sample, SampleBatch
from verl.rollout.engine import SamplingParams, engine_class
from verl.rollout.pool import EnginePool
from verl.trainer.ppo.checks import ordinary_difference
from verl.utils import own_functions
from verl.utils.device import cluster_device, default_weight_transfer
from verl.utils.seqlen_balancing import balanced_partitions, partitions_of_prompts
from verl.weight_sync import WeightSync

logger = logging.getLogger(__name__)

VERIFIED = 8, 16
"""Responses and their tokens: 128 of them exceed 0.05 nats by chance in none of 500 starts of eight
engines whose bfloat16 is 0.035 off on average; 8 would in half of them."""

NOT_RESUMED = {
    "model": "the weights are those of the checkpoint's Hugging Face folder, rounded to its type",
    "optimizer": "the optimizer's states begin anew: none were saved, or none asked for",
}


class Workers:
    """The policy on all ranks (`actor`), and the generation `engines`; samples go to the ranks in
    balanced shares. `model_size` and `peak_flops` are None where they are not known, as on CPUs. A
    call goes through Ray by its name: `actor.scatter("update", …)` runs `PolicyWorker.update` on
    each rank, and `engines.generate` runs `RolloutEngine.generate_rows` on each."""

    def __init__(self, config: Config, ray_started: Callable[[], None]) -> None:
        """Starts Ray, which takes SIGTERM (`ray_started` may take it back), actor ranks without a
        model, and engines. Raises: ValueError if the cluster lacks the devices."""
        self.config, trainer, model = config, config.trainer, config.actor_rollout_ref
        ranks = trainer.n_gpus_per_node
        engine = engine_class(model.rollout.name)
        per_node = ranks + (trainer.rollout_gpus_per_node or 0)
        start_ray(trainer.nnodes * per_node, **asdict(config.ray_init))
        ray_started()
        device = self.device = cluster_device(trainer.device)
        slots = reserve_devices(trainer.nnodes, per_node, device)
        actor_slots = [slot for i, slot in enumerate(slots) if i % per_node < ranks]
        engine_slots = [slot for i, slot in enumerate(slots) if i % per_node >= ranks]
        self.num_devices, self.colocated = len(slots), not engine_slots
        share = 1 / WORKERS_PER_DEVICE if self.colocated else 1.0
        transfer = model.rollout.weight_transfer or default_weight_transfer(
            device, engine.transfers, not self.colocated
        )
        arguments = [(device, transfer)] * len(actor_slots)
        self.actor = WorkerGroup(PolicyWorker, actor_slots, device, arguments, share)
        self.engines = EnginePool(engine, engine_slots or slots, device, config, share)
        self.update_engines = WeightSync(self.actor, self.engines, transfer, model.rollout.dtype)
        self.engines.on_restart = self.update_engines

    def build(self, total_steps: int, checkpoint: Path | None) -> None:
        """Loads the policy, and the reference, reward model and critic that the run needs, onto the
        actor ranks; with `checkpoint`, the folder to resume from, its weights onto ranks and
        engines."""
        model, reward, critic = (
            getattr(self.config, name) for name in ("actor_rollout_ref", "reward_model", "critic")
        )
        self.engines.wait_ready()  # now: vLLM measures how much memory is free
        self.free_devices()  # which building and loading need
        self.actor.connect(model.nccl_timeout)
        actor, (split, ref_split) = model.actor, model.splits
        shares = actor.use_prefix_grouper
        settings = model.model, actor.fsdp_config, actor.optim, total_steps, split, shares
        sizes, peaks = zip(*self.actor.call("build", *settings), strict=True)
        self.model_size, self.peak_flops = sizes[0], sum(peaks) if all(peaks) else None
        beside: dict[str, tuple[Any, ...]] = {}
        if needs_reference(self.config) and not model.model.uses_lora:
            beside["ref"] = model.model, model.ref.fsdp_config, None, 0, ref_split, shares
        if reward.enable:
            beside["reward_model"] = reward.model.classifier(), reward.model.fsdp_config
        if needs_critic(self.config):
            loaded, of_critic = critic.model.classifier(), critic.model.fsdp_config
            parts = critic.ulysses_sequence_parallel_size
            beside["critic"] = loaded, of_critic, critic.optim, total_steps, parts
        for role, arguments in beside.items():
            self.actor.call("build_beside", role, *arguments)
        if own := own_functions.sources(self.config).get(own_functions.LOSS):
            self.actor.call("define_loss", *own)
        if self.config.trainer.val_only:
            logger.info("validating %s", checkpoint or model.model.path)
        if checkpoint:
            logger.info("resuming from %s", checkpoint)
            wanted = model.actor.checkpoint.load_contents
            read = self.actor.call("load", str(checkpoint / "actor"), wanted)[0]
            for name in NOT_RESUMED.keys() - read if not self.config.trainer.val_only else ():
                logger.warning(NOT_RESUMED[name])
            if needs_critic(self.config) and (checkpoint / "critic").is_dir():
                self.actor.call("ask", "critic", "load", str(checkpoint / "critic"))
            elif needs_critic(self.config):
                logger.warning("the critic begins anew: the checkpoint holds none")
        self.update_engines()  # those that sleep have none
        # What is here now stays: walking it again for garbage takes longer than a step's samples.
        gc.freeze()

    def free_devices(self) -> None:
        """Puts engines that share the actor's devices to sleep, so that it has their memory."""
        if self.colocated:
            self.engines.sleep()

    def reward_scores(self, conversations: list[Sample]) -> list[float]:
        """The reward model's, [N]. May be called while another thread trains, and then waits for
        the end of an update."""
        reward = self.config.reward_model
        size = None if reward.use_dynamic_bsz else reward.micro_batch_size_per_gpu
        limit = MicroBatchLimit(size, reward.forward_max_token_len_per_gpu)
        shares = self._shares(conversations)
        asked = "reward_model", "log_probs"
        batches = [SampleBatch(conversations[i] for i in share) for share in shares]
        parts = [(*asked, batch, 1.0, limit) for batch in batches]
        scores = np.zeros(len(conversations))
        self.free_devices()
        with self.actor.exclusive:
            by_rank = self.actor.scatter("ask", parts)
        scores[list(chain(*shares))] = np.concatenate(by_rank)
        return scores.tolist()

    def add_log_probs(
        self,
        samples: list[Sample],
        role: str,
        entropies: bool = False,
        temperature: float | None = None,
    ) -> None:
        """Gives samples their `old_log_probs` (`role="actor"`; `entropies`: and these) or
        `ref_log_probs` (`"ref"`), at the rollout's temperature or another."""
        model = self.config.actor_rollout_ref
        rollout, field, method = model.rollout, "old_log_probs", "log_probs"
        size = rollout.log_prob_micro_batch_size_per_gpu or model.actor.ppo_micro_batch_size_per_gpu
        sizes: RolloutConfig | RefConfig = rollout
        split, ref_split = model.splits
        if role == "ref":
            field = method = "ref_log_probs"
            sizes, size = model.ref, model.ref.log_prob_micro_batch_size_per_gpu or size
            split = ref_split
        dynamic, most = sizes.log_prob_use_dynamic_bsz, sizes.log_prob_max_token_len_per_gpu
        limit = MicroBatchLimit(None if dynamic else size, most)
        more = (True,) if entropies else ()
        temperature = rollout.temperature if temperature is None else temperature
        self._add(field, samples, split, (method,), temperature, limit, *more)

    def add_values(self, samples: list[Sample]) -> None:
        """Gives samples the critic's `values`."""
        critic = self.config.critic
        size = None if critic.use_dynamic_bsz else critic.forward_micro_batch_size_per_gpu
        limit = MicroBatchLimit(size, critic.forward_max_token_len_per_gpu)
        split, call = critic.ulysses_sequence_parallel_size, ("ask", "critic", "log_probs")
        self._add("values", samples, split, call, 1.0, limit)

    def _add(
        self, field: str, samples: list[Sample], split: int, call: tuple[str, ...], *others: Any
    ) -> None:
        """Sets `field` of samples to what ranks return for their shares of them."""
        shares = self._shares(samples, split, field != "values")
        parts = [[samples[i] for i in share] for share in shares]
        omit = ["trained_mask", "entropies", *ARRAYS.keys() - {"response_ids", "loss_mask"}]
        method, *roles = call
        arguments = [(*roles, SampleBatch(part, omit), *others) for part in parts]
        for part, found in zip(parts, self.actor.scatter(method, arguments), strict=True):
            ends = np.cumsum([len(s.response_ids) for s in part])
            for name, values in zip((field, "entropies"), np.atleast_2d(found), strict=False):
                for sample, of_sample in zip(part, np.split(values, ends)[:-1], strict=True):
                    setattr(sample, name, of_sample)

    def update(self, steps: list[OptimizerStep]) -> list[list[dict[str, float]]]:
        """Makes the actor's optimizer steps (see `_update`)."""
        actor = self.config.actor_rollout_ref.actor
        return self._update(actor, steps, loss_config(self.config), ("update",), actor.grad_clip)

    def gradient_norms(self, samples: list[Sample]) -> list[float]:
        """‖g_i‖ of each response, [N]: of its own policy loss Σ_t ℓ_it, without KL and entropy
        terms, which is what w_i multiplies; by the weights before the update."""
        actor = self.config.actor_rollout_ref.actor
        loss = replace(loss_config(self.config), entropy_coeff=0.0, kl_coef=0.0)
        alone = [OptimizerStep([s], np.ones(1, np.float32)) for s in samples]
        return self._update(actor, alone, loss, ("gradient_norms",))[0]

    def update_critic(self, steps: list[OptimizerStep]) -> list[list[dict[str, float]]]:
        """Makes the critic's optimizer steps (see `_update`)."""
        critic = self.config.critic
        loss = LossConfig(kind="value", cliprange_value=critic.cliprange_value)
        call = "ask", "critic", "update"
        return self._update(critic, steps, loss, call, critic.grad_clip)

    def _update(
        self,
        part: ActorConfig | CriticConfig,
        steps: list[OptimizerStep],
        loss: LossConfig,
        call: tuple[str, ...],
        *others: Any,
    ) -> list[list[Any]]:
        """What each rank reports about each step, of which it gets its share, [ranks][steps]."""
        size = None if part.use_dynamic_bsz else part.ppo_micro_batch_size_per_gpu
        limit = MicroBatchLimit(size, part.ppo_max_token_len_per_gpu)
        split = part.ulysses_sequence_parallel_size
        actor = isinstance(part, ActorConfig)
        shares = [
            [step.share(p) for p in self._shares(step.samples, split, actor)] for step in steps
        ]
        method, *roles = call
        arguments = [
            (*roles, [of_step[rank] for of_step in shares], loss, limit, *others)
            for rank in range(len(self.actor))
        ]
        with self.actor.exclusive:  # else an engine that starts again could get half an update
            return self.actor.scatter(method, arguments)

    def verify_engines(self, prompt: Prompt, step: int, strict: bool = False) -> dict[str, float]:
        """With `verify_weights` compares the log-probabilities of `VERIFIED` tokens of each engine
        with the actor's. More than the tolerance is a warning or, if `strict`, a ValueError.
        Engines on the actor's devices sleep afterwards, and get weights when they generate."""
        rollout = self.config.actor_rollout_ref.rollout
        at_start = strict and rollout.verify_weights is None and rollout.name == "vllm"
        if not (rollout.verify_weights or at_start):
            return {}
        n, length = VERIFIED[0], min(VERIFIED[1], self.config.data.max_response_length)
        temperature = rollout.temperature or 1.0  # a validation alone may be greedy
        params = SamplingParams(n, length, temperature, ignore_eos=True)
        params = replace(params, seed=(rollout.seed, 2, step))
        by_engine = self.engines.call("generate_all", [prompt], [0], params)
        self.free_devices()
        self.add_log_probs(list(chain(*by_engine)), "actor", temperature=temperature)
        means = [
            float(np.mean([np.abs(s.rollout_log_probs - s.old_log_probs).mean() for s in found]))
            for found in by_engine
        ]
        engine = int(np.argmax(means))  # that of a NaN, if there is one
        worst, limit = means[engine], rollout.verify_weights_tolerance
        limit = limit or ordinary_difference(self.config, self.device)[0]
        if not worst <= limit:
            text = f"engine {engine} is not the actor's model: their log-probabilities "
            text += f"differ by {worst:.3g} nats a token, more than {limit:g} "
            text += "(actor_rollout_ref.rollout.verify_weights_tolerance)"
            if strict:
                raise ValueError(text)
            logger.warning(text)
        return {"rollout/verify_logprob_diff": worst}

    def save(self, folder: Path) -> None:
        """Writes the models' parts of a checkpoint, `actor` and `critic`."""
        contents = self.config.actor_rollout_ref.actor.checkpoint.save_contents
        if "hf_model" in contents:  # which gathers all weights
            self.free_devices()
        self.actor.call("save", folder / "actor", contents, self.config.trainer.hf_model_dtype)
        if needs_critic(self.config):
            self.actor.call("ask", "critic", "save", folder / "critic")

    def save_hf_model(self, folder: Path) -> None:
        """Writes the policy in Hugging Face format."""
        self.engines.sleep()
        self.actor.call("save_hf", folder, self.config.trainer.hf_model_dtype)
        logger.info("the model is in %s", folder)

    def close(self) -> None:
        """Ends a generation that is under way; Ray belongs to the caller."""
        self.engines.cancelled = True
        gc.unfreeze()

    def _shares(
        self, samples: list[Sample], split: int = 1, actor: bool = False
    ) -> list[list[int]]:
        """Which samples each rank gets; `split` ranks in a row the same. `actor`: for passes that,
        if packed and not split, compute a prompt once."""
        parts = len(self.actor) // split
        shares = [part.tolist() for part in np.array_split(np.arange(len(samples)), parts)]
        if self.config.trainer.balance_batch:
            policy = self.config.actor_rollout_ref
            shared = policy.model.use_remove_padding and policy.actor.use_prefix_grouper
            if actor and split == 1 and shared:
                shares = partitions_of_prompts(samples, parts)
            else:
                shares = balanced_partitions([s.num_tokens for s in samples], parts)
        return [share for share in shares for _ in range(split)]


def needs_reference(config: Config) -> bool:
    """Whether a KL term needs the reference policy."""
    in_loss = config.actor_rollout_ref.actor.use_kl_loss
    return not config.trainer.val_only and (in_loss or config.algorithm.use_kl_in_reward)


def needs_critic(config: Config) -> bool:
    """Whether a value model is trained."""
    return not config.trainer.val_only and config.algorithm.adv_estimator == "gae"


def loss_config(config: Config) -> LossConfig:
    """The actor's loss, as the configuration says."""
    actor, correction = config.actor_rollout_ref.actor, config.algorithm.rollout_correction
    low, high = actor.clip_ratio_low, actor.clip_ratio_high
    reinforce = config.algorithm.bypass_old_log_prob and correction.loss_type == "reinforce"
    constants = {name: value for name, value, _ in actor.policy_loss.walk()}
    return LossConfig(
        **constants | ({"loss_mode": "vanilla"} if reinforce else {}),
        kind="reinforce" if reinforce else "ppo",
        temperature=config.actor_rollout_ref.rollout.temperature,
        clip_ratio_low=actor.clip_ratio if low is None else low,
        clip_ratio_high=actor.clip_ratio if high is None else high,
        clip_ratio_c=actor.clip_ratio_c,
        tau_pos=actor.tau_pos,
        tau_neg=actor.tau_neg,
        entropy_coeff=actor.entropy_coeff,
        kl_coef=actor.kl_loss_coef if actor.use_kl_loss else 0.0,
        kl_type=actor.kl_loss_type,
        rollout_is=correction.rollout_is,
        rollout_is_threshold=correction.rollout_is_threshold,
    )
