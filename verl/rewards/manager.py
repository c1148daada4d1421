"""From responses to rewards: decode, call the reward function, add the manager's punishment."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from verl.protocol import Sample
from verl.rewards import compute_score
from verl.trainer.config.schema import CustomRewardConfig, OverlongBufferConfig, RewardModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RewardFunction = Callable[[str, str, Any, dict[str, Any]], Any]
"""`fn(data_source, solution_str, ground_truth, extra_info)` → a number, or a dict with `score`."""


class RewardManager:
    """Scores samples on the driver.

    Example::

        manager = RewardManager(config.reward_model, config.custom_reward_function, tokenizer, 8192)
        manager.score(samples)
        samples[0].score, samples[0].reward, samples[0].extras  # 1.0, 1.0, {"acc": 1.0}
    """

    def __init__(
        self,
        config: RewardModelConfig,
        custom: CustomRewardConfig,
        tokenizer: PreTrainedTokenizerBase,
        max_response_length: int,
    ) -> None:
        """Loads the custom reward function, if there is one.

        Args:
            config: `reward_model` of the configuration.
            custom: `custom_reward_function` of the configuration.
            tokenizer: decodes the responses, without special tokens.
            max_response_length: M, in tokens.

        Raises:
            ValueError: the custom function's file or name does not exist.
        """
        self.config = config
        self.tokenizer = tokenizer
        self.max_response_length = max_response_length
        self.function: RewardFunction = compute_score
        self.function_name = "verl.rewards.compute_score"
        self.num_threads = 1  # the built-in rules compute and never wait: threads would slow them
        if custom.path is not None:
            self.function = load_function(custom.path, custom.name)
            self.function_name = f"{custom.name} of {custom.path}"
            self.num_threads = config.num_workers

    def score(self, samples: Sequence[Sample]) -> None:
        """Sets `score`, `reward` and `extras` (with `acc`, always) of each sample.

        Either all samples are filled or, after an error, none.

        Raises:
            RuntimeError: the reward function failed; the error is chained.
            ValueError: it returned something that is neither a finite number nor a dict with one.
        """
        if not samples:  # some tokenizers decode an empty batch to one empty text
            return
        ids = [sample.response_ids.tolist() for sample in samples]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        if self.num_threads > 1:
            with ThreadPoolExecutor(self.num_threads) as pool:
                results = list(pool.map(self._call, samples, texts))
        else:
            results = [self._call(*pair) for pair in zip(samples, texts, strict=True)]
        set_reward = MANAGERS[self.config.reward_manager]
        for sample, (score, extras) in zip(samples, results, strict=True):
            sample.score = score
            sample.extras.update(extras)
            set_reward(sample, self.config, self.max_response_length)

    def _call(self, sample: Sample, text: str) -> tuple[float, dict[str, Any]]:
        """Score and extras of one sample; every error names where it comes from."""
        prompt = sample.prompt
        where = (
            f"reward function {self.function_name}, data_source={prompt.data_source!r}, "
            f"prompt {prompt.index}"
        )
        try:
            result = self.function(prompt.data_source, text, prompt.ground_truth, prompt.extra_info)
        except Exception as error:
            raise RuntimeError(f"{where}: {type(error).__name__}: {error}") from error
        extras = dict(result) if isinstance(result, Mapping) else {"score": result}
        if "score" not in extras:
            raise ValueError(f"{where}: the returned dict has no 'score', only {list(extras)}")
        extras.setdefault("acc", extras["score"])
        for key in ("score", "acc"):
            number = _finite(extras[key])
            if number is None:
                raise ValueError(
                    f"{where}: {key} must be a finite number, but is {extras[key]!r:.200}"
                )
            extras[key] = number
        return extras.pop("score"), extras


def _finite(value: Any) -> float | None:
    """A number (bool and numpy scalars included) as a finite float; None for anything else."""
    if not isinstance(value, (Real, np.bool_)):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the range of floats
        return None
    return number if math.isfinite(number) else None


def naive(sample: Sample, config: RewardModelConfig, max_response_length: int) -> None:
    """The reward is the score."""
    sample.reward = sample.score


def dapo(sample: Sample, config: RewardModelConfig, max_response_length: int) -> None:
    """The reward is the score plus, if it is enabled, the overlong punishment."""
    sample.reward = sample.score
    if config.overlong_buffer.enable:
        penalty = overlong_penalty(sample.length, max_response_length, config.overlong_buffer)
        sample.reward += penalty
        if config.overlong_buffer.log:
            sample.extras["overlong_reward"] = penalty


MANAGERS: dict[str, Callable[[Sample, RewardModelConfig, int], None]] = {
    "naive": naive,
    "dapo": dapo,
}
"""`reward_model.reward_manager` → function that sets `reward` of a sample with a score."""


def overlong_penalty(length: int, max_response_length: int, buffer: OverlongBufferConfig) -> float:
    """Soft overlong punishment (arXiv 2503.14476, eq. 13), times `penalty_factor`.

    0 up to `max_response_length - buffer.len` tokens, then linear down to `-penalty_factor` at
    `max_response_length`.

    >>> overlong_penalty(95, 100, OverlongBufferConfig(enable=True, len=20, penalty_factor=1.0))
    -0.75
    """
    excess = length - (max_response_length - buffer.len)
    return min(0.0, -excess / buffer.len * buffer.penalty_factor)


def load_function(path: str, name: str) -> RewardFunction:
    """The function `name` of the Python file `path`.

    Raises:
        ValueError: there is no such file or function, or the file can't be imported.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"custom_reward_function.path={path}: no such file")
    # Registered under a name of its own: dataclasses and pickle look their module up by name.
    spec = importlib.util.spec_from_file_location("verl_custom_reward_function", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"custom_reward_function.path={path}: not a Python file (*.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(
            f"custom_reward_function.path={path} can't be imported: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"custom_reward_function.name={name}: {path} has no function of this name")
    return function
