"""What travels between the stages of a training step: prompts, and one `Sample` per response.

Everything is ragged numpy. Padded or packed tensors exist only inside a worker
(`verl.models.packing`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pickle import PickleBuffer
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length"]


@dataclass(slots=True)
class Prompt:
    """One row of a dataset, tokenized.

    Example: ``Prompt(index=7, token_ids=np.array([5, 9]), data_source="countdown",
    ground_truth={"target": 24, "numbers": [4, 6]}, extra_info={})``
    """

    index: int
    """Row number in the dataset (over all its files, before filtering)."""
    token_ids: NDArray[np.int64]
    """Prompt tokens, [P]."""
    data_source: str
    """Chooses the reward function, and names the validation metrics."""
    ground_truth: Any
    """What the reward function compares the response with."""
    extra_info: dict[str, Any] = field(default_factory=dict)
    """Passed to the reward function."""


@dataclass(slots=True)
class Sample:
    """One response, and all that the step learns about it. Each stage fills the fields it owns.

    Example: two tokens were sampled and the second one ended the sequence::

        Sample(prompt=prompt, group=0, response_ids=np.array([17, 2]), finish_reason="stop",
               rollout_log_probs=np.array([-0.3, -0.1], np.float32))
    """

    prompt: Prompt
    group: int
    """Samples of the same prompt in one rollout batch share this number."""
    response_ids: NDArray[np.int64]
    """Sampled tokens with the end-of-sequence token, if there was one, [L]."""
    finish_reason: FinishReason
    """`length`: the response hit the limit without an end-of-sequence token (truncated)."""
    draw: int = 0
    """Which of the responses to its prompt this is, from 0."""
    policy_version: int = 0
    """Training steps that the policy had made when it drew the response."""
    rollout_log_probs: NDArray[np.float32] | None = None
    """Log-probability of each sampled token under the distribution it was drawn from, [L]."""
    score: float = 0.0
    """What the reward function returned."""
    reward: float = 0.0
    """`score` with penalties (overlong, KL): what the advantage is made of."""
    extras: dict[str, Any] = field(default_factory=dict)
    """Everything else the reward function returned, such as `acc`."""
    old_log_probs: NDArray[np.float32] | None = None
    """Log-probabilities under the policy before this step's updates, [L]."""
    ref_log_probs: NDArray[np.float32] | None = None
    """Log-probabilities under the reference policy, [L]."""
    advantage: float = 0.0
    """One number per response: rewards are outcome rewards."""
    weight: float = 0.0
    """w_i of `loss = Σ_i w_i Σ_t ℓ_it` (`verl.trainer.ppo.core_algos.response_weights`)."""

    @property
    def length(self) -> int:
        """Response length in tokens, L."""
        return len(self.response_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and response together: what the sample costs in a forward pass, in tokens."""
        return len(self.prompt.token_ids) + len(self.response_ids)

    @property
    def truncated(self) -> bool:
        """Whether the response hit the length limit without an end-of-sequence token."""
        return self.finish_reason == "length"


ARRAYS: dict[str, np.dtype[Any]] = {
    "response_ids": np.dtype(np.int64),
    **dict.fromkeys(("rollout_log_probs", "old_log_probs", "ref_log_probs"), np.dtype(np.float32)),
}
"""Fields of `Sample` that hold one number per token."""


class Parcel(list[Sample]):
    """Samples on their way to another process, where they arrive as a plain list.

    Their arrays are copied once, into the message; those that arrive are read-only views of it.
    Pickled field by field, which is several times faster than sample by sample.

    `without`: arrays that stay behind; they arrive as None.
    """

    def __init__(self, samples: Iterable[Sample], without: Sequence[str] = ()) -> None:
        super().__init__(samples)
        self.without = without

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        columns: dict[str, list[Any]] = {}
        for f in fields(Sample):
            stays = f.name in self.without
            values = [None] * len(self) if stays else [getattr(s, f.name) for s in self]
            columns[f.name] = _buffers(values, ARRAYS[f.name]) if f.name in ARRAYS else values
        return _samples, (columns,)


class Ragged(list[NDArray[np.float32]]):
    """Arrays [L_i] on their way to another process: as those of a `Parcel`."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        dtype: np.dtype[Any] = np.dtype(np.float32)
        return _views, (_buffers(self, dtype), dtype)


def _buffers(arrays: Iterable[Any], dtype: np.dtype[Any]) -> list[PickleBuffer | None]:
    return [
        None if a is None else PickleBuffer(np.ascontiguousarray(a, dtype).data) for a in arrays
    ]


def _views(buffers: Iterable[Any], dtype: np.dtype[Any]) -> list[Any]:
    return [None if b is None else np.frombuffer(b, dtype) for b in buffers]


def _samples(columns: dict[str, list[Any]]) -> list[Sample]:
    for name, dtype in ARRAYS.items():
        columns[name] = _views(columns[name], dtype)
    return list(map(Sample, *(columns[f.name] for f in fields(Sample))))


def response_lengths(samples: Iterable[Sample]) -> NDArray[np.int64]:
    """Response lengths in tokens, int64 [N]."""
    return np.fromiter((len(s.response_ids) for s in samples), np.int64)


def column(samples: Iterable[Sample], name: str) -> NDArray[np.float64]:
    """One number per response: the field `name` of each sample, float64 [N]."""
    return np.array([getattr(s, name) for s in samples], dtype=np.float64)


def fill(samples: Sequence[Sample], name: str, values: Iterable[Any]) -> None:
    """Sets the field `name` of each sample; ValueError if the numbers of both differ."""
    for sample, value in zip(samples, values, strict=True):
        setattr(sample, name, value)
