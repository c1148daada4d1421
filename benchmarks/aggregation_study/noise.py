"""How sure one can be of what `gradients` measured: which method's gradients are noisier."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.aggregation_study.gradients import METHODS, Measurement

Key = tuple[str, int]  # (method or policy, seed)
NAMES = [method.name for method in METHODS]
REFERENCE = "Dr. GRPO Norm"
"""Whose noise that of the others is compared with: all its weights are the same."""
BOOTSTRAP = 2000


@dataclass
class Noise:
    """How noisy the gradients of the M methods are, for one policy and seed, or all seeds."""

    policy: str
    seed: str
    moments: NDArray[np.float64]
    """Those of `moments`, [M, 2]."""
    draws: NDArray[np.float64]
    """The same of bootstrap resamples of the batches, [BOOTSTRAP, M, 2]."""
    predicted: NDArray[np.float64]
    """√(Σ w² L) / Σ w, mean over the batches, [M]."""

    def rows(self) -> list[dict[str, Any]]:
        """A row per method."""
        r = NAMES.index(REFERENCE)
        cv, draws = coefficient_of_variation(self.moments), coefficient_of_variation(self.draws)
        found = []
        for i, name in enumerate(NAMES):
            (low, high), (relative_low, relative_high) = (
                middle(draws[:, i]),
                middle(ratio(draws[:, i], draws[:, r])),
            )
            found.append(
                {
                    "policy": self.policy,
                    "seed": self.seed,
                    "method": name,
                    "cv": cv[i],
                    "cv_low": low,
                    "cv_high": high,
                    "relative": cv[i] / cv[r],
                    "relative_low": relative_low,
                    "relative_high": relative_high,
                    "predicted_relative": self.predicted[i] / self.predicted[r],
                }
            )
        return found

    def least(self) -> str:
        """Which method has the least noise, and which can't be told from it."""
        best = int(np.argmin(coefficient_of_variation(self.moments)))
        draws = coefficient_of_variation(self.draws)
        lows = [middle(ratio(draws[:, i], draws[:, best]))[0] for i in range(len(NAMES))]
        others = [name for i, name in enumerate(NAMES) if i != best and not lows[i] > 1]
        text = f"Least noise: {NAMES[best]}"
        return text + (f"; not told apart from it: {', '.join(others)}." if others else ".")


def noise_of(measurements: Mapping[Key, Measurement]) -> list[Noise]:
    """Of each policy: each seed's, then that of all seeds, whose moments are added up (`seed`
    "all")."""
    rng = np.random.default_rng(0)
    found = []
    for policy in dict.fromkeys(policy for policy, _ in measurements):
        seeds = [
            Noise(policy, str(seed), moments(m.grams), bootstrap(m.grams, rng), m.predicted.mean(1))
            for (name, seed), m in measurements.items()
            if name == policy
        ]
        means = (
            np.mean([getattr(s, x) for s in seeds], 0) for x in ("moments", "draws", "predicted")
        )
        found += [*seeds, Noise(policy, "all", *means)]
    return found


def moments(
    grams: NDArray[np.float64], chosen: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """E‖g‖² and ‖E g‖² of M methods from the inner products of the gradients of K independent
    batches, [M, K, K] → [M, 2].

    Two different batches have E⟨g_k, g_l⟩ = ‖E g‖², without bias. Of the batches `chosen`, one that
    is there twice makes a pair with itself; such pairs are left out.
    """
    k = np.arange(grams.shape[1]) if chosen is None else chosen
    sub, same = grams[:, k[:, None], k], k[:, None] == k
    squares = np.diagonal(sub, axis1=1, axis2=2)
    return np.stack([squares.mean(1), sub[:, ~same].mean(1)], 1)


def bootstrap(grams: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """`moments` of BOOTSTRAP resamples of the batches, each resample the same for all methods,
    [M, K, K] → [BOOTSTRAP, M, 2]."""
    k = grams.shape[1]
    return np.array([moments(grams, rng.integers(k, size=k)) for _ in range(BOOTSTRAP)])


def coefficient_of_variation(moments: NDArray[np.float64]) -> NDArray[np.float64]:
    """sqrt(E‖g − E g‖²) / ‖E g‖ from `moments`, […, 2] → […]; inf where the batches don't suffice
    to tell the mean from 0.

    Example: gradients (3, 1) and (3, −1) have E‖g‖² = 10, ‖E g‖² = 8, and so sqrt(2 / 8) = 0.5.
    """
    square, mean_square = moments[..., 0], np.maximum(moments[..., 1], 0)
    with np.errstate(divide="ignore"):
        return np.sqrt(np.maximum(square - mean_square, 0) / mean_square)


def ratio(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """a / b, and inf where both are."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(a), np.inf, a / b)


def middle(values: NDArray[np.float64]) -> tuple[float, float]:
    """The interval that holds the middle 95 % of the values."""
    low, high = np.quantile(values, [0.025, 0.975], method="nearest")
    return float(low), float(high)
