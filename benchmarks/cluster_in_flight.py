"""Steps of `trainer.max_policy_age=k` by simulation: responses go on after new weights.

As in `verl.rollout.in_flight` and `verl.trainer.ppo.batches`: a line of prompts' groups is topped
up to k + 1 batches at each update; the trainer takes the first batch in line once it is complete.
An update interrupts the engines; what is missing is dealt out anew, older groups first, and what it
has so far is read again. While a step trains, engines on devices of their own go on, others wait.
Left out: dynamic sampling, the line's end in the last k steps, and a restart's delay.
"""

from dataclasses import dataclass

import numpy as np
from cluster import Draw, Result, Run, Trainer, train_seconds
from cluster_engine import Engine, EngineRun, deal
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rows:
    """The responses that are missing, in order, [R] each."""

    engine: Ints
    """Who works on it."""
    left: Ints
    """Tokens that it still needs."""
    held: Ints
    """Tokens before those: the prompt's, and what was drawn before."""
    reads: Ints
    """Those of `held` that are read for it: none if an earlier row has the same prompt to read."""

    @classmethod
    def of(cls, lengths: Ints, drawn: Ints, prompt: int, engine: Engine, engines: int) -> "Rows":
        """Of groups in line, [G, n]."""
        groups, columns = np.nonzero(drawn < lengths)
        done = drawn[groups, columns]
        reads = prompt + done
        fresh = np.flatnonzero(done == 0)
        reads[fresh[np.diff(groups[fresh], prepend=-1) == 0]] = 0
        dealt = deal(groups, engines, engine.max_num_seqs)
        return cls(dealt, lengths[groups, columns] - done, prompt + done, reads)


class Queued:
    """Engines with more rows than they have places, or with `hf`'s batches: event by event."""

    def __init__(self, engine: Engine, rows: Rows, limit: int) -> None:
        self.rows = rows
        self.mine = [np.flatnonzero(rows.engine == e) for e in np.unique(rows.engine)]
        self.runs = [
            EngineRun(engine, rows.left[m], rows.held[m], rows.reads[m], limit) for m in self.mine
        ]

    def ready(self, count: int) -> float:
        """When the first `count` rows are finished."""
        found = 0.0
        for mine, run in zip(self.mine, self.runs, strict=True):
            if needed := int(np.searchsorted(mine, count)):
                while np.isinf(run.finish[:needed]).any():
                    run.advance()
                found = max(found, float(run.finish[:needed].max()))
        return found

    def until(self, end: float) -> tuple[Ints, NDArray[np.float64]]:
        """(tokens drawn of each row, seconds that each engine with rows works) until then."""
        drawn = np.zeros_like(self.rows.left)
        for mine, run in zip(self.mine, self.runs, strict=True):
            while run.clock < end and run.advance():
                pass
            steps = np.maximum(run.steps_at(end) - run.begin, 0)
            drawn[mine] = np.minimum(steps, self.rows.left[mine])
        return drawn, np.array([min(run.clock, end) for run in self.runs])


class AtOnce:
    """The same where all rows have places from the start, all engines in one go: a table with a row
    for each engine, and its responses by length, the shortest first."""

    def __init__(self, engine: Engine, rows: Rows) -> None:
        self.rows = rows
        order = np.lexsort((rows.left, rows.engine))
        names, at, counts = np.unique(rows.engine[order], return_inverse=True, return_counts=True)
        width = int(counts.max(initial=0))
        column = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)
        column += width - counts[at]  # shorter rows of the table begin with zeros
        ends, held = np.zeros((2, len(names), width), np.int64)
        ends[at, column], held[at, column] = rows.left[order], rows.held[order]
        self.ends = np.pad(ends, ((0, 0), (1, 0)))
        steps, active = np.diff(self.ends, axis=1), width - np.arange(width)
        cache = np.flip(np.flip(held, 1).cumsum(1), 1) + active * self.ends[:, :-1]
        tokens = steps * cache + active * steps * (steps - 1) / 2
        seconds = steps * (engine.step_s + engine.sequence_s * active) + engine.token_s * tokens
        reads = np.bincount(at, rows.reads[order], len(names))
        begin = engine.call_s + engine.prefill_s * reads
        self.times = np.column_stack([begin, begin[:, None] + seconds.cumsum(1)])
        self.finish, self.table_row = np.empty(len(order)), np.empty(len(order), np.int64)
        self.finish[order], self.table_row[order] = self.times[at, column + 1], at

    def ready(self, count: int) -> float:
        """See `Queued`."""
        return float(self.finish[:count].max(initial=0.0))

    def until(self, end: float) -> tuple[Ints, NDArray[np.float64]]:
        """See `Queued`."""
        last = self.times.shape[1] - 1
        after = (self.times <= end).sum(1)
        each = np.arange(len(after))
        before, after = np.maximum(after - 1, 0), np.minimum(after, last)
        t0, t1 = self.times[each, before], self.times[each, after]
        part = np.clip((end - t0) / np.maximum(t1 - t0, 1e-300), 0, 1)
        s0, s1 = self.ends[each, before], self.ends[each, after]
        steps = (s0 + part * (s1 - s0) + 1e-6).astype(np.int64)
        drawn = np.minimum(steps[self.table_row], self.rows.left)
        return drawn, np.minimum(self.times[:, last], end)


