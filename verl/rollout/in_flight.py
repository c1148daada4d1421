"""Responses that go on after new weights (PipelineRL, arXiv 2509.19128; AReaL, arXiv 2505.24298).
Groups leave in the order in which their prompts came, however long their responses are: what is
trained on has the lengths of what was drawn."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import chain, groupby
from threading import Condition
from typing import Self

from verl.protocol import Prompt, Sample
from verl.rollout.engine import Row, SamplingParams, rows_of
from verl.rollout.pool import EnginePool

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Group:
    """The responses to one prompt."""

    missing: dict[int, Row]  # those that are not finished, by their number
    scoring: list[Future[list[Sample]]] = field(default_factory=list)  # those that are

    @classmethod
    def of(cls, samples: list[Sample]) -> Self:
        """A group that is scored."""
        scored: Future[list[Sample]] = Future()
        scored.set_result(samples)
        return cls({}, [scored])

    @property
    def complete(self) -> bool:
        """Whether all responses are finished and scored."""
        return not self.missing and all(f.done() and not f.exception() for f in self.scoring)

    def samples(self) -> list[Sample]:
        """The finished responses, in order; waits for their scores. Raises: what scoring raised."""
        found = chain.from_iterable(part.result() for part in self.scoring)
        return sorted(found, key=lambda sample: sample.response_index)


class InFlight:
    """A line of groups. Between `start` and `pause` a thread has the engines work on all of them;
    what a pause interrupts goes on at the next start, with the weights that engines have then."""

    def __init__(
        self, score: Callable[[list[Sample]], Future[list[Sample]]], params: SamplingParams
    ) -> None:
        self.score, self.params = score, params
        self.engines: EnginePool
        self.line: deque[Group] = deque()
        self.first = 0  # number of the first group in the line
        self.thread, self.changed = ThreadPoolExecutor(1), Condition()
        self.cycle: Future[None] | None = None  # what the engines do now

    def add(self, prompts: Sequence[Prompt]) -> None:
        """Groups for these prompts join the line; the engines get them at the next `start`."""
        for prompt in prompts:
            number = self.first + len(self.line)
            rows = rows_of([prompt], [number], self.params.num_responses)
            self.line.append(Group({row.number: row for row in rows}))

    def start(self) -> None:
        """The engines work on what is missing, unless they do so already."""
        if self.cycle is not None and not self.cycle.done():
            return
        if rows := [row for group in self.line for row in group.missing.values()]:
            self.cycle = self.thread.submit(self._generate, rows)
            self.cycle.add_done_callback(self._notify)

    def pause(self) -> None:
        """Interrupts the engines and waits until they are idle."""
        if self.cycle is not None and not self.cycle.done():
            self.engines.interrupt()
            wait([self.cycle])
            self.engines.interrupted.clear()

    def wait_generated(self, number: int) -> None:
        """Waits until the first `number` groups are generated. Raises: what the engines raised."""
        for group in list(self.line)[:number]:
            while group.missing:
                self.start()
                assert self.cycle is not None
                self._wait(group, self.cycle)
                if group.missing and self.cycle.done():
                    self.cycle.result()

    def next(self) -> list[Sample]:
        """The first group's responses. Raises: what the engines or its scoring raised; the group
        stays in the line then."""
        self.wait_generated(1)
        samples = self.line[0].samples()
        with self.changed:
            self.line.popleft()
            self.first += 1
        return samples

    def put_back(self, groups: Sequence[list[Sample]]) -> None:
        """Groups that were taken are the first of the line again, in this order."""
        with self.changed:
            for samples in reversed(groups):
                self.line.appendleft(Group.of(samples))
            self.first -= len(groups)

    def metrics(self) -> dict[str, float]:
        """Of the line: complete groups, and responses that are not finished."""
        return {
            "async/complete_groups": float(sum(group.complete for group in self.line)),
            "async/responses_under_way": float(sum(len(group.missing) for group in self.line)),
        }

    def _generate(self, rows: list[Row]) -> None:
        for samples in self.engines.generate_rows(rows, self.params):
            for number, part in groupby(samples, key=lambda sample: sample.group):
                self._sort_in(number, list(part))

    def _sort_in(self, number: int, samples: list[Sample]) -> None:
        finished = [s for s in samples if s.finish_reason != "unfinished"]
        scores = [self.score(finished)] if finished else []
        with self.changed:
            group = self.line[number - self.first]
            group.scoring += scores
            for s in samples:
                row = group.missing.pop(s.response_index)
                if s.finish_reason == "unfinished":
                    group.missing[row.number] = row._replace(begun=s)
            self.changed.notify_all()

    def _wait(self, group: Group, cycle: Future[None]) -> None:
        with self.changed:
            self.changed.wait_for(lambda: not group.missing or cycle.done())

    def _notify(self, cycle: Future[None]) -> None:
        if not cycle.cancelled() and (error := cycle.exception()):
            logger.warning("a generation failed, and is tried again: %s", error)
        with self.changed:
            self.changed.notify_all()
