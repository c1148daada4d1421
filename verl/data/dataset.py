"""Parquet files → prompts (or supervised samples), and the resumable order in which they are used.

Row numbers in messages count from 0 within their file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from verl.protocol import FinishReason, Prompt, Sample
from verl.trainer.config.schema import DataConfig
from verl.trainer.config.sft_schema import SFTDataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Files = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

Row = tuple[str, dict[str, Any]]  # (file and row number, values)

TOKENIZE_BATCH = 1000  # texts of one tokenizer call: enough to keep its threads busy
KINDS = {str: "a string", list: "chat messages", dict: "a struct"}
EMPTY = "the text is empty: write one, or drop the row"


def load_prompts(
    files: Files, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> list[Prompt]:
    """Tokenized prompts of all files, in file order; `Prompt.index` counts rows before filtering.

    Columns: `config.prompt_key` (chat messages, or a string with apply_chat_template=False),
    `config.reward_fn_key`, `reward_model` (struct with `ground_truth`), `extra_info` (optional).
    No special tokens are added to the text: a chat template writes its own.

    Raises: FileNotFoundError, and ValueError for anything in a file that can't be used. The message
    names the file, the row, the key and the remedy.
    """
    required = {
        config.prompt_key: "data.prompt_key names the column of prompts",
        config.reward_fn_key: "data.reward_fn_key names the column that chooses the reward",
        "reward_model": "write a struct with ground_truth, as examples/data_preprocess does",
    }
    rows = _read_rows(files, required, optional=["extra_info"])
    tokens = _tokenize(tokenizer, rows, config.prompt_key, partial(_render, config, tokenizer))
    prompts, overlong, limit = [], 0, config.max_prompt_length
    for index, ((where, row), ids) in enumerate(zip(rows, tokens, strict=True)):
        if len(ids) > limit:
            overlong += 1
            if config.filter_overlong_prompts:
                continue
            if config.truncation == "error":
                raise _error(
                    where,
                    config.prompt_key,
                    f"the prompt has {len(ids)} tokens, more than data.max_prompt_length={limit}: "
                    "raise it, drop such prompts with data.filter_overlong_prompts=True, or cut "
                    "them with data.truncation=left or right",
                )
            ids = ids[-limit:] if config.truncation == "left" else ids[:limit]
        prompts.append(_prompt(index, ids, where, row, config))
    if overlong:
        few = f"{overlong} of {len(rows)} prompts"
        count = f"{few} are longer than data.max_prompt_length={limit} tokens"
        if not prompts:
            names = ", ".join(map(str, _paths(files)))
            raise ValueError(
                f"{names}: {count}, so data.filter_overlong_prompts=True leaves none: raise "
                "data.max_prompt_length"
            )
        fate = "dropped" if config.filter_overlong_prompts else f"cut on the {config.truncation}"
        logger.info("%s: %s", count, fate)
    return prompts


def locate(files: Files, index: int) -> str:
    """File and row of the prompt with this `Prompt.index`, for messages."""
    for path in _paths(files):
        rows = pq.read_metadata(path).num_rows
        if index < rows:
            return f"{path}, row {index}"
        index -= rows
    raise IndexError(index)


def load_sft_rows(config: SFTDataConfig, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """One sample per row of `config.train_files`: prompt, and response with end-of-sequence token.

    Both strings are tokenized separately, without special tokens. With truncation=right a response
    that doesn't fit into max_length loses its last tokens, the end-of-sequence token included, and
    its finish_reason is `length`. Weights are left at 0.

    Raises: as `load_prompts`, also for a tokenizer without end-of-sequence token and for a prompt
    that leaves no room for a response.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError(
            "the tokenizer has no end-of-sequence token, so no response could learn to end: set "
            "eos_token in its tokenizer_config.json, or choose another one with data.tokenizer"
        )
    required = {
        config.prompt_key: "data.prompt_key names the column of prompts",
        config.response_key: "data.response_key names the column of responses",
    }
    rows = _read_rows(config.train_files, required)
    prompts = _tokenize(tokenizer, rows, config.prompt_key, _typed)
    responses = _tokenize(tokenizer, rows, config.response_key, _typed)
    samples = []
    for (where, _), prompt_ids, ids in zip(rows, prompts, responses, strict=True):
        response_ids = np.append(ids, eos)
        room = config.max_length - len(prompt_ids)
        cut = len(response_ids) > room
        if cut and (config.truncation == "error" or room < 1):
            raise _error(
                where,
                config.response_key,
                f"{len(prompt_ids)} prompt tokens and {len(response_ids)} response tokens are more "
                f"than data.max_length={config.max_length}: raise it"
                + (", or set data.truncation=right to cut responses" if room >= 1 else ""),
            )
        prompt = Prompt(len(samples), prompt_ids, data_source="sft", ground_truth=None)
        reason: FinishReason = "length" if cut else "stop"
        samples.append(Sample(prompt, prompt.index, response_ids[:room], reason))
    if num_cut := sum(sample.truncated for sample in samples):
        limit = f"data.max_length={config.max_length} tokens"
        logger.info("%d of %d responses were cut to fit into %s", num_cut, len(samples), limit)
    return samples


