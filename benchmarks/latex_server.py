"""Throughput and latency of the LaTeX server against a plain one, on this machine.

    .venv-server/bin/python benchmarks/latex_server.py [--quick]        (needs fastapi as well)

The plain reference is what one writes first: FastAPI, a `ProcessPoolExecutor`, math-verify on both
strings wrapped in dollars. Both servers get as many workers, the same requests, and one load
generator beside them on the same cores. Each cell has pairs of its own, so that none profits from
the cache of another. Where the plain one's share of right verdicts falls, it has stopped waiting
and answers "not equal", which counts as an answer in its pairs/s.

* rl: 1,280 pairs over 128 reference answers; four of ten identical to the reference, each of the
  others twice
* cold: distinct pairs
* hostile: 5 % of the requests are expressions that nobody can evaluate; latency of the honest ones
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from common import report

ROOT = Path(__file__).parents[1]
WORKERS = max(2, os.cpu_count() or 1)
PORTS = {"ours": 6391, "plain": 6392}
BATCH = 16
REFERENCE_TIME_LIMIT = 2.0


class Pair(NamedTuple):
    """Two answers and whether they are equal (`None`: hostile)."""

    gold: str
    pred: str
    equal: bool | None


# The plain reference.


def plain_judge(gold: str, pred: str) -> bool:
    """math-verify, as its documentation shows it."""
    from math_verify import parse, verify

    return bool(verify(parse(f"${gold}$"), parse(f"${pred}$")))


def serve_plain(port: int) -> None:
    """FastAPI over a `ProcessPoolExecutor`; waits no longer than the limit for a result."""
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    class Strings(BaseModel):
        str1: str
        str2: str

    class GoldPred(BaseModel):
        gold: str
        pred: str

    class Batch(BaseModel):
        pairs: list[GoldPred]

    app, pool = FastAPI(), ProcessPoolExecutor(WORKERS)

    async def judge(gold: str, pred: str) -> bool:
        job = asyncio.get_running_loop().run_in_executor(pool, plain_judge, gold, pred)
        try:
            return await asyncio.wait_for(job, REFERENCE_TIME_LIMIT)
        except TimeoutError:
            return False

    @app.post("/is_equal")
    async def is_equal(strings: Strings) -> dict:
        return {"equal": await judge(strings.str1, strings.str2)}

    @app.post("/verify")
    async def verify(batch: Batch) -> dict:
        verdicts = await asyncio.gather(*(judge(pair.gold, pair.pred) for pair in batch.pairs))
        return {"results": [{"equal": verdict} for verdict in verdicts]}

    app.get("/health")(lambda: {"status": "ok"})
    uvicorn.run(app, port=port, log_level="error")


# Workloads.


def make_pair(rng: random.Random) -> Pair:
    """A random question's reference answer and a right or wrong answer in another form."""
    a, b, c = rng.randint(2, 999), rng.randint(2, 999), rng.randint(2, 9)
    off = 0 if rng.random() < 0.5 else rng.randint(1, 5)
    kinds = [
        (f"\\frac{{{a}}}{{{b}}}", f"{a * c + off}/{b * c}"),
        (f"{a}.{b}", f"\\frac{{{int(f'{a}{b}') + off}}}{{{10 ** len(str(b))}}}"),
        (f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{a * a * b + off}}}"),
        (f"(x+{a})(x-{b})", f"x^2+{a - b + off}x-{a * b}".replace("+-", "-")),
        (f"[{a},{a + b})", f"\\left[{a}, {a + b + off}\\right)"),
        (f"({a}, \\frac{{1}}{{{b}}})", f"({a + off},\\frac{{{c}}}{{{b * c}}})"),
        (f"{a}\\pi + {b}", f"{b + off}+{a}\\cdot\\pi"),
        (f"\\frac{{{a}}}{{x+{b}}}", f"\\frac{{{a * c + off}}}{{{c}x+{b * c}}}"),
    ]
    return Pair(*rng.choice(kinds), off == 0)


