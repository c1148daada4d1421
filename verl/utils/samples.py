"""Samples as parquet: what of them must outlive the process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from verl.protocol import Prompt, Sample

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
    names = [name for name in SCHEMA.names if name not in ("prompt_index", "extras")]
    rows = []
    for sample in samples:
        extras = json.dumps(_plain(sample.extras))
        row = {name: getattr(sample, name) for name in names}
        rows.append(row | {"prompt_index": sample.prompt.index, "extras": extras})
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path)


def read_samples(path: Path, prompts: Sequence[Prompt]) -> list[Sample]:
    """The samples written to `path`, with their prompts from `prompts`; none without a file.

    Raises: ValueError if a prompt is not among them.
    """
    if not path.exists():
        return []
    by_index = {prompt.index: prompt for prompt in prompts}
    samples = []
    for row in pq.read_table(path).to_pylist():
        index = row.pop("prompt_index")
        if index not in by_index:
            raise ValueError(f"{path}: prompt {index} is not in data.train_files")
        row["response_ids"] = np.array(row["response_ids"], np.int64)
        row["extras"] = json.loads(row["extras"])
        if row["rollout_log_probs"] is not None:
            row["rollout_log_probs"] = np.array(row["rollout_log_probs"], np.float32)
        samples.append(Sample(by_index[index], **row))
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


def dump_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Writes all that there is about samples, prompts included, to be looked at: arrays as lists,
    and what is neither number nor text as JSON."""
    plain = (np.ndarray, str, Real, type(None))
    rows = []
    for sample in samples:
        parts = (sample, ""), (sample.prompt, "prompt_")
        row = {p + f.name: getattr(part, f.name) for part, p in parts for f in fields(part)}
        del row["prompt"]
        rows.append(
            {k: v if isinstance(v, plain) else json.dumps(_plain(v)) for k, v in row.items()}
        )
    pq.write_table(pa.Table.from_pylist(rows), path)
