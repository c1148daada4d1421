"""What watches a run: optimizer steps that were skipped, engines that disagree with the actor."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from verl.config.schema import Config
from verl.protocol import OptimizerStep, Sample
from verl.rewards.scorer import RewardManager
from verl.trainer.ppo.batches import has_spread
from verl.utils.device import default_dtype
from verl.utils.samples import write_samples

logger = logging.getLogger(__name__)


def count_skipped(
    by_rank: list[list[dict[str, float]]],
    in_a_row: int,
    limit: int,
    steps: Sequence[OptimizerStep],
    dump: Path,
    role: str = "model",
) -> int:
    """How many optimizer steps of the model `role` up to now were skipped in a row, as loss or
    gradient was not finite; `by_rank`: [ranks][steps]. Raises: FloatingPointError after `limit`,
    with `steps` in `dump`."""
    flags = [max(rank["skipped"] for rank in ranks) for ranks in zip(*by_rank, strict=True)]
    for skipped in flags:
        in_a_row = in_a_row + 1 if skipped else 0
        if in_a_row >= limit:
            outcome, samples = f"is in {dump}", [s for step in steps for s in step.samples]
            try:
                numbers = [number for number, step in enumerate(steps) for _ in step.samples]
                weight = np.concatenate([step.weights for step in steps]).tolist()
                write_samples(dump, samples, optimizer_step=numbers, weight=weight)
            except Exception as error:  # which must not hide what is worse
                outcome = f"could not be written to {dump} ({type(error).__name__}: {error})"
            raise FloatingPointError(
                f"the loss or gradient of {in_a_row} optimizer steps of the {role} in a row was "
                f"not finite (trainer.max_skipped_steps={limit}), so none was made. The batch "
                f"{outcome}: look there for numbers that are not finite. Else lower the "
                "optimizer's lr or raise its warm-up, and resume from before the trouble with "
                "trainer.resume_mode=resume_path"
            )
    if count := int(sum(flags)):
        text = "%d of %d optimizer steps of the %s skipped: their loss or gradient was not finite"
        logger.warning(text, count, len(flags), role)
    return in_a_row


def warn_of_equal_scores(samples: Sequence[Sample], rewards: RewardManager) -> None:
    """Warns if no response has another score than the others: nothing could be learned."""
    if not has_spread(samples, "score"):
        text = "all %d responses of the first step have the score %g: nothing can be learned from "
        text += "them. Two of them:\n%s"
        texts = [text or "(empty)" for text in rewards.texts([samples[0], samples[-1]])]
        shown = f"\n{60 * '-'}\n".join(["", *texts, ""])
        logger.warning(text, len(samples), samples[0].score, shown.strip("\n"))


def warn_of_disagreement(config: Config, metrics: Mapping[str, Any], device: str) -> None:
    """Warns if `rollout/logprob_diff_mean` is more than the types of the numbers explain."""
    rollout, found = config.actor_rollout_ref.rollout, metrics.get("rollout/logprob_diff_mean")
    trainer, decoupled = config.trainer, config.algorithm.rollout_correction.decoupled
    if decoupled and (trainer.max_policy_age or trainer.async_rollout):  # it is of other policies
        return
    if found is None or rollout.top_p < 1 or rollout.top_k > 0:  # which the actor knows nothing of
        return
    limit, types = ordinary_difference(config, device)
    if not found <= limit:
        text = (
            "the engines' log-probabilities differ from the actor's by %.3g nats a token "
            "(rollout/logprob_diff_mean; up to %g is ordinary in %s). The responses are not quite "
            "the policy's: check with actor_rollout_ref.rollout.verify_weights=True, or correct "
            "for it with algorithm.rollout_correction.rollout_is=token"
        )
        logger.warning(text, found, limit, " and ".join(sorted(types)))


def ordinary_difference(config: Config, device: str) -> tuple[float, set[str]]:
    """Mean difference of log-probabilities, in nats a token, that the types of engines and actor
    explain, and these types. Rounding alone makes about 1e-6 in float32, 1e-2 in bfloat16."""
    usual, models = default_dtype(device), config.actor_rollout_ref
    precision = models.actor.fsdp_config.mixed_precision.param_dtype
    types = {models.rollout.dtype or usual, precision or usual}
    return 1e-3 if types == {"float32"} else 0.05, types
