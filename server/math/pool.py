"""A process pool for asyncio whose jobs can be killed.

    pool = Pool("server.math.equivalence:judge", workers=2, time_limit=2.0)
    await pool.start()
    outcome = await pool.submit(r"\\frac{1}{2}", "0.5")   # Outcome("ok", {"equal": True, …})
    await pool.close()

* A job's time counts from the moment a worker has it: its outcome doesn't depend on the queue.
* Requests take turns: the next job is one of the `Turn` that has used the least worker time. A new
  turn begins where it would be had it always had its share (the virtual time of fair queueing): it
  neither waits for the batch before it nor starves it. Jobs that no turn waits for are cancelled.
* A job that ran for `patience` seconds is *slow*; slow jobs never hold all workers, and those of
  one turn no more than half. Where they would while others wait, the worker is killed, and the job
  starts anew among the slow ones, with the full limit.
* A worker that dies is replaced, and its job tried again once: it may have been chance (the
  system's out-of-memory killer) or the job (a crash in C). A template takes its workers along when
  it dies, which counts against none of their jobs.

All methods belong to the event loop's thread. See `worker.py` for the processes.
"""

import asyncio
import collections
import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .worker import COMMAND, FORK

ROOT = Path(__file__).parents[2]
START_LIMIT_S = 60.0  # for the template, which imports and warms up everything
RESPAWN_DELAY_S = 0.5  # after a process that didn't even come up: don't make it worse


class PoolFull(Exception):
    """The queue has no room; try again later."""


class PoolClosed(Exception):
    """The pool shuts down and takes or keeps no jobs."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job: `Outcome("ok", {"equal": True})`, `Outcome("timeout")`."""

    kind: str  # ok, timeout, memory (over the limit), died (two workers did), error (raised)
    value: Any = None  # what the function returned, as JSON; for `error` the exception's text


@dataclass(slots=True, eq=False)
class Turn:
    """What a request has used, in seconds of worker time, and the jobs it waits for."""

    used: float
    jobs: list["Job"] = field(default_factory=list)


class Job(asyncio.Future[Outcome]):
    """A job is the future of its outcome; it raises nothing but `PoolClosed`."""

    def __init__(self, arguments: tuple[Any, ...], turn: Turn) -> None:
        super().__init__()
        self.arguments, self.turn = arguments, turn
        self.slow, self.deaths, self.wanted = False, 0, 0


@dataclass(slots=True, eq=False)
class _Worker:
    connection: Connection
    template: subprocess.Popen[bytes]
    pid: int | None = None  # not known, not ready
    job: Job | None = None  # from its start on, for one that was spawned for a second try
    started: float = 0.0
    served: int = 0
    timer: asyncio.TimerHandle | None = None


