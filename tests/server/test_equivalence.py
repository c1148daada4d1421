"""Judging pairs of answers: right verdicts, at the right stage, on hostile input too."""

import time
from typing import Any

import pytest

pytest.importorskip("math_verify")

from hypothesis import given, settings
from hypothesis import strategies as st

from server.math import equivalence, evaluate
from server.math.normalise import normalise
from server.math.phrases import number_in_words
from server.math.tokens import word_set
from server.math.tree import parse
from server.math.units import split_unit
from tests.server.pairs import EQUAL, UNEQUAL

HOSTILE = [
    "9^{9^{9^{9}}}", "(10^{9})!", "10^{10^{10}}", "2^{2^{2^{49}}}", "1e999999999", "{" * 5000,
    "(" * 2000 + "1" + ")" * 2000, "1" * 1_000_000, "\x00", "\ud800", "\\boxed{" * 100_000,
    "\\boxed{1}" * 100_000, "1+" * 2000 + "1", "x^" * 2000 + "2", "5" + "!" * 4000, "!" * 4000,
    "-" * 4000 + "1", "\\sqrt" * 900 + "2", "\\frac" * 900, "|" * 900, "5" + "%" * 3000,
    "(1,2)" + "\\cup(1,2)" * 400, ",".join(map(str, range(1000))), "\\sin(10^{10^{5}})",
    "\\tan(\\tan(\\tan(x)))^{999999}", "\\begin{pmatrix}" * 300, "^".join("2" * 200),
    " " * 1_000_000, "\\text{" * 1000, "__import__('os').abort()", "\\{" * 900, "x<" * 900 + "1",
    "|x|+" * 300 + "1>0", "\\lvert x-" * 19 + "x" + "\\rvert" * 19 + "<3", "\\{x|" * 30, "**" * 900,
    "1" + "\\pmod" * 900, "\\lor" * 900, "0." + "3" * 4000 + "...", "x<1 or " * 300 + "x<2",
]  # fmt: skip


def portions(rows: list[Any]) -> list[list[Any]]:
    """The rows of a table, 100 a test: pytest takes as long for 11,600 tests as the judge."""
    return [rows[start : start + 100] for start in range(0, len(rows), 100)]


@pytest.mark.parametrize("pairs", portions(EQUAL))
def test_equal(pairs: list[tuple[str, str]]) -> None:
    verdicts = {pair: equivalence.judge(*pair) for pair in pairs}
    assert not {p: v for p, v in verdicts.items() if not v.equal or v.status != "ok"}


@pytest.mark.parametrize("pairs", portions(UNEQUAL))
def test_unequal(pairs: list[tuple[str, str]]) -> None:
    assert not [pair for pair in pairs if equivalence.judge(*pair).equal]


def test_pairs() -> None:
    assert len(set(EQUAL + UNEQUAL)) == len(EQUAL + UNEQUAL) >= 2500
    assert 3 * len(UNEQUAL) >= len(EQUAL + UNEQUAL)


@pytest.mark.parametrize("texts", portions(sorted({gold for gold, _ in EQUAL})))
def test_every_answer_equals_itself(texts: list[str]) -> None:
    forms = "{}", "${}$", "The answer is $\\boxed{{{}}}$."
    pairs = [(text, form.format(text)) for text in texts for form in forms]
    assert not [pair for pair in pairs if not equivalence.judge(*pair).equal]


@pytest.mark.parametrize(
    ("gold", "pred", "how"),
    [
        ("5", "5", "identical"),
        (r"\left(1, 2\right)", "(1,2)", "normalised"),
        (r"\frac{3}{5}", "0.6", "numeric"),
        ("(1,2)", "(1, 2.0)", "structure"),
        ("x(x+1)", "x^2+x", "symbolic"),
        (r"\int_0^1 x dx", r"\frac{1}{2}", "symbolic"),
    ],
)
def test_stage_that_decides(gold: str, pred: str, how: str) -> None:
    assert equivalence.judge(gold, pred) == equivalence.Verdict(True, how, "ok")


def test_quick_agrees_with_judge_where_it_decides() -> None:
    decided = 0
    for gold, pred in EQUAL + UNEQUAL:
        if verdict := equivalence.quick(gold, pred):
            decided += 1
            assert verdict == equivalence.judge(gold, pred)
            assert verdict.how in ("identical", "normalised", "numeric")
    assert decided > 80


def test_normalising_twice_changes_nothing() -> None:
    for gold, pred in EQUAL + UNEQUAL:
        key = equivalence.cache_key(gold, pred)
        assert equivalence.cache_key(*key) == key  # so that the same key means the same verdict


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("gold", ["5", r"\sqrt{2}", "x", "(0,1)"])
def test_hostile_answers_are_wrong_at_once(gold: str, text: str) -> None:
    start = time.process_time()
    equivalence.quick(gold, text)
    assert time.process_time() - start < 2
    assert not equivalence.judge(gold, text).equal
    assert time.process_time() - start < 8


