"""Every aggregation of the loss is one weight per response, once for a whole optimizer step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from verl.algorithms.advantages import group_max, group_statistics
from verl.algorithms.exponent import UNTIL_THEN
from verl.config.schema import Config

Lengths = Sequence[int] | NDArray[Any] | Tensor


def response_weights(
    lengths: Lengths,
    mode: str,
    max_response_length: int,
    alpha: float = 0.0,
    rollout_lengths: Lengths | None = None,
    group_size: int | None = None,
    groups: Lengths | None = None,
) -> Tensor:
    """The weights w_i of an optimizer step, float32 [N], 0 where L_i = 0. `lengths`: L_i in tokens,
    [N]; `mode`: a key of `WEIGHTS`; `max_response_length`: the configured M, in tokens. `delta-l`
    takes the exponent `alpha`, and `rollout_lengths`, of the whole rollout batch (None: `lengths`);
    `lambda-grpo` takes `alpha`, and `groups`, [N] (equal integers: the same prompt; None: all are
    one); `token-mean-legacy` takes `group_size`, in responses. Raises: ValueError for another mode,
    a negative length, no group_size. Example: ``response_weights([2, 8], "token-mean", 10)`` is
    ``[0.1, 0.1]``."""
    if mode not in WEIGHTS:
        raise ValueError(f"mode={mode!r}: choose one of {', '.join(WEIGHTS)}")
    L = torch.as_tensor(lengths, dtype=torch.float64)
    rollout_L = torch.as_tensor(L if rollout_lengths is None else rollout_lengths, dtype=L.dtype)
    if any(len(x) and x.min() < 0 for x in (L, rollout_L)):
        raise ValueError("response lengths must not be negative")
    prompts = L.new_zeros(1).expand_as(L) if groups is None else torch.as_tensor(groups)
    options = {"alpha": alpha, "rollout_L": rollout_L, "group_size": group_size, "groups": prompts}
    weights = WEIGHTS[mode](L, M=max_response_length, **options)
    return weights.float().masked_fill_(L == 0, 0.0)


def token_mean(L: Tensor, **_: Any) -> Tensor:
    """DAPO Norm (arXiv 2503.14476, eq. 8): 1 / Σ_j L_j, the mean over all tokens. [N] → [N]."""
    return torch.ones_like(L) / L.sum().clamp(min=1)


def token_mean_legacy(L: Tensor, *, group_size: int | None, **_: Any) -> Tensor:
    """1 / (G · Σ_{j in group} L_j) for G consecutive groups of `group_size` responses, [N] → [N]:
    the "DAPO Norm" of arXiv 2509.07558's experiments, a mean for each micro-batch."""
    if not group_size:
        raise ValueError("token-mean-legacy needs group_size, the responses of a micro-batch")
    groups = L.split(group_size)
    return torch.cat([token_mean(group) for group in groups]) / max(len(groups), 1)


def seq_mean_token_mean(L: Tensor, **_: Any) -> Tensor:
    """GRPO Norm (arXiv 2402.03300, eq. 3): 1 / (N·L_i), the mean of responses' means. [N] → [N]."""
    return 1 / (len(L) * L.clamp(min=1))


def token_sum(L: Tensor, **_: Any) -> Tensor:
    """1: the sum over all tokens (verl 0.10's `token-sum`). [N] → [N]."""
    return torch.ones_like(L)


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


def lambda_grpo(L: Tensor, *, alpha: float, groups: Tensor, **_: Any) -> Tensor:
    """λ-GRPO (arXiv 2510.06870), with a fixed exponent λ = −α, which the paper learns:

        w_i = G·softmax_i(h^λ) / Σ_j L_j,  h_i = 1 + z_i/9,  z_i = (L_i − mean) / std

    Softmax, mean and standard deviation (biased) run over the G responses to the same prompt; h is
    at least 1e-6. α = 0 is DAPO Norm; a larger α prefers short responses. [N] → [N]."""
    mean, std, count = group_statistics(L, groups)
    biased = std * ((count - 1).clamp(min=0) / count).sqrt()
    h = (1 + (L - mean) / biased.clamp(min=1e-8) / 9).clamp(min=1e-6)
    powers = h**-alpha
    shares = torch.exp(powers - group_max(powers, groups))
    return shares / group_statistics(shares, groups)[0] * token_mean(L)


WEIGHTS: dict[str, Callable[..., Tensor]] = {
    "token-mean": token_mean,
    "token-mean-legacy": token_mean_legacy,
    "token-sum": token_sum,
    "seq-mean-token-mean": seq_mean_token_mean,
    **dict.fromkeys(("seq-mean-token-sum", "luspo"), seq_mean_token_sum),
    "seq-mean-token-sum-norm": dr_grpo,
    "lambda-grpo": lambda_grpo,
    "dr-grpo": dr_grpo,
    "delta-l": delta_l,
}


@dataclass(frozen=True, slots=True)
class LossAggregation:
    """The aggregation flags, resolved once at start: all that the maths sees of them."""

    mode: str  # a key of WEIGHTS
    max_response_length: int  # M, in tokens
    alpha: float = 0.0  # exponent of ∆L, also where ∆L is only compared with, and of λ-GRPO
    auto: bool = False  # whether each step chooses that anew, by measured gradients
    scope: str = "batch"  # lengths that ∆L averages over: batch (rollout batch) or mini_batch
    # Whether grpo's advantages are divided by the group's standard deviation; `batch`: the batch's.
    norm_by_std: bool | str = True
    group_size: int | None = None  # responses per micro-batch of token-mean-legacy
    regularizer_mode: str | None = None  # of KL loss and entropy bonus; None: `mode`

    def weights(
        self,
        lengths: Lengths,
        groups: Lengths,
        rollout_lengths: Lengths | None = None,
        mode: str | None = None,
    ) -> NDArray[np.float32]:
        """`response_weights` of an optimizer step, [N]; with another `mode`, to be compared."""
        mode, M = mode or self.mode, self.max_response_length
        others = rollout_lengths if self.scope == "batch" else None
        options = self.alpha, others, self.group_size, groups
        return response_weights(lengths, mode, M, *options).numpy()


def resolve_aggregation(config: Config) -> LossAggregation:
    """Turns loss_agg_mode, use_dr_grpo, use_grpopp and grpopp_config into one value object."""
    algorithm, actor = config.algorithm, config.actor_rollout_ref.actor
    mode = "dr-grpo" if algorithm.use_dr_grpo else actor.loss_agg_mode
    mode = "delta-l" if algorithm.use_grpopp else mode
    auto = algorithm.grpopp_config.alpha == "auto"
    return LossAggregation(
        mode=mode,
        max_response_length=config.data.max_response_length,
        alpha=UNTIL_THEN if auto else algorithm.grpopp_config.alpha,
        auto=auto and mode == "delta-l",
        scope=algorithm.grpopp_config.scope,
        norm_by_std=not algorithm.use_dr_grpo and algorithm.norm_adv_by_std_in_grpo,
        group_size=actor.ppo_micro_batch_size_per_gpu if mode == "token-mean-legacy" else None,
        regularizer_mode=actor.regularizer_agg_mode,
    )
