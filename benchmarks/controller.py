"""The driver's own work in a training step: all that is neither generation nor a model's pass.

    .venv/bin/python benchmarks/controller.py [--quick]

A step of 1,280 responses (the published scripts') and one of 12,800, of log-normal lengths up to
8,192 tokens, goes through the trainer's own stages and real Ray; engines and actor ranks do nothing
but hand samples over and answer with arrays of the right sizes. Token arrays are random; the score
is the real countdown reward of one right answer, which stands for every response's decoded text.

* Per stage: wall time, and the driver's processor time (all its threads).
* Bytes through the object store, against those of the token arrays themselves.
* Weights and advantages of 100,000 responses, from the samples on, against loops over the same
  samples and over the rows of padded masks, in turn.
"""

import argparse
import gc
import math
import statistics
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
import torch
from common import alternate, report, report_limit, spread

from verl.algorithms.weights import resolve_aggregation
from verl.cluster import WorkerGroup, reserve_devices, start_ray
from verl.config.load import load_config
from verl.config.schema import Config
from verl.protocol import (
    ARRAYS,
    OptimizerStep,
    Prompt,
    Sample,
    SampleBatch,
    WeightChunk,
    response_lengths,
)
from verl.rewards.scorer import RewardManager
from verl.rollout.engine import RolloutEngine, Row, SamplingParams
from verl.rollout.pool import EnginePool
from verl.trainer.ppo.batches import BatchesState, has_spread, split_groups
from verl.trainer.ppo.checkpoint import CheckpointFolder, TrainState
from verl.trainer.ppo.core_algos import advantages, response_weights
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.workers import Workers, loss_config
from verl.utils.samples import write_samples
from verl.utils.timer import Timer

NAME = "controller"
PER_PROMPT = 10
LONGEST = 8192
VOCABULARY = 151_936
ALPHA = 0.75
POOL = 2**21  # random tokens, from which an engine cuts its responses


def draw_lengths(count: int, rng: np.random.Generator, longest: int = LONGEST) -> np.ndarray:
    """Response lengths in tokens, log-normal (σ = 0.8), 1,360 on average."""
    return rng.lognormal(np.log(1000), 0.8, count).astype(np.int64).clip(1, longest)


def make_prompts(count: int) -> list[Prompt]:
    """Prompts of 100 to 256 tokens, as those of the countdown scripts."""
    rng = np.random.default_rng(0)
    truth = {"target": 24, "numbers": [4, 6, 3]}
    return [
        Prompt(i, rng.integers(VOCABULARY, size=rng.integers(100, 257)), "countdown", truth)
        for i in range(count)
    ]


class Engine(RolloutEngine):
    """Answers at once; prompt by prompt, in as many messages as real engines send."""

    def build(self, *_: Any) -> None:
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(VOCABULARY, size=POOL, dtype=np.int32)
        self.log_probs = -rng.random(POOL, np.float32)

    def generate_rows(self, rows: Sequence[Row], params: SamplingParams) -> Iterator[list[Sample]]:
        self.sent, done = -math.inf, SampleBatch([])
        for group, of_group in groupby(rows, key=lambda row: row.group):
            rng = np.random.default_rng(group)
            lengths = draw_lengths(params.n, rng)
            starts = rng.integers(POOL - LONGEST, size=params.n)
            parts = [slice(i, i + n) for i, n in zip(starts, lengths, strict=True)]
            for row, part in zip(of_group, parts, strict=True):
                done.append(self.to_sample(row, self.tokens[part], self.log_probs[part]))
            if self.may_send():
                yield done
                done = SampleBatch([])
        if done:
            yield done

    def load_weights(self, chunk: WeightChunk) -> None:
        pass


class Actor:
    """Takes samples, and answers with as many numbers as the real one."""

    def log_probs(self, samples: Sequence[Sample], *_: Any) -> np.ndarray:
        return np.full(sum(s.length for s in samples), -1, np.float32)

    def update(self, steps: Sequence[OptimizerStep], *_: Any) -> list[dict[str, float]]:
        names = ("w/pg_loss", "ppo_kl", "pg_clipfrac", "entropy", "rollout/logprob_diff_mean")
        sums = dict.fromkeys(names, 0.5)
        return [
            sums
            | {
                "tokens": sum(s.length for s in step.samples),
                "grad_norm": 1.0,
                "lr": 1e-6,
                "skipped": 0.0,
            }
            for step in steps
        ]


