"""CountDown → parquet: combine all given numbers with + - * / so that they make the target.

Two sources, one output format:

* default: Hugging Face's ``Jiayi-Pan/Countdown-Tasks-3to4`` (needs a network);
* ``--generate``: problems drawn here, solvable by construction, reproducible by ``--seed``.

``train.parquet`` and ``test.parquet`` in ``--local_dir`` hold the columns ``data_source``,
``prompt`` (the plain text that the model continues: run with ``data.apply_chat_template=False``),
``ability``, ``reward_model`` (rule and ground truth) and ``extra_info``. No test problem, known by
its sorted numbers and its target, occurs in the training file.
"""

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from tqdm import tqdm

HUB_NAME = "Jiayi-Pan/Countdown-Tasks-3to4"
# Draws in a row without a new problem after which the space of problems counts as exhausted.
PATIENCE = 200_000

Problem = tuple[tuple[int, ...], int]  # (numbers in the order shown, target)

TASK = (
    "Using the numbers {numbers}, create an equation that equals {target}. You can use the basic "
    "arithmetic operations (+, -, *, /), and each number has to be used exactly once. Show your "
    "work in <think> </think> tags, and return the final answer in <answer> </answer> tags, for "
    "example <answer> (1 + 2) / 3 </answer>."
)
OPENING = "Let me solve this step by step.\n<think>"
TEMPLATES = {
    "base": (
        "This is a conversation between a user and an assistant. The user asks a question, and the "
        "assistant answers it: it first thinks about the reasoning in its mind and only then gives "
        f"the user the answer.\nUser: {TASK}\nAssistant: {OPENING}"
    ),
    "qwen-instruct": (
        "<|im_start|>system\nYou are a helpful assistant. You first think about the reasoning in "
        "your mind and then give the user the answer.<|im_end|>\n"
        f"<|im_start|>user\n{TASK}<|im_end|>\n<|im_start|>assistant\n{OPENING}"
    ),
    # One token per word, the target a token of its own kind: see examples/tiny_countdown.py.
    "tiny": "{words} ={target} <think>",
}


def make_prompt(problem: Problem, template_type: str) -> str:
    """The text that the model continues.

    >>> make_prompt(((7, 3, 9), 30), "tiny")
    '7 3 9 =30 <think>'
    """
    numbers, target = problem
    words = " ".join(map(str, numbers))
    return TEMPLATES[template_type].format(numbers=list(numbers), target=target, words=words)


def problem_key(problem: Problem) -> Problem:
    """What makes two problems the same: the sorted numbers and the target."""
    numbers, target = problem
    return tuple(sorted(numbers)), target


