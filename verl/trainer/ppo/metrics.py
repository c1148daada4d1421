"""What a training step and a validation report, under verl's metric names.

Pure functions from `list[Sample]` to ``{name: float}``. Everything is per response: outcome rewards
make score, reward and advantage one number each (verl averages advantages and returns over
response tokens; here each response counts once).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import comb, sqrt
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from verl.protocol import Sample, column, response_lengths
from verl.utils.flops import update_flops

# Phases whose cost grows with the tokens of prompt and response; `gen` only with the response.
TOKEN_PHASES = ("ref", "old_log_prob", "adv", "update_actor")


def data_metrics(samples: list[Sample], max_prompt_length: int) -> dict[str, float]:
    """Statistics of one train batch.

    * ``critic/{score,rewards,advantages,returns}/{mean,max,min}``; an outcome reward's return is
      its advantage.
    * ``{response,prompt}_length/{mean,max,min}`` in tokens. ``response_length/clip_ratio`` is the
      share of truncated responses (a response that ends with its end-of-sequence token in the last
      place is not one), ``prompt_length/clip_ratio`` the share of prompts of `max_prompt_length`
      tokens, ``response_length/cv`` the standard deviation over the mean.
    * ``reward/{name}``: mean of every numeric value that the reward function returned.
    """
    lengths = response_lengths(samples)
    prompt_lengths = np.array([len(s.prompt.token_ids) for s in samples])
    advantages = column(samples, "advantage")
    return {
        **_spread("critic/score", column(samples, "score")),
        **_spread("critic/rewards", column(samples, "reward")),
        **_spread("critic/advantages", advantages),
        **_spread("critic/returns", advantages),
        **_spread("response_length", lengths),
        "response_length/clip_ratio": float(np.mean([s.truncated for s in samples])),
        "response_length/cv": float(lengths.std() / max(lengths.mean(), 1e-12)),
        **_spread("prompt_length", prompt_lengths),
        "prompt_length/clip_ratio": float(np.mean(prompt_lengths >= max_prompt_length)),
        **_extras_means(samples),
    }


def timing_metrics(
    samples: list[Sample], timings: Mapping[str, float], filtering: bool = False
) -> dict[str, float]:
    """``timing_s/{phase}`` as measured (seconds), and ``timing_per_token_ms/{phase}``.

    The latter only for phases that process tokens: `gen` per response token, the others
    (`TOKEN_PHASES`) per token of prompt and response. With `algorithm.filter_groups` (`filtering`)
    not for `gen`: other responses are generated than those that are trained on.
    """
    tokens = dict.fromkeys(TOKEN_PHASES, sum(s.num_tokens for s in samples))
    tokens["gen"] = 0 if filtering else sum(s.length for s in samples)
    per_token = {
        f"timing_per_token_ms/{name}": 1000 * seconds / tokens[name]
        for name, seconds in timings.items()
        if tokens.get(name)
    }
    return {f"timing_s/{name}": float(seconds) for name, seconds in timings.items()} | per_token


def mfu_metrics(
    model: dict[str, Any], steps: Sequence[Sequence[Sample]], seconds: float, peak_flops: float
) -> dict[str, float]:
    """``perf/mfu``: model flops utilization of the update, the share of what all devices could have
    computed in its `seconds` that forward and backward pass need (`verl.utils.flops.update_flops`).

    Args:
        model: the content of config.json. steps: the samples of each optimizer step.
        peak_flops: operations a second of all devices together.
    """
    samples = [s for step in steps for s in step]
    prompts, responses = [len(s.prompt.token_ids) for s in samples], response_lengths(samples)
    mfu = update_flops(model, prompts, responses) / (seconds * peak_flops)
    return {"perf/mfu": mfu}


def throughput_metrics(
    samples: list[Sample], step_seconds: float, num_devices: int
) -> dict[str, float]:
    """``perf/total_num_tokens`` (prompts and responses), ``perf/time_per_step`` in seconds, and
    ``perf/throughput`` in tokens per second per device, those of the engines included: tokens that
    are trained on, over the whole step. What `algorithm.filter_groups` drops takes time and doesn't
    count."""
    tokens = sum(s.num_tokens for s in samples)
    return {
        "perf/total_num_tokens": float(tokens),
        "perf/time_per_step": float(step_seconds),
        "perf/throughput": tokens / (step_seconds * num_devices),
    }


def validation_metrics(samples: list[Sample]) -> dict[str, float]:
    """Accuracy of each data source: mean over its prompts of a figure of the prompt's N responses.

    The variable is `acc` if the reward function returns one, else `reward` (the score).

    * ``val-core/{source}/acc/mean@N``; for N > 1 also ``best@N/mean`` (the best of N), and
      ``maj@N/mean`` if every response has an extra `pred`: the accuracy of the most frequent
      answer, the one that came first if several are. An answer of None votes like any other.
    * ``val-aux/{source}/acc/``: ``std@N``, and ``best@k/mean`` for k = 2, 4, 8, … < N.
    * ``val-aux/{source}/reward/mean@N`` next to acc, and
      ``val-aux/{source}/response_length/{mean,clip_ratio}`` as in `data_metrics`.

    The names are verl's, which estimates best@k from 1000 draws with replacement; here it is the
    exact mean over all subsets of k responses (`best_of`).
    """
    by_source: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_source[sample.prompt.data_source].append(sample)
    metrics: dict[str, float] = {}
    for source, mine in by_source.items():
        metrics |= _accuracy_metrics(source, mine)
        aux = f"val-aux/{source}/response_length"
        metrics[f"{aux}/mean"] = float(response_lengths(mine).mean())
        metrics[f"{aux}/clip_ratio"] = float(np.mean([s.truncated for s in mine]))
    return metrics


def best_of(values: ArrayLike, k: int) -> float:
    """Mean of the maximum over all subsets of k of the N `values`, 1 ≤ k ≤ N, exactly.

    The i-th smallest value (from 0) is the maximum of C(i, k−1) of the C(N, k) subsets. For values
    of 0 and 1 this is the unbiased pass@k of Chen et al. (arXiv 2107.03374, eq. 1).
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n = len(ordered)
    return float(sum(v * (comb(i, k - 1) / comb(n, k)) for i, v in enumerate(ordered)))


