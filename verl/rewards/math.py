"""The math reward: the LaTeX server (`server/math`) judges what strings alone don't tell."""

import asyncio
import json
import logging
import os
import random
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from verl.config.rewards import MathServerConfig
from verl.rewards.answers import compare

logger = logging.getLogger(__name__)

NUMINA = ("aops_forum", "synthetic_math", "amc_aime", "synthetic_amc", "cn_k12", "olympiads")
OWN = ("open_reasoner_zero", "math500", "aime2024", "gpqa", "minerva", "amc")
MATH_SOURCES = (*OWN, *(f"numina_{name}" for name in NUMINA))
DEFAULT_URL = "http://127.0.0.1:6284"
START_SCRIPT = Path(__file__).parents[2] / "server" / "math" / "start.sh"
HOW_TO_START = (
    "start it with `bash server/math/start.sh` (its environment: `bash setup.sh --server-only`), "
    "let the trainer do so with reward_model.math_server.autostart=True, or name another in "
    "MATH_SERVER_URL"
)
TEMPORARY = (408, 429)  # client errors that time mends: too slow, or too soon
REPORT_EVERY_S = 10.0
RESTART_PAUSE_S = 5.0
START_WITHIN_S = 60.0
FIRST_ANSWER_WITHIN_S = 10.0
ANSWER_WITHIN_S = 120.0  # then a request is sent again: the server or its host may hang

Pair = tuple[str, str]  # a reference and an answer
Verdict = dict[str, Any]  # on a pair: `equal`, `how` and `status`, as the server answers


class RewardError(RuntimeError):
    """A response could not be scored. That is never a score."""


class RewardServerError(RewardError):
    """A server that rewards depend on has not answered for too long."""


def compute_score(*arguments: Any) -> dict[str, Any]:
    """`MathClient.compute_score` outside of a run, of the server at MATH_SERVER_URL."""

    async def ask() -> dict[str, Any]:
        client = MathClient(MathServerConfig(max_wait_s=60))
        async with client._http:
            return await client.compute_score(*arguments)

    with ThreadPoolExecutor(1) as thread:  # the caller may have an event loop of its own
        return thread.submit(asyncio.run, ask()).result()


def server_url(config: MathServerConfig) -> str:
    """The key `url`, else MATH_SERVER_URL, else `DEFAULT_URL`. Raises: ValueError if it is none."""
    url = (config.url or os.environ.get("MATH_SERVER_URL") or DEFAULT_URL).rstrip("/")
    with suppress(ValueError):  # a port that is no number
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return url
    key = "reward_model.math_server.url (or MATH_SERVER_URL)"
    raise ValueError(f"{key} is {url}: give a URL such as {DEFAULT_URL}")


