"""HTTP server that judges whether two LaTeX answers are equal.

    python -m server.math [--host 127.0.0.1] [--port 6284] [--workers N] …      (--help lists all)

    POST /is_equal  {"str1": gold, "str2": pred}         → {"equal": true}
    POST /verify    {"pairs": [{"gold": …, "pred": …}]}  → {"results": [{"equal", "how", "status"}]}
    GET  /health, /metrics, /docs, /openapi.json

A pair passes the quick stages on the event loop, then the cache, then a process pool with limits of
time and memory. Overload is a 503 with Retry-After, never a verdict.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from .judge import Judge
from .metrics import Metrics
from .pool import Pool, PoolClosed, PoolFull

log = logging.getLogger("uvicorn.error")
FOLDER = Path(__file__).parent
BODY_TIMEOUT_S = 30.0
DRAINED = 16  # times the limit are read and thrown away: who still sends doesn't see the 413
FAILURES = (HTTPException, ClientDisconnect, ConnectionAbortedError, PoolFull, PoolClosed)


def setting(default: Any, text: str) -> Any:
    """A field of `Settings` with its help text."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What can be set: `queue_limit` by --queue-limit or by MATH_SERVER_QUEUE_LIMIT."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(6284, "port to listen on; 0 takes a free one")
    workers: int = setting(max(2, os.cpu_count() or 1), "worker processes")
    time_limit: float = setting(2.0, "seconds for one pair, from its start")
    memory_limit_mb: int = setting(2048, "MiB of address space for one worker")
    queue_limit: int = setting(8192, "pairs that may wait; more is a 503")
    max_pairs: int = setting(2048, "pairs in one request; more is a 413")
    max_chars: int = setting(5000, "characters of an answer; a longer one is unparsable")
    max_body_kb: int = setting(2048, "KiB of a request; more is a 413")
    cache_size: int = setting(100_000, "verdicts to remember")
    recycle_after: int = setting(2000, "pairs after which a worker is replaced")
    shutdown_timeout: float = setting(5.0, "seconds that open requests have at the end")
    stop_at_end_of_input: int = setting(0, "1: end when standard input, a pipe, does")

    def __post_init__(self) -> None:
        """Refuse what can't work."""
        for name in ("port", "cache_size", "shutdown_timeout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")
        for name in ("workers", "time_limit", "memory_limit_mb", "max_pairs", "max_chars"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive")
        if self.queue_limit < self.max_pairs:
            raise ValueError("queue_limit must be at least max_pairs, or no such request ever fits")


def parse_settings(arguments: Sequence[str]) -> Settings:
    """Settings from the command line, else from the environment, else the defaults."""
    about, epilog = __doc__.splitlines()[0], "Each option has a variable: MATH_SERVER_MAX_PAIRS=64."
    parser = argparse.ArgumentParser("python -m server.math", description=about, epilog=epilog)
    for field in dataclasses.fields(Settings):
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=type(field.default),
            default=os.environ.get(f"MATH_SERVER_{field.name.upper()}", field.default),
            help=f"{field.metadata['help']} [{field.default}]",
        )
    try:
        return Settings(**vars(parser.parse_args(arguments)))
    except ValueError as error:
        parser.error(str(error))


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The request's JSON object; `HTTPException` 400 for what isn't one in UTF-8, 408, or 413."""
    too_large = HTTPException(413, f"over {max_bytes} bytes", {"Connection": "close"})
    if int(request.headers.get("content-length", 0)) > DRAINED * max_bytes:
        raise too_large
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= max_bytes:
                    body += chunk
                elif size > DRAINED * max_bytes:
                    raise too_large
        if size > max_bytes:
            raise too_large
        document = json.loads(body.decode("utf-8"))
    except TimeoutError as error:
        raise HTTPException(408, "the request's body didn't arrive") from error
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body isn't JSON in UTF-8: {error}"[:200]) from error
    if not isinstance(document, dict):
        raise HTTPException(400, "the body must be a JSON object")
    return document


def texts(document: object, *names: str, where: str = "") -> tuple[str, ...]:
    """The strings of these names in `document`; `HTTPException` 422 where one is missing, no
    string, or holds half of a surrogate pair."""
    fields = document if isinstance(document, dict) else {}
    for name in names:
        if not isinstance(fields.get(name), str):
            raise HTTPException(422, f"{where}{name} must be a string")
        if re.search("[\ud800-\udfff]", fields[name]):
            raise HTTPException(422, f"{where}{name} holds a lone surrogate")
    return tuple(fields[name] for name in names)


class Service:
    """The routes, over one judge."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        shared = ("workers", "time_limit", "queue_limit", "recycle_after")
        limits: dict[str, Any] = {name: getattr(settings, name) for name in shared}
        limits["memory_limit"] = settings.memory_limit_mb << 20
        self.pool = Pool("server.math.equivalence:judge", **limits)
        self.judge = Judge(self.pool, settings.max_chars, settings.cache_size)
        self.metrics = Metrics(self.pool, self.judge)

    async def is_equal(self, request: Request) -> Response:
        """POST /is_equal: one pair, the published interface."""
        document = await read_json(request, self.settings.max_body_kb << 10)
        pair = texts(document, "str1", "str2")
        (verdict,) = await self.judge.verdicts([pair], request.is_disconnected)
        return JSONResponse({"equal": verdict.equal})

    async def verify(self, request: Request) -> Response:
        """POST /verify: many pairs, results in their order."""
        document = await read_json(request, self.settings.max_body_kb << 10)
        pairs = document.get("pairs")
        if not isinstance(pairs, list):
            raise HTTPException(422, "pairs must be a list")
        if len(pairs) > self.settings.max_pairs:
            raise HTTPException(413, f"over {self.settings.max_pairs} pairs in one request")
        pairs = [texts(pair, "gold", "pred", where=f"pairs[{i}].") for i, pair in enumerate(pairs)]
        verdicts = await self.judge.verdicts(pairs, request.is_disconnected)
        return JSONResponse({"results": [dataclasses.asdict(verdict) for verdict in verdicts]})

    async def health(self, request: Request) -> Response:
        """GET /health: 200 where a worker is up."""
        up = len(self.pool.pids)
        state = {"status": "ok" if up else "no worker", "workers": up, "waiting": self.pool.waiting}
        return JSONResponse(state, 200 if up else 503)

    async def show(self, request: Request) -> Response:
        """GET /metrics: Prometheus text; /openapi.json: the interface; /docs: the same to read."""
        if request.url.path == "/metrics":
            return Response(self.metrics.render(), media_type=CONTENT_TYPE_LATEST)
        document = (FOLDER / "openapi.json").read_text(encoding="utf-8")
        if request.url.path == "/openapi.json":
            return Response(document, media_type="application/json")
        page = (FOLDER / "docs.html").read_text(encoding="utf-8")
        return HTMLResponse(page.replace("DOCUMENT", document))

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Start and end the pool with the server."""
        start = time.monotonic()
        await self.pool.start()
        log.info("%d workers ready in %.1f s", self.pool.size, time.monotonic() - start)
        try:
            if self.settings.stop_at_end_of_input:
                asyncio.get_running_loop().add_reader(sys.stdin.fileno(), _end_with_input)
            yield
        finally:
            await self.pool.close()

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/is_equal", self.is_equal, methods=["POST"]),
            Route("/verify", self.verify, methods=["POST"]),
            Route("/health", self.health),
            *(Route(path, self.show) for path in ("/metrics", "/openapi.json", "/docs", "/")),
        ]
        handlers = dict.fromkeys(FAILURES, _explain)
        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self.lifespan)
        app.add_middleware(self.metrics.middleware)
        return app


async def _explain(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    if isinstance(error, PoolFull | PoolClosed):
        text = "the queue is full" if isinstance(error, PoolFull) else "the server is shutting down"
        return JSONResponse({"error": text}, 503, {"Retry-After": "1"})
    return Response(status_code=400)  # the caller has gone: nobody is there to read it


def _end_with_input() -> None:
    """Whoever started the server is gone when nobody holds the other end of its input any more."""
    if not os.read(sys.stdin.fileno(), 4096):
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        os.kill(os.getpid(), signal.SIGTERM)


class Server(uvicorn.Server):
    """Gives up waiting jobs when it is told to end, so that open requests end soon, with a 503."""

    service: Service

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        """Finish what runs, refuse what waits."""
        self.service.pool.drain()
        await super().shutdown(sockets)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or SIGINT."""
    settings = parse_settings(sys.argv[1:] if arguments is None else arguments)
    # After its orderly end uvicorn raises the signal again, which is no failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    service = Service(settings)
    config = uvicorn.Config(
        service.app(), host=settings.host, port=settings.port, loop="uvloop", http="httptools",
        ws="none", access_log=False, server_header=False, limit_concurrency=1024,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_timeout)),
    )  # fmt: skip
    server = Server(config)
    server.service = service
    # Open before the workers start: a port in use is an error at once, and who comes early waits.
    with config.bind_socket() as listener:
        try:
            listener.listen(config.backlog)  # two sockets may be bound to a port, one may listen
        except OSError as error:
            sys.exit(f"server.math: {settings.host}:{settings.port}: {error.strerror}")
        server.run([listener])
    sys.exit(0 if server.started else 1)
