"""What a training step and a validation report, under verl's names (docs/metrics.md)."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain, combinations
from math import comb, sqrt
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from verl.protocol import OptimizerStep, Sample, response_lengths
from verl.utils.flops import ModelSize, update_flops

VAL_CORE = re.compile(r"val-core/(.+)/(acc|reward)/((?:mean|best|maj)@\d+)(?:/mean)?")
"""Data source, `acc` or (where a reward model scores) `reward`, and figure of a validation."""

TOKEN_PHASES = (
    "ref",
    "old_log_prob",
    "values",
    "adv",
    "update_critic",
    "update_actor",
)  # `gen` counts responses only
SHARED = ("grad_norm", "lr", "skipped")  # of an optimizer step, the same on all ranks


def data_metrics(samples: list[Sample], max_prompt_length: int) -> dict[str, float]:
    """Statistics of a train batch, lengths in tokens. Advantages, and a critic's values and
    returns, are those of all tokens; without a critic a response has one advantage, its return."""
    lengths, cut = response_lengths(samples), np.array([s.truncated for s in samples])
    prompt_lengths = np.array([len(s.prompt.token_ids) for s in samples])
    values: dict[str, NDArray[Any]] = {
        "critic/score": np.array([s.score for s in samples]),
        "critic/rewards": np.array([s.reward for s in samples]),
        "critic/advantages": np.array([s.advantage for s in samples]),
        "response_length": lengths,
        "prompt_length": prompt_lengths,
    }
    values["critic/returns"] = values["critic/advantages"]
    values["num_turns"] = np.full(len(samples), 2)  # as verl counts: a prompt and a response
    extras: dict[str, list[float]] = defaultdict(list)  # of the responses that have them
    for name, value in chain(*(s.extras.items() for s in samples)):
        if name != "pred" and isinstance(value, Real | np.bool_):  # an answer is no score
            extras[f"reward/{name}"].append(float(value))
    if lengths.any() and samples[0].values is not None:
        V, R = (
            np.concatenate([s.counted(np.asarray(getattr(s, name))) for s in samples])
            for name in ("values", "returns")
        )
        values |= {"critic/values": V, "critic/returns": R}
        values["critic/advantages"] = np.concatenate([s.advantages() for s in samples])
        extras["critic/vf_explained_var"] = [1 - np.var(R - V) / (np.var(R) + 1e-5)]
    if lengths.any():
        values["response_length_non_aborted"] = lengths[lengths > 0]
        extras["response_length_non_aborted/clip_ratio"] = cut[lengths > 0].tolist()
    figures = ("mean", "max", "min")
    return {
        **{f"{k}/{f}": float(getattr(x, f)()) for k, x in values.items() for f in figures},
        "response_length/clip_ratio": float(cut.mean()),
        "response/aborted_ratio": float(np.mean(lengths == 0)),
        "response_length/cv": float(lengths.std() / max(lengths.mean(), 1e-12)),
        "prompt_length/clip_ratio": float(np.mean(prompt_lengths >= max_prompt_length)),
        **{name: float(np.mean(numbers)) for name, numbers in extras.items()},
    }


def several_versions(samples: Sequence[Sample]) -> float:
    """The share of responses whose tokens more than one version of the policy drew."""
    return float(np.mean([s.token_versions is not None for s in samples]))


def age_metrics(samples: list[Sample], version: int) -> dict[str, float]:
    """How many training steps the policy that drew each token is older than the one that is trained
    now, after `version` steps."""
    means = [
        s.policy_version if s.token_versions is None else s.counted(s.token_versions).mean()
        for s in samples
    ]
    lengths = response_lengths(samples)
    mean = float(lengths @ (version - np.array(means))) / max(1, lengths.sum())
    return {
        "rollout/policy_age_mean": mean,
        "rollout/policy_age_max": float(version - min(s.policy_version for s in samples)),
    }


def speed_metrics(
    samples: list[Sample], seconds: Mapping[str, float], num_devices: int, filtering: bool = False
) -> dict[str, float]:
    """``timing_s/…`` of phases and `step`, ``timing_per_token_ms/…`` (but of `gen` if `filtering`:
    more responses are generated than trained on), and the tokens of the whole step."""
    total = sum(s.num_tokens for s in samples)
    tokens = dict.fromkeys(TOKEN_PHASES, total)
    tokens["gen"] = 0 if filtering else int(response_lengths(samples).sum())
    per_token = {k: 1000 * seconds[k] / n for k, n in tokens.items() if n and k in seconds}
    return {
        **{f"timing_s/{name}": float(x) for name, x in seconds.items()},
        **{f"timing_per_token_ms/{name}": x for name, x in per_token.items()},
        "perf/total_num_tokens": float(total),
        "perf/time_per_step": float(seconds["step"]),
        "perf/throughput": total / (seconds["step"] * num_devices),
    }


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


def validation_metrics(samples: list[Sample]) -> dict[str, float]:
    """Of each data source with P prompts: accuracies as mean@N, …, maj@N; scores and lengths. Where
    there are no accuracies the scores take their place, as verl's `reward` (`_validate`)."""
    by_source: dict[str, dict[int, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for s in samples:
        by_source[s.prompt.data_source][s.prompt.index].append(s)
    metrics: dict[str, Any] = {}
    for source, groups in by_source.items():
        core, aux, mine = f"val-core/{source}", f"val-aux/{source}", [*chain(*groups.values())]
        what = "acc" if all("acc" in s.extras for s in mine) else "reward"
        values = [s.extras["acc"] if what == "acc" else s.score for s in mine]
        acc_PN = np.array(values, np.float64).reshape(len(groups), -1)
        n = acc_PN.shape[1]
        metrics[f"{core}/{what}/mean@{n}"] = acc_PN.mean()
        if what == "acc":
            metrics[f"{aux}/reward/mean@{n}"] = np.mean([s.score for s in mine])
        metrics[f"{aux}/response_length/mean"] = response_lengths(mine).mean()
        metrics[f"{aux}/response_length/clip_ratio"] = np.mean([s.truncated for s in mine])
        if n == 1:
            continue
        metrics[f"{aux}/{what}/std@{n}"] = acc_PN.std(axis=1).mean()
        # Compared as text, so that an answer may be a list.
        votes = [[str(s.extras.get("pred")) for s in group] for group in groups.values()]
        for k in (*(2**i for i in range(1, (n - 1).bit_length())), n):
            where, best = core if k == n else aux, best_of(acc_PN, k)
            variance = best_of(acc_PN, k, power=2) - best**2
            metrics[f"{where}/{what}/best@{k}/mean"] = best.mean()
            metrics[f"{where}/{what}/best@{k}/std"] = np.sqrt(variance.clip(min=0)).mean()
            if all("pred" in s.extras for s in mine):
                winners = [majority_of(v, acc_N, k) for v, acc_N in zip(votes, acc_PN, strict=True)]
                metrics[f"{where}/{what}/maj@{k}/mean"] = np.mean(winners)
    return {name: float(value) for name, value in metrics.items()}


def best_of(values: ArrayLike, k: int, power: int = 1) -> NDArray[np.float64]:
    """Mean of the maximum (to a power) over all subsets of k of the N `values` [..., N], exactly.
    Of 0 and 1 this is the unbiased pass@k of Chen et al. (arXiv 2107.03374, eq. 1)."""
    # The i-th smallest value (from 0) is the maximum of C(i, k−1) of the C(N, k) subsets.
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n = ordered.shape[-1]
    return ordered**power @ [comb(i, k - 1) / comb(n, k) for i in range(n)]


@cache
def _subsets(n: int, k: int) -> NDArray[np.int64]:
    """Subsets of k of n positions, [D, k]: all, or 2,000 that never change."""
    if comb(n, k) <= 2000:
        return np.array(list(combinations(range(n), k)))
    return np.random.default_rng(0).permuted(np.tile(np.arange(n), (2000, 1)), axis=1)[:, :k]


def majority_of(votes: Sequence[str], values: NDArray[np.float64], k: int) -> float:
    """Mean value of the most frequent answer over subsets of k of the N `votes`: all of them, or
    2,000. An answer's is that of its first vote, `values` [N]; equally frequent ones share."""
    _, first, codes = np.unique(votes, return_index=True, return_inverse=True)
    drawn = codes[_subsets(len(votes), k)]  # [D, k]
    cells = (np.arange(len(drawn))[:, None] * len(first) + drawn).ravel()
    counts_DA = np.bincount(cells, minlength=len(drawn) * len(first)).reshape(len(drawn), -1)
    won_DA = counts_DA == counts_DA.max(axis=1, keepdims=True)
    return float((won_DA @ values[first] / won_DA.sum(axis=1)).mean())


def loss_agg_metrics(
    lengths: ArrayLike, weights_by_method: Mapping[str, ArrayLike], method: str
) -> dict[str, float]:
    """How noisy the gradient Σ_i w_i g_i is, for the aggregation in use (`method`) and the others:
    sqrt(Σ w_i² L_i) / Σ w_i, as the variance of g_i grows like the length L_i and its expectation
    doesn't (arXiv 2509.07558). Lengths, in tokens, and weights are [N]; only zeros: left out."""
    metrics = {}
    for name, weights in weights_by_method.items():
        w_N = np.asarray(weights, dtype=np.float64)
        if total := float(w_N.sum()):
            key = "loss_agg/cv" if name == method else f"loss_agg/cv/{name}"
            metrics[key] = sqrt(w_N**2 @ np.asarray(lengths)) / total
            if name == method:
                metrics["loss_agg/effective_batch"] = total**2 / float(w_N @ w_N)
    return metrics


def validation_scores(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The accuracy of each data source: ``val-core/{source}/acc/mean@N``."""
    matches = ((VAL_CORE.fullmatch(key), value) for key, value in metrics.items())
    return {m[1]: v for m, v in matches if m and m[2] == "acc" and m[3].startswith("mean@")}


def update_metrics(by_rank: list[list[dict[str, float]]], role: str = "actor") -> dict[str, float]:
    """Ranks' sums of each mini-batch → means over mini-batches; `role/skipped_steps`. Sums `w/…`
    carry the loss's weights; of `perf/…`, `…_max` and what ranks share the largest counts; others
    become means over tokens, those named `rollout/…` over `rollout/tokens`."""
    by_name: dict[str, list[float]] = defaultdict(list)
    for parts in zip(*by_rank, strict=True):  # one mini-batch, all ranks
        tokens, compared = (sum(p.get(k, 0) for p in parts) for k in ("tokens", "rollout/tokens"))
        for name in set[str]().union(*parts) - {"tokens", "rollout/tokens"}:
            values = [part[name] for part in parts if name in part]
            section, _, rest = name.rpartition("/")
            if section == "rollout" and not compared:
                continue
            if not (tokens or section in ("w", "perf") or name in SHARED):
                continue  # no response of this mini-batch went through the model
            if section == "w":
                value = sum(values)
            elif section == "perf" or name in SHARED or name.endswith("_max"):
                value = max(values)
            else:
                value = sum(values) / max(1.0, compared if section == "rollout" else tokens)
            by_name[name if section in ("rollout", "perf") else f"{role}/{rest}"].append(value)
    skipped = by_name.pop(f"{role}/skipped", None)
    means = {name: float(np.mean(values)) for name, values in by_name.items()}
    return means | ({f"{role}/skipped_steps": sum(skipped)} if skipped else {})
