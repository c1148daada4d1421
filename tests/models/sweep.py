"""The table of docs/models.md: `python -m tests.models.sweep [--without-vllm] [family …]` prints
it. All in float32 on a CPU; packed and padded passes against transformers' own, engines against the
actor, before and after updates of all weights."""

import gc
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from tests.helpers import free_address, make_samples, make_step
from tests.models.families import FAMILIES, make_family
from verl.algorithms.losses import LossConfig
from verl.config.base import MixedPrecisionConfig
from verl.config.schema import FSDPConfig, ModelConfig, OptimConfig, RolloutConfig
from verl.models.folder import check_model
from verl.models.policy import MicroBatchLimit, PolicyWorker
from verl.protocol import Sample
from verl.rollout.engine import RolloutEngine, SamplingParams, engine_class, rows_of

LENGTHS = [3, 20, 1, 12]  # some longer than the windows
LIMIT = MicroBatchLimit(len(LENGTHS))
EXACT = 1e-4  # nats


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone, if there is none."""
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", init_method=free_address(), rank=0, world_size=1)
    yield
    if own:
        dist.destroy_process_group()


def plain_log_probs(folder: Path, samples: list[Sample]) -> np.ndarray:
    """Of all response tokens, [ΣR], by transformers' eager forward pass of each sequence."""
    lm = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    found = []
    for s in samples:
        ids = torch.tensor(np.concatenate([s.prompt.token_ids, s.response_ids]))[None]
        with torch.no_grad():
            log_p = lm(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        before = np.arange(len(s.prompt.token_ids) - 1, ids.shape[1] - 1)
        found.append(log_p[before, s.response_ids].numpy())
    return np.concatenate(found)


def build(folder: Path, packed: bool = True, dtype: str = "float32") -> PolicyWorker:
    """An actor of one rank. Raises: ValueError for a model that is refused."""
    model = ModelConfig(path=str(folder), use_remove_padding=packed)
    precision = MixedPrecisionConfig(param_dtype=dtype)
    check_model(model, 64, export=True)
    worker = PolicyWorker("cpu")
    worker.build(model, FSDPConfig(mixed_precision=precision), OptimConfig(lr=3e-3), 10)
    return worker


def actor_difference(folder: Path, packed: bool) -> float:
    """Largest difference of the actor's log-probabilities."""
    samples = make_samples(LENGTHS)
    found = build(folder, packed).log_probs(samples, 1.0, LIMIT)
    return float(np.abs(found - plain_log_probs(folder, samples)).max())


def actor_of(folder: Path) -> PolicyWorker:
    """Packed, if it can be."""
    try:
        return build(folder)
    except ValueError:
        return build(folder, packed=False)


def engine_difference(folder: Path, name: str) -> float:
    """Largest difference of an engine's log-probabilities, before and after updates. Half of the
    responses are half finished when they begin, so that places become free at different times."""
    cls = engine_class(name)
    cls.check(ModelConfig(path=str(folder)))
    engine: RolloutEngine = cls()
    rollout = RolloutConfig(name=name, max_num_seqs=4)
    engine.build(ModelConfig(path=str(folder)), rollout, "cpu", 160)
    worker = actor_of(folder)
    prompts = [s.prompt for s in make_samples(LENGTHS)]
    numbers, differences = range(len(prompts)), []
    for _ in range(3):
        halves = engine.generate_all(prompts, numbers, SamplingParams(1, 10))
        begun = {(s.group, 0): s for s in halves if s.truncated}
        rows = [row._replace(begun=begun.get(row[1:3])) for row in rows_of(prompts, numbers, 2)]
        samples = [*chain.from_iterable(engine.generate_rows(rows, SamplingParams(2, 20)))]
        ours = np.concatenate([s.rollout_log_probs for s in samples])
        differences.append(np.abs(ours - worker.log_probs(samples, 1.0, LIMIT)).max())
        worker.update([make_step(make_samples(LENGTHS))], LossConfig(), LIMIT, 1.0)
        send_weights(worker, engine)
    vars(engine).clear()  # frees vLLM's memory
    return float(max(differences))


def send_weights(worker: PolicyWorker, engine: RolloutEngine) -> None:
    """Gives the engine the actor's weights, in small chunks."""
    version, chunks = worker.plan_export(None, 20_000, engine.stored)
    engine.start_update()
    for chunk in chunks:
        engine.load_weights(worker.export(chunk, "host"))
    worker.finish_export()
    engine.finish_update(version)


def in_own_process(names: list[str]) -> Iterator[float | ValueError]:
    """`engine_difference` of each family with vLLM, which changes the process that imports it."""
    while names:
        command = [sys.executable, "-m", "tests.models.sweep", "--vllm", *names]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        with subprocess.Popen(command, **pipes) as child:
            for line in child.stdout:
                if line.startswith("RESULT "):
                    kind, _, text = line.removeprefix("RESULT ").strip().partition(" ")
                    yield float(text) if kind == "ok" else ValueError(text)
                    names = names[1:]
        if names:
            yield ValueError(f"the process ended with status {child.returncode}")
            names = names[1:]


def vllm_differences(names: list[str]) -> None:
    """Prints a line for each family."""
    for name in names:
        with tempfile.TemporaryDirectory() as place:
            try:
                folder = make_family(name, Path(place))
                print("RESULT ok", engine_difference(folder, "vllm"), flush=True)
            except Exception as error:
                lines = str(error).splitlines() or [""]
                print(f"RESULT error {type(error).__name__}: {lines[0]}", flush=True)
            gc.collect()
    os._exit(0)  # its threads may still run


def cell(measure: Callable[[], float], reasons: dict[str, str], place: str) -> str:
    """What stands in the table at this place, and in `reasons` why it isn't "yes"."""
    try:
        difference = measure()
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reasons[place] = re.sub(r"/tmp/\S+: ", "", lines[0])
        return "no"
    return "yes" if difference < EXACT else f"{difference:.2g} off"


def main(names: list[str], engines: list[str]) -> None:
    """Prints the table and, below it, the reasons; `engines`: families that vLLM runs."""
    print("| family | packed | padded | `hf` | `vllm` |\n|" + "---|" * 5)
    reasons: dict[str, str] = {}
    with_vllm = in_own_process([name for name in names if name in engines])
    for name in names:
        with tempfile.TemporaryDirectory() as place:
            folder = make_family(name, Path(place))
            measures: dict[str, Callable[[], float]] = {
                "packed": partial(actor_difference, folder, True),
                "padded": partial(actor_difference, folder, False),
                "hf": partial(engine_difference, folder, "hf"),
                "vllm": partial(result_of, with_vllm),
            }
            cells: list[str] = []
            for column, measure in measures.items():
                # Without an actor there is nothing to compare an engine with.
                run = cells[:2] != ["no", "no"] and (column != "vllm" or name in engines)
                cells.append(cell(measure, reasons, f"{name}, {column}") if run else "–")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print("\n" + "\n".join(f"* {place}: {reason}" for place, reason in reasons.items()))


def result_of(results: Iterator[float | ValueError]) -> float:
    """The next one. Raises: what it is."""
    result = next(results)
    if isinstance(result, ValueError):
        raise result
    return result


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    with one_rank():
        if sys.argv[1:2] == ["--vllm"]:
            vllm_differences(sys.argv[2:])
        named = [name for name in sys.argv[1:] if name != "--without-vllm"] or [*FAMILIES]
        main(named, [] if "--without-vllm" in sys.argv else named)
