"""A step of training on any number of devices, by simulation: what `simulate_cluster.py` runs.

It follows the code, but for one thing: prompts for vLLM wait in one queue, and an engine gets the
next ones as it has room, where `verl.rollout.pool` deals them out beforehand (for `hf` here, too);
ranks get balanced shares of each optimizer step (`verl.utils.seqlen_balancing`); dynamic sampling
ends a round as soon as enough groups are kept, in the order of the prompts
(`verl.trainer.ppo.batches`). Generation without an end is in `cluster_in_flight.py`. Times are in
seconds, lengths in tokens.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from cluster_engine import Engine, EngineRun, deal, decode
from numpy.typing import NDArray

from verl.utils.seqlen_balancing import balanced_partitions

Draw = Callable[[int], tuple[NDArray[np.int64], NDArray[np.bool_]]]
"""Number of prompts P → lengths of their responses [P, n], and which the filter keeps [P]."""


@dataclass(frozen=True, slots=True)
class Trainer:
    """An optimizer step takes update_s + token_s for each token of the rank with most of them, and
    at least micro_s for each micro-batch: the time of its collective operations. So do passes that
    compute log-probabilities, with times of their own."""

    token_s: float
    update_s: float = 0.0
    micro_s: float = 0.0
    micro_tokens: int = 16384
    log_prob_s: float = 0.0
    """Per token, of a pass that computes log-probabilities."""
    log_prob_call_s: float = 0.0
    log_prob_micro_s: float = 0.0
    sync_s: float = 0.0
    """Of moving the weights to the engines, while both wait."""
    other_s: float = 0.0
    """Of a step, on the driver, whatever its size."""
    response_s: float = 0.0
    """Of a response, on the driver, between generation and update."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One round."""

    seconds: float
    finish: NDArray[np.float64]
    """When a group's last response is known to the driver, [P]."""
    busy: NDArray[np.float64]
    """How long each engine works, [engines]."""


