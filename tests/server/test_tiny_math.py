"""The problems of examples/tiny_math.py: the judge knows which of their answers are equal."""

import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("math_verify")
sys.path.append(str(Path(__file__).parents[2] / "examples"))

import tiny_math
from tiny_math import LIMIT, UNITS, Problem

from server.math import equivalence


def blank_problems() -> list[Problem]:
    """One problem of every kind, unit and pair of brackets."""
    numbers = [Problem(k, unit, (1,), (1,)) for k in ("fraction", "root") for unit in UNITS[k]]
    return numbers + [
        Problem("interval", 1, (1,), (1, 2), brackets) for brackets in ("()", "(]", "[)", "[]")
    ]


@pytest.mark.parametrize("problem", blank_problems(), ids=repr)
def test_forms_of_a_total_are_equal_and_those_of_another_are_not(problem: Problem) -> None:
    for number in range(1, LIMIT):
        total = (number, number + 7) if problem.brackets else (number,)
        forms = problem.forms(total)
        gold = forms[0].replace(" ", "")
        for form in forms:
            assert equivalence.judge(gold, form).equal
        for form in problem.forms(tuple(n + 1 for n in total)):
            assert not equivalence.judge(gold, form).equal


def test_neither_a_guess_nor_the_problem_itself_is_an_answer() -> None:
    rng = random.Random(0)
    for _ in range(300):
        problem = tiny_math.draw_problem(3, rng)
        question = problem.prompt.removesuffix(r" \implies")
        assert not equivalence.judge(problem.reference, question).equal
        text = problem.text(0.5, rng)
        answer = text.partition(r"\boxed{")[2].removesuffix("}").strip()
        assert equivalence.judge(problem.reference, answer).equal == ("guess" not in text)
