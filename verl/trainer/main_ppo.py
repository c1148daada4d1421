"""Reinforcement learning: `python -m verl.trainer.main_ppo key=value …`."""

from __future__ import annotations

import sys
from pathlib import Path

from verl.trainer.config import entry_point
from verl.trainer.config.schema import Config


def run(config: Config) -> None:
    """Trains as `config` says.

    Input that can't be used ends the process with status 2 and one message.
    """
    # Heavy imports wait until the configuration is known to be good.
    import ray
    from transformers import AutoTokenizer

    from verl.models.hf import check_model
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer
    from verl.workers.rollout.base import engine_class

    model = config.actor_rollout_ref.model
    try:
        try:
            engine_class(config.actor_rollout_ref.rollout.name)
            check_model(model, config.data.max_prompt_length + config.data.max_response_length)
            tokenizer = AutoTokenizer.from_pretrained(
                str(Path(config.data.tokenizer or model.path).expanduser()),
                trust_remote_code=model.trust_remote_code,
            )
            trainer = RayPPOTrainer(config, tokenizer)
            trainer.start_workers()
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        trainer.fit()
    except KeyboardInterrupt:
        print(
            "stopped; the same command goes on from the latest checkpoint, if there is one",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    finally:
        ray.shutdown()


if __name__ == "__main__":
    entry_point(run, "ppo_trainer")