class MathClient:
    """A client of one LaTeX server, for one event loop. Pairs that come while all connections are
    in use travel together. A server that is away or busy is waited for."""

    def __init__(self, config: MathServerConfig) -> None:
        self.config, self.url = config, server_url(config)
        self.process: ServerProcess | None = None
        self._server = f"the LaTeX server at {self.url}"
        self._connections = asyncio.Semaphore(config.max_connections)
        self._pairs: list[Pair] = []  # the batch that others may join
        self._verdicts: asyncio.Task[list[Verdict]]  # of that batch
        self._last_answer = self._last_report = 0.0
        logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for each request
        limits = httpx.Limits(max_connections=config.max_connections)
        # trust_env: no proxy between a cluster and its own server
        self._http = httpx.AsyncClient(base_url=self.url, limits=limits, trust_env=False)

    async def connect(self, log_file: Path) -> None:
        """Tries the server, which `config.autostart` starts, with its output in `log_file`. Raises:
        RewardServerError without one; ValueError for another, or a URL where none can start."""
        if self.config.autostart:
            self.process = ServerProcess(self.url, log_file)
        pairs = [(r"\frac{3}{5}", "0.6"), (r"\frac{3}{5}", "0.5")]
        wait = START_WITHIN_S if self.process else 0
        answers = await self._post(pairs, wait, FIRST_ANSWER_WITHIN_S)
        if (verdicts := [answer["equal"] for answer in answers]) != [True, False]:
            problem = f"{self._server} says {verdicts} to whether 3/5 equals 0.6 and 0.5"
            remedy = "make its environment anew with `bash setup.sh --server-only`"
            raise ValueError(f"{problem}: {remedy}")

    async def compute_score(self, *arguments: Any) -> dict[str, Any]:
        """Of the arguments of `compare`: `score` and `acc` (0 or 1), `pred` (the answer), and what
        counts as wrong: `undecided`, 1 where the server understood but a part of the answer, ran
        into its limits or failed; `too_long`, 1 where the length decides. Raises: ValueError for
        a ground truth or a pair that can't be; RewardServerError without an answer."""
        published, limit = self.config.answer_rule == "published", self.config.max_answer_length
        answer = compare(*arguments, published=published, max_answer_length=limit)
        equal, undecided = answer.equal, False
        if equal is None:
            verdict = await self.verify(answer.gold, answer.pred)
            equal, undecided = verdict["equal"], verdict["status"] not in ("ok", "unparsable")
        shares = {"undecided": float(undecided), "too_long": float(answer.too_long)}
        return {"score": float(equal), "acc": float(equal), "pred": answer.pred, **shares}

    async def verify(self, gold: str, pred: str) -> Verdict:
        """The verdict on one pair; errors as above."""
        if len(self._pairs) in (0, self.config.batch_size):
            self._pairs = []
            self._verdicts = asyncio.create_task(self._send(self._pairs))
            # An error counts as seen, also if all that waited have been cancelled.
            self._verdicts.add_done_callback(lambda task: task.cancelled() or task.exception())
        position = len(self._pairs)
        self._pairs.append((gold, pred))
        return (await asyncio.shield(self._verdicts))[position]

    async def close(self) -> None:
        """Ends the connections, and the server if it was started here. No pair may wait."""
        await self._http.aclose()
        if self.process is not None:
            self.process.stop()

    async def _send(self, pairs: list[Pair]) -> list[Verdict]:
        """The verdicts of a batch, which others may join until a connection is free."""
        async with self._connections:
            if self._pairs is pairs:
                self._pairs = []
            return await self._post(pairs, self.config.max_wait_s, ANSWER_WITHIN_S)

    async def _post(self, pairs: list[Pair], max_wait_s: float, within_s: float) -> list[Verdict]:
        """The verdicts of one request, however often it has to be sent."""
        document = {"pairs": [{"gold": gold, "pred": pred} for gold, pred in pairs]}
        # A lone surrogate, which JSON has no place for, becomes a question mark.
        body = json.dumps(document, ensure_ascii=False).encode(errors="replace")
        started, pause = time.monotonic(), 0.1
        while True:
            failure = self.process and self.process.failure()
            try:
                timeout = httpx.Timeout(within_s, connect=5)
                response = await self._http.post("/verify", content=body, timeout=timeout)
                if response.status_code < 500 and response.status_code not in TEMPORARY:
                    return self._read(response, len(pairs))
                reason = f"status {response.status_code}: {response.text[:200]}"
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}: {error}".removesuffix(": ")
            if failure and not self._last_answer:  # and nobody else answers in its place
                raise RewardServerError(f"the LaTeX server does not start: {failure}")
            waited = time.monotonic() - max(started, self._last_answer)
            if waited >= max_wait_s:
                after = f" for {waited:.0f} s" if waited >= 1 else ""
                longer = "; reward_model.math_server.max_wait_s waits longer" if after else ""
                problem = f"no answer from {self._server}{after} ({reason})"
                raise RewardServerError(f"{problem}: {HOW_TO_START}{longer}")
            if waited > 1 and time.monotonic() - self._last_report >= REPORT_EVERY_S:
                self._last_report = time.monotonic()
                patience = f"for {waited:.0f} of at most {max_wait_s:.0f} s ({reason})"
                logger.warning("waiting for %s %s", self._server, patience)
            if self.process is not None:
                self.process.start()
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, 2.0)

    def _read(self, response: httpx.Response, count: int) -> list[Verdict]:
        """What the server answers, if it is a LaTeX server and the answer is whole."""
        try:
            verdicts = response.json()["results"]
            types = [(type(verdict["equal"]), type(verdict["status"])) for verdict in verdicts]
        except (ValueError, KeyError, TypeError):
            types = []
        if types != [(bool, str)] * count:
            answer = f"{response.url} answers {response.status_code} {response.text[:200]!r}"
            question = "is this a LaTeX server of this project?"
            raise ValueError(f"{answer}, which is not {count} verdicts: {question}")
        self._last_answer = time.monotonic()
        if self._last_report:
            logger.warning("%s answers again", self._server)
            self._last_report = 0.0
        return verdicts


class ServerProcess:
    """The LaTeX server as a child of the trainer: `server/math/start.sh` at `url`. It also ends
    when this process is gone, however that came about: its standard input closes then."""

    def __init__(self, url: str, log_file: Path) -> None:
        """Starts nothing. Raises: ValueError for another machine's URL."""
        address, key = urlsplit(url), "reward_model.math_server.autostart=True"
        if address.scheme != "http" or address.hostname not in ("127.0.0.1", "localhost", "::1"):
            remedy = f"start that one by hand, or use {DEFAULT_URL}"
            raise ValueError(f"{key} is for this machine, but the URL is {url}: {remedy}")
        if not START_SCRIPT.is_file():
            raise ValueError(f"{key} needs a clone of the repository, with {START_SCRIPT}")
        self.url, self.log_file = url, log_file
        self.command = ["bash", str(START_SCRIPT), "--stop-at-end-of-input", "1"]
        self.command += ["--host", address.hostname, "--port", str(address.port or 80)]
        self._process: subprocess.Popen[bytes] | None = None
        self._started = -RESTART_PAUSE_S

    def start(self) -> None:
        """Starts the server if it isn't running, at most every few seconds."""
        runs = self._process is not None and self._process.poll() is None
        if runs or time.monotonic() - self._started < RESTART_PAUSE_S:
            return
        logger.warning("starting the LaTeX server at %s (log: %s)", self.url, self.log_file)
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as log:
            # In a session of its own: Ctrl-C is for the trainer, which needs its server still.
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
        self._started = time.monotonic()

    def failure(self) -> str | None:
        """How a server has ended, with its last lines; None while it lives."""
        if self._process is None or self._process.poll() is None:
            return None
        end = "\n  ".join(self.log_file.read_text(errors="replace").splitlines()[-5:])
        return f"exit status {self._process.returncode}; {self.log_file} ends with\n  {end}"

    def stop(self) -> None:
        """Ends the server, if it was started."""
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            self._process.kill()  # which does nothing if it has ended
            self._process.wait()
