"""What the trainer needs of a generation engine."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from verl.protocol import Prompt, Sample
from verl.trainer.config.model_schema import ModelConfig
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


class RolloutEngine(ABC):
    """A model that generates. One engine per device; weights arrive after each update."""

    @abstractmethod
    def __init__(self, model: ModelConfig, rollout: RolloutConfig, device: str | None) -> None:
        """Loads the model."""

    @abstractmethod
    def generate(
        self, prompts: Sequence[Prompt], groups: Sequence[int], params: SamplingParams
    ) -> Iterator[list[Sample]]:
        """Draws `params.n` responses to each prompt, and yields samples as they are finished.

        `groups` numbers the prompts. The samples carry the log-probability of each token under the
        distribution it was drawn from: after temperature, top-k and top-p.
        """

    def stop(self) -> None:  # noqa: B027  engines that can't need not
        """Ends the `generate` that runs, as soon as it can; what is unfinished is lost. Called from
        another thread."""

    @abstractmethod
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Takes some of the weights: whole tensors on the host, by Hugging Face name."""

    @abstractmethod
    def weight_dtype(self) -> str:
        """Name of the torch type that the engine computes in, such as `bfloat16`."""

    def sleep(self) -> None:  # noqa: B027  engines that hold no device memory need not
        """Gives device memory back until `wake_up`."""

    def wake_up(self) -> None:  # noqa: B027
        """The inverse of `sleep`."""


ENGINES = {"hf": "verl.workers.rollout.hf:HFEngine"}


def engine_class(name: str) -> type[RolloutEngine]:
    """The engine called `name`, imported only now.

    Raises: ValueError if this version doesn't have it.
    """
    if name not in ENGINES:
        raise ValueError(
            f"actor_rollout_ref.rollout.name={name}: this version has only "
            f"{', '.join(ENGINES)}; set actor_rollout_ref.rollout.name=hf"
        )
    module, _, attribute = ENGINES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