def loss_agg_metrics(
    lengths: ArrayLike, weights_by_method: Mapping[str, ArrayLike], method: str
) -> dict[str, float]:
    """How noisy the gradient Σ_i w_i g_i is, for the aggregation in use and for the others.

    The variance of a response's gradient g_i grows like its length L_i and its expectation doesn't
    depend on it, so the standard deviation of the sum over its mean is proportional to
    sqrt(Σ w_i² L_i) / Σ w_i (arXiv 2509.07558). A weight of 0 leaves a response out; a
    method whose weights are all 0 is left out itself.

    Args:
        lengths: in tokens, [N]. weights_by_method: the weights w on these responses, [N] each.

    Returns: ``loss_agg/cv`` of `method`, the one in use, ``loss_agg/cv/{name}`` of each other one,
    and ``loss_agg/effective_batch`` = (Σ w_i)² / Σ w_i² of `method`, in responses.
    """
    metrics = {}
    for name, weights in weights_by_method.items():
        w_N = np.asarray(weights, dtype=np.float64)
        total = w_N.sum()
        if total == 0:
            continue
        key = "loss_agg/cv" if name == method else f"loss_agg/cv/{name}"
        metrics[key] = sqrt(w_N**2 @ np.asarray(lengths)) / float(total)
        if name == method:
            metrics["loss_agg/effective_batch"] = float(total**2 / (w_N @ w_N))
    return metrics


def _accuracy_metrics(source: str, samples: list[Sample]) -> dict[str, float]:
    """mean@N, std@N, best@k and maj@N of one data source, averaged over its prompts."""
    has_acc, has_pred = (all(key in s.extras for s in samples) for key in ("acc", "pred"))
    variable = "acc" if has_acc else "reward"
    core, aux = f"val-core/{source}/{variable}", f"val-aux/{source}/{variable}"
    groups: dict[tuple[int, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        # Group numbers count anew in each rollout batch, rows of the dataset don't.
        groups[sample.prompt.index, sample.group].append(sample)
    n_max = max(map(len, groups.values()))
    per_prompt: dict[str, list[float]] = defaultdict(list)
    for group in groups.values():
        n = len(group)
        section = core if n == n_max else aux
        scores = column(group, "score")
        values = np.array([s.extras["acc"] for s in group], np.float64) if has_acc else scores
        per_prompt[f"{section}/mean@{n}"].append(values.mean())
        if has_acc:
            per_prompt[f"val-aux/{source}/reward/mean@{n}"].append(scores.mean())
        if n == 1:
            continue
        per_prompt[f"{aux}/std@{n}"].append(values.std())
        for k in (2**i for i in range(1, (n - 1).bit_length())):
            per_prompt[f"{aux}/best@{k}/mean"].append(best_of(values, k))
        per_prompt[f"{section}/best@{n}/mean"].append(values.max())
        if has_pred:
            # Compared as text, so that an answer may be a list. Ties go to the earlier answer.
            votes = [str(s.extras["pred"]) for s in group]
            majority = votes.index(max(votes, key=votes.count))
            per_prompt[f"{section}/maj@{n}/mean"].append(values[majority])
    return {name: float(np.mean(values)) for name, values in per_prompt.items()}


def _spread(name: str, values: NDArray[Any]) -> dict[str, float]:
    return {f"{name}/{f}": float(getattr(values, f)()) for f in ("mean", "max", "min")}


def _extras_means(samples: list[Sample]) -> dict[str, float]:
    """Means over the responses that have the extra. `pred` is an answer, no score."""
    values: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        for name, value in sample.extras.items():
            if name != "pred" and isinstance(value, Real | np.bool_):
                values[f"reward/{name}"].append(float(value))
    return {name: float(np.mean(v)) for name, v in values.items()}


def reduce_update_metrics(by_rank: list[list[dict[str, float]]]) -> dict[str, float]:
    """Ranks' sums of each mini-batch → `actor/…` and `rollout/…` means over mini-batches.

    Sums named `w/…` already carry the weights of the loss; the others become means over tokens,
    those named `rollout/…` over `rollout/tokens`. Of `perf/…` and `…_max` it is the largest.
    """
    totals: dict[str, list[float]] = {}
    for parts in zip(*by_rank, strict=True):  # one mini-batch, all ranks
        tokens, compared = (sum(p.get(k, 0) for p in parts) for k in ("tokens", "rollout/tokens"))
        for name in {name for part in parts for name in part} - {"tokens", "rollout/tokens"}:
            values = [part[name] for part in parts if name in part]
            if name in ("grad_norm", "lr"):
                value = values[0]
            elif name.startswith("perf/") or name.endswith("_max"):
                value = max(values)
            elif name.startswith("w/"):
                value = sum(values)
            else:
                count = compared if name.startswith("rollout/") else tokens
                value = sum(values) / max(1.0, count)
            if compared or not name.startswith("rollout/"):
                totals.setdefault(name.removeprefix("w/"), []).append(value)
    return {
        name if name.startswith(("rollout/", "perf/")) else f"actor/{name}": float(np.mean(values))
        for name, values in totals.items()
    }
