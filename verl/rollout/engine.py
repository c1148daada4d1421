"""The seam between training and generation: `RolloutEngine.generate` yields finished responses."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pkgutil import resolve_name
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from verl.config.schema import ModelConfig, RolloutConfig
from verl.protocol import FinishReason, Prompt, Sample, WeightChunk

GATHER_S = 0.1  # seconds between two messages of an engine, at least


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How responses are sampled."""

    n: int  # sampled responses per prompt
    max_tokens: int  # of the longest response
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = -1  # -1 or 0: all tokens
    ignore_eos: bool = False
    seed: tuple[int, ...] = (0,)
    """Response k of a prompt depends on (seed, group, k) and the weights. What else is in the batch
    and the number of engines change the logits' rounding, and nothing else."""
    greedy: bool = False  # one more response to each prompt, number n, at temperature 0

    @property
    def num_responses(self) -> int:
        """Responses per prompt, the greedy one included."""
        return self.n + self.greedy


class Row(NamedTuple):
    """A response to be generated."""

    prompt: Prompt
    group: int
    number: int  # in the group, from 0
    begun: Sample | None = None  # its first tokens, from a call that was stopped

    @property
    def num_begun(self) -> int:
        """Tokens that it has."""
        return 0 if self.begun is None else len(self.begun.response_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that the next one follows."""
        return len(self.prompt.token_ids) + self.num_begun

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """What the next token follows: the prompt, and the response so far."""
        if self.begun is None:
            return self.prompt.token_ids
        return np.concatenate([self.prompt.token_ids, self.begun.response_ids])


def rows_of(prompts: Sequence[Prompt], groups: Sequence[int], n: int) -> list[Row]:
    """n responses to each prompt."""
    pairs = zip(prompts, groups, strict=True)
    return [Row(prompt, group, index) for prompt, group in pairs for index in range(n)]


class RolloutEngine(ABC):
    """A model that generates, on one device or on `tensor_model_parallel_size`. Other methods than
    `generate_rows` and `stop` are called while nothing is generated."""

    needs: ClassVar[str | None] = None  # package that the engine imports
    parallel: ClassVar[bool] = False  # whether it may have `tensor_model_parallel_size` devices
    stored: ClassVar[bool] = False  # new weights come as in a checkpoint, not as in the model
    transfers: ClassVar[tuple[str, ...]] = ("host",)  # of `weight_transfer`: what it supports

    version: int = 0  # training steps of the policy that gave the engine its weights
    stop_ids: Sequence[int] = ()  # tokens that end a response
    stopped: bool = False  # whether the call that generates is to end; each begins with False
    sent: float = -math.inf  # when the call's last message went to the driver

    def __init__(self, share: float = 1.0, bundles: Sequence[int] = (0,)) -> None:
        """To use `share` of each of its devices: these bundles of Ray's placement group."""
        self.share, self.bundles = share, bundles

    @classmethod  # noqa: B027  engines that take all models
    def check(cls, model: ModelConfig) -> None:
        """Before anything starts. Raises: ValueError for a model that the engine can't run."""

    @abstractmethod
    def build(
        self, model: ModelConfig, rollout: RolloutConfig, device: str, max_model_len: int
    ) -> None:
        """Loads the model for up to `max_model_len` tokens. Raises: ValueError for other keys."""

    @abstractmethod
    def generate_rows(self, rows: Sequence[Row], params: SamplingParams) -> Iterator[list[Sample]]:
        """Yields these responses as they are finished, with each token's log-probability after
        temperature, top-k and top-p; at the end, if it is stopped, what has begun of the others."""

    def generate(
        self, prompts: Sequence[Prompt], groups: Sequence[int], params: SamplingParams
    ) -> Iterator[list[Sample]]:
        """Yields `params.num_responses` to each prompt, numbered by `groups` (`generate_rows`)."""
        return self.generate_rows(rows_of(prompts, groups, params.num_responses), params)

    def stop(self) -> None:
        """Ends the `generate_rows` that runs in another thread."""
        self.stopped = True

    def may_send(self) -> bool:
        """Whether finished responses go to the driver now, or together with the next ones: each
        message takes it a millisecond."""
        if (now := time.monotonic()) < self.sent + GATHER_S:
            return False
        self.sent = now
        return True

    def generate_all(self, *args: Any) -> list[Sample]:
        """All that `generate(*args)` yields."""
        return [sample for samples in self.generate(*args) for sample in samples]

    def to_sample(
        self, row: Row, tokens: ArrayLike, log_probs: ArrayLike, finished: bool = True
    ) -> Sample:
        """The response that a row has become by these new tokens with their log-probabilities."""
        ids, values = np.array(tokens, np.int32), np.array(log_probs, np.float32)
        assert len(ids) == len(values)
        reason: FinishReason = "unfinished"
        if finished:
            reason = "stop" if int(ids[-1]) in self.stop_ids else "length"
        numbers = row.group, ids, reason, row.number, self.version
        new = Sample(row.prompt, *numbers, rollout_log_probs=values)
        return new if row.begun is None else row.begun.continued(new)

    def start_update(self) -> None:  # noqa: B027  engines that need no preparation
        """Gets ready for new weights, with `sleep` undone as far as they need it."""

    @abstractmethod
    def load_weights(self, chunk: WeightChunk) -> None:
        """Takes some of the new weights."""

    def finish_update(self, version: int) -> None:
        """Ready to generate with the new weights."""
        self.version = version

    def sleep(self) -> None:  # noqa: B027  engines that hold no device memory need not
        """Gives device memory back until `start_update`, which the next weights follow."""


ENGINES = {"hf": "verl.rollout.hf:HFEngine", "vllm": "verl.rollout.vllm:VLLMEngine"}
"""`actor_rollout_ref.rollout.name` → module and class."""


def engine_class(name: str) -> type[RolloutEngine]:
    """The engine called `name`, imported only now. Raises: ValueError if it isn't installed."""
    engine: type[RolloutEngine] = resolve_name(ENGINES[name])
    if engine.needs and find_spec(engine.needs) is None:
        raise ValueError(
            f"actor_rollout_ref.rollout.name={name}, but {engine.needs} is not installed: run "
            "bash setup.sh gpu (or cpu --vllm), or set actor_rollout_ref.rollout.name=hf"
        )
    return engine
