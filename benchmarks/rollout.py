"""The `hf` engine against transformers' `generate` and vLLM on CPU, responses of ragged lengths.

    .venv/bin/python benchmarks/rollout.py [--quick] [--size 2M]

All draw from the same random policy (`policies.py`), for the same prompts, at temperature 1, n = 8,
with the same limit. What they return: ours and vLLM tokens with log-probabilities, which the
training step needs; `generate` tokens alone, as its `output_logits` would cost it memory and time.
`generate` gets one padded batch with `num_return_sequences`, vLLM prefix caching and one process.
Every engine is a process of its own, idle while another one runs, and keeps the memory that it
frees. Ours and vLLM run eagerly, as the trainer runs them (`enforce_eager=True`, its default), and
compiled by inductor. Of vLLM's one process the best with one or two threads counts, beside ours
with two. As in the trainer, each of vLLM's requests has a seed of its own, which its sampler draws
for in a loop. Two engines of one thread each, with half of the prompts, are how the trainer runs
them on two cores. `--quick` leaves out all that is compiled, and all of vLLM but two eager threads.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from common import report, spread

N = 8
LONGEST_PROMPT = 40
Run = Callable[[int], list[int]]
"""Seed → lengths of the responses."""


def workload(size: str, quick: bool) -> tuple[int, int, int]:
    """Prompts, most tokens of a response, and expected tokens if there were no limit."""
    if size.startswith("SmolLM2"):
        return (2, 32, 8) if quick else (8, 128, 32)
    return (8, 128, 32) if quick else (16 if size == "10M" else 32, 256, 64)


def rollout_config(name: str) -> Any:
    """The trainer's keys for one of `ENGINES`."""
    from verl.config.schema import RolloutConfig

    return RolloutConfig(name=name.split()[0], enforce_eager="compiled" not in name)


# One engine, in a process of its own.


def our_engine(name: str, folder: str, prompts: list[Any], max_tokens: int) -> Run:
    """`hf` or vLLM as the trainer builds them."""
    from verl.config.schema import ModelConfig
    from verl.protocol import Prompt
    from verl.rollout.engine import SamplingParams, engine_class

    rollout = rollout_config(name)
    model = ModelConfig(path=folder)
    engine = engine_class(rollout.name)()
    engine.build(model, rollout, "cpu", LONGEST_PROMPT + max_tokens)
    rows = [Prompt(i, ids, "", None) for i, ids in enumerate(prompts)]

    def run(seed: int) -> list[int]:
        params = SamplingParams(N, max_tokens, seed=(seed,))
        return [s.length for s in engine.generate_all(rows, list(range(len(rows))), params)]

    return run


def generate_engine(folder: str, prompts: list[Any], max_tokens: int) -> Run:
    """transformers' `generate`."""
    import torch
    from policies import EOS, PAD
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    width = max(len(ids) for ids in prompts)
    rows = [[PAD] * (width - len(ids)) + ids.tolist() for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    inputs = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}

    def run(seed: int) -> list[int]:
        torch.manual_seed(seed)
        settings = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        out = model.generate(
            **inputs, **settings, num_return_sequences=N, max_new_tokens=max_tokens
        )
        ended = torch.nn.functional.pad(out[:, width:] == EOS, (0, 1), value=True)
        return (ended.int().argmax(1) + 1).clamp(max=out.shape[1] - width).tolist()

    return run


def serve(options: argparse.Namespace) -> None:
    """Runs once per line of standard input, a seed; answers with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    import torch
    from policies import make_token_prompts

    if not options.engine.startswith("vllm"):
        torch.set_num_threads(options.threads)
    count, max_tokens, _ = workload(options.size, options.quick)
    prompts = make_token_prompts(options.size, count, longest=LONGEST_PROMPT)
    prompts = prompts[options.part :: options.parts]
    if options.engine == "generate":
        run = generate_engine(options.folder, prompts, max_tokens)
    else:
        run = our_engine(options.engine, options.folder, prompts, max_tokens)
    for line in chain(["0"], sys.stdin):  # the first run doesn't count
        import resource

        start = time.perf_counter()
        lengths = run(int(line))
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps([seconds, lengths, peak]), file=answers, flush=True)


# All of them in turn.

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""Makes glibc keep what is freed. `generate` copies its cache for each token, and else half of its
time goes into new pages; in a trainer's process they are there already."""


