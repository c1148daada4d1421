"""Runs `DeltaLGRPOTrainer` in TRL's environment, and records what its optimizer steps saw and did.

    python trl_job.py MODEL CASES OUT

CASES is a JSON object: name → options of `GRPOConfig`, and `alpha`, `tools` (some tokens aren't the
policy's), `vllm` (log-probabilities of an engine). OUT gets `NAME-RANK.pt` for each process: a list
with a dict for each optimizer step.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig

from delta_l.trl import DeltaLGRPOTrainer

M = 24
KEPT = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask", "index")
KEPT += ("rollout", "old_per_token_logps", "sampling_per_token_logps", "ref_per_token_logps")


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Something that differs within a group."""
    return [float(sum(ids) % 7) + len(ids) / 10 for ids in completion_ids]


def drawn(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions that aren't the policy's, as of an agent with tools: lengths from 1 to M, half of
    them without an end."""
    draw = random.Random(1000 * trainer.state.global_step + trainer.accelerator.process_index)
    sizes = [draw.randint(1, M) for _ in prompts]
    ids = [[draw.randrange(3, 20) for _ in range(n)] for n in sizes]
    ids = [[*x[:-1], 0] if draw.random() < 0.5 else x for x in ids]
    output = {"prompt_ids": trainer.processing_class(prompts)["input_ids"], "completion_ids": ids}
    output["logprobs"] = [[draw.uniform(-5.0, -1.0) for _ in x] for x in ids]
    if trainer.case["tools"]:
        output["env_mask"] = [[int(draw.random() < 0.7) for _ in x] for x in ids]
    return output


class Recorder(DeltaLGRPOTrainer):
    """Keeps the rewards and lengths of each generation batch, and the inputs of each loss."""

    rollouts: list[dict[str, torch.Tensor]]

    def _generate(self, prompts: list[str]) -> Any:
        self.use_vllm = False  # there is none to be given weights
        output = super()._generate(prompts)
        self.use_vllm = self.case["vllm"]
        return output

    def _calculate_rewards(self, *args: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(*args)
        self.rollouts.append({"rewards": rewards.sum(1)})
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        mask, n = batch["completion_mask"] * batch.get("tool_mask", 1), len(inputs)
        self.rollouts[-1]["lengths"] = self.accelerator.gather(mask.sum(-1))
        batch["index"] = torch.arange(n) + n * self.accelerator.process_index
        batch["rollout"] = torch.full((n,), len(self.rollouts) - 1)
        return batch

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        loss = super()._compute_loss(model, inputs)
        self.micro_batches.append({k: v for k, v in inputs.items() if k in KEPT})
        self.loss += loss.item()
        return loss


class Steps(TrainerCallback):
    """Gradient and weights just before each optimizer step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.records: list[dict[str, Any]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        record = {"micro_batches": self.trainer.micro_batches, "rollouts": self.trainer.rollouts}
        record["loss"] = self.trainer.accelerator.reduce(torch.tensor(self.trainer.loss), "mean")
        if self.trainer.accelerator.is_main_process:
            named = dict(model.named_parameters())
            record["weights"] = {name: p.detach().clone() for name, p in named.items()}
            record["gradient"] = {name: p.grad.clone() for name, p in named.items()}
        self.records.append(record)
        self.trainer.micro_batches, self.trainer.loss = [], 0.0


def run(model: str, name: str, case: dict[str, Any], out: Path) -> None:
    """Trains a few steps."""
    special = {key: case.pop(key, default) for key, default in (("tools", False), ("vllm", False))}
    alpha = case.pop("alpha")
    options = dict(num_generations=4, max_steps=2, learning_rate=1e-3, max_grad_norm=0.0, beta=0.0)
    options |= dict(scale_rewards="none", max_completion_length=M, use_cpu=True, bf16=False)
    options |= dict(report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, seed=1)
    options |= dict(gradient_checkpointing=False, lr_scheduler_type="constant")
    steps = Steps()
    trainer = Recorder(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(model),
        reward_funcs=reward,
        args=GRPOConfig(output_dir=str(out / "trl"), **(options | case)),
        train_dataset=Dataset.from_list([{"prompt": f"{i} 5 " + "7 " * (i % 3)} for i in range(9)]),
        callbacks=[steps],
        rollout_func=drawn if any(special.values()) else None,
        alpha=alpha,
    )
    trainer.case, trainer.use_vllm, steps.trainer = special, special["vllm"], trainer
    trainer.rollouts, trainer.micro_batches, trainer.loss = [], [], 0.0
    trainer.train()
    trainer.evaluate(Dataset.from_list([{"prompt": "3 4"}] * 4))
    torch.save(steps.records, out / f"{name}-{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, case in json.loads(Path(sys.argv[2]).read_text()).items():
        run(sys.argv[1], name, case, Path(sys.argv[3]))
