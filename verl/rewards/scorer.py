"""From responses to rewards: decode, call the reward function, add the overlong punishment."""

import asyncio
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from verl.config.rewards import OverlongBufferConfig
from verl.config.schema import Config
from verl.protocol import Prompt, Sample
from verl.rewards import MATH_SOURCES, RewardError, RewardServerError, compute_score, rule
from verl.rewards.answers import reference
from verl.rewards.math import MathClient
from verl.rewards.model import Conversations
from verl.utils.samples import plain, response_texts
from verl.utils.user_function import UserFunction, load_function, start_event_loop, taken

ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")  # verl's names


class RewardManager:
    """Scores samples in the background, while the driver waits for the next ones."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        """Raises: as `load_function`, for a custom function."""
        self.config, custom = config.reward_model, config.custom_reward_function
        self.tokenizer, self.max_response_length = tokenizer, config.data.max_response_length
        self.math = MathClient(self.config.math_server)
        self.custom: UserFunction | None = None
        self._taken, self._kwargs = [*ARGUMENTS], custom.reward_kwargs
        self.function_name = "verl.rewards.compute_score"
        if custom.path is not None:
            self.function_name, key = f"{custom.name} of {custom.path}", "custom_reward_function"
            function = load_function(key, custom.path, custom.name)
            if twice := {*ARGUMENTS} & self._kwargs.keys():
                problem = f"{min(twice)} is given with each call: drop it"
                raise ValueError(f"{key}.reward_kwargs: {problem}")
            try:
                self._taken = taken(function, ARGUMENTS, self._kwargs)
            except TypeError as error:
                how = f"it is called by name, with {', '.join([*ARGUMENTS, *self._kwargs])}"
                raise ValueError(f"{key}.name={custom.name}: {error}; {how}") from None
            self.custom = UserFunction(key, function, self.config.num_workers, custom.timeout_s)
        self.conversations = Conversations(config) if self.config.enable else None
        self.reward_model: Callable[[list[Sample]], Sequence[float]]  # scores of conversations
        self.waiting: list[tuple[list[Sample], Future[list[Sample]]]] = []  # for that model
        self._loop, self._thread = start_event_loop("rewards")

    def connect(self, prompts: Sequence[Prompt], folder: Path) -> None:
        """Makes sure that responses to these prompts can be scored; a server's log is in `folder`.
        Raises: ValueError for a prompt that no function can score; as `MathClient.connect`."""
        if self.custom is not None:
            return
        for prompt in prompts:
            source = prompt.data_source
            if prompt.messages is not None:
                if (reader := self.conversations) and reader.tokenizer is not None:
                    reader.render(prompt, "")
                continue
            try:
                if source in MATH_SOURCES:
                    reference(source, prompt.ground_truth)
                else:
                    compute_score(source, "", prompt.ground_truth)
            except ValueError as error:
                key = "reward_model" if source in MATH_SOURCES or rule(source) else "data_source"
                remedy = '; the reward model scores it with {"style": "model"} in reward_model'
                text = f"{prompt.location}, key {key!r}: {error}" + remedy * self.config.enable
                raise ValueError(text) from None
        if any(p.data_source in MATH_SOURCES and p.messages is None for p in prompts):
            self._run(self.math.connect(folder / "math_server.log")).result()

    def submit(self, samples: list[Sample]) -> Future[list[Sample]]:
        """The future samples with `score`, `reward` and `extras` (`acc` if a function scores them):
        all or, after an error, none. Those for a reward model wait for `ask_model`. Raises in the
        future: RewardError if the reward function fails or the LaTeX server is gone; ValueError for
        a result that is no finite number or dict with one."""
        if all(sample.prompt.messages is None for sample in samples):
            return self._run(self._score(samples))
        future: Future[list[Sample]] = Future()
        self.waiting.append((samples, future))
        return future

    def ask_model(self) -> None:
        """Has the reward model score all samples that wait for it, in an order that is always the
        same. Raises: RewardError for a score that is no finite number."""
        parts = [self.waiting.pop() for _ in range(len(self.waiting))]
        samples = [s for part, _ in parts for s in part]
        if not samples:
            return
        assert self.conversations is not None
        samples.sort(key=lambda s: (s.group, s.response_index))
        scores = self.reward_model(self.conversations.read(samples, self.texts(samples)))
        for sample, score in zip(samples, scores, strict=True):
            if not math.isfinite(score):
                where = sample.prompt.location
                raise RewardError(f"reward model {self.conversations.path}, {where}: {score}")
            self._fill(sample, float(score), {})
        for part, future in parts:
            future.set_result(part)

    def texts(self, samples: Sequence[Sample]) -> list[str]:
        """The texts that are scored."""
        return response_texts(samples, self.tokenizer, self.config.skip_special_tokens)

    def close(self) -> None:
        """Ends the background thread, and the LaTeX server if it was started here."""
        if not self._loop.is_closed():
            self._run(self._end()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            if self.custom is not None:
                self.custom.close()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.math.close()

    async def _score(self, samples: list[Sample]) -> list[Sample]:
        scores = map(self._score_one, samples, self.texts(samples))
        if self.custom is None and not any(s.prompt.data_source in MATH_SOURCES for s in samples):
            results = [await score for score in scores]  # none waits for anything: no tasks
        else:
            results = await asyncio.gather(*scores)
        for sample, (score, extras) in zip(samples, results, strict=True):
            self._fill(sample, score, extras)
        return samples

    def _fill(self, sample: Sample, score: float, extras: dict[str, Any]) -> None:
        """Score, extras, and the reward with its penalty."""
        buffer = self.config.overlong_buffer
        sample.score = sample.reward = score
        sample.extras.update(extras)
        if buffer.enable and self.config.reward_manager == "dapo":
            length = len(sample.response_ids)
            penalty = overlong_penalty(length, self.max_response_length, buffer)
            sample.reward += penalty
            if buffer.log:
                sample.extras["overlong_reward"] = penalty

    async def _score_one(self, sample: Sample, text: str) -> tuple[float, dict[str, Any]]:
        """Score and extras of one sample. An error says which function, and which prompt."""
        prompt, name = sample.prompt, self.function_name
        origin = f"reward function {name}, data_source={prompt.data_source!r}, {prompt.location}"
        arguments = (prompt.data_source, text, prompt.ground_truth, prompt.extra_info)
        try:
            if self.custom is not None:
                named = dict(zip(ARGUMENTS, arguments, strict=True))
                result = await self.custom(**{k: named[k] for k in self._taken}, **self._kwargs)
            elif prompt.data_source in MATH_SOURCES:
                result = await self.math.compute_score(*arguments)
            else:
                result = compute_score(*arguments)
        except RewardServerError:
            raise
        except Exception as error:
            raise RewardError(f"{origin}: {type(error).__name__}: {error}") from error
        try:
            return _read_result(result)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from None


def _read_result(result: Any) -> tuple[float, dict[str, Any]]:
    """The score that a reward function returned, and the rest, with `acc`, as plain data."""
    extras = dict(result) if isinstance(result, Mapping) else {"score": result}
    if "score" not in extras:
        raise ValueError(f"the returned dict has no 'score', only {list(extras)}")
    extras.setdefault("acc", extras["score"])
    for key in ("score", "acc"):
        value, number = extras[key], math.nan
        if isinstance(value, (Real, np.bool_)):
            with suppress(OverflowError):  # an integer beyond the range of floats
                number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"{key} must be a finite number, but is {value!r:.200}")
        extras[key] = number
    return extras.pop("score"), {str(key): plain(value) for key, value in extras.items()}


def overlong_penalty(length: int, max_response_length: int, buffer: OverlongBufferConfig) -> float:
    """Soft overlong punishment (arXiv 2503.14476, eq. 13), times `penalty_factor`: linear over the
    last `buffer.len` of `max_response_length` tokens, 0 before."""
    excess = length - (max_response_length - buffer.len)
    return min(0.0, -excess / buffer.len * buffer.penalty_factor)