class Engine:
    """One or several processes that share the prompts."""

    def __init__(self, name: str, threads: int, parts: int, size: str, folder: Path, quick: bool):
        """Starts them; `wait` before the first run."""
        self.name = f"{name}, {threads} thread{'s' * (threads > 1)}" + " x 2" * (parts > 1)
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        environment |= KEEP_MEMORY
        environment.pop("OMP_WAIT_POLICY", None)  # two threads on idle cores: faster for all
        command = [sys.executable, __file__, "--size", size, "--engine", name]
        command += ["--folder", str(folder), "--threads", str(threads), "--parts", str(parts)]
        command += ["--quick"] * quick
        self.processes = [
            subprocess.Popen(
                [*command, "--part", str(part)],
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL if name.startswith("vllm") else None,
            )
            for part in range(parts)
        ]
        self.seconds: list[float] = []
        self.lengths: list[list[int]] = []

    def wait(self) -> None:
        """Until they are ready, after a run that doesn't count."""
        print(f"starting {self.name}", file=sys.stderr)
        self._answers()

    def _answers(self) -> list[Any]:
        lines = [process.stdout.readline() for process in self.processes]
        if not all(lines):
            raise RuntimeError(f"{self.name} has ended")
        return [json.loads(line) for line in lines]

    def run(self, seed: int) -> None:
        """All prompts once."""
        for process in self.processes:
            process.stdin.write(f"{seed}\n")
            process.stdin.flush()
        answers = self._answers()
        self.seconds.append(max(seconds for seconds, _, _ in answers))
        self.lengths.append([n for _, lengths, _ in answers for n in lengths])
        self.peak = sum(peak for _, _, peak in answers)
        print(f"{self.name}: {self.seconds[-1]:.2f} s", file=sys.stderr)

    def rates(self, what: Callable[[list[int]], int]) -> list[float]:
        """`what` of the lengths, per second, run by run."""
        return [what(n) / t for n, t in zip(self.lengths, self.seconds, strict=True)]

    def close(self) -> None:
        """Ends the processes."""
        for process in self.processes:
            process.stdin.close()
            process.wait()


QUICK = [("hf", 2, 1), ("generate", 2, 1), ("hf", 1, 2), ("vllm eager", 2, 1)]
ENGINES = [*QUICK, ("vllm eager", 1, 1), ("vllm eager", 1, 2)]
ENGINES += [("vllm compiled", 1, 1), ("vllm compiled", 2, 1), ("vllm compiled", 1, 2)]
ENGINES += [("hf compiled", 2, 1), ("hf compiled", 1, 2)]
"""Engine, threads of each process, processes."""


def available(small: bool, quick: bool) -> list[tuple[str, int, int]]:
    """Those of `ENGINES` that can run here; vLLM with small models alone."""
    from verl.utils.device import compiler_available

    missing = "" if small else "vllm"
    if small and importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed and is left out: bash setup.sh cpu --vllm")
        missing = "vllm"
    compiles = compiler_available()
    if not (quick or compiles):
        print("there is no C++ compiler (apt-get install g++): compiled engines are left out")
    engines = [e for e in (QUICK if quick else ENGINES) if compiles or "compiled" not in e[0]]
    return [e for e in engines if not missing or not e[0].startswith(missing)]


def compare(size: str, quick: bool, repeats: int) -> None:
    """Prints the table of a size, and its ratios."""
    from policies import make_policy

    prompts, max_tokens, mean = workload(size, quick)
    small = not size.startswith("SmolLM2")
    with tempfile.TemporaryDirectory() as folder:
        make_policy(Path(folder), size, mean)
        engines = []
        for name, threads, parts in available(small, quick):
            engines.append(Engine(name, threads, parts, size, Path(folder), quick))
            if not quick:  # else they start together
                engines[-1].wait()
        for engine in engines if quick else ():
            engine.wait()
        for seed in range(1, repeats + 1):
            for engine in engines:
                engine.run(seed)
        for engine in engines:
            engine.close()
    print(f"\n{size}: {prompts} prompts x {N}, at most {max_tokens} tokens")
    for engine in engines:
        lengths = np.concatenate(engine.lengths)
        print(
            f"{engine.name:24} {spread(engine.rates(sum), 'tokens/s'):40}"
            f"{spread(engine.rates(len), 'responses/s'):34} mean length {lengths.mean():.0f}, "
            f"CV {lengths.std() / lengths.mean():.2f}, peak memory {engine.peak:.0f} MiB"
        )
    tokens = {engine.name: statistics.median(engine.rates(sum)) for engine in engines}
    ours, plain = tokens["hf, 2 threads"], tokens["generate, 2 threads"]
    say, what = partial(report, "rollout"), f"{size}: tokens/s against"
    say(f"{what} generate", ours / plain, ">= 3" if small else ">= 1")
    pair = f"two engines of one thread each: {tokens['hf, 1 thread x 2'] / plain:.3g} x generate"
    peers = {n: v for n, v in tokens.items() if n.startswith("vllm") and not n.endswith("x 2")}
    if peers:
        best = max(peers, key=peers.get)
        say(f"{what} vLLM (best: {best})", ours / peers[best], ">= 1")
        if compiled := tokens.get("hf compiled, 2 threads"):
            say(f"{what} vLLM's best, ours compiled", compiled / peers[best], ">= 1")
    for own, kind in (("hf", "eager"), ("hf compiled", "compiled")):
        if two := tokens.get(f"vllm {kind}, 1 thread x 2"):
            ratio = tokens[f"{own}, 1 thread x 2"] / two
            pair += f", {ratio:.3g} x two of vLLM, both {kind}"
    print(pair)


def main() -> None:
    """The command line."""
    from policies import SIZES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="few tokens; the smallest model, but for --size"
    )
    parser.add_argument("--size", choices=SIZES, help="this one alone")
    parser.add_argument("--repeats", type=int, help="timed runs of each [3; with --quick 2]")
    for name in ("engine", "folder"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    for name, value in {"threads": 2, "part": 0, "parts": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        return serve(options)
    for size in [options.size] if options.size else list(SIZES)[: 1 if options.quick else None]:
        compare(size, options.quick, options.repeats or (2 if options.quick else 3))


if __name__ == "__main__":
    main()
