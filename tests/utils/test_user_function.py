"""Calls of a user's function; those that hang or end a process: `tests/rewards/test_scorer.py`."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from verl.utils.user_function import UserFunction, load_function


def call(function: Any, times: int, max_calls: int = 4, timeout_s: float = 60) -> list[Any]:
    """What that many calls return, made at the same time."""

    async def main() -> list[Any]:
        user_function = UserFunction("some_key", function, max_calls, timeout_s)
        try:
            return await asyncio.gather(*(user_function(number=i) for i in range(times)))
        finally:
            user_function.close()

    return asyncio.run(main())


def test_calls_of_an_async_function_share_one_event_loop() -> None:
    async def function(number: int) -> tuple[int, Any]:
        await asyncio.sleep(0.01)
        return number, asyncio.get_running_loop()

    numbers, loops = zip(*call(function, 9), strict=True)
    assert numbers == tuple(range(9)) and len(set(loops)) == 1


@pytest.mark.parametrize("is_async", [False, True])
def test_a_limited_number_of_calls_runs_at_the_same_time(is_async: bool) -> None:
    running, most = 0, 0

    async def function(number: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1

    def in_thread(number: int) -> None:
        asyncio.run(function(number))

    call(function if is_async else in_thread, 9, max_calls=3)
    assert most == 3


@pytest.mark.parametrize("is_async", [False, True])
def test_a_function_that_cancels_itself_is_an_error(is_async: bool) -> None:
    def function(number: int) -> None:
        raise asyncio.CancelledError("mine")

    async def async_function(number: int) -> None:
        function(number)

    with pytest.raises(RuntimeError, match=r"CancelledError.*mine"):
        call(async_function if is_async else function, 1)


def test_a_function_of_a_file_may_define_dataclasses(tmp_path: Path) -> None:
    """They look their module up by name."""
    lines = [
        "from __future__ import annotations",
        "from dataclasses import dataclass",
        "@dataclass",
    ]
    lines += [
        "class Result:",
        "    number: int",
        "def compute(number):",
        "    return Result(number)",
    ]
    (tmp_path / "code.py").write_text("\n".join(lines))
    function = load_function("some_key", str(tmp_path / "code.py"), "compute")
    assert call(function, 1)[0].number == 0
    with pytest.raises(ValueError, match=r"some_key\.name=other: .*no function of this name"):
        load_function("some_key", str(tmp_path / "code.py"), "other")
