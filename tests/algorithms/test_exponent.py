"""The exponent that `alpha=auto` follows, against data whose exponent is known."""

import numpy as np
import pytest

from verl.algorithms.exponent import FEWEST, UNTIL_THEN, chosen_alpha, length_exponent, spread

LENGTHS = np.array([3, 5, 8, 20, 21, 60, 150, 400]).repeat(8)  # a part each


def points(lengths: np.ndarray, squares: np.ndarray) -> list[list[float]]:
    return np.stack([lengths, squares], 1).tolist()


@pytest.mark.parametrize("b", [0.0, 0.4, 1.0, 1.5, 2.7, -0.5])
@pytest.mark.parametrize("scale", [1e-9, 7.0])
def test_a_power_law_has_its_exponent(b: float, scale: float) -> None:
    assert length_exponent(points(LENGTHS, scale * LENGTHS**b)) == pytest.approx(b, abs=1e-8)


def test_by_hand() -> None:
    """Of two lengths, 1 and 4, the means of ‖g‖² are 3 and 12: b = log 4 / log 4. A line through
    all logarithms, whose means are log 3 and (log 1 + log 23)/2, would have another slope."""
    few = [[1.0, 3.0], [1.0, 3.0], [4.0, 1.0], [4.0, 23.0]]
    assert length_exponent(few * 16) == pytest.approx(1, abs=1e-8)
    clipped = [[1.0, 3.0], [1.0, 3.0], [4.0, 0.0], [4.0, 24.0]]  # a loss without a gradient
    assert length_exponent(clipped * 16) == pytest.approx(1, abs=1e-8)
    part_without = few * 16 + [[9.0, 0.0]] * 8
    assert length_exponent(part_without) == pytest.approx(1, abs=1e-8)


def test_a_spread_that_depends_on_the_length_changes_nothing() -> None:
    """‖g‖² is L^1.3 times a random factor with mean 1: short responses' vary much more."""
    rng = np.random.default_rng(0)
    L = rng.lognormal(4, 1, 20000).clip(1).round()
    deviation = np.where(L < 50, 1.2, 0.3)
    squares = L**1.3 * np.exp(rng.normal(-(deviation**2) / 2, deviation))
    assert np.polyfit(np.log(L), np.log(squares), 1)[0] > 1.5
    windows = np.split(np.array(points(L, squares)), 125)  # of 160 responses
    found = np.array([length_exponent(window.tolist()) for window in windows])
    assert found.mean() == pytest.approx(1.3, abs=0.1) and found.std() < 0.2


def test_what_tells_no_exponent() -> None:
    enough = points(LENGTHS, LENGTHS)[:FEWEST]
    assert length_exponent(enough) is not None and length_exponent(enough[1:]) is None
    assert length_exponent([]) is None
    assert length_exponent([[7.0, float(i)] for i in range(FEWEST)]) is None
    assert length_exponent(points(LENGTHS, 0.0 * LENGTHS)) is None


def test_alpha_is_the_exponent_within_bounds() -> None:
    assert [chosen_alpha(b) for b in (None, -1.0, 0.3, 1.4, 3.0)] == [UNTIL_THEN, 0, 0.3, 1.4, 2]


def test_responses_are_spread_over_the_lengths() -> None:
    random = np.random.default_rng(0)
    lengths = random.permutation(np.arange(100))
    drawn = [sorted(lengths[spread(lengths, 10, random)].tolist()) for _ in range(20)]
    assert all([length // 10 for length in one] == [*range(10)] for one in drawn)
    assert len({tuple(one) for one in drawn}) == 20
    assert sorted(spread([4, 4, 4], 16, random)) == [0, 1, 2]
    assert spread([], 16, random) == []
