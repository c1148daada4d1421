"""plugins/delta_l, a package of its own, has the maths of verl.algorithms.weights."""

import inspect
import math
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import close
from verl.algorithms import weights as ours

sys.path.append(str(Path(__file__).parents[2] / "plugins"))

from delta_l import advantage_scales
from delta_l import weights as theirs

DRAW = torch.Generator().manual_seed(0)
ROLLOUTS = [
    [5],
    [0, 0],
    [3, 0, 9, 1],
    *torch.randint(0, 9000, (20, 64), generator=DRAW).tolist(),
]


@pytest.mark.parametrize("name", ["seq_mean_token_sum", "dr_grpo", "delta_l"])
def test_text_is_the_same(name: str) -> None:
    assert inspect.getsource(getattr(theirs, name)) == inspect.getsource(getattr(ours, name))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.75, 1.0])
def test_weights_are_the_same_bits(alpha: float) -> None:
    for lengths in ROLLOUTS:
        for step in (lengths, lengths[: len(lengths) // 2 + 1], torch.tensor(lengths)):
            expected = ours.response_weights(step, "delta-l", 8192, alpha, lengths)
            assert torch.equal(theirs.response_weights(step, 8192, alpha, lengths), expected)


def test_scales_by_hand() -> None:
    # 1^(−1/2) = 1 and 4^(−1/2) = 1/2 have the mean 3/4; the response without tokens has no part.
    close(advantage_scales([1, 4, 0], 0.5), [4 / 3, 2 / 3, 0])
    close(advantage_scales([1, 4], 0.5, [1, 4, 16]), [12 / 7, 6 / 7])  # the mean is 7/12
    assert advantage_scales([1, 4], 0.0).tolist() == [1, 1]
    with pytest.raises(ValueError, match="must not be negative"):
        advantage_scales([1, -4], 0.5)


def test_scales_are_those_of_any_step_and_limit() -> None:
    lengths = ROLLOUTS[-1]
    scales = advantage_scales(lengths, 0.75)
    close(scales[:7], advantage_scales(lengths[:7], 0.75, lengths))
    weights = ours.response_weights(lengths, "delta-l", 512, 0.75)
    close(scales, weights * len(lengths) * 512, rtol=1e-6)
    assert math.isclose(scales.mean(), (torch.tensor(lengths) > 0).double().mean(), rel_tol=1e-6)
