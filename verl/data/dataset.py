"""Parquet and JSON files → prompts or supervised samples, and the order in which they are used."""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from verl.config.base import SFTDataConfig, TrainFilesConfig
from verl.config.schema import DataConfig
from verl.protocol import FinishReason, Prompt, Sample

logger = logging.getLogger(__name__)

Files = str | Path | Sequence[str | Path]

TOKENIZE_BATCH = 1000  # texts of one tokenizer call: enough to keep its threads busy
KINDS: dict[type, str] = {str: "a string", list: "chat messages", dict: "a struct"}
EMPTY = "the text is empty: write one, or drop the row"
REWARD_MODEL = 'write {"style": "rule", "ground_truth": …}, as examples/data_preprocess does'


class Row(NamedTuple):
    """One row of a file: plain Python values by column."""

    location: str
    values: dict[str, Any]

    def error(self, key: str, problem: str) -> ValueError:
        """One wording for all that is wrong in a row."""
        return ValueError(f"{self.location}, key {key!r}: {problem}")

    def typed(self, key: str, kind: type = str, remedy: str = "write it anew") -> Any:
        """The value in this column, which must be of this type."""
        value = self.values[key]
        if not isinstance(value, kind):
            shown = "null" if value is None else repr(value)
            raise self.error(key, f"must be {KINDS[kind]}, not {shown:.60}: {remedy}")
        return value


