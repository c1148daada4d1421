"""What math responses answer, worked out by hand."""

import time

import pytest

from verl.rewards.math import boxed_answers, choice, compare


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        (r"\boxed{1} then \boxed{2}", ["1", "2"]),
        (r"\boxed{\frac{1}{\sqrt{2}}}.", [r"\frac{1}{\sqrt{2}}"]),
        (r"\boxed{ 5 }", ["5"]),
        (r"\boxed {5}", ["5"]),
        (r"\\boxed{5}", ["5"]),
        (r"\boxed{}", [""]),
        (r"\boxed{\{1, 2\}}", [r"\{1, 2\}"]),
        (r"\boxed{\{1, 2)}", [r"\{1, 2)"]),
        (r"\boxed{\begin{matrix}1\\2\\\end{matrix}}", [r"\begin{matrix}1\\2\\\end{matrix}"]),
        (r"\boxed{\boxed{3}}", ["3"]),
        (r"\boxed{1} and \boxed{2", ["1"]),
        (r"\boxed{1 \boxed{2}", ["2"]),
        (r"}} {\boxed{1}", ["1"]),
        (r"\boxed 5 \fbox{5} boxed{5}", []),
        ("", []),
    ],
)
def test_boxes(text, answers):
    assert boxed_answers(text) == answers


def test_hostile_boxes_cost_no_more_than_their_length():
    start = time.perf_counter()
    for text in (
        r"\boxed{" * 100_000,
        r"\boxed{" * 50_000 + "}" * 50_000,
        r"\boxed{1}" * 50_000 + "{" * 100_000,
        "\\" * 500_000,
        r"\boxed" + " " * 500_000,
        r"\boxed  " * 50_000,
    ):
        boxed_answers(text)
    assert time.perf_counter() - start < 5  # the quadratic way takes minutes


def test_the_last_box_is_the_answer_and_without_one_the_whole_response():
    assert compare("amc", r"\boxed{1} \boxed{2}", "2")[2] is True
    assert compare("amc", r"\boxed{2} \boxed{1}", "2")[2] is None
    assert compare("amc", " 2\n", "2")[2] is True
    assert compare("amc", "it is 2", "2")[2] is None
    assert compare("amc", "I think that it is 2, or maybe 3", "2")[2] is False  # 32 characters
    assert compare("amc", r"\boxed{1} so \boxed{2", "1")[2] is True


def test_long_answers_count_only_if_identical():
    gold, pred = "1" * 31, "+" + "1" * 30
    assert compare("math500", rf"\boxed{{{gold}}}", gold)[2] is True
    assert compare("math500", rf"\boxed{{{pred}}}", gold)[2] is False
    assert compare("math500", rf"\boxed{{{pred}}}", gold, max_answer_length=31)[2] is None
    assert compare("math500", rf"\boxed{{{'1' * 30}}}", gold)[2] is None


def test_majority_is_asked_for_and_the_latest_wins_a_tie():
    text = r"\boxed{1} \boxed{2} \boxed{2} \boxed{1} \boxed{3}"
    assert compare("aime2024", text, "3", {"find_maj": True})[0] == "1"
    assert compare("aime2024", text, "3", {"find_maj": False})[0] == "3"
    assert compare("aime2024", text, "3", {})[0] == "3"
    assert compare("aime2024", "4", "4", {"find_maj": True})[2] is True
    for boxes, answer in (("a", "a"), ("baba", "a"), ("abba", "a"), ("12321", "1")):
        text = "".join(rf"\boxed{{{box}}}" for box in boxes)
        assert compare("aime2024", text, "4", {"find_maj": True})[0] == answer


@pytest.mark.parametrize(
    ("pred", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        (r"\text{C}", "C"),
        (r"\textbf{D.} the third", "D"),
        ("A because B", "A"),
        ("Both", ""),
        ("4", ""),
        ("", ""),
    ],
)
def test_choice(pred, letter):
    assert choice(pred) == letter


def test_gpqa_compares_letters_and_never_asks():
    assert compare("gpqa", r"\boxed{\text{B}}", "B")[2] is True
    assert compare("gpqa", r"\boxed{(C) 4 J}", "B")[2] is False
    assert compare("gpqa", r"\boxed{}", "B")[2] is False
    assert compare("gpqa", "A long response without any box starts like this", "A")[2] is False


@pytest.mark.parametrize(
    ("gold", "equal"),
    [("5", True), (r"\boxed{5}", True), (" 5 ", True), (5, True), (5.0, None)],
)
def test_references(gold, equal):
    assert compare("minerva", r"\boxed{5}", gold)[2] is equal


@pytest.mark.parametrize("gold", ["", "  ", r"\boxed{}", None, True, ["5"], {"answer": 5}])
def test_references_that_are_none(gold):
    with pytest.raises(ValueError, match=r"ground truth of minerva must be LaTeX"):
        compare("minerva", r"\boxed{5}", gold)


def test_references_of_gpqa_are_letters():
    with pytest.raises(ValueError, match=r"ground truth of gpqa must be a letter.*'Both'"):
        compare("gpqa", r"\boxed{A}", "Both")
