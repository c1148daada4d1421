import random
import re
import sys
from fractions import Fraction
from pathlib import Path

import pandas as pd
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl.rewards.math import compare

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import tiny_math

PROMPT_LENGTH, RESPONSE_LENGTH = 32, 160  # limits of train_scripts/math-tiny-*.sh


def root(square):
    """The root of `square` as (factor, what stays under the root)."""
    factor = max(f for f in range(1, square + 1) if square % (f * f) == 0)
    return Fraction(factor), square // factor**2


def number(text):
    r"""A fraction, decimal or multiple of a root: (3/4, 1) for 0.75, (2, 3) for 2\sqrt{3}."""
    text = text.replace(" ", "").replace("dfrac", "frac").replace(r"\cdot", "")
    if match := re.fullmatch(r"\\frac\{(\d+)\}\{(\d+)\}", text):
        return Fraction(int(match[1]), int(match[2])), 1
    if match := re.fullmatch(r"(\d*)\\sqrt\{(\d+)\}", text):
        factor, rest = root(int(match[2]))
        return int(match[1] or 1) * factor, rest
    return Fraction(text), 1


def answer_value(text):
    """What an answer says: (number, radicand), or (low, high, low belongs to it, high does)."""
    text = text.replace(" ", "")
    if match := re.fullmatch(r"(?:x\\in)?([(\[])(\d+),(\d+)([)\]])", text):
        return int(match[2]), int(match[3]), match[1] == "[", match[4] == "]"
    if match := re.fullmatch(r"(\d+)(<|\\le)x(<|\\le)(\d+)", text):
        return int(match[1]), int(match[4]), match[2] != "<", match[3] != "<"
    return number(text.removeprefix("x="))


def solve(prompt):
    """The value of x, from the prompt alone."""
    left, right = re.fullmatch(r"x (.*) (?:=|\\in) (.*) \\implies", prompt).groups()
    terms = [(-1 if term[0] == "-" else 1, *number(term[1:])) for term in left.split()]
    if r"\in" in prompt:
        low, high, *closed = answer_value(right)
        moved = sum(sign * size for sign, size, _ in terms)
        return low - moved, high - moved, *closed
    size, radicand = number(right)
    assert {radicand} == {r for _, _, r in terms}
    return size - sum(sign * size for sign, size, _ in terms), radicand


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("math")
    sizes = "--train_size 300 --test_size 100 --sft_size 1500 --seed 3"
    tiny_math.main([*sizes.split(), "--local_dir", str(path)])
    return path


@pytest.fixture(scope="module")
def texts(folder):
    return pd.read_parquet(folder / "sft.parquet")


def test_solve_by_hand():
    assert solve(r"x -\frac{1}{4} +\frac{2}{3} = \frac{3}{4} \implies") == (Fraction(1, 3), 1)
    assert solve(r"x -\sqrt{12} +\sqrt{75} = \sqrt{147} \implies") == (4, 3)
    assert solve(r"x +5 -7 \in ( 8 , 12 ] \implies") == (10, 14, False, True)
    equal = [r"\sqrt{ 48 }", r"x = 4 \sqrt{ 3 }", r"4 \cdot \sqrt{ 3 }"]
    assert {answer_value(text) for text in equal} == {(4, 3)}
    assert answer_value(r"10 < x \le 14") == answer_value(r"x \in ( 10 , 14 ]")


def test_references_are_right(folder):
    rows = pd.concat([pd.read_parquet(folder / f"{split}.parquet") for split in ("train", "test")])
    for prompt, rule in zip(rows["prompt"], rows["reward_model"], strict=True):
        assert answer_value(rule["ground_truth"]) == solve(prompt)
    assert set(rows["extra_info"].str["kind"]) == set(tiny_math.UNITS)


def test_every_form_has_the_value_of_its_total():
    for kind, unit, total in [("fraction", 8, 6), ("fraction", 10, 20), ("root", 3, 4)]:
        problem = tiny_math.Problem(kind, unit, (1,), (1,))
        forms = problem.forms((total,))
        expected = (Fraction(total, unit), 1) if kind == "fraction" else (total, unit)
        assert len(set(forms)) == len(forms) >= 4
        assert {answer_value(form) for form in forms} == {expected}
    problem = tiny_math.Problem("interval", 1, (1,), (1, 2), "[)")
    assert {answer_value(form) for form in problem.forms((2, 9))} == {(2, 9, True, False)}