class PromptOrder:
    """The endless order of training prompts, in batches. Resumes exactly.

    Epoch e is a permutation drawn from `np.random.default_rng([seed, e])`, or the order of the file
    with shuffle=False. What is left of an epoch when fewer than `batch_size` prompts remain is
    skipped, so every batch has the same size and no prompt occurs twice in it.

    Example: ``PromptOrder(5, batch_size=2, shuffle=False)`` gives [0, 1], [2, 3], [0, 1], …
    """

    def __init__(
        self,
        num_prompts: int,
        batch_size: int,
        seed: int = 1,
        shuffle: bool = True,
        batch_key: str = "data.train_batch_size",
    ) -> None:
        """`batch_key`: what messages call `batch_size`. Raises: ValueError if no batch is full."""
        if batch_size < 1:
            raise ValueError(f"{batch_key}={batch_size} must be at least 1")
        if batch_size > num_prompts:
            raise ValueError(
                f"{batch_key}={batch_size} is more than the {num_prompts} training prompts: lower "
                "it, or give more prompts in data.train_files"
            )
        self.num_prompts, self.batch_size = num_prompts, batch_size
        self.seed, self.shuffle = seed, shuffle
        self._batches_taken = 0
        self._identity = {  # attribute → what messages call it
            "num_prompts": "the number of training prompts",
            "batch_size": batch_key,
            "seed": "data.seed",
            "shuffle": "data.shuffle",
        }

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch."""
        return self.num_prompts // self.batch_size

    @property
    def epoch(self) -> int:
        """Epoch of the next batch, from 0: the number of epochs that are over."""
        return self._batches_taken // self.steps_per_epoch

    def next_batch(self) -> list[int]:
        """Positions of the next `batch_size` prompts, each in [0, num_prompts)."""
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(self.num_prompts) if self.shuffle else np.arange(self.num_prompts)
        start = self._batches_taken % self.steps_per_epoch * self.batch_size
        self._batches_taken += 1
        return order[start : start + self.batch_size].tolist()

    def state_dict(self) -> dict[str, int | bool]:
        """Where the order is, and what it is made of: JSON-able, for `load_state_dict`."""
        identity = {name: getattr(self, name) for name in self._identity}
        return {"batches_taken": self._batches_taken, **identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises: ValueError, which names what changed, if `state` belongs to another order.
        """
        changed = [
            f"{words} was {state.get(name)} and is {getattr(self, name)}"
            for name, words in self._identity.items()
            if state.get(name) != getattr(self, name)
        ]
        if changed:
            raise ValueError(
                f"the checkpoint's order of prompts can't go on: {'; '.join(changed)}. Resume with "
                "the same data and settings, or start anew with trainer.resume_mode=disable"
            )
        self._batches_taken = int(state["batches_taken"])


def _paths(files: Files) -> list[Path]:
    """One path or many, `~` expanded."""
    many = [files] if isinstance(files, str | os.PathLike) else files
    return [Path(file).expanduser() for file in many]


