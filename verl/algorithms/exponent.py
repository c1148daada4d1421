"""∆L's `alpha=auto`: the exponent b of E‖g_i‖² ∝ L_i^b, from some responses of the latest steps."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

PER_STEP = 8  # responses whose gradient is measured in a step
WINDOW = 20 * PER_STEP  # the latest of them, which the exponent is of
FEWEST = 32  # before there are so many, α is UNTIL_THEN
UNTIL_THEN = 0.75  # the published default
LOWEST, HIGHEST = 0.0, 2.0
"""Bounds of α. Where the gradients of a response's tokens are independent b is 1, and 2 where they
are all the same: what lies beyond is mostly chance."""


def spread(lengths: ArrayLike, count: int, random: np.random.Generator) -> list[int]:
    """`count` responses, one at random of each of as many parts with equally many responses, from
    the shortest to the longest; all, if there are no more. Lengths in tokens, [N]."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    parts = np.array_split(order, min(count, len(order))) if len(order) else []
    return [int(random.choice(part)) for part in parts]


def length_exponent(points: Sequence[Sequence[float]]) -> float | None:
    """b of E‖g‖² = c·L^b, by gamma quasi-likelihood with a logarithmic link: ‖g‖²/L^b, as weights,
    leave the mean of log L as it is (McCullagh and Nelder, 1989, chapter 8). Unlike a line through
    the logarithms it is about the mean of ‖g‖², whatever its spread at each length, and takes 0.
    `points`: L, in tokens, and ‖g‖², [N][2]. None for fewer than `FEWEST`, lengths that are all the
    same, or nothing but 0."""
    if len(points) < FEWEST:
        return None
    L, squares = np.array(points, np.float64).T
    x = np.log(L) - np.log(L).mean()
    if np.ptp(L) == 0 or not squares.any():
        return None
    low, high = -10.0, 10.0
    while high - low > 1e-9:
        b = (low + high) / 2
        powers = -b * x
        low, high = (b, high) if squares * np.exp(powers - powers.max()) @ x > 0 else (low, b)
    return low


def chosen_alpha(exponent: float | None) -> float:
    """α = b, the weights of least variance if the expected gradient of a response doesn't depend on
    its length (arXiv 2509.07558), within bounds."""
    return UNTIL_THEN if exponent is None else float(np.clip(exponent, LOWEST, HIGHEST))
