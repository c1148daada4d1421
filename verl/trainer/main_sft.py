"""Supervised warm-up, token-mean of −log π: `python -m verl.trainer.main_sft key=value …`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from verl.config.base import SFTConfig
from verl.config.load import entry_point, exit_with
from verl.utils.signals import StopSignals

LOG_LINES = 100  # of metrics, in a whole run; each is the mean of the steps since the one before


def train(config: SFTConfig, tokenizer: Any, signals: StopSignals) -> Path:
    """Returns the model's folder. Raises: ValueError or OSError for data, before Ray starts."""
    from verl.algorithms.losses import LossConfig
    from verl.algorithms.weights import response_weights
    from verl.cluster import WorkerGroup, reserve_devices, start_ray
    from verl.data.dataset import PromptOrder, load_sft_rows
    from verl.models.hf import num_embeddings
    from verl.models.policy import MicroBatchLimit, PolicyWorker
    from verl.protocol import OptimizerStep, response_lengths
    from verl.trainer.ppo.checks import count_skipped
    from verl.trainer.ppo.metrics import update_metrics
    from verl.trainer.ppo.tracking import Tracking
    from verl.utils.device import cluster_device
    from verl.utils.seqlen_balancing import balanced_partitions
    from verl.utils.timer import Timer

    data, trainer = config.data, config.trainer
    rows = load_sft_rows(data, tokenizer, num_embeddings(config.model))
    order = PromptOrder(len(rows), data.train_batch_size, data.seed, data.shuffle)
    total = trainer.total_training_steps or trainer.total_epochs * order.steps_per_epoch
    ranks = trainer.nnodes * trainer.n_gpus_per_node
    limit = MicroBatchLimit(data.micro_batch_size_per_gpu, data.max_token_len_per_gpu)
    settings = LossConfig("nll"), limit, config.grad_clip
    root = Path(trainer.default_local_dir).expanduser().absolute()

    start_ray(ranks, **asdict(config.ray_init))
    signals.install()  # Ray takes SIGTERM
    device = cluster_device(trainer.device)
    slots = reserve_devices(trainer.nnodes, trainer.n_gpus_per_node, device)
    actor = WorkerGroup(PolicyWorker, slots, device, [(device,)] * ranks)
    actor.connect()
    actor.call("build", config.model, config.fsdp_config, config.optim, total)
    every, skipped_in_a_row, timer = max(1, total // LOG_LINES), 0, Timer()
    history: list[dict[str, float]] = []
    with Tracking(config, root, "", total, 0, tokenizer) as tracking:
        for step in range(1, total + 1):
            batch = [rows[i] for i in order.next_batch()]
            weights = response_weights(response_lengths(batch), "token-mean", data.max_length)
            whole = OptimizerStep(batch, weights.numpy())
            shares = balanced_partitions([s.num_tokens for s in batch], ranks)
            parts = [whole.share(share) for share in shares]
            with timer("step"):
                by_rank = actor.scatter("update", [([part], *settings) for part in parts])
            dump = root / f"skipped_step_{step}.parquet"
            skipped_in_a_row = count_skipped(
                by_rank, skipped_in_a_row, trainer.max_skipped_steps, [whole], dump
            )
            history.append(update_metrics(by_rank))
            if step % every == 0 or step == total:
                means = {name: float(np.mean([h[name] for h in history])) for name in history[-1]}
                means["train/loss"] = means.pop("actor/nll_loss")
                means["perf/time_per_step"] = timer.seconds.pop("step") / len(history)
                tracking.log(means, step)
                history.clear()
    folder = root / "huggingface"
    actor.call("save_hf", folder, trainer.hf_model_dtype)
    return folder


def run(config: SFTConfig) -> None:
    """Trains as `config` says. Ends with status 2 for bad input, 128 + N on signal N."""
    import ray

    from verl.models.folder import check_model
    from verl.models.hf import load_tokenizer
    from verl.trainer.ppo.loggers import check_packages

    signals = StopSignals()
    try:
        check_packages(config.trainer.logger)
        check_model(config.model, config.data.max_length, export=True)
        folder = train(config, load_tokenizer(config.model), signals)
    except (ValueError, OSError, FloatingPointError) as error:
        exit_with(2, f"error: {error}")
    except KeyboardInterrupt:
        exit_with(128 + (signals.number or 2), "stopped; the warm-up starts anew the next time")
    finally:
        ray.shutdown()
        signals.restore()
    print(f"the model is in {folder}")


if __name__ == "__main__":
    entry_point(run, "sft_trainer")
