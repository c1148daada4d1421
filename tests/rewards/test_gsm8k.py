import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.rewards.gsm8k import compute_score, parse_number

RIGHT, WRONG = {"score": 1.0, "acc": 1.0}, {"score": 0.0, "acc": 0.0}


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("20 - 2 = 18\n#### 18", "18"),
        ("#### 18", "18.0"),
        ("#### 18.00", "18"),
        ("#### 18.", "18"),
        ("#### 1,000", "1000"),
        ("#### 1000", "1,000"),
        ("#### $1,000.50", "1000.5"),
        ("#### -5", "-5"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### .5", "0.5"),
        ("#### 17 no, #### 18", "18"),
        ("#### 18\n#### none", "18"),
        ("#### 18 dollars", "18"),
        ("#### 18", 18),
        ("#### 18", np.int64(18)),
        ("#### 0.1", 0.1),
        ("#### 123456789012345678901234567890", "123456789012345678901234567890"),
        ("x" * 1000 + "#### 18", "18"),
    ],
)
def test_strict_right(text, truth):
    assert compute_score(text, truth) == RIGHT


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("18", "18"),
        ("### 18", "18"),
        ("####18", "18"),
        ("#### 19", "18"),
        ("#### 18 then #### 19", "18"),
        ("#### -18", "18"),
        ("#### x = 18", "18"),
        ("#### 1e1", "1"),
        ("#### 1e1", "10"),
        ("#### 1.8e1", "18"),
        ("#### 1e999999999", "1"),
        ("#### 1.2.3", "1.2"),
        ("#### 0.1", "0.10000000000000001"),
        ("#### 123456789012345678901234567891", "123456789012345678901234567890"),
        ("#### ١٨", "18"),
        ("#### " + "9" * 1000, "18"),
        ("#### 18" + "x" * 300, "18"),  # not at the end
        ("", "18"),
    ],
)
def test_strict_wrong(text, truth):
    assert compute_score(text, truth) == WRONG


@pytest.mark.parametrize(
    ("text", "truth", "right"),
    [
        ("The answer is 18.", "18", True),
        ("The answer is 18, or 19", "19", True),
        ("It costs $1,234.50.", "1234.5", True),
        ("x = -5", "-5", True),
        ("a range of 3-5", "5", True),
        ("#### 18", "18", True),
        ("The answer is 18 (of 20)", "18", False),
        ("about 1e5", "5", False),
        ("about 1e-5", "5", False),
        ("1e999999999", "999999999", False),
        ("none", "18", False),
        ("", "18", False),
        # 18 begins within the window of 300 characters, but is the tail of a longer number.
        ("7718" + "x" * 298, "18", False),
        ("77 18" + "x" * 298, "18", True),
        ("0." + "18" + "x" * 298, "18", False),
    ],
)
def test_flexible(text, truth, right):
    assert compute_score(text, truth, method="flexible") == (RIGHT if right else WRONG)


@pytest.mark.parametrize("truth", [None, "", "eighteen", "1e5", "1/2", True, [18], float("nan")])
def test_malformed_ground_truth(truth):
    with pytest.raises(ValueError, match="plain decimal notation"):
        compute_score("#### 18", truth)


def test_unknown_method():
    with pytest.raises(ValueError, match="strict, flexible"):
        compute_score("#### 18", "18", method="loose")


@pytest.mark.parametrize("method", ["strict", "flexible"])
@pytest.mark.parametrize(
    "unit", ["#### ", "#", "#### 1e999999999 ", "1,", "9", ".", "1e", "$-", "-", " ", "#### 1.2.3"]
)
def test_hostile_responses_are_fast(unit, method):
    text = unit * (1_000_000 // len(unit))
    start = time.process_time()
    assert compute_score(text, "18", method) == WRONG
    assert time.process_time() - start < 5  # the quadratic way takes minutes


@settings(deadline=None)
@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9))
def test_every_plain_decimal_is_read_exactly(number):
    text = f"{number:,f}"
    assert parse_number(text) == Fraction(number)
    for method in ("strict", "flexible"):
        assert compute_score(f"#### {text}", f"{number:f}", method) == RIGHT


@settings(deadline=None)
@given(st.text(max_size=60) | st.text("#$-.,eE0123 \n", max_size=60))
def test_garbage_never_raises(text):
    for method in ("strict", "flexible"):
        assert compute_score(f"#### {text}", "18", method) in (RIGHT, WRONG)
