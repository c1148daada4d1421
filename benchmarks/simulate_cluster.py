"""What a step takes on 8 to 4,096 GPUs, in each placement, and how good such a prediction is.

`.venv/bin/python benchmarks/simulate_cluster.py` runs the trainer on this machine, predicts other
runs from four of them (`measure_runs.py`), and prints predicted over measured step times.
`--tables` prints the tables of docs/scaling.md instead and `--plot FILE` draws its picture, from
assumed speeds of GPUs: nothing of that was measured. `--lengths FILE` takes the lengths of
responses from a file (numbers with white space between them) in place of a lognormal distribution.
"""

import argparse
import itertools
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cluster import Draw, Result, Run, Trainer, simulate
from cluster_engine import Engine
from cluster_in_flight import simulate_in_flight
from common import report
from measure_runs import Comparison, validate
from numpy.typing import NDArray

from verl.config.load import load_config
from verl.tools.memory_plan import Plan

QWEN: dict[str, dict[str, Any]] = {
    "3B": dict(
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "7B": dict(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
    ),
    "32B": dict(
        hidden_size=5120,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=152064,
    ),
}
"""config.json of Qwen2.5, as far as it matters."""
SIZES = [8 * 2**i for i in range(10)]
NODE = 8
STEPS = 4
"""Of each placement; the lengths of each step are others."""
MEMORY = 79 * 2**30
AGES = (1, 2, 4)
"""Of `trainer.max_policy_age`."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Assumptions about an H100 SXM. docs/scaling.md names their sources."""

    flops: float = 989e12
    bandwidth: float = 3.35e12
    decode: float = 0.7
    """Share of the bandwidth that decoding reaches."""
    prefill: float = 0.5
    """Share of the flops that reading prompts, and the batch's part of decoding, reaches."""
    train: float = 0.35
    """Share of the flops that an update reaches, recomputation counted as work."""
    step_s: float = 3e-3
    """Of a decoding step, on the engine's own CPU."""
    sequence_s: float = 1e-5
    """Of each sequence in it, on the CPU."""
    node_link: float = 300e9
    """Bytes per second of a GPU within a node."""
    link: float = 40e9
    """The same between nodes."""
    host_link: float = 25e9
    """The same between a GPU and the host's memory."""
    other_s: float = 3.0
    """Of a step: sleep and wake of vLLM, calls through Ray."""
    response_s: float = 0.0
    """Of a response, on the driver."""


def speeds(plan: Plan, gpu: Gpu, gpus: int, split: bool) -> tuple[Engine, Trainer]:
    """Engine and trainer for the model of `plan` with `gpus` ranks."""
    forward = 2 * plan.parameters
    link = gpu.node_link if gpus <= NODE else gpu.link
    moved = 4 * plan.parameters / link + split * 2 * plan.parameters / link
    offload = 0 if split else 2 * 12 * plan.parameters / gpus / gpu.host_link
    engine = Engine(
        step_s=forward / (gpu.bandwidth * gpu.decode) + gpu.step_s,
        sequence_s=forward / (gpu.flops * gpu.prefill) + gpu.sequence_s,
        token_s=plan.kv_token / (gpu.bandwidth * gpu.decode),
        prefill_s=forward / (gpu.flops * gpu.prefill),
        max_num_seqs=plan.max_num_seqs,
        cache_tokens=plan.generating()["KV cache"] / plan.kv_token,
    )
    trainer = Trainer(
        token_s=4 * forward / (gpu.flops * gpu.train),  # forward twice, backward like two of them
        update_s=0.5,
        # Weights are gathered in bf16 for each pass, gradients are summed in fp32.
        micro_s=8 * plan.parameters / link,
        log_prob_micro_s=2 * plan.parameters / link,
        micro_tokens=plan.tokens,
        log_prob_s=forward / (gpu.flops * gpu.train),
        sync_s=moved,
        other_s=gpu.other_s + offload,
        response_s=gpu.response_s,
    )
    return engine, trainer


def lognormal(
    mean: float, cv: float, n: int, longest: int, shared: float, keep: float, seed: int
) -> Draw:
    """Responses of `mean` tokens with this coefficient of variation, cut at `longest`; `shared`:
    the part of the logarithm's variance that the responses to a prompt have in common; `keep`: how
    probably a group is kept."""
    rng = np.random.default_rng(seed)
    sigma = np.sqrt(np.log1p(cv**2))
    mu = np.log(mean) - sigma**2 / 2

    def draw(count: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        z = np.sqrt(shared) * rng.normal(size=(count, 1))
        z = z + np.sqrt(1 - shared) * rng.normal(size=(count, n))
        lengths = np.exp(mu + sigma * z).round().clip(1, longest)
        return lengths.astype(np.int64), rng.random(count) < keep

    return draw


def empirical(file: Path, n: int, longest: int, keep: float, seed: int) -> Draw:
    """Lengths from a file, one of them for each response."""
    rng, known = np.random.default_rng(seed), np.loadtxt(file).ravel().astype(np.int64)

    def draw(count: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        return rng.choice(known, (count, n)).clip(1, longest), rng.random(count) < keep

    return draw


def make_plan(model: str, *overrides: str, gpus: int = NODE, host: float = math.inf) -> Plan:
    """The memory plan of a run like the published ones: 8,192 tokens, everything offloaded; `host`:
    bytes of a node's memory."""
    rollout, actor = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"
    settings = [
        "data.max_prompt_length=1024",
        "data.max_response_length=8192",
        f"{actor}.use_dynamic_bsz=True",
        f"{actor}.ppo_max_token_len_per_gpu=16384",
        f"{actor}.fsdp_config.param_offload=True",
        f"{actor}.fsdp_config.optimizer_offload=True",
        f"{rollout}.name=vllm",
        f"{rollout}.n=16",
        f"{rollout}.max_num_seqs=256",
        f"{rollout}.gpu_memory_utilization=0.8",
        f"trainer.nnodes={max(1, gpus // NODE)}",
        f"trainer.n_gpus_per_node={min(gpus, NODE)}",
    ]
    config = load_config([*settings, *overrides])
    return Plan(config, QWEN[model] | {"model_type": "qwen2"}, "cuda", MEMORY, host)


@dataclass(frozen=True, slots=True)
class Placement:
    """A way to use the GPUs: `engines` of the 8 of each node for engines alone."""

    name: str
    engines: int
    result: Result
    age: int = 0


def placements(
    plan: Plan, gpu: Gpu, gpus: int, draws: Callable[[], Draw], base: Run, steps: int
) -> Iterator[Placement]:
    """Colocated, and split with the ratio that makes a step shortest: in turns, and ahead. `draws`
    begins anew each time, so that all are given the same lengths."""
    engine, trainer = speeds(plan, gpu, gpus, split=False)
    run = replace(base, engines=gpus, ranks=gpus)
    yield Placement("colocated", NODE, simulate(run, engine, trainer, draws(), steps))
    for ahead in (False, True):
        tried = []
        for k in range(1, NODE):
            engines = gpus * k // NODE
            engine, trainer = speeds(plan, gpu, gpus - engines, split=True)
            run = replace(
                base,
                engines=engines,
                ranks=gpus - engines,
                split=True,
                ahead=ahead,
                carry_over=base.carry_over and not ahead,
            )
            tried.append((k, simulate(run, engine, trainer, draws(), steps)))
        k, best = min(tried, key=lambda pair: pair[1].step_s)
        yield Placement("ahead" if ahead else "split", k, best)


def in_flight(
    plan: Plan, gpu: Gpu, gpus: int, draws: Callable[[], Draw], base: Run, least: int = 10
) -> Iterator[Placement]:
    """The same, colocated and split, with each of `AGES`. A split has the ratio that makes a step
    shortest. The steps are `least`, or a few more: a line of k + 1 batches begins as a whole, so
    that long and short steps alternate."""
    engine, trainer = speeds(plan, gpu, gpus, split=False)
    for age in AGES:
        run = replace(base, engines=gpus, ranks=gpus, age=age)
        steps = -(-least // (age + 1)) * (age + 1)
        result = simulate_in_flight(run, engine, trainer, draws(), steps)
        yield Placement("colocated", NODE, result, age)
    for age in AGES:
        tried, steps = [], -(-least // (age + 1)) * (age + 1)
        for k in range(1, NODE):
            engines = gpus * k // NODE
            engine, trainer = speeds(plan, gpu, gpus - engines, split=True)
            run = replace(base, engines=engines, ranks=gpus - engines, split=True, age=age)
            tried.append((k, simulate_in_flight(run, engine, trainer, draws(), steps)))
        k, best = min(tried, key=lambda pair: pair[1].step_s)
        yield Placement("split", k, best, age)


def scaling(model: str, args: argparse.Namespace, weak: bool) -> list[tuple[int, list[Placement]]]:
    """Every size and placement. `weak`: a prompt per GPU, for more than 128; else 128 prompts."""
    plan, rows = make_plan(model), []
    sizes = SIZES[::3] if args.quick else SIZES
    for gpus in [s for s in sizes if s > 128 or not weak]:
        prompts = max(128, gpus) if weak else 128
        print(f"{model}: {prompts} prompts on {gpus} GPUs", file=sys.stderr)
        base = Run(0, 0, prompts=prompts, mini_batch=prompts // 4)
        gpu, draws = Gpu(response_s=args.response_s), partial(make_draw, args, keep=1.0)
        given = plan, gpu, gpus, draws, base
        rows.append((gpus, [*placements(*given, STEPS), *in_flight(*given)]))
    return rows


def make_draw(args: argparse.Namespace, keep: float) -> Draw:
    """As the command line says; the same numbers at each call."""
    if args.lengths:
        return empirical(args.lengths, 16, 8192, keep, seed=0)
    return lognormal(args.mean, args.cv, 16, 8192, args.shared, keep, seed=0)


def print_scaling(rows: list[tuple[int, list[Placement]]]) -> None:
    """A Markdown table."""
    print("| GPUs | placement | engines of 8 | step, s | generation, s | update, s |", end="")
    print(" idle engines | idle trainer | GPU-s per response |")
    print("|---:|---|---:|---:|---:|---:|---:|---:|---:|")
    for gpus, found in rows:
        found = [p for p in found if not p.age]
        best = min(found, key=lambda p: p.result.step_s)
        for p in found:
            r, mark = p.result, "**" if p is best else ""
            print(
                f"| {gpus:,} | {p.name} | {p.engines if p.name != 'colocated' else 'all'} "
                f"| {mark}{r.step_s:.0f}{mark} | {r.gen_s:.0f} | {r.train_s:.0f} "
                f"| {r.idle_engines:.0%} | {r.idle_trainer:.0%} | {r.cost:.2f} |"
            )


def print_in_flight(rows: list[tuple[int, list[Placement]]]) -> None:
    """A Markdown table. Speed: against colocated, or against ahead, without `max_policy_age`."""
    print(
        "| GPUs | placement | k | engines of 8 | step, s | speed | wait, s | idle engines |", end=""
    )
    print(" idle trainer | GPU-s per response | mean age | of several policies |")
    print("|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for gpus, found in rows:
        before = {p.name: p.result.step_s for p in found if not p.age}
        for p in found:
            r, compared = p.result, before["colocated" if p.name == "colocated" else "ahead"]
            if p.age:
                print(
                    f"| {gpus:,} | {p.name} | {p.age} "
                    f"| {p.engines if p.name != 'colocated' else 'all'} | {r.step_s:.0f} "
                    f"| {compared / r.step_s:.2f} | {r.gen_s:.0f} | {r.idle_engines:.0%} "
                    f"| {r.idle_trainer:.0%} | {r.cost:.2f} | {r.mean_age:.1f} | {r.mixed:.0%} |"
                )


def print_early_stop(args: argparse.Namespace) -> None:
    """What the filter costs, and what stopping it early saves, colocated."""
    print(
        "| GPUs | kept | rule | prompts of a round for each trained on | generation, s | step, s |"
    )
    print("|---:|---:|---|---:|---:|---:|")
    plan = make_plan("7B")
    for gpus, keep in itertools.product((8, 64), (0.3, 0.6, 0.9)):
        engine, trainer = speeds(plan, Gpu(response_s=args.response_s), gpus, split=False)
        for name, carry, stop in (
            ("whole rounds, rest dropped", False, False),
            ("stops early, rest dropped", False, True),
            ("stops early, rest carried over", True, True),
        ):
            draw = make_draw(args, keep)
            run = Run(
                gpus,
                gpus,
                prompts=128,
                mini_batch=32,
                round_size=384,
                carry_over=carry,
                early_stop=stop,
            )
            r = simulate(run, engine, trainer, draw, steps=3 if args.quick else 10)
            print(
                f"| {gpus} | {keep:.0%} | {name} | {r.begun:.2f} | {r.gen_s:.0f} | {r.step_s:.0f} |"
            )


def print_memory(args: argparse.Namespace) -> None:
    """Whether 8,192 tokens fit, on one machine of 4 or 8 GPUs of 80 GB; in GiB."""
    print(
        "| model | GPUs | offload | micro-batch | generate | train | resume | host "
        "| cache holds | verdict |"
    )
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|---|")
    fsdp = "actor_rollout_ref.actor.fsdp_config"
    for model in QWEN:
        for gpus in (4, 8):
            for offload in (False, True):
                keys = [f"{fsdp}.{k}_offload={offload}" for k in ("param", "optimizer")]
                plan = make_plan(model, *keys, gpus=gpus, host=args.host_memory_gb * 1e9)
                phases = {k: sum(v.values()) / 2**30 for k, v in plan.phases().items()}
                cache = plan.generating()["KV cache"] / (plan.kv_token * plan.longest)
                verdict = plan.verdict()
                for long, short in {"actor_rollout_ref.": "", "fsdp_config.": ""}.items():
                    verdict = verdict.replace(long, short)
                print(
                    f"| {model} | {gpus} | {'both' if offload else 'none'} | {plan.tokens} "
                    f"| {phases['generate']:.0f} | {phases['train']:.0f} "
                    f"| {phases['resume']:.0f} "
                    f"| {sum(plan.host().values()) / 2**30:.0f} | {max(0, cache):.0f} | {verdict} |"
                )


def plot(file: Path, strong: dict[str, Any], weak: dict[str, Any]) -> None:
    """Step time and cost of a response over the number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained", sharey="col")
    colours = {("colocated", 0): "C0", ("split", 0): "C1", ("ahead", 0): "C2"}
    shades = dict(zip(AGES, ("C3", "C4", "C5"), strict=True))

    def draw(row: int, model: str, style: str, label: str, *which: tuple[str, int]) -> None:
        """Lines of these placements in one row of the picture."""
        for axis, rows, what in zip(
            axes[row],
            (strong[model], weak[model], strong[model]),
            ("step_s", "step_s", "cost"),
            strict=True,
        ):
            for name, age in which:
                found = [p for _, all_ in rows for p in all_ if (p.name, p.age) == (name, age)]
                values = [getattr(p.result, what) for p in found]
                colour = shades[age] if age else colours[name, age]
                text = f"{name}, k={age}" if age else f"{name}{label}"
                axis.loglog([g for g, _ in rows], values, style, c=colour, label=text)

    for model, style in (("3B", "--"), ("7B", "-")):
        draw(0, model, style, f", {model}", *colours)
    draw(1, "7B", "-", "", ("colocated", 0), *(("colocated", age) for age in AGES))
    draw(1, "7B", ":", "", ("ahead", 0), *(("split", age) for age in AGES))
    axes[0, 0].set_title("step, s: 128 prompts × 16")
    axes[0, 1].set_title("step, s: a prompt × 16 per GPU (≥ 128)")
    axes[0, 2].set_title("GPU-s of a response: 128 prompts × 16")
    axes[1, 0].set_title("the same, 7B, with max_policy_age=k")
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("GPUs (assumed H100)")
    for axis in axes[:, 0]:
        axis.legend(fontsize=7)
    figure.savefig(file, dpi=80)


def print_comparison(rows: list[Comparison]) -> None:
    """Markdown tables: seconds, and ages of what `max_policy_age` trains on."""
    print("| run | predicted, s | measured, s (± standard error) | predicted / measured |")
    print("|---|---:|---:|---:|")
    for r in rows:
        seconds = f"{r.predicted.step_s:.3f} | {r.measured:.3f} ± {r.error:.3f}"
        print(f"| {r.name} | {seconds} | {r.ratio:.3f} |")
    print("\n| run | mean age: predicted | measured | of several policies: predicted | measured |")
    print("|---|---:|---:|---:|---:|")
    for r in rows:
        if r.predicted.max_age:
            mean_age, mixed = r.ages
            print(
                f"| {r.name} | {r.predicted.mean_age:.2f} | {mean_age:.2f} "
                f"| {r.predicted.mixed:.0%} | {mixed:.0%} |"
            )


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="one prediction; with --tables, fewer sizes")
    add(
        "--tables", action="store_true", help="print the tables of docs/scaling.md, measure nothing"
    )
    add("--plot", type=Path, help="with --tables: write the picture there")
    add("--lengths", type=Path, help="file with lengths of responses, in tokens")
    add("--mean", type=float, default=2000, help="mean length of the lognormal distribution [2000]")
    add("--cv", type=float, default=1.0, help="its standard deviation over the mean [1.0]")
    add("--shared", type=float, default=0.5, help="variance that a prompt's responses share [0.5]")
    add("--response-s", type=float, default=3e-4, help="driver's seconds per response [0.0003]")
    add("--host-memory-gb", type=float, default=1000, help="memory of a node's host [1000]")
    args = parser.parse_args()
    for_tables = "plot", "lengths", "mean", "cv", "shared", "response_s", "host_memory_gb"
    idle = [name for name in for_tables if getattr(args, name) != parser.get_default(name)]
    if idle and not args.tables:
        parser.error(f"--{idle[0].replace('_', '-')} goes with --tables")
    if args.tables:
        strong = {model: scaling(model, args, weak=False) for model in ("3B", "7B")}
        small = {model: [row for row in rows if row[0] <= 128] for model, rows in strong.items()}
        weak = {model: small[model] + scaling(model, args, weak=True) for model in ("3B", "7B")}
        for title, rows in (("128 prompts × 16", strong), ("a prompt × 16 per GPU", weak)):
            for model in rows:
                print(f"\n### {model}, {title}\n")
                print_scaling(rows[model])
                print(f"\n### {model}, {title}, max_policy_age=k\n")
                print_in_flight(rows[model])
        print("\n### Dynamic sampling, 7B\n")
        print_early_stop(args)
        print("\n### Memory\n")
        print_memory(args)
        if args.plot:
            plot(args.plot, strong, weak)
        return
    with tempfile.TemporaryDirectory() as folder:
        compared, drift = validate(Path(folder), args.quick)
    print_comparison(compared)
    for row in compared:
        what = f"relative error of the predicted step time, {row.name}"
        report("simulate_cluster", what, abs(row.ratio - 1), "<= 0.15")
    if not math.isnan(drift):
        what = "change of the machine's speed from the last calibration run to its repetition"
        report("simulate_cluster", what, abs(drift - 1), "<= 0.1")


if __name__ == "__main__":
    main()
