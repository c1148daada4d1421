"""Prompts → the train batch of a step: generation, rewards, and DAPO's filters."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, wait
from contextlib import closing
from itertools import groupby
from typing import Any

import numpy as np
from tqdm import tqdm

from verl.data.dataset import PromptOrder
from verl.protocol import Prompt, Sample, fill
from verl.rewards.errors import RewardError
from verl.rewards.manager import RewardManager
from verl.trainer.config.schema import Config
from verl.utils.timer import Timer
from verl.workers.rollout.base import SamplingParams

logger = logging.getLogger(__name__)

Generate = Callable[[list[Prompt], list[int], SamplingParams], Generator[list[Sample], None, None]]

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
        """`generate` yields samples as engines finish them, and stops them when it is closed;
        `rewards` scores them meanwhile."""
        self.config, self.prompts = config, prompts
        self.generate, self.rewards = generate, rewards
        filtering = config.algorithm.filter_groups.enable
        key = "data.gen_batch_size" if filtering else "data.train_batch_size"
        size = config.data.gen_batch_size if filtering else config.data.train_batch_size
        self.order = PromptOrder(
            len(prompts), size, config.data.seed, config.data.shuffle, batch_key=key
        )
        self.carried: list[list[Sample]] = []
        """Groups that the last step kept but did not need."""
        self.drawn: tuple[list[Sample], dict[str, float]] | None = None
        """What the next call of `next` returns, if a checkpoint held it."""

    def next(self, step: int, timer: Timer) -> tuple[list[Sample], dict[str, float]]:
        """The samples of training step `step`, group by group, and what the filter did.

        Raises: ValueError if the filter leaves less than one mini-batch. An error leaves everything
        as it was.
        """
        if drawn := self.drawn:
            self.drawn = None
            return drawn
        before = self.state()
        try:
            if self.config.algorithm.filter_groups.enable:
                return self._filtered(step, timer)
            samples = [sample for group in self._round(step, 0, timer) for sample in group]
            return samples, {"train/num_gen_batches": 1.0}
        except (RewardError, ValueError):
            self.load(before)
            raise

    def wait(self) -> None:
        """Until the engines are idle: they are, between two calls."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        state: dict[str, Any] = {"order": self.order.state_dict(), "carried": self.carried}
        if self.drawn:
            state["drawn"], state["drawn_metrics"] = self.drawn
        return state

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.order.load_state_dict(state["order"])
        self.carried = state["carried"]
        self.drawn = (state["drawn"], state["drawn_metrics"]) if state.get("drawn") else None

    def _filtered(self, step: int, timer: Timer) -> tuple[list[Sample], dict[str, float]]:
        """Rounds of generation until enough groups have spread, those carried over first."""
        rule, needed = self.config.algorithm.filter_groups, self.config.data.train_batch_size
        kept, carried = list(self.carried), len(self.carried)
        most = needed * (2 if rule.carry_over else 1)  # what this step and the next can use
        seen: Counter[float | None] = Counter()  # new groups by what acc all their responses have
        rounds = since_kept = surplus = 0
        while len(kept) < needed and not (rounds and rounds == rule.max_num_gen_batches):
            groups = self._round(step, rounds, timer)
            rounds += 1
            with tqdm(
                total=needed, initial=len(kept), desc="prompts kept", leave=False, disable=None
            ) as bar:
                for group in groups:
                    values = {sample.extras["acc"] for sample in group}
                    seen[values.pop() if len(values) == 1 else None] += 1
                    since_kept += 1
                    if has_spread(group, str(rule.metric)):
                        kept.append(group)
                        since_kept = 0
                        surplus = max(len(kept) - needed, 0)
                        bar.update(surplus == 0)
                        bar.set_postfix(surplus=surplus)
                        if len(kept) == most:
                            break
                groups.close()
            text = "prompts kept: %d of %d, surplus: %d"
            logger.info(text, len(kept) - surplus, needed, surplus)
            if since_kept >= len(self.prompts):
                since_kept -= len(self.prompts)
                text = "algorithm.filter_groups kept none of %d prompts, as many as there are: %s"
                logger.warning(text, len(self.prompts), _shares(seen))
        mini = self.config.actor_rollout_ref.actor.ppo_mini_batch_size
        usable = min(len(kept) // mini * mini, needed)
        if not usable:
            raise ValueError(
                f"algorithm.filter_groups kept {len(kept) - carried} of {seen.total()} prompts in "
                f"{rounds} rounds, less than one mini-batch of {mini}: all responses to the others "
                f"had the same {rule.metric} ({_shares(seen)}). Take easier or harder prompts, a "
                "larger actor_rollout_ref.rollout.n or max_num_gen_batches"
            )
        if usable < needed:
            text = "training on %d of %d prompts: algorithm.filter_groups.max_num_gen_batches=%d"
            logger.warning(text, usable, needed, rounds)
        fresh = [group for group in kept[usable:] if group[0].policy_version >= step - 1]
        self.carried = fresh if rule.carry_over else []
        for number, group in enumerate(kept[:usable]):
            fill(group, "group", [number] * len(group))
        metrics = {
            "train/num_gen_batches": float(rounds),
            "train/num_prompts": float(usable),
            "train/carried_prompts": float(min(carried, usable)),
        }
        if total := seen.total():
            metrics["train/kept_prompts_ratio"] = (len(kept) - carried) / total
            metrics["train/all_right_ratio"] = seen[1.0] / total
            metrics["train/all_wrong_ratio"] = seen[0.0] / total
        return [sample for group in kept[:usable] for sample in group], metrics

    def _round(self, step: int, round_: int, timer: Timer) -> Generator[list[Sample], None, None]:
        """Every response to the next prompts of the order, scored: the groups in the order of the
        prompts, as soon as they are complete. Closing it stops the engines.

        A reward's error is raised at its group's turn, never for a prompt that isn't needed: when
        responses are finished doesn't decide whether a run fails."""
        prompts = [self.prompts[i] for i in self.order.next_batch()]
        numbers = [round_ * len(prompts) + i for i in range(len(prompts))]
        generated = self.generate(prompts, numbers, train_sampling(self.config, step))
        waiting: dict[int, list[tuple[Sample, Future[Any]]]] = {number: [] for number in numbers}
        n = self.config.actor_rollout_ref.rollout.n
        with closing(score_while_generating(generated, self.rewards, timer)) as scored:
            for samples, scores in scored:
                waiting[samples[0].group] += [(sample, scores) for sample in samples]
                while waiting and len(waiting[first := next(iter(waiting))]) == n:
                    group = sorted(waiting.pop(first), key=lambda pair: pair[0].draw)
                    for _, scores in group:
                        scores.result()
                    yield [sample for sample, _ in group]
        assert not waiting, "an engine left responses out"


def _shares(seen: Counter[float | None]) -> str:
    right, wrong = seen[1.0] / seen.total(), seen[0.0] / seen.total()
    return f"{right:.0%} of the prompts all right, {wrong:.0%} all wrong"


def score_while_generating(
    generated: Generator[list[Sample], None, None], rewards: RewardManager, timer: Timer
) -> Generator[tuple[list[Sample], Future[Any]], None, None]:
    """The generated samples in the order in which they come, a prompt's at a time, each with a
    future that is done: its `result()` raises the error if they have no scores.

    `timing_s/reward` is the time that scores take after the last sample has come. Closing it closes
    `generated`, and cancels what is still being scored.
    """
    scoring: deque[tuple[list[Sample], Future[Any]]] = deque()
    try:
        with closing(generated):
            while True:
                with timer("gen"):
                    finished = next(generated, None)
                if finished is None:
                    break
                scoring += [(group, rewards.submit(group)) for group in split_groups(finished)]
                while scoring and scoring[0][1].done():
                    yield scoring.popleft()
        while scoring:
            with timer("reward"):
                wait([scoring[0][1]])
            yield scoring.popleft()
    finally:
        for _, scores in scoring:
            scores.cancel()


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
