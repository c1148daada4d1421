"""What travels between the stages of a training step: prompts, responses, and optimizer steps. All
is ragged numpy; padded or packed tensors exist only inside a worker (`verl.models.packing`)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pickle import PickleBuffer
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length"]


@dataclass(slots=True)
class Prompt:
    """One row of a dataset, tokenized."""

    index: int
    """Row number in the dataset (over all its files, before filtering)."""
    token_ids: NDArray[np.int64]
    """Prompt tokens, [P]."""
    data_source: str
    """Chooses the reward function, and names the validation metrics."""
    ground_truth: Any
    """What the reward function compares with, such as ``{"target": 24, "numbers": [4, 6]}``."""
    extra_info: dict[str, Any] = field(default_factory=dict)
    """Passed to the reward function."""
    location: str = ""
    """File and row, for messages."""


@dataclass(slots=True)
class Sample:
    """One response of R tokens. Each stage of a step fills the fields that it owns."""

    prompt: Prompt
    group: int
    """Responses to the same prompt in one rollout batch share this number."""
    response_ids: NDArray[np.int64]
    """With the end-of-sequence token, if there was one, [R]."""
    finish_reason: FinishReason
    """`length`: the response hit the limit without an end-of-sequence token (truncated)."""
    response_index: int = 0
    """Which of the n responses to its prompt this is, from 0."""
    policy_version: int = 0
    """Training steps of the policy that generated the response."""
    loss_mask: NDArray[np.bool_] | None = None
    """True for the tokens that the policy generated, [R]; None: all of them. The others (a tool's
    answer) are only read: they have no part in lengths, weights and losses."""
    rollout_log_probs: NDArray[np.float32] | None = None
    """Log-probability of each token under the distribution it was sampled from, [R]."""
    score: float = 0.0
    """What the reward function returned."""
    reward: float = 0.0
    """`score` with penalties (overlong, KL): what the advantage is made of."""
    extras: dict[str, Any] = field(default_factory=dict)
    """Everything else the reward function returned, such as `acc`."""
    old_log_probs: NDArray[np.float32] | None = None
    """Log-probabilities under the policy before this step's updates, [R]."""
    ref_log_probs: NDArray[np.float32] | None = None
    """Log-probabilities under the reference policy, [R]."""
    advantage: float = 0.0
    """One number per response: rewards are outcome rewards."""

    @property
    def length(self) -> int:
        """Tokens of the response that count, L."""
        return len(self.response_ids) if self.loss_mask is None else int(self.loss_mask.sum())

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and response together."""
        return len(self.prompt.token_ids) + len(self.response_ids)

    @property
    def truncated(self) -> bool:
        """Whether the response hit the length limit without an end-of-sequence token."""
        return self.finish_reason == "length"

    def counted(self, values: NDArray[Any]) -> NDArray[Any]:
        """Of one value per token of the response, [R], those that count, [L]."""
        return values if self.loss_mask is None else values[self.loss_mask]


ARRAYS: dict[str, np.dtype[Any]] = {
    "response_ids": np.dtype(np.int64),
    "loss_mask": np.dtype(np.bool_),
    **dict.fromkeys(("rollout_log_probs", "old_log_probs", "ref_log_probs"), np.dtype(np.float32)),
}
"""Fields of `Sample` that hold one value per token of the response."""


class SampleBatch(list[Sample]):
    """Samples that are sent to another process, where they arrive as a plain list. Field by field,
    which is several times faster than sample by sample: arrays are copied once, into the message,
    and arrive as read-only views of it; those in `omit` as None."""

    def __init__(self, samples: Iterable[Sample], omit: Sequence[str] = ()) -> None:
        super().__init__(samples)
        self.omit = omit

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        columns: dict[str, list[Any]] = {}
        for f in fields(Sample):
            values = [None if f.name in self.omit else getattr(s, f.name) for s in self]
            if dtype := ARRAYS.get(f.name):
                arrays = [None if v is None else np.ascontiguousarray(v, dtype) for v in values]
                values = [None if a is None else PickleBuffer(a.data) for a in arrays]
            columns[f.name] = values
        return _samples, (columns,)


def _samples(columns: dict[str, list[Any]]) -> list[Sample]:
    for name, dtype in ARRAYS.items():
        columns[name] = [None if b is None else np.frombuffer(b, dtype) for b in columns[name]]
    return list(map(Sample, *(columns[f.name] for f in fields(Sample))))


@dataclass(slots=True)
class OptimizerStep:
    """The responses of one optimizer step, and their weights in its own loss Σ_i w_i Σ_t ℓ_it."""

    samples: list[Sample]
    weights: NDArray[np.float32]
    """w_i, [N] (`verl.algorithms.weights.response_weights`)."""

    def share(self, indices: Sequence[int]) -> Self:
        """These responses with their weights, for one rank or micro-batch."""
        samples = SampleBatch(self.samples[i] for i in indices)
        return type(self)(samples, self.weights[list(indices)])


def response_lengths(samples: Iterable[Sample]) -> NDArray[np.int64]:
    """Tokens of each response that count, int64 [N]."""
    return np.fromiter(  # the property takes twice as long
        (len(s.response_ids) if s.loss_mask is None else s.length for s in samples), np.int64
    )


@dataclass(slots=True)
class WeightChunk:
    """W weights on their way to the engines; without tensors and handles a broadcast follows."""

    names: list[str]  # in the checkpoint, [W]
    dtype: str  # PyTorch's name of their type, such as bfloat16
    shapes: list[list[int]]  # [W]
    tensors: list[Any] | None = None  # on the host, [W]
    ipc_handles: list[dict[str, Any]] | None = None  # to those on a GPU, by the GPU's id, [W]
