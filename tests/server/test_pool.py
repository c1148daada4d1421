"""The process pool: limits, deaths, queues. Real processes, real signals."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from server.math.pool import Outcome, Pool, PoolClosed, PoolFull


@asynccontextmanager
async def running(**settings: float) -> AsyncIterator[Pool]:
    """A started pool for `jobs.run`, closed at the end."""
    pool = Pool("tests.server.jobs:run", **{"time_limit": 0.5, "memory_limit": 1 << 30, **settings})
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


@pytest.fixture
def pooled() -> Callable[..., None]:
    """Runs a test's coroutine `body(pool)` with a pool of the given settings."""

    def run(body: Callable[[Pool], Awaitable[None]], **settings: float) -> None:
        async def main() -> None:
            async with asyncio.timeout(60), running(**settings) as pool:
                await body(pool)

        asyncio.run(main())

    return run


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait up to 10 s for `condition`."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_results_and_errors(pooled):
    async def body(pool):
        values = ["1/2", "ä∆\0", {"nested": [1, None]}, "x" * 100_000]
        for value in values:
            assert await pool.submit("echo", value) == Outcome("ok", value)
        pid = (await pool.submit("pid")).value
        assert pid != os.getpid()
        assert await pool.submit("raise", "x") == Outcome(
            "error", "ValueError: invalid literal for int() with base 10: 'x'"
        )
        assert (await pool.submit("not JSON")).kind == "error"
        assert (await pool.submit("deep")).value.startswith("RecursionError")
        assert (await pool.submit("pid")).value == pid  # none of that cost the worker
        assert not pool.restarts

    pooled(body, workers=1)


def test_many_jobs_keep_their_answers_apart(pooled):
    async def body(pool):
        outcomes = await asyncio.gather(*(pool.submit("echo", i) for i in range(2000)))
        assert [outcome.value for outcome in outcomes] == list(range(2000))

    pooled(body, workers=3)


@pytest.mark.parametrize("job", [("sleep", 60), ("power", 9)])
def test_a_stuck_worker_is_killed_and_replaced(pooled, job):
    async def body(pool):
        (stuck,) = pool.pids
        start = time.monotonic()
        assert await pool.submit(*job) == Outcome("timeout")
        assert 0.5 <= time.monotonic() - start < 5
        assert (await pool.submit("pid")).value != stuck
        assert time.monotonic() - start < 10  # the next one is answered soon
        await eventually(lambda: not is_alive(stuck))
        assert pool.restarts == {"timeout": 1}

    pooled(body, workers=1)


def test_time_in_the_queue_does_not_count(pooled):
    async def body(pool):
        jobs = [pool.submit("sleep", 0.4) for _ in range(8)]  # the last starts after 2.8 s
        assert {outcome.kind for outcome in await asyncio.gather(*jobs)} == {"ok"}
        assert not pool.restarts

    pooled(body, workers=1, time_limit=2.5, patience=5)


def test_a_busy_event_loop_does_not_make_a_timeout(pooled):
    async def body(pool):
        job = pool.submit("sleep", 0.05)
        time.sleep(2)
        assert (await job).kind == "ok"

    pooled(body, workers=1, time_limit=1)


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux only")
def test_memory_limit(pooled):
    async def body(pool):
        assert await pool.submit("hoard", 4) == Outcome("memory")
        assert await pool.submit("echo", 1) == Outcome("ok", 1)
        assert pool.restarts == {"memory": 1}

    pooled(body, workers=1)


def test_a_job_of_a_killed_worker_is_tried_again(pooled, tmp_path):
    async def body(pool):
        assert await pool.submit("die once", str(tmp_path / "marker")) == Outcome("ok", "alive")
        assert pool.restarts == {"died": 1}
        assert await pool.submit("crash") == Outcome("died")  # twice is enough
        assert await pool.submit("echo", 1) == Outcome("ok", 1)

    pooled(body, workers=2)


