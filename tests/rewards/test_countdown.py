import time
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.rewards.countdown import compute_score, evaluate, extract_answer

RIGHT, WRONG = {"score": 1.0, "acc": 1.0}, {"score": 0.0, "acc": 0.0}


def score(answer: str, target: int, *numbers: int) -> float:
    result = compute_score(
        f"<think> … </think> <answer>{answer}</answer>", {"target": target, "numbers": numbers}
    )
    assert result == (RIGHT if result["score"] else WRONG)
    return result["score"]


@pytest.mark.parametrize(
    ("answer", "target", "numbers"),
    [
        ("1 + 2 * 3", 7, (1, 2, 3)),
        ("(1 + 2) * 3", 9, (1, 2, 3)),
        ("3*(2+1)", 9, (1, 2, 3)),
        ("10 - 2 - 3", 5, (2, 3, 10)),  # left to right: 10 - (2 - 3) would be 11
        ("24 / 4 / 2", 3, (2, 4, 24)),
        ("8 / (3 - 8 / 3)", 24, (3, 3, 8, 8)),  # exact: floats give 23.999999999999989
        ("1 - 5", -4, (1, 5)),
        ("0 * 7", 0, (0, 7)),
        ("((((1))))\t+ ( 2 )", 3, (1, 2)),
        ("(" * 200 + "1" + ")" * 200 + "+2", 3, (1, 2)),
        ("10 / 4 * 2", 5, (2, 4, 10)),
        ("5", 5, (5,)),
        ("-3 + 8", 5, (3, 8)),
        ("3-(-8)", 11, (3, 8)),
        ("+1 - -2", 3, (1, 2)),
        ("2 * -1 - 3", -5, (1, 2, 3)),
        ("-(3 - 8) * -2", -10, (2, 3, 8)),
        ("1 --+- 2", -1, (1, 2)),
    ],
)
def test_right(answer, target, numbers):
    assert score(answer, target, *numbers) == 1


@pytest.mark.parametrize(
    ("answer", "target", "numbers"),
    [
        ("1 + 2", 4, (1, 2)),
        ("1 + 2", 3, (1, 2, 3)),  # a number is missing
        ("1 + 2 + 0", 3, (1, 2)),  # one is added
        ("1 + 1 + 1", 3, (1, 2)),
        ("2 + 2", 4, (2, 2, 2)),  # used once less than given
        ("12", 12, (1, 2)),
        ("1 2", 12, (1, 2)),
        ("1 / (2 - 2)", 0, (1, 2, 2)),
        ("0 / 0", 0, (0, 0)),
        ("7 // 2", 3, (2, 7)),
        ("2 ** 3", 8, (2, 3)),
        ("99**98**97", 1, (97, 98, 99)),
        ("1_0 + 2", 12, (2, 10)),
        ("1.0 + 2", 3, (1, 2)),
        ("1. + 2", 3, (1, 2)),
        ("1e1 + 2", 12, (2, 10)),
        ("0x1 + 2", 3, (1, 2)),
        ("٣ + 2", 5, (2, 3)),  # Arabic-Indic digit
        ("３ + 2", 5, (2, 3)),  # full-width digit
        ("3² + 2", 11, (2, 3)),
        ("1\N{NO-BREAK SPACE}+ 2", 3, (1, 2)),
        ("007 + 1", 8, (1, 7)),
        ("00 + 1", 1, (0, 1)),
        ("2 (3)", 6, (2, 3)),
        ("(2)(3)", 6, (2, 3)),
        ("(2) 3", 6, (2, 3)),
        ("1 + 2 = 3", 3, (1, 2)),
        ("1 + 2 == 3", 3, (1, 2)),
        ("1 × 2", 2, (1, 2)),
        ("1, 2", 3, (1, 2)),
        ("1 + 2 # 3", 3, (1, 2)),
        ("__import__('os') + 1 + 2", 3, (1, 2)),
        ("", 3, (1, 2)),
        ("()", 3, (1, 2)),
        ("() 1 + 2", 3, (1, 2)),
        ("1 + 2)", 3, (1, 2)),
        ("(1 + 2", 3, (1, 2)),
        ("1) + (2", 3, (1, 2)),
        (")1 + 2(", 3, (1, 2)),
        ("1 + 2 +", 3, (1, 2)),
        ("* 1 + 2", 3, (1, 2)),
        ("1 + 2 -", 3, (1, 2)),
        ("(-) 1 + 2", 3, (1, 2)),
        ("-3 + 8", 11, (3, 8)),
        ("1 + * 2", 3, (1, 2)),
        ("1 + (2 *)", 3, (1, 2)),
    ],
)
def test_wrong(answer, target, numbers):
    assert score(answer, target, *numbers) == 0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> 1 + 2 </answer>", "1 + 2"),
        ("so <answer>1</answer> or <answer>2</answer>.", "2"),
        ("<answer>1</answer> <answer>2", "1"),
        ("<answer>1</answer> 2</answer>", "1"),
        ("<answer><answer>1</answer>", "<answer>1"),  # as the regular expression has it
        ("<answer>1</answer>\n  \n", "1"),
        ("<answer>1</answer>\nthe end", None),
        ("<answer>\n1</answer>", None),
        ("</answer>1<answer>", None),
        ("<answer>1", None),
        ("1</answer>", None),
        ("", None),
        ("User: <answer>1</answer> Assistant: 2", None),
        ("User: 1\nAssistant: <answer>2</answer>", "2"),
        ("Assistant: <answer>1</answer> Assistant: 2", "1"),
        ("<answer>1</answer><|im_start|>assistant\n2", None),
        ("<|im_start|>user\n<answer>1</answer><|im_start|>assistant\n<answer>2</answer>", "2"),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_evaluate_is_exact():
    assert evaluate(list("1/3+1/6")) == Fraction(1, 2)
    assert evaluate([]) is None
    assert evaluate(["(", ")"]) is None


