"""GSM8K → parquet: grade-school word problems whose answer is one number.

Two sources, one output format:

* `--train_file`, `--test_file`: JSON lines with the fields `question` and `answer` (which ends in
  `#### 18`); only the files that are given are converted;
* neither: the Hugging Face set `openai/gsm8k` (needs a network).

`train.parquet` and `test.parquet` in `--local_dir` hold the columns `data_source`, `prompt` (one
chat message), `ability`, `reward_model` (rule and ground truth) and `extra_info`.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

HUB_NAME = "openai/gsm8k"
INSTRUCTION = 'Think step by step, and give the final answer after "####".'
MARK = "####"

Row = dict[str, Any]


def ground_truth(answer: str) -> str:
    """The number after the last `####`, without thousands separators.

    Raises: ValueError if there is none.

    >>> ground_truth("Half of 2,500 is 1,250.\\n#### 1,250")
    '1250'
    """
    _, mark, number = answer.rpartition(MARK)
    number = number.strip().replace(",", "")
    if not mark or not number:
        raise ValueError(f"answer has no number after {MARK!r}: {answer[-60:]!r}")
    return number


def to_row(index: int, problem: Row, split: str) -> Row:
    """The parquet row of one problem (`question`, `answer`)."""
    for name in ("question", "answer"):
        if not isinstance(problem, dict) or not isinstance(problem.get(name), str):
            raise ValueError(f"no text in the field {name!r}")
    question, answer = problem["question"], problem["answer"]
    return {
        "data_source": HUB_NAME,
        "prompt": [{"role": "user", "content": f"{question} {INSTRUCTION}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": ground_truth(answer)},
        "extra_info": {"split": split, "index": index, "question": question, "answer": answer},
    }


def convert(problems: Iterable[tuple[str, Row]], split: str, limit: int | None) -> list[Row]:
    """Parquet rows of the first `limit` problems (None: all); each comes with its place.

    Raises: ValueError, which names the place, for a problem without question or answer.
    """
    rows: list[Row] = []
    for where, problem in problems:
        if limit is not None and len(rows) == limit:
            break
        try:
            rows.append(to_row(len(rows), problem, split))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return rows


def read_jsonl(path: Path) -> Iterable[tuple[str, Row]]:
    """Yields (file and line number, problem); blank lines are skipped.

    Raises: FileNotFoundError; ValueError for a line that isn't JSON.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error}): give one object a line") from None


def load_from_hub(split: str) -> Iterable[tuple[str, Row]]:
    """(place, problem) of one split of the Hugging Face set.

    Raises: ValueError if the set can't be loaded.
    """
    # Not at the top: local files can do without their second. The hub comes first.
    from verl.utils.hub import ask_hub

    ask_hub()
    from datasets import load_dataset

    remedy = "pass --train_file and --test_file with JSON lines instead"
    try:
        problems = load_dataset(HUB_NAME, "main", split=split)
    except Exception as error:  # many types mean "no network" here
        raise ValueError(f"can't load {HUB_NAME} ({error}): {remedy}") from error
    return ((f"{HUB_NAME} {split}, row {i}", problem) for i, problem in enumerate(problems))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--local_dir", default="~/data/gsm8k", help="folder for train.parquet and test.parquet")
    add("--train_file", help="JSON lines for train.parquet")
    add("--test_file", help="JSON lines for test.parquet")
    add("--limit", type=int, help="problems of each file, from its start; default: all")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Writes `train.parquet` and `test.parquet`."""
    args = parse_args(argv)
    files = {"train": args.train_file, "test": args.test_file}
    from_hub = not any(files.values())
    folder = Path(args.local_dir).expanduser()
    for split, file in files.items():
        if not (file or from_hub):
            continue
        problems = load_from_hub(split) if from_hub else read_jsonl(Path(file).expanduser())
        rows = convert(problems, split, args.limit)
        if not rows:
            raise ValueError(f"{file or HUB_NAME}: no problems for {split}.parquet")
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
        print(f"{folder / f'{split}.parquet'}: {len(rows)} problems")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
