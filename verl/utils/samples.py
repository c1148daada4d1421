"""Samples as parquet: what of them must outlive the process."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from verl.protocol import ARRAYS, Prompt, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SCHEMA = pa.schema(
    {
        "prompt_index": pa.int64(),
        "group": pa.int64(),
        "draw": pa.int64(),
        "policy_version": pa.int64(),
        "finish_reason": pa.string(),
        "response_ids": pa.list_(pa.int64()),
        "rollout_log_probs": pa.list_(pa.float32()),
        "score": pa.float64(),
        "reward": pa.float64(),
        "extras": pa.string(),  # JSON
    }
)


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Writes scored samples, exactly; what later stages of a step compute is left out."""
    columns: dict[str, Any] = {
        "prompt_index": [s.prompt.index for s in samples],
        "extras": [json.dumps(_plain(s.extras)) for s in samples],
    }
    for name in SCHEMA.names:
        values = columns.get(name) or [getattr(s, name) for s in samples]
        columns[name] = _lists(values, ARRAYS[name]) if name in ARRAYS else values
    # Dictionaries of token ids or of log-probabilities take long and save nothing.
    few = [name for name in SCHEMA.names if name not in ARRAYS]
    encoding = {"response_ids.list.element": "DELTA_BINARY_PACKED"}
    table = pa.table(columns, SCHEMA)
    pq.write_table(table, path, use_dictionary=few, column_encoding=encoding)


def _lists(arrays: Sequence[Any], dtype: np.dtype[Any]) -> pa.ListArray:
    """One list per array, null for None."""
    given = [np.zeros(0, dtype) if a is None else a for a in arrays]
    ends = np.cumsum([len(a) for a in given], dtype=np.int32)
    values = np.concatenate([np.zeros(0, dtype), *given], dtype=dtype)
    none = pa.array([a is None for a in arrays], pa.bool_())
    return pa.ListArray.from_arrays(np.append(np.int32(0), ends), values, mask=none)


def read_samples(path: Path, prompts: Sequence[Prompt]) -> list[Sample]:
    """The samples written to `path`, with their prompts from `prompts`; none without a file.

    Raises: ValueError if a prompt is not among them.
    """
    if not path.exists():
        return []
    by_index = {prompt.index: prompt for prompt in prompts}
    table = pq.read_table(path)
    names = ["response_ids", "rollout_log_probs"]
    arrays = [[x.values.to_numpy() if x.is_valid else None for x in table[name]] for name in names]
    samples = []
    for row, *given in zip(table.drop_columns(names).to_pylist(), *arrays, strict=True):
        index = row.pop("prompt_index")
        if index not in by_index:
            raise ValueError(f"{path}: prompt {index} is not in data.train_files")
        row["extras"] = json.loads(row["extras"])
        samples.append(Sample(by_index[index], **row, **dict(zip(names, given, strict=True))))
    return samples


def _plain(value: Any) -> Any:
    """What JSON can hold: numbers as Python's, keys as text, and of anything else the text."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, str | int | float):
        return value
    return float(value) if isinstance(value, Real) else str(value)


def write_responses(
    folder: str | Path, step: int, samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Writes `folder/{step}.parquet`, a row per response, for people to read: prompt and response
    as text, `answer` (the extra `pred`, if there is one), ground truth and extras as JSON, score,
    reward, advantage, weight, lengths in tokens. If it can't be written, an error is logged."""
    columns: dict[str, list[Any]] = {
        "step": [step] * len(samples),
        "data_source": [s.prompt.data_source for s in samples],
        "prompt": tokenizer.batch_decode([s.prompt.token_ids for s in samples]),
        "response": tokenizer.batch_decode([s.response_ids for s in samples]),
        "answer": [str(p) if (p := s.extras.get("pred")) is not None else None for s in samples],
        "ground_truth": [json.dumps(_plain(s.prompt.ground_truth)) for s in samples],
        "prompt_length": [len(s.prompt.token_ids) for s in samples],
        "response_length": [s.length for s in samples],
        "extras": [json.dumps(_plain(s.extras)) for s in samples],
    }
    for name in ("group", "draw", "finish_reason", "score", "reward", "advantage", "weight"):
        columns[name] = [getattr(s, name) for s in samples]
    path = Path(folder).expanduser() / f"{step}.parquet"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
    except OSError as error:
        logger.error("the responses of step %d are not kept: %s", step, error)


def some_generations(
    samples: Sequence[Sample], number: int, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, str, float]]:
    """(prompt, response, score) of at most `number` samples, for people to read; drawn by their
    places alone, so that each validation shows the same prompts."""
    places = np.random.default_rng(0).permutation(len(samples))[:number]
    chosen = [samples[i] for i in places]
    decode = tokenizer.decode
    return [(decode(s.prompt.token_ids), decode(s.response_ids), float(s.score)) for s in chosen]


def dump_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Writes all that there is about samples, prompts included, to be looked at: arrays as lists,
    ground truth and extras as JSON."""
    theirs = ("ground_truth", "extra_info", "extras")  # of any type, which may differ by row
    rows = []
    for sample in samples:
        parts = (sample, ""), (sample.prompt, "prompt_")
        row = {p + f.name: getattr(part, f.name) for part, p in parts for f in fields(part)}
        del row["prompt"]
        rows.append({k: json.dumps(_plain(v)) if k.endswith(theirs) else v for k, v in row.items()})
    pq.write_table(pa.Table.from_pylist(rows), path)