def test_text_answers_wrong_exactly_if_it_guesses(texts):
    missed = right = 0
    for prompt, response in zip(texts["prompt"], texts["response"], strict=True):
        found = compare("open_reasoner_zero", response, "unknown")
        assert found.equal is None, "short enough to be judged"
        assert (answer_value(found.pred) != solve(prompt)) == ("guess" in response)
        if "guess" not in response:
            right += 1
            missed += found.pred.replace(" ", "") != reference(prompt)
    assert 0.25 < right / len(texts) < 0.5
    assert missed / right > 0.6, "comparing strings would do"


def reference(prompt):
    """The simplest form of the solution, without spaces."""
    value = solve(prompt)
    if len(value) == 4:
        low, high, *closed = value
        return f"{'(['[closed[0]]}{low},{high}{')]'[closed[1]]}"
    size, radicand = value
    if radicand > 1:
        return rf"{size if size > 1 else ''}\sqrt{{{radicand}}}"
    p, q = size.numerator, size.denominator
    return rf"\frac{{{p}}}{{{q}}}" if q > 1 else str(p)


def test_working_is_right_step_by_step():
    rng = random.Random(0)
    for _ in range(300):
        problem = tiny_math.draw_problem(16, rng)
        working = problem.text(0.0, rng).partition(r" ; \boxed{")[0].split(" ; ")
        terms = problem.prompt.split()[1 : len(problem.terms) + 1]
        assert [step.split()[0] for step in working[1:]] == terms
        unit, _, total = working[0].partition(" : ")
        unit = number(unit)
        total = [int(n) for n in total.split(" , ")]
        for term, step in zip(terms, working[1:], strict=True):
            moved, new = step.partition(" : ")[2].split(" = ")
            size, radicand = number(term[1:])
            sign = -1 if term[0] == "+" else 1
            assert (int(moved) * unit[0], unit[1]) == (sign * size, radicand)
            assert [int(n) for n in new.split(" , ")] == [n + int(moved) for n in total]
            total = [n + int(moved) for n in total]


def test_test_problems_occur_nowhere_else(folder, texts):
    def keys(prompts):
        return {tuple(sorted(prompt.split())) for prompt in prompts}

    train, test = (pd.read_parquet(folder / f"{s}.parquet")["prompt"] for s in ("train", "test"))
    assert (len(keys(train)), len(keys(test))) == (300, 100)
    assert not keys(test) & (keys(train) | keys(texts["prompt"]))


def test_columns(folder):
    rows = pd.read_parquet(folder / "test.parquet")
    assert list(rows) == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    row = rows.iloc[7]
    assert (row["data_source"], row["ability"]) == ("open_reasoner_zero", "math")
    assert row["reward_model"]["style"] == "rule"
    assert (row["extra_info"]["split"], row["extra_info"]["index"]) == ("test", 7)


def test_every_word_is_a_token_and_texts_fit(folder, texts):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert 200_000 < model.num_parameters() < 300_000
    for column, limit in (("prompt", PROMPT_LENGTH), ("response", RESPONSE_LENGTH - 1)):
        for text in texts[column]:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert len(ids) == len(text.split()) <= limit
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
            assert tokenizer.unk_token_id not in ids
    rng = random.Random(1)
    words = set(tiny_math.vocabulary())
    for _ in range(3000):
        problem = tiny_math.draw_problem(16, rng)
        text = problem.text(0.1, rng)
        assert words.issuperset([*problem.prompt.split(), *text.split()])
        assert len(problem.prompt.split()) <= PROMPT_LENGTH
        assert len(text.split()) < RESPONSE_LENGTH


def test_same_seed_same_files(folder, tmp_path):
    sizes = "--train_size 300 --test_size 100 --sft_size 1500 --seed 3"
    tiny_math.main([*sizes.split(), "--local_dir", str(tmp_path)])
    for name in ("train.parquet", "test.parquet", "sft.parquet", "model/model.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_more_problems_than_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_math, "PATIENCE", 20)
    flags = "--train_size 20000 --test_size 20000 --max_terms 1 --local_dir"
    with pytest.raises(ValueError, match=r"only \d+ distinct .* raise --max_terms"):
        tiny_math.main([*flags.split(), str(tmp_path)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--give_up 1.5", "1.5 is not a probability"),
        ("--test_size 0", "must be at least 1"),
    ],
)
def test_impossible_flags(flags, message, capsys):
    with pytest.raises(SystemExit):
        tiny_math.main(["--local_dir", "x", *flags.split()])
    assert message in capsys.readouterr().err