@pytest.mark.parametrize(
    "numbers", [np.array([3, 8]), np.array([3, 8], np.int32), [np.int64(3), 8], (3, 8)]
)
def test_ground_truth_types(numbers):
    truth = {"target": np.int64(24), "numbers": numbers}
    assert compute_score("<answer>3*8</answer>", truth) == RIGHT


def test_ground_truth_from_parquet(tmp_path):
    row = {"reward_model": {"style": "rule", "ground_truth": {"target": 24, "numbers": [3, 8]}}}
    pd.DataFrame([row]).to_parquet(tmp_path / "t.parquet")
    truth = pd.read_parquet(tmp_path / "t.parquet")["reward_model"][0]["ground_truth"]
    assert isinstance(truth["numbers"], np.ndarray)
    assert compute_score("<answer>3*8</answer>", truth) == RIGHT


@pytest.mark.parametrize(
    "truth",
    [
        None,
        24,
        "24",
        [24, [3, 8]],
        {},
        {"target": 24},
        {"numbers": [3, 8]},
        {"target": "24", "numbers": [3, 8]},
        {"target": 24.0, "numbers": [3, 8]},
        {"target": None, "numbers": [3, 8]},
        {"target": True, "numbers": [3, 8]},
        {"target": 24, "numbers": "38"},
        {"target": 24, "numbers": b"38"},
        {"target": 24, "numbers": 38},
        {"target": 24, "numbers": []},
        {"target": 24, "numbers": {3, 8}},
        {"target": 24, "numbers": [3, "8"]},
        {"target": 24, "numbers": [3, True]},
        {"target": 24, "numbers": [3, -8]},
        {"target": 24, "numbers": np.array([3.0, 8.0])},
        {"target": 24, "numbers": np.array([[3, 8]])},
    ],
)
def test_malformed_ground_truth_is_an_error_whatever_the_response(truth):
    for text in ("<answer>3*8</answer>", "no answer"):
        with pytest.raises(ValueError, match="'target': int, 'numbers': non-empty sequence"):
            compute_score(text, truth)


HOSTILE = {
    "open brackets": "<answer>" + "(" * 100_000 + "</answer>",
    "brackets": "<answer>" + "(" * 50_000 + "1+2" + ")" * 50_000 + "</answer>",
    "brackets within the bound": "<answer>" + "(" * 900 + "1+2" + "</answer>",
    "sum": "<answer>1+2" + "+1" * 500_000 + "</answer>",
    "digits": "<answer>" + "9" * 1_000_000 + "</answer>",
    "signs": "<answer>1" + "-" * 1_000_000 + "2</answer>",
    "powers": "<answer>" + "9**" * 300_000 + "9</answer>",
    "spaces": "<answer>1+" + " " * 1_000_000 + "2</answer>",
    "outer spaces": " " * 1_000_000,
    "lines": "\n" * 500_000 + "x" + "\n" * 500_000,
    "opening tags": "<answer>" * 125_000,
    "closing tags": "</answer>" * 110_000,
    "pairs": "<answer>1</answer>" * 55_000,
    "opening tags, one pair": "<answer>" * 125_000 + "1+2</answer>",
    "half tags": "<answer" * 140_000 + "</answer" * 140_000,
    "marks": "Assistant:" * 100_000,
    "half marks": "Assistant" * 110_000,
    "text": "so we try 1 + 2 " * 60_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_responses_are_wrong_and_fast(text):
    truth = {"target": 3, "numbers": [1, 2]}
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        assert compute_score(text, truth) == WRONG
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05  # about a millisecond on an idle core


def leaf(n):
    return str(n), Fraction(n), [n]


def node(parts):
    (left, a, some), op, (right, b, others), spaced = parts
    undefined = a is None or b is None or (op == "/" and b == 0)
    value = None
    if not undefined:
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a / (b or 1)}[op]
    space = " " if spaced else ""
    return f"({left}{space}{op}{space}{right})", value, some + others


# (fully bracketed text, value or None after a division by zero, numbers)
TREES = st.recursive(
    st.integers(0, 120).map(leaf),
    lambda trees: st.tuples(trees, st.sampled_from("+-*/"), trees, st.booleans()).map(node),
    max_leaves=8,
)


@settings(deadline=None)
@given(TREES, st.integers(-1, 1))
def test_agrees_with_fractions(tree, shift):
    text, value, numbers = tree
    target = shift + (int(value) if value is not None else 0)
    assert score(text, target, *reversed(numbers)) == float(value == target)


def python_value(text: str) -> float | None:
    """Python's opinion on an expression made here; None if it has none."""
    try:
        value = eval(text)
    except (SyntaxError, TypeError, ZeroDivisionError):
        return None
    return value if isinstance(value, (int, float)) else None


@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # 1 (2) looks like a call
@settings(deadline=None)
@given(st.lists(st.sampled_from("12+-*/()"), max_size=9))
def test_grammar_agrees_with_python(tokens):
    assert evaluate(tokens) == python_value(" ".join(tokens))


@settings(deadline=None)
@given(st.text(max_size=60) | st.text("123+-*/() .<>answer/\n=", max_size=60))
def test_garbage_never_raises(garbage):
    truth = {"target": 3, "numbers": [1, 2]}
    for text in (garbage, f"<answer>{garbage}</answer>"):
        assert compute_score(text, truth) in (RIGHT, WRONG)