def test_what_a_proof_ends_with_is_the_reference() -> None:
    proof = "Since the function is even, it is\n\n$$\nf(x)=x^2+1\n$$"
    assert equivalence.judge(proof, "x^2+1").equal
    assert not equivalence.judge(proof, "x^2").equal
    assert not equivalence.judge("x^2+1", "It is not $$x^2+1$$").equal  # of an answer all counts


def test_unreadable_answers() -> None:
    for text in ("", " ", "5)", r"\frac{1", "{" * 500):
        assert equivalence.judge("7", text).status == "unparsable"
    assert not equivalence.judge("", "").equal


def test_what_is_not_understood_is_undecided() -> None:
    for text in ("36 tripled", "36 lakh", "36 or not", "36, maybe", r"36\text{ minus a few}"):
        assert equivalence.judge("36", text) in (
            equivalence.Verdict(False, how, "undecided")
            for how in ("normalised", "symbolic", "structure")
        )
    assert equivalence.judge(r"\text{even}", "odd").status == "ok"


def test_deeply_nested_answers_get_a_verdict() -> None:
    for power in ("x^{", "2^{", r"\sqrt{", r"\frac{1}{", "(", "|", r"\{"):
        text = power * 100 + "2" + {"(": ")", "|": "|", r"\{": r"\}"}.get(power, "}") * 100
        assert equivalence.judge("5", text) == equivalence.Verdict(False, "symbolic", "unparsable")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"$\dfrac{1}{2}\,$.", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2}", "1,2"),
        (r"\text{ (C) }", "(C)"),
        ("1, 234", "1, 234"),
        (r"1\,234", "1234"),
        (r"36^\circ", "36°"),
        (r"50 \text{ percent}", "50%"),
        ("0.5.", "0.5"),
        ("**Answer:** $12$", "12"),
        ("forty-two", "42"),
        (r"7 \bmod 3", r"7\pmod{3}"),
        ("x < 1 or x > 2", r"x<1\lor x>2"),
        ("0.1666...", r"\frac{15}{90}"),
        (".5", ".5"),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected
    assert normalise(expected) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("zero", "0"),
        ("nineteen", "19"),
        ("forty-two", "42"),
        ("ninety thousand", "90000"),
        ("three quarters", "3/4"),
        ("twenty eleven", None),
        ("two three", None),
        ("half", None),
        ("", None),
    ],
)
def test_number_in_words(text: str, expected: str | None) -> None:
    assert number_in_words(text) == expected


def test_crossings() -> None:
    def crossings_of(text: str) -> list[float]:
        return sorted({round(float(x), 9) for x in evaluate.crossings(parse(text), "x")})

    assert crossings_of("3x-2") == [round(2 / 3, 9)]
    assert crossings_of("|x-1|-2") == [-1, 1, 3]
    assert crossings_of("|x|+|x-4|-4") == [0, 4]
    assert crossings_of("7") == []
    for nonlinear in ("x^2-1", "1/x", r"\lvert\lvert x\rvert-1\rvert"):
        with pytest.raises(evaluate.Undecided):
            evaluate.crossings(parse(nonlinear), "x")


def test_split_unit() -> None:
    assert split_unit("10weeks") == ("10", "week")
    assert split_unit("5 apples") == ("5", "apple")
    assert split_unit(r"3\text{square meters}") == ("3", "m^2")
    assert split_unit("x+1") == ("x+1", "")
    assert split_unit("60 miles per hour") == ("60", "h^-1*mi")
    assert split_unit(r"60\text{mph}") == ("60", "mph")
    assert split_unit("5 million people") == (r"5\cdot10^{6}", "people")


_FRAGMENTS = st.sampled_from(
    sorted(
        word_set(
            r"\frac \sqrt { } ( ) [ ] \{ \} | , ; = < \le + - * / ^ _ ! % ° ' x y i 1 23 0.5 \pi"
            r" \pm e \cup \in \sin \log \text{a} \begin{pmatrix} \end{pmatrix} & \\ : . \infty"
        )
    )
)


@settings(max_examples=400, deadline=None)
@given(st.lists(_FRAGMENTS, max_size=14).map("".join), st.lists(_FRAGMENTS, max_size=14))
def test_any_text_gets_a_verdict_without_the_library(gold: str, fragments: list[str]) -> None:
    equivalence.quick(gold, " ".join(fragments))
    equivalence.quick("".join(fragments), gold)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_normalise_takes_any_text(text: str) -> None:
    equivalence.quick("1", text)
    equivalence.quick(text, "x" + text)


@settings(max_examples=200, deadline=None)
@given(st.fractions(max_denominator=10_000), st.fractions(max_denominator=10_000))
def test_fractions_are_exact(a, b) -> None:
    left = rf"\frac{{{a.numerator}}}{{{a.denominator}}}"
    verdict = equivalence.quick(left, f"{b.numerator}/{b.denominator}")
    assert verdict is not None and verdict.equal == (a == b)
