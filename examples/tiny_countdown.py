"""What the quick start needs besides problems: a tiny model, its tokenizer and its warm-up text.

``python examples/tiny_countdown.py --local_dir DIR`` reads ``DIR/train.parquet`` (three numbers a
problem, template ``tiny``: see ``data_preprocess/countdown.py``) and writes

* ``DIR/model``: a randomly initialised Qwen3 and a word-level tokenizer, in Hugging Face format;
* ``DIR/sft.parquet``: columns ``prompt`` and ``response``, search traces for training problems.

A trace tries first operations in random order. Each is followed by the number left over and by
every second operation in a fixed order, each result with a verdict (``low``, ``high``, ``yes``);
``yes`` ends the search with the answer::

    7 3 9 =30 <think> 9 - 7 = 2 3 : + 5 low - 1 low * 6 low ; 7 + 3 = 10 9 : + 19 low - 1 low ...

Most traces are impatient: after a first operation without success they give up with probability
``--give_up`` (``stop``, then a wrong answer); a share ``--patient`` of them never does. So the
warmed-up model can search but mostly does not, and lengths vary a lot. What reinforcement learning
finds first is not to give up, and in a few minutes it finds little else: the warmed-up model with
``stop`` forbidden is about as accurate. Fewer slips and better first operations are left to learn.
"""

import argparse
import itertools
import random
from pathlib import Path

import pandas as pd
from tiny_model import argument_parser, probability, write

LIMIT = 100  # all numbers, targets and results lie below: one token each
SYMBOLS = [
    *"+-*/()=:;",
    "yes",
    "low",
    "high",
    "stop",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
]
# Operations in the order in which a trace tries them.
OPS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b if b and a % b == 0 else -1,
}


def vocabulary() -> list[str]:
    """Every word that a problem or a trace may hold."""
    return [*SYMBOLS, *map(str, range(LIMIT)), *(f"={n}" for n in range(LIMIT))]


def results(a: int, b: int) -> list[tuple[int, str, int, int]]:
    """Every operation on two numbers whose result is in range: (left, operation, right, result).

    >>> results(6, 3)
    [(6, '+', 3, 9), (6, '-', 3, 3), (6, '*', 3, 18), (6, '/', 3, 2)]
    """
    a, b = max(a, b), min(a, b)
    return [(a, op, b, f(a, b)) for op, f in OPS.items() if 0 <= f(a, b) < LIMIT]


def first_operations(numbers: list[int]) -> list[tuple[int, str, int, int, int]]:
    """Every way to combine two of three numbers: (left, operation, right, result, left over)."""
    found = []
    for i, j in itertools.combinations(range(3), 2):
        found += [(*op, numbers[3 - i - j]) for op in results(numbers[i], numbers[j])]
    return list(dict.fromkeys(found))


def make_trace(numbers: list[int], target: int, give_up: float, rng: random.Random) -> str:
    """A search for ``target``; the answer is right exactly if the trace says ``yes``."""
    words: list[str] = []
    answer = ""
    tries = first_operations(numbers)
    rng.shuffle(tries)
    for a, op, b, value, rest in tries:
        words += [f"{a} {op} {b} = {value} {rest} :"]
        for left, second, right, result in results(value, rest):
            inner = f"( {a} {op} {b} )"
            # With equal values it does not matter which one is the inner expression.
            answer = f"{inner} {second} {right}" if left == value else f"{left} {second} {inner}"
            words += [f"{second} {result}"]
            if result == target:
                return " ".join([*words, f"yes </think> <answer> {answer} </answer>"])
            words += ["low" if result < target else "high"]
        words += [";"]
        if rng.random() < give_up:
            break
    return " ".join([*words, f"stop </think> <answer> {answer} </answer>"])


def warm_up(problems: pd.DataFrame, args: argparse.Namespace) -> list[tuple[str, str]]:
    """``--sft_size`` prompts with traces; every training problem is used about equally often."""
    rng = random.Random(args.seed)
    rows: list[tuple[str, str]] = []
    records = problems.to_dict("records")
    while len(rows) < args.sft_size:
        rng.shuffle(records)
        for record in records[: args.sft_size - len(rows)]:
            truth = record["reward_model"]["ground_truth"]
            numbers = [int(n) for n in truth["numbers"]]
            give_up = 0.0 if rng.random() < args.patient else args.give_up
            rows.append((record["prompt"], make_trace(numbers, int(truth["target"]), give_up, rng)))
    return rows


def read_problems(path: Path) -> pd.DataFrame:
    """The training problems.

    Raises:
        ValueError: they are missing, or not of the kind that the tiny model can read.
    """
    remedy = (
        "first run examples/data_preprocess/countdown.py --generate --template_type tiny "
        "--max_operands 3 --max_number 10 --max_target 50 --train_size 1600 --test_size 512 "
        f"--local_dir {path.parent}"
    )
    if not path.exists():
        raise ValueError(f"{path} does not exist: {remedy}")
    problems = pd.read_parquet(path)
    for prompt, rule in zip(problems["prompt"], problems["reward_model"], strict=True):
        truth = rule["ground_truth"]
        if "<think>" not in prompt or len(prompt.split()) != 5 or len(truth["numbers"]) != 3:
            raise ValueError(
                f"{path}: {prompt!r} has another form than '7 3 9 =30 <think>': {remedy}"
            )
        if max(*truth["numbers"], truth["target"]) >= LIMIT:
            raise ValueError(f"{path}: {prompt!r} holds numbers above {LIMIT - 1}: {remedy}")
    return problems


def main(argv: list[str] | None = None) -> None:
    """Write the model and the warm-up text."""
    parser = argument_parser(__doc__.partition("\n")[0], sft_size=44800)
    add = parser.add_argument
    add("--local_dir", required=True, help="holds train.parquet; gets model/ and sft.parquet")
    add("--give_up", type=probability, default=0.8, help="after each failed first operation")
    add("--patient", type=probability, default=0.2, help="share of the traces that never give up")
    args = parser.parse_args(argv)

    folder = Path(args.local_dir).expanduser()
    problems = read_problems(folder / "train.parquet")
    write(folder, vocabulary(), warm_up(problems, args), args)


if __name__ == "__main__":
    main()
