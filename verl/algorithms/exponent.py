"""∆L's `alpha=auto`: the exponent b of E‖g_i‖² ∝ L_i^b, from some responses of the latest steps."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

PER_STEP = 8  # responses whose gradient is measured in a step
WINDOW = 20 * PER_STEP  # the exponent is fitted to the latest of them
TOGETHER = 8  # averaged together
FEWEST = 64  # with fewer than this, α is UNTIL_THEN
NARROWEST = 0.1  # standard deviation of log L; with less, too
UNTIL_THEN = 0.75  # the published default
LOWEST, HIGHEST = 0.0, 2.0
"""Bounds of α. Where the gradients of a response's tokens are independent b is 1, and 2 where they
are all the same."""


def spread(lengths: ArrayLike, count: int, random: np.random.Generator) -> list[int]:
    """`count` responses, one at random of each of as many parts with equally many responses, from
    the shortest to the longest; all, if there are no more. Lengths in tokens, [N]."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    parts = np.array_split(order, min(count, len(order))) if len(order) else []
    return [int(random.choice(part)) for part in parts]


def length_exponent(points: Sequence[Sequence[float]]) -> float | None:
    """b of E‖g‖² ∝ L^b: least squares through the logarithms of the means of parts with `TOGETHER`
    responses of similar lengths. It is about the mean of ‖g‖², which a line through the logarithms
    of single responses isn't where short ones' vary more; and one huge gradient moves one part.
    `points`: L, in tokens, and ‖g‖², [N][2]. None for fewer than `FEWEST`, and where lengths differ
    by less than `NARROWEST`; parts without any gradient are left out."""
    if len(points) < FEWEST:
        return None
    pairs = np.array(points, np.float64)
    parts = np.array_split(np.argsort(pairs[:, 0], kind="stable"), len(pairs) // TOGETHER)
    means = np.array([pairs[part].mean(0) for part in parts])
    x, y = np.log(means[means[:, 1] > 0]).T
    narrow = not len(x) or x.std() < NARROWEST
    return None if narrow else float(np.polyfit(x, y, 1)[0])


def chosen_alpha(exponent: float | None) -> float:
    """α = b, the weights of least variance if the expected gradient of a response doesn't depend on
    its length (arXiv 2509.07558), within bounds."""
    return UNTIL_THEN if exponent is None else float(np.clip(exponent, LOWEST, HIGHEST))
