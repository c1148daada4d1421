import sys
from pathlib import Path

import pandas as pd
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl.rewards import compute_score

sys.path[:0] = [str(Path(__file__).parents[2] / "examples" / folder) for folder in (".", "data_preprocess")]

import countdown
import tiny_countdown

TINY = "--template_type tiny --max_operands 3 --max_number 10 --max_target 50"


def draw(flags="--train_size 200 --test_size 50"):
    return countdown.generate(countdown.parse_args(["--generate", *flags.split()]))


def solutions(values):
    """All (value, expression) that use every one of `values`, pairs (Fraction or int, text), once."""
    if len(values) == 1:
        yield values[0]
    for i in range(len(values)):
        for j in range(len(values)):
            if i == j:
                continue
            (a, left), (b, right) = values[i], values[j]
            rest = [v for k, v in enumerate(values) if k not in (i, j)]
            for op in "+-*/":
                if op == "/" and (b == 0 or a % b):
                    continue
                value = {"+": a + b, "-": a - b, "*": a * b, "/": a // (b or 1)}[op]
                yield from solutions([*rest, (value, f"({left} {op} {right})")])


@pytest.fixture(scope="module")
def quick_start(tmp_path_factory):
    """The folder that the quick start trains in."""
    folder = tmp_path_factory.mktemp("countdown")
    sizes = ["--train_size", "300", "--test_size", "40", "--local_dir", str(folder)]
    countdown.main(["--generate", *TINY.split(), *sizes])
    tiny_countdown.main(["--local_dir", str(folder), "--seed", "3", "--sft_size", "500"])
    return folder
