"""Sections of `bare.py` about training: gradients, attention, the update, log-probabilities."""

import statistics
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_3_available

from tests.gpu.bare_common import (
    LOGITS_STD,
    Run,
    Wrong,
    build,
    fits,
    make_step,
    median_seconds,
    memory_plan,
    peak_bytes,
    relative_error,
    require,
    seconds,
    size_text,
)
from verl.algorithms.losses import LossConfig
from verl.config.base import FSDPConfig, MixedPrecisionConfig, ModelConfig, OptimConfig
from verl.models.logprobs import chunked_log_probs
from verl.models.packing import sequence_kwargs
from verl.models.policy import MicroBatchLimit, PolicyWorker
from verl.protocol import OptimizerStep
from verl.utils.flops import update_flops

LOSS = LossConfig(entropy_coeff=0.01)
Figures = dict[str, Any]


def gradients(run: Run, out: Figures) -> str:
    """Of a small model: bfloat16 and packed rows against float32 and padded ones."""
    step, found = make_step(run, 12), {}
    for dtype in ("float32", "bfloat16"):
        for packed in (False, True):
            worker = PolicyWorker(run.device.type)
            model = ModelConfig(path=str(run.model("checked")), use_remove_padding=packed)
            precision = MixedPrecisionConfig(param_dtype=dtype)
            worker.build(model, FSDPConfig(mixed_precision=precision), OptimConfig(), 1)
            if packed and run.attention:
                worker.model.lm.set_attn_implementation(run.attention)
            worker.accumulate_gradient(step, LOSS, MicroBatchLimit(4))
            parts = [p.grad.full_tensor().flatten() for p in worker.model.parameters()]
            found[dtype, packed] = torch.cat(parts).double()
            used = worker.model.lm.config._attn_implementation
            out[f"attention of {dtype}, packed={packed}"] = used
    pairs = {
        "float32: packed against padded": (("float32", True), ("float32", False), 1e-3),
        "packed: bfloat16 against float32": (("bfloat16", True), ("float32", True), 5e-2),
        "bfloat16: packed against padded": (("bfloat16", True), ("bfloat16", False), 5e-2),
    }
    for name, (a, b, _) in pairs.items():
        out[name] = relative_error(found[a], found[b])
    for name, (*_, bound) in pairs.items():
        require(out[name] < bound, f"{name}: relative error {out[name]:.2g}, not below {bound}")
    return "relative error: " + ", ".join(f"{name} {out[name]:.1e}" for name in pairs)


