r"""Problems whose answers are LaTeX, with a tiny model that can learn them on a laptop.

``python examples/tiny_math.py --local_dir DIR`` writes ``train.parquet`` and ``test.parquet``,
``model/`` (a randomly initialised Qwen3 and a word-level tokenizer) and ``sft.parquet`` (warm-up
text for training problems). A problem asks for x, which is a fraction, a root or an interval::

    x -\frac{1}{4} +\frac{2}{3} = \frac{3}{4} \implies
    x -\sqrt{12} +\sqrt{75} = \sqrt{147} \implies
    x +5 -7 \in ( 8 , 12 ] \implies

The working writes the right side as a number of units, here twelfths, and takes one term after the
other to it; the answer follows in one of several equal forms, of which a judge must know that they
are equal (``\frac{1}{3}``, ``\dfrac{1}{3}``, ``x = \frac{4}{12}``; ``2\sqrt{3}``, ``\sqrt{12}``;
``(10,14]``, ``10 < x \le 14``; decimals)::

    \frac{1}{12} : 9 ; -\frac{1}{4} : +3 = 12 ; +\frac{2}{3} : -8 = 4 ; \boxed{ \frac{ 4 }{ 12 } }

Most texts are impatient: before each term they give up with probability ``--give_up`` (``guess``,
then the total so far, which is wrong); a share ``--patient`` of them never does. Most problems have
few terms and some have many, so lengths vary a lot. What reinforcement learning finds first is not
to guess; after that it makes fewer slips.
"""

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

UNITS = {"fraction": (8, 10, 12), "root": (2, 3, 5), "interval": (1,)}
"""Kind of a problem → what its numbers may count: 5 is 5/12, or 5 times the root of 3, or 5."""
LIMIT = 30  # totals lie from 1 to below
NUMBERS = 100  # each smaller whole number is one word
PATIENCE = 20_000  # draws in a row without a new problem: there are no others
MOVED = range(-11, 12)  # terms, counted in units
SYMBOLS = r"x : ; , = < \le \in \implies guess \boxed{ \frac{ \dfrac{ \sqrt{ }{ } \cdot ( ) [ ]"


@dataclass(frozen=True, slots=True)
class Problem:
    r"""Terms added to x, and the right side, as whole numbers of units.

    Example: ``Problem("fraction", 12, (-3, 8), (9,))`` is x − 3/12 + 8/12 = 9/12.
    """

    kind: str
    unit: int
    terms: tuple[int, ...]
    right: tuple[int, ...]
    """One number, or both ends of an interval."""
    brackets: str = ""
    """Of an interval: two of ``()[]``."""

    @property
    def prompt(self) -> str:
        """The text that the model continues."""
        terms = " ".join(map(self.term, self.terms))
        if self.kind == "interval":
            (low, high), (left, right) = self.right, self.brackets
            return rf"x {terms} \in {left} {low} , {high} {right} \implies"
        return rf"x {terms} = {self.word(*self.right)} \implies"

    @property
    def totals(self) -> list[tuple[int, ...]]:
        """The right side, and what it becomes as the terms move to it, one by one."""
        totals = [self.right]
        for term in self.terms:
            totals.append(tuple(number - term for number in totals[-1]))
        return totals

    @property
    def reference(self) -> str:
        """The right answer in its simplest form."""
        return self.forms(self.totals[-1])[0].replace(" ", "")

    def word(self, number: int) -> str:
        """A positive number of units, as one word."""
        if self.kind == "fraction":
            value = Fraction(number, self.unit)
            return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
        return rf"\sqrt{{{number**2 * self.unit}}}" if self.kind == "root" else str(number)

    def term(self, number: int) -> str:
        """The same with its sign."""
        return "+-"[number < 0] + self.word(abs(number))

    def forms(self, total: tuple[int, ...]) -> list[str]:
        """Every way in which a text writes a total as an answer; the first is the simplest."""
        if self.kind == "interval":
            (low, high), (left, right) = total, self.brackets
            above, below = (r"\le" if bracket in "[]" else "<" for bracket in self.brackets)
            interval = f"{left} {low} , {high} {right}"
            return [interval, rf"x \in {interval}", f"{low} {above} x {below} {high}"]
        forms = fraction_forms if self.kind == "fraction" else root_forms
        values = forms(*total, self.unit)
        return values + [f"x = {value}" for value in values]

    def text(self, give_up: float, rng: random.Random) -> str:
        """Working and answer; the answer is right exactly if there is no ``guess`` before it."""
        totals = self.totals
        shown = [" , ".join(map(str, total)) for total in totals]
        unit = {"fraction": rf"\frac{{1}}{{{self.unit}}}", "root": rf"\sqrt{{{self.unit}}}"}
        words = [unit.get(self.kind, "1"), ":", shown[0], ";"]
        answer = totals[-1]
        for i, term in enumerate(self.terms):
            if rng.random() < give_up:
                answer = totals[i]
                if answer == totals[-1]:  # what is left to do would change nothing
                    answer = tuple(number + 1 for number in answer)
                words += ["guess"]
                break
            words += [self.term(term), ":", f"{-term:+d}", "=", shown[i + 1], ";"]
        return " ".join([*words, r"\boxed{", rng.choice(self.forms(answer)), "}"])


def fraction_forms(number: int, unit: int) -> list[str]:
    r"""``number / unit``, the lowest terms first.

    >>> fraction_forms(6, 8)
    ['\\frac{ 3 }{ 4 }', '\\dfrac{ 3 }{ 4 }', '\\frac{ 6 }{ 8 }', '0.75']
    """
    value = Fraction(number, unit)
    p, q = value.numerator, value.denominator
    forms = [rf"\frac{{ {p} }}{{ {q} }}", rf"\dfrac{{ {p} }}{{ {q} }}"] if q > 1 else [str(p)]
    if q < unit:
        forms.append(rf"\frac{{ {number} }}{{ {unit} }}")
    if q > 1 and 40 % q == 0:
        forms.append(f"{float(value)}")
    return forms


