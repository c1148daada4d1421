"""Functions of the user's for three keys (docs/your_own_method.md). They are tried at start, and
then stand in the dictionaries of `verl.algorithms`, under the name ``path/to/file.py:function``."""

import hashlib
import sys
import traceback
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from verl.algorithms.advantages import ADVANTAGES, advantages
from verl.algorithms.losses import LossConfig, LossInputs
from verl.algorithms.policy_losses import POLICY_LOSSES, Loss
from verl.algorithms.weights import WEIGHTS, response_weights
from verl.config.base import OWN
from verl.config.schema import Config
from verl.utils.user_function import Function, taken

WEIGHT, ADVANTAGE, LOSS = (
    "actor_rollout_ref.actor.loss_agg_mode",
    "algorithm.adv_estimator",
    "actor_rollout_ref.actor.policy_loss.loss_mode",
)


def sources(config: Config) -> dict[str, tuple[str, str]]:
    """The keys that name a function of the user's → that name, and the text of its file as it was
    when the process started. Raises: ValueError if it can't be read, or was changed by then."""
    known = dict(x.rsplit("@", 1) for x in config.algorithm.own_functions if "@" in x)
    found = {}
    for key, value, _ in config.walk():
        if key in KINDS and OWN.fullmatch(value):
            path = value.rpartition(":")[0]
            found[key] = value, _read(f"{key}={value}", path, known.get(value, ""))
    return found


@cache
def _read(name: str, path: str, digest: str) -> str:
    try:
        text = Path(path).expanduser().read_bytes()
        if hashlib.sha256(text).hexdigest()[: len(digest)] != digest or not digest:
            remedy = "start again, without a value for that key"
            raise ValueError(f"{name}: algorithm.own_functions knows another text: {remedy}")
        return text.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: {error}") from None