def test_all_workers_killed_from_outside(pooled):
    async def body(pool):
        jobs = [pool.submit("sleep", 0.1) for _ in range(6)]
        await asyncio.sleep(0.02)
        killed = set(pool.pids)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        outcomes = await asyncio.gather(*jobs)
        assert {outcome.kind for outcome in outcomes} == {"ok"}
        assert not killed & {outcome.value for outcome in outcomes}
        idle = set(pool.pids)
        for pid in idle:
            os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.05)
        assert (await pool.submit("echo", 1)).kind == "ok"
        await eventually(lambda: len(pool.pids) == 3 and not idle & set(pool.pids))

    pooled(body, workers=3, time_limit=5)


def test_the_template_killed_from_outside(pooled):
    async def body(pool):
        workers = pool.pids
        job = pool.submit("sleep", 0.2)
        pool._template.kill()
        assert (await job).kind == "ok"
        await eventually(lambda: len(pool.pids) == 2)
        assert not set(workers) & set(pool.pids)
        assert not any(map(is_alive, workers))

    pooled(body, workers=2, time_limit=5)


def test_a_second_try_gets_a_new_worker(pooled):
    """What killed the first worker may be killing the second, which doesn't show it yet."""

    async def body(pool):
        job = pool.submit("sleep", 0.1)
        (busy,) = (worker.pid for worker in pool._workers if worker.job)
        (doomed,) = (worker.pid for worker in pool._workers if not worker.job)
        os.kill(doomed, signal.SIGSTOP)
        os.kill(busy, signal.SIGKILL)
        outcome = await job
        os.kill(doomed, signal.SIGKILL)
        assert outcome.kind == "ok"
        assert outcome.value not in (busy, doomed)

    pooled(body, workers=2, time_limit=5)


def test_the_death_of_the_template_counts_against_no_job(pooled, tmp_path):
    async def body(pool):
        marker = tmp_path / "marker"
        job = pool.submit("die once then sleep", str(marker))
        await eventually(lambda: pool.restarts["died"] and pool._held())
        pool._template.kill()
        assert (await job).kind == "ok"

    pooled(body, workers=2, time_limit=5, patience=0.1)


def test_a_bounded_queue(pooled):
    async def body(pool):
        jobs = [pool.submit("sleep", 0.1) for _ in range(2 + 3)]
        assert (pool.waiting, pool.room) == (3, 0)
        with pytest.raises(PoolFull):
            pool.submit("echo", 1)
        await asyncio.gather(*jobs)
        assert pool.room == 2 + 3

    pooled(body, workers=2, queue_limit=3)


def test_workers_are_recycled(pooled):
    async def body(pool):
        pids = [(await pool.submit("pid")).value for _ in range(6)]
        assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4] == pids[5]
        assert pool.restarts == {"recycled": 3}

    pooled(body, workers=1, recycle_after=2)


@pytest.mark.parametrize("workers", [2, 4])
def test_quick_jobs_overtake_slow_ones(pooled, workers):
    """Each slow job takes a worker for 5 s; behind them in one queue, quick ones wait longer."""

    async def body(pool):
        with pool.turn() as turn:
            slow = [pool.submit("sleep", 60, turn=turn) for _ in range(2 * workers)]
            quick = await asyncio.gather(*(pool.submit("echo", i) for i in range(100)))
            assert not any(job.done() for job in slow)
            assert {outcome.kind for outcome in quick} == {"ok"}
            assert (await slow[0]).kind == "timeout"
            assert pool.restarts["postponed"] <= len(slow)

    pooled(body, workers=workers, time_limit=5, patience=0.1)


def test_requests_take_turns(pooled):
    """A single job waits for one of a batch before it, not for all; and the batch goes on."""

    async def body(pool):
        with pool.turn() as batch:
            jobs = [pool.submit("sleep", 0.02, turn=batch) for _ in range(100)]
            for _ in range(10):
                done = sum(job.done() for job in jobs)
                with pool.turn() as single:
                    await pool.submit("echo", 1, turn=single)
                assert sum(job.done() for job in jobs) - done <= 2
            with pool.turn() as other:  # equals share: after as many jobs, both have had as many
                done = sum(job.done() for job in jobs)
                await asyncio.wait([pool.submit("sleep", 0.02, turn=other) for _ in range(20)])
                assert 10 <= sum(job.done() for job in jobs) - done <= 40

    pooled(body, workers=1, patience=5)


