"""What the benchmarks share: alternating runs, medians, and one line per target."""

import operator
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

COMPARE = {">=": operator.ge, "<=": operator.le}


def alternate(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Wall seconds of each function, `repeats` times in turn, so that a change of the machine's
    speed meets all of them; after one run of each that doesn't count."""
    for name, function in functions.items():
        print(f"warming up {name}", file=sys.stderr)
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
            print(f"{i + 1}/{repeats} {name}: {seconds[name][-1]:.3f} s", file=sys.stderr)
    return seconds


def spread(values: list[float], unit: str = "s") -> str:
    """Median with smallest and largest value, as text."""
    return f"{statistics.median(values):.3g} {unit} ({min(values):.3g}–{max(values):.3g})"


def report(benchmark: str, what: str, value: float, target: str, kind: str = "ratio") -> bool:
    """Prints the line that `benchmarks/run.sh` collects; `target` such as ``>= 5``. Returns whether
    it is met."""
    op, limit = target.split()
    met = COMPARE[op](value, float(limit))
    what += " (quick)" * ("--quick" in sys.argv)
    cells = kind, benchmark, what, f"{value:.3g}", f"target {target}", "met" if met else "not met"
    print(*cells, sep=" | ", flush=True)
    return met


report_limit = partial(report, kind="limit")
"""`report` of a figure that is held against its target alone."""
