"""Prompts → the train batch of each step: generation, rewards, DAPO's filters; and generation while
another step trains: with `trainer.async_rollout` of the whole next batch, with the weights from
before this step, with `trainer.max_policy_age` without an end."""

import logging
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby, islice
from typing import Any, NamedTuple, Self

import numpy as np

from verl.config.critic import CriticConfig
from verl.config.schema import ActorConfig, Config
from verl.data.dataset import PromptOrder, load_prompts
from verl.models.hf import num_embeddings
from verl.protocol import Prompt, Sample
from verl.rewards.scorer import RewardManager
from verl.rollout.engine import SamplingParams
from verl.rollout.in_flight import Group, InFlight
from verl.utils.timer import Timer

logger = logging.getLogger(__name__)

Generate = Callable[[list[Prompt], list[int], SamplingParams], Generator[list[Sample], None, None]]
"""(prompts, their group numbers, how to sample) → finished responses, as they come."""

METRICS: dict[str, Callable[[Sample], float]] = {
    "acc": lambda sample: sample.extras["acc"],
    "score": lambda sample: sample.score,
    **dict.fromkeys(("seq_reward", "seq_final_reward"), lambda sample: sample.reward),
}
"""What `filter_groups.metric` compares. With a KL term, verl's two rewards would differ."""


class TrainBatch(NamedTuple):
    """The responses of one training step, group by group, and what the filter did."""

    samples: list[Sample]
    metrics: dict[str, float]


@dataclass(slots=True)
class BatchesState:
    """What a resumed run needs."""

    order: dict[str, Any]  # `PromptOrder.state_dict`: position in the training prompts
    carried: list[list[Sample]] = field(default_factory=list)  # groups kept but not yet needed
    prefetched: TrainBatch | None = None  # the next step's batch, if it has been generated
    # With max_policy_age: prompts whose groups have left the line. `carried` are then the complete
    # groups in it, by their number; the others are drawn again. None: the run had no such line.
    taken: int | None = None


