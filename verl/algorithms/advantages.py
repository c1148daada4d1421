"""Advantages of outcome rewards: one number per response."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

Array = Sequence[float] | NDArray[Any] | Tensor  # one number per response, [N]


def group_numbers(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Equal integers in `groups`, [N], as numbers from 0 without gaps, [N], and their counts."""
    found = torch.unique_consecutive(groups, return_inverse=True, return_counts=True)
    if (found[0][1:] < found[0][:-1]).any():  # a trainer's are in order: no need to sort
        found = torch.unique(groups, return_inverse=True, return_counts=True)
    return found[1], found[2]


def group_statistics(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, unbiased standard deviation (0 for a group of one) and size of each response's group,
    [N] each; exactly the values and 0 where they are all the same. Equal integers in `groups`, [N],
    mark responses to the same prompt."""
    index, count = group_numbers(groups)
    count = count.to(values.dtype)
    # Any value of the group: compared with it, equal ones give exactly 0.
    one = torch.empty_like(count).scatter_(0, index, values)
    below = one.index_select(0, index).sub_(values)
    total, squares = torch.zeros_like(count), torch.zeros_like(count)
    mean = (one - total.scatter_add_(0, index, below) / count).index_select(0, index)
    squares.scatter_add_(0, index, (values - mean).square_())
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    return mean, std.index_select(0, index), count.index_select(0, index)


def group_max(values: Tensor, groups: Tensor) -> Tensor:
    """The largest value of each response's group, [N]."""
    index, _count = group_numbers(groups)
    largest = torch.full_like(values, -torch.inf).scatter_reduce(0, index, values, "amax")
    return largest.index_select(0, index)


def whitened(values: Tensor, lengths: Tensor) -> Tensor:
    """(v − mean) / sqrt(variance + 1e-8) over all tokens of the batch: mean and unbiased variance
    weigh each response by its length. [N] → [N]."""
    L = lengths.to(values.dtype)
    tokens = L.sum().clamp(min=1)
    mean = (L * values).sum() / tokens
    variance = (L * (values - mean) ** 2).sum() / (tokens - 1).clamp(min=1)
    return (values - mean) * torch.rsqrt(variance + 1e-8)


def scaled(values: Tensor, rewards: Tensor, std: Tensor, norm_by_std: bool | str) -> Tensor:
    """Values / (their groups' std + 1e-6); `batch`: that of all rewards; False: as they are."""
    if norm_by_std == "batch":
        std = group_statistics(rewards, torch.zeros_like(rewards))[1]
    return values / (std + 1e-6) if norm_by_std else values


def grpo_advantages(
    rewards: Tensor, groups: Tensor, *, norm_by_std: bool | str, **_: Any
) -> Tensor:
    """(r − mean of the group) / (std of the group + 1e-6) (arXiv 2402.03300, section 4.1.2); Dr.
    GRPO (arXiv 2503.20783) leaves the division out: `norm_by_std=False`. With `batch` it is the std
    of all rewards (arXiv 2508.08221; TRL's `scale_rewards="batch"`). verl's `grpo_vectorized`
    always divides. [N] → [N]."""
    mean, std, _count = group_statistics(rewards, groups)
    return scaled(rewards - mean, rewards, std, norm_by_std)


def rloo_advantages(rewards: Tensor, groups: Tensor, **_: Any) -> Tensor:
    """r − mean of the group's *other* responses (arXiv 2402.14740, eq. 8); 0 without. [N]."""
    mean, _std, count = group_statistics(rewards, groups)
    return (rewards - mean) * count / (count - 1).clamp(min=1)


def reinforce_plus_plus_baseline_advantages(
    rewards: Tensor, groups: Tensor, *, lengths: Tensor, **_: Any
) -> Tensor:
    """r − mean of the group, then `whitened` (arXiv 2501.03262). [N] → [N]."""
    return whitened(rewards - group_statistics(rewards, groups)[0], lengths)


def reinforce_plus_plus_advantages(
    rewards: Tensor, groups: Tensor, *, lengths: Tensor, **_: Any
) -> Tensor:
    """The rewards, `whitened` (arXiv 2501.03262), without groups. verl's is one number per response
    with outcome rewards and gamma 1, too: the return is the same at all tokens. [N] → [N]."""
    return whitened(rewards, lengths)


def remax_advantages(rewards: Tensor, groups: Tensor, *, baselines: Array, **_: Any) -> Tensor:
    """r − reward of the greedy response to the same prompt, `baselines` (arXiv 2310.10505). As in
    verl, a KL term is subtracted from r alone. [N] → [N]."""
    return rewards - torch.as_tensor(baselines, dtype=rewards.dtype)


def opo_advantages(rewards: Tensor, groups: Tensor, *, lengths: Tensor, **_: Any) -> Tensor:
    """r − Σ_j L_j·r_j / Σ_j L_j over the group: the baseline of least variance if that of a
    gradient grows like the length (arXiv 2505.23585). [N] → [N]."""
    L, centred = lengths.to(rewards.dtype), rewards - group_statistics(rewards, groups)[0]
    mean = group_statistics(L * centred, groups)[0]
    return centred - mean / group_statistics(L, groups)[0].clamp(min=1e-9)


def gpg_advantages(rewards: Tensor, groups: Tensor, **_: Any) -> Tensor:
    """α·(r − mean of the group) with α = N / number of rewards that aren't 0, as in verl. The paper
    (arXiv 2504.02546) counts the responses whose advantage isn't 0. [N] → [N]."""
    alpha = len(rewards) / torch.count_nonzero(rewards).clamp(min=1)
    return alpha * (rewards - group_statistics(rewards, groups)[0])


def grpo_passk_advantages(
    rewards: Tensor, groups: Tensor, *, norm_by_std: bool | str, **_: Any
) -> Tensor:
    """pass@k: what a response adds to the best reward of its group, divided as by `grpo`: the best
    one's lead over the second best, and 0 for the others (arXiv 2503.19595). [N] → [N]."""
    best = rewards == group_max(rewards, groups)
    second = group_max(rewards.masked_fill(best, -torch.inf), groups)
    share, _std, count = group_statistics(best.to(rewards.dtype), groups)
    ahead = best & (share * count < 1.5) & (count > 1)  # no other is as good
    lead, std = torch.where(ahead, rewards - second, 0.0), group_statistics(rewards, groups)[1]
    return scaled(lead, rewards, std, norm_by_std)


def gdpo_advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    lengths: Tensor,
    norm_by_std: bool | str,
    components: Sequence[Array],
    component_weights: Sequence[float] | None = None,
    **_: Any,
) -> Tensor:
    """Σ_k weight_k · GRPO's advantage of reward component k, then `whitened` (arXiv 2601.05242).
    `components`: [K, N]; weights, [K], are 1 if None. verl always divides. [N] → [N]."""
    weights = component_weights or [1.0] * len(components)
    total = torch.zeros_like(rewards)
    for weight, values in zip(weights, components, strict=True):
        r = torch.as_tensor(values, dtype=rewards.dtype)
        total += weight * grpo_advantages(r, groups, norm_by_std=norm_by_std)
    return whitened(total, lengths)


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalized advantage estimation (arXiv 1506.02438, eq. 16), [T] of N responses one after
    another as `rewards` and `values` are, with `lengths` [N]:

        A_t = δ_t + γ·λ·A_{t+1},  δ_t = r_t + γ·V_{t+1} − V_t

    V and A are 0 after a response's last token, a truncated one's, too. A + V is the return that
    the critic learns. Example: ``gae([0, 1], [0.5, 0.25], [2], 1, 1)`` is ``[0.5, 0.75]``."""
    found = torch.zeros_like(values)
    ends = lengths.cumsum(0)[lengths.argsort(descending=True)]
    last, next_value = values.new_zeros(len(ends)), values.new_zeros(len(ends))
    for back in range(int(lengths.max()) if len(lengths) else 0):
        active = int((lengths > back).sum())  # those that are long enough come first
        at = ends[:active] - 1 - back
        delta = rewards[at] + gamma * next_value[:active] - values[at]
        found[at] = last[:active] = delta + gamma * lam * last[:active]
        next_value[:active] = values[at]
    return found


ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    **dict.fromkeys(("grpo", "grpo_vectorized"), grpo_advantages),
    **dict.fromkeys(("rloo", "rloo_vectorized"), rloo_advantages),
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline_advantages,
    "reinforce_plus_plus": reinforce_plus_plus_advantages,
    "remax": remax_advantages,
    "opo": opo_advantages,
    "gpg": gpg_advantages,
    "grpo_passk": grpo_passk_advantages,
    "gdpo": gdpo_advantages,
}
"""Estimators, by verl's names. In a group of one, where verl mostly takes r itself, those that
compare with the group give 0."""


def advantages(
    rewards: Array,
    groups: Array,
    lengths: Array,
    estimator: str = "grpo",
    norm_by_std: bool | str = True,
    **others: Any,
) -> Tensor:
    """One advantage per response, float64 [N], by an `estimator` of `ADVANTAGES`; equal integers in
    `groups` mark responses to the same prompt, `lengths` are in tokens, [N] each. `others`: what
    the estimator takes beside them. Example: ``advantages([1, 0], [7, 7], [3, 5],
    norm_by_std=False)`` is ``[0.5, -0.5]``."""
    r, L = torch.as_tensor(rewards, dtype=torch.float64), torch.as_tensor(lengths)
    others |= {"lengths": L, "norm_by_std": norm_by_std}
    return ADVANTAGES[estimator](r, torch.as_tensor(groups), **others)
