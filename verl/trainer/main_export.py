"""A checkpoint → a folder in Hugging Face format: `python -m verl.trainer.main_export CHECKPOINT`.
Needs no GPU, and memory for at least two copies of the parameters in float32. A checkpoint of LoRA
becomes PEFT's folder of an adapter; with --merge the merged model."""

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl.config.load import exit_with
from verl.config.schema import Config
from verl.models.policy import PolicyWorker
from verl.trainer.ppo.checkpoint import damage, find_latest, read_state


def export(checkpoint: Path, folder: Path, merge: bool = False) -> None:
    """Writes the policy of `checkpoint`, `…/global_step_N`, with its tokenizer (`merge`: as with
    `model.lora.merge`). Raises: ValueError or OSError if that isn't whole, its first model is gone,
    or `folder` can't be written."""
    if problem := damage(checkpoint):
        raise ValueError(f"{checkpoint} is no whole checkpoint: {problem}")
    # Keys that the checkpoint doesn't have yet get their defaults.
    saved = read_state(checkpoint)["config"]
    try:
        config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), saved))
    except OmegaConfBaseException as error:
        raise ValueError(f"{checkpoint} was written by another version: {error}") from None
    model = config.actor_rollout_ref
    model.model.lora.merge |= merge
    model.actor.fsdp_config.fsdp_size = -1  # here is one rank
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        policy = PolicyWorker("cpu")
        policy.build(model.model, model.actor.fsdp_config)
        policy.load(str(checkpoint / "actor"))
        policy.save_hf(folder, config.trainer.hf_model_dtype)
    finally:
        dist.destroy_process_group()


def find_checkpoint(path: Path) -> Path:
    """`path`, if it is a checkpoint; of a run's folder the latest one. Raises: ValueError."""
    found = path if path.name.startswith("global_step_") else find_latest(path)
    if found is None:
        remedy = "name a run's folder (trainer.default_local_dir) or one of its global_step_N"
        raise ValueError(f"{path} holds no checkpoint: {remedy}")
    return found


def main() -> None:
    """Parses the command line. What can't be exported ends the process with one line, status 2."""
    parser = argparse.ArgumentParser("python -m verl.trainer.main_export", description=__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="global_step_N, or a run: its latest")
    add("-o", "--output", type=Path, help="folder [huggingface, in the run's]")
    add("--merge", action="store_true", help="of LoRA, write the merged model and the adapter")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # torch's own, about a process group of one rank
    try:
        checkpoint = find_checkpoint(args.checkpoint.expanduser().absolute())
        folder = args.output or checkpoint.parent / "huggingface"
        export(checkpoint, folder, args.merge)
    except (ValueError, OSError) as error:
        exit_with(2, f"error: {error}")
    print(f"the model of {checkpoint.name} is in {folder}")


if __name__ == "__main__":
    main()