class Tokenizer:
    """Stands for one whose decoding takes no time: it is not the manager's own work."""

    def batch_decode(self, ids: list[list[int]], **_: bool) -> list[str]:
        return ["<think> 4 * 6 </think> <answer> 4 * 6 </answer>"] * len(ids)


def configure(responses: int, ranks: int) -> Config:
    """The published countdown script's settings, at another batch size."""
    prompts = responses // PER_PROMPT
    return load_config(
        [
            "data.train_files=none",
            "data.val_files=none",
            f"data.train_batch_size={prompts}",
            f"data.max_response_length={LONGEST}",
            "data.max_prompt_length=256",
            "algorithm.adv_estimator=grpo",
            "algorithm.use_grpopp=True",
            f"algorithm.grpopp_config.alpha={ALPHA}",
            "actor_rollout_ref.model.path=none",
            f"actor_rollout_ref.actor.ppo_mini_batch_size={prompts // 4}",
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
            f"actor_rollout_ref.rollout.n={PER_PROMPT}",
            "actor_rollout_ref.rollout.max_num_seqs=256",
            f"trainer.n_gpus_per_node={ranks}",
            "trainer.device=cpu",
        ]
    )


def make_trainer(config: Config, actor: WorkerGroup) -> RayPPOTrainer:
    """A trainer with workers, and without model and data."""
    trainer = RayPPOTrainer.__new__(RayPPOTrainer)
    trainer.config, trainer.aggregation = config, resolve_aggregation(config)
    trainer.loss, trainer.critic = loss_config(config), False
    trainer.state, trainer.engine_metrics = TrainState(BatchesState({}), step=1), {}
    trainer.batches = SimpleNamespace(epoch=0, age=0)
    trainer.checkpoints = CheckpointFolder(config)
    trainer.workers = workers = Workers.__new__(Workers)
    workers.device = "cpu"
    workers.config, workers.actor, workers.num_devices = config, actor, len(actor)
    workers.model_size = workers.peak_flops = None
    return trainer


class Stages:
    """Seconds of each stage, in the order of the first step: wall, and the driver's processors."""

    def __init__(self) -> None:
        self.wall: dict[str, list[float]] = defaultdict(list)
        self.processor: dict[str, list[float]] = defaultdict(list)

    def __call__(self, name: str, function: Callable[[], Any]) -> Any:
        start, busy = time.perf_counter(), time.process_time()
        result = function()
        self.wall[name].append(time.perf_counter() - start)
        self.processor[name].append(time.process_time() - busy)
        return result


def step(
    trainer: RayPPOTrainer,
    engines: EnginePool,
    rewards: RewardManager,
    prompts: list[Prompt],
    folder: Path,
    stages: Stages,
) -> list[Sample]:
    """One training step; the stages stand apart where the trainer overlaps them."""
    params = SamplingParams(PER_PROMPT, LONGEST)
    timer = Timer()
    numbers = list(range(len(prompts)))
    chunks = stages("receive samples", lambda: list(engines.generate(prompts, numbers, params)))
    samples = SampleBatch(
        sorted((s for chunk in chunks for s in chunk), key=lambda s: (s.group, s.response_index))
    )
    groups = split_groups(samples)
    stages(
        "score: countdown's reward, not decoding",
        lambda: [future.result() for future in [rewards.submit(group) for group in groups]],
    )
    rng = np.random.default_rng(0)
    for sample in samples:
        sample.score = sample.reward = sample.extras["acc"] = float(rng.random() < 0.5)
    stages(
        "group filter",
        lambda: [group for group in split_groups(samples) if has_spread(group, "acc")],
    )
    stages("advantages", lambda: trainer.add_advantages(samples))
    stages("old log-probs: scatter, gather", lambda: trainer.add_log_probs(samples, timer))
    stages("loss_agg metrics", lambda: trainer.aggregation_metrics(samples))
    steps = stages("mini-batches, weights", lambda: trainer.optimizer_steps(samples))
    steps = [trainer.with_gradient(step) for step in steps]
    with timer("update_actor"):
        stages("update: balance, scatter", lambda: trainer.update_actor(steps))
    stages("metrics", lambda: trainer.step_metrics(samples, steps, timer))
    stages(
        "write the samples (Feather)",
        lambda: write_samples(folder / "samples.feather", samples),
    )
    return samples


