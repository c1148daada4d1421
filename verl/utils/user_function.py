"""A function of the user's: loaded from a file, and called with a time limit."""

import asyncio
import copy
import faulthandler
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

from verl.utils import user_files

Function = Callable[..., Any]


def load_function(key: str, path: str, name: str) -> Function:
    """The function `name` of the file `path`, for the configuration's `key`. Raises: ValueError."""
    file = Path(path).expanduser().absolute()
    if not file.is_file():
        raise ValueError(f"{key}.path={path}: no such file")
    if file.suffix != ".py" or "." in file.stem:
        raise ValueError(f"{key}.path={path}: not a Python file (*.py, without other dots)")
    user_files.__path__.insert(0, str(file.parent))
    os.environ[user_files.FOLDERS] = os.pathsep.join(user_files.__path__)
    module_name = f"{user_files.__name__}.{file.stem}"
    sys.modules.pop(module_name, None)  # one of another folder
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{key}.path={path} can't be imported: {reason}") from error
    if module.__file__ != str(file):
        problem = f"the folder {file.stem} beside it hides it: rename one"
        raise ValueError(f"{key}.path={path}: {problem}")
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{key}.name={name}: {path} has no function of this name")
    return function


def taken(function: Function, names: Iterable[str], others: Iterable[str] = ()) -> list[str]:
    """The `names` that it takes as arguments; TypeError if it can't be called with all `others`."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions that are written in C don't say what they take
        return list(names)
    anything = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    found = [name for name in names if anything or name in signature.parameters]
    signature.bind(**dict.fromkeys([*found, *others]))
    return found


class UserFunction:
    """Calls a function that may block, hang, or hold Python's global lock, from an event loop: in a
    thread for each call, or in one other event loop for all calls of an `async` function."""

    def __init__(self, key: str, function: Function, max_calls: int, timeout_s: float) -> None:
        """At most `max_calls` run at a time, of `timeout_s` seconds; `key`: as `load_function`."""
        self.key, self.function, self.timeout_s = key, function, timeout_s
        self._slots = asyncio.Semaphore(max_calls)
        self._calls = 0
        is_async = inspect.iscoroutinefunction(function)
        self._loop = start_event_loop("user_function")[0] if is_async else None

    async def __call__(self, **arguments: Any) -> Any:
        """What the function returns for copies. Raises: what it raises, and TimeoutError."""
        async with self._slots:
            with self._watchdog():
                future = asyncio.wrap_future(await self._start(arguments))
                try:
                    done, _ = await asyncio.wait([future], timeout=self.timeout_s)
                finally:
                    future.cancel()  # which does nothing if it is done
                if not done:
                    remedy = f"correct the function, or raise {self.key}.timeout_s"
                    raise TimeoutError(f"no answer after {self.timeout_s:g} s: {remedy}")
                return future.result()

    def close(self) -> None:
        """Asks the event loop to end. A call may block it: nobody waits."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)

    async def _start(self, arguments: dict[str, Any]) -> Future[Any]:
        """The result of a call that has begun."""
        result: Future[Any] = Future()
        result.set_running_or_notify_cancel()  # from here on it can't be cancelled
        if self._loop is None:

            def call() -> None:
                with _errors_to(result):
                    result.set_result(self.function(**copy.deepcopy(arguments)))

            Thread(target=call, daemon=True).start()  # nobody waits for it: the process can end
            return result
        caller, begun = asyncio.get_running_loop(), asyncio.Event()

        async def call_async() -> None:
            caller.call_soon_threadsafe(begun.set)
            with _errors_to(result):
                result.set_result(await self.function(**copy.deepcopy(arguments)))

        asyncio.run_coroutine_threadsafe(call_async(), self._loop)
        await begun.wait()  # others may block the loop: their time is not this call's
        return result

    @contextmanager
    def _watchdog(self) -> Iterator[None]:
        """Against a function that holds the lock, which can't be interrupted: if this thread gets
        no turn for twice the time limit, faulthandler, which needs no lock, ends the process."""
        self._calls += 1
        if self._calls == 1:
            self._postpone_exit()
        try:
            yield
        finally:
            self._calls -= 1
            if self._calls == 0:
                self._timer.cancel()
                faulthandler.cancel_dump_traceback_later()

    def _postpone_exit(self) -> None:
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(2 * self.timeout_s, exit=True, file=sys.__stderr__)
        self._timer = asyncio.get_running_loop().call_later(self.timeout_s / 4, self._postpone_exit)


def start_event_loop(name: str) -> tuple[asyncio.AbstractEventLoop, Thread]:
    """A new event loop, and the thread where it runs."""
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever, name=name, daemon=True)
    thread.start()
    return loop, thread


@contextmanager
def _errors_to(result: Future[Any]) -> Iterator[None]:
    try:
        yield
    except BaseException as error:  # asyncio hands on neither StopIteration nor SystemExit
        usual = isinstance(error, Exception) and not isinstance(error, StopIteration)
        result.set_exception(error if usual else RuntimeError(repr(error)))