def rl_workload(seed: str, count: int) -> list[Pair]:
    """Ten answers to each reference: four identical, each of the others twice."""
    rng, pairs = random.Random(seed), []
    for _ in range(count // 10):
        gold, right, equal = make_pair(rng)
        others = [Pair(gold, right, equal)]
        others += [Pair(gold, make_pair(rng).pred, False) for _ in range(2)]
        for i in range(10):
            pairs.append(Pair(gold, gold, True) if i % 3 == 0 else others[i * len(others) // 10])
    rng.shuffle(pairs)
    return pairs


def cold_workload(seed: str, count: int) -> list[Pair]:
    """Distinct pairs."""
    rng = random.Random(seed)
    return [make_pair(rng) for _ in range(count)]


def hostile_workload(seed: str, count: int) -> list[Pair]:
    """Distinct pairs, 5 % of them hostile and different from each other."""
    rng, pairs = random.Random(seed), cold_workload(seed, count)
    for i in range(0, count, 20):
        n = rng.randint(10**6, 10**7)
        bad = [
            f"9^{{9^{{9^{{{n}}}}}}}",
            f"({n}^{{3}})!",
            f"\\int_0^{{\\infty}} \\frac{{\\sin(x^{{7}}) \\ln(x+{n})}}{{\\tan(x^2)+e^{{x^3}}}} dx",
            f"\\prod_{{k=1}}^{{{n}}} (1+\\frac{{1}}{{k^2+1}})",
        ]
        pairs[i] = Pair(str(n), bad[i // 20 % len(bad)], None)
    return pairs


# Load.


async def post(port: int, path: str, streams: list, body: object) -> dict:
    """One request over the kept connection `streams`; 503 is tried again."""
    data = json.dumps(body).encode()
    while True:
        if not streams:
            streams[:] = await asyncio.open_connection("127.0.0.1", port)
        reader, writer = streams
        writer.write(b"POST %s HTTP/1.1\r\nHost: x\r\n" % path.encode())
        writer.write(b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data))
        writer.write(data)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length: ")[1].split(b"\r")[0])
        answer = json.loads(await reader.readexactly(length))
        if b" 200 " in head.split(b"\r")[0]:
            return answer
        if b" 503 " not in head.split(b"\r")[0]:
            raise RuntimeError(f"{head!r} {answer}")
        await asyncio.sleep(0.2)


async def load(port: int, pairs: list[Pair], concurrency: int, batch: int) -> dict[str, float]:
    """Send `pairs` and measure: pairs/s, ms at the median and the 99th percentile, share right."""
    requests = [pairs[i : i + batch] for i in range(0, len(pairs), batch)]
    todo, seconds, right = iter(requests), [], []

    async def client() -> None:
        streams: list = []
        for part in todo:
            start = time.perf_counter()
            if batch == 1:
                body = {"str1": part[0].gold, "str2": part[0].pred}
                verdicts = [(await post(port, "/is_equal", streams, body))["equal"]]
            else:
                body = {"pairs": [{"gold": pair.gold, "pred": pair.pred} for pair in part]}
                answer = await post(port, "/verify", streams, body)
                verdicts = [result["equal"] for result in answer["results"]]
            if part[0].equal is not None:
                seconds.append(time.perf_counter() - start)
            right.extend(
                verdict == pair.equal
                for pair, verdict in zip(part, verdicts, strict=True)
                if pair.equal is not None
            )
        if streams:
            streams[1].close()

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    total = time.perf_counter() - start
    seconds.sort()
    return {
        "rate": len(pairs) / total,
        "p50": 1000 * seconds[len(seconds) // 2],
        "p99": 1000 * seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))],
        "right": sum(right) / len(right),
    }


@contextlib.contextmanager
def serving(name: str) -> Iterator[int]:
    """The server `ours` or `plain` in a process group of its own; its port."""
    port = PORTS[name]
    command = [sys.executable, "-m", "server.math", "--port", str(port), "--workers", str(WORKERS)]
    if name == "plain":
        command = [sys.executable, __file__, "--serve-plain"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"{name} doesn't start")
        asyncio.run(load(port, cold_workload("warm-up", 32), 4, 1))
        yield port
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)  # the plain one leaves its stuck workers behind
        process.wait()


def measure(quick: bool) -> None:
    """Print the table."""
    levels = [1, 32] if quick else [1, 8, 32, 128]
    batches = [BATCH] if quick else [1, BATCH]
    size = 8 if quick else 1
    workloads = {"rl": (rl_workload, 1280 // size), "cold": (cold_workload, 320 // size)}
    print(f"{WORKERS} workers, {os.cpu_count()} cores; p50 and p99 in ms of a request")
    print(f"{'':34}{'ours':^36}  {'plain':^36}  ratio")
    heading = f"{'pairs/s':>9}{'p50':>9}{'p99':>9}{'right':>9}"
    print(f"{'workload':9}{'pairs/request':>14}{'concurr.':>11}{heading}  {heading}")
    cells = [
        (name, make, count, batch, level)
        for name, (make, count) in workloads.items()
        for batch in batches
        for level in levels
    ]
    hostile = [8] if quick else [8, 32]
    cells += [("hostile", hostile_workload, 320 // size, 1, level) for level in hostile]
    results: dict[str, list[dict[str, float]]] = {}
    for server in PORTS:
        with serving(server) as port:
            results[server] = [
                asyncio.run(load(port, make(f"{name} {batch} {level}", count), level, batch))
                for name, make, count, batch, level in cells
            ]
    targets: list[tuple[str, float, str]] = []
    for cell, *rows in zip(cells, *results.values(), strict=True):
        shown = "  ".join(
            f"{row['rate']:9.0f}{row['p50']:9.1f}{row['p99']:9.1f}{row['right']:9.1%}"
            for row in rows
        )
        ratio = rows[0]["rate"] / rows[1]["rate"]
        print(f"{cell[0]:9}{cell[3]:14}{cell[4]:11}{shown}{ratio:7.1f}")
        # Where the plain server still gives right verdicts.
        if cell[3:] == (BATCH, 1):
            what = f"times the pairs/s of a plain server, {cell[0]}, {BATCH} pairs a request"
            targets.append((what, ratio, ">= 10" if cell[0] == "rl" else ">= 5"))
        elif cell[0] == "hostile" and cell[4] == 8:
            what = "times shorter p99 than a plain server among hostile expressions"
            targets.append((what, rows[1]["p99"] / rows[0]["p99"], ">= 2"))
    for target in targets:
        report("latex_server", *target)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="an eighth of the pairs, one cell of each workload"
    )
    parser.add_argument("--serve-plain", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_plain:
        serve_plain(PORTS["plain"])
    else:
        measure(options.quick)


if __name__ == "__main__":
    main()