class Pool:
    """Runs the function `target` ("module:function") in worker processes; see the module's text.

    `target` is imported from the repository's root, where the module's `preload()` is called. It
    takes and returns what JSON can carry; a dataclass becomes an object.
    """

    def __init__(
        self, target: str, *,
        workers: int = 2,
        time_limit: float = 2.0,  # seconds of wall-clock time for a job once it has started
        memory_limit: int = 2 << 30,  # bytes of address space for each worker
        queue_limit: int = 4096,  # jobs that may wait
        recycle_after: int = 2000,  # jobs after which a worker is replaced, against slow leaks
        patience: float = 0.1,  # seconds after which a job counts as slow
    ) -> None:  # fmt: skip
        self.target, self.size = target, workers
        self.time_limit, self.memory_limit = time_limit, memory_limit
        self.queue_limit, self.recycle_after, self.patience = queue_limit, recycle_after, patience
        self.restarts: collections.Counter[str] = collections.Counter()  # by reason
        self._slow_slots, self._turn_slots = max(1, workers - 1), max(1, workers // 2)
        # Fresh jobs and slow ones, each turn's in their order.
        self._waiting: tuple[dict[Turn, dict[Job, None]], ...] = {}, {}
        self._turns, self._clock = 0, 0.0  # number of turns, and where a new one begins
        self._workers: set[_Worker] = set()
        self._idle: list[_Worker] = []
        self._accepting = self._closing = False

    @property
    def waiting(self) -> int:
        """Jobs that no worker has yet."""
        return sum(len(jobs) for queue in self._waiting for jobs in queue.values())

    @property
    def room(self) -> int:
        """Jobs that `submit` would take now."""
        return len(self._idle) + self.queue_limit - self.waiting

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that are up."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    async def start(self) -> None:
        """Returns when all processes are ready, else raises `RuntimeError`: the template can't
        import its target, or takes over a minute for it."""
        self._loop = asyncio.get_running_loop()
        self._ready = self._loop.create_future()
        self._start_template()
        for _ in range(self.size):
            self._spawn()
        try:
            await asyncio.wait_for(self._ready, START_LIMIT_S)
        except (RuntimeError, TimeoutError) as error:
            await self.close()
            raise RuntimeError(f"the workers for {self.target} don't start: {error!r}") from error
        self._accepting = True

    @contextlib.contextmanager
    def turn(self) -> Iterator[Turn]:
        """A turn for a request's jobs. Its end cancels those that aren't done or others' too."""
        turn = Turn(self._clock)
        self._turns += 1
        try:
            yield turn
        finally:
            self._turns -= 1
            while turn.jobs:
                job = turn.jobs.pop()
                job.wanted -= 1
                if not job.wanted:
                    job.cancel()

    def submit(self, *arguments: Any, turn: Turn | None = None) -> Job:
        """Queue a job, without `turn` as a request of its own. Raises `PoolFull` where as many
        wait as may, `PoolClosed` where `drain` or `close` was called, or `start` wasn't."""
        if not self._accepting:
            raise PoolClosed
        if self.room <= 0:
            raise PoolFull
        job = Job(arguments, turn or Turn(self._clock))
        job.add_done_callback(self._on_done)
        self._enqueue(job)
        self.join(job, job.turn)
        self._dispatch()
        return job

    def join(self, job: Job, turn: Turn) -> None:
        """Let `turn` wait for `job` too, which then runs as early as either of its turns allows."""
        job.wanted += 1
        turn.jobs.append(job)
        if turn.used < job.turn.used and self._dequeue(job):
            job.turn = turn
            self._enqueue(job)

    def drain(self) -> None:
        """Take no more jobs and give up those that wait; those that run go on."""
        self._accepting = False
        for job in [job for queue in self._waiting for jobs in queue.values() for job in jobs]:
            self._dequeue(job)
            _settle(job, PoolClosed())

    async def close(self) -> None:
        """End all processes. Returns when they are gone."""
        self._closing = True
        self.drain()
        for worker in list(self._workers):
            if worker.job:
                _settle(worker.job, PoolClosed())
            self._retire(worker)
        self._close_control()  # on which the template kills and reaps its workers, and exits
        try:
            await asyncio.to_thread(self._template.wait, 10)
        except subprocess.TimeoutExpired:
            self._template.kill()  # on which the system kills the workers
            await asyncio.to_thread(self._template.wait)

    def _enqueue(self, job: Job) -> None:
        self._waiting[job.slow].setdefault(job.turn, {})[job] = None

    def _dequeue(self, job: Job) -> bool:
        """Whether the job was waiting."""
        queue = self._waiting[job.slow]
        waited = queue.get(job.turn, {}).pop(job, self) is None
        if waited and not queue[job.turn]:
            del queue[job.turn]
        return waited

    def _next_job(self) -> Job | None:
        """Slow jobs get at least one worker and at most all but one."""
        fresh, slow = self._waiting
        held = self._held() if slow else {}
        turns = [turn for turn in slow if held[turn] < self._turn_slots]
        if not turns or (held and (fresh or held.total() >= self._slow_slots)):
            turns, slow = list(fresh), fresh
        return next(iter(slow[min(turns, key=lambda turn: turn.used)])) if turns else None

    def _held(self) -> collections.Counter[Turn]:
        """Workers that slow jobs hold, by turn."""
        jobs = [worker.job for worker in self._workers if worker.job]
        return collections.Counter(job.turn for job in jobs if job.slow)

    def _dispatch(self) -> None:
        while self._idle and (job := self._next_job()):
            worker = self._idle.pop()
            if worker.connection.poll():  # an idle worker has nothing to say: it was killed
                self._on_death(worker)
            else:
                self._dequeue(job)
                self._begin(worker, job)

    def _begin(self, worker: _Worker, job: Job) -> None:
        worker.job, worker.started = job, self._loop.time()
        with contextlib.suppress(OSError):  # killed just now: the reader notices
            worker.connection.send_bytes(json.dumps(job.arguments).encode())
        wait = self.time_limit if job.slow else min(self.patience, self.time_limit)
        worker.timer = self._loop.call_later(wait, self._on_timer, worker)

    def _on_timer(self, worker: _Worker) -> None:
        if worker.connection.poll():  # the answer came in while the event loop was busy
            return self._on_message(worker)
        job, left = worker.job, worker.started + self.time_limit - self._loop.time()
        if job.done():
            return self._replace(worker, "abandoned")
        if left <= 0.001:
            _settle(job, Outcome("timeout"))
            return self._replace(worker, "timeout")
        held = self._held()
        if held.total() < self._slow_slots and held[job.turn] < self._turn_slots:
            job.slow = True
        elif not job.slow and self._waiting[False]:
            job.slow = True
            self._enqueue(job)
            return self._replace(worker, "postponed")
        wait = left if job.slow else min(self.patience, left)
        worker.timer = self._loop.call_later(wait, self._on_timer, worker)

    def _on_message(self, worker: _Worker) -> None:
        try:
            message = json.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            return self._on_death(worker)
        if worker.pid is None:
            worker.pid = message
            if worker.job:
                return self._begin(worker, worker.job)
            self._idle.append(worker)
            if len(self._idle) == self.size and not self._ready.done():
                self._ready.set_result(None)
            return self._dispatch()
        worker.served += 1
        _settle(worker.job, Outcome(*message))
        self._release(worker)
        if message[0] == "memory":
            self._replace(worker, "memory")
        elif worker.served >= self.recycle_after:
            self._replace(worker, "recycled")
        else:
            self._idle.append(worker)
            self._dispatch()

    def _on_death(self, worker: _Worker) -> None:
        job = worker.job
        if worker.pid is None:  # it didn't even come up
            if job:
                self._enqueue(job)
            self._retire(worker)
            self._loop.call_later(RESPAWN_DELAY_S, self._spawn)
            return
        if job and worker.template.poll() is None:  # a template has ended before those it kills
            job.deaths += 1
            if job.deaths > 1:
                _settle(job, Outcome("died"))
        self._replace(worker, "died", job if job and not job.done() else None)

    def _release(self, worker: _Worker) -> None:
        if worker.job and worker.timer:  # it has begun
            worker.timer.cancel()
            used = self._loop.time() - worker.started
            worker.job.turn.used += used
            self._clock += used / max(1, self._turns)
        worker.job = None

    def _on_done(self, job: Job) -> None:
        """Forget a job. One that a worker still has was cancelled."""
        self._dequeue(job)
        if job.cancelled() and job.slow:
            for worker in [worker for worker in self._workers if worker.job is job]:
                self._replace(worker, "abandoned")

    def _start_template(self) -> None:
        self._control, theirs = socket.socketpair()
        arguments = theirs.fileno(), self.target, self.memory_limit
        with theirs:
            self._template = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.worker", *map(str, arguments)], cwd=ROOT,
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip
        # The template never writes: readable means that it is gone.
        self._loop.add_reader(self._control.fileno(), self._on_template_death)

    def _close_control(self) -> None:
        if self._control.fileno() >= 0:
            self._loop.remove_reader(self._control.fileno())
            self._control.close()

    def _on_template_death(self) -> None:
        self._close_control()
        status = self._template.wait()
        if not self._ready.done():
            self._ready.set_exception(RuntimeError(f"exit status {status}"))
        elif not self._closing:
            self._start_template()

    def _spawn(self, job: Job | None = None) -> None:
        if self._closing:
            return
        ours, theirs = socket.socketpair()
        with theirs, contextlib.suppress(OSError):  # a lost template: the new worker's socket ends
            socket.send_fds(self._control, [COMMAND.pack(FORK)], [theirs.fileno()])
        worker = _Worker(Connection(ours.detach()), self._template, job=job)
        self._workers.add(worker)
        self._loop.add_reader(worker.connection.fileno(), self._on_message, worker)

    def _retire(self, worker: _Worker) -> None:
        self._workers.discard(worker)
        if worker in self._idle:
            self._idle.remove(worker)
        self._release(worker)
        self._loop.remove_reader(worker.connection.fileno())
        worker.connection.close()
        if worker.pid is not None:
            with contextlib.suppress(OSError):  # a lost template has taken its workers along
                self._control.send(COMMAND.pack(worker.pid))

    def _replace(self, worker: _Worker, reason: str, job: Job | None = None) -> None:
        self.restarts[reason] += 1
        self._retire(worker)
        self._spawn(job)
        self._dispatch()


def _settle(job: Job, outcome: Outcome | PoolClosed) -> None:
    if not job.done():  # else its caller has given up
        (job.set_result if isinstance(outcome, Outcome) else job.set_exception)(outcome)
