"""The tables of docs/gpu.md, from the memory estimate and the simulator: nothing of it is measured.

    .venv/bin/python benchmarks/gpu_page.py

* which cards hold experiments like the published ones, with what `verl.tools.gpu_settings` chooses
* what a step of those takes, on 4 and 8 assumed H100s (`simulate_cluster.Gpu`)
"""

import itertools
import json
import logging
import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from cluster import Run, simulate
from simulate_cluster import QWEN, Gpu, lognormal, speeds

from verl.config.load import load_config
from verl.config.schema import Config
from verl.tools.gpu_settings import OFFLOADING, gpu_settings
from verl.tools.memory_plan import GIB, Plan, usable

CARDS = {24: "RTX 4090", 48: "L40S", 80: "A100, H100", 141: "H200"}
N = 10  # responses to a prompt
EAGER_S, GRAPHS_S = 3e-3, 1e-3
"""Seconds of a decoding step beside its work, without and with CUDA graphs: guesses."""
PUBLISHED = [
    "data.max_prompt_length=1024",
    "data.max_response_length=8192",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    *(f"{key}=True" for key in OFFLOADING),
    "actor_rollout_ref.rollout.name=vllm",
    f"actor_rollout_ref.rollout.n={N}",
    "actor_rollout_ref.rollout.gpu_memory_utilization=0.8",
    "actor_rollout_ref.rollout.enable_chunked_prefill=False",
    "actor_rollout_ref.rollout.max_num_batched_tokens=9216",
]


def make(model: str, gpus: int, gigabytes: int, fast: bool, *overrides: str) -> tuple[Config, Plan]:
    """The configuration of a math experiment and its memory plan; `fast`: as the scripts have it,
    else as published."""
    os.environ["GPU_GB"] = str(gigabytes)
    shapes = QWEN[model] | {"model_type": "qwen2"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shapes))
        own = [f"actor_rollout_ref.model.path={folder}", f"trainer.n_gpus_per_node={gpus}"]
        given = [*PUBLISHED, *own, *overrides]
        config = load_config(given)
        if fast:
            found = gpu_settings(config, set())
            config = load_config([*given, *(f"{key}={value}" for key, value in found.items())])
    return config, Plan(config, shapes, "cuda", usable(gigabytes), math.inf)


def print_cards() -> None:
    """What fits: offloaded, tokens of a pass, responses of full length in a KV cache, host GiB."""
    print("| model | GPUs |", *(f"{size} GB ({card}) |" for size, card in CARDS.items()))
    print("|---|---:|" + "---|" * len(CARDS))
    for model, gpus in itertools.product(("3B", "7B"), (1, 2, 4, 8)):
        cells = []
        for size in CARDS:
            config, plan = make(model, gpus, size, True)
            fsdp = config.actor_rollout_ref.actor.fsdp_config
            offloaded = fsdp.param_offload + fsdp.optimizer_offload
            away = ("none", "optimizer", "both")[offloaded]
            cache = plan.generating()["KV cache"] / (plan.kv_token * plan.longest)
            host = sum(plan.host().values()) / GIB
            text = f"{away}; {plan.tokens // 1024}k; {cache:.0f}; {host:.0f}"
            cells.append(text if plan.fits() else "no")
        print(f"| {model} | {gpus} |", " | ".join(cells), "|")


def print_steps() -> None:
    """Seconds of a step of 128 prompts × 10 responses."""
    print("| model | GPUs | mean length | settings | generation, s | update, s | step, s |")
    print("|---|---:|---:|---|---:|---:|---:|")
    for model, gpus, mean in itertools.product(("3B", "7B"), (4, 8), (500, 2000)):
        for fast in (False, True):
            _, plan = make(model, gpus, 80, fast)
            gpu = Gpu(response_s=3e-4, step_s=GRAPHS_S if fast else EAGER_S)
            engine, trainer = speeds(plan, gpu, gpus, split=False)
            if fast:  # nothing goes to the host
                trainer = replace(trainer, other_s=gpu.other_s)
            draw = lognormal(mean, 1.0, N, 8192, 0.5, 1.0, seed=0)
            run = Run(gpus, gpus, prompts=128, mini_batch=32)
            r = simulate(run, engine, trainer, draw, 4)
            name = "the scripts'" if fast else "published"
            print(
                f"| {model} | {gpus} | {mean:,} | {name} | {r.gen_s:.0f} | {r.train_s:.0f} "
                f"| {r.step_s:.0f} |"
            )


if __name__ == "__main__":
    logging.disable()  # of keys that have no effect
    print_cards()
    print()
    print_steps()