def define(key: str, value: str, source: str) -> None:
    """Puts the function that `value` names, of a file with this text, where the key's functions
    are. Raises: ValueError if there is none, or it wants arguments that it can't get."""
    path, _, name = value.rpartition(":")
    module = ModuleType(f"{__name__}.{key.rpartition('.')[2]}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # where dataclasses look for it
    try:
        exec(compile(source, path, "exec"), vars(module))
    except Exception as error:
        raise ValueError(f"{key}={value}: {_reason(error, path)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{key}={value}: {path} has no function {name}")
    table, adapter, arguments = KINDS[key]
    try:
        takes = taken(function, arguments)
    except TypeError as error:
        names = f"it is called by name, with those of {', '.join(arguments)} that it takes"
        raise ValueError(f"{key}={value}: {error}; {names}") from None

    def call(**offered: Any) -> Any:
        return function(**{name: offered[name] for name in takes})

    table[value] = partial(adapter, call, f"{key}={value}")


def _of_shape(name: str, values: Any, size: int) -> Tensor:
    if not isinstance(values, Tensor) or values.shape != (size,):
        found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{name} returned {found}, not a tensor of shape [{size}]")
    return values


def _numbers(name: str, values: Any, size: int, low: float = -torch.inf) -> Tensor:
    numbers = _of_shape(name, values, size).double()
    if not (wrong := ~(numbers.isfinite() & (numbers >= low))).any():
        return numbers
    what = "finite, and not negative" if low == 0 else "finite"
    number = int(wrong.nonzero()[0])
    raise ValueError(f"{name} returned {numbers[number]:g} for response {number}: must be {what}")


def own_weights(
    call: Function,
    name: str,
    L: Tensor,
    *,
    M: int,
    alpha: float,
    rollout_L: Tensor,
    groups: Tensor,
    **_: Any,
) -> Tensor:
    """An entry of `WEIGHTS`: the user's w_i of the responses that have tokens, else 0."""
    present, weights = L > 0, torch.zeros_like(L)
    if present.any():
        of_rollout = rollout_L[rollout_L > 0]
        options = {"max_response_length": M, "alpha": alpha, "rollout_lengths": of_rollout}
        values = call(lengths=L[present], groups=groups[present], **options)
        weights[present] = _numbers(name, values, int(present.sum()), low=0)
    return weights


def own_advantages(
    call: Function, name: str, rewards: Tensor, groups: Tensor, **others: Any
) -> Tensor:
    """An entry of `ADVANTAGES`."""
    return _numbers(name, call(rewards=rewards, groups=groups, **others), len(rewards))


def own_loss(
    call: Function,
    name: str,
    log_probs: Tensor,
    old: Tensor,
    advantages: Tensor,
    *,
    inputs: LossInputs,
    c: LossConfig,
    **_: Any,
) -> Loss:
    """An entry of `POLICY_LOSSES`."""
    found = call(inputs=inputs, config=c)
    loss, reported = found if isinstance(found, tuple) else (found, {})
    more = {key: value.detach() for key, value in reported.items()}
    return _of_shape(name, loss, len(log_probs)), {"ppo_kl": (old - log_probs).detach()} | more


KINDS: dict[str, tuple[dict[str, Any], Callable[..., Tensor | Loss], tuple[str, ...]]] = {
    WEIGHT: (
        WEIGHTS,
        own_weights,
        ("lengths", "max_response_length", "groups", "rollout_lengths", "alpha"),
    ),
    ADVANTAGE: (ADVANTAGES, own_advantages, ("rewards", "groups", "lengths", "norm_by_std")),
    LOSS: (POLICY_LOSSES, own_loss, ("inputs", "config")),
}
"""Key → where its functions are, what makes one of a user's, and what that may take, by name."""


def check(config: Config, loss: LossConfig) -> None:
    """Defines the functions of the user's that the run takes, and tries them on three made-up
    prompts. Raises: ValueError for one that fails there, or would in training."""
    for key, (value, source) in sources(config).items():
        name, path = f"{key}={value}", value.rpartition(":")[0]
        define(key, value, source)
        try:
            TRIALS[key](name, value, config, loss)
        except Exception as error:
            ours = str(error).startswith(name)
            text = str(error) if ours else f"{name}: {_reason(error, path)}"
            tried = f"tried on {config.actor_rollout_ref.rollout.n} made-up responses to each of 3"
            raise ValueError(f"{text} ({tried} prompts)") from error


def _reason(error: Exception, path: str) -> str:
    """What it is and, if it happened in the user's file, in which line."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"line {line}: " * (line is not None) + f"{type(error).__name__}: {text}"


def _made_up(config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths, groups and rewards of n responses to 3 prompts each; to the first all are right."""
    random, n = torch.Generator().manual_seed(0), config.actor_rollout_ref.rollout.n
    longest = min(config.data.max_response_length, 12)
    lengths = torch.randint(1, longest + 1, (3 * n,), generator=random)
    groups = torch.arange(3).repeat_interleave(n)
    rewards = (torch.rand(3 * n, generator=random) < 0.5).double()
    rewards[:n] = 1
    return lengths, groups, rewards


def _try_weights(name: str, value: str, config: Config, loss: LossConfig) -> None:
    lengths, groups, _ = _made_up(config)
    M, alpha = config.data.max_response_length, config.algorithm.grpopp_config.alpha
    if not response_weights(lengths, value, M, alpha, groups=groups).any():
        raise ValueError(f"{name} returned nothing but zeros")


def _try_advantages(name: str, value: str, config: Config, loss: LossConfig) -> None:
    lengths, groups, rewards = _made_up(config)
    advantages(rewards, groups, lengths, value, config.algorithm.norm_adv_by_std_in_grpo)


def _try_loss(name: str, value: str, config: Config, loss: LossConfig) -> None:
    """And whether a response's loss depends on it alone."""
    lengths, _, rewards = _made_up(config)
    random = torch.Generator().manual_seed(1)
    log_probs = torch.randn(4, int(lengths.sum()), generator=random) / 5 - 2
    log_probs.requires_grad_()
    each = (2 * rewards.float() - 1).repeat_interleave(lengths)

    def losses(of: Any, part: Tensor) -> Tensor:
        now, old, ref, rollout = log_probs[:, of]
        old, rollout = old.detach(), rollout.detach()
        weights = torch.ones_like(old)
        more = {"ref_log_probs": ref.detach() if loss.kl_coef else None}
        x = LossInputs(now, -now, part, weights, weights, each[of], old, **more)
        x.rollout_log_probs = rollout
        found: Loss = POLICY_LOSSES[value](now, old, x.advantages, inputs=x, c=loss)
        return found[0]

    whole = losses(slice(None), lengths)
    _numbers(name, whole.detach(), len(whole))
    if not whole.requires_grad:
        raise ValueError(f"{name} has no gradient: inputs.log_probs has one")
    (gradient,) = torch.autograd.grad(whole.sum(), log_probs)
    _numbers(f"{name}: its gradient", gradient[0], len(whole))
    ends = lengths.cumsum(0).tolist()
    pieces = [slice(end - size, end) for end, size in zip(ends, lengths.tolist(), strict=True)]
    parts = [losses(piece, L) for piece, L in zip(pieces, lengths[:, None], strict=True)]
    if not torch.allclose(torch.cat(parts), whole, rtol=1e-4, atol=1e-6):
        problem = "the loss of a response depends on others, which may be in other micro-batches"
        raise ValueError(f"{name}: {problem}")


TRIALS = {WEIGHT: _try_weights, ADVANTAGE: _try_advantages, LOSS: _try_loss}