def load_prompts(
    files: Files,
    config: DataConfig,
    tokenizer: Any,
    num_embeddings: float = inf,
    max_samples: int = -1,
    for_model: Callable[[dict[str, Any]], bool] = lambda reward_model: False,
) -> list[Prompt]:
    """Tokenized prompts of all files, in order, from the columns `prompt_key` (chat messages, or
    strings with apply_chat_template=False), `reward_fn_key`, `reward_model` (`for_model` says of it
    whether a reward model scores the row) and, if they are there, `extra_info` and `tools` (of the
    chat: schemas, or all as one JSON string); of `max_samples` rows, if positive (`_some`). Raises:
    FileNotFoundError; ValueError for bad rows or ids ≥ `num_embeddings`."""
    columns = {config.prompt_key: "data.prompt_key", config.reward_fn_key: "data.reward_fn_key"}
    remedies = {column: f"set {key}" for column, key in columns.items()}
    rows = _some(_read_rows(files, remedies | {"reward_model": REWARD_MODEL}), max_samples, config)
    key, bos = config.prompt_key, _bos(config, tokenizer, chat=config.apply_chat_template)
    render = partial(_render, config, tokenizer)
    tokens = _tokenize(tokenizer, rows, key, render, num_embeddings, bos)
    prompts, overlong, limit = [], 0, config.max_prompt_length
    for index, (row, ids) in enumerate(zip(rows, tokens, strict=True)):
        if len(ids) > limit:
            overlong += 1
            if config.filter_overlong_prompts:
                continue
            if config.truncation == "error":
                problem = f"the prompt has {len(ids)} tokens, but data.max_prompt_length={limit}"
                remedy = "raise it, or set data.filter_overlong_prompts=True or data.truncation"
                raise row.error(config.prompt_key, f"{problem}: {remedy}")
            head = {"left": 0, "middle": limit // 2, "right": limit}[config.truncation]
            ids = np.concatenate([ids[:head], ids[len(ids) - (limit - head) :]])
        source = row.typed(config.reward_fn_key, str, "write the name that chooses the reward")
        model, info = row.typed("reward_model", dict, REWARD_MODEL), row.values.get("extra_info")
        truth = model.get("ground_truth")
        chat = _messages(config, row) if for_model(model) else None
        if truth is None and chat is None:
            raise row.error("reward_model", f"has no ground_truth: {REWARD_MODEL}")
        info = {} if info is None else row.typed("extra_info", dict)
        prompts.append(Prompt(index, ids, source, truth, info, row.location, chat))
    count = f"{overlong} of {len(rows)} prompts are longer than data.max_prompt_length={limit}"
    if not prompts:
        remedy = "so data.filter_overlong_prompts=True leaves none: raise the limit"
        raise ValueError(f"{files}: {count}, {remedy}")
    if overlong:
        fate = "dropped" if config.filter_overlong_prompts else f"cut ({config.truncation})"
        logger.info("%s: %s", count, fate)
    return prompts


def load_sft_rows(
    config: SFTDataConfig, tokenizer: Any, num_embeddings: float = inf
) -> list[Sample]:
    """One sample per row of `config.train_files`: prompt, and response with end-of-sequence token,
    which one that is cut has not. Raises: as `load_prompts`, also for a tokenizer without such a
    token and for a prompt that leaves no room for a response."""
    if (eos := tokenizer.eos_token_id) is None:
        problem = "the tokenizer has no end-of-sequence token, so no response could learn to end"
        remedy = "set eos_token in its tokenizer_config.json, or choose another with data.tokenizer"
        raise ValueError(f"{problem}: {remedy}")
    if eos >= num_embeddings:
        raise ValueError(f"the tokenizer ends with token {eos}, but the model has {num_embeddings}")
    keys = {config.prompt_key: "set data.prompt_key", config.response_key: "set data.response_key"}
    rows = _some(_read_rows(config.train_files, keys), config.train_max_samples, config)
    bos = _bos(config, tokenizer, chat=False)
    prompts = _tokenize(tokenizer, rows, config.prompt_key, Row.typed, num_embeddings, bos)
    responses = _tokenize(tokenizer, rows, config.response_key, Row.typed, num_embeddings)
    samples: list[Sample] = []
    for row, prompt_ids, ids in zip(rows, prompts, responses, strict=True):
        response_ids = np.append(ids, eos).astype(np.int32)
        room = config.max_length - len(prompt_ids)
        cut = len(response_ids) > room
        if cut and (config.truncation == "error" or room < 1):
            count = f"{len(prompt_ids)} prompt tokens and {len(response_ids)} response tokens"
            remedy = ", or set data.truncation=right to cut responses" if room >= 1 else ""
            problem = f"{count} are more than data.max_length={config.max_length}: raise it{remedy}"
            raise row.error(config.response_key, problem)
        prompt = Prompt(len(samples), prompt_ids, data_source="sft", ground_truth=None)
        reason: FinishReason = "length" if cut else "stop"
        samples.append(Sample(prompt, prompt.index, response_ids[:room], reason))
    if num_cut := sum(sample.truncated for sample in samples):
        count = f"{num_cut} of {len(samples)} responses"
        logger.info("%s were cut to fit into data.max_length=%d", count, config.max_length)
    return samples


@dataclass
class PromptOrder:
    """The endless order of training prompts, in batches of `batch_size`. Resumes exactly. Epoch e
    is a permutation drawn from `np.random.default_rng([seed, e])`, or the order of the file with
    shuffle=False. Its last prompts, too few for a batch, are skipped. Example:
    ``PromptOrder(5, batch_size=2, shuffle=False)`` gives [0, 1], [2, 3], [0, 1], …"""

    num_prompts: int
    batch_size: int
    seed: int = 1
    shuffle: bool = True
    batch_key: str = "data.train_batch_size"  # what messages call `batch_size`
    batches_taken: int = 0

    def __post_init__(self) -> None:
        """Raises: ValueError if no batch is full."""
        if self.batch_size > self.num_prompts:
            size = f"{self.batch_key}={self.batch_size}"
            hint = "lower it, or give more prompts in data.train_files"
            raise ValueError(f"{size} is more than the {self.num_prompts} training prompts: {hint}")

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch."""
        return self.num_prompts // self.batch_size

    @property
    def epoch(self) -> int:
        """Epoch of the next batch, from 0: the number of epochs that are over."""
        return self.batches_taken // self.steps_per_epoch

    def next_batch(self) -> list[int]:
        """Positions of the next `batch_size` prompts, each in [0, num_prompts)."""
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(self.num_prompts) if self.shuffle else np.arange(self.num_prompts)
        start = self.batches_taken % self.steps_per_epoch * self.batch_size
        self.batches_taken += 1
        return order[start : start + self.batch_size].tolist()

    def state_dict(self) -> dict[str, int | bool]:
        """Where the order is, and what it is made of: JSON-able, for `load_state_dict`."""
        return {name: value for name, value in asdict(self).items() if name != "batch_key"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken. Raises: ValueError if it belongs to another order."""
        names = {"num_prompts": "the number of training prompts", "batch_size": self.batch_key}
        names |= {"seed": "data.seed", "shuffle": "data.shuffle"}
        changed = []
        for key, name in names.items():
            if (before := state.get(key)) != (now := getattr(self, key)):
                changed.append(f"{name} was {before} and is {now}")
        if changed:
            remedy = "resume with the same data and settings, or set trainer.resume_mode=disable"
            raise ValueError(f"the order of prompts can't go on: {'; '.join(changed)}: {remedy}")
        self.batches_taken = int(state["batches_taken"])


def _read_rows(files: Files, required: dict[str, str]) -> list[Row]:
    """All rows. `required`: column → what to do when it is missing."""
    rows = []
    for name in [files] if isinstance(files, str | Path) else files:
        if not (path := Path(name).expanduser()).exists():
            remedy = "check the path, or write it with one of examples/data_preprocess/"
            if re.fullmatch(r"[\w-]+/[\w-]+", str(name)):
                remedy += f"; of the hub's datasets download the files first: hf download {name}"
                remedy += " --repo-type dataset --local-dir FOLDER"
            raise FileNotFoundError(f"{path}: no such file: {remedy}")
        read, kind = _READERS.get(path.suffix, (_read_parquet, "parquet"))
        try:
            columns, values = read(path, [*required, "extra_info", "tools"])
        except (pa.ArrowException, OSError, ValueError) as error:
            problem = f"not a readable {kind} file ({error}): check the path, or write it anew"
            raise ValueError(f"{path}: {problem}") from error
        if not values:
            raise ValueError(f"{path}: no rows: write it anew, or leave it out of the data files")
        for key, remedy in required.items():
            if key not in columns:
                problem = f"no such column, only {', '.join(columns)}: {remedy}"
                raise Row(str(path), {}).error(key, problem)
        rows += [Row(f"{path}, row {number}", row) for number, row in enumerate(values)]
    if not rows:
        raise ValueError("no data files: set data.train_files (or data.val_files) to their paths")
    return rows


def _read_parquet(path: Path, wanted: list[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """Names of all columns; the rows, with those wanted that are there."""
    # Opened here: given a folder, pyarrow would read whatever lies below it.
    with path.open("rb") as file:
        parquet = pq.ParquetFile(file)
        return parquet.schema_arrow.names, parquet.read(columns=wanted).to_pylist()


def _read_json(path: Path, wanted: list[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """The same of a list of objects, or of one object a line."""
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        records = json.loads(text)
    else:
        records = [json.loads(line) for line in text.split("\n") if line.strip()]
    if not all(isinstance(record, dict) for record in records):
        raise ValueError("each row must be an object")
    columns = list(dict.fromkeys(key for record in records for key in record))
    present = [key for key in wanted if key in columns]
    return columns, [{key: record.get(key) for key in present} for record in records]


_READERS = dict.fromkeys((".json", ".jsonl"), (_read_json, "JSON"))


def _some(rows: list[Row], max_samples: int, config: TrainFilesConfig) -> list[Row]:
    """At most `max_samples` rows, if positive: the first or, with `data.shuffle`, those that verl's
    `RLHFDataset` draws with this `data.seed`."""
    if not 0 < max_samples < len(rows):
        return rows
    if not config.shuffle:
        return rows[:max_samples]
    rng = np.random.default_rng(config.seed)
    return [rows[i] for i in rng.choice(len(rows), max_samples, replace=False)]


def _render(config: DataConfig, tokenizer: Any, row: Row, key: str) -> str:
    """The text that the model continues."""
    if not config.apply_chat_template:
        return row.typed(key, str, "render chat messages with data.apply_chat_template=True")
    chat = _messages(config, row)
    if getattr(tokenizer, "chat_template", None) is None:
        problem = "can't render chat messages: the tokenizer has no chat template"
        remedy = "Choose one that has, with data.tokenizer, or use plain string prompts"
        raise row.error(key, f"{problem}. {remedy} and data.apply_chat_template=False")
    try:
        tools = row.values.get("tools")
        options = {"tools": json.loads(tools) if isinstance(tools, str) else _without_null(tools)}
        options |= config.apply_chat_template_kwargs
        options |= {"add_generation_prompt": True, "tokenize": False}
        return str(tokenizer.apply_chat_template(chat, **options))
    except Exception as error:  # templates raise what they like, Jinja's own errors included
        raise row.error(key, f"the tokenizer's chat template rejects it: {error}") from error


def _messages(config: DataConfig, row: Row) -> list[dict[str, Any]]:
    """The row's chat messages; none where prompts are strings."""
    key = config.prompt_key
    if not config.apply_chat_template:
        return []
    messages = row.typed(key, list, "for plain strings set data.apply_chat_template=False")
    if not messages:
        raise row.error(key, EMPTY)
    for message in messages:
        called = isinstance(message, dict) and message.get("tool_calls")  # instead of a content
        needed = ("role",) if called else ("role", "content")
        if not isinstance(message, dict) or None in map(message.get, needed):
            shape = '{"role": …, "content": …}'
            raise row.error(key, f"each message must be {shape}, not {message!r:.60}")
    return [_without_null(message) for message in messages]


def _without_null(value: Any) -> Any:
    """A struct of a parquet file has every field in every row; templates expect absent ones to be
    absent."""
    if isinstance(value, dict):
        return {k: _without_null(v) for k, v in value.items() if v is not None}
    return [_without_null(v) for v in value] if isinstance(value, list) else value


def _bos(config: TrainFilesConfig, tokenizer: Any, chat: bool) -> list[int]:
    """What prompts begin with: nothing, or the beginning-of-sequence token."""
    bos, wanted = tokenizer.bos_token_id, config.add_bos
    if wanted is None:
        wanted = not chat and bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    if wanted and bos is None:
        raise ValueError("data.add_bos=True: the tokenizer has no beginning-of-sequence token")
    return [bos] if wanted else []


def _tokenize(
    tokenizer: Any,
    rows: list[Row],
    key: str,
    read: Callable[[Row, str], str],
    num_embeddings: float,
    bos: Sequence[int] = (),
) -> Iterator[NDArray[np.int64]]:
    """Token ids of each row's text, int64 [T], T ≥ 1, without special tokens but `bos`, once."""
    remaining = iter(tqdm(rows, desc=f"tokenizing {key}", delay=2, disable=None))
    # Lengths are checked by the callers; verbose would warn about the model's own limit.
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    while batch := list(islice(remaining, TOKENIZE_BATCH)):
        encoded = tokenizer([read(row, key) for row in batch], **options)
        for row, ids in zip(batch, encoded["input_ids"], strict=True):
            if not len(ids):
                raise row.error(key, EMPTY)
            if (largest := max(*ids, *bos, 0)) >= num_embeddings:
                problem = f"the tokenizer gives token {largest}, but the model has {num_embeddings}"
                raise row.error(key, f"{problem}: take the model's own, or set data.tokenizer")
            yield np.asarray(ids if ids[:1] == [*bos] else [*bos, *ids], dtype=np.int64)