def generate(engine: Engine, engines: int, lengths: NDArray[np.int64], prompt: int) -> Generation:
    """A round for prompts of `prompt` tokens with responses of these lengths, [P, n]."""
    count, n = lengths.shape
    room = max(1, min(engine.max_num_seqs // n, -(-count // engines)))  # prompts an engine holds
    if engine.continuous:
        finish, busy = _continuous(engine, engines, lengths, prompt, room)
    else:
        finish, busy = _in_blocks(engine, engines, lengths, prompt)
    return Generation(float(finish.max(initial=0.0)), finish, busy)


def _in_blocks(
    engine: Engine, engines: int, lengths: NDArray[np.int64], prompt: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    count, n = lengths.shape
    of_row = deal(np.repeat(np.arange(count), n), engines, engine.max_num_seqs)
    finish, busy = np.zeros(count * n), np.zeros(engines)
    for e in np.unique(of_row):
        mine = np.flatnonzero(of_row == e)
        left = lengths.ravel()[mine]
        held = np.full(len(mine), prompt)
        run = EngineRun(engine, left, held, np.where(mine % n, 0, prompt), engine.max_num_seqs)
        while run.advance():
            pass
        finish[mine], busy[e] = run.finish, run.clock
    return finish.reshape(count, n).max(1), busy


def _continuous(
    engine: Engine, engines: int, lengths: NDArray[np.int64], prompt: int, room: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    count, n = lengths.shape
    rows = lengths.tolist()
    limit = min(engine.max_num_seqs, engine.cache_tokens / (prompt + float(lengths.mean())))
    limit = max(limit, 1)
    finish, busy, left = np.zeros(count), np.zeros(engines), [n] * count
    clock, step = [engine.call_s] * engines, [0] * engines
    held = [0] * engines  # tokens in the cache
    running: list[list[tuple[int, int, int]]] = [[] for _ in range(engines)]  # last step, length, …
    waiting: list[list[tuple[int, int]]] = [[] for _ in range(engines)]  # (length, group)
    prompts = [0] * engines
    events: list[tuple[float, int]] = []
    following = 0

    def fill(e: int) -> None:
        """Gives an engine prompts, begins what there is room for, and plans its next event."""
        nonlocal following
        while prompts[e] < room and following < count:
            waiting[e] += [(length, following) for length in rows[following]]
            clock[e] += engine.prefill_s * prompt
            prompts[e] += 1
            following += 1
        active = running[e]
        begin = min(len(waiting[e]), int(limit) - len(active))
        for length, group in waiting[e][:begin]:
            heapq.heappush(active, (step[e] + length, length, group))
            held[e] += prompt
        del waiting[e][: max(begin, 0)]
        if active:
            seconds = decode(engine, len(active), held[e], active[0][0] - step[e])
            heapq.heappush(events, (clock[e] + seconds, e))

    for e in range(engines):
        fill(e)
    while events:
        clock_e, e = heapq.heappop(events)
        active, steps = running[e], running[e][0][0] - step[e]
        held[e] += steps * len(active)
        step[e] += steps
        clock[e] = busy[e] = clock_e
        while active and active[0][0] == step[e]:
            _, length, group = heapq.heappop(active)
            held[e] -= prompt + length
            left[group] -= 1
            if not left[group]:
                finish[group] = clock_e
                prompts[e] -= 1
        fill(e)
    return finish, busy


@dataclass(frozen=True, slots=True)
class Batch:
    """What a step's generation gives: its time, the engines' work, and groups to train on."""

    seconds: float
    busy: float
    """Of all engines together."""
    lengths: NDArray[np.int64]
    """[groups, n]"""
    carried: NDArray[np.int64]
    """For the next step, [groups, n]."""
    generated: int
    """Prompts of its rounds."""


def draw_batch(
    engine: Engine,
    engines: int,
    draw: Draw,
    prompt: int,
    needed: int,
    round_size: int = 0,
    carried: NDArray[np.int64] | None = None,
    carry_over: bool = False,
    early_stop: bool = True,
) -> Batch:
    """A step's `needed` groups. With `round_size`, by dynamic sampling in rounds of that many
    prompts, each of which ends once this step and, with `carry_over`, the next have enough; without
    `early_stop`, which is only there to compare with, once everything has come."""
    if not round_size:
        lengths, _ = draw(needed)
        round_ = generate(engine, engines, lengths, prompt)
        return Batch(round_.seconds, float(round_.busy.sum()), lengths, lengths[:0], needed)
    kept = [] if carried is None or not len(carried) else [carried]
    have, most = sum(map(len, kept)), needed * (1 + carry_over)
    seconds = busy = 0.0
    generated = 0
    while have < needed:
        lengths, keeps = draw(round_size)
        round_ = generate(engine, engines, lengths, prompt)
        in_order = np.maximum.accumulate(round_.finish)
        chosen = np.flatnonzero(keeps)[: most - have]
        end = round_.seconds
        if early_stop and have + len(chosen) == most:
            end = float(in_order[chosen[-1]])
        seconds, busy = seconds + end, busy + float(np.minimum(round_.busy, end).sum())
        kept.append(lengths[chosen])
        have, generated = have + len(chosen), generated + round_size
    groups = np.concatenate(kept)
    rest = groups[needed:] if carry_over else groups[:0]
    return Batch(seconds, busy, groups[:needed], rest, generated)


@lru_cache(maxsize=1024)
def largest_share(tokens: bytes, ranks: int) -> int:
    """Of balanced shares of these int64 numbers; kept, since placements train on the same."""
    numbers = np.frombuffer(tokens, np.int64).tolist()
    return max(sum(numbers[i] for i in part) for part in balanced_partitions(numbers, ranks))


def train_seconds(
    trainer: Trainer,
    ranks: int,
    lengths: NDArray[np.int64],
    prompt: int,
    mini_batch: int,
    log_probs: NDArray[np.int64] | None = None,
) -> tuple[float, float]:
    """(time, mean time that a rank computes) of an update with mini-batches of so many groups, and
    before it of the log-probabilities of responses with these lengths, if any."""
    seconds = working = 0.0

    def add(tokens: NDArray[np.int64], token_s: float, fixed: float, micro_s: float) -> None:
        nonlocal seconds, working
        most = largest_share(tokens.tobytes(), ranks)
        passes = -(-most // trainer.micro_tokens)
        seconds += fixed + passes * max(micro_s, most / passes * token_s)
        working += fixed + float(tokens.sum()) / ranks * token_s

    if log_probs is not None and log_probs.size:
        fresh = log_probs.ravel() + prompt
        add(fresh, trainer.log_prob_s, trainer.log_prob_call_s, trainer.log_prob_micro_s)
    for start in range(0, len(lengths), mini_batch):
        mine = lengths[start : start + mini_batch].ravel() + prompt
        add(mine, trainer.token_s, trainer.update_s, trainer.micro_s)
    return seconds, working


@dataclass(frozen=True, slots=True)
class Run:
    """One run: who works where, on what."""

    engines: int
    ranks: int
    ahead: bool = False
    """`trainer.async_rollout`; then, and with `split`, engines have devices of their own."""
    split: bool = False
    engine_gpus: int = 1
    """Devices of an engine."""
    prompts: int = 128
    prompt: int = 256
    mini_batch: int = 128
    round_size: int = 0
    carry_over: bool = False
    early_stop: bool = True
    age: int = 0
    """`trainer.max_policy_age`, for `cluster_in_flight.simulate_in_flight`."""


@dataclass(frozen=True, slots=True)
class Result:
    """Means over steps."""

    step_s: float
    gen_s: float
    train_s: float
    idle_engines: float
    """Share of a step in which an engine's devices do nothing (colocated: nothing at all)."""
    idle_trainer: float
    cost: float
    """Device-seconds of a response that is trained on."""
    begun: float
    """Prompts given to the engines for each one that is trained on."""
    mean_age: float = 0.0
    """Of a token that is trained on: steps since its policy, here and in the next of `age`."""
    max_age: float = 0.0
    mixed: float = 0.0
    """Share of responses that several policies drew; so many of `age`."""


def simulate(
    run: Run, engine: Engine, trainer: Trainer, draw: Draw, steps: int = 3, scale: float = 1.0
) -> Result:
    """Some steps of a run. `scale`: how much slower both are while both work (shared cores)."""
    carried = None
    rows = []
    for _ in range(steps):
        batch = draw_batch(
            engine,
            run.engines,
            draw,
            run.prompt,
            run.prompts,
            run.round_size,
            carried,
            run.carry_over,
            run.early_stop,
        )
        # The first update's own forward pass knows the policy's log-probabilities. Responses of an
        # older policy keep those that they were drawn with (`RayPPOTrainer.add_log_probs`). Counted
        # in full are what the trainer skips since the tables were made: the first mini-batch's part
        # of the pass, and responses without an advantage.
        old = 0 if carried is None else min(len(carried), run.prompts)
        fresh = 0 if run.ahead else len(batch.lengths) - old
        several = len(batch.lengths) > run.mini_batch
        carried = batch.carried
        train, working = train_seconds(
            trainer,
            run.ranks,
            batch.lengths,
            run.prompt,
            run.mini_batch,
            batch.lengths[len(batch.lengths) - fresh :] if several or old else None,
        )
        driver = trainer.other_s + trainer.response_s * batch.lengths.size
        rows.append(
            (
                batch.seconds,
                train + driver,
                batch.busy / run.engines,
                working,
                batch.lengths.size,
                batch.generated / len(batch.lengths),
            )
        )
    gen, train, busy, working, responses, begun = np.mean(rows, axis=0)
    if run.ahead:  # while both work each takes `scale` times as long
        seconds = np.mean([max(r[0], r[1]) + min(r[0], r[1]) * (scale - 1) for r in rows])
    else:
        seconds = gen + train
    step = seconds + trainer.sync_s
    devices = run.engines * run.engine_gpus
    if run.split or run.ahead:
        idle_engines, idle_trainer = 1 - busy / step, 1 - working / step
        devices += run.ranks
    else:
        idle_engines = idle_trainer = 1 - (busy + working) / step
    return Result(step, gen, train, idle_engines, idle_trainer, devices * step / responses, begun)
