"""Generation on several engines that may die. Each gets its share of the prompts, the same in every
run, in one call of its `generate_rows` over Ray. When it dies, the pool waits until Ray has started
it again, gives it weights, and has it generate what is missing, with the same seeds."""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import groupby
from threading import Event
from typing import Any

import ray
from ray.exceptions import RayActorError

from verl.cluster import CONTROL, MAX_DEATHS, Slots, WorkerGroup, despite_deaths
from verl.config.schema import Config
from verl.protocol import Prompt, Sample
from verl.rollout.engine import RolloutEngine, Row, SamplingParams, rows_of

logger = logging.getLogger(__name__)

START_S = 900  # longest time that an engine may take to start
STOP_S = 0.2  # after so long engines are told to stop again: a call may have begun only then

Rows = dict[tuple[int, int], Row]  # by group and number


class EnginePool(WorkerGroup):
    """One engine per `tensor_model_parallel_size` slots."""

    def __init__(
        self, cls: type[RolloutEngine], slots: Slots, device: str, config: Config, share: float
    ) -> None:
        """Starts the engines' processes, each with `share` of its devices."""
        model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
        self.max_num_seqs = rollout.max_num_seqs
        longest = config.data.max_prompt_length + config.data.max_response_length
        max_model_len = rollout.max_model_len or longest
        self.stored = cls.stored
        self.ranks = rollout.tensor_model_parallel_size if cls.parallel else 1
        first = slots[:: self.ranks]
        self.settings = model, rollout, device, max_model_len
        bundles = [bundle for _, bundle in slots]
        parts = [bundles[i : i + self.ranks] for i in range(0, len(slots), self.ranks)]
        arguments = [(share, part) for part in parts]
        own = share if self.ranks == 1 else 0  # else the engine's own workers take the devices
        super().__init__(cls, first, device, arguments, own, max_restarts=-1)
        self.on_restart: Callable[[int | None], Any] = lambda engine: None
        """Called with the number of an engine that was started anew, or None: all need weights."""
        self.asleep = False
        self.processes: dict[int, int] = {}
        self.stale: set[int] = set()  # engines that were started again, and await weights
        self.interrupted = Event()  # set: `generate_rows` ends with what has begun
        self.deaths: Counter[int] = Counter()  # of each engine, since its last response
        self.busy_s = 0.0  # seconds in which engines generated, those of all added up
        self.cancelled = False  # set from another thread: `generate` ends with a RuntimeError

    def wait_ready(self, engines: Iterable[int] | None = None) -> None:
        """Waits until all engines, or these, are ready and idle; those that Ray has started again
        are `stale`. Raises: as `RolloutEngine.build`."""
        numbers = list(engines or range(len(self)))
        asks = [self.workers[i].__ray_call__.options(max_task_retries=-1) for i in numbers]
        found = ray.get([ask.remote(lambda _: os.getpid()) for ask in asks], timeout=START_S)
        pids = dict(zip(numbers, found, strict=True))
        new = [i for i, pid in pids.items() if pid != self.processes.get(i)]
        self.stale |= self.processes.keys() & set(new)
        self.processes |= pids
        self.wait([self.workers[i].build.remote(*self.settings) for i in new])

    def call_all(self, method: str, *args: Any) -> list[Any]:
        """`call` between generations, of engines that are ready; again, should one die."""

        def call() -> list[Any]:
            self.refresh_dead()
            return self.call(method, *args)

        return despite_deaths(call)

    def sleep(self) -> None:
        """Gives device memory back until the next weights or, without them, `generate`."""
        self.call_all("sleep")
        self.asleep = True

    def refresh_dead(self, engines: Iterable[int] | None = None) -> None:
        """Gives weights to the engines, or these of them, that died and were started again."""
        self.wait_ready(engines)
        for engine in sorted(self.stale):
            logger.warning("engine %d had died and was started again", engine)
            self.on_restart(engine)
            self.stale.discard(engine)

    def generate(
        self, prompts: Sequence[Prompt], groups: Sequence[int], params: SamplingParams
    ) -> Generator[list[Sample], None, None]:
        """All responses to these prompts (`generate_rows`)."""
        yield from self.generate_rows(rows_of(prompts, groups, params.num_responses), params)

    def generate_rows(
        self, rows: Sequence[Row], params: SamplingParams
    ) -> Generator[list[Sample], None, None]:
        """Samples from all engines, as they are finished; closing it stops the engines. After an
        `interrupt` it ends with what has begun of the others. Raises: RayActorError if an engine
        dies `MAX_DEATHS` times without finishing a response."""
        if self.asleep:
            self.on_restart(None)
        self.refresh_dead()
        missing: list[Rows] = [{} for _ in self.workers]
        # Rows that start at once on each engine; those of a group share its prompt.
        room = max(1, min(self.max_num_seqs, -(-len(rows) // len(self))))
        for _, positions in groupby(range(len(rows)), key=lambda i: rows[i].group):
            part = list(positions)
            own = {(rows[i].group, rows[i].number): rows[i] for i in part}
            missing[part[0] // room % len(self)] |= own
        streams = {self._start(i, m, params): i for i, m in enumerate(missing) if m}
        begun = told = time.monotonic()
        try:
            while streams:
                ready: list[Any] = ray.wait(list(streams), timeout=STOP_S)[0]
                if self.cancelled:
                    raise RuntimeError("the generation was cancelled")
                if self.interrupted.is_set() and time.monotonic() > told + STOP_S:
                    self._tell_to_stop(streams.values())
                    told = time.monotonic()
                if not ready:
                    continue
                stream, engine = ready[0], streams[ready[0]]
                try:
                    samples: list[Sample] = ray.get(next(stream))
                except StopIteration:
                    assert self.interrupted.is_set() or not missing[engine], "responses left out"
                    self.busy_s += time.monotonic() - begun
                    del streams[stream]
                except RayActorError as error:
                    self.deaths[engine] += 1
                    if self.deaths[engine] == MAX_DEATHS:
                        raise
                    logger.warning("engine %d died: %s", engine, error)
                    del streams[stream]
                    if self.interrupted.is_set():  # the next call has it do what is missing
                        continue
                    despite_deaths(self.refresh_dead, [engine])
                    streams[self._start(engine, missing[engine], params)] = engine
                else:
                    left = missing[engine]
                    if new := [s for s in samples if (s.group, s.response_index) in left]:
                        self.deaths[engine] = 0
                        for s in new:  # with the driver's prompts: theirs are copies
                            s.prompt = left.pop((s.group, s.response_index)).prompt
                        yield new
        finally:
            self._stop(streams)

    def interrupt(self) -> None:
        """Ends the `generate_rows` that runs in another thread, and those to come while
        `interrupted` is set."""
        self.interrupted.set()
        self._tell_to_stop(range(len(self)))

    def _start(self, engine: int, missing: Rows, params: SamplingParams) -> Any:
        """A stream of these responses."""
        method = self.workers[engine].generate_rows.options(num_returns="streaming")
        return method.remote(list(missing.values()), params)

    def _tell_to_stop(self, engines: Iterable[int]) -> None:
        """One that comes late would end another call, so it waits until they have heard it."""
        methods = [self.workers[engine].stop for engine in engines]
        stops = [m.options(concurrency_group=CONTROL).remote() for m in methods]
        ray.wait(stops, num_returns=len(stops))

    def _stop(self, streams: dict[Any, int]) -> None:
        """Ends the calls that run, and waits for it: only an idle engine takes weights."""
        pending = [stream.completed() for stream in streams]
        while pending:
            self._tell_to_stop(streams.values())
            _, pending = ray.wait(pending, num_returns=len(pending), timeout=STOP_S)
