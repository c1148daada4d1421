"""What the study says about gradients whose noise is known."""

import numpy as np
import pytest

from benchmarks.aggregation_study.comparison import arguments_of
from benchmarks.aggregation_study.findings import paired, power_law
from benchmarks.aggregation_study.gradients import METHODS, Measurement
from benchmarks.aggregation_study.noise import (
    NAMES,
    REFERENCE,
    bootstrap,
    coefficient_of_variation,
    middle,
    moments,
    noise_of,
    ratio,
)


def measurement(cvs: list[float], rng: np.random.Generator, same: bool = False) -> Measurement:
    """Forty batches' gradients in 500 dimensions, whose mean has length 1."""
    grams = []
    noise = rng.standard_normal((40, 500))
    for cv in cvs:
        noise = noise if same else rng.standard_normal((40, 500))
        g = np.eye(500)[0] + cv / np.sqrt(500) * noise
        grams.append(g @ g.T)
    return Measurement(np.array(grams), np.tile(np.array(cvs)[:, None], (1, 40)))


def test_coefficient_of_variation_by_hand() -> None:
    g = np.array([[3.0, 1.0], [3.0, -1.0]])
    opposite = np.array([[1.0], [-1.0]])
    both = moments(np.array([g @ g.T, opposite @ opposite.T]))
    np.testing.assert_array_equal(both, [[10, 8], [1, -1]])
    np.testing.assert_array_equal(coefficient_of_variation(both), [0.5, np.inf])
    twice = moments(np.array([g @ g.T]), np.array([0, 0, 1]))  # 10, 10, 10; 4 pairs of 8
    np.testing.assert_array_equal(twice, [[10, 8]])


def test_known_noise_is_found_within_its_interval(rng: np.random.Generator) -> None:
    m = measurement([1.0, 2.0], rng)
    draws = coefficient_of_variation(bootstrap(m.grams, rng))
    found = coefficient_of_variation(moments(m.grams))
    for i, cv in enumerate((1.0, 2.0)):
        low, high = middle(draws[:, i])
        assert low < cv < high < 1.5 * cv
        assert found[i] == pytest.approx(cv, rel=0.15)
    values = ratio(np.array([1.0, np.inf, np.inf]), np.array([1.0, np.inf, 2.0]))
    assert middle(values) == (1.0, np.inf)


def test_the_least_noise_is_named_with_what_is_not_told_apart(rng: np.random.Generator) -> None:
    cvs = [3.0] * len(METHODS)
    cvs[2] = 1.0
    seeds = {("start", seed): measurement(cvs, rng, same=True) for seed in range(3)}
    mean = noise_of(seeds)[-1]
    assert (mean.policy, mean.seed) == ("start", "all")
    assert mean.least() == f"Least noise: {NAMES[2]}."
    cvs[4] = 1.5
    told = noise_of({("start", 0): measurement(cvs, rng, same=True)})[-1]
    assert told.least() == f"Least noise: {NAMES[2]}."
    cvs[2] = cvs[4] = 1.0
    unsure = noise_of({("start", 0): measurement(cvs, rng)})[-1].least()
    assert unsure.count("not told apart") == 1 and NAMES[2] in unsure and NAMES[4] in unsure
    row = {r["method"]: r for r in told.rows()}[NAMES[0]]
    reference = NAMES.index(REFERENCE)
    assert row["predicted_relative"] == pytest.approx(3.0 / cvs[reference])
    assert row["relative_low"] == row["relative_high"] == pytest.approx(1)  # the same gradients


@pytest.mark.parametrize("word", ["auto", "0.5", "1"])
def test_an_alpha_is_a_word_of_a_method(word: str) -> None:
    expected = "--method", "delta-l-norm", "--alpha", word
    assert arguments_of(f"delta-l-norm {word}") == arguments_of(f"delta-l-norm alpha={word}")
    assert arguments_of(f"delta-l-norm {word}") == expected


def test_power_law_of_exact_squares() -> None:
    lengths = np.repeat(np.arange(1, 101), 3)
    assert power_law(lengths, 5.0 * lengths) == pytest.approx(1)
    assert power_law(lengths, 5.0 * lengths**2) == pytest.approx(2, abs=0.1)


def test_differences_are_taken_seed_by_seed() -> None:
    table = [
        {"method": m, "seed": s, "x": x}
        for m, s, x in (("a", 0, 1.0), ("b", 0, 0.5), ("a", 1, 3.0), ("b", 1, 4.0), ("a", 2, 9.0))
    ]
    np.testing.assert_array_equal(paired(table, "a", "b", "x"), [0.5, -1.0])
