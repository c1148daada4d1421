"""Log-probabilities and entropies of many tokens over a large vocabulary: memory, time, gradients.

    .venv/bin/python benchmarks/logprob_memory.py [--quick]

Memory is the high-water mark of the resident set of a process of its own, reset when the inputs
stand and the libraries are warm (`/proc/self/clear_refs`), less what was resident then. Time and
gradients are compared with plain PyTorch (logits, log_softmax, gather, entropy, autograd) on as
many rows as it has memory for, in alternating runs.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import alternate, report, spread
from torch import Tensor

from verl.models.logprobs import chunked_log_probs


def inputs(rows: int, hidden_size: int, vocabulary: int) -> tuple[Tensor, ...]:
    """Hidden states, weight, targets, and the gradients of log-probability and entropy."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size).mul_(hidden_size**-0.5).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (rows,)), *torch.randn(2, rows)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same, unchunked."""
    log_p = (hidden @ weight.T).log_softmax(-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


FUNCTIONS = {"chunked": chunked_log_probs, "plain": plain}


def gradients(kind: str, hidden: Tensor, weight: Tensor, targets: Tensor, *grads: Tensor):
    """Forward and backward: gradients of hidden states and weight."""
    return torch.autograd.grad(FUNCTIONS[kind](hidden, weight, targets), (hidden, weight), grads)


def resident(name: str) -> int:
    """`VmRSS` or `VmHWM` (its high-water mark) of this process, in bytes."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def measure(kind: str, sizes: list[int]) -> None:
    """In the process of its own: prints peak bytes above the inputs, and seconds."""
    gradients(kind, *inputs(256, 64, 4096))
    tensors = inputs(*sizes)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    gradients(kind, *tensors)
    print(resident("VmHWM") - before, time.perf_counter() - start)


def peak(kind: str, sizes: list[int]) -> float:
    """Peak memory above the inputs in bytes; prints it with the time."""
    command = [sys.executable, __file__, "--measure", kind, "--sizes", *map(str, sizes)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    rows, hidden_size, vocabulary = sizes
    weight = 4 * vocabulary * hidden_size
    print(
        f"{kind}, {rows} rows x {vocabulary}: {int(found[0]) / 1e6:.0f} MB above the inputs, of "
        f"which the weight's gradient is {weight / 1e6:.0f} MB and that of the hidden states "
        f"{4 * rows * hidden_size / 1e6:.0f} MB; the logits alone would be "
        f"{4 * rows * vocabulary / 1e6:.0f} MB; {float(found[1]):.1f} s",
        flush=True,
    )
    return int(found[0])


def main() -> None:
    """The comparison on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    parser.add_argument("--repeats", type=int, help="alternating timed runs")
    parser.add_argument("--measure", choices=FUNCTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure, args.sizes)
    full = [8192, 256, 32768] if args.quick else [16384, 896, 152064]
    fits = [1024, 256, 32768] if args.quick else [1536, 896, 152064]

    share = peak("chunked", full) / (4 * full[0] * full[2])
    unchunked = peak("plain", fits) / (4 * fits[0] * fits[2])
    print(f"plain PyTorch needs {unchunked:.1f} times the logits ({fits[0]} rows)")
    tensors = inputs(*fits)
    cpu: dict[str, list[float]] = {name: [] for name in FUNCTIONS}

    def run(kind: str) -> None:
        start = time.process_time()
        gradients(kind, *tensors)
        cpu[kind].append(time.process_time() - start)

    names = {name: lambda name=name: run(name) for name in FUNCTIONS}
    seconds = alternate(names, args.repeats or 3)
    for name, values in seconds.items():
        print(f"{name}, {fits[0]} rows: {spread(values)}; CPU time {spread(cpu[name][1:])}")
    ratios = [a / b for a, b in zip(seconds["chunked"], seconds["plain"], strict=True)]
    cpu_ratio = statistics.median(cpu["chunked"][1:]) / statistics.median(cpu["plain"][1:])
    print(f"time against plain: {spread(ratios, '')}; CPU time {cpu_ratio:.3g}")
    found, expected = gradients("chunked", *tensors), gradients("plain", *tensors)
    errors = [
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True)
    ]
    print(f"difference of the gradients of hidden states and weight: {errors}")

    name = "logprob_memory"
    report(name, "peak memory above the inputs / full logits", share, "<= 0.1")
    report(name, "time / plain PyTorch", statistics.median(ratios), "<= 1.15")
    report(name, "largest relative difference of a gradient", max(errors), "<= 1e-05")


if __name__ == "__main__":
    main()