def work(engine: Engine, rows: Rows, limit: int) -> Queued | AtOnce:
    """The engines on these rows, at most `limit` at a time on each."""
    if engine.continuous and np.bincount(rows.engine).max(initial=0) <= limit:
        return AtOnce(engine, rows)
    return Queued(engine, rows, limit)


class Line:
    """Groups in the order of their prompts, [G, n] each."""

    def __init__(self, draw: Draw, size: int) -> None:
        self.draw, self.size = draw, size  # groups of a batch
        self.lengths = draw(size)[0]
        self.drawn = np.zeros_like(self.lengths)
        self.first = np.full_like(self.lengths, -1)  # step whose policy drew the first token
        self.last = self.first.copy()
        self.steps = self.drawn.copy()  # Σ of the tokens' steps

    def top_up(self, batches: int) -> None:
        """To so many batches."""
        while len(self.lengths) < batches * self.size:
            lengths = self.draw(self.size)[0]
            self.lengths = np.concatenate([self.lengths, lengths])
            for name, value in (("drawn", 0), ("first", -1), ("last", -1), ("steps", 0)):
                new = np.full_like(lengths, value)
                setattr(self, name, np.concatenate([getattr(self, name), new]))

    def add(self, tokens: Ints, step: int) -> None:
        """Tokens that the policy of this step drew of what was missing."""
        missing = self.drawn < self.lengths
        new = np.zeros_like(self.drawn)
        new[missing] = tokens
        self.first[(new > 0) & (self.first < 0)] = step
        self.last[new > 0] = step
        self.steps += new * step
        self.drawn += new

    def take(self) -> None:
        """The first batch leaves."""
        for name in ("lengths", "drawn", "first", "last", "steps"):
            setattr(self, name, getattr(self, name)[self.size :])


def one_step(
    run: Run, engine: Engine, trainer: Trainer, line: Line, step: int, limit: int, scale: float
) -> tuple[float, ...]:
    """(time, that of it in which the trainer waits, training, engines' work, ranks' work, mean and
    largest age of a token, share of responses of several policies) of a step."""
    line.top_up(run.age + 1)
    size, n = line.size, line.lengths.shape[1]
    engines = work(
        engine, Rows.of(line.lengths, line.drawn, run.prompt, engine, run.engines), limit
    )
    needed = int((line.drawn[:size] < line.lengths[:size]).sum())
    wait, lengths = engines.ready(needed), line.lengths[:size]
    # Older responses keep the log-probabilities they were drawn with.
    fresh = (line.drawn[:size] == 0) | (line.first[:size] == step)
    several = size > run.mini_batch or not fresh.all()
    known = lengths[fresh] if several else None
    train, working = train_seconds(trainer, run.ranks, lengths, run.prompt, run.mini_batch, known)
    train += trainer.other_s + trainer.response_s * size * n
    drawn, busy = engines.until(wait + train if run.split else wait)
    drawn[:needed] = engines.rows.left[:needed]
    line.add(drawn, step)
    together = max(0.0, float(busy.max(initial=0.0)) - wait)
    seconds = wait + train + (scale - 1) * together + trainer.sync_s
    first, last = line.first[:size], line.last[:size]
    mean_age = step - line.steps[:size].sum() / lengths.sum()
    ages = mean_age, step - first.min(), (first != last).mean()
    line.take()
    return seconds, wait, train, busy.sum(), working, *ages


def simulate_in_flight(
    run: Run,
    engine: Engine,
    trainer: Trainer,
    draw: Draw,
    steps: int = 8,
    scale: float = 1.0,
    warm_up: int | None = None,
) -> Result:
    """Means over some steps of a run with `run.age`, after `warm_up` others (2 k + 2). `gen_s` is
    how long the trainer waits. `scale`: see `simulate`."""
    assert run.age and not run.round_size
    line = Line(draw, run.prompts)
    line.top_up(run.age + 1)
    mean = run.prompt + float(line.lengths.mean())
    limit = max(1, int(min(engine.max_num_seqs, engine.cache_tokens / mean)))
    before = 2 * run.age + 2 if warm_up is None else warm_up
    numbers = range(before + steps)
    rows = [one_step(run, engine, trainer, line, i, limit, scale) for i in numbers][before:]
    step, wait, train, busy, working, mean_age, _, mixed = np.mean(rows, axis=0).tolist()
    oldest, n = max(row[6] for row in rows), line.lengths.shape[1]
    devices = run.engines * run.engine_gpus + run.ranks * run.split
    busy /= run.engines
    idle = 1 - (busy + working) / step
    idles = (1 - busy / step, 1 - working / step) if run.split else (idle, idle)
    cost = devices * step / (run.prompts * n)
    return Result(step, wait, train, *idles, cost, 1.0, mean_age, float(oldest), mixed)
