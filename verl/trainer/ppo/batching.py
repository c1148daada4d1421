"""Prompts → the train batch of a step: generation, rewards, and DAPO's filters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from itertools import groupby

import numpy as np

from verl.data.dataset import PromptOrder
from verl.protocol import Prompt, Sample
from verl.rewards.manager import RewardManager
from verl.trainer.config.schema import Config
from verl.utils.timer import Timer
from verl.workers.rollout.base import SamplingParams

logger = logging.getLogger(__name__)

Generate = Callable[[list[Prompt], list[int], SamplingParams], Iterable[list[Sample]]]

METRICS: dict[str, Callable[[Sample], float]] = {
    "acc": lambda sample: sample.extras["acc"],
    "score": lambda sample: sample.score,
    "seq_reward": lambda sample: sample.reward,
    "seq_final_reward": lambda sample: sample.reward,
}
"""What `algorithm.filter_groups.metric` compares. Both rewards hold the overlong punishment. They
would differ with a KL term in the reward, where the configuration refuses `seq_final_reward`."""


class TrainBatches:
    """Draws the samples of each training step, with scores and rewards."""

    def __init__(
        self, config: Config, prompts: list[Prompt], generate: Generate, rewards: RewardManager
    ) -> None:
        """`generate` yields samples as engines finish them; `rewards` scores them meanwhile."""
        self.config, self.prompts = config, prompts
        self.generate, self.rewards = generate, rewards
        filtering = config.algorithm.filter_groups.enable
        key = "data.gen_batch_size" if filtering else "data.train_batch_size"
        size = config.data.gen_batch_size if filtering else config.data.train_batch_size
        self.order = PromptOrder(
            len(prompts), size, config.data.seed, config.data.shuffle, batch_key=key
        )

    def next(self, step: int, timer: Timer) -> tuple[list[Sample], dict[str, float]]:
        """The samples of training step `step`, group by group, and what the filter did.

        Raises: ValueError if the filter leaves less than one mini-batch.
        """
        rule, data = self.config.algorithm.filter_groups, self.config.data
        if not rule.enable:
            return self._generate(step, 0, timer), {}
        kept: list[list[Sample]] = []
        rounds, seen = 0, 0
        while len(kept) < data.train_batch_size:
            if rounds and rounds == rule.max_num_gen_batches:
                break
            groups = split_groups(self._generate(step, rounds, timer))
            rounds, seen = rounds + 1, seen + len(groups)
            kept += [g for g in groups if has_spread(g, str(rule.metric))]
            logger.info("prompts kept: %d of %d", len(kept), data.train_batch_size)
        mini = self.config.actor_rollout_ref.actor.ppo_mini_batch_size
        usable = min(len(kept) // mini * mini, data.train_batch_size)
        if not usable:
            raise ValueError(
                f"algorithm.filter_groups kept {len(kept)} of {seen} prompts in {rounds} rounds, "
                f"less than one mini-batch of {mini}: all responses to the others had the same "
                f"{rule.metric}. Take easier or harder prompts, more responses per prompt "
                "(actor_rollout_ref.rollout.n), or more rounds (max_num_gen_batches)"
            )
        if usable < data.train_batch_size:
            logger.warning("training on %d of %d prompts", usable, data.train_batch_size)
        metrics = {
            "train/num_gen_batches": float(rounds),
            "train/kept_prompts_ratio": len(kept) / seen,
        }
        return [sample for group in kept[:usable] for sample in group], metrics

    def _generate(self, step: int, round_: int, timer: Timer) -> list[Sample]:
        """One round: every response to the next prompts of the order, scored, sorted by group."""
        prompts = [self.prompts[i] for i in self.order.next_batch()]
        groups = [round_ * len(prompts) + i for i in range(len(prompts))]
        generated = self.generate(prompts, groups, train_sampling(self.config, step))
        return score_while_generating(generated, self.rewards, timer)


def score_while_generating(
    generated: Iterable[list[Sample]], rewards: RewardManager, timer: Timer
) -> list[Sample]:
    """All of the generated samples with their scores, sorted by group.

    `timing_s/reward` is the time that scores take after the last sample has come.
    """
    scoring: list[Future[list[Sample]]] = []
    first_open = 0
    with timer("gen"):
        for finished in generated:
            scoring.append(rewards.submit(finished))
            while first_open < len(scoring) and scoring[first_open].done():
                scoring[first_open].result()  # an error need not wait for the last sample
                first_open += 1
    with timer("reward"):
        samples = [sample for future in scoring for sample in future.result()]
    return sorted(samples, key=lambda sample: (sample.group, sample.draw))


def split_groups(samples: list[Sample]) -> list[list[Sample]]:
    """Samples sorted by group → one list per group."""
    return [list(group) for _, group in groupby(samples, key=lambda sample: sample.group)]


def has_spread(group: list[Sample], metric: str) -> bool:
    """Whether the responses of a prompt differ in `metric`: without, every advantage is 0."""
    values = [METRICS[metric](sample) for sample in group]
    return min(values) != max(values)


def mini_batches(config: Config, samples: list[Sample], step: int) -> Iterator[list[Sample]]:
    """The samples of each optimizer step: `ppo_mini_batch_size` prompts with all their responses,
    over `ppo_epochs` epochs, in order or (`actor.shuffle`) at random."""
    actor = config.actor_rollout_ref.actor
    groups = split_groups(samples)
    for epoch in range(actor.ppo_epochs):
        order = np.arange(len(groups))
        if actor.shuffle:
            np.random.default_rng([config.data.seed, step, epoch]).shuffle(order)
        for start in range(0, len(groups), actor.ppo_mini_batch_size):
            chosen = order[start : start + actor.ppo_mini_batch_size]
            yield [sample for i in chosen for sample in groups[i]]


def train_sampling(config: Config, step: int) -> SamplingParams:
    """How training responses of `step` are drawn."""
    rollout = config.actor_rollout_ref.rollout
    return SamplingParams(
        n=rollout.n,
        max_tokens=config.data.max_response_length,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        ignore_eos=rollout.ignore_eos,
        seed=(rollout.seed, 0, step),
    )


def validation_sampling(config: Config, step: int) -> SamplingParams:
    """How validation responses after `step` are drawn."""
    rollout = config.actor_rollout_ref.rollout
    val = rollout.val_kwargs
    return SamplingParams(
        n=val.n,
        max_tokens=config.data.max_response_length,
        temperature=val.temperature if val.do_sample else 0.0,
        top_p=val.top_p,
        top_k=val.top_k,
        seed=(rollout.seed, 1, step),
    )
