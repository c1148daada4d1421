"""From responses to rewards: decode, call the reward function, add the manager's punishment."""

from __future__ import annotations

import asyncio
import faulthandler
import importlib.util
import inspect
import math
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from numbers import Real
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np

from verl.protocol import Prompt, Sample
from verl.rewards import RewardFunction, check_data_source, compute_score
from verl.rewards.errors import RewardError, RewardServerError
from verl.rewards.math_answer import MATH_SOURCES, reference
from verl.rewards.math_http import MathServer
from verl.trainer.config.schema import CustomRewardConfig, OverlongBufferConfig, RewardModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RewardManager:
    """Scores samples in the background: in a thread with an event loop, while the driver waits for
    the next ones to be generated.

    Example::

        manager = RewardManager(config.reward_model, config.custom_reward_function, tokenizer, 8192)
        manager.connect(prompts, run_folder)
        manager.submit(samples).result()  # waits
        samples[0].score, samples[0].reward, samples[0].extras  # 1.0, 1.0, {"acc": 1.0}
        manager.close()
    """

    def __init__(
        self,
        config: RewardModelConfig,
        custom: CustomRewardConfig,
        tokenizer: PreTrainedTokenizerBase,
        max_response_length: int,
    ) -> None:
        """Loads the custom reward function, if there is one. `max_response_length`: in tokens.

        Raises: ValueError if the custom function's file or name does not exist.
        """
        self.config = config
        self.tokenizer = tokenizer
        self.max_response_length = max_response_length
        self.custom: RewardFunction | None = None
        self.function_name = "verl.rewards.compute_score"
        if custom.path is not None:
            self.custom = load_function(custom.path, custom.name)
            self.function_name = f"{custom.name} of {custom.path}"
        self.math = MathServer(config.math_server)
        self.where: Callable[[Prompt], str] = lambda prompt: f"row {prompt.index}"
        self.timeout_s = custom.timeout_s
        self._places = asyncio.Semaphore(config.num_workers)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._theirs: asyncio.AbstractEventLoop | None = None  # of a custom function with `async`
        self._calls = 0  # of the custom function, at present

    def connect(
        self,
        prompts: Iterable[Prompt],
        folder: Path,
        where: Callable[[Prompt], str] | None = None,
    ) -> None:
        """Makes sure that responses to these prompts can be scored; a server that it starts keeps
        its log in `folder`.

        `where` says to users where a prompt comes from.

        Raises: ValueError if there is no function for one of them, its ground truth is not of the
        form that this needs, or the LaTeX server is none; RewardServerError if there is no server.
        """
        self.where = where or self.where
        if self.custom is not None:
            return
        needs_server = False
        for prompt in prompts:
            source, ground_truth = prompt.data_source, prompt.ground_truth
            check_data_source(source)
            try:
                if source in MATH_SOURCES:
                    needs_server = True
                    reference(source, ground_truth)
                else:
                    compute_score(source, "", ground_truth)
            except ValueError as error:
                raise ValueError(f"{self.where(prompt)}, key 'reward_model': {error}") from None
        if needs_server:
            self._run(self.math.connect(folder / "math_server.log")).result()

    def submit(self, samples: list[Sample]) -> Future[list[Sample]]:
        """Starts to set `score`, `reward` and `extras` (with `acc`, always) of each sample. The
        future holds the samples: all of them filled or, after an error, none.

        Raises, in the future: RewardError if the reward function failed, whose error is chained;
        RewardServerError if the LaTeX server is gone for good; ValueError if the function returned
        neither a finite number nor a dict with one.
        """
        return self._run(self._score(samples))

    def score(self, samples: list[Sample]) -> None:
        """`submit`, and waits."""
        self.submit(samples).result()

    def close(self) -> None:
        """Ends the background thread, and the LaTeX server if it was started here."""
        if self._loop is not None:
            self._run(self._end()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            if self._theirs is not None:
                self._theirs.call_soon_threadsafe(self._theirs.stop)  # it may hang: nobody waits
            self._loop = self._theirs = None

    def _run(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        if self._loop is None:
            self._loop, self._thread = _event_loop("rewards")
            if inspect.iscoroutinefunction(self.custom):
                self._theirs, _ = _event_loop("custom_reward_function")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _end(self) -> None:
        await self.math.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _score(self, samples: list[Sample]) -> list[Sample]:
        if not samples:  # some tokenizers decode an empty batch to one empty text
            return samples
        ids = [sample.response_ids.tolist() for sample in samples]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        results = await asyncio.gather(*map(self._call, samples, texts))
        buffer = self.config.overlong_buffer
        punish = buffer.enable and self.config.reward_manager == "dapo"
        for sample, (score, extras) in zip(samples, results, strict=True):
            sample.score = sample.reward = score
            sample.extras.update(extras)
            if punish:
                penalty = overlong_penalty(sample.length, self.max_response_length, buffer)
                sample.reward += penalty
                if buffer.log:
                    sample.extras["overlong_reward"] = penalty
        return samples

    async def _call(self, sample: Sample, text: str) -> tuple[float, dict[str, Any]]:
        """Score and extras of one sample; every error names where it comes from."""
        prompt = sample.prompt

        def where() -> str:  # looked up for an error alone: it reads the file
            source = f"data_source={prompt.data_source!r}"
            return f"reward function {self.function_name}, {source}, {self.where(prompt)}"

        try:
            result = await self._evaluate(prompt, text)
        except RewardServerError:
            raise
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # the last two end event loops
            raise RewardError(f"{where()}: {type(error).__name__}: {error}") from error
        extras = dict(result) if isinstance(result, Mapping) else {"score": result}
        if "score" not in extras:
            raise ValueError(f"{where()}: the returned dict has no 'score', only {list(extras)}")
        extras.setdefault("acc", extras["score"])
        for key in ("score", "acc"):
            try:
                finite = isinstance(extras[key], (Real, np.bool_)) and math.isfinite(extras[key])
            except OverflowError:  # an integer beyond the range of floats
                finite = False
            if not finite:
                problem = f"must be a finite number, but is {extras[key]!r:.200}"
                raise ValueError(f"{where()}: {key} {problem}")
            extras[key] = float(extras[key])
        return extras.pop("score"), extras

    async def _evaluate(self, prompt: Prompt, text: str) -> Any:
        """What the reward function says about `text`. Only what waits leaves the event loop."""
        arguments = (prompt.data_source, text, prompt.ground_truth, prompt.extra_info)
        if self.custom is None:
            if prompt.data_source in MATH_SOURCES:
                return await self.math.compute_score(*arguments)
            return compute_score(*arguments)
        async with self._places:
            try:
                with self._watched():
                    async with asyncio.timeout(self.timeout_s) as limit:
                        if self._theirs is None:
                            return await _in_thread(self.custom, *arguments)
                        limit.reschedule(None)  # until it starts: others may block its loop
                        return await _in_loop(
                            self._theirs,
                            self.custom(*arguments),
                            lambda: limit.reschedule(time.monotonic() + self.timeout_s),
                        )
            except TimeoutError as error:
                if not limit.expired():  # the function's own
                    raise
                remedy = "correct the function, or raise custom_reward_function.timeout_s"
                raise TimeoutError(f"no answer after {self.timeout_s:g} s: {remedy}") from error

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Against a function that holds Python's global lock, as a regular expression does: no time
        limit of our own can then be kept. After twice that time without a sign of life from this
        loop, a thread that needs no lock says on standard error where each thread is, and ends the
        process."""
        self._calls += 1
        if self._calls == 1:
            self._live()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._next_sign.cancel()
                faulthandler.cancel_dump_traceback_later()

    def _live(self) -> None:
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(2 * self.timeout_s, exit=True, file=sys.__stderr__)
        self._next_sign = asyncio.get_running_loop().call_later(self.timeout_s / 4, self._live)


def _event_loop(name: str) -> tuple[asyncio.AbstractEventLoop, Thread]:
    """A new event loop, and the thread where it runs."""
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever, name=name, daemon=True)
    thread.start()
    return loop, thread


def _in_loop(
    loop: asyncio.AbstractEventLoop, call: Coroutine[Any, Any, Any], begin: Callable[[], None]
) -> asyncio.Future[Any]:
    """Runs it in another thread's loop, which it may block; calls `begin` here when it starts."""
    here = asyncio.get_running_loop()
    future, answer = _future()

    async def work() -> None:
        here.call_soon_threadsafe(begin)
        try:
            answer(await call)
        except BaseException as error:  # some of which would end the loop
            answer(error=error)

    asyncio.run_coroutine_threadsafe(work(), loop)
    return future


def _in_thread(function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
    """Calls it in a thread of its own, which nobody has to wait for: the process can end."""
    future, answer = _future()

    def work() -> None:
        try:
            answer(function(*arguments))
        except StopIteration as error:  # which no future takes
            answer(error=RuntimeError(f"StopIteration: {error}"))
        except BaseException as error:
            answer(error=error)

    Thread(target=work, daemon=True).start()
    return future


def _future() -> tuple[asyncio.Future[Any], Callable[..., None]]:
    """A future of this loop, and what another thread calls with its result or error."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if not future.done():  # nobody waits any more
            future.set_result(result) if error is None else future.set_exception(error)

    def answer(result: Any = None, error: BaseException | None = None) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, result, error)

    return future, answer


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

    Raises: ValueError if there is no such file or function, or the file can't be imported.
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
