"""The shortest way to a verdict: quick stages, cache, a job that already runs, a new job."""

import asyncio
import functools
import hashlib
import logging
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Sequence

from . import equivalence
from .equivalence import Verdict
from .pool import Job, Outcome, Pool, PoolFull, Turn

log = logging.getLogger("uvicorn.error")
LIMITS = {
    "timeout": Verdict(False, "limit", "timeout"), "memory": Verdict(False, "limit", "memory"),
    "died": Verdict(False, "crash", "memory"), "error": Verdict(False, "error", "error"),
}  # fmt: skip
LIMITS_REMEMBERED_S = 300.0  # so long a pair that ran into its limits gets no other chance
QUICK_CHARS = 300  # longer strings leave the event loop at once
HUNG_UP_S = 0.2  # so often a request that waits looks whether its caller still does
PAIRS_PER_TURN = 32  # of a batch pass the quick stages before other requests get their turn


class Judge:
    """Verdicts by the cheapest way there is: `pool` runs `equivalence.judge`, a string of over
    `max_chars` characters is no answer, of `cache_size` verdicts the least recently used go."""

    def __init__(self, pool: Pool, max_chars: int, cache_size: int) -> None:
        self.pool, self.max_chars, self.cache_size = pool, max_chars, cache_size
        self.cache: OrderedDict[bytes, tuple[Verdict, float]] = OrderedDict()  # and its last moment
        self.running: dict[bytes, Job] = {}
        # Pairs by who knew the answer: quick, cache, running (another request's job), pool.
        self.sources: Counter[str] = Counter()
        self.decided: Counter[tuple[str, str]] = Counter()  # pairs by (how, status)

    async def verdicts(
        self, pairs: Sequence[tuple[str, str]], hung_up: Callable[[], Awaitable[bool]]
    ) -> list[Verdict]:
        """One verdict for each (gold, pred), in order. Raises `ConnectionAbortedError` where the
        caller has `hung_up` (jobs that only it waits for end), `PoolFull` where not all of them fit
        into the queue (none was queued), `PoolClosed` where the server shuts down."""
        known: list[Verdict | bytes] = []  # the verdict, or the key of the job that will know
        jobs: dict[bytes, tuple[str, str]] = {}
        for i, (gold, pred) in enumerate(pairs):
            if i and i % PAIRS_PER_TURN == 0:
                await asyncio.sleep(0)
            item = self._look_up(gold, pred)
            if isinstance(item, bytes):
                jobs.setdefault(item, (gold, pred))
            known.append(item)
        with self.pool.turn() as turn:
            futures = self._submit(jobs, turn)
            pending = set(futures.values())
            while pending:
                _, pending = await asyncio.wait(pending, timeout=HUNG_UP_S)
                if pending and await hung_up():
                    raise ConnectionAbortedError
        done = {key: _verdict(future.result()) for key, future in futures.items()}
        verdicts = [item if isinstance(item, Verdict) else done[item] for item in known]
        self.decided.update((verdict.how, verdict.status) for verdict in verdicts)
        return verdicts

    def _look_up(self, gold: str, pred: str) -> Verdict | bytes:
        """The verdict, if it is known or quickly found, else the pair's key."""
        length = max(len(gold), len(pred))
        if length > self.max_chars:
            same = gold == pred
            return Verdict(True, "identical") if same else Verdict(False, "length", "unparsable")
        item = _quick(gold, pred) if length <= QUICK_CHARS else _digest(gold, pred)
        if isinstance(item, Verdict):
            self.sources["quick"] += 1
            return item
        verdict, until = self.cache.get(item, (item, 0.0))
        if until < time.monotonic():
            return item
        self.cache.move_to_end(item)
        self.sources["cache"] += 1
        return verdict

    def _submit(self, jobs: dict[bytes, tuple[str, str]], turn: Turn) -> dict[bytes, Job]:
        """The future of each job: all of them or, where the queue is too full, `PoolFull`."""
        new = [key for key in jobs if key not in self.running or self.running[key].cancelled()]
        if len(new) > self.pool.room:
            raise PoolFull
        for key in jobs.keys() - new:
            self.pool.join(self.running[key], turn)
        for key in new:
            self.running[key] = job = self.pool.submit(*jobs[key], turn=turn)
            job.add_done_callback(functools.partial(self._remember, key))
        self.sources["pool"] += len(new)
        self.sources["running"] += len(jobs) - len(new)
        return {key: self.running[key] for key in jobs}

    def _remember(self, key: bytes, future: Job) -> None:
        """Keep what will not change; a job over its limits for a while."""
        self.running.pop(key, None)
        if future.cancelled() or future.exception():
            return
        outcome = future.result()
        if outcome.kind == "error":
            log.error("equivalence.judge raised %r", outcome.value)
        if outcome.kind in ("ok", "timeout", "memory"):
            until = time.monotonic() + (math.inf if outcome.kind == "ok" else LIMITS_REMEMBERED_S)
            self.cache[key] = _verdict(outcome), until
            while len(self.cache) > self.cache_size:
                self.cache.popitem(last=False)


@functools.lru_cache(maxsize=20_000)
def _quick(gold: str, pred: str) -> Verdict | bytes:
    """The verdict of the quick stages, or the pair's key; remembered, as pairs come again."""
    try:
        verdict = equivalence.quick(gold, pred)
        return verdict or _digest(*equivalence.cache_key(gold, pred))
    except Exception:  # hostile input found a bug: the pair's job will meet it, and nobody else
        log.exception("the quick stages failed")
        return _digest(gold, pred)


def _verdict(outcome: Outcome) -> Verdict:
    return Verdict(**outcome.value) if outcome.kind == "ok" else LIMITS[outcome.kind]


def _digest(gold: str, pred: str) -> bytes:
    """Same size for every pair, so that the cache's memory is bounded by its number of entries."""
    text = f"{len(gold)} {gold}{pred}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