class Batches:
    """Makes the batch of each training step, and the responses of a validation."""

    def __init__(self, config: Config, prompts: list[Prompt], rewards: RewardManager) -> None:
        """Raises: ValueError if there are fewer prompts than a batch needs."""
        self.config, self.prompts, self.rewards = config, prompts, rewards
        self.val_prompts: list[Prompt] = []
        self.generate: Generate  # on the engines
        self.update_engines: Callable[[], Any]  # gives idle engines the policy's weights
        data, trainer = config.data, config.trainer
        key = "gen_batch_size" if config.algorithm.filter_groups.enable else "train_batch_size"
        size: int = getattr(data, key)
        num = len(prompts) or size  # without any, for a validation alone, none are drawn
        self.order = PromptOrder(num, size, data.seed, data.shuffle, f"data.{key}")
        epochs = trainer.total_epochs * self.order.steps_per_epoch
        self.total_steps = trainer.total_training_steps or epochs
        self.carried: list[list[Sample]] = []
        self.prefetched: Future[TrainBatch] | None = None
        self.thread = ThreadPoolExecutor(1)
        self.age, self.shares_devices = trainer.max_policy_age, not trainer.rollout_gpus_per_node
        self.line = InFlight(self.rewards.submit, sampling(config, 0))
        self.taken: list[list[Sample]] = []  # from the line, for the batch that is being made
        self.following = self._prompts_from(0)

    @classmethod
    def from_config(cls, config: Config, tokenizer: Any) -> Self:
        """With the configuration's prompts and rewards. Raises: ValueError or OSError."""
        data, trainer = config.data, config.trainer
        size = num_embeddings(config.actor_rollout_ref.model)
        load = partial(load_prompts, config=data, tokenizer=tokenizer, num_embeddings=size)
        by_model, number = config.reward_model.enable, data.train_max_samples
        train = partial(load, data.train_files, for_model=lambda row: by_model, max_samples=number)
        prompts = [] if trainer.val_only else train()
        batches = cls(config, prompts, RewardManager(config, tokenizer))
        if trainer.val_before_train or trainer.val_only or trainer.test_freq > 0:
            batches.val_prompts = load(
                data.val_files,
                for_model=lambda row: by_model and row.get("style") == "model",
                max_samples=data.val_max_samples,
            )
        return batches

    def next(self, step: int, timer: Timer) -> TrainBatch:
        """The samples of training step `step`, with scores and rewards. Raises: RewardError;
        ValueError if the filter leaves less than one mini-batch. Both leave all as it was."""
        if self.age:
            with timer("gen"):
                self._top_up(step, self.config.data.train_batch_size)
                batch = self._collect(step, Timer())
                if self.shares_devices:
                    self.line.pause()
            return batch
        ahead = self.prefetched
        if not self.config.trainer.async_rollout:
            self.prefetched = None
            return ahead.result() if ahead else self._collect(step, timer)
        with timer("gen"):
            batch = ahead.result() if ahead else self._collect(step, Timer())
        if ahead:
            with timer("update_weights"):
                self.update_engines()  # may fail: the batch is saved then
        self.prefetched = None
        if step < self.total_steps:
            self.prefetched = self.thread.submit(self._collect, step + 1, Timer())
        return batch

    @property
    def epoch(self) -> int:
        """Epoch of the next prompt that is trained on, from 0."""
        if not self.age:
            return self.order.epoch
        return self.line.first // (self.order.batch_size * self.order.steps_per_epoch)

    def policy_updated(self, step: int) -> None:
        """After training step `step`, the engines get the policy's new weights, unless they are
        busy with the next batch. What is in flight goes on with them."""
        if self.config.trainer.async_rollout:
            return
        self.line.pause()
        self.update_engines()
        if self.age and step < self.total_steps:
            self._top_up(step + 1, self.config.data.train_batch_size)

    def validation(self, step: int) -> list[Sample]:
        """Responses of the current policy to the validation prompts, scored."""
        if self.prefetched is not None:
            self.prefetched.exception()  # waits until the engines are idle
        if self.config.trainer.async_rollout:
            self.update_engines()
        self.line.pause()
        size = self.config.data.val_batch_size or len(self.val_prompts)
        params = sampling(self.config, step, validation=True)
        samples: list[Sample] = []
        for first in range(0, len(self.val_prompts), size):
            prompts = self.val_prompts[first : first + size]
            samples += chain.from_iterable(self.scored(prompts, first, params, Timer()))
        if step < self.total_steps:
            self.line.start()
        return samples

    def state(self) -> BatchesState:
        """What a resumed run needs; waits for the batch that is being prefetched."""
        if self.age:
            if self.shares_devices:
                self.line.pause()
            kept = [group.samples() for group in self.line.line if group.complete]
            return BatchesState(self.order.state_dict(), kept, taken=self.line.first)
        waiting = self.prefetched
        batch = waiting.result() if waiting and not waiting.exception() else None
        return BatchesState(self.order.state_dict(), self.carried, batch)

    def load(self, state: BatchesState, step: int = 0) -> None:
        """Goes on from `state`, after training step `step`. Raises: ValueError if it belongs to
        another order of prompts, or to a run with or without `max_policy_age` where this isn't."""
        self.order.load_state_dict(state.order)
        if (state.taken is None) != (not self.age):
            was = "0" if self.age else "more than 0"
            problem = f"trainer.max_policy_age={self.age}, but the run had {was}"
            raise ValueError(f"{problem}: keep it, or begin a new run with the exported model")
        if state.taken is not None:
            self._load_line(state.taken, state.carried, step)
            return
        self.carried = state.carried
        if state.prefetched is not None:
            self.prefetched = Future()
            self.prefetched.set_result(state.prefetched)

    def close(self) -> None:
        """Ends what scores; waits for a generation that somebody has cancelled."""
        self.thread.shutdown(cancel_futures=True)
        self.line.thread.shutdown(cancel_futures=True)
        self.rewards.close()

    def _collect(self, step: int, timer: Timer) -> TrainBatch:
        """Generates and scores the batch of `step`. An error leaves everything as it was."""
        before, self.taken = self.order.state_dict(), []
        try:
            if self.config.algorithm.filter_groups.enable:
                groups, metrics = self._filtered(step, timer)
            else:
                groups, metrics = [*self._round(step, 0, timer)], {"train/num_gen_batches": 1.0}
        except BaseException:
            if self.age:
                self.line.put_back(self.taken)
            else:
                self.order.load_state_dict(before)
            raise
        for number, group in enumerate(groups):
            for sample in group:
                sample.group = number
        metrics |= self.line.metrics() if self.age else {}
        return TrainBatch([s for group in groups for s in group], metrics)

    def _filtered(self, step: int, timer: Timer) -> tuple[list[list[Sample]], dict[str, float]]:
        """Rounds of generation until enough groups, those carried over first, have spread."""
        rule, needed = self.config.algorithm.filter_groups, self.config.data.train_batch_size
        kept, carries = list(self.carried), rule.carry_over and not self.age
        most = needed * 2 if carries else needed  # what this step and the next can use
        outcomes, rounds = Outcomes(str(rule.metric), len(self.prompts)), 0
        while len(kept) < needed and not (rounds and rounds == rule.max_num_gen_batches):
            with closing(self._round(step, rounds, timer)) as groups:
                kept += islice(filter(outcomes.add, groups), most - len(kept))
            rounds += 1
            surplus = max(0, len(kept) - needed)
            logger.info("prompts kept: %d of %d, surplus: %d", len(kept) - surplus, needed, surplus)
        mini = self.config.actor_rollout_ref.actor.ppo_mini_batch_size
        usable = min(len(kept) // mini * mini, needed)
        if not usable:
            raise ValueError(
                f"algorithm.filter_groups kept {outcomes.kept} of {outcomes.total} prompts in "
                f"{rounds} rounds, less than one mini-batch of {mini}: all responses to the others "
                f"had the same {rule.metric} ({outcomes}). Take easier or harder prompts, a "
                "larger actor_rollout_ref.rollout.n or max_num_gen_batches"
            )
        if usable < needed:
            text = "training on %d of %d prompts: algorithm.filter_groups.max_num_gen_batches=%d"
            logger.warning(text, usable, needed, rounds)
        metrics = {
            "train/num_gen_batches": float(rounds),
            "train/num_prompts": float(usable),
            "train/carried_prompts": float(min(len(self.carried), usable)),
            **outcomes.shares(),
        }
        fresh = [group for group in kept[usable:] if group[0].policy_version >= step - 1]
        self.carried = fresh if carries else []
        return kept[:usable], metrics

    def _round(self, step: int, round_: int, timer: Timer) -> Generator[list[Sample], None, None]:
        """All responses to the next prompts (see `scored`); no two rounds share a group."""
        params, keys = sampling(self.config, step), reward_components(self.config)
        if self.age:
            groups = self._first_in_line(step)
        else:
            prompts = [self.prompts[i] for i in self.order.next_batch()]
            groups = self.scored(prompts, round_ * len(prompts), params, timer)
        with closing(groups):
            for group in groups:
                for sample in group:
                    sample.baseline = group[-1].reward if params.greedy else 0.0
                    check_components(sample, keys)
                yield group[: params.n]  # the greedy response is not trained on

    def _first_in_line(self, step: int) -> Generator[list[Sample], None, None]:
        """The groups that are first in line, as many as a round has."""
        for number in range(size := self.order.batch_size):
            if not self.line.line:  # all that were drawn before have gone through the filter
                last = self.config.data.train_batch_size if step == self.total_steps else 0
                self._top_up(step, last)
            if self.rewards.conversations is not None:
                self.line.wait_generated(size - number)
                if self.shares_devices:
                    self.line.pause()
                self.rewards.ask_model()
            self.taken.append(self.line.next())
            yield self.taken[-1]

    def _top_up(self, step: int, needed: int) -> None:
        """Has the engines work on what step `step` still needs, and on the batches of as many steps
        as a response may be old: what is in line now is trained on before it is older."""
        after = min(self.age, self.total_steps - step) * self.config.data.train_batch_size
        number = needed + after - len(self.line.line)
        if number > 0:
            self.line.pause()
            self.line.add(list(islice(self.following, number)))
        self.line.start()

    def _prompts_from(self, number: int) -> Iterator[Prompt]:
        """The endless order of prompts from its prompt `number` on."""
        self.order.batches_taken, skipped = divmod(number, self.order.batch_size)
        while True:
            yield from (self.prompts[i] for i in self.order.next_batch()[skipped:])
            skipped = 0

    def _load_line(self, first: int, groups: list[list[Sample]], step: int) -> None:
        """The line begins with group `first`; of those in it, these are complete. Those that would
        be too old when their turn comes, as the limit was higher before, are drawn again."""
        complete = {}
        for group in groups:
            after = (group[0].group - first) // self.config.data.train_batch_size
            oldest = min(sample.policy_version for sample in group)
            if after <= self.age and step + after - oldest <= self.age:
                complete[group[0].group] = group
        self.line.first, self.following = first, self._prompts_from(first)
        for number in range(first, max(complete, default=-1) + 1):
            prompt = next(self.following)
            if number in complete:
                self.line.line.append(Group.of(complete[number]))
            else:
                self.line.add([prompt])

    def scored(
        self, prompts: list[Prompt], first: int, params: SamplingParams, timer: Timer
    ) -> Generator[list[Sample], None, None]:
        """The responses to these prompts, a group (numbered from `first`) as soon as it is scored;
        reward errors are raised at their group's turn. Closing it ends generation and scoring."""
        numbers = list(range(first, first + len(prompts)))
        scoring: list[list[Future[list[Sample]]]] = [[] for _ in prompts]
        generated, more = self.generate(prompts, numbers, params), True

        def complete(scores: list[Future[list[Sample]]]) -> bool:
            done = all(part.done() for part in scores)
            return done and sum(len(part.result()) for part in scores) == params.num_responses

        try:
            for scores in scoring:
                while more and not complete(scores):
                    with timer("gen"):
                        finished = next(generated, None)
                    more = finished is not None
                    for samples in split_groups(finished or []):
                        scoring[samples[0].group - first].append(self.rewards.submit(samples))
                with timer("reward"):
                    if not more:
                        self.rewards.ask_model()
                    wait(scores)
                assert complete(scores), "an engine left responses out"
                group = chain.from_iterable(part.result() for part in scores)
                yield sorted(group, key=lambda sample: sample.response_index)
        finally:
            generated.close()
            mine = {id(part) for part in chain.from_iterable(scoring)}
            waiting = [other for other in self.rewards.waiting if id(other[1]) not in mine]
            self.rewards.waiting[:] = waiting
            for part in chain.from_iterable(scoring):
                part.cancel()


class Outcomes:
    """Counts new groups; warns of as many without spread in a row as there are prompts."""

    def __init__(self, metric: str, num_prompts: int) -> None:
        self.metric, self.num_prompts = metric, num_prompts
        self.total = self.kept = self.right = self.wrong = self.without_spread = 0

    def add(self, group: list[Sample]) -> bool:
        """Counts one group; whether its responses differ in `metric`."""
        accuracies, kept = {s.extras.get("acc") for s in group}, has_spread(group, self.metric)
        self.total += 1
        self.kept += kept
        self.right += accuracies == {1}
        self.wrong += accuracies == {0}
        self.without_spread = 0 if kept else self.without_spread + 1
        if self.without_spread and self.without_spread % self.num_prompts == 0:
            text = "algorithm.filter_groups kept none of %d prompts, as many as there are: %s"
            logger.warning(text, self.num_prompts, str(self))
        return kept

    def shares(self) -> dict[str, float]:
        """Metrics: of all groups those that were kept, all right and all wrong."""
        counts = {"kept_prompts": self.kept, "all_right": self.right, "all_wrong": self.wrong}
        return {f"train/{k}_ratio": n / self.total for k, n in counts.items() if self.total}

    def __str__(self) -> str:
        right, wrong = self.right / self.total, self.wrong / self.total
        return f"{right:.0%} of the prompts all right, {wrong:.0%} all wrong"


def split_groups(samples: list[Sample]) -> list[list[Sample]]:
    """Samples sorted by group → one list per group."""
    return [list(group) for _, group in groupby(samples, key=lambda sample: sample.group)]


def has_spread(group: Sequence[Sample], metric: str) -> bool:
    """Whether responses differ in `metric`. If those of a prompt don't, every advantage is 0."""
    values = [METRICS[metric](sample) for sample in group]
    return not math.isclose(min(values), max(values), rel_tol=1e-6, abs_tol=1e-9)


def mini_batches(
    part: ActorConfig | CriticConfig, samples: list[Sample], seed: Sequence[int]
) -> Iterator[list[Sample]]:
    """The samples of each optimizer step: all responses to `ppo_mini_batch_size` prompts."""
    groups = split_groups(samples)
    for epoch in range(part.ppo_epochs):
        order = np.arange(len(groups))
        if part.shuffle:
            np.random.default_rng([*seed, epoch]).shuffle(order)
        for start in range(0, len(groups), part.ppo_mini_batch_size):
            chosen = order[start : start + part.ppo_mini_batch_size]
            yield [sample for i in chosen for sample in groups[i]]


def sampling(config: Config, step: int, validation: bool = False) -> SamplingParams:
    """How the responses of training step `step`, or of the validation after it, are sampled."""
    rollout, longest = config.actor_rollout_ref.rollout, config.data.max_response_length
    keys = rollout.val_kwargs if validation else rollout
    temperature = keys.temperature if keys.do_sample else 0.0
    seed, ignore_eos = (rollout.seed, int(validation), step), rollout.ignore_eos and not validation
    options = temperature, keys.top_p, keys.top_k, ignore_eos, seed
    greedy = config.algorithm.adv_estimator == "remax" and not validation
    return SamplingParams(keys.n, longest, *options, greedy=greedy)


def reward_components(config: Config) -> list[str]:
    """What the reward function must return beside the score: `algorithm.gdpo_reward_keys`."""
    algorithm = config.algorithm
    return (algorithm.gdpo_reward_keys or []) if algorithm.adv_estimator == "gdpo" else []


def component(sample: Sample, key: str) -> Any:
    """One number of several that a reward function returned."""
    return sample.score if key == "score" else sample.extras.get(key)


def check_components(sample: Sample, keys: Sequence[str]) -> None:
    """Raises: ValueError if one of the reward's components is no finite number."""
    for key in keys:
        value = component(sample, key)
        if not isinstance(value, int | float) or not math.isfinite(value):
            problem = f"is {value!r:.200}, of {['score', *sample.extras]}"
            remedy = "the reward function must return a number for it"
            where = sample.prompt.location
            raise ValueError(f"{where}: {key} of algorithm.gdpo_reward_keys {problem}: {remedy}")
