"""What travels between the stages of a training step, as ragged numpy: `verl.models` packs it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import repeat
from operator import attrgetter
from pickle import PickleBuffer
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "unfinished"]


@dataclass(slots=True)
class Prompt:
    """One row of a dataset, tokenized."""

    index: int  # row number in the dataset (over all its files, before filtering)
    token_ids: NDArray[np.int64]  # prompt tokens, [P]
    data_source: str  # chooses the reward function, and names the validation metrics
    ground_truth: Any  # what the reward function compares with: {"target": 9, "numbers": [4, 5]}
    extra_info: dict[str, Any] = field(default_factory=dict)  # passed to the reward function
    location: str = ""  # file and row, for messages
    messages: list[dict[str, Any]] | None = None  # for a reward model to read; None: it doesn't


@dataclass(slots=True)
class Sample:
    """One response of R tokens. Each stage of a step fills the fields that it owns."""

    prompt: Prompt
    group: int  # responses to the same prompt in one rollout batch share this number
    response_ids: NDArray[np.int32]  # with the end-of-sequence token, if there was one, [R]
    # `length`: at the limit without an end-of-sequence token. `unfinished`: it will go on.
    finish_reason: FinishReason
    response_index: int = 0  # which of the n responses to its prompt this is, from 0
    policy_version: int = 0  # training steps of the policy that generated the first token
    token_versions: NDArray[np.int32] | None = None  # of each token's, [R]; None: all the same
    # True for the tokens that the policy generated, [R]; None: all of them. The others (a tool's
    # answer) are only read: they have no part in lengths, weights and losses.
    loss_mask: NDArray[np.bool_] | None = None
    # `loss_mask` without the tokens that rollout correction rejects; None: it rejects none.
    trained_mask: NDArray[np.bool_] | None = None
    # Log-probability of each token under the distribution it was sampled from, [R].
    rollout_log_probs: NDArray[np.float32] | None = None
    score: float = 0.0  # what the reward function returned
    reward: float = 0.0  # `score` with penalties (overlong, KL): what the advantage is made of
    extras: dict[str, Any] = field(default_factory=dict)  # what else it returned, such as `acc`
    baseline: float = 0.0  # reward of the greedy response to the prompt, where there is one (remax)
    old_log_probs: NDArray[np.float32] | None = None  # under the policy before this step's updates
    ref_log_probs: NDArray[np.float32] | None = None  # under the reference policy, [R]
    advantage: float = 0.0  # one number per response: rewards are outcome rewards
    # With a critic, which gives each token its own, [R] each; None: there is none.
    token_rewards: NDArray[np.float32] | None = None  # KL terms, which `reward` includes
    values: NDArray[np.float32] | None = None  # the critic's, of the state before each token
    returns: NDArray[np.float32] | None = None  # what the critic is to learn
    token_advantages: NDArray[np.float32] | None = None  # what `advantage` is the mean of
    # Tokens that the policy loss treats otherwise in one optimizer step, [R]; None: it knows none.
    selected: NDArray[np.bool_] | None = None
    # Tokens whose log-probability has no gradient in that step's policy loss, [R]; None: all have.
    frozen: NDArray[np.bool_] | None = None
    entropies: NDArray[np.float32] | None = None  # under the policy before this step's updates, [R]

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

    @property
    def versions(self) -> NDArray[np.int32]:
        """Training steps of the policy that drew each token, [R]."""
        if self.token_versions is None:
            return np.full(len(self.response_ids), self.policy_version, np.int32)
        return self.token_versions

    def continued(self, rest: Self) -> Self:
        """This beginning of a response and what followed it, both with `rollout_log_probs`."""
        ids, log_probs, versions = (
            np.concatenate([getattr(self, name), getattr(rest, name)])
            for name in ("response_ids", "rollout_log_probs", "versions")
        )
        return replace(
            rest,
            response_ids=ids,
            rollout_log_probs=log_probs,
            policy_version=self.policy_version,
            token_versions=versions if versions[0] != versions[-1] else None,
        )

    def reject(self, kept: NDArray[np.bool_]) -> None:
        """Takes tokens out of the loss; `kept`: of those that count, which stay, [L]."""
        mask = np.ones(len(self.response_ids), bool) if self.loss_mask is None else self.loss_mask
        self.trained_mask = mask.copy()
        self.trained_mask[mask] = kept

    def trained(self) -> Self:
        """As the loss sees it: only tokens that were not rejected count."""
        if self.trained_mask is None:
            return self
        return replace(self, loss_mask=self.trained_mask, trained_mask=None)

    def spread(self, values: NDArray[Any]) -> NDArray[Any]:
        """The inverse of `counted`, with 0 for tokens that don't count: [L] → [R]."""
        found = np.zeros(len(self.response_ids), values.dtype)
        found[slice(None) if self.loss_mask is None else self.loss_mask] = values
        return found

    def advantages(self) -> NDArray[Any]:
        """That of each token that counts, [L]."""
        if self.token_advantages is None:
            return np.full(self.length, self.advantage)
        return self.counted(self.token_advantages)

    def marking(self, name: str, chosen: NDArray[np.bool_]) -> Self:
        """With some tokens `selected` or `frozen`; `chosen`: which of those that count, [L]."""
        changes: dict[str, Any] = {name: self.spread(chosen)}
        return replace(self, **changes)

    def counted(self, values: NDArray[Any]) -> NDArray[Any]:
        """Of one value per token of the response, [R], those that count, [L]."""
        return values if self.loss_mask is None else values[self.loss_mask]


