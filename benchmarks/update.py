"""What an update costs per real token: `accumulate_gradient` on one rank, as the actor runs.

    .venv/bin/python benchmarks/update.py [--quick] [--attention]

Throughput for response lengths of coefficient of variation 0, 0.5, 1 and 1.5, with equal numbers of
tokens and of responses, counted in real tokens (prompts and responses, no padding) per second of
forward and backward. Attention's cost grows with the square of a length; no correction for that is
made. Named peers, in alternating runs: the model's matrix products alone, in the very shapes,
forward and both backward products; padded rows (`use_remove_padding=False`); recomputation
(`enable_gradient_checkpointing=True`). The model: SmolLM2-135M's architecture, random weights.
`--attention` times ways to run causal attention over a packed row instead.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import alternate, report, spread
from policies import save_tokenizer
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AutoModelForCausalLM, LlamaConfig

from verl.algorithms.losses import LossConfig
from verl.config.schema import FSDPConfig, ModelConfig
from verl.models.packing import packed_attention
from verl.models.policy import MicroBatchLimit, PolicyWorker
from verl.protocol import OptimizerStep, Prompt, Sample

SMOLLM2_135M = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rope_theta=1e5,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
)
QUICK = dict(num_hidden_layers=3, vocab_size=16384)
PROMPT, CAP = 64, 4096
CPU = torch.device("cpu")


def draw_lengths(cv: float, total: int, mean: int, seed: int = 0) -> list[int]:
    """`total` / `mean` response lengths of at most `CAP` tokens that add up to `total`: of 2,000
    draws from a gamma distribution the one whose coefficient of variation is nearest to `cv`."""
    count = total // mean
    if cv == 0:
        return [mean] * count
    draws = np.random.default_rng(seed).gamma(cv**-2, size=(2000, count))
    draws = np.clip(draws / draws.mean(1, keepdims=True) * mean, 1, CAP).round().astype(int)
    rest = total - draws.sum(1)  # goes to the longest that has room
    draws[np.arange(len(draws)), np.where(draws + rest[:, None] <= CAP, draws, 0).argmax(1)] += rest
    draws = draws[(draws.max(1) <= CAP) & (draws.min(1) >= 1)]
    found = draws.std(1) / mean
    return draws[np.abs(found - cv).argmin()].tolist()


def make_step(lengths: list[int], vocabulary: int) -> OptimizerStep:
    """Random tokens, with all that the loss asks for."""
    rng = np.random.default_rng(0)
    samples = []
    for i, length in enumerate(lengths):
        prompt = Prompt(i, rng.integers(0, vocabulary, PROMPT), "random", {})
        sample = Sample(prompt, i, rng.integers(0, vocabulary, length), "stop")
        sample.rollout_log_probs = rng.normal(-10.8, 0.1, length).astype(np.float32)
        sample.old_log_probs = sample.rollout_log_probs
        sample.advantage = rng.normal()
        samples.append(sample)
    return OptimizerStep(samples, np.full(len(samples), 1 / sum(lengths), np.float32))


def make_policy(folder: Path, **model: bool) -> PolicyWorker:
    """A policy without an optimizer; `model`: keys of `actor_rollout_ref.model`."""
    config = ModelConfig(path=str(folder), **({"enable_gradient_checkpointing": False} | model))
    policy = PolicyWorker("cpu")
    policy.build(config, FSDPConfig())
    return policy


def products(rows: int, shapes: list[tuple[int, int, int]]) -> Callable[[], None]:
    """Runs `count` times each product of (inputs, outputs, count): forward, towards the inputs,
    towards the weight. Its results have their memory already."""
    work = []
    for k, n, count in shapes:
        x, w, y = torch.randn(rows, k), torch.randn(n, k), torch.randn(rows, n)
        work.append((x, w, y, *(torch.empty_like(t) for t in (x, w, y)), count))

    def run() -> None:
        for x, w, y, to_x, to_w, to_y, count in work:
            for _ in range(count):
                torch.mm(x, w.T, out=to_y)
                torch.mm(y, w, out=to_x)
                torch.mm(y.T, x, out=to_w)

    return run


def layer_shapes(config: dict) -> list[tuple[int, int, int]]:
    """(inputs, outputs, count) of a decoder layer's weights."""
    h, f = config["hidden_size"], config["intermediate_size"]
    key_value = h // config["num_attention_heads"] * config["num_key_value_heads"]
    return [(h, h, 2), (h, key_value, 2), (h, f, 2), (f, h, 1)]


def flash_pairs(length: int) -> int:
    """Query-key pairs that PyTorch's flash attention computes for a causal sequence on a CPU: each
    block of queries sees the keys up to its own end."""
    block = 256 if length >= 768 else 64 if length >= 192 else 32
    return sum(
        (min(start + block, length) - start) * min(start + block, length)
        for start in range(0, length, block)
    )


