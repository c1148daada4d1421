"""How sure one can be of what `gradients` measured: which method's gradients are noisier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.aggregation_study.gradients import METHODS, Measurement, coefficient_of_variation

Key = tuple[str, int]  # (method or policy, seed)
NAMES = [method.name for method in METHODS]
REFERENCE = "Dr. GRPO Norm"
"""Whose noise that of the others is compared with: all its weights are the same."""
BOOTSTRAP = 2000


@dataclass
class Noise:
    """How noisy the gradients of the M methods are, for one policy and seed, or the mean of all."""

    policy: str
    seed: str
    cv: NDArray[np.float64]
    """Coefficients of variation, [M]."""
    draws: NDArray[np.float64]
    """Of bootstrap resamples, [BOOTSTRAP, M]."""
    predicted: NDArray[np.float64]
    """√(Σ w² L) / Σ w, mean over the batches, [M]."""

    def rows(self) -> list[dict[str, Any]]:
        """A row per method."""
        r = NAMES.index(REFERENCE)
        found = []
        with np.errstate(invalid="ignore"):
            ratios = self.draws / self.draws[:, r, None]
        for i, name in enumerate(NAMES):
            (low, high), (relative_low, relative_high) = (
                middle(self.draws[:, i]),
                middle(ratios[:, i]),
            )
            found.append(
                {
                    "policy": self.policy,
                    "seed": self.seed,
                    "method": name,
                    "cv": self.cv[i],
                    "cv_low": low,
                    "cv_high": high,
                    "relative": self.cv[i] / self.cv[r],
                    "relative_low": relative_low,
                    "relative_high": relative_high,
                    "predicted_relative": self.predicted[i] / self.predicted[r],
                }
            )
        return found

    def least(self) -> str:
        """Which method has the least noise, and which can't be told from it."""
        best = int(np.argmin(self.cv))
        with np.errstate(invalid="ignore"):
            lows = [middle(self.draws[:, i] / self.draws[:, best])[0] for i in range(len(NAMES))]
        others = [name for i, name in enumerate(NAMES) if i != best and not lows[i] > 1]
        text = f"Least noise: {NAMES[best]}"
        return text + (f"; not told apart from it: {', '.join(others)}." if others else ".")


def noise_of(measurements: Mapping[Key, Measurement]) -> list[Noise]:
    """Of each policy: each seed's, then the mean over the seeds (`seed` "all")."""
    rng = np.random.default_rng(0)
    found = []
    for policy in dict.fromkeys(policy for policy, _ in measurements):
        seeds = [
            Noise(
                policy,
                str(seed),
                np.array([coefficient_of_variation(gram) for gram in m.grams]),
                bootstrap(m.grams, rng),
                m.predicted.mean(1),
            )
            for (name, seed), m in measurements.items()
            if name == policy
        ]
        means = (np.mean([getattr(s, x) for s in seeds], 0) for x in ("cv", "draws", "predicted"))
        found += [*seeds, Noise(policy, "all", *means)]
    return found


def bootstrap(grams: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Coefficients of variation of BOOTSTRAP resamples of the K batches, each resample the same for
    all M methods, [M, K, K] → [BOOTSTRAP, M].

    A batch that is drawn twice makes a pair with itself; such pairs are left out.
    """
    k = grams.shape[1]
    values = []
    for _ in range(BOOTSTRAP):
        chosen = rng.integers(k, size=k)
        sub, same = grams[:, chosen[:, None], chosen], chosen[:, None] == chosen
        square = sub[:, range(k), range(k)].mean(1)
        mean_square = np.maximum(sub[:, ~same].mean(1), 0)
        with np.errstate(divide="ignore"):  # the mean can't be told from 0: inf
            values.append(np.sqrt(np.maximum(square - mean_square, 0) / mean_square))
    return np.array(values)


def middle(values: NDArray[np.float64]) -> tuple[float, float]:
    """The interval that holds the middle 95 % of the values; what is not a number counts as inf."""
    low, high = np.quantile(np.nan_to_num(values, nan=np.inf), [0.025, 0.975], method="nearest")
    return float(low), float(high)