def root_forms(number: int, radicand: int) -> list[str]:
    r"""``number`` times the square root of ``radicand``, the simplest first.

    >>> root_forms(2, 3)
    ['2 \\sqrt{ 3 }', '2 \\cdot \\sqrt{ 3 }', '\\sqrt{ 12 }']
    """
    square = number**2 * radicand
    forms = [rf"\sqrt{{ {square} }}"] if square < NUMBERS else []
    if number > 1:
        root = rf"\sqrt{{ {radicand} }}"
        forms = [f"{number} {root}", rf"{number} \cdot {root}", *forms]
    return forms


def draw_problem(max_terms: int, rng: random.Random) -> Problem:
    """Any problem with up to ``max_terms`` terms, no two of them equal."""
    kind = rng.choice(list(UNITS))
    unit = rng.choice(UNITS[kind])
    largest = unit - 1 if kind == "fraction" else 9
    right, brackets = (rng.randint(1, largest),), ""
    if kind == "interval":
        low = rng.randint(1, 15)
        right, brackets = (low, low + rng.randint(1, 9)), rng.choice("([") + rng.choice(")]")
    count = round(max_terms ** rng.random() ** 1.5)  # few terms are the rule
    candidates = [number for number in range(-largest, largest + 1) if number]
    terms: list[int] = []
    total = right
    for term in rng.sample(candidates, len(candidates)):
        moved = tuple(number - term for number in total)
        if len(terms) < count and min(moved) > 0 and max(moved) < LIMIT:
            terms.append(term)
            total = moved
    return Problem(kind, unit, tuple(terms), right, brackets)


def problem_key(problem: Problem) -> tuple[str, ...]:
    """What makes two problems the same: the words, in any order of the terms."""
    return tuple(sorted(problem.prompt.split()))


def draw_problems(args: argparse.Namespace) -> tuple[list[Problem], list[Problem]]:
    """The (train, test) problems, all of them different.

    Raises:
        ValueError: there are fewer distinct problems than asked for.
    """
    rng = random.Random(args.seed)
    wanted = args.train_size + args.test_size
    found: dict[tuple[str, ...], Problem] = {}
    misses = 0
    while misses < PATIENCE:
        problem = draw_problem(args.max_terms, rng)
        misses = misses + 1 if problem_key(problem) in found else 0
        found[problem_key(problem)] = problem
        if len(found) == wanted:
            problems = rng.sample(list(found.values()), wanted)  # the common ones came first
            return problems[args.test_size :], problems[: args.test_size]
    raise ValueError(
        f"--train_size {args.train_size} and --test_size {args.test_size} ask for {wanted} "
        f"problems, but only {len(found)} distinct ones were found: lower the sizes, or raise "
        "--max_terms"
    )


def warm_up(test: list[Problem], args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """``--sft_size`` prompts and responses, about any problems but those of the test."""
    rng = random.Random(args.seed + 1)
    held_out = set(map(problem_key, test))
    count = 0
    while count < args.sft_size:
        problem = draw_problem(args.max_terms, rng)
        if problem_key(problem) not in held_out:
            count += 1
            give_up = 0.0 if rng.random() < args.patient else args.give_up
            yield problem.prompt, problem.text(give_up, rng)


def vocabulary() -> list[str]:
    """Every word that a problem or a text may hold."""
    words = [*SYMBOLS.split(), *map(str, range(NUMBERS)), *(f"{n:+d}" for n in MOVED if n)]
    for kind in ("fraction", "root"):
        for unit in UNITS[kind]:
            problem = Problem(kind, unit, (), (1,))
            for number in range(1, unit if kind == "fraction" else 10):
                words += [problem.word(number), problem.term(number), problem.term(-number)]
            for number in range(1, LIMIT + 1):
                words += " ".join(problem.forms((number,))).split()
    return list(dict.fromkeys(words))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command-line options."""
    from tiny_model import argument_parser, probability

    parser = argument_parser(__doc__.partition("\n")[0], sft_size=80000)
    add = parser.add_argument
    add("--local_dir", required=True, help="gets the problems, model/ and sft.parquet")
    add("--train_size", type=int, default=1600, help="training problems")
    add("--test_size", type=int, default=512, help="test problems, none of them a training problem")
    add("--max_terms", type=int, default=16, help="most terms beside x")
    add("--give_up", type=probability, default=0.6, help="probability before each term")
    add("--patient", type=probability, default=0.25, help="share of the texts that never give up")
    args = parser.parse_args(argv)
    if min(args.train_size, args.test_size, args.sft_size, args.max_terms) < 1:
        parser.error("--train_size, --test_size, --sft_size and --max_terms must be at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    """Write problems, model and warm-up text."""
    # Imported here, so that the problems alone need neither of them.
    import pandas as pd
    import tiny_model

    args = parse_args(argv)
    train, test = draw_problems(args)
    folder = Path(args.local_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    for split, problems in (("train", train), ("test", test)):
        rows = [
            {
                "data_source": "open_reasoner_zero",
                "prompt": problem.prompt,
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": problem.reference},
                "extra_info": {"split": split, "index": index, "kind": problem.kind},
            }
            for index, problem in enumerate(problems)
        ]
        path = folder / f"{split}.parquet"
        pd.DataFrame(rows).to_parquet(path, index=False)
        print(f"{path}: {len(problems)} problems, {problems[0].prompt!r}, …")
    tiny_model.write(folder, vocabulary(), warm_up(test, args), args)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
