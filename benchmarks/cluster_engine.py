"""One simulated engine: its speed, and the responses that it works on."""

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KEEP_SHARE, FILL_SHARE = 0.95, 0.15
"""Those of `verl.rollout.hf`."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A decoding step with R sequences that hold K tokens takes step_s + R·sequence_s + K·token_s.

    Example: ``Engine(step_s=0.01)`` draws 100 tokens a second for each sequence.
    """

    step_s: float
    sequence_s: float = 0.0
    token_s: float = 0.0
    prefill_s: float = 0.0
    """Of a prompt's token; a prompt is read once for all its responses."""
    call_s: float = 0.0
    """Of a round of generation, whatever it draws."""
    max_num_seqs: int = 1024
    continuous: bool = True
    """Whether it gives back a response, and fills its place, at once (vLLM), or when 5 % of the
    batch have ended and 15 % of the places are free (`hf`)."""
    cache_tokens: float = np.inf
    """Tokens that the KV cache holds. Sequences beyond it wait in the engine (vLLM would begin them
    and take some back)."""


def batch_seconds(engine: Engine, lengths: NDArray[np.int64], prompt: int) -> NDArray[np.float64]:
    """The engine `hf`: when each response of one batch comes, [R]. Those that are finished stay in
    the batch until they are more than 5 % of it."""
    order = np.sort(lengths)
    done, step, clock = 0, 0, 0.0
    result = np.empty(len(lengths))
    while done < len(order):
        rows = len(order) - done
        target = int(order[done + rows - int(KEEP_SHARE * rows) - 1])
        clock += decode(engine, rows, rows * (prompt + step), target - step)
        last, step = done, target
        done = int(np.searchsorted(order, target, side="right"))
        result[last:done] = clock
    return result[np.argsort(np.argsort(lengths, kind="stable"), kind="stable")]


def decode(engine: Engine, rows: int, held: int, steps: int) -> float:
    """`steps` steps with `rows` sequences, which hold `held` tokens at the first of them."""
    tokens = steps * held + rows * steps * (steps - 1) / 2
    return steps * (engine.step_s + engine.sequence_s * rows) + engine.token_s * tokens


def deal(groups: NDArray[np.int64], engines: int, max_num_seqs: int) -> NDArray[np.int64]:
    """The engine of each row, [R], as `EnginePool.generate_rows` deals them out: blocks of rows
    that begin at once, with whole groups. `groups`: each row's, in order."""
    room = max(1, min(max_num_seqs, -(-len(groups) // engines)))
    first = np.flatnonzero(np.diff(groups, prepend=-1))
    sizes = np.diff(first, append=len(groups))
    return np.repeat(first // room % engines, sizes)


class EngineRun:
    """An engine that draws `left` tokens for each of its rows, [R], from its start on; rows that
    don't fit wait. Before a row it reads `reads` tokens, of the `held` that come before the first
    new one: prompt and what was drawn before; none for a prompt that another row has read."""

    def __init__(
        self,
        engine: Engine,
        left: NDArray[np.int64],
        held: NDArray[np.int64],
        reads: NDArray[np.int64],
        limit: int,
    ) -> None:
        """`limit`: rows at a time."""
        self.engine, self.limit = engine, limit
        self.left, self.held, self.reads = left.tolist(), held.tolist(), reads.tolist()
        self.finish = np.full(len(left), np.inf)
        self.begin = np.full(len(left), np.inf)  # the engine's step before a row's first
        self.running: list[tuple[int, int]] = []  # (last step, row), a heap
        self.begun = self.tokens = 0  # rows that have begun; tokens in the cache
        self.times, self.steps = [engine.call_s], [0]  # what the engine has done, and until when
        self._fill()

    @property
    def clock(self) -> float:
        """Until when it has been simulated."""
        return self.times[-1]

    def advance(self) -> bool:
        """Until the next responses are given back, and others begin; whether there were any."""
        rows = len(self.running)
        if not rows:
            return False
        wait = 1 if self.engine.continuous else rows - int(KEEP_SHARE * rows)
        ended = [heapq.heappop(self.running) for _ in range(wait)]
        step, target = self.steps[-1], ended[-1][0]
        while self.running and self.running[0][0] == target:
            ended.append(heapq.heappop(self.running))
        clock = self.clock + decode(self.engine, rows, self.tokens, target - step)
        self.tokens += rows * (target - step)
        for last, i in ended:
            self.finish[i] = clock
            self.tokens -= self.held[i] + self.left[i] + target - last
        self._note(clock, target)
        self._fill()
        return True

    def steps_at(self, seconds: float) -> int:
        """Decoding steps that it has made by then."""
        return int(np.interp(seconds, self.times, self.steps) + 1e-6)

    def _fill(self) -> None:
        """Begins rows that wait, if there is room for them (`hf`: for 15 % of the places)."""
        places = self.limit - len(self.running)
        least = 1 if self.engine.continuous else FILL_SHARE * self.limit
        new = range(self.begun, min(self.begun + places, len(self.left)))
        if not new or places < least:
            return
        self.begun = new.stop
        step, reads = self.steps[-1], [self.reads[i] for i in new if self.reads[i]]
        padded = sum(reads) if self.engine.continuous else len(reads) * max(reads, default=0)
        if padded:
            self._note(self.clock + self.engine.prefill_s * padded, step)
        for i in new:
            heapq.heappush(self.running, (step + self.left[i], i))
            self.begin[i] = step
            self.tokens += self.held[i]

    def _note(self, clock: float, step: int) -> None:
        self.times.append(clock)
        self.steps.append(step)