def attention(run: Run, out: Figures) -> str:
    """Each packed attention alone, forward and backward, against float32."""
    shapes, step = run.sizes.model, make_step(run)
    lengths, total = [], 0
    for sample in step.samples:
        if total + sample.num_tokens <= run.sizes.budgets[0]:
            lengths.append(sample.num_tokens)
            total += sample.num_tokens
    heads, kv = shapes["num_attention_heads"], shapes["num_key_value_heads"]
    head = shapes["hidden_size"] // heads
    options = sequence_kwargs(lengths, run.device) | {"scaling": head**-0.5}
    dtype = torch.bfloat16 if run.cuda else torch.float32
    make = torch.Generator(run.device).manual_seed(0)
    q, k, v, g = (
        torch.randn(1, n, total, head, generator=make, device=run.device).to(dtype)
        for n in (heads, kv, kv, heads)
    )
    g = g.transpose(1, 2)

    def passes(name: str, *inputs: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        module: Any = torch.nn.Module()  # as transformers' FlashAttention looks at it
        module.is_causal, module.config = True, SimpleNamespace(_attn_implementation=name)
        output, _ = ALL_ATTENTION_FUNCTIONS[name](module, *leaves, **options)
        return [output, *torch.autograd.grad(output, leaves, g.to(output.dtype))]

    exact = passes("packed_attention", q.float(), k.float(), v.float())
    names = [name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if name.startswith("packed_")]
    names += ["flash_attention_3"] * is_flash_attn_3_available()
    flops = 14 * heads * head * sum(n * (n + 1) / 2 for n in lengths)
    lines = []
    for name in names if run.cuda else ["packed_attention"]:
        try:
            errors = list(map(relative_error, passes(name, q, k, v), exact))
            cost = median_seconds(run.device, partial(passes, name, q, k, v), run.sizes.repeats)
        except Exception as error:  # of a kernel that isn't there, or not for this device
            out[name] = {"error": f"{type(error).__name__}: {error}"}
            lines.append(f"{name} fails")
            continue
        out[name] = {"seconds": cost, "tflops": flops / cost / 1e12, "relative errors": errors}
        lines.append(f"{name} {cost * 1e3:.2f} ms (error {max(errors):.1e})")
    out["tokens"], out["sequences"] = total, len(lengths)
    for name, found in out.items():
        if isinstance(found, dict) and "error" not in found:
            worst = max(found["relative errors"])
            require(worst < 2e-2, f"{name}: relative error {worst:.2g}")
    if run.cuda and "error" in out["packed_varlen"]:  # the usual one
        run.attention = "packed_attention"  # so that the other sections have something to tell
        run.notes.append("packed_varlen fails: all that follows uses packed_attention")
        raise Wrong(out["packed_varlen"]["error"])
    return ", ".join(lines)


def update(run: Run, out: Figures) -> str:
    """The large model's update without offloading, with and without gradient checkpointing."""
    return _updates(run, out, offload=False)


def offloaded_update(run: Run, out: Figures) -> str:
    """The same with parameters and optimizer states in host memory between the phases."""
    run.actor = None  # its memory is needed
    run.free()
    return _updates(run, out, offload=True)


def _updates(run: Run, out: Figures, offload: bool) -> str:
    step, worker, lines = make_step(run), None, []
    lengths = [s.length for s in step.samples]
    out["responses"] = len(lengths)
    out["coefficient of variation"] = statistics.pstdev(lengths) / statistics.mean(lengths)
    for checkpointing in (True, False):
        name = f"checkpointing {'on' if checkpointing else 'off'}"
        figures = out[name] = {"offload": offload, "checkpointing": checkpointing}
        budget = _fitting_budget(run, checkpointing, offload)
        if budget is None or run.left() < (90 if offload else 30):
            why = "it would not fit, by the estimate" if budget is None else "no time is left"
            figures["left out"] = why
            lines.append(f"{name}: left out, {why}")
            continue
        try:
            if worker is None:
                options = {"param_offload": offload, "optimizer_offload": offload}
                worker, run.size = build(run, "model", **options)
            _set_checkpointing(worker, checkpointing)
            _measure_update(run, worker, step, budget, figures)
        except torch.OutOfMemoryError as error:
            figures["out of memory"] = str(error).partition("\n")[0]
        if "out of memory" in figures:  # out of the handler, which holds on to what failed
            lines.append(f"{name}: out of memory")
            worker = None
            run.free()
            continue
        rate, peak = figures["tokens/s"], figures["peak bytes"]
        text = f"{name}: {rate:.0f} tokens/s, peak {size_text(peak)}"
        lines.append(f"{text} ({peak / figures['estimated bytes']:.2f} of the estimate)")
    if not offload:
        run.actor = worker
    require(any("tokens/s" in out[key] for key in out if "checkpointing" in key), "; ".join(lines))
    return "; ".join(lines)


def _fitting_budget(run: Run, checkpointing: bool, offload: bool) -> int | None:
    """The largest token budget of a micro-batch that the estimate allows."""
    for budget in run.sizes.budgets:
        if fits(memory_plan(run, budget, checkpointing, offload)):
            return budget
    return None


def _set_checkpointing(worker: PolicyWorker, on: bool) -> None:
    if on:
        worker.model.lm.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        worker.model.lm.gradient_checkpointing_disable()


def _measure_update(
    run: Run, worker: PolicyWorker, step: OptimizerStep, budget: int, out: Figures
) -> None:
    """Whole updates, and their parts one by one."""
    device, limit, offload = run.device, MicroBatchLimit(max_tokens=budget), out["offload"]
    worker.update([step], LOSS, limit, 1.0)  # warms up, and makes the optimizer's states
    run.free()

    def whole() -> None:
        (sums,) = worker.update([step], LOSS, limit, 1.0)
        require(not sums["skipped"], "the gradient is not finite")

    plan = memory_plan(run, budget, out["checkpointing"], offload)
    parts = {"passes": plan.training(), "step": plan.updating()}
    for each in parts.values():
        del each["process"]
    times: list[float] = []
    before = torch.cuda.memory_allocated(device) if run.cuda else 12 * plan.shard
    more = peak_bytes(device, lambda: times.append(seconds(device, whole)))
    out["peak bytes"] = before + more
    out["bytes at rest"] = before
    out["estimated bytes at rest"] = sum(plan.resting().values()) - plan.resting()["process"]
    out["estimated bytes"] = max(sum(each.values()) for each in parts.values())
    out["estimated parts"] = parts
    if run.cuda:
        out["peak bytes reserved"] = torch.cuda.max_memory_reserved(device)
    if not offload:  # where a step takes a quarter of a minute
        times += [seconds(device, whole) for _ in range(run.sizes.repeats)]
    cost = statistics.median(times)
    arrive = seconds(device, lambda: worker.move(device, optimizer=True))
    passes = seconds(device, lambda: worker.accumulate_gradient(step, LOSS, limit))
    optimizer = worker.optimizers[0]
    own = seconds(device, optimizer.step)
    optimizer.zero_grad()
    leave = seconds(device, lambda: worker.move(torch.device("cpu"), optimizer=True))
    tokens = sum(s.num_tokens for s in step.samples)
    out |= {"budget": budget, "tokens": tokens, "seconds": cost, "tokens/s": tokens / cost}
    out |= {"seconds of the passes": passes, "seconds of the optimizer": own}
    out |= {"seconds to the device": arrive, "seconds to the host": leave}
    if run.size is not None:
        prompts = [len(s.prompt.token_ids) for s in step.samples]
        rate = update_flops(run.size, prompts, [s.length for s in step.samples]) / cost
        out |= {"tflops": rate / 1e12, "share of the measured product": rate / run.measured_flops}
        out["mfu"] = rate / run.peak_flops if run.peak_flops else None


def optimizers(run: Run, out: Figures) -> str:
    """AdamW's step of the large model: all tensors together, and in one kernel."""
    worker = run.get_actor()
    worker.optimizers[0].state.clear()
    parameters = list(worker.model.parameters())
    lines = []
    for kind in ("foreach", "fused"):
        run.free()
        worker.move(run.device)
        for parameter in parameters:
            parameter.grad = parameter.detach().clone()  # as uneven as a gradient, unlike zeros
        optimizer = torch.optim.AdamW(parameters, 1e-9, **{kind: True})
        optimizer.step()
        more = peak_bytes(run.device, optimizer.step)
        cost = median_seconds(run.device, optimizer.step, run.sizes.repeats)
        out[kind] = {"seconds": cost, "temporary bytes": more}
        lines.append(f"{kind} {cost * 1e3:.1f} ms, {size_text(more)} of its own")
        optimizer.zero_grad()
        del optimizer
    run.free()
    return "; ".join(lines)


def log_probs(run: Run, out: Figures) -> str:
    """The pass that computes the log-probabilities of a batch with the large model."""
    worker, step = run.get_actor(), make_step(run)
    tokens = sum(s.num_tokens for s in step.samples)
    for budget in run.sizes.budgets:
        limit = MicroBatchLimit(max_tokens=budget)
        call = partial(worker.log_probs, step.samples, 1.0, limit)
        peak = peak_bytes(run.device, call)
        cost = median_seconds(run.device, call, run.sizes.repeats)
        out[f"budget {budget}"] = {"tokens/s": tokens / cost, "peak bytes": peak}
    text = [f"{name}: {found['tokens/s']:.0f} tokens/s" for name, found in out.items()]
    return "; ".join(text)


def head(run: Run, out: Figures) -> str:
    """Log-probabilities in tiles against torch's log_softmax of all logits: time, memory, errors
    against float32 arithmetic."""
    dtype = torch.bfloat16 if run.cuda else torch.float32
    hidden, weight, targets, grads = _head_inputs(run)

    def whole(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        all_log_probs = F.linear(h, w).float().log_softmax(-1)
        entropy = -(all_log_probs.exp() * all_log_probs).sum(-1)
        return all_log_probs.gather(-1, targets[:, None])[:, 0], entropy

    def tiles(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return chunked_log_probs(h, w, targets)

    def passes(way: Any, *inputs: Tensor) -> list[Tensor]:
        results = way(*inputs)
        return [x.detach() for x in (*results, *torch.autograd.grad(results, inputs, grads))]

    exact = passes(whole, *(x.requires_grad_() for x in (hidden, weight)))
    inputs = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
    lines = []
    for name, way in (("tiles", tiles), ("torch", whole)):
        run.free()
        call = partial(passes, way, *inputs)
        errors = list(map(relative_error, call(), exact))
        more = peak_bytes(run.device, call)
        cost = median_seconds(run.device, call, run.sizes.repeats)
        out[name] = {"seconds": cost, "peak bytes": more, "relative errors": errors}
        lines.append(f"{name} {cost * 1e3:.1f} ms, {size_text(more)}")
    worst = max(out["tiles"]["relative errors"])
    require(worst < (5e-2 if run.cuda else 1e-4), f"tiles: relative error {worst:.2g}")
    return "; ".join(lines) + f"; error {worst:.1e}"


def _head_inputs(run: Run) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Hidden states [R, H] and the head [V, H], float32 with values of bfloat16; targets drawn from
    their distribution, as sampled tokens are; and gradients of log-probability and entropy, [R]."""
    shapes, make = run.sizes.model, torch.Generator(run.device).manual_seed(0)
    rows, width = run.sizes.rows, shapes["hidden_size"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, device=run.device)

    weight = (normal(shapes["vocab_size"], width) * 0.02).bfloat16().float()
    hidden = (normal(rows, width) * (LOGITS_STD / (0.02 * width**0.5))).bfloat16().float()
    parts = []
    for h in hidden.split(512):  # Gumbel's trick, for a part of the rows at a time
        uniform = torch.rand((len(h), len(weight)), generator=make, device=run.device)
        parts.append((F.linear(h, weight) - uniform.log_().neg_().log_()).argmax(-1))
    return hidden, weight, torch.cat(parts), (normal(rows), normal(rows))


@torch.no_grad()
def precision_of_the_head(run: Run, out: Figures) -> str:
    """How far log-probabilities move where logits are rounded to bfloat16, as engines do; ours of
    the same inputs don't move. The time of float32."""
    hidden, weight, targets, _ = _head_inputs(run)
    exact, _ = chunked_log_probs(hidden, weight, targets)
    small = hidden.bfloat16(), weight.bfloat16()
    ours, _ = chunked_log_probs(*small, targets)
    out["ours, max"] = (ours - exact).abs().max().item()
    require(out["ours, max"] < 1e-3, f"unrounded logits move one by {out['ours, max']:.2g}")
    logits = torch.cat([F.linear(rows, small[1]).float() for rows in small[0].split(256)])
    rounded = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    moved = (rounded - exact).abs()
    out |= {"mean": moved.mean().item(), "max": moved.max().item()}
    out["mean, signed"] = (rounded - exact).mean().item()
    out["mean log-probability"] = exact.mean().item()
    ways = {"float32": (hidden, weight), "bfloat16": small}
    for name, inputs in ways.items():
        call = partial(chunked_log_probs, *inputs, targets)
        out[f"seconds in {name}"] = median_seconds(run.device, call, run.sizes.repeats)
    require(out["max"] < 0.5, f"a log-probability moves by {out['max']:.2g}")
    times = " and ".join(f"{name} {out[f'seconds in {name}'] * 1e3:.1f} ms" for name in ways)
    return f"bfloat16 moves them by {out['mean']:.1e}, at most {out['max']:.1e}; {times}"
