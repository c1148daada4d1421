"""What the trainer needs of a generation engine."""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, ClassVar

from verl.protocol import Parcel, Prompt, Sample, fill
from verl.trainer.config.schema import RolloutConfig


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How responses are drawn."""

    n: int
    """Responses per prompt."""
    max_tokens: int
    """Longest response, in tokens."""
    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 1.0
    top_k: int = -1
    """-1 or 0: all tokens."""
    ignore_eos: bool = False
    seed: tuple[int, ...] = (0,)
    """Response k of a prompt depends on (seed, group, k) and the weights. What else is in the batch
    and the number of engines change the logits' rounding, and nothing else."""


Work = list[tuple[Prompt, int]]
"""Prompts, each with the number of its group."""


class RolloutEngine(ABC):
    """A model that generates. One engine per device (or per `tensor_model_parallel_size` devices);
    weights arrive after each update."""

    continuous: ClassVar[bool]
    """Whether a new prompt joins those that are being answered. If not, prompts are answered in
    batches, which should be as large as can be."""
    needs: ClassVar[str | None] = None
    """Package that the engine imports."""
    parallel: ClassVar[bool] = False
    """Whether an engine may have several devices, `tensor_model_parallel_size`."""

    def __init__(self, rollout: RolloutConfig) -> None:
        """Subclasses load the model: `(model, rollout, device, max_model_len)`, where the last is
        the number of tokens of the longest prompt with its response."""
        self.max_num_seqs = rollout.max_num_seqs
        self.version = 0
        self._inbox: SimpleQueue[tuple[Work, int]] = SimpleQueue()
        self._stopped_call: int | None = None

    @staticmethod
    def environment(rollout: RolloutConfig) -> dict[str, str]:
        """Variables of the engine's process."""
        return {}

    @classmethod  # noqa: B027  most have nothing to check
    def check(cls, rollout: RolloutConfig) -> None:
        """Raises ValueError for keys that the engine could not start with."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        groups: Sequence[int],
        params: SamplingParams,
        call: int = 0,
        more: bool = False,
    ) -> Iterator[list[Sample]]:
        """Draws `params.n` responses to each prompt, and yields samples as they are finished.

        `groups` numbers the prompts. The samples carry the log-probability of each token under the
        distribution it was drawn from: after temperature, top-k and top-p. Each prompt's responses
        are the same whoever draws them, but for rounding.

        `call` is what `add` and `stop`, called from other threads, name this call by. With `more`,
        `add` brings more prompts until it brings none.
        """
        self._waiting, self._more = list(zip(prompts, groups, strict=True)), more
        self._call = call
        for samples in self._generate(params):
            fill(samples, "policy_version", [self.version] * len(samples))
            yield Parcel(samples)
        while self._more:  # after a stop
            self._receive(wait=True)
        if self.stopped:
            self._stopped_call = None

    def draw(self, prompt: Prompt, params: SamplingParams) -> list[Sample]:
        """All responses to one prompt."""
        return [s for samples in self.generate([prompt], [0], params) for s in samples]

    def add(self, work: Work, call: int = 0) -> None:
        """More prompts for that `generate`; an empty list: that's all."""
        self._inbox.put((work, call))

    def stop(self, call: int = 0) -> None:
        """Ends that `generate` as soon as it can be; what is unfinished is lost."""
        self._stopped_call = call

    @property
    def stopped(self) -> bool:
        """Whether the `generate` that runs is to end."""
        return self._stopped_call == self._call

    def _receive(self, wait: bool) -> bool:
        """Reads one `add`; False if there is none."""
        try:
            work, call = self._inbox.get(block=wait)
        except Empty:
            return False
        if call == self._call:  # not of a predecessor that died
            self._waiting += work
            self._more = bool(work)
        return True

    def _take(self, most: int, wait: bool) -> Work:
        """The next prompts, `most` at the most; none if there are no more. Without `wait`, none
        also if they are still to come."""
        while self._more and len(self._waiting) < most:
            if not self._receive(wait and not self._waiting):
                break
        taken, self._waiting = self._waiting[:most], self._waiting[most:]
        return taken

    @abstractmethod
    def _generate(self, params: SamplingParams) -> Iterator[list[Sample]]:
        """Answers the prompts that `_take` gives, until there are none or it is `stopped`."""

    def start_update(self) -> None:  # noqa: B027  engines that need no preparation
        """Gets ready for new weights, with `sleep` undone as far as they need it."""

    @abstractmethod
    def load_weights(self, bucket: dict[str, Any]) -> None:
        """Takes some of the new weights: a bucket of `verl.workers.weight_sync`."""

    def finish_update(self, version: int) -> None:
        """Ready to generate with the new weights, which are those after `version` training
        steps."""
        self.version = version

    def sleep(self) -> None:  # noqa: B027  engines that hold no device memory need not
        """Gives device memory back until `start_update`, which the next weights follow."""


ENGINES = {
    "hf": "verl.workers.rollout.hf:HFEngine",
    "vllm": "verl.workers.rollout.vllm:VLLMEngine",
}


def engine_class(name: str) -> type[RolloutEngine]:
    """The engine called `name`, imported only now.

    Raises: ValueError if what it needs is not installed.
    """
    module, _, attribute = ENGINES[name].partition(":")
    engine: type[RolloutEngine] = getattr(importlib.import_module(module), attribute)
    if engine.needs and importlib.util.find_spec(engine.needs) is None:
        raise ValueError(
            f"actor_rollout_ref.rollout.name={name}, but {engine.needs} is not installed: run "
            "bash setup.sh gpu (or cpu --vllm), or set actor_rollout_ref.rollout.name=hf"
        )
    return engine