ARRAYS: dict[str, np.dtype[Any]] = {
    **dict.fromkeys(("response_ids", "token_versions"), np.dtype(np.int32)),
    **dict.fromkeys(("loss_mask", "selected", "frozen"), np.dtype(np.bool_)),
    **dict.fromkeys(("rollout_log_probs", "old_log_probs", "ref_log_probs"), np.dtype(np.float32)),
    **dict.fromkeys(
        ("token_rewards", "values", "returns", "token_advantages"), np.dtype(np.float32)
    ),
}
"""Fields of `Sample` that hold one value per token of the response."""


class SampleBatch(list[Sample]):
    """Samples that stay as they are together, and are asked for their lengths once. In another
    process they arrive as a plain list, without the arrays in `omit`. Sent field by field, which is
    several times faster: arrays become read-only views of the message."""

    def __init__(self, samples: Iterable[Sample], omit: Sequence[str] = ()) -> None:
        super().__init__(samples)
        self.omit = omit

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each response that count, [N]."""
        found = np.fromiter(map(len, map(attrgetter("response_ids"), self)), np.int64, len(self))
        for i, sample in enumerate(self):  # most have none, and are not asked
            if sample.loss_mask is not None:
                found[i] = sample.length
        return found

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        columns: dict[str, list[Any]] = {}
        for name in (f.name for f in fields(Sample) if f.name not in self.omit):
            values = [getattr(s, name) for s in self]
            if dtype := ARRAYS.get(name):
                arrays = [None if v is None else np.ascontiguousarray(v, dtype) for v in values]
                values = [None if a is None else PickleBuffer(a.data) for a in arrays]
            columns[name] = values
        return _samples, (columns,)


def _samples(columns: dict[str, list[Any]]) -> list[Sample]:
    for name in columns.keys() & ARRAYS:
        arrays = (None if b is None else np.frombuffer(b, ARRAYS[name]) for b in columns[name])
        columns[name] = list(arrays)
    return list(map(Sample, *(columns.get(f.name, repeat(None)) for f in fields(Sample))))


@dataclass(slots=True)
class OptimizerStep:
    """The responses of one optimizer step, and their weights in its own loss Σ_i w_i Σ_t ℓ_it."""

    samples: list[Sample]
    weights: NDArray[np.float32]  # w_i, [N] (`verl.algorithms.weights.response_weights`)
    regularizer_weights: NDArray[np.float32] | None = None  # KL loss, entropy bonus; None: w_i

    def share(self, indices: Sequence[int]) -> Self:
        """These responses with their weights, for one rank or micro-batch."""
        chosen = list(indices)
        samples = SampleBatch((self.samples[i] for i in chosen), omit=("entropies",))
        others = self.regularizer_weights
        return type(self)(samples, self.weights[chosen], None if others is None else others[chosen])


def by_prompt(samples: Iterable[Sample]) -> list[list[int]]:
    """Indices of the samples, those whose prompts have the same tokens together."""
    groups: dict[bytes, list[int]] = {}
    for i, s in enumerate(samples):
        groups.setdefault(s.prompt.token_ids.tobytes(), []).append(i)
    return [*groups.values()]


def response_lengths(samples: Iterable[Sample]) -> NDArray[np.int64]:
    """Tokens of each response that count, int64 [N]; not to be changed."""
    return (samples if isinstance(samples, SampleBatch) else SampleBatch(samples)).lengths


@dataclass(slots=True)
class WeightChunk:
    """W weights on their way to the engines; without tensors and handles a broadcast follows."""

    names: list[str]  # as the engine calls them, [W]
    dtype: str  # PyTorch's name of their type, such as bfloat16
    shapes: list[list[int]]  # [W]
    tensors: list[Any] | None = None  # on the host, [W]
    ipc_handles: list[dict[str, Any]] | None = None  # to those on a GPU, by the GPU's id, [W]
    sources: list[str] = field(default_factory=list)  # the policy's weights that become these
