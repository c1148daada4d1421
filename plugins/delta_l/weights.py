"""The weights of ∆L Normalization, and as factors of advantages.

The first three functions are those of `verl/algorithms/weights.py` in the repository that this
package comes from, to the letter: a test of the repository compares the texts. (To import them
instead, either package would need the other one at run time, for twenty lines.)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def seq_mean_token_sum(L: Tensor, **_: Any) -> Tensor:
    """1 / N: the mean of responses' sums. LUSPO (arXiv 2602.05261; TRL's `loss_type="luspo"`) is
    GRPO Norm, 1 / (N·L_i), times the length L_i, which is this, under any loss. [N] → [N]."""
    return torch.full_like(L, 1 / max(len(L), 1))


def dr_grpo(L: Tensor, *, M: int, **_: Any) -> Tensor:
    """Dr. GRPO (arXiv 2503.20783): 1 / (N·M), the mean over *all* cells of the padded batch, masked
    ones included (``masked_mean_allavg`` in the published code of arXiv 2509.07558). [N] → [N]."""
    return seq_mean_token_sum(L) / M


def delta_l(L: Tensor, *, M: int, alpha: float, rollout_L: Tensor, **_: Any) -> Tensor:
    """∆L Normalization (arXiv 2509.07558; "VL Norm" in its version 2):

        w_i = 1/(N·M) · (L_i/L̄)^(−α) / mean_j (L_j/L̄)^(−α)

    The gradient of a response has a variance that grows like its length, so the unbiased
    combination of least variance has α = 1; a smaller α keeps more of the long responses.
    α = 0 is Dr. GRPO; α = 1 is GRPO Norm times one scalar per batch. The mean over j runs over
    `rollout_L`: the rollout batch in the published code, the mini-batch in the paper. L̄, the mean
    length, cancels out. Responses of length 0 stay out of the means. [N] → [N]."""
    count = torch.count_nonzero(rollout_L).clamp(min=1)
    mean_length = (rollout_L.sum() / count).clamp(min=1)

    def powers(x: Tensor) -> Tensor:  # of each length once, which is less than of each response
        each = torch.arange(int(x.max()) + 1 if len(x) else 1, dtype=x.dtype, device=x.device)
        table = (-alpha * (each.clamp(min=1) / mean_length).log()).exp()
        table[0] = 0.0
        return table.index_select(0, x.long())

    own = powers(L)
    others = own if rollout_L is L else powers(rollout_L)
    return own / (len(L) * M * others.sum() / count)


def response_weights(
    lengths: Sequence[int] | Tensor,
    max_response_length: int,
    alpha: float,
    rollout_lengths: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """The weights w_i of an optimizer step of N responses, whose loss is Σ_i w_i Σ_t ℓ_it: float32
    [N], 0 where L_i = 0. `lengths`: L_i, in tokens that count in the loss, [N];
    `max_response_length`: the configured M, in tokens; `alpha`: the exponent α, from 0 to 1;
    `rollout_lengths`: those of the whole rollout batch, which the step is a part of (None:
    `lengths`). Raises: ValueError for a negative length. Example: ``response_weights([2, 8], 10,
    1.0)`` is ``[0.08, 0.02]``."""
    L = torch.as_tensor(lengths, dtype=torch.float64)
    rollout_L = L if rollout_lengths is None else torch.as_tensor(rollout_lengths).to(L)
    if (L < 0).any() or (rollout_L < 0).any():
        raise ValueError("response lengths must not be negative")
    weights = delta_l(L, M=max_response_length, alpha=alpha, rollout_L=rollout_L)
    return torch.where(L > 0, weights, 0.0).float()


def advantage_scales(
    lengths: Sequence[int] | Tensor,
    alpha: float,
    rollout_lengths: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """N·M·w_i, float32 [N]: whoever multiplies the advantages by these, sums the token losses and
    divides the sum by N·M gets the loss and gradient of ∆L, since the losses of PPO's kind are
    proportional to the advantage as long as the factor is positive. N and M cancel out: the factors
    are the same for a whole rollout batch and for a step of it. Arguments: `response_weights`."""
    return len(lengths) * response_weights(lengths, 1, alpha, rollout_lengths)
