"""Reinforcement learning: `python -m verl.trainer.main_ppo key=value …`."""

from __future__ import annotations

import logging
import re
import sys
import traceback
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from verl.trainer.config import entry_point
from verl.trainer.config.schema import Config

if TYPE_CHECKING:
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

logger = logging.getLogger(__name__)

RESUME = "the same command goes on from the latest checkpoint (trainer.resume_mode=auto), if any"


def run(config: Config) -> None:
    """Trains as `config` says; again from the latest checkpoint, `trainer.max_restarts` times, if a
    worker dies.

    Ends the process with one message, and with status 2 for input that can't be used, 1 for what
    went wrong later, 128 + N after signal N.
    """
    import ray  # heavy imports wait until the configuration is known to be good
    from ray.exceptions import RayActorError

    latest = None
    for left in reversed(range(config.trainer.max_restarts + 1)):
        with ExitStack() as ending:
            ending.callback(ray.shutdown)
            trainer = _start(config, latest, ending)
            try:
                return _fit(trainer)
            except RayActorError as error:
                latest = trainer.latest
                if not left:
                    _stop(1, f"{_error(error, trainer.checkpoints.root)}\n{RESUME}")
                source = f"goes on from {latest}" if latest else "starts anew"
                text = "%s. The run %s (trainer.max_restarts: %d left)"
                logger.error(text, _error(error, trainer.checkpoints.root), source, left - 1)


def _start(config: Config, latest: Path | None, ending: ExitStack) -> RayPPOTrainer:
    """A trainer with its workers, which `ending` will close."""
    from ray.exceptions import RayError

    from verl.models.hf import check_model, load_tokenizer
    from verl.rewards.errors import RewardError
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer
    from verl.workers.rollout.base import engine_class

    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    folder = Path(config.trainer.default_local_dir).expanduser()
    try:
        engine_class(rollout.name).check(rollout)
        check_model(model, config.data.max_prompt_length + config.data.max_response_length)
        tokenizer = load_tokenizer(model, config.data.tokenizer)
        trainer = ending.enter_context(closing(RayPPOTrainer(config, tokenizer, latest)))
        trainer.start_workers()
        return trainer
    except (ValueError, OSError, RewardError, RayError) as error:
        _stop(2, _error(error, folder))
    except KeyboardInterrupt:
        _stop(130, "stopped")


def _fit(trainer: RayPPOTrainer) -> None:
    from ray.exceptions import RayActorError, RayError

    from verl.rewards.errors import RewardError

    try:
        trainer.fit()
    except RayActorError:
        raise
    except (RewardError, ValueError, OSError, FloatingPointError, RayError) as error:
        _stop(1, f"{_error(error, trainer.checkpoints.root)}\n{RESUME}")
    except KeyboardInterrupt:
        _stop(128 + (trainer.stop.number or 2), f"stopped after step {trainer.step}; {RESUME}")


def _error(error: Exception, folder: Path) -> str:
    """One line about an error; where that comes from code, its traceback goes to `error.log` in
    the run's folder."""
    from ray.exceptions import RayActorError, RayError, RayTaskError

    where = ""
    if isinstance(error, RayError) or folder.is_dir():
        with suppress(OSError):  # the disk may be what is wrong
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "error.log").write_text("".join(traceback.format_exception(error)))
            where = f" (details: {folder / 'error.log'})"
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    text = str(error)
    if isinstance(error, RayError):  # whose messages are long: tracebacks, or lines of facts
        lines = [x.strip() for x in re.sub(r"\x1b\[\d+m", "", text).splitlines() if x.strip()]
        text = lines[-1] if lines else type(error).__name__
        if isinstance(error, RayActorError) and (
            name := re.search(r"class_name: (\w+)", str(error))
        ):
            text = f"a worker died, of class {name[1]}: {text}"
    return f"error: {text or type(error).__name__}{where}"


def _stop(status: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(status) from None


if __name__ == "__main__":
    entry_point(run, "ppo_trainer")
