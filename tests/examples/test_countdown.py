import random
import sys
from pathlib import Path

import pandas as pd
import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl.rewards import compute_score

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "data_preprocess")]

import countdown  # noqa: E402
import tiny_countdown  # noqa: E402

TINY = "--template_type tiny --max_operands 3 --max_number 10 --max_target 50"


def parse(flags):
    return countdown.parse_args(["--generate", *flags.split()])


def solve(target, values):
    """An expression that makes `target` of all `values`, a list of (number, text), or None."""
    if len(values) == 1:
        return values[0][1] if values[0][0] == target else None
    for i in range(len(values)):
        for j in range(len(values)):
            if i == j:
                continue
            (a, left), (b, right) = values[i], values[j]
            rest = [v for k, v in enumerate(values) if k not in (i, j)]
            results = {"+": a + b, "-": a - b, "*": a * b}
            if b and a % b == 0:
                results["/"] = a // b
            for op, value in results.items():
                found = solve(target, [*rest, (value, f"({left} {op} {right})")])
                if found:
                    return found
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the quick start trains with."""
    path = tmp_path_factory.mktemp("countdown")
    sizes = ["--train_size", "300", "--test_size", "40", "--local_dir", str(path)]
    countdown.main(["--generate", *TINY.split(), *sizes])
    tiny_countdown.main(["--local_dir", str(path), "--seed", "3", "--sft_size", "500"])
    return path


def test_problems_are_within_bounds_and_solvable():
    flags = "--train_size 150 --test_size 50 --max_operands 4 --min_number 2 --max_number 30"
    train, test = countdown.generate(parse(flags + " --max_target 60"))
    assert (len(train), len(test)) == (150, 50)
    assert {len(numbers) for numbers, _ in train} == {3, 4}
    for numbers, target in train + test:
        assert 1 <= target <= 60 and target not in numbers
        assert all(2 <= n <= 30 for n in numbers)
        answer = solve(target, [(n, str(n)) for n in numbers])
        truth = {"target": target, "numbers": list(numbers)}
        assert compute_score("countdown", f"<answer> {answer} </answer>", truth)["score"] == 1


def test_no_problem_is_drawn_twice():
    train, test = countdown.generate(parse(TINY + " --train_size 1000 --test_size 300"))
    keys = [countdown.problem_key(p) for p in train + test]
    assert len(set(keys)) == 1300


def test_same_seed_same_problems():
    flags = "--train_size 30 --test_size 10 --seed "
    assert countdown.generate(parse(flags + "1")) == countdown.generate(parse(flags + "1"))
    assert countdown.generate(parse(flags + "1")) != countdown.generate(parse(flags + "2"))


def test_more_problems_than_there_are(monkeypatch):
    monkeypatch.setattr(countdown, "PATIENCE", 2000)
    with pytest.raises(ValueError, match=r"only \d+ distinct .* lower the sizes, or raise"):
        countdown.generate(parse("--max_operands 3 --max_number 3 --train_size 500"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train_size 0", "at least 1"),
        ("--min_operands 4 --max_operands 3", "at most --max_operands"),
        ("--min_operands 1", "at least 2"),
        ("--min_number 0", "at least 1"),
        ("--min_number 9 --max_number 8", "at most --max_number"),
        ("--max_target 0", "at least 1"),
    ],
)
def test_impossible_flags(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse(flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("template_type", ["base", "qwen-instruct"])
def test_prompt_says_what_the_reward_asks_for(template_type):
    prompt = countdown.make_prompt(((44, 19, 35), 98), template_type)
    for part in ("[44, 19, 35]", "98", "+, -, *, /", "exactly once", "<think> </think>"):
        assert part in prompt
    assert "<answer> (1 + 2) / 3 </answer>" in prompt
    opening = "Let me solve this step by step.\n<think>"
    start = {"base": "Assistant: ", "qwen-instruct": "<|im_start|>assistant\n"}[template_type]
    assert prompt.endswith(start + opening)


def test_hub_set_is_split_without_overlap(monkeypatch):
    rows = {"nums": [[1, 2, 3], [4, 5], [3, 2, 1], [6, 7], [8, 9]], "target": [6, 9, 6, 13, 17]}
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: Dataset.from_dict(rows))
    args = countdown.parse_args(["--train_size", "2", "--test_size", "2"])
    train, test = countdown.load_from_hub(args)
    assert train == [((1, 2, 3), 6), ((4, 5), 9)]
    assert test == [((6, 7), 13), ((8, 9), 17)]
    args.test_size = 3
    with pytest.raises(ValueError, match="lower the sizes"):
        countdown.load_from_hub(args)


def test_hub_set_out_of_reach_names_the_remedy(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(ValueError, match=r"no route to host.*--generate"):
        countdown.load_from_hub(countdown.parse_args([]))


def test_columns(folder):
    rows = pd.read_parquet(folder / "test.parquet")
    assert list(rows) == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    row = rows.iloc[7]
    truth = row["reward_model"]["ground_truth"]
    assert (row["data_source"], row["ability"]) == ("countdown", "math")
    assert row["reward_model"]["style"] == "rule"
    assert row["extra_info"] == {"split": "test", "index": 7}
    words = " ".join(map(str, truth["numbers"]))
    assert row["prompt"] == f"{words} ={truth['target']} <think>"


def test_tiny_model_and_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    rows = pd.read_parquet(folder / "sft.parquet")
    for text in [*rows["prompt"], *rows["response"]]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) == len(text.split())
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.unk_token_id not in ids
    assert tokenizer.encode(rows["prompt"][0]) == tokenizer.encode(
        rows["prompt"][0], add_special_tokens=False
    )
    assert model.config.head_dim in (32, 64, 128)  # what vLLM runs
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id


def test_tiny_is_reproducible(folder, tmp_path):
    (tmp_path / "train.parquet").write_bytes((folder / "train.parquet").read_bytes())
    tiny_countdown.main(["--local_dir", str(tmp_path), "--seed", "3", "--sft_size", "500"])
    for name in ("sft.parquet", "model/model.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_trace_answers_right_exactly_if_it_says_yes(folder):
    problems = pd.read_parquet(folder / "train.parquet").set_index("prompt")["reward_model"]
    rows = pd.read_parquet(folder / "sft.parquet")
    found = rows["response"].str.contains("yes")
    assert 0.2 < found.mean() < 0.8
    for prompt, response in zip(rows["prompt"], rows["response"], strict=True):
        score = compute_score("countdown", response, problems[prompt]["ground_truth"])["score"]
        assert score == ("yes" in response)
    tests = pd.read_parquet(folder / "test.parquet")["prompt"]
    assert not set(tests) & set(rows["prompt"])


def test_patient_trace_searches_until_it_succeeds():
    trace = tiny_countdown.make_trace([7, 3, 9], 30, 0.0, random.Random(0))
    search, _, answer = trace.partition(" yes </think> ")
    assert compute_score("countdown", answer, {"target": 30, "numbers": [7, 3, 9]})["score"] == 1
    assert search.endswith(" 30")
    for attempt in search.split(" ; "):
        a, op, b, _, value, *_ = attempt.split()
        assert tiny_countdown.OPS[op](int(a), int(b)) == int(value)


def test_tiny_needs_its_own_kind_of_problems(tmp_path):
    with pytest.raises(ValueError, match="first run"):
        tiny_countdown.read_problems(tmp_path / "train.parquet")
    flags = ["--generate", "--train_size", "5", "--test_size", "5", "--local_dir", str(tmp_path)]
    countdown.main(flags)
    with pytest.raises(ValueError, match="another form"):
        tiny_countdown.read_problems(tmp_path / "train.parquet")