def run_steps(responses: int, ranks: int, repeats: int) -> None:
    """The table of stages for one batch size, and its targets."""
    config = configure(responses, ranks)
    prompts = make_prompts(responses // PER_PROMPT)
    slots = reserve_devices(1, ranks, "cpu")
    actor = WorkerGroup(Actor, slots, "cpu", [()] * ranks)
    engines = EnginePool(Engine, slots, "cpu", config, 0.5)
    engines.wait_ready()
    trainer = make_trainer(config, actor)
    rewards = RewardManager(config, Tokenizer())
    stages = Stages()
    gc.freeze()  # as `start_workers` does
    with tempfile.TemporaryDirectory() as folder:
        step(trainer, engines, rewards, prompts, Path(folder), Stages())  # warm-up
        for i in range(repeats):
            samples = step(trainer, engines, rewards, prompts, Path(folder), stages)
            print(f"{responses} responses: step {i + 1}/{repeats}", file=sys.stderr)
        size = (Path(folder) / "samples.feather").stat().st_size
    rewards.close()
    tokens = sum(s.length for s in samples)
    print(f"\n{responses:,} responses, {tokens / 1e6:.1f} M tokens, {size / 1e6:.0f} MB of Feather")
    print(f"{'stage':38}{'wall, ms':>30}{'driver CPU, ms':>30}")
    for name, seconds in stages.wall.items():
        cells = [
            spread([round(1000 * s, 1) for s in x], "") for x in (seconds, stages.processor[name])
        ]
        print(f"{name:38}{cells[0]:>30}{cells[1]:>30}")
    totals = [sum(step) for step in zip(*stages.wall.values(), strict=True)]
    print(f"{'whole step':38}{spread([1000 * s for s in totals], ''):>30}")
    report_limit(NAME, f"seconds of {responses:,} responses", statistics.median(totals), "<= 2")
    while_generating = [sum(x) for x in zip(*list(stages.wall.values())[:2], strict=True)]
    rest = [a - b for a, b in zip(totals, while_generating, strict=True)]
    what = f"seconds of {responses:,} responses after generation"
    report_limit(NAME, what, statistics.median(rest), "<= 2")
    run_bytes(samples)
    for worker in (*actor.workers, *engines.workers):
        ray.kill(worker)


def loops(rewards: torch.Tensor, groups: list[int], lengths: list[float]) -> torch.Tensor:
    """w_i · M · N · A_i as published code makes it, one response after the other: GRPO's advantage
    from lists in a dict, of whose tensors torch takes mean and standard deviation, then ∆L's
    scaling."""
    by_group: dict[int, list[torch.Tensor]] = defaultdict(list)
    scores = rewards.clone()
    for i, group in enumerate(groups):
        by_group[group].append(scores[i])
    means = {group: torch.mean(torch.tensor(values)) for group, values in by_group.items()}
    stds = {group: torch.std(torch.tensor(values)) for group, values in by_group.items()}
    for i, group in enumerate(groups):
        scores[i] = (scores[i] - means[group]) / (stds[group] + 1e-6)
    mean_length = sum(lengths) / len(lengths)
    powers = [(length / mean_length) ** -ALPHA for length in lengths]
    mean_power = sum(powers) / len(powers)
    for i, power in enumerate(powers):
        scores[i] = scores[i] * (power / mean_power)
    return scores


def run_maths(count: int, repeats: int) -> None:
    """Weights and advantages against `loops`. All begin with the samples and ask each one for its
    length, but for ours with the lengths given, as the stages of a step have them from their
    `SampleBatch`, which asks once; published code has a padded mask instead, as wide as the longest
    response may be, and sums its rows. That it then multiplies tensors of that shape is left out.
    The last row reads one attribute of each sample: the least that a pass over objects costs.
    """
    torch.set_num_threads(1)  # so few numbers are not worth waking another one
    rng, width = np.random.default_rng(0), LONGEST
    tokens = np.zeros(width, np.int64)
    groups = np.repeat(np.arange(count // PER_PROMPT), PER_PROMPT)
    prompt = Prompt(0, tokens[:1], "countdown", None)
    drawn = zip(groups.tolist(), draw_lengths(count, rng, width), strict=True)
    samples = [Sample(prompt, group, tokens[:length], "stop") for group, length in drawn]
    batch = SampleBatch(samples)
    rewards = rng.integers(0, 2, count).astype(np.float64)
    mask = torch.arange(width) < torch.as_tensor(batch.lengths)[:, None]

    def ours(lengths: np.ndarray) -> torch.Tensor:
        weights = response_weights(lengths, "delta-l", width, ALPHA)
        return weights * advantages(rewards, groups, lengths)

    def looped(lengths: Callable[[], list[float]]) -> torch.Tensor:
        return loops(torch.as_tensor(rewards), groups.tolist(), lengths())

    ways = {
        "ours": lambda: ours(response_lengths(samples)),
        "ours, lengths given": lambda: ours(batch.lengths),
        "loops": lambda: looped(lambda: [s.length for s in samples]),
        "loops over padded rows": lambda: looped(lambda: [row.sum().item() for row in mask]),
    }
    for name in list(ways)[2:]:
        expected, found = ways[name](), ours(batch.lengths) * count * width
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6)
    print(f"\nweights and advantages of {count:,} responses; all equal to 2e-6:")
    least = {"one attribute of each": lambda: deque(map(attrgetter("group"), samples), maxlen=0)}
    seconds = alternate(ways | least, repeats)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(f"{name:38}{spread([1000 * s for s in values], 'ms'):>30}")
    what = f"ms for weights and advantages of {count:,}, lengths given"
    report_limit(NAME, what, 1e3 * median["ours, lengths given"], "<= 5")
    peer = "loops over padded rows"
    for name in list(ways)[:2]:
        report(NAME, f"{name}: times faster than {peer}", median[peer] / median[name], ">= 1000")


def message_bytes(value: Any) -> int:
    """What Ray's object store holds of `value`."""
    context = ray._private.worker.global_worker.get_serialization_context()
    return context.serialize(value).total_bytes


def run_bytes(samples: list[Sample]) -> None:
    """Bytes of the messages of a step against those of the arrays in them."""
    arrays = {
        "engine → driver": ("response_ids", "rollout_log_probs"),
        "driver → rank, old log-probs": ("response_ids",),
        "driver → rank, update": ("response_ids", "rollout_log_probs", "old_log_probs"),
    }
    prompts = sum({s.group: s.prompt.token_ids.nbytes for s in samples}.values())
    print(f"\n{'message':38}{'MB':>10}{'MB of arrays':>14}")
    total = needed = 0
    for name, fields in arrays.items():
        moved = message_bytes(SampleBatch(samples, [f for f in ARRAYS if f not in fields]))
        found = [getattr(s, f) for s in samples for f in fields]
        own = prompts + sum(array.nbytes for array in found if array is not None)
        total, needed = total + moved, needed + own
        print(f"{name:38}{moved / 1e6:10.1f}{own / 1e6:14.1f}")
    log_probs = np.concatenate([s.old_log_probs for s in samples if s.old_log_probs is not None])
    moved, own = message_bytes(log_probs), log_probs.nbytes
    print(f"{'rank → driver, old log-probs':38}{moved / 1e6:10.1f}{own / 1e6:14.1f}")
    ratio = (total + moved) / (needed + own)
    report(NAME, f"bytes sent per byte of arrays, {len(samples):,} responses", ratio, "<= 1.05")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smaller sizes, fewer repeats")
    options = parser.parse_args()
    ranks = 2 if options.quick else 4  # and as many engines
    start_ray(2 * ranks)
    for responses in (1280,) if options.quick else (1280, 12800):
        run_steps(responses, ranks, 2 if options.quick else 7)
    ray.shutdown()
    run_maths(*((10_000, 3) if options.quick else (100_000, 7)))


if __name__ == "__main__":
    main()
