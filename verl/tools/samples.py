"""Some of the best and of the worst responses, from the dumps of a run."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from verl.tools.runs import Run
from verl.trainer.ppo.tracking import owner

COUNT = 3
KINDS = (  # title, key of the folder, where it lies by default
    ("Validation", "trainer.validation_data_dir", "validation"),
    ("Training", "trainer.rollout_data_dir", "rollouts"),
)
TEXTS = ("prompt", "response")
FACTS = {  # column → its name in words
    "score": "score",
    "advantage": "advantage",
    "weight": "weight",
    "response_length": "tokens",
    "finish_reason": "finish",
    "answer": "answer",
    "ground_truth": "ground truth",
    "data_source": "data",
}


@dataclass(slots=True)
class Dump:
    """The responses picked from one file."""

    title: str
    step: int
    total: int
    """How many responses the file holds."""
    best: list[dict[str, Any]]
    worst: list[dict[str, Any]]
    """Each with `prompt` and `response` (text), `truncated`, and `facts` (name → text)."""


def dumps(run: Run) -> list[Dump]:
    """The last readable dump of each kind that the run has."""
    found = []
    for title, key, default in KINDS:
        named = Path(run.settings.get(key) or run.folder / default).expanduser()
        # Another run may have moved them aside since, or somebody the whole folder.
        places = [named, *named.glob("earlier_run_*"), named / "val_only", run.folder / default]
        mine = [p for p in places if p.is_dir() and owner(p) in (None, owner(run.folder))]
        files = [path for folder in mine[:1] for path in folder.glob("*.parquet")]
        files = [path for path in files if path.stem.isdecimal()]
        for path in sorted(files, key=lambda path: int(path.stem), reverse=True):
            try:
                found.append(_read(title, path))
                break
            except (pa.ArrowInvalid, OSError) as error:  # a run may have been killed right there
                print(f"{path} is left out: {error}", file=sys.stderr)
    return found


def pick(
    scores: list[float | None], prompts: list[Any], count: int = COUNT
) -> tuple[list[int], list[int]]:
    """Rows of the best and of the worst responses, of different prompts as far as there are.

    Of equal scores the first row counts. What scores like the best is no bad one, so that there may
    be none.
    """
    known = {i: s for i, s in enumerate(scores) if s is not None and not math.isnan(s)}
    best = _distinct(sorted(known, key=lambda i: -known[i]), prompts, count)
    top = max(known.values(), default=0)
    lower = [i for i in known if known[i] < top and i not in best]
    worst = _distinct(sorted(lower, key=lambda i: known[i]), prompts, count)
    return best, worst


def _distinct(ranked: list[int], prompts: list[Any], count: int) -> list[int]:
    first = {str(prompts[i]): i for i in reversed(ranked)}
    chosen = [i for i in ranked if first[str(prompts[i])] == i]
    return (chosen + [i for i in ranked if i not in set(chosen)])[:count]


def _read(title: str, path: Path) -> Dump:
    file = pq.ParquetFile(path)
    wanted = [name for name in (*TEXTS, *FACTS) if name in file.schema_arrow.names]
    if title == "Validation":  # where there is neither
        wanted = [name for name in wanted if name not in ("advantage", "weight")]
    table = file.read(columns=wanted)
    rows = table.num_rows
    columns = {name: table[name].to_pylist() for name in ("score", "prompt") if name in wanted}
    prompts = columns.get("prompt", [None] * rows)
    best, worst = pick(columns.get("score", [0.0] * rows), prompts)
    shown = [
        list(map(_sample, table.take(part).to_pylist())) if part else [] for part in (best, worst)
    ]
    return Dump(title, int(path.stem), rows, *shown)


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    facts = {
        name: f"{row[column]:.4g}" if isinstance(row[column], float) else _text(row[column])
        for column, name in FACTS.items()
        if row.get(column) is not None
    }
    texts = {name: _text(row[name]) for name in TEXTS if row.get(name) is not None}
    return texts | {"facts": facts, "truncated": row.get("finish_reason") == "length"}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