def test_a_stream_of_requests_does_not_starve_a_batch(pooled):
    async def body(pool):
        async def ask():
            while not batch_done:
                with pool.turn() as turn:
                    await pool.submit("sleep", 0.01, turn=turn)

        batch_done = []
        clients = [asyncio.create_task(ask()) for _ in range(4)]
        with pool.turn() as batch:
            await asyncio.wait([pool.submit("sleep", 0.01, turn=batch) for _ in range(20)])
        batch_done.append(True)
        await asyncio.gather(*clients)

    pooled(body, workers=1, patience=5)


def test_slow_jobs_of_one_turn_hold_half_of_the_workers(pooled):
    async def body(pool):
        with pool.turn() as batch, pool.turn() as other:
            for _ in range(12):
                pool.submit("sleep", 60, turn=batch)
            await eventually(lambda: pool._held()[batch] == 2)
            for _ in range(2):
                pool.submit("sleep", 60, turn=other)
            await eventually(lambda: pool._held() == {batch: 2, other: 1})
            await asyncio.sleep(0.5)
            assert pool._held() == {batch: 2, other: 1}  # and one worker is nobody's
            assert (await pool.submit("echo", 1)).kind == "ok"

    pooled(body, workers=4, time_limit=20, patience=0.1)


def test_the_end_of_a_turn_cancels_what_only_it_waits_for(pooled):
    async def body(pool):
        with pool.turn() as stays:
            with pool.turn() as leaves:
                own = [pool.submit("sleep", 60, turn=leaves) for _ in range(20)]
                shared = pool.submit("echo", 1, turn=leaves)
                pool.join(shared, stays)
                await eventually(lambda: leaves in pool._held())
            await eventually(lambda: pool.waiting == 0)
            assert (await shared).value == 1
            assert all(job.cancelled() for job in own)
            await eventually(lambda: pool.restarts["abandoned"] and len(pool._idle) == 2)

    pooled(body, workers=2, time_limit=60, patience=0.1)


def test_a_postponed_job_gets_its_full_time(pooled):
    async def body(pool):
        jobs = [pool.submit("sleep", 1) for _ in range(4)] + [pool.submit("echo", 1)]
        assert {outcome.kind for outcome in await asyncio.gather(*jobs)} == {"ok"}
        assert pool.restarts["postponed"]

    pooled(body, workers=2, time_limit=3, patience=0.1)


def test_a_caller_that_gives_up(pooled):
    async def body(pool):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.submit("sleep", 0.2), 0.05)
        assert await pool.submit("echo", 1) == Outcome("ok", 1)
        assert not pool.restarts

    pooled(body, workers=1, patience=5)


def test_closing_leaves_no_process_and_no_caller(pooled):
    async def body(pool):
        pids = [*pool.pids, pool._template.pid]
        assert all(map(is_alive, pids))
        jobs = [pool.submit("sleep", 0.3) for _ in range(4)]
        pool.drain()
        with pytest.raises(PoolClosed):
            pool.submit("echo", 1)
        running, waiting = jobs[:2], jobs[2:]
        assert {outcome.kind for outcome in await asyncio.gather(*running)} == {"ok"}
        for job in waiting:
            with pytest.raises(PoolClosed):
                await job
        await pool.close()
        assert not any(map(is_alive, pids))

    pooled(body, workers=2, time_limit=5)


def test_a_target_that_can_not_be_imported():
    async def main():
        await Pool("no_such_module:run").start()

    with pytest.raises(RuntimeError, match="workers for no_such_module:run don't start"):
        asyncio.run(main())
