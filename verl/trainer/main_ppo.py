"""Reinforcement learning: `python -m verl.trainer.main_ppo key=value …`."""

from __future__ import annotations

import logging
import re
import sys
import traceback
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from verl.trainer.config import entry_point
from verl.trainer.config.schema import Config

if TYPE_CHECKING:
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

logger = logging.getLogger(__name__)


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
            trainer = _trainer(config, latest)
            ending.callback(trainer.close)
            try:
                _start(trainer)
                return _fit(trainer)
            except RayActorError as error:
                text, latest = _error(error, trainer.checkpoints.root), trainer.latest
                if error.actor_init_failed:
                    _stop(2, text)
                if not left or trainer.stop.number:
                    _stop(1, f"{text}\n{trainer.how_to_resume}")
                where = f"goes on from {latest}" if latest else "starts anew"
                logger.error("%s. The run %s; trainer.max_restarts: %d left", text, where, left - 1)


def _trainer(config: Config, latest: Path | None) -> RayPPOTrainer:
    """A trainer whose input is good; nothing is started."""
    from verl.models.hf import check_model, load_tokenizer
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer
    from verl.workers.rollout.base import engine_class

    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    try:
        engine_class(rollout.name).check(rollout)
        check_model(model, config.data.max_prompt_length + config.data.max_response_length)
        return RayPPOTrainer(config, load_tokenizer(model, config.data.tokenizer), latest)
    except (ValueError, OSError) as error:
        _stop(2, f"error: {error}")
    except KeyboardInterrupt:
        _stop(130, "stopped")


def _start(trainer: RayPPOTrainer) -> None:
    """Starts its workers. Raises: RayActorError if one dies."""
    from ray.exceptions import RayActorError, RayError

    from verl.rewards.errors import RewardError

    try:
        trainer.start_workers()
    except RayActorError:
        raise
    except RayError as error:  # of a worker, though it may be a ValueError, too
        _stop(2, _error(error, trainer.checkpoints.root))
    except (ValueError, OSError, RewardError) as error:
        _stop(2, f"error: {error}")
    except KeyboardInterrupt:
        _stop(128 + (trainer.stop.number or 2), "stopped")


def _fit(trainer: RayPPOTrainer) -> None:
    """Trains. Raises: RayActorError if a worker dies."""
    from ray.exceptions import RayActorError, RayError

    from verl.rewards.errors import RewardError

    try:
        trainer.fit()
    except RayActorError:
        raise
    except FloatingPointError as error:  # which says itself what to resume from
        _stop(1, _error(error, trainer.checkpoints.root))
    except (ValueError, OSError, RewardError, RayError) as error:
        _stop(1, f"{_error(error, trainer.checkpoints.root)}\n{trainer.how_to_resume}")
    except KeyboardInterrupt:
        _stop(128 + (trainer.stop.number or 2), f"stopped; {trainer.how_to_resume}")


def _error(error: Exception, folder: Path) -> str:
    """One line about an error, whose traceback goes to `error.log` in the run's folder."""
    from ray.exceptions import RayActorError, RayError, RayTaskError

    where = ""
    with suppress(OSError):  # the disk may be what is wrong
        (folder / "error.log").write_text("".join(traceback.format_exception(error)))
        where = f" (details: {folder / 'error.log'})"
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    text = str(error)
    if isinstance(error, RayError):  # whose messages are long: tracebacks, or lines of facts
        lines = [x.strip() for x in re.sub(r"\x1b\[\d+m", "", text).splitlines() if x.strip()]
        ends = [i for i, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)]
        text = " ".join(lines[ends[-1] if ends else -1 :]).partition(" Some common causes")[0]
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
