"""TRL's part of `vs_trl.py`, in TRL's environment: trains, and prints a line of JSON per step.

.venv-trl/bin/python benchmarks/trl_run.py FOLDER STEPS MAX_TOKENS MICRO_BATCH
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from vs_trl import LR, PHASES, PROMPTS, REWARD, N


class Phases(TrainerCallback):
    """Charges each moment of a step to one phase, so that the phases add up to the step."""

    def __init__(self) -> None:
        self.phase, self.since = "rest", time.perf_counter()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.lengths: list[int] = []

    def enter(self, phase: str) -> None:
        """Ends the present phase."""
        now = time.perf_counter()
        self.seconds[self.phase] += now - self.since
        self.phase, self.since = phase, now

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` as a phase of its own. Log-probabilities in an update are part of it: only
        those of the policy before the update are counted as such."""

        def call(*args: Any, **kwargs: Any) -> Any:
            outer = self.phase
            self.enter(outer if (outer, phase) == ("update", "log-probs") else phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.enter(outer)

        return call

    def attach(self, trainer: GRPOTrainer) -> None:
        """Puts the clock around the trainer's methods. `training_step` calls `_prepare_inputs`,
        and that the other two."""
        for phase, method in (
            ("update", "training_step"),
            ("rest", "_prepare_inputs"),
            ("gen", "_generate"),
            ("log-probs", "_get_per_token_logps_and_entropies"),
        ):
            setattr(trainer, method, self.timed(phase, getattr(trainer, method)))

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The first step begins."""
        self.since = time.perf_counter()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """The optimizer belongs to the update, as with ours."""
        self.enter("update")

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Its end."""
        self.enter("rest")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Prints the step and begins the next one."""
        self.enter("rest")
        line = self.seconds | {
            "step": sum(self.seconds.values()),
            "responses": len(self.lengths),
            "length": float(np.mean(self.lengths)),
            "cv": float(np.std(self.lengths) / np.mean(self.lengths)),
        }
        print("step", json.dumps(line), flush=True)
        self.lengths.clear()
        self.seconds = dict.fromkeys(PHASES, 0.0)


def settings(folder: Path, steps: int, max_tokens: int, micro_batch: int) -> GRPOConfig:
    """Those that make TRL's step the same as ours: one generation and one update of all responses,
    on the CPU, in fp32."""
    return GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=PROMPTS * N // micro_batch,
        num_generations=N,
        max_completion_length=max_tokens,
        max_steps=steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        beta=0.0,
        temperature=1.0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )


def main() -> None:
    """The command line."""
    folder, numbers = Path(sys.argv[1]), map(int, sys.argv[2:])
    scope: dict[str, Any] = {}
    exec(REWARD, scope)
    phases = Phases()

    def reward(prompts: Any, completions: Any, completion_ids: Any, **_: Any) -> list[float]:
        phases.lengths.extend(map(len, completion_ids))
        return [scope["reward"]("", text, "") for text in completions]

    prompts = json.loads((folder / "prompts.json").read_text())
    trainer = GRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": text} for text in prompts]),
        callbacks=[phases],
        args=settings(folder, *numbers),
    )
    phases.attach(trainer)
    trainer.train()


if __name__ == "__main__":
    main()
