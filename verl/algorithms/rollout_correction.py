"""The engines that draw the tokens are not quite the actor: weights, rejection and metrics of a
whole rollout batch, under verl's names. N responses lie one after another, T counted tokens in all;
`log_ratio`, [T], is log π_old − log π_rollout. Sources: verl 0.7 and 0.8 (`rollout_corr_helper`);
Liu et al. 2025, "When Speed Kills Stability"; Yao et al. 2025, "Your Efficient RL Framework
Secretly Brings You Off-Policy RL Training"."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from verl.config.rollout_correction import Rejection, RolloutCorrectionConfig, rejections

SAFE = 20.0  # bounds logarithms, so that exp stays finite
BLOCK = 256  # responses whose tokens are looked at together: fresh memory is slower than the maths

DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda log_ratio: -log_ratio,
    "k2": lambda log_ratio: 0.5 * log_ratio**2,
    "k3": lambda log_ratio: log_ratio.exp() - 1 - log_ratio,
}
"""Of the actor from the engine, at a token."""


def response_of_token(lengths: Tensor) -> Tensor:
    """Which response each token belongs to, [N] → [T]."""
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def _sums(values: Tensor, lengths: Tensor) -> Tensor:
    """Of each response's tokens, [T] → [N]."""
    if not len(lengths):  # which it can't take
        return values.new_zeros(0)
    return torch.segment_reduce(values, "sum", lengths=lengths, initial=0)


def rollout_is_weights(log_ratio: Tensor, lengths: Tensor, level: str, threshold: float) -> Tensor:
    """Truncated importance-sampling weights, min(π_old/π_rollout, threshold), constants, [T]
    (Ionides 2008, doi:10.1198/106186008X320456, eq. 4). `level`: `token`, or `sequence`: the
    product of the ratios over the tokens of a response; their `lengths`, [N], add up to T."""
    log_ratio = log_ratio.detach()
    if level == "sequence":
        log_ratio = _sums(log_ratio, lengths).repeat_interleave(lengths)
    return log_ratio.clamp(max=math.log(threshold)).exp()


def correct(
    old: Tensor, rollout: Tensor, lengths: Tensor, weighted: Tensor, config: RolloutCorrectionConfig
) -> tuple[Tensor, dict[str, float]]:
    """Which tokens stay in the loss, bool [T], and all metrics of a batch. `old`, `rollout`:
    log-probabilities of actor and engine, [T]; `weighted`: the responses whose loss has
    `rollout_is_weights`, bool [N]. Its `rollout_is_batch_norm_factor` makes their mean 1."""
    kept = torch.ones_like(old, dtype=torch.bool)
    if not len(old):
        return kept, {}
    metrics = off_policy_metrics(old, rollout, lengths)
    rules, veto = rejections(config), config.rollout_token_veto_threshold
    if rules or veto is not None or config.rollout_is:
        log_ratio = old.double() - rollout.double()
        kept, shares = kept_tokens(log_ratio, lengths, rules, veto)
        metrics |= shares
    if config.rollout_is:
        used = log_ratio * weighted.repeat_interleave(lengths)
        metrics |= weight_metrics(used, lengths, config.rollout_is, config.rollout_is_threshold)
        if not config.rollout_is_batch_normalize:
            del metrics["rollout_is_batch_norm_factor"]
    return kept, metrics


def kept_tokens(
    log_ratio: Tensor, lengths: Tensor, rules: Sequence[Rejection], veto: float | None = None
) -> tuple[Tensor, dict[str, float]]:
    """Which tokens stay in the loss, bool [T], and shares of the others. A token stays if it is
    within the bounds of all `rules`, and no token of its response has a ratio below `veto`."""
    bounded = log_ratio.clamp(-SAFE, SAFE)
    kept = torch.ones_like(log_ratio, dtype=torch.bool)
    metrics: dict[str, float] = {}

    def shares(name: str, rejected: Tensor) -> dict[str, float]:
        some = _sums(rejected.double(), lengths)[lengths > 0] > 0
        found = {"": rejected, "seq_": some}
        return {f"{name}_{k}masked_fraction": x.double().mean().item() for k, x in found.items()}

    for rule in rules:
        values = DIVERGENCES[rule.estimator](bounded)
        if rule.level == "seq_max":  # of numbers that are never negative
            most = torch.segment_reduce(values, "max", lengths=lengths, initial=0)
            values = most.repeat_interleave(lengths)
        elif rule.level != "token":
            counts = lengths.clamp(min=1) if rule.level == "seq_mean" else 1
            values = (_sums(values, lengths) / counts).repeat_interleave(lengths)
        within = (values >= rule.low) & (values <= rule.high)
        name = f"rollout_rs_{rule.name}"
        metrics |= {f"{name}_mean": values.mean().item(), **shares(name, ~within)}
        kept &= within
    if rules:
        metrics |= shares("rollout_rs", ~kept)
    if veto is not None:
        fatal = log_ratio < math.log(veto)
        vetoed = _sums(fatal.double(), lengths) > 0
        metrics["rollout_is_catastrophic_token_fraction"] = fatal.double().mean().item()
        metrics["rollout_is_veto_fraction"] = vetoed.double().mean().item()
        kept &= ~vetoed.repeat_interleave(lengths)
    return kept, metrics


