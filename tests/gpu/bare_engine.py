"""Sections of `bare.py` about what leaves the actor: generation, weights, checkpoints."""

import shutil
import time
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import Tensor

from tests.gpu.bare_common import (
    Run,
    build,
    make_step,
    require,
    seconds,
    size_text,
    synchronize,
)
from verl.algorithms.losses import LossConfig
from verl.config.base import ModelConfig
from verl.config.schema import RolloutConfig
from verl.models.policy import MicroBatchLimit, PolicyWorker
from verl.protocol import Prompt
from verl.rollout.engine import SamplingParams
from verl.rollout.hf import HFEngine
from verl.tools.memory_plan import CHUNK

Figures = dict[str, Any]
ANSWER_S = 120
SHARED_MEMORY = 2**32  # several chunks, of which the embeddings are the largest


def generation(run: Run, out: Figures) -> str:
    """The `hf` engine with the large model, and its log-probabilities against the actor's."""
    engine, sizes = HFEngine(), run.sizes
    model, rollout = ModelConfig(path=str(run.model("model"))), RolloutConfig()
    rollout.max_num_seqs = sizes.sequences
    engine.build(model, rollout, run.device.type, sizes.prompt + sizes.new_tokens)
    ids = np.random.default_rng(0).integers(2, 40, (sizes.sequences // 8, sizes.prompt))
    prompts = [Prompt(i, row, "none", {}) for i, row in enumerate(ids)]
    groups = list(range(len(prompts)))
    short = SamplingParams(8, 4, ignore_eos=True)
    engine.generate_all(prompts, groups, short)  # warms up
    worker = run.get_actor()
    engine.start_update()
    for chunk in worker.plan_export(None, CHUNK)[1]:
        engine.load_weights(worker.export(chunk, "host"))
    worker.finish_export()
    engine.finish_update(worker.version)
    params = SamplingParams(8, sizes.new_tokens, ignore_eos=True)
    samples: list[Any] = []
    generate = partial(engine.generate_all, prompts, groups, params)
    cost = seconds(run.device, lambda: samples.extend(generate()))
    tokens = sum(s.length for s in samples)
    out |= {"tokens": tokens, "seconds": cost, "tokens/s": tokens / cost}
    engine.sleep()
    limit = MicroBatchLimit(max_tokens=sizes.budgets[-1])
    own = worker.log_probs(samples, 1.0, limit)
    moved = own - np.concatenate([s.rollout_log_probs for s in samples])
    out["log-probabilities, mean difference"] = float(np.abs(moved).mean())
    out |= {"largest": float(np.abs(moved).max()), "signed mean": float(moved.mean())}
    for n in (8, 64):  # what a check of so many tokens would see at most
        windows = np.abs(moved[: len(moved) // n * n]).reshape(-1, n).mean(1)
        out[f"largest mean of {n} tokens"] = float(windows.max(initial=0))
    out["mean log-probability"] = float(own.mean())
    require(tokens == sizes.sequences * sizes.new_tokens, f"{tokens} tokens were generated")
    bound = 0.1 if run.cuda else 1e-4
    mean = out["log-probabilities, mean difference"]
    require(mean < bound, f"engine and actor differ by {mean:.2g} nats a token")
    text = f"{out['tokens/s']:.0f} tokens/s; log-probabilities against the actor's: {mean:.1e}"
    return f"{text}, at most {out['largest']:.1e}"


def weights_to_another_process(run: Run, out: Figures) -> str:
    """The large model's weights, as the actor exports them, to a second process, which copies
    them: by CUDA IPC and by host memory; and whether they are the same there."""
    worker = run.get_actor()
    worker.optimizers[0].state.clear()
    worker.optimizers[0].zero_grad()
    run.free()
    context = mp.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    child = context.Process(target=receive, args=(inbox, outbox, run.device.type), daemon=True)
    child.start()
    try:
        outbox.get(timeout=ANSWER_S)
        for transfer in _transfers(run):
            out[transfer] = _send(worker, transfer, inbox, outbox)
        inbox.put(None)
        child.join(ANSWER_S)
    finally:
        child.kill()
    worker.finish_export()
    rates = [f"{name} {found['bytes/s'] / 1e9:.2f} GB/s" for name, found in out.items()]
    wrong = [name for name, found in out.items() if not found["equal"]]
    require(not wrong, f"the weights are others there: {', '.join(wrong)}")
    return ", ".join(rates) + "; equal"


def _transfers(run: Run) -> list[str]:
    """Those that this machine can do; without room in shared memory the process would be killed."""
    if not run.cuda:
        return ["host"]
    if (free := shutil.disk_usage("/dev/shm").free) > SHARED_MEMORY:
        return ["ipc", "host"]
    run.notes.append(f"/dev/shm has {size_text(free)} free: weights don't go by host memory")
    return ["ipc"]


def _send(worker: PolicyWorker, transfer: str, inbox: Any, outbox: Any) -> Figures:
    _, chunks = worker.plan_export(None, CHUNK)
    size, there, own, cost, copying = 0, [], [], 0.0, 0.0
    for chunk in chunks:
        start = time.perf_counter()
        filled = worker.export(chunk, transfer)
        inbox.put(filled)
        copying += outbox.get(timeout=ANSWER_S)
        cost += time.perf_counter() - start
        there += outbox.get(timeout=ANSWER_S)
        # As they are in the parameters, made anew.
        dtype = getattr(torch, chunk.dtype)
        for name in chunk.names:
            value = worker.model.lm.get_parameter(name).detach().full_tensor().to(dtype)
            own.append(fingerprint(value))
            size += value.nbytes
    found = {"bytes": size, "seconds": cost, "bytes/s": size / cost, "chunks": len(chunks)}
    return found | {"seconds of copying": copying, "equal": there == own and len(own) > 0}


def receive(inbox: Any, outbox: Any, device: str) -> None:
    """The second process: takes chunks until there is a None; says of each how long it took to
    open and to copy, then the fingerprints of the copies."""
    at = torch.device(device)
    torch.zeros(1, device=at)
    outbox.put("ready")
    while (chunk := inbox.get()) is not None:
        start = time.perf_counter()
        tensors = chunk.tensors
        if chunk.ipc_handles is not None:
            from torch.multiprocessing.reductions import rebuild_cuda_tensor

            tensors = [
                rebuild_cuda_tensor(*args) for gpu in chunk.ipc_handles for args in gpu.values()
            ]
        copies = [value.to(at, copy=True) for value in tensors]
        synchronize(at)
        outbox.put(time.perf_counter() - start)
        outbox.put([fingerprint(value) for value in copies])
        del tensors, copies, chunk


def fingerprint(value: Tensor) -> int:
    """A sum of all bytes, each times a number of its place: of equal tensors the same."""
    total = 0
    for part in value.contiguous().flatten().view(torch.uint8).split(2**24):
        places = torch.arange(len(part), device=part.device) % 65521 + 1
        total = (total * 31 + int((part.long() * places).sum())) % 2**61
    return total


def checkpoints(run: Run, out: Figures) -> str:
    """Writes and reads a policy of the large model's shapes with fewer layers, and its optimizer's
    states, with torch's distributed checkpoints."""
    run.actor = None
    run.free()
    worker, _ = build(run, "short")
    step, limit = make_step(run, 2), MicroBatchLimit(max_tokens=run.sizes.budgets[-1])
    worker.update([step], LossConfig(), limit, 1.0)
    folder = run.folder / "checkpoint"
    out["seconds to save"] = seconds(run.device, partial(worker.save, folder))
    out["bytes"] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    before = _state_of(worker)
    del worker
    run.free()
    other, _ = build(run, "short")
    unlike = _state_of(other)["lm.model.embed_tokens.weight"]
    require(not torch.equal(unlike, before["lm.model.embed_tokens.weight"]), "nothing was learned")
    out["seconds to load"] = seconds(run.device, partial(other.load, folder))
    after = _state_of(other)
    require(before.keys() == after.keys(), "other tensors were loaded")
    wrong = [name for name, value in before.items() if not torch.equal(value, after[name])]
    out["tensors"], out["equal"] = len(before), not wrong
    require(not wrong, f"{len(wrong)} tensors are others, such as {wrong[:1]}")
    times = f"saved in {out['seconds to save']:.1f} s, loaded in {out['seconds to load']:.1f} s"
    return f"{out['bytes'] / 1e9:.2f} GB {times}; {len(before)} tensors equal"


def _state_of(worker: PolicyWorker) -> dict[str, Tensor]:
    """Copies of parameters and optimizer states, on the host."""
    found = {}
    for name, parameter in worker.model.named_parameters():
        found[name] = parameter.full_tensor().detach().cpu().clone()
        for kind, value in worker.optimizers[0].state.get(parameter, {}).items():
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            found[f"{name} {kind}"] = value.detach().cpu().clone()
    return found
