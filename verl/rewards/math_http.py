"""The math reward: asks the LaTeX server (`server/math`) whether an answer equals its reference."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from verl.rewards.errors import RewardServerError
from verl.rewards.math_answer import compare
from verl.rewards.math_process import ServerProcess
from verl.trainer.config.schema import MathServerConfig

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

DEFAULT_URL = "http://127.0.0.1:6284"
HOW_TO_START = (
    "start it with `bash server/math/start.sh` (its environment: `bash setup.sh --server-only`), "
    "or let the trainer do so with reward_model.math_server.autostart=True"
)
UNDECIDED = ("timeout", "memory", "error")
"""What the server answers for a pair that it gave up on, or failed at."""
TEMPORARY = (408, 429)
"""Client errors that time mends: a request that came too slowly, or too soon."""
REPORT_EVERY_S = 10.0
START_WITHIN_S = 60.0
ANSWER_WITHIN_S = 120.0
"""A request without an answer for so long is sent again: the server or its host may hang."""


def server_url(config: MathServerConfig) -> str:
    """The key `url`, else MATH_SERVER_URL of the environment, else port 6284 of this machine.

    Raises: ValueError if it is none.
    """
    url = (config.url or os.environ.get("MATH_SERVER_URL") or DEFAULT_URL).rstrip("/")
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return url
    except ValueError:  # a port that is no number
        pass
    raise ValueError(
        f"reward_model.math_server.url (or MATH_SERVER_URL) is {url}: give a URL such as "
        + DEFAULT_URL
    )


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`MathServer.compute_score` for use outside of a training run, which keeps its connections:
    asks the server at MATH_SERVER_URL, and waits for it for 60 s."""

    async def ask() -> dict[str, Any]:
        server = MathServer(MathServerConfig(max_wait_s=60))
        try:
            return await server.compute_score(data_source, solution_str, ground_truth, extra_info)
        finally:
            await server.close()

    with ThreadPoolExecutor(1) as thread:  # the caller may have an event loop of its own
        return thread.submit(asyncio.run, ask()).result()


