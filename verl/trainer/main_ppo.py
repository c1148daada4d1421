"""Reinforcement learning: `python -m verl.trainer.main_ppo key=value …`."""

from __future__ import annotations

import sys
from contextlib import ExitStack, closing
from typing import NoReturn

from verl.trainer.config import entry_point
from verl.trainer.config.schema import Config

RESUME = "the same command goes on from the latest checkpoint (trainer.resume_mode=auto), if any"


def run(config: Config) -> None:
    """Trains as `config` says.

    Input that can't be used ends the process with status 2 and one message.
    """
    # Heavy imports wait until the configuration is known to be good.
    import ray

    from verl.models.hf import check_model, load_tokenizer
    from verl.rewards.errors import RewardError, RewardServerError
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer
    from verl.workers.rollout.base import engine_class

    model = config.actor_rollout_ref.model
    with ExitStack() as ending:
        ending.callback(ray.shutdown)
        try:
            engine_class(config.actor_rollout_ref.rollout.name)
            check_model(model, config.data.max_prompt_length + config.data.max_response_length)
            tokenizer = load_tokenizer(model, config.data.tokenizer)
            trainer = ending.enter_context(closing(RayPPOTrainer(config, tokenizer)))
            trainer.start_workers()
        except (ValueError, OSError, RewardError) as error:
            _stop(2, f"error: {error}")
        except KeyboardInterrupt:
            _stop(130, "stopped")
        try:
            trainer.fit()
        except RewardServerError as error:
            _stop(1, f"error: {error}\n{RESUME}")
        except KeyboardInterrupt:
            _stop(130, f"stopped; {RESUME}")


def _stop(status: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(status) from None


if __name__ == "__main__":
    entry_point(run, "ppo_trainer")
