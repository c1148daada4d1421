"""`algorithm.rollout_correction`: its keys, and what they reject."""

import math
from typing import NamedTuple

from verl.config.base import Section, key

OLDER = {"token": "token_k1", "sequence": "seq_sum_k1", "geometric": "seq_mean_k1"}
"""verl's names up to 0.7, which bound π_old/π_rollout: the newer ones bound π_rollout/π_old."""
LEVELS = ("token", "seq_sum", "seq_mean", "seq_max")
OPTIONS = {*OLDER, *(f"{level}_{k}" for level in LEVELS for k in ("k1", "k2", "k3"))}
OPTIONS.remove("seq_max_k1")  # of a number with a sign
WITHOUT_FACTORS = (  # of rollout_is
    "bypass_old_log_prob=True and loss_type=ppo_clip",
    "bypass_old_log_prob=False and async_rollout=True and decoupled=False",
)


class RolloutCorrectionConfig(Section):
    """`algorithm.rollout_correction`: the engines' log-probabilities are not quite the actor's."""

    rollout_is: str | None = key(None, choices=("token", "sequence"), idle_if=WITHOUT_FACTORS)
    """Truncated importance sampling: weigh a token by π_old/π_rollout of it or of its response."""
    rollout_is_threshold: float = key(2.0, above=0, idle_if=("rollout_is=null", *WITHOUT_FACTORS))
    """The factor is at most this."""
    rollout_is_batch_normalize: bool = key(False, idle_if=("rollout_is=null", *WITHOUT_FACTORS))
    """Divide the factors by their mean over the whole batch."""
    rollout_rs: str | None = None
    """Rejection: tokens, or whole responses, where π_old/π_rollout is out of bounds have no part in
    the loss and its denominators. token, sequence, geometric; or several of token_k1, seq_mean_k3,
    … with commas between them (docs/engines.md)."""
    rollout_rs_threshold: str | None = key(None, idle_if="rollout_rs=null")
    """Its bounds: an upper one, or lower_upper (0.5_2); one, or one for each of rollout_rs."""
    rollout_rs_threshold_lower: float | None = key(None, above=0, idle_if="rollout_rs=null")
    """Lower bound of a ratio; null: 1 / upper."""
    rollout_token_veto_threshold: float | None = key(None, above=0)
    """Reject responses with a token whose π_old/π_rollout is less than this."""
    loss_type: str = key(
        "ppo_clip", choices=("ppo_clip", "reinforce"), idle_if="bypass_old_log_prob=False"
    )
    """With bypass_old_log_prob, the loss of a token: PPO's clipped one, whose ratio corrects by
    itself, or −A·log π, times the factor of rollout_is."""
    decoupled: bool = key(False, idle_if="bypass_old_log_prob=True")
    """Responses of older policies: the ratio that is clipped is to the policy before the step, as
    for the others, and rollout_is leads to the one that drew each token (AReaL's decoupled loss,
    arXiv 2505.24298, eq. 5). False: their ratio is to the one that drew it."""


class Rejection(NamedTuple):
    """Tokens, or all tokens of a response, with a statistic below `low` or above `high`."""

    name: str  # of the option
    level: str  # token; or seq_sum, seq_mean, seq_max: of the response's tokens
    estimator: str  # of a token's divergence: k1, k2, k3
    low: float
    high: float


def rejections(config: RolloutCorrectionConfig) -> list[Rejection]:
    """The options of `rollout_rs`, each with a threshold of its own or that of all. Of k1, −log
    π_old/π_rollout, they are bounds of π_rollout/π_old, `lower_upper` or the upper one alone.
    Example: ``seq_mean_k1`` with ``0.5_4`` is −log 2 ≤ mean k1 ≤ log 4. Raises: ValueError, for
    `verl.config.validate`: it fills in the keys."""
    names = [*dict.fromkeys(x.strip() for x in (config.rollout_rs or "").split(",") if x.strip())]
    if not all(name in OPTIONS for name in names):
        raise ValueError("{rollout_rs=}: choose from " + ", ".join(sorted(OPTIONS)))
    if names and config.rollout_rs_threshold is None:
        raise ValueError("{rollout_rs=} needs {rollout_rs_threshold}")
    texts = (config.rollout_rs_threshold or "").split(",")
    if len(texts) not in (1, len(names)) and names:
        raise ValueError("{rollout_rs_threshold=}: give one, or one for each of {rollout_rs=}")
    found = []
    for name, text in zip(names, texts * len(names), strict=False):
        level, _, estimator = OLDER.get(name, name).rpartition("_")
        low, high = _bounds(text, estimator == "k1", config.rollout_rs_threshold_lower)
        low, high = (1 / high, 1 / low) if name in OLDER else (low, high)
        logs = (math.log(low), math.log(high)) if estimator == "k1" else (-math.inf, high)
        found.append(Rejection(name, level, estimator, *logs))
    return found


def _bounds(text: str, two: bool, lower: float | None) -> tuple[float, float]:
    """Lower and upper bound of a ratio, or an upper one alone."""
    first, both, last = text.strip().rpartition("_")
    try:
        high = float(last)
        low = float(first) if both else lower or 1 / high
        if not two and not both and high > 0:
            return 0.0, high
        if two and 0 < low <= high < math.inf and not (both and lower):
            return low, high
    except (ValueError, ZeroDivisionError):
        pass
    rule = "lower_upper, two positive numbers, or the upper alone" if two else "a positive number"
    raise ValueError(f"{{rollout_rs_threshold=}}: {text.strip()!r} must be {rule}")