class MathServer:
    """A client of one LaTeX server, for one event loop.

    Pairs that come while all connections are in use wait and travel together. A server that is away
    or busy is waited for; only its verdict makes a score.

    Example::

        server = MathServer(config.reward_model.math_server)
        await server.connect(Path("math_server.log"))
        await server.verify(r"\\frac{3}{5}", "0.6")  # {"equal": True, "how": …, "status": "ok"}
        await server.close()
    """

    def __init__(self, config: MathServerConfig) -> None:
        """Connects to nothing yet."""
        self.config, self.url = config, server_url(config)
        self.process: ServerProcess | None = None
        self._pairs: asyncio.Queue[tuple[str, str, asyncio.Future[dict[str, Any]]]]
        self._pairs = asyncio.Queue()
        self._senders: list[asyncio.Task[None]] = []
        self._http: httpx.AsyncClient | None = None
        self._last_answer = self._last_report = 0.0

    async def connect(self, log_file: Path) -> None:
        """Asks one pair that is equal and one that is not. With `config.autostart` a server that
        isn't there is started, now and later, and prints to `log_file`.

        Raises: ValueError if what answers is no LaTeX server, or judges wrongly, or it can't be
        started at this URL; RewardServerError if there is none.
        """
        if self.config.autostart:
            self.process = ServerProcess(self.url, log_file)
        pairs = [(r"\frac{3}{5}", "0.6"), (r"\frac{3}{5}", "0.5")]
        answers = await self._post(pairs, START_WITHIN_S if self.process else 0)
        verdicts = [answer["equal"] for answer in answers]
        if verdicts != [True, False]:
            raise ValueError(
                f"the LaTeX server at {self.url} says {verdicts} to whether 3/5 equals 0.6 and "
                "0.5: its environment is broken; make it anew with `bash setup.sh --server-only`"
            )

    async def compute_score(
        self,
        data_source: str,
        solution_str: str,
        ground_truth: Any,
        extra_info: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """`score` and `acc` (0 or 1), `pred` (the answer), and `undecided`: 1 where the server ran
        into its limits or failed, which counts as wrong.

        Raises: ValueError for a ground truth of the wrong form or a pair that the server refuses;
        RewardServerError without an answer within `config.max_wait_s`.
        """
        limit = self.config.max_answer_length
        found = compare(data_source, solution_str, ground_truth, extra_info, limit)
        equal, undecided = found.equal, False
        if equal is None:
            verdict = await self.verify(found.gold, found.pred)
            equal, undecided = verdict["equal"], verdict["status"] in UNDECIDED
        score = float(equal)
        return {"score": score, "acc": score, "pred": found.pred, "undecided": float(undecided)}

    async def verify(self, gold: str, pred: str) -> dict[str, Any]:
        """`equal`, `how` and `status` of one pair, as the server answers it; errors as above."""
        if not self._senders:
            count = self.config.max_connections
            self._senders = [asyncio.create_task(self._send()) for _ in range(count)]
        future = asyncio.get_running_loop().create_future()
        self._pairs.put_nowait((gold, pred, future))
        return await future

    async def close(self) -> None:
        """Ends the connections, and the server if it was started here; pairs that still wait never
        get a verdict."""
        for sender in self._senders:
            sender.cancel()
        if self._http is not None:
            await self._http.aclose()
        if self.process is not None:
            self.process.stop()

    async def _send(self) -> None:
        """Takes what waits, up to a batch, and distributes its verdicts; for ever."""
        while True:
            batch = [await self._pairs.get()]
            while len(batch) < self.config.batch_size and not self._pairs.empty():
                batch.append(self._pairs.get_nowait())
            pairs = [(gold, pred) for gold, pred, _ in batch]
            try:
                verdicts = await self._post(pairs, self.config.max_wait_s)
            except Exception as error:
                for _, _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, _, future), verdict in zip(batch, verdicts, strict=True):
                if not future.done():  # its caller has given up
                    future.set_result(verdict)

    async def _post(self, pairs: list[tuple[str, str]], max_wait_s: float) -> list[dict[str, Any]]:
        """The verdicts of one request, however often it has to be sent."""
        import httpx

        if self._http is None:
            logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for each request
            self._http = httpx.AsyncClient(
                timeout=httpx.Timeout(ANSWER_WITHIN_S, connect=5),
                limits=httpx.Limits(max_connections=self.config.max_connections),
                trust_env=False,  # no proxy between a cluster and its own server
            )
        # A lone surrogate has no place in JSON.
        text = [[side.encode(errors="replace").decode() for side in pair] for pair in pairs]
        body = {"pairs": [{"gold": gold, "pred": pred} for gold, pred in text]}
        started, pause = time.monotonic(), 0.1
        while True:
            failure = self.process.failure() if self.process else None
            try:
                response = await self._http.post(f"{self.url}/verify", json=body)
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}: {error}".removesuffix(": ")
            else:
                if response.status_code < 500 and response.status_code not in TEMPORARY:
                    return self._verdicts(response, len(pairs))
                reason = f"status {response.status_code}: {response.text[:200]}"
            waited = time.monotonic() - max(started, self._last_answer)
            if failure and not self._last_answer:  # and nobody else answers in its place
                raise RewardServerError(f"the LaTeX server does not start: {failure}")
            self._wait_or_raise(reason, waited, max_wait_s)
            await asyncio.sleep(min(pause * random.uniform(0.5, 1), max_wait_s))
            pause = min(2 * pause, 2.0)

    def _wait_or_raise(self, reason: str, waited: float, max_wait_s: float) -> None:
        """After a request without an answer: is there anything to wait for? Says so now and then,
        but not for the first second, which is ordinary."""
        if self.process is not None:
            self.process.start_if_dead()
        if waited >= max_wait_s:
            patience = "; reward_model.math_server.max_wait_s waits longer" if waited >= 1 else ""
            raise RewardServerError(
                f"no answer from the LaTeX server at {self.url}"
                + (f" for {waited:.0f} s" if waited >= 1 else "")
                + f" ({reason}): {HOW_TO_START}{patience}"
            )
        if waited > 1 and time.monotonic() - self._last_report >= REPORT_EVERY_S:
            self._last_report = time.monotonic()
            patience = f"for {waited:.0f} of at most {max_wait_s:.0f} s ({reason})"
            logger.warning("waiting for the LaTeX server at %s %s", self.url, patience)

    def _verdicts(self, response: httpx.Response, count: int) -> list[dict[str, Any]]:
        """What the server answers, if it is a LaTeX server and the answer is whole."""
        if response.status_code != 200:
            raise ValueError(
                f"{self.url}/verify answers {response.status_code} {response.text[:200]!r}"
                + (": is this a LaTeX server of this project?" * (response.status_code == 404))
            )
        try:
            verdicts = response.json()["results"]
            types = [(type(verdict["equal"]), type(verdict["status"])) for verdict in verdicts]
            if types != [(bool, str)] * count:
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.url}/verify answers {response.text[:200]!r}, which is not {count} verdicts"
            ) from error
        self._last_answer = time.monotonic()
        if self._last_report:
            logger.warning("the LaTeX server at %s answers again", self.url)
            self._last_report = 0.0
        return verdicts
