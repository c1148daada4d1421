"""What computing a prompt once for its responses saves: `accumulate_gradient` and `log_probs` of
packed rows with and without it, in alternating runs.

    .venv/bin/python benchmarks/shared_prompt.py [--quick]

Prompts of 64, 256 and 1,024 tokens with 8 responses of 64 or 1,024, all in one micro-batch.
Ratios of CPU time: medians of those of neighbouring runs. The model: 2 of SmolLM2-135M's 30 layers
with a tenth of its words, random weights.
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from common import report
from policies import save_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig
from update import SMOLLM2_135M, make_policy

from verl.algorithms.losses import LossConfig
from verl.models.policy import MicroBatchLimit, PolicyWorker
from verl.protocol import OptimizerStep, Prompt, Sample

N = 8
SIZES = [(p, r) for r in (64, 1024) for p in (64, 256, 1024)]
SMALL = dict(num_hidden_layers=2, vocab_size=4915)  # a tenth of SmolLM2's


def make_step(prompt: int, response: int, words: int, groups: int) -> OptimizerStep:
    """Random tokens: `groups` prompts with `N` responses each."""
    rng = np.random.default_rng(0)
    samples = []
    for group in range(groups):
        shared = Prompt(group, rng.integers(0, words, prompt), "random", {})
        for _ in range(N):
            sample = Sample(shared, group, rng.integers(0, words, response), "stop")
            sample.old_log_probs = rng.normal(-8.5, 0.1, response).astype(np.float32)
            sample.advantage = rng.normal()
            samples.append(sample)
    weights = np.full(len(samples), 1 / response / len(samples), np.float32)
    return OptimizerStep(samples, weights)


def seconds(policy: PolicyWorker, step: OptimizerStep, update: bool, share: bool) -> float:
    """Of one pass over all samples in one micro-batch."""
    policy.shares = share
    pack, policy.pack = policy.pack, partial(policy.pack, share=share)
    limit = MicroBatchLimit(len(step.samples))
    start = time.process_time()  # which other programs change less
    if update:
        policy.accumulate_gradient(step, LossConfig(), limit)
    else:
        policy.log_probs(step.samples, 1.0, limit)
    policy.pack = pack
    return time.process_time() - start


def compare(policy: PolicyWorker, prompt: int, response: int, repeats: int) -> None:
    """Prints the rows of the table."""
    words = policy.model.lm.config.vocab_size
    step = make_step(prompt, response, words, max(1, 2048 // N // (prompt + response)))
    cells = [
        f"{prompt:,}",
        f"{response:,}",
        f"{(prompt + response) * N / (prompt + response * N):.2f}",
    ]
    for update in (True, False):
        ratios = []
        for i in range(repeats + 1):
            plain, shared = (seconds(policy, step, update, share) for share in (False, True))
            ratios += [plain / shared] if i else []
        middle = statistics.median(ratios)
        cells.append(f"{middle:.2f} ({min(ratios):.2f}–{max(ratios):.2f})")
        if update:
            what = f"update, plain / shared prompt of {prompt}, responses of {response}"
            report("shared_prompt", what, middle, ">= 1")
    print("|", " | ".join(cells), "|", flush=True)


def main() -> None:
    """The comparison on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="responses of 64 tokens alone")
    parser.add_argument("--repeats", type=int, default=5, help="alternating timed runs")
    args = parser.parse_args()
    config = SMOLLM2_135M | SMALL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(LlamaConfig(**config)).save_pretrained(folder)
        save_tokenizer(folder, config["vocab_size"])
        dist.init_process_group("gloo", init_method=f"file://{name}/group", rank=0, world_size=1)
        policy = make_policy(folder)
    print("| prompt | response | tokens, plain / shared | update, plain / shared | log-probs |")
    print("|---:|---:|---:|---:|---:|")
    for prompt, response in SIZES:
        if response == 64 or not args.quick:
            compare(policy, prompt, response, args.repeats)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