def weight_metrics(
    log_ratio: Tensor, lengths: Tensor, level: str, threshold: float
) -> dict[str, float]:
    """What `rollout_is_weights` are before they are truncated. `…_batch_norm_factor` is the mean of
    the truncated ones: over tokens or, at level `sequence`, over responses."""
    weights = each = log_ratio.clamp(-SAFE, SAFE).exp()
    if level == "sequence":
        each = _sums(log_ratio, lengths).clamp(-SAFE, SAFE).exp()
        weights, each = each.repeat_interleave(lengths), each[lengths > 0]
    bounded = weights.clamp(1 / threshold, threshold)
    numbers = {
        "mean": weights.mean(),
        "max": each.max(),
        "min": each.min(),
        "std": bounded.std(correction=0),
        "eff_sample_size": bounded.mean() ** 2 / (bounded**2).mean(),
        "ratio_fraction_high": (each > threshold).double().mean(),
        "ratio_fraction_low": (each < 1 / threshold).double().mean(),
        "batch_norm_factor": each.clamp(max=threshold).mean(),
    }
    return {f"rollout_is_{name}": x.item() for name, x in numbers.items()}


def off_policy_metrics(old: Tensor, rollout: Tensor, lengths: Tensor) -> dict[str, float]:
    """How far engine and actor are apart; `old`, `rollout`: log-probabilities, [T]. Perplexities
    (`…ppl`) are means over responses, `chi2_…` E[ratio²] − 1 of tokens and of responses."""
    lengths = lengths[lengths > 0]
    blocks, sums, totals = lengths.split(BLOCK), [], []
    sizes = [int(L.sum()) for L in blocks]
    for L, o, r in zip(blocks, old.split(sizes), rollout.split(sizes), strict=True):
        o, r, starts = o.double(), r.double(), (L.cumsum(0) - L).numpy()
        # A quarter of the time of `segment_reduce`.
        sums.append(np.stack([np.add.reduceat(x.numpy(), starts) for x in (o, r)]))
        bounded = (o - r).clamp_(-SAFE, SAFE)
        excess = bounded.expm1()  # of the ratio over 1
        totals.append(torch.stack([excess.sum() - bounded.sum(), excess @ (excess + 2)]))
    of_old, of_rollout = torch.from_numpy(np.concatenate(sums, 1))  # of the responses
    k3, chi2 = torch.stack(totals).sum(0)
    nll, engine_nll, product = -of_old / lengths, -of_rollout / lengths, of_old - of_rollout
    difference, tokens = nll - engine_nll, lengths.sum()
    numbers = {
        "kl": -product.sum() / tokens,
        "k3_kl": k3 / tokens,
        "training_ppl": nll.exp().mean(),
        "training_log_ppl": nll.mean(),
        "rollout_ppl": engine_nll.exp().mean(),
        "rollout_log_ppl": engine_nll.mean(),
        "log_ppl_diff": difference.mean(),
        "log_ppl_abs_diff": difference.abs().mean(),
        "log_ppl_diff_max": difference.max(),
        "log_ppl_diff_min": difference.min(),
        "ppl_ratio": difference.exp().mean(),
        "chi2_token": chi2 / tokens,
        "chi2_seq": (2 * product.clamp(-SAFE, SAFE)).exp().mean() - 1,
    }
    return {name: x.item() for name, x in numbers.items()}