def random_target(numbers: tuple[int, ...], rng: random.Random) -> int:
    """The value of a random expression with each number once and only integers on the way."""
    values = list(numbers)
    while len(values) > 1:
        a = values.pop(rng.randrange(len(values)))
        b = values.pop(rng.randrange(len(values)))
        op = rng.choice("+-*/")
        if op == "/":  # only exact division: otherwise one of the operations that always works
            op = "/" if b and a % b == 0 else rng.choice("+-*")
        values.append({"+": a + b, "-": a - b, "*": a * b, "/": a // (b or 1)}[op])
    return values[0]


def draw_problems(args: argparse.Namespace) -> Iterator[Problem]:
    """Distinct problems within the bounds of ``args``, until no new one turns up any more."""
    rng = random.Random(args.seed)
    seen: set[Problem] = set()
    misses = 0
    while misses < PATIENCE:
        count = rng.randint(args.min_operands, args.max_operands)
        numbers = tuple(rng.randint(args.min_number, args.max_number) for _ in range(count))
        problem = numbers, random_target(numbers, rng)
        target, key = problem[1], problem_key(problem)
        if not 1 <= target <= args.max_target or target in numbers or key in seen:
            misses += 1
            continue
        misses = 0
        seen.add(key)
        yield problem


def generate(args: argparse.Namespace) -> tuple[list[Problem], list[Problem]]:
    """Draw the (train, test) problems, without overlap.

    Raises:
        ValueError: there are fewer distinct problems than asked for.
    """
    wanted = args.train_size + args.test_size
    problems: list[Problem] = []
    with tqdm(total=wanted, desc="drawing problems", delay=1, leave=False, disable=None) as bar:
        for problem in draw_problems(args):
            problems.append(problem)
            bar.update()
            if len(problems) == wanted:
                break
    if len(problems) < wanted:
        raise ValueError(
            f"--train_size {args.train_size} and --test_size {args.test_size} ask for {wanted} "
            f"problems, but only {len(problems)} distinct ones were found within the bounds: lower "
            "the sizes, or raise --max_operands, --max_number or --max_target"
        )
    # Easy problems (many solutions) are drawn early; shuffling gives both files the same mixture.
    random.Random(args.seed + 1).shuffle(problems)
    return problems[: args.train_size], problems[args.train_size :]


def load_from_hub(args: argparse.Namespace) -> tuple[list[Problem], list[Problem]]:
    """The first ``train_size`` problems of the Hugging Face set, then new ones for the test.

    Raises:
        ValueError: the set cannot be loaded, or is too small.
    """
    # Not at the top: --generate can do without their second. The hub comes first.
    from verl.utils.hub import ask_hub

    ask_hub()
    from datasets import load_dataset

    remedy = "pass --generate to draw the problems here instead"
    try:
        rows = load_dataset(HUB_NAME, split="train")
    except Exception as error:  # "no network" comes in many types; all mean the same here
        raise ValueError(f"cannot load {HUB_NAME} ({error}): {remedy}") from error
    problems = [(tuple(n), t) for n, t in zip(rows["nums"], rows["target"], strict=True)]
    train = problems[: args.train_size]
    trained = set(map(problem_key, train))
    test = [p for p in problems[args.train_size :] if problem_key(p) not in trained]
    if len(train) < args.train_size or len(test) < args.test_size:
        raise ValueError(
            f"{HUB_NAME} has {len(problems)} problems, {len(test)} of them left for the test after "
            f"--train_size {args.train_size}, too few for --test_size {args.test_size}: lower the "
            f"sizes, or {remedy}"
        )
    return train, test[: args.test_size]


def to_frame(problems: list[Problem], split: str, template_type: str) -> pd.DataFrame:
    """The parquet rows of ``problems``."""
    return pd.DataFrame(
        {
            "data_source": "countdown",
            "prompt": make_prompt(problem, template_type),
            "ability": "math",
            "reward_model": {
                "style": "rule",
                "ground_truth": {"target": problem[1], "numbers": list(problem[0])},
            },
            "extra_info": {"split": split, "index": index},
        }
        for index, problem in enumerate(problems)
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line (``argv`` defaults to the program's)."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--local_dir", default="~/data/countdown_nochat", help="folder for the two files")
    add("--train_size", type=int, default=327680, help="problems for training")
    add("--test_size", type=int, default=1024, help="problems for validation")
    add("--template_type", choices=list(TEMPLATES), default="base", help="text of the prompt")
    add("--generate", action="store_true", help="draw the problems here: no network needed")
    bounds = parser.add_argument_group("with --generate")
    add = bounds.add_argument
    add("--min_operands", type=int, default=3, help="fewest numbers in a problem")
    add("--max_operands", type=int, default=4, help="most numbers in a problem")
    add("--min_number", type=int, default=1, help="smallest number")
    add("--max_number", type=int, default=99, help="largest number")
    add("--max_target", type=int, default=100, help="largest target (the smallest is 1)")
    add("--seed", type=int, default=0, help="the same seed draws the same problems")
    args = parser.parse_args(argv)
    if args.train_size < 1 or args.test_size < 1:
        parser.error("--train_size and --test_size must be at least 1")
    if not 2 <= args.min_operands <= args.max_operands:
        parser.error("--min_operands must be at least 2 and at most --max_operands")
    if not 1 <= args.min_number <= args.max_number:
        parser.error("--min_number must be at least 1 and at most --max_number")
    if args.max_target < 1:
        parser.error("--max_target must be at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    """Write ``train.parquet`` and ``test.parquet``."""
    args = parse_args(argv)
    train, test = generate(args) if args.generate else load_from_hub(args)
    folder = Path(args.local_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    for split, problems in (("train", train), ("test", test)):
        path = folder / f"{split}.parquet"
        to_frame(problems, split, args.template_type).to_parquet(path, index=False)
        print(
            f"{path}: {len(problems)} problems, {make_prompt(problems[0], args.template_type)!r}, …"
        )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
