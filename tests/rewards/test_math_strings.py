import time

import pytest

from verl.rewards import RULES, compute_score
from verl.rewards.math_strings import dapo_score, is_equiv, math_score, spelled


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (r"\dfrac{1}{2}", r"\frac12"),
        ("1/2", r"\frac{1}{2}"),
        ("0.5", r"\tfrac 12"),
        (".75", "0.75"),
        (r"\sqrt2", r"\sqrt{2}"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        (r"90^\circ", "90"),
        (r"30\%", "30"),
        (r"\$5", "5"),
        (r"7\text{ cm}^2", "7"),
        ("36 degrees", "36"),
        ("$34$.", "34"),
        ("**34**", "34"),
        (r"\text{(B)}", "(B)"),
        (r"10{,}000", "10,000"),
        ("1,234", r"1\,234"),
        ("-10/9", r"-\frac{10}{9}"),
        ("x = 5", "5"),
        ("m + n = 34", "34"),
        ("2x + 3", "y = 2x + 3"),
        (r"\\frac{2}{21}", r"\frac{2}{21}"),
    ],
)
def test_spellings_of_one_answer(answer, gold):
    assert is_equiv(answer, gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("1/3", r"\frac12"),
        ("", "5"),
        ("$", r"\%"),
        ("1, 2", "12"),
        ("(1,234)", "(1234)"),
        ("7 cm", "7 m"),
        (r"7\text{ km/h}", r"7\text{ m/s}"),
        (r"36\text{ (or 37)}", "36"),
        ("36 or 37", "36"),
        ("1", "x^2 + y^2 = 1"),  # the reference is an equation
        ("11a + c", "7 = 11a + c"),
        (r"0.\overline{3}", "0.3"),
        ("x = 6", "x = 5"),
    ],
)
def test_other_answers(answer, gold):
    assert not is_equiv(answer, gold)


def test_the_last_box_is_the_answer_to_math():
    right = {"score": 1.0, "acc": 1.0, "pred": r"\frac{3}{4}"}
    text = r"so $\boxed{1}$, no: $\boxed{\dfrac{3}{4}}$. Answer: 9 \boxed{5"
    assert math_score(text, r"\frac{3}{4}") == math_score(text, r"\boxed{3/4}") == right
    assert math_score("3/4", "3/4") == {"score": 0.0, "acc": 0.0, "pred": ""}


@pytest.mark.parametrize(
    ("text", "score", "pred"),
    [
        ("… so it is 34.\nAnswer: 34", 1, "34"),
        ("Answer: 12\nNo.\nANSWER : $34$.", 1, "34"),
        ("**Answer:** 34", 1, "34"),
        (r"Answer: $\boxed{034}$", -1, "034"),
        (r"Answer: $\boxed{34}$", 1, "34"),
        ("Answer: 34\n" + "x" * 280, 1, "34"),
        ("Answer: 34\n" + "x" * 300, -1, ""),  # only the last 300 characters count
        (r"the answer is $\boxed{34}$", -1, ""),  # as in verl, a box alone is none
        ("Answer: 34 or 35", -1, "34or35"),
        ("", -1, ""),
    ],
)
def test_dapo_reads_the_last_answer_line(text, score, pred):
    expected = {"score": float(score), "acc": float(score == 1), "pred": pred}
    assert dapo_score(text, "34") == dapo_score(text, 34) == expected


@pytest.mark.parametrize("source", ["aime", "aime_2024", "aime25", "math_dapo", "math"])
def test_sources_of_dapo(source):
    assert compute_score(source, "Answer: 5", "5")["score"] == 1
    assert compute_score(source, r"\boxed{5}", "5")["score"] == -1


def test_sources_of_math():
    for source in [name for name in RULES if "MATH" in name]:
        assert compute_score(source, r"\boxed{5}", "5")["acc"] == 1
    with pytest.raises(ValueError, match="must be LaTeX such as"):
        compute_score(source, r"\boxed{5}", None)


@pytest.mark.parametrize(
    "unit", ["*", "$", " ", "\\,", "\\text{ a", "\\frac{", "5 cm ", "1,", "$.", "{", "=x"]
)
def test_hostile_answers_are_fast(unit):
    answer = "5" + unit * (200_000 // len(unit)) + "x"
    started = time.process_time()
    spelled(answer)
    is_equiv(answer, "5")
    math_score(rf"\boxed{{{answer}}}", "5")
    assert time.process_time() - started < 20  # the quadratic way takes minutes
