"""Open-Reasoner-Zero → parquet: math problems for training, and four sets for validation.

The sources are two folders cloned from GitHub (`REPOSITORIES`); `SOURCES` says which file or folder
in them becomes which parquet file. `--files` makes only some, such as those for validation.

The parquet files hold the columns `data_source`, `prompt` (the plain text that the model continues:
run with `data.apply_chat_template=False`), `ability`, `reward_model` (rule and ground truth, as
text) and `extra_info`.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

REPOSITORIES = {
    "open_reasoner_zero": "https://github.com/Open-Reasoner-Zero/Open-Reasoner-Zero",
    "understand_r1_zero": "https://github.com/sail-sg/understand-r1-zero",
}
"""Flag that names the folder of a clone → where to clone it from."""


class Source(NamedTuple):
    """Where the problems of one file come from."""

    data_source: str
    """The name that chooses the reward."""
    repository: str
    """A key of `REPOSITORIES`."""
    path: str
    """JSON file, or folder saved by `datasets`, in the repository."""


SOURCES = {
    "train": Source("open_reasoner_zero", "open_reasoner_zero", "data/orz_math_57k_collected.json"),
    "test1": Source("math500", "open_reasoner_zero", "data/eval_data/math500.json"),
    "test2": Source("aime2024", "open_reasoner_zero", "data/eval_data/aime2024.json"),
    "test_amc": Source("amc", "understand_r1_zero", "datasets/evaluation_suite/amc"),
    "test_minerva": Source("minerva", "understand_r1_zero", "datasets/evaluation_suite/minerva"),
}
"""Name of the parquet file → its source."""

BEFORE_QUESTION = (
    "This is a conversation between a user and an assistant. The user asks a question, and the "
    "assistant answers it: it first thinks about the reasoning in its mind and only then gives the "
    "user the answer. Its reasoning stands inside <think> </think> tags and its answer inside "
    "<answer> </answer> tags, that is, <think> the reasoning </think> <answer> the answer "
    "</answer>.\n"
    "User: Give your answer inside <answer> </answer> tags, and write the final result in it as "
    "\\boxed{result}: it is extracted from \\boxed{} automatically. This is the problem:\n"
)
AFTER_QUESTION = "\nAssistant: <think>"


def make_prompt(question: str) -> str:
    """The text that the model continues; it ends with `<think>`, without a newline."""
    return f"{BEFORE_QUESTION}{question.strip()}{AFTER_QUESTION}"


def ground_truth(answer: Any) -> str:
    """The right answer as text, from text, a number, or a list of equivalent answers.

    Of a list the first one counts: the others, with few exceptions, are other spellings of it.
    Numbers keep their exact value, without exponent and needless decimals.

    Raises: ValueError if there is no answer.

    >>> ground_truth(142.0), ground_truth(2.5e-5), ground_truth(["10^{-3}\\n", "0.001"])
    ('142', '0.000025', '10^{-3}')
    """
    match answer:
        case [first, *_]:
            return ground_truth(first)
        case str() if answer.strip():
            return answer.strip()
        case int() if not isinstance(answer, bool):
            return str(answer)
        case float() if math.isfinite(answer):
            return str(int(answer)) if answer.is_integer() else f"{Decimal(repr(answer)):f}"
    raise ValueError(f"the answer must be text or a finite number, not {answer!r}")


def to_row(problem: Any, data_source: str, split: str, index: int) -> dict[str, Any]:
    """The parquet row of one problem, in any of the forms that the sources have.

    Raises: ValueError for another form, or without question or answer.
    """
    match problem:
        case (
            [{"value": str(question)}, {"ground_truth": {"value": answer}}]
            | {"prompt": [{"value": str(question)}], "final_answer": answer}
            | {"problem": str(question), "answer": answer}
        ) if question.strip():
            prompt, truth = make_prompt(question), ground_truth(answer)
            # Raises for half a surrogate pair, which JSON can hold and parquet can't.
            (prompt + truth).encode()
            return {
                "data_source": data_source,
                "prompt": prompt,
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": truth},
                "extra_info": {"split": split, "index": index},
            }
    raise ValueError(f"not a question with an answer: {str(problem)[:200]}")


def read_problems(path: Path) -> Iterable[Any]:
    """The problems of a JSON file, or of a folder saved by `datasets`.

    Raises: OSError, and ValueError if the content is of another kind.
    """
    if path.is_dir():
        from datasets import load_from_disk  # not at the top: JSON can do without its second

        return load_from_disk(str(path))
    try:
        problems = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}): download it anew") from None
    if not isinstance(problems, list):
        raise ValueError(f"{path}: not a list of problems: download it anew")
    return problems


def convert(path: Path, name: str, limit: int | None) -> list[dict[str, Any]]:
    """Rows of the parquet file `name`: the first `limit` problems of `path`, or all.

    Raises: OSError, and ValueError, which names the file and the row (from 0).
    """
    data_source = SOURCES[name].data_source
    split = "train" if name == "train" else "test"
    rows = []
    for index, problem in enumerate(islice(read_problems(path), limit)):
        try:
            rows.append(to_row(problem, data_source, split, index))
        except ValueError as error:
            raise ValueError(f"{path}, row {index}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: no problems for {name}.parquet: download it anew")
    return rows


def find_sources(args: argparse.Namespace) -> dict[str, Path]:
    """Parquet file asked for → its source.

    Raises: FileNotFoundError, which names all that are missing and says how to get them.
    """
    paths = {
        name: Path(getattr(args, SOURCES[name].repository)).expanduser() / SOURCES[name].path
        for name in args.files
    }
    missing = {name: path for name, path in paths.items() if not path.exists()}
    if not missing:
        return paths
    lines = ["these sources are missing:"]
    lines += [f"  {path} (for {name}.parquet)" for name, path in missing.items()]
    lines += ["get them by"]
    for flag in dict.fromkeys(SOURCES[name].repository for name in missing):
        lines += [f"  git clone {REPOSITORIES[flag]} {getattr(args, flag)}"]
    lines += ["or name the folders of your clones with --open_reasoner_zero, --understand_r1_zero"]
    if found := [name for name in paths if name not in missing]:
        lines += [f"or make only the others: --files {' '.join(found)}"]
    raise FileNotFoundError("\n".join(lines))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line (`argv` defaults to the program's)."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--open_reasoner_zero", default="~/Open-Reasoner-Zero", metavar="DIR", help="its clone")
    add("--understand_r1_zero", default="~/understand-r1-zero", metavar="DIR", help="its clone")
    add("--local_dir", default="~/data/open_reasoner_zero_nochat", help="folder for the files")
    contents = ", ".join(f"{name} ({source.data_source})" for name, source in SOURCES.items())
    add(
        "--files",
        nargs="+",
        choices=SOURCES,
        default=list(SOURCES),
        metavar="NAME",
        help=f"the parquet files to make, of {contents}",
    )
    add("--limit", type=int, help="problems of each file, from its start (None: all)")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    """Write the parquet files."""
    args = parse_args(argv)
    sources = find_sources(args)
    folder = Path(args.local_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in sources.items():
        rows = convert(source, name, args.limit)
        path, aside = folder / f"{name}.parquet", folder / f"{name}.parquet.tmp"
        pq.write_table(pa.Table.from_pylist(rows), aside)
        os.replace(aside, path)  # so that an interrupted run leaves no half file behind
        print(f"{path}: {len(rows)} problems of {SOURCES[name].data_source}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
