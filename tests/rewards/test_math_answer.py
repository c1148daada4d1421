"""What math responses answer, worked out by hand."""

import time

import pytest

from verl.rewards.answers import SLACK, boxes, choice, compare, final_answers


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
def test_published_boxes(text, answers):
    assert [content for *_, content in boxes(text, published=True)] == answers


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        (r"\boxed{1} then \boxed{2}", ["1", "2"]),
        (r"\boxed{6, \boxed{5}}", [r"6, \boxed{5}"]),
        (r"\boxed{\boxed{5} + 1}", [r"\boxed{5} + 1"]),
        (r"\boxed{\boxed{1} + \boxed{2}}", [r"\boxed{1} + \boxed{2}"]),
        (r"\boxed{1} and \boxed{2", ["1"]),
        (r"\boxed{1 \boxed{2}", ["2"]),
        (r"It is \fbox{5}, or \framebox{ 6 }.", ["5, 6"]),
        (r"Hence it is \boxed 5, as they say.", ["5"]),
        (r"\boxed12.", ["12"]),
        (r"\boxed{2} or $\boxed{3}$", ["2, 3"]),
        (r"\boxed{2}$, $\boxed{3}$ and \boxed{5}", ["2, 3, 5"]),
        (r"\boxed{2}, so \boxed{3}", ["2", "3"]),
        (r"\boxed{2}, and again: \boxed{2}", ["2", "2"]),
        (r"\boxed{2} or \boxed{2}", ["2"]),
        (r"\boxed{2}\,,\;\boxed{3}", ["2, 3"]),
        (r"$\boxed{2}\text{ and }\quad\boxed{3}$", ["2, 3"]),
        (r"\boxed{5}. Hence \boxed is no command that I know.", ["5"]),
        ("\\boxed{5} <answer> </answer>", ["5"]),
        ("<answer>5</answer>", ["5"]),
        (r"<answer> so \boxed{5} </answer> done", ["5"]),
        (r"\boxed{4} <answer>5</answer>", ["5"]),
        (r"<answer>5</answer> \boxed{4}", ["4"]),
        (r"<answer>5 <answer>6</answer> 7", ["6"]),
        (r"</answer> \boxed{4}", ["4"]),
        (r"<think>\boxed{5}</think> <answer> 7 </answer>", ["7"]),
        (r"<think>\boxed{5}</think> 7", ["7"]),
        (r"\boxed{5}</think> \boxed{7}", ["7"]),
        (r"<think>\boxed{5}", [""]),
        ("", [""]),
    ],
)
def test_final_answers(text, answers):
    assert final_answers(text) == answers


def test_hostile_boxes_cost_no_more_than_their_length():
    start = time.process_time()
    for text in (
        r"\boxed{" * 100_000,
        r"\boxed{" * 300_000 + "}" * 300_000,
        r"\boxed{1}" * 50_000 + "{" * 100_000,
        "\\" * 500_000,
        r"\boxed" + " " * 500_000,
        r"\boxed  " * 50_000,
        r"\boxed{1} or " * 50_000,
        " or ".join(rf"\boxed{{{i}}}" for i in range(50_000)),
        r"\boxed{1}" + ", and " * 100_000 + r"\boxed{1}",
        "<answer>" * 100_000,
        "<answer>" * 50_000 + "</answer>" * 50_000,
        "<think>" * 100_000,
    ):
        boxes(text, published=True)
        final_answers(text)
    assert time.process_time() - start < 60  # the quadratic way takes minutes


def test_the_last_box_is_the_answer_and_without_one_the_whole_response():
    assert compare("amc", r"\boxed{1} \boxed{2}", "2").equal is True
    assert compare("amc", r"\boxed{2} \boxed{1}", "2").equal is None
    assert compare("amc", " 2\n", "2").equal is True
    assert compare("amc", "it is 2", "2").equal is None
    assert compare("amc", r"\boxed{1} so \boxed{2", "1").equal is True


def test_the_published_rule_reads_the_thinking():
    text = r"<think>\boxed{5}</think> <answer> 7 </answer>"
    assert compare("amc", text, "5").pred == "7"
    assert compare("amc", text, "5", published=True).equal is True
    assert compare("amc", r"\boxed{6, \boxed{5}}", "5").equal is None
    assert compare("amc", r"\boxed{6, \boxed{5}}", "5", published=True).equal is True


