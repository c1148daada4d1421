"""Reinforcement learning: `python -m verl.trainer.main_ppo key=value …`."""

import logging
import re
import traceback
from contextlib import ExitStack, suppress
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING

from verl.config.load import entry_point, exit_with
from verl.config.schema import Config

if TYPE_CHECKING:
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

logger = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Trains, and goes on `trainer.max_restarts` times if a worker dies. An error or signal ends it
    with one message and status 2 (input that can't be used), 1 (later), or 128 + N (signal N)."""
    import ray  # heavy imports wait until the configuration is known to be good
    from ray.exceptions import RayActorError

    latest = None
    for left in reversed(range(config.trainer.max_restarts + 1)):
        with ExitStack() as ending:
            ending.callback(ray.shutdown)
            trainer = _trainer(config, latest)
            ending.callback(trainer.close)
            try:
                return _train(trainer)
            except RayActorError as error:
                text, latest = _error(error, trainer.checkpoints.root), trainer.checkpoints.latest
                if error.actor_init_failed:
                    exit_with(2, text)
                if not left or trainer.stop.number:
                    exit_with(1, f"{text}\n{trainer.how_to_resume}")
                action = f"goes on from {latest}" if latest else "starts anew"
                note = "%s. The run %s; trainer.max_restarts: %d left"
                logger.error(note, text, action, left - 1)


def _trainer(config: Config, latest: Path | None) -> "RayPPOTrainer":
    """A trainer whose input is good; nothing is started."""
    from verl.models.folder import check_model
    from verl.models.hf import load_tokenizer, vocabulary_size
    from verl.models.score import check_score_model
    from verl.rollout.engine import engine_class
    from verl.trainer.ppo.loggers import check_packages
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer
    from verl.trainer.ppo.workers import needs_critic

    model = config.actor_rollout_ref.model
    try:
        engine = engine_class(config.actor_rollout_ref.rollout.name)  # its package may be missing
        check_packages(config.trainer.logger)
        length = config.data.max_prompt_length + config.data.max_response_length
        contents = config.actor_rollout_ref.actor.checkpoint.save_contents
        exports = config.trainer.save_hf_model or "hf_model" in contents
        ends = (
            f"actor_rollout_ref.{name}.ulysses_sequence_parallel_size" for name in ("actor", "ref")
        )
        split = dict(zip(ends, config.actor_rollout_ref.splits, strict=True))
        check_model(model, length, exports and not config.trainer.val_only, split)
        engine.check(model)
        if (reward := config.reward_model).enable:
            check_score_model(reward.model.classifier(), reward.max_length or length)
        if needs_critic(config):
            critic, ranks = config.critic, config.critic.ulysses_sequence_parallel_size
            check_score_model(critic.model.classifier(), length, ranks, vocabulary_size(model))
        return RayPPOTrainer(config, load_tokenizer(model), latest)
    except (ValueError, OSError) as error:
        exit_with(2, f"error: {error}")
    except KeyboardInterrupt:
        exit_with(130, "stopped")


def _train(trainer: "RayPPOTrainer") -> None:
    """Starts the workers and trains. Raises: RayActorError if a worker dies."""
    from ray.exceptions import RayActorError, RayError

    from verl.rewards import RewardError

    started = False
    try:
        logger.info("starting Ray, the actor's ranks and the engines")
        trainer.start_workers()
        started = True
        trainer.fit()
    except RayActorError:
        raise
    except (ValueError, OSError, FloatingPointError, RewardError, RayError) as error:
        if not started and not isinstance(error, RayError):
            exit_with(2, f"error: {error}")
        text = _error(error, trainer.checkpoints.root)
        if started and not isinstance(error, FloatingPointError):  # which says itself how to resume
            text += f"\n{trainer.how_to_resume}"
        exit_with(1 if started else 2, text)
    except KeyboardInterrupt:
        trainer.stop.number = trainer.stop.number or SIGINT
    if number := trainer.stop.number:
        exit_with(128 + number, f"stopped; {trainer.how_to_resume}" if started else "stopped")


def _error(error: Exception, folder: Path) -> str:
    """One line about an error, whose traceback goes to `error.log` in the run's folder."""
    from ray.exceptions import RayActorError, RayError, RayTaskError

    details = ""
    with suppress(OSError), (folder / "error.log").open("a") as log:  # the disk may be full
        log.writelines(traceback.format_exception(error))
        details = f" (details: {folder / 'error.log'})"
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    text = str(error)
    if isinstance(error, RayError):  # whose messages are long: tracebacks, or lines of facts
        lines = [x.strip() for x in re.sub(r"\x1b\[\d+m", "", text).splitlines() if x.strip()]
        ends = [i for i, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)]
        text = " ".join(lines[ends[-1] if ends else -1 :]).partition(" Some common causes")[0]
        name = re.search(r"class_name: (\w+)", str(error))
        if name and isinstance(error, RayActorError):
            text = f"a worker died, of class {name[1]}: {text}"
    return f"error: {text or type(error).__name__}{details}"


if __name__ == "__main__":
    entry_point(run, "ppo_trainer")
