"""Supervised warm-up with the actor's workers: `python -m verl.trainer.main_sft key=value …`.

The loss is the mean over the response tokens of a batch, −(1/Σ_j L_j) Σ_i Σ_t log π(a_it): the
aggregation `token-mean` of `−log π`.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from verl.trainer.config import entry_point
from verl.trainer.config.sft_schema import SFTConfig

LOG_LINES = 100
"""Lines of metrics of a whole run; each is the mean of the steps since the one before."""


def train(config: SFTConfig, tokenizer: Any) -> Path:
    """Trains on the rows of `data.train_files`; returns the folder of the model.

    Raises: ValueError or FileNotFoundError for data that can't be used, before Ray starts.
    """
    from verl.data.dataset import PromptOrder, load_sft_rows
    from verl.protocol import fill, response_lengths
    from verl.trainer.ppo.core_algos import response_weights
    from verl.trainer.ppo.guard import SkippedSteps
    from verl.trainer.ppo.metrics import reduce_update_metrics
    from verl.utils.seqlen_balancing import balanced_partitions
    from verl.utils.timer import Timer
    from verl.utils.tracking import Tracking
    from verl.workers.actor import ActorWorker, LossConfig, MicroBatchLimit
    from verl.workers.group import WorkerGroup, place, start_ray

    data, trainer = config.data, config.trainer
    rows = load_sft_rows(data, tokenizer)
    order = PromptOrder(len(rows), data.train_batch_size, data.seed, data.shuffle)
    total = trainer.total_training_steps or trainer.total_epochs * order.steps_per_epoch
    ranks = trainer.nnodes * trainer.n_gpus_per_node
    limit = MicroBatchLimit(data.micro_batch_size_per_gpu, data.max_token_len_per_gpu)
    root = Path(trainer.default_local_dir).expanduser().absolute()

    start_ray(ranks, config.ray_init.num_cpus)
    slots = place(trainer.nnodes, trainer.n_gpus_per_node, trainer.device)
    actor = WorkerGroup(ActorWorker, slots, trainer.device, [(trainer.device,)] * ranks)
    actor.connect()
    actor.call("build", config.model, config.fsdp_config, config.optim, total)
    every = max(1, total // LOG_LINES)
    skipped = SkippedSteps(trainer.max_skipped_steps)
    history: list[dict[str, float]] = []
    timer = Timer()
    with Tracking(trainer, root, total, asdict(config)) as tracking:
        for step in range(1, total + 1):
            batch = [rows[i] for i in order.next_batch()]
            lengths = response_lengths(batch)
            weights = response_weights(lengths, "token-mean", data.max_length)
            fill(batch, "weight", weights.tolist())
            shares = balanced_partitions([s.num_tokens for s in batch], ranks)
            arguments = [
                ([[batch[i] for i in share]], LossConfig("nll"), limit, config.grad_clip)
                for share in shares
            ]
            with timer("step"):
                by_rank = actor.scatter("update", arguments)
            update = skipped.count(by_rank, [batch], root / f"skipped_step_{step}.parquet")
            update |= reduce_update_metrics(by_rank)
            history.append(update)
            if step % every == 0 or step == total:
                means = {name: float(np.mean([h[name] for h in history])) for name in update}
                seconds = timer.seconds.pop("step")
                means["train/loss"] = means.pop("actor/nll_loss")
                means["perf/time_per_step"] = seconds / len(history)
                tracking.log(means, step)
                history.clear()
    folder = root / "huggingface"
    actor.call("save_hf", str(folder), tokenizer)
    return folder


def run(config: SFTConfig) -> None:
    """Trains as `config` says. Input that can't be used ends the process with status 2."""
    import ray

    from verl.models.hf import check_model, load_tokenizer

    try:
        check_model(config.model, config.data.max_length)
        tokenizer = load_tokenizer(config.model, config.data.tokenizer)
        folder = train(config, tokenizer)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; the warm-up starts anew the next time", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        ray.shutdown()
    print(f"the model is in {folder}")


if __name__ == "__main__":
    entry_point(run, "sft_trainer")
