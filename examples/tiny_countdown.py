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
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

LIMIT = 100  # all numbers, targets and results lie below: one token each
EOS, PAD, UNK = "<|endoftext|>", "<|pad|>", "<|unk|>"
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


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; decoding joins words with spaces, so that nothing is lost either way."""
    words = [PAD, EOS, UNK, *SYMBOLS, *map(str, range(LIMIT)), *(f"={n}" for n in range(LIMIT))]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 with heads of size 32, the smallest that vLLM runs.

    Not a Qwen2: next to a Qwen2, AutoTokenizer replaces any tokenizer by Qwen2's byte-level one.
    The normalised queries and keys of a Qwen3 also learn this task in fewer steps.
    """
    torch.manual_seed(args.seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.hidden_size // 32,
        num_key_value_heads=args.hidden_size // 32,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


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


def sft_frame(problems: pd.DataFrame, args: argparse.Namespace) -> pd.DataFrame:
    """``--sft_size`` prompts with traces; every training problem is used about equally often."""
    rng = random.Random(args.seed)
    rows: list[dict[str, str]] = []
    records = problems.to_dict("records")
    while len(rows) < args.sft_size:
        rng.shuffle(records)
        for record in records[: args.sft_size - len(rows)]:
            truth = record["reward_model"]["ground_truth"]
            numbers = [int(n) for n in truth["numbers"]]
            give_up = 0.0 if rng.random() < args.patient else args.give_up
            trace = make_trace(numbers, int(truth["target"]), give_up, rng)
            rows.append({"prompt": record["prompt"], "response": trace})
    return pd.DataFrame(rows)


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
                f"{path}: {prompt!r} has another form than '7 3 9 =24 <think>': {remedy}"
            )
        if max(*truth["numbers"], truth["target"]) >= LIMIT:
            raise ValueError(f"{path}: {prompt!r} holds numbers above {LIMIT - 1}: {remedy}")
    return problems


def main(argv: list[str] | None = None) -> None:
    """Write the model and the warm-up text."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--local_dir", required=True, help="holds train.parquet; gets model/ and sft.parquet")
    add("--seed", type=int, default=0, help="of the initial weights and of the traces")
    add("--sft_size", type=int, default=44800, help="warm-up examples")
    add("--give_up", type=float, default=0.8, help="probability after each failed first operation")
    add("--patient", type=float, default=0.2, help="share of the traces that never give up")
    add("--hidden_size", type=int, default=96, help="a multiple of 32, the size of a head")
    add("--intermediate_size", type=int, default=256, help="width of the feed-forward layers")
    add("--num_layers", type=int, default=2, help="decoder layers")
    args = parser.parse_args(argv)
    if args.hidden_size % 32:
        parser.error("--hidden_size must be a multiple of 32, the size of a head")
    if not (0 <= args.give_up <= 1 and 0 <= args.patient <= 1):
        parser.error("--give_up and --patient are probabilities")

    folder = Path(args.local_dir).expanduser()
    problems = read_problems(folder / "train.parquet")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args)
    tokenizer.save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    frame = sft_frame(problems, args)
    frame.to_parquet(folder / "sft.parquet", index=False)
    print(f"{folder / 'model'}: {model.num_parameters():,} parameters, {len(tokenizer)} words")
    example = " ".join(frame.iloc[0])
    print(f"{folder / 'sft.parquet'}: {len(frame)} examples, {example!r}, …")


if __name__ == "__main__":
    main()