def discarded(
    policy: PolicyWorker, samples: list[Sample], limit: MicroBatchLimit, config: dict
) -> float:
    """Prints what is computed and not needed; returns its share of all floating-point operations of
    the forward pass (the backward pass has twice as many of each kind)."""
    rows = needed = heads = pairs = needed_pairs = 0
    for indices in policy.micro_batches(samples, limit):
        part = [samples[i] for i in indices]
        batch = policy.pack(part)
        rows += batch.input_ids.numel()
        heads += len(batch.predictors)
        lengths = [s.num_tokens - 1 for s in part]  # a sequence's last token predicts nothing
        needed += sum(lengths)
        needed_pairs += sum(n * (n + 1) // 2 for n in lengths)
        packed = policy.model_config.use_remove_padding
        pairs += sum(map(flash_pairs, lengths)) if packed else len(lengths) * max(lengths) ** 2
    response = sum(s.length for s in samples)
    h, layers = config["hidden_size"], config["num_hidden_layers"]
    row = layers * 2 * sum(k * n * count for k, n, count in layer_shapes(config))
    pair, head = layers * 4 * h, 2 * h * config["vocab_size"]
    total = rows * row + pairs * pair + heads * head
    wasted = (rows - needed) * row + (pairs - needed_pairs) * pair + (heads - response) * head
    print(
        f"discarded: {rows - needed} of {rows} positions, {heads - response} of {heads} rows of "
        f"the head, {pairs - needed_pairs} of {pairs} pairs of attention; {wasted / total:.2%} of "
        "the floating-point operations"
    )
    return wasted / total


# --------------------------------------------------------------------------- ways of attention


def per_sequence(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """What the actor does."""
    return packed_attention(torch.nn.Module(), q, k, v, None, sequence_lengths=lengths)[0]


def per_sequence_gqa(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Without repeating keys and values."""
    parts = zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)
    outputs = [F.scaled_dot_product_attention(*p, is_causal=True, enable_gqa=True) for p in parts]
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


def buckets(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Sequences whose lengths differ by an eighth at most, padded on the right, share a call."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    starts = [0, *np.cumsum(lengths)]
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and lengths[i] <= 1.125 * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    outputs: dict[int, Tensor] = {}
    for group in groups:
        width = lengths[group[-1]]
        parts = [
            torch.cat([F.pad(x[:, :, starts[i] : starts[i + 1]], (0, 0, 0, width - lengths[i]))
                       for i in group])
            for x in (q, k, v)
        ]  # fmt: skip
        out = F.scaled_dot_product_attention(*parts, is_causal=True)
        for i, o in zip(group, out, strict=True):
            outputs[i] = o[:, : lengths[i]]
    joined = torch.cat([outputs[i] for i in range(len(lengths))], 1)
    return joined.transpose(0, 1)[None].contiguous()


def nested(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Jagged tensors."""
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    jagged = [
        torch.nested.nested_tensor_from_jagged(x[0].transpose(0, 1).contiguous(), offsets)
        for x in (q, k, v)
    ]
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in jagged), is_causal=True)
    return out.transpose(1, 2).values()[None]


def block_diagonal(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """One call, with a mask of all pairs."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (owner[:, None] == owner) & torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).contiguous()


def flex(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Flex attention."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = create_block_mask(
        lambda b, h, i, j: (owner[i] == owner[j]) & (i >= j), None, None, *(len(owner),) * 2, "cpu"
    )
    compiled = torch.compile(flex_attention)
    return compiled(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2).contiguous()


WAYS = (per_sequence, per_sequence_gqa, buckets, nested, block_diagonal, flex)


def compare_attention(total: int, mean: int, repeats: int) -> None:
    """Forward and backward of one layer's attention, for the lengths of each kind."""
    for cv, mean_ in ((0.0, 16), (0.0, mean), (1.5, mean)):
        lengths = draw_lengths(cv, total, mean_)
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, total, n, 64).transpose(1, 2).requires_grad_() for n in (9, 3, 3))
        grad = torch.randn(1, total, 9, 64)
        expected, runs = None, {}
        for way in WAYS:

            def run(way: Callable = way) -> list[Tensor]:
                out = way(q, k, v, lengths)  # noqa: B023
                return [out, *torch.autograd.grad(out, (q, k, v), grad)]  # noqa: B023

            try:
                found = run()
            except Exception as error:  # what a way can't do is part of the answer
                print(f"{way.__name__}: {type(error).__name__}: {str(error).splitlines()[0]}")
                continue
            expected = expected or found
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
            runs[way.__name__] = run
        print(f"attention, CV {cv}, mean {mean_}, {total} tokens, microseconds a token:")
        for name, seconds in alternate(runs, repeats).items():
            print(f"  {name}: {spread([s / total * 1e6 for s in seconds], '')}")


# ------------------------------------------------------------------------------------- command


