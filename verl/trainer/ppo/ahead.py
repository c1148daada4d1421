"""Generation of a step's batch while the step before it trains."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from verl.protocol import Sample
from verl.trainer.ppo.batching import TrainBatches
from verl.utils.timer import Timer

Batch = tuple[list[Sample], dict[str, float]]


class BatchesAhead:
    """`TrainBatches`, one step ahead (`trainer.async_rollout`).

    While step k trains, the engines draw the batch of step k+1 with the weights from before step k:
    in all steps but the first, responses are one policy version old.
    """

    def __init__(self, batches: TrainBatches, last_step: int, sync: Callable[[], Any]) -> None:
        """`sync` gives the engines the actor's weights; called while they are idle."""
        self.batches, self.last_step, self.sync = batches, last_step, sync
        self.pool = ThreadPoolExecutor(1)
        self.drawn: Future[Batch] | None = None
        self.before: dict[str, Any] = {}

    def next(self, step: int, timer: Timer) -> Batch:
        """The batch of `step`, whose successor is begun. `timing_s/gen` is how long it is waited
        for."""
        if first := self.drawn is None:
            self._begin(step)
        with timer("gen"):
            batch = self.drawn.result()
        if not first:
            with timer("update_weights"):
                self.sync()
        self.drawn = None
        if step < self.last_step:
            self._begin(step + 1)
        return batch

    def wait(self) -> None:
        """Until the engines are idle."""
        if self.drawn:
            self.drawn.exception()

    def close(self) -> None:
        """Waits for the generation, which somebody has cancelled."""
        self.pool.shutdown(cancel_futures=True)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, the batch of the next step included; waits for that."""
        self.wait()
        if self.drawn is None:
            return self.batches.state()
        if self.drawn.exception():
            return dict(self.before)
        samples, metrics = self.drawn.result()
        return self.batches.state() | {"drawn": samples, "drawn_metrics": metrics}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`, before the first `next`."""
        self.batches.load(state)

    def _begin(self, step: int) -> None:
        self.before = self.batches.state()
        self.drawn = self.pool.submit(self.batches.next, step, Timer())
