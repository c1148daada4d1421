"""Advantages of outcome rewards: one number per response."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

Array = Sequence[float] | NDArray[Any] | Tensor  # one number per response, [N]


def group_statistics(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, unbiased standard deviation (0 for a group of one) and size of each response's group,
    [N] each. Equal integers in `groups`, [N], mark responses to the same prompt."""
    ordered = bool((groups[1:] >= groups[:-1]).all())  # as a trainer's are: no need to sort
    unique = torch.unique_consecutive if ordered else torch.unique
    index = unique(groups, return_inverse=True)[1]
    count = torch.bincount(index).to(values.dtype)
    mean = (torch.bincount(index, values) / count).index_select(0, index)
    std = (torch.bincount(index, (values - mean) ** 2) / (count - 1).clamp(min=1)).sqrt()
    return mean, std.index_select(0, index), count.index_select(0, index)


def grpo_advantages(
    rewards: Tensor, groups: Tensor, *, norm_by_std: bool | str, **_: Any
) -> Tensor:
    """(r − mean of the group) / (std of the group + 1e-6) (arXiv 2402.03300, section 4.1.2); Dr.
    GRPO (arXiv 2503.20783) leaves the division out: `norm_by_std=False`. With `batch` it is the std
    of all rewards (arXiv 2508.08221; TRL's `scale_rewards="batch"`). [N] → [N]."""
    mean, std, _count = group_statistics(rewards, groups)
    if norm_by_std == "batch":
        std = group_statistics(rewards, torch.zeros_like(groups))[1]
    return (rewards - mean) / (std + 1e-6) if norm_by_std else rewards - mean


def rloo_advantages(rewards: Tensor, groups: Tensor, **_: Any) -> Tensor:
    """r − mean of the group's *other* responses (arXiv 2402.14740, eq. 8); 0 without. [N]."""
    mean, _std, count = group_statistics(rewards, groups)
    return (rewards - mean) * count / (count - 1).clamp(min=1)


def reinforce_plus_plus_baseline_advantages(
    rewards: Tensor, groups: Tensor, *, lengths: Tensor, **_: Any
) -> Tensor:
    """r − mean of the group, then whitened over all tokens of the batch (arXiv 2501.03262): mean
    and unbiased variance weigh each response by its length. [N] → [N]."""
    centred = rewards - group_statistics(rewards, groups)[0]
    L = lengths.to(rewards.dtype)
    tokens = L.sum().clamp(min=1)
    batch_mean = (L * centred).sum() / tokens
    variance = (L * (centred - batch_mean) ** 2).sum() / (tokens - 1).clamp(min=1)
    return (centred - batch_mean) * torch.rsqrt(variance + 1e-8)


ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    "grpo": grpo_advantages,
    "rloo": rloo_advantages,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline_advantages,
}


def advantages(
    rewards: Array,
    groups: Array,
    lengths: Array,
    estimator: str = "grpo",
    norm_by_std: bool | str = True,
) -> Tensor:
    """One advantage per response, float64 [N], by an `estimator` of `ADVANTAGES`; equal integers in
    `groups` mark responses to the same prompt, `lengths` are in tokens, [N] each. Example:
    ``advantages([1, 0], [7, 7], [3, 5], norm_by_std=False)`` is ``[0.5, -0.5]``."""
    r, L = torch.as_tensor(rewards, dtype=torch.float64), torch.as_tensor(lengths)
    return ADVANTAGES[estimator](r, torch.as_tensor(groups), lengths=L, norm_by_std=norm_by_std)
