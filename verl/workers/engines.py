"""Generation on all engines: prompts from one queue, samples as they come, engines that may die."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from itertools import count
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from verl.protocol import Prompt, Sample
from verl.trainer.config.model_schema import ModelConfig
from verl.trainer.config.schema import RolloutConfig
from verl.workers.group import CONTROL, MAX_DEATHS, Slots, WorkerGroup, despite_deaths
from verl.workers.rollout.base import RolloutEngine, SamplingParams, Work

logger = logging.getLogger(__name__)

START_S = 900
"""Longest time that an engine may take to start, in seconds."""

_calls = count(1)  # names each call of an engine's `generate`


class EngineGroup(WorkerGroup):
    """One engine per `tensor_model_parallel_size` slots."""

    def __init__(
        self,
        cls: type[RolloutEngine],
        slots: Slots,
        device: str | None,
        share: float,
        model: ModelConfig,
        rollout: RolloutConfig,
        max_model_len: int,
    ) -> None:
        """Starts the engines, each with `share` of its devices.

        `max_model_len`: tokens of the longest prompt with its response.
        """
        self.ranks = ranks = rollout.tensor_model_parallel_size if cls.parallel else 1
        first = slots[::ranks]
        environments = [cls.environment(rollout) for _ in first]
        if ranks > 1:  # vLLM's own workers take the devices, by the variables of its Ray executor
            for (_, index), variables in zip(first, environments, strict=True):
                variables["VLLM_RAY_PER_WORKER_GPUS"] = str(share)
                indices = range(index, index + ranks)
                variables["VLLM_RAY_BUNDLE_INDICES"] = ",".join(map(str, indices))
            share = 0
        arguments = [(model, rollout, device, max_model_len)] * len(first)
        super().__init__(cls, first, device, arguments, share, environments, max_restarts=-1)
        self.continuous, self.max_num_seqs = cls.continuous, rollout.max_num_seqs
        self.on_restart: Callable[[int], Any] = lambda engine: None
        """Called with the number of an engine that was started anew and needs weights."""
        self.processes: list[int] = []
        self.cancelled = False
        """Set from another thread, it ends the `generate` that runs with a RuntimeError."""

    def find_restarted(self) -> list[int]:
        """Waits for all engines, which are idle; the numbers of those that Ray has started again
        since the last call. Raises: RayActorError or GetTimeoutError if one can't be started."""
        before, self.processes = self.processes, [self._process(i) for i in range(len(self))]
        return [i for i, pid in enumerate(self.processes) if before and before[i] != pid]

    def _process(self, engine: int) -> int:
        """The id of the engine's process, once it answers."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                call = self.workers[engine].__ray_call__.remote(lambda _: os.getpid())
                return ray.get(call, timeout=START_S)
            except ActorUnavailableError:  # Ray is about to start it
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def call_all(self, method: str, *args: Any) -> list[Any]:
        """`call` between generations; again, should an engine die, when it is back."""
        return despite_deaths(lambda: self.call(method, *args), self.refresh_dead)

    def refresh_dead(self) -> None:
        """Gives weights to the engines that died and were started again."""
        for engine in self.find_restarted():
            logger.warning("engine %d had died and was started again", engine)
            self.on_restart(engine)

    def refresh(self, engine: int) -> None:
        """Waits for an engine that died, and gives it weights."""
        self.processes[engine] = self._process(engine)
        self.on_restart(engine)

    def generate(
        self, prompts: Sequence[Prompt], groups: Sequence[int], params: SamplingParams
    ) -> Generator[list[Sample], None, None]:
        """Samples from all engines, as they are finished. Closing it stops the engines.

        Engines get their prompts in order, as they have room. What an engine that dies had not
        finished is drawn again once it is back, from the same seeds.
        """
        self.refresh_dead()
        generation = _Generation(self, prompts, groups, params)
        try:
            yield from generation.samples()
        finally:
            generation.stop()


class _Generation:
    """One call of `EngineGroup.generate`."""

    def __init__(
        self,
        engines: EngineGroup,
        prompts: Sequence[Prompt],
        groups: Sequence[int],
        params: SamplingParams,
    ) -> None:
        self.engines, self.params = engines, params
        self.queue: deque[tuple[Prompt, int]] = deque(zip(prompts, groups, strict=True))
        fair = -(-len(prompts) // len(engines))
        self.room = max(1, min(engines.max_num_seqs // params.n, fair))  # prompts per engine
        self.at_once = 1 if engines.continuous else self.room
        self.held: list[dict[int, Prompt]] = [{} for _ in engines.workers]  # by group, per engine
        self.drawn: dict[int, set[int]] = {group: set() for group in groups}
        self.calls = [0] * len(engines)
        self.open: set[int] = set()  # engines that may get more
        self.streams: dict[Any, int] = {}
        self.deaths: Counter[int] = Counter()

    def samples(self) -> Generator[list[Sample], None, None]:
        """Everything, in the order in which it comes."""
        for engine in range(len(self.engines)):
            self._start(engine, self._next(self.room))
        self._end_if_empty()
        while self.streams:
            ready, _ = ray.wait(list(self.streams), timeout=1)
            if self.engines.cancelled:
                raise RuntimeError("the generation was cancelled")
            if not ready:
                continue
            engine = self.streams[ready[0]]
            try:
                finished = ray.get(next(ready[0]))
            except StopIteration:
                del self.streams[ready[0]]
            except RayActorError as error:
                del self.streams[ready[0]]
                self._restart(engine, error)
            else:
                new = [s for s in finished if s.draw not in self.drawn[s.group]]
                if new:
                    self.deaths[engine] = 0
                for sample in new:
                    self._note(engine, sample)
                self._feed(engine)
                yield new

    def stop(self) -> None:
        """Ends what still runs, and waits for it: an engine does one thing at a time."""
        for engine in self.streams.values():
            self._tell(engine, "stop", self.calls[engine])
        self.queue.clear()
        self._end_if_empty()
        while self.streams:
            ready, _ = ray.wait(list(self.streams))
            try:
                ray.get(next(ready[0]))
            except (StopIteration, RayError):
                del self.streams[ready[0]]

    def _next(self, most: int) -> Work:
        return [self.queue.popleft() for _ in range(min(most, len(self.queue)))]

    def _start(self, engine: int, work: Work) -> None:
        if not work:
            return
        self.held[engine] = {group: prompt for prompt, group in work}
        self.calls[engine] = next(_calls)
        if self.queue:
            self.open.add(engine)
        method = self.engines.workers[engine].generate.options(num_returns="streaming")
        prompts, groups = zip(*work, strict=True)
        more = engine in self.open
        stream = method.remote(prompts, groups, self.params, self.calls[engine], more)
        self.streams[stream] = engine

    def _note(self, engine: int, sample: Sample) -> None:
        sample.prompt = self.held[engine][sample.group]  # not the copy that came with it
        self.drawn[sample.group].add(sample.draw)
        if len(self.drawn[sample.group]) == self.params.n:
            del self.held[engine][sample.group]

    def _feed(self, engine: int) -> None:
        """As many prompts as the engine has room for. One that works in batches gets a whole batch,
        so that the batches are the same in every run."""
        room = self.room - len(self.held[engine])
        while self.queue and room >= self.at_once:
            work = self._next(self.at_once)
            room -= len(work)
            self.held[engine] |= {group: prompt for prompt, group in work}
            self._tell(engine, "add", work, self.calls[engine])
        self._end_if_empty()

    def _end_if_empty(self) -> None:
        if not self.queue:
            for engine in self.open:
                self._tell(engine, "add", [], self.calls[engine])
            self.open.clear()

    def _restart(self, engine: int, error: RayActorError) -> None:
        self.open.discard(engine)
        back = False
        while not back:
            self.deaths[engine] += 1
            if self.deaths[engine] == MAX_DEATHS:
                raise error
            logger.warning("engine %d died and is started again: %s", engine, error)
            try:
                self.engines.refresh(engine)
                back = True
            except RayActorError as again:
                error = again
        lost = [(prompt, group) for group, prompt in self.held[engine].items()]
        self._start(engine, lost or self._next(self.room))

    def _tell(self, engine: int, method: str, *args: Any) -> None:
        """Calls an engine that is busy. Should it be dead, its stream says so."""
        worker = self.engines.workers[engine]
        getattr(worker, method).options(concurrency_group=CONTROL).remote(*args)
