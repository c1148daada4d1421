"""The memory estimate of DRY_RUN=1 against what torch allocates.

`.venv/bin/python benchmarks/memory_model.py`: one rank on the CPU, a random Qwen3 with 92 million
parameters (`--quick`: 7 million), one update with and one without gradient checkpointing.
Parameters, gradients and optimizer states must agree to the byte; the peak of everything else is
compared with torch's profiler.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from common import report, report_limit
from policies import save_tokenizer

from verl.algorithms.losses import LossConfig
from verl.config.load import load_config
from verl.config.schema import FSDPConfig, ModelConfig, OptimConfig
from verl.models.policy import MicroBatchLimit, PolicyWorker
from verl.protocol import OptimizerStep, Prompt, Sample
from verl.tools.memory_plan import Plan

RESPONSE, PROMPT = 448, 64


def make_model(folder: Path, **sizes: int) -> dict[str, Any]:
    """Saves a random model; returns its config.json."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(head_dim=64, tie_word_embeddings=True, **sizes)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, config.vocab_size)
    return json.loads((folder / "config.json").read_text())


def peak_bytes(run: Any) -> int:
    """Most bytes that torch has allocated at a time during `run()`, above those before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return int(np.cumsum([size for _, size in sorted(sizes)]).max())


def local_bytes(tensors: Any) -> int:
    """Of this rank's shards."""
    return sum(t.to_local().nbytes for t in tensors)


def measure(folder: Path, checkpointing: bool, responses: int) -> dict[str, int]:
    """Bytes that a rank holds after an update, and the peak of an update beside them."""
    model = ModelConfig(path=str(folder), enable_gradient_checkpointing=checkpointing)
    policy = PolicyWorker("cpu")
    policy.build(model, FSDPConfig(), OptimConfig(), total_steps=1)
    rng = np.random.default_rng(0)
    samples = []
    for i in range(
        2 * responses
    ):  # two micro-batches: the second one meets the first one's gradient
        prompt = Prompt(i, rng.integers(3, 100, PROMPT), "countdown", {})
        sample = Sample(prompt, i, rng.integers(3, 100, RESPONSE), "length")
        sample.advantage = 1.0
        samples.append(sample)
    weights = np.full(len(samples), 1 / (len(samples) * RESPONSE), np.float32)
    step = OptimizerStep(samples, weights)
    limit = MicroBatchLimit(size=responses)
    policy.update([step], LossConfig(), limit, 1.0)
    peak = peak_bytes(lambda: policy.accumulate_gradient(step, LossConfig(), limit))
    parameters = list(policy.model.parameters())
    moments = [
        state[k] for state in policy.optimizers[0].state.values() for k in ("exp_avg", "exp_avg_sq")
    ]
    return {
        "parameters": local_bytes(parameters),
        "gradients": local_bytes(p.grad for p in parameters),
        "optimizer": local_bytes(moments),
        "peak": peak,
    }


def main() -> None:
    """Prints a table and the lines with targets."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a model of 7 million parameters")
    quick = parser.parse_args().quick
    sizes = dict(
        vocab_size=8192 if quick else 32768,
        hidden_size=256 if quick else 640,
        intermediate_size=768 if quick else 2560,
        num_hidden_layers=6 if quick else 12,
        num_attention_heads=4 if quick else 10,
        num_key_value_heads=2,
    )
    responses = 4
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config_json = make_model(folder, **sizes)
        dist.init_process_group("gloo", init_method=f"file://{name}/group", rank=0, world_size=1)
        print("| checkpointing | what | predicted, MB | measured, MB |\n|---|---|---|---|")
        for checkpointing in (True, False):
            print(f"checkpointing={checkpointing}", file=sys.stderr)
            config = load_config(
                [
                    f"data.max_prompt_length={PROMPT}",
                    f"data.max_response_length={RESPONSE}",
                    f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={responses}",
                    f"actor_rollout_ref.model.enable_gradient_checkpointing={checkpointing}",
                    "actor_rollout_ref.rollout.n=2",
                    "trainer.n_gpus_per_node=1",
                    "trainer.device=cpu",
                ]
            )
            plan = Plan(config, config_json, "cpu", 2.0**34)
            parts = plan.training()
            measured = measure(folder, checkpointing, responses)
            # The profiler sees what an update allocates: gradients, gathered weights, activations.
            predicted = {k: parts[k] for k in ("parameters", "gradients", "optimizer")}
            predicted["peak"] = parts["gradients"] + parts["gathered"] + parts["activations"]
            for what, size in predicted.items():
                print(
                    f"| {checkpointing} | {what} | {size / 1e6:.1f} | {measured[what] / 1e6:.1f} |"
                )
            exact = max(abs(predicted[k] - measured[k]) for k in predicted if k != "peak")
            where = f"gradient checkpointing {'on' if checkpointing else 'off'}"
            name = f"bytes of parameters, gradients, optimizer, difference, {where}"
            report_limit("memory_model", name, exact, "<= 0")
            ratio = predicted["peak"] / measured["peak"]
            name = f"peak of an update, larger over smaller of predicted and measured, {where}"
            report("memory_model", name, max(ratio, 1 / ratio), "<= 1.25")
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
