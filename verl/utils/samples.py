"""Samples as files: what of them must outlive the process."""

import json
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import feather

from verl.protocol import ARRAYS, OptimizerStep, Prompt, Sample

SCHEMA = pa.schema(
    dict.fromkeys(("prompt_index", "group", "response_index", "policy_version"), pa.int64())
    | {"finish_reason": pa.string(), "extras": pa.string()}  # extras: JSON
    | {name: pa.list_(pa.from_numpy_dtype(dtype)) for name, dtype in ARRAYS.items()}
    | dict.fromkeys(("score", "reward", "baseline", "advantage"), pa.float64())
)


def write_samples(path: Path, samples: Sequence[Sample], **others: Sequence[Any]) -> None:
    """Writes samples exactly, but of the prompt only its index: as Feather, which takes half
    of the time, if `path` ends in .feather, else as parquet, which more programs read. `others`:
    more columns, [N]."""
    columns = {name: [getattr(s, name) for s in samples] for name in SCHEMA.names[1:]}
    columns["prompt_index"] = [s.prompt.index for s in samples]
    columns["extras"] = [json.dumps(plain(extras)) for extras in columns["extras"]]
    table = pa.table(columns, SCHEMA)
    for name, values in others.items():
        table = table.append_column(name, pa.array(values))
    if path.suffix == ".feather":
        feather.write_feather(table, path, compression="uncompressed")
        return
    # Dictionaries of token ids or of log-probabilities take long and save nothing, and so do
    # statistics, which nobody reads.
    few = [name for name in SCHEMA.names if name not in ARRAYS]
    pq.write_table(table, path, use_dictionary=few, write_statistics=False)


def read_samples(path: Path, prompts: Sequence[Prompt]) -> list[Sample]:
    """The samples written to `path`, a Feather file. Raises: ValueError if it isn't there, and for
    another prompt."""
    if not path.exists():
        remedy = "go on with the version that wrote the checkpoint"
        raise ValueError(f"{path} is missing, with responses that wait for the next step: {remedy}")
    by_index = {prompt.index: prompt for prompt in prompts}
    table = feather.read_table(path)
    arrays = [name for name in ARRAYS if name in table.column_names]
    rows = table.drop_columns(arrays).to_pylist()
    for name in arrays:
        for row, x in zip(rows, table[name], strict=True):
            row[name] = x.values.to_numpy(zero_copy_only=False) if x.is_valid else None
    for row in rows:
        row["extras"] = json.loads(row["extras"])
        row["prompt"] = by_index.get(index := row.pop("prompt_index"))
        if row["prompt"] is None:
            raise ValueError(f"{path}: prompt {index} is not in data.train_files")
    return [Sample(**row) for row in rows]


def plain(value: Any) -> Any:
    """Anything as Python's JSON and UTF-8 can hold it: numbers as Python's, all else as text."""
    value = value.item() if isinstance(value, np.generic) else value
    try:
        if isinstance(value, Mapping):
            return {plain(str(key)): plain(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        if value is None or isinstance(value, bool | float):
            return value
        if isinstance(value, Real) and math.isfinite(number := float(value)):
            return int(value) if isinstance(value, int) else number
        return str(value).encode(errors="replace").decode()  # a lone surrogate is no UTF-8
    except Exception:  # numbers too large for a float, texts that fail, structures without an end
        return f"<{type(value).__name__}>"


def response_texts(
    samples: Sequence[Sample], tokenizer: Any, skip_special_tokens: bool = False
) -> list[str]:
    """What is scored and shown of responses: their text, without the token that ended them."""
    ids = [s.response_ids[: len(s.response_ids) - (not s.truncated)].tolist() for s in samples]
    options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    return list(tokenizer.batch_decode(ids, **options)) if ids else []


def write_responses(
    folder: str | Path,
    step: int,
    samples: Sequence[Sample],
    tokenizer: Any,
    optimizer_steps: Sequence[OptimizerStep] = (),
    skip_special_tokens: bool = False,
) -> None:
    """Writes `folder/{step}.parquet`, a row per response, for people to read; `answer` is the extra
    `pred`, `weight` that of the first of the `optimizer_steps` with the response."""
    columns: dict[str, list[Any]] = {
        "step": [step] * len(samples),
        "data_source": [s.prompt.data_source for s in samples],
        "prompt": [str(tokenizer.decode(s.prompt.token_ids)) for s in samples],
        "response": response_texts(samples, tokenizer, skip_special_tokens),
        "answer": [str(p) if (p := s.extras.get("pred")) is not None else None for s in samples],
        "ground_truth": [json.dumps(plain(s.prompt.ground_truth)) for s in samples],
        "prompt_length": [len(s.prompt.token_ids) for s in samples],
        "response_length": [s.length for s in samples],
        "extras": [json.dumps(plain(s.extras)) for s in samples],
    }
    for name in ("group", "response_index", "finish_reason", "score", "reward", "advantage"):
        columns[name] = [getattr(s, name) for s in samples]
    if optimizer_steps:
        weights: dict[int, float] = {}
        for taken in reversed(optimizer_steps):
            tokens = (id(s.response_ids) for s in taken.samples)  # shared with `Sample.trained`
            weights.update(zip(tokens, taken.weights.tolist(), strict=True))
        columns["weight"] = [weights.get(id(s.response_ids)) for s in samples]
    path = Path(folder).expanduser() / f"{step}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def some_generations(
    samples: Sequence[Sample], number: int, tokenizer: Any, skip_special_tokens: bool = False
) -> list[tuple[str, str, float]]:
    """(prompt, response, score) of at most `number` samples, the same prompts each time."""
    chosen = [samples[i] for i in np.random.default_rng(0).permutation(len(samples))[:number]]
    texts = response_texts(chosen, tokenizer, skip_special_tokens)
    prompts = [str(tokenizer.decode(s.prompt.token_ids)) for s in chosen]
    return [(p, t, float(s.score)) for p, t, s in zip(prompts, texts, chosen, strict=True)]
