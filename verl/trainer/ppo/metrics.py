"""What a training step and a validation report, under verl's names (docs/metrics.md)."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import comb, sqrt
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from verl.protocol import OptimizerStep, Sample, response_lengths
from verl.utils.flops import ModelSize, update_flops

VAL_CORE = re.compile(r"val-core/(.+)/(?:acc|reward)/((?:mean|best|maj)@\d+)(?:/mean)?")
"""Data source, and figure, of a validation metric."""

TOKEN_PHASES = ("ref", "old_log_prob", "adv", "update_actor")  # `gen` counts responses only


def data_metrics(samples: list[Sample], max_prompt_length: int) -> dict[str, float]:
    """Statistics of a train batch, lengths in tokens. A return is the advantage."""
    lengths = response_lengths(samples)
    prompt_lengths = np.array([len(s.prompt.token_ids) for s in samples])
    advantages = np.array([s.advantage for s in samples])
    values: dict[str, NDArray[Any]] = {
        "critic/score": np.array([s.score for s in samples]),
        "critic/rewards": np.array([s.reward for s in samples]),
        "critic/advantages": advantages,
        "critic/returns": advantages,
        "response_length": lengths,
        "prompt_length": prompt_lengths,
    }
    figures = ("mean", "max", "min")
    return {
        **{f"{k}/{f}": float(getattr(x, f)()) for k, x in values.items() for f in figures},
        "response_length/clip_ratio": float(np.mean([s.truncated for s in samples])),
        "response_length/cv": float(lengths.std() / max(lengths.mean(), 1e-12)),
        "prompt_length/clip_ratio": float(np.mean(prompt_lengths >= max_prompt_length)),
        **_extras_means(samples),
    }


def timing_metrics(
    samples: list[Sample], timings: Mapping[str, float], filtering: bool = False
) -> dict[str, float]:
    """``timing_s/…`` in seconds, and ``timing_per_token_ms/…``. With `algorithm.filter_groups`
    (`filtering`) `gen` has none: other responses are generated than those that are trained on."""
    tokens = dict.fromkeys(TOKEN_PHASES, sum(s.num_tokens for s in samples))
    tokens["gen"] = 0 if filtering else sum(s.length for s in samples)
    metrics = {f"timing_s/{name}": float(seconds) for name, seconds in timings.items()}
    for name in tokens.keys() & timings.keys():
        if tokens[name]:
            metrics[f"timing_per_token_ms/{name}"] = 1000 * timings[name] / tokens[name]
    return metrics


def mfu_metrics(
    size: ModelSize | None, steps: Sequence[OptimizerStep], seconds: float, peak: float | None
) -> dict[str, float]:
    """``perf/mfu``: the share of what all devices could have computed in the update's `seconds`, at
    `peak` operations a second, that its passes need. Left out where size or peak is not known."""
    if size is None or peak is None:
        return {}
    samples = [s for step in steps for s in step.samples]
    responses = response_lengths(samples)
    others = np.array([s.num_tokens for s in samples]) - responses  # which are only read
    return {"perf/mfu": update_flops(size, others, responses) / (seconds * peak)}


def throughput_metrics(
    samples: list[Sample], step_seconds: float, num_devices: int
) -> dict[str, float]:
    """Tokens that are trained on, over the whole step and all devices."""
    tokens = sum(s.num_tokens for s in samples)
    return {
        "perf/total_num_tokens": float(tokens),
        "perf/time_per_step": float(step_seconds),
        "perf/throughput": tokens / (step_seconds * num_devices),
    }


def validation_metrics(samples: list[Sample]) -> dict[str, float]:
    """Accuracy of each data source: a figure of a prompt's N responses, averaged over prompts."""
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
    """Mean of the maximum over all subsets of k of the N `values`, 1 ≤ k ≤ N, exactly. For values
    of 0 and 1 this is the unbiased pass@k of Chen et al. (arXiv 2107.03374, eq. 1)."""
    # The i-th smallest value (from 0) is the maximum of C(i, k−1) of the C(N, k) subsets.
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n = len(ordered)
    return float(sum(v * (comb(i, k - 1) / comb(n, k)) for i, v in enumerate(ordered)))


def loss_agg_metrics(
    lengths: ArrayLike, weights_by_method: Mapping[str, ArrayLike], method: str
) -> dict[str, float]:
    """How noisy the gradient Σ_i w_i g_i is, for the aggregation in use and for the others:
    sqrt(Σ w_i² L_i) / Σ w_i, as the variance of g_i grows like the length L_i and its expectation
    doesn't (arXiv 2509.07558). Methods whose weights are all 0 are left out.

    `lengths`: in tokens, [N]. `weights_by_method`: [N] each. `method`: the one in use.
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


def validation_scores(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The accuracy of each data source: ``val-core/{source}/{acc or reward}/mean@N``."""
    matches = ((VAL_CORE.fullmatch(key), value) for key, value in metrics.items())
    return {m[1]: value for m, value in matches if m and m[2].startswith("mean@")}


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
        scores = np.array([s.score for s in group])
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


def _extras_means(samples: list[Sample]) -> dict[str, float]:
    """Means over the responses that have the extra. `pred` is an answer, no score."""
    values: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        for name, value in sample.extras.items():
            if name != "pred" and isinstance(value, Real | np.bool_):
                values[f"reward/{name}"].append(float(value))
    return {name: float(np.mean(v)) for name, v in values.items()}


def update_metrics(by_rank: list[list[dict[str, float]]]) -> dict[str, float]:
    """Ranks' sums of each mini-batch → `actor/…` and `rollout/…` means over mini-batches.

    Sums named `w/…` already carry the weights of the loss; the others become means over tokens,
    those named `rollout/…` over `rollout/tokens`. Of `perf/…` and `…_max` it is the largest.
    `actor/skipped_steps` counts the mini-batches that a rank skipped.
    """
    by_name: dict[str, list[float]] = defaultdict(list)
    for parts in zip(*by_rank, strict=True):  # one mini-batch, all ranks
        tokens, compared = (sum(p.get(k, 0) for p in parts) for k in ("tokens", "rollout/tokens"))
        for name in {name for part in parts for name in part} - {"tokens", "rollout/tokens"}:
            engines = name.startswith("rollout/")
            if engines and not compared:
                continue
            values = [part[name] for part in parts if name in part]
            if name in ("grad_norm", "lr"):
                value = values[0]
            elif name == "skipped" or name.startswith("perf/") or name.endswith("_max"):
                value = max(values)
            elif name.startswith("w/"):
                value = sum(values)
            else:
                value = sum(values) / max(1.0, compared if engines else tokens)
            key = name.removeprefix("w/")
            by_name[key if key.startswith(("rollout/", "perf/")) else f"actor/{key}"].append(value)
    skipped = by_name.pop("actor/skipped", None)
    means = {name: float(np.mean(values)) for name, values in by_name.items()}
    return means | ({"actor/skipped_steps": sum(skipped)} if skipped else {})