def _read_rows(
    files: Files, required: Mapping[str, str], optional: Sequence[str] = ()
) -> list[Row]:
    """All rows, with plain Python values. `required`: column → what to do when it is missing."""
    paths = _paths(files)
    if not paths:
        raise ValueError("no data files: set data.train_files (or data.val_files) to parquet files")
    rows = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(
                f"{path}: no such file. Check data.train_files and data.val_files, or write it "
                "with one of examples/data_preprocess/"
            )
        try:
            # Opened here: given a folder, pyarrow would read whatever lies below it.
            with path.open("rb") as file:
                parquet = pq.ParquetFile(file)
                columns = parquet.schema_arrow.names
                for key, remedy in required.items():
                    if key not in columns:
                        has = ", ".join(columns)
                        raise _error(str(path), key, f"no such column, only {has}: {remedy}")
                wanted = [*required, *(key for key in optional if key in columns)]
                values = parquet.read(columns=wanted).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{path}: not a readable parquet file ({error}): check the path, or write it anew"
            ) from error
        if not values:
            raise ValueError(f"{path}: no rows: write it anew, or leave it out of the data files")
        rows += [(f"{path}, row {number}", row) for number, row in enumerate(values)]
    return rows


def _render(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, where: str, key: str, prompt: Any
) -> str:
    """The text that the model continues."""
    if not config.apply_chat_template:
        remedy = "render chat messages with data.apply_chat_template=True"
        return _typed(where, key, prompt, str, remedy)
    _typed(where, key, prompt, list, "for plain strings set data.apply_chat_template=False")
    if not prompt:
        raise _error(where, key, EMPTY)
    for message in prompt:
        if not isinstance(message, dict) or None in map(message.get, ("role", "content")):
            shape = '{"role": …, "content": …}'
            raise _error(where, key, f"each message must be {shape}, not {_describe(message)}")
    if getattr(tokenizer, "chat_template", None) is None:
        raise _error(
            where,
            key,
            "can't render chat messages: the tokenizer has no chat template. Choose one that has, "
            "with data.tokenizer, or use plain string prompts and data.apply_chat_template=False",
        )
    # A parquet struct has every field in every row; templates expect absent ones to be absent.
    messages = [{k: v for k, v in message.items() if v is not None} for message in prompt]
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates raise what they like, Jinja's own errors included
        raise _error(where, key, f"the tokenizer's chat template rejects it: {error}") from error


def _tokenize(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    key: str,
    text_of: Callable[[str, str, Any], str],
) -> Iterator[NDArray[np.int64]]:
    """Token ids of each row's text, int64 [T], T ≥ 1, without special tokens."""
    remaining = iter(tqdm(rows, desc=f"tokenizing {key}", delay=2, disable=None))
    while batch := list(islice(remaining, TOKENIZE_BATCH)):
        texts = [text_of(where, key, row[key]) for where, row in batch]
        # Lengths are checked by the callers; verbose would warn about the model's own limit.
        encoded = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        for (where, _), ids in zip(batch, encoded["input_ids"], strict=True):
            if not len(ids):
                raise _error(where, key, EMPTY)
            yield np.asarray(ids, dtype=np.int64)


def _prompt(
    index: int, ids: NDArray[np.int64], where: str, row: Mapping[str, Any], config: DataConfig
) -> Prompt:
    key, model, info = config.reward_fn_key, row["reward_model"], row.get("extra_info")
    source = _typed(where, key, row[key], str, "write the name that chooses the reward function")
    if not isinstance(model, dict) or model.get("ground_truth") is None:
        remedy = 'write {"style": "rule", "ground_truth": …}'
        raise _error(where, "reward_model", f"has no ground_truth: {remedy}")
    info = {} if info is None else _typed(where, "extra_info", info, dict)
    return Prompt(index, ids, source, model["ground_truth"], info)


def _typed(where: str, key: str, value: Any, kind: type = str, remedy: str = "") -> Any:
    """`value`, which must be of this type."""
    if isinstance(value, kind):
        return value
    problem = f"must be {KINDS[kind]}, not {_describe(value)}"
    raise _error(where, key, f"{problem}: {remedy}" if remedy else problem)


def _describe(value: Any) -> str:
    """A value in a message: its type, and the beginning of it."""
    if value is None:
        return "null"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _error(where: str, key: str, problem: str) -> ValueError:
    """One wording for all that is wrong in a file."""
    return ValueError(f"{where}, key {key!r}: {problem}")