def test_long_answers_count_only_if_identical():
    gold, pred = "1" * 31, "+" + "1" * 30
    assert compare("math500", rf"\boxed{{{gold}}}", gold, published=True).equal is True
    assert compare("math500", rf"\boxed{{{pred}}}", gold, published=True)[2:] == (False, True)
    assert compare("math500", rf"\boxed{{{'1' * 30}}}", gold, published=True).equal is None
    longer = {"published": True, "max_answer_length": 31}
    assert compare("math500", rf"\boxed{{{pred}}}", gold, **longer).equal is None


def test_a_long_reference_has_long_answers():
    gold = "1" * 31
    longest = "2" * (31 + SLACK)
    assert compare("math500", rf"\boxed{{{longest}}}", gold).equal is None
    assert compare("math500", rf"\boxed{{\left\, {longest} \right}}", gold).equal is None
    assert compare("math500", rf"\boxed{{{longest}2}}", gold)[2:] == (False, True)
    assert compare("math500", rf"\boxed{{{'2' * 31}}}", "1")[2:] == (False, True)
    assert compare("math500", rf"\boxed{{{'2' * 31}}}", "1", max_answer_length=31).equal is None
    for filler in (" ", "$", r"\left"):  # which the server would refuse to read
        text = "1" + filler * 1_000_000
        assert compare("math500", rf"\boxed{{{text}x}}", "2")[2:] == (False, True)


def test_majority_is_asked_for_and_the_latest_wins_a_tie():
    text = r"\boxed{1} \boxed{2} \boxed{2} \boxed{1} \boxed{3}"
    assert compare("aime2024", text, "3", {"find_maj": True}).pred == "1"
    assert compare("aime2024", text, "3", {"find_maj": False}).pred == "3"
    assert compare("aime2024", text, "3", {}).pred == "3"
    assert compare("aime2024", "4", "4", {"find_maj": True}).equal is True
    for letters, answer in (("a", "a"), ("baba", "a"), ("abba", "a"), ("12321", "1")):
        text = "".join(rf"\boxed{{{box}}}" for box in letters)
        assert compare("aime2024", text, "4", {"find_maj": True}).pred == answer


@pytest.mark.parametrize(
    ("pred", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        (r"\text{C}", "C"),
        (r"\textbf{D.} the third", "D"),
        ("the answer is **C**", "C"),
        ("I think the answer is (B)", "B"),
        ("I think that it is B.", "B"),
        ("Option C, as it is hot", "C"),
        ("C. Green", "C"),
        ("(A) or (B)", ""),
        (r"25^\circ\text{C}", ""),
        ("2 A", ""),
        ("vitamin C", ""),
        ("C60", ""),
        ("A because B", ""),
        ("Not A but B", ""),
        ("I'd say b", ""),
        ("Both", ""),
        ("4", ""),
        ("", ""),
    ],
)
def test_choice(pred, letter):
    assert choice(pred) == letter


def test_the_published_choice_is_the_first_letter():
    texts = ("A because B", "I think the answer is (B)", "Not A but b", "(b)", "Both")
    assert [choice(text, published=True) for text in texts] == ["A", "I", "A", "B", ""]


def test_gpqa_compares_letters_and_never_asks():
    assert compare("gpqa", r"\boxed{\text{B}}", "B").equal is True
    assert compare("gpqa", r"\boxed{(C) 4 J}", "B").equal is False
    assert compare("gpqa", r"\boxed{}", "B").equal is False
    assert compare("gpqa", "A long response without any box ends like this: B", "B").equal is False
    assert compare("gpqa", "So it is not (A) but C.", "A").equal is False


@pytest.mark.parametrize(
    ("gold", "equal"),
    [("5", True), (r"\boxed{5}", True), (" 5 ", True), (5, True), (5.0, None)],
)
def test_references(gold, equal):
    assert compare("minerva", r"\boxed{5}", gold).equal is equal


@pytest.mark.parametrize("gold", ["", "  ", r"\boxed{}", None, True, ["5"], {"answer": 5}])
def test_references_that_are_none(gold):
    with pytest.raises(ValueError, match=r"ground truth of minerva must be LaTeX"):
        compare("minerva", r"\boxed{5}", gold)


def test_references_of_gpqa_are_letters():
    with pytest.raises(ValueError, match=r"ground truth of gpqa must be a letter.*'Both'"):
        compare("gpqa", r"\boxed{A}", "Both")
