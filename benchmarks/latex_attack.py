"""What honest requests to the LaTeX server wait while others attack it.

    .venv-server/bin/python benchmarks/latex_attack.py [--quick] [--requests 10000] [--seconds 600]

Honest: eight clients send one request after the other, of one pair (nine of ten) or of eight, all
distinct, so that the cache helps nobody. Meanwhile, from the first second to the last:

* a batch of 300 pairs that each run to the time limit; its client gives up after 30 s, hangs up,
  and sends another
* four clients that send one slow pair after the other and hang up after 0.5 s each
* four clients with hostile pairs (towers of powers, factorials, deep nesting, long texts) and with
  what is no request at all
* 100 connections that say nothing, and 40 that send a byte a second

Prints the honest requests' number, median, 99.9th percentile, maximum, and how many took over two
seconds; a request that is not answered at the end counts with the time it has waited.
"""

import argparse
import asyncio
import contextlib
import itertools
import time

from common import report_limit
from latex_server import cold_workload, post, serving

OVER_S = 2.0
HANG_UP_S = {"batch": 30.0, "single": 0.5}


def slow_pair(i: int) -> dict[str, str]:
    """A pair that nobody can judge within the time limit; each `i` gives another."""
    bad = [
        f"\\int_0^{{\\infty}} \\frac{{\\sin(x^{{7}}) \\ln(x+{i})}}{{\\tan(x^2)+e^{{x^3}}}} dx",
        f"\\prod_{{n=1}}^{{{10**7 + i}}} (1+\\frac{{1}}{{n^2}})",
    ]
    return {"gold": str(i), "pred": bad[i % len(bad)]}


def nasty_body(i: int) -> object:
    """Something that isn't made for being judged."""
    bad = [
        f"9^{{9^{{9^{{{i}}}}}}}",
        f"({i}^{{3}})!",
        "{" * 2000 + str(i) + "}" * 2000,
        "x^{" * 100 + str(i) + "}" * 100,
        "\\sqrt{" * 600 + str(i) + "}" * 600,
        "\0" * 100 + str(i),
        "x" * 1_000_000 + str(i),
        "(" + "+".join(f"x_{{{j}}}" for j in range(200)) + f")^{{{i}}}",
    ]
    if i % 9 == 8:
        return {"pairs": [[]] * 1000}  # a 422
    return {"pairs": [{"gold": "5", "pred": bad[i % 9]}]}


async def attack(port: int, bodies: "itertools.chain[object]", hang_up: float) -> None:
    """Send one body after the other; hang up after so many seconds."""
    for body in bodies:
        streams: list = []
        with contextlib.suppress(TimeoutError, RuntimeError, OSError, EOFError):
            async with asyncio.timeout(hang_up):
                await post(port, "/verify", streams, body)
        if streams:
            streams[1].close()
        await asyncio.sleep(0.05)


async def dawdle(port: int, pause: float) -> None:
    """Open connections that say a byte each `pause` seconds."""
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            for byte in b"POST /is_equal HTTP/1.1\r\nContent-Length: 9999\r\n\r\n".ljust(9999):
                await asyncio.sleep(pause)
                writer.write(bytes([byte]))
                await writer.drain()


class Honest:
    """Eight clients; `seconds` holds what each request took, and `wrong` counts wrong verdicts."""

    def __init__(self, port: int, requests: int) -> None:
        self.port, self.seconds, self.wrong, self.open = port, [], 0, {}
        pairs = iter(cold_workload("honest", 2 * requests))
        sizes = [8 if i % 10 == 9 else 1 for i in range(requests)]
        self.todo = iter([list(itertools.islice(pairs, size)) for size in sizes])

    async def client(self, name: int) -> None:
        """Ask until nothing is left."""
        streams: list = []
        for part in self.todo:
            self.open[name] = start = time.perf_counter()
            body = {"pairs": [{"gold": pair.gold, "pred": pair.pred} for pair in part]}
            answer = await post(self.port, "/verify", streams, body)
            self.seconds.append(time.perf_counter() - start)
            del self.open[name]
            verdicts = [result["equal"] for result in answer["results"]]
            self.wrong += sum(a != b.equal for a, b in zip(verdicts, part, strict=True))


async def measure(port: int, requests: int, seconds: float) -> tuple[Honest, float]:
    """Honest requests during the attack, and the seconds it lasted."""
    batches = ({"pairs": [slow_pair(300 * k + i) for i in range(300)]} for k in itertools.count())
    singles = ({"pairs": [slow_pair(i)]} for i in itertools.count(10**6))
    nasty = map(nasty_body, itertools.count(10**3))
    attackers = [attack(port, batches, HANG_UP_S["batch"])]
    attackers += [attack(port, singles, HANG_UP_S["single"]) for _ in range(4)]
    attackers += [attack(port, nasty, 10 * HANG_UP_S["single"]) for _ in range(4)]
    attackers += [dawdle(port, 1e9) for _ in range(100)] + [dawdle(port, 1.0) for _ in range(40)]
    running = [asyncio.create_task(attacker) for attacker in attackers]
    await asyncio.sleep(0.5)
    honest, start = Honest(port, requests), time.perf_counter()
    clients = [asyncio.create_task(honest.client(name)) for name in range(8)]
    _, late = await asyncio.wait(clients, timeout=seconds)
    end = time.perf_counter()
    honest.seconds += [end - begun for begun in honest.open.values()]
    for task in [*running, *late]:
        task.cancel()
    return honest, end - start


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000, help="honest requests [10000]")
    parser.add_argument("--seconds", type=float, default=600, help="end after so long [600]")
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests")
    options = parser.parse_args()
    options.requests //= 10 if options.quick else 1
    with serving("ours") as port:
        honest, seconds = asyncio.run(measure(port, options.requests, options.seconds))
    waits = sorted(honest.seconds)
    over = sum(wait > OVER_S for wait in waits)
    print(
        f"{len(waits)} honest requests in {seconds:.0f} s: median {waits[len(waits) // 2]:.3f} s, "
        f"99.9th percentile {waits[int(0.999 * len(waits))]:.3f} s, longest {waits[-1]:.3f} s, "
        f"over {OVER_S:g} s: {over}, wrong verdicts: {honest.wrong}"
    )
    report_limit("latex_attack", "honest requests over 2 s", over, "<= 0")


if __name__ == "__main__":
    main()