def main() -> None:
    """The comparison on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="3 of 30 layers, a third of the words, fewer tokens")
    add("--attention", action="store_true", help="compare ways of attention instead")
    add("--tokens", type=int, help="response tokens of a pass over all micro-batches")
    add("--mean", type=int, help="mean response length")
    add("--repeats", type=int, help="alternating timed runs")
    add("--cvs", type=float, nargs="+", help="coefficients of variation")
    args = parser.parse_args()
    total = args.tokens or (1024 if args.quick else 4096)
    mean = args.mean or (128 if args.quick else 256)
    repeats = args.repeats or (2 if args.quick else 3)
    if args.attention:
        return compare_attention(total, mean, repeats)
    cvs = args.cvs or ([0, 1.5] if args.quick else [0, 0.5, 1, 1.5])
    config = SMOLLM2_135M | (QUICK if args.quick else {})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(LlamaConfig(**config)).save_pretrained(folder)
        save_tokenizer(folder, config["vocab_size"])
        dist.init_process_group("gloo", init_method=f"file://{name}/group", rank=0, world_size=1)
        policies = {
            "packed": make_policy(folder),
            "padded": make_policy(folder, use_remove_padding=False),
            "recompute": make_policy(folder, enable_gradient_checkpointing=True),
        }
    compare(policies, config, total, mean, cvs, repeats)
    dist.destroy_process_group()


def compare(
    policies: dict[str, PolicyWorker],
    config: dict,
    total: int,
    mean: int,
    cvs: list[float],
    repeats: int,
) -> None:
    """Runs everything in turn and prints the targets."""
    tokens = MicroBatchLimit(None, total + PROMPT * (total // mean))  # all in one pass
    two = MicroBatchLimit(2)  # sequences: padded rows take more memory
    words = config["vocab_size"]
    workloads = {cv: make_step(draw_lengths(cv, total, mean), words) for cv in cvs}
    first, last = workloads[cvs[0]], workloads[cvs[-1]]
    work = {f"packed, CV {cv}": ("packed", step, tokens) for cv, step in workloads.items()}
    work[f"padded, CV {cvs[-1]}"] = ("padded", last, two)
    work[f"recompute, CV {cvs[0]}"] = ("recompute", first, tokens)
    for cv, step in workloads.items():
        found = [s.length for s in step.samples]
        print(f"CV {cv}: {len(found)} responses of {min(found)} to {max(found)} tokens, "
              f"coefficient of variation {np.std(found) / np.mean(found):.3f}")  # fmt: skip

    def update(policy: str, step: OptimizerStep, limit: MicroBatchLimit) -> None:
        policies[policy].accumulate_gradient(step, LossConfig(), limit)

    runs = {name: partial(update, *what) for name, what in work.items()}
    layers = config["num_hidden_layers"]
    timed = min(5, layers)  # a layer's products are timed five times, not for each layer
    rows = sum(s.num_tokens - 1 for s in first.samples)
    shapes = [(k, n, count * timed) for k, n, count in layer_shapes(config)]
    runs["products of layers"] = products(rows, shapes)
    runs["products of the head"] = products(
        total, [(config["hidden_size"], config["vocab_size"], 1)]
    )
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    seconds = alternate({n: partial(with_cpu_time, f, cpu[n]) for n, f in runs.items()}, repeats)

    real = sum(s.num_tokens for s in first.samples)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    cpu_median = {name: statistics.median(values[1:]) for name, values in cpu.items()}
    for name in work:
        print(f"{name}: {spread([real / t for t in seconds[name]], 'tokens/s')}; "
              f"{spread(seconds[name])}; CPU time {spread(cpu[name][1:])}")  # fmt: skip
    shares = {}
    for times in (median, cpu_median):
        plain = times["products of layers"] * layers / timed + times["products of the head"]
        parts = {name: plain / times[name] for name in work if "padded" not in name}
        shares = shares or parts
        print(f"matrix products alone: {plain:.2f} s; their share of each run:",
              ", ".join(f"{name}: {part:.2f}" for name, part in parts.items()))  # fmt: skip
    same, varied = f"packed, CV {cvs[0]}", f"packed, CV {cvs[-1]}"
    print(f"CPU time, CV {cvs[0]} / CV {cvs[-1]}: {cpu_median[same] / cpu_median[varied]:.3g}")
    print("packed", end=" ")
    waste = discarded(policies["packed"], last.samples, tokens, config)
    print("padded", end=" ")
    discarded(policies["padded"], last.samples, two, config)

    what = f"real tokens per second, CV {cvs[-1]} / CV {cvs[0]}"
    report("update", what, median[same] / median[varied], ">= 0.9")
    report("update", f"computed but discarded, share of FLOP, CV {cvs[-1]}", waste, "<= 0.02")
    report("update", f"matrix products alone / update, CV {cvs[0]}", shares[same], ">= 0.6")
    report("update", f"packed / padded, tokens per second, CV {cvs[-1]}",
           median[f"padded, CV {cvs[-1]}"] / median[varied], ">= 1")  # fmt: skip


def with_cpu_time(function: Callable[[], object], seconds: list[float]) -> None:
    """Runs it and appends its CPU time, which other programs on the machine change less."""
    start = time.process_time()
    function()
    seconds.append(time.process_time() - start)


if __name__ == "__main__":
    main()
