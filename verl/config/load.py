"""Command line → read-only configuration. All errors come from here, before any process starts."""

import argparse
import difflib
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from tqdm.contrib.logging import logging_redirect_tqdm

from verl.config.base import (
    Section,
    SFTConfig,
    default_ranks,
    own_functions,
    too_many_ranks,
)
from verl.config.schema import Config
from verl.config.validate import ignored_keys, validate
from verl.config.verl_keys import OF_ALL_RANKS, own_name, refusal, without_effect

logger = logging.getLogger(__name__)

OPEN = (".override_config", ".engine_kwargs.vllm", ".reward_kwargs", ".runtime_env")
"""Sections that take any key: of the model, vLLM, a reward or Ray, which no schema knows."""

DTYPES = {"fp32": "float32", "float": "float32", "bf16": "bfloat16"}
DTYPES |= {"fp16": "float16", "half": "float16"}
"""Other spellings of the values of all keys that end in `dtype`."""

HERE = Path(__file__).parents[1] / "trainer" / "config"
ConfigStore.instance().store(name="schema", node=Config)
ConfigStore.instance().store(name="sft_schema", node=SFTConfig)
OmegaConf.register_new_resolver("verl.ranks", default_ranks)
OmegaConf.register_new_resolver("verl.own_functions", own_functions)
OmegaConf.register_new_resolver("verl.is_null", lambda value: value is None)
OmegaConf.register_new_resolver(
    "verl.token_budget", lambda ranks, *lengths: max(16384, -(-sum(lengths) // max(1, ranks)))
)


class ConfigError(ValueError):
    """Keys or values that can't be; a line of the message for each, with the remedy."""


def compose_config(
    overrides: Sequence[str], config_name: str = "ppo_trainer", config_dir: str | Path = HERE
) -> DictConfig:
    """YAML file and `key=value` overrides, merged and validated. Raises: ConfigError for overrides
    that can't be parsed, unknown keys (with the nearest), wrong types, what `validate` finds."""
    return _compose(overrides, config_name, config_dir)[0]


def _compose(
    overrides: Sequence[str], config_name: str, config_dir: str | Path
) -> tuple[DictConfig, Any, dict[str, Any]]:
    """`compose_config`, the same as dataclasses, and the values of the overrides by the names that
    users gave."""
    problems: dict[str, str] = {}
    try:
        own = Path(config_dir) == HERE
        config = deepcopy(_of_package(config_name)) if own else _read(config_name, config_dir)
        schema: Any = OmegaConf.get_type(config)
        if not issubclass(schema, Section):
            raise ConfigError(f"{config_name}.yaml must begin with defaults: [schema, _self_]")
        problems, given = _override(config, schema(), overrides)
        typed: Any = OmegaConf.to_object(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError("\n".join([*problems, _explain(error)[1]])) from error
    if lines := [*problems, *validate(typed, problems.values())]:
        raise ConfigError("\n".join(lines))
    return config, typed, given


def _read(config_name: str, config_dir: str | Path = HERE) -> DictConfig:
    """The YAML file, merged with its defaults list."""
    with initialize_config_dir(str(Path(config_dir).resolve()), version_base="1.3"):
        return compose(config_name)


# Composing is half of the time of `load_config`. Files of the user's may change meanwhile.
_of_package = cache(_read)


def load_config(
    overrides: Sequence[str] = (), config_name: str = "ppo_trainer", config_dir: str | Path = HERE
) -> Any:
    """`compose_config` as locked dataclasses; a warning names overrides that can't matter."""
    _, typed, given = _compose(overrides, config_name, config_dir)
    own = tuple(f"{key}." for key, _, _ in typed.walk())
    foreign = {k: v for k, v in given.items() if not any(o.startswith(f"{k}.") for o in own)}
    found = {k: why for k, v in foreign.items() if (why := without_effect(k, v))}
    found |= {
        k: "there is no critic" for k in foreign if k.startswith("critic.") and k not in found
    }
    found |= ignored_keys(typed, [own_name(key) for key in given])
    if ignored := [f"{key} ({why})" for key, why in found.items()]:
        logger.warning("these keys have no effect in this run: %s", "; ".join(ignored))
    typed.lock()
    return typed


def entry_point(
    run: Callable[[Any], None], config_name: str, config_dir: str | Path = HERE
) -> None:
    """What every `python -m …` does: check and run or, with DRY_RUN, print the configuration and
    (unless that is `quiet`) the memory that it takes. Exits with 2 and a line for each error."""
    parser = argparse.ArgumentParser(
        usage="python -m … [-m] [--config-name NAME] [--config-path DIR] key=value …",
        description="Keys: docs/keys.md. DRY_RUN=1 prints them all; -m: a run for each of key=a,b.",
    )
    parser.add_argument("--config-name", default=config_name)
    parser.add_argument("--config-path", "--config-dir", default=config_dir)
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    source = args.config_name, args.config_path
    if args.multirun:  # a process that runs others: nothing of this one stays
        main = sys.modules["__main__"].__spec__
        command = ["-m", "verl.tools.sweep", main.name if main else sys.argv[0], *map(str, source)]
        os.execv(sys.executable, [sys.executable, *command, *args.overrides])
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        typed = load_config(args.overrides, *source)
    except ConfigError as error:
        exit_with(2, f"error: {error}".replace("\n", "\nerror: "))
    dry_run = os.environ.get("DRY_RUN", "")
    if dry_run in ("", "0"):
        if problem := too_many_ranks(typed.trainer):
            exit_with(2, f"error: {problem}")
        with logging_redirect_tqdm():  # so that lines of the log don't end in a progress bar
            return run(typed)
    text = OmegaConf.to_yaml(asdict(typed))
    if isinstance(typed, Config) and typed.algorithm.own_functions:
        tried = [sys.executable, "-m", "verl.tools.try_functions"]
        if status := subprocess.run(tried, input=text, stdout=sys.stderr, text=True).returncode:
            raise SystemExit(status)
    print(text, end="", flush=True)
    if isinstance(typed, Config) and dry_run != "quiet":
        command = [sys.executable, "-m", "verl.tools.memory_plan"]
        found = subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True)
        print(found.stdout, end="", file=sys.stderr)


def exit_with(status: int, message: str) -> NoReturn:
    """Ends the process, with a message on standard error."""
    with suppress(OSError):  # the terminal may be gone
        print(message, file=sys.stderr)
    raise SystemExit(status) from None


def parse_override(text: str) -> Override:
    """Raises: ConfigError if it is none."""
    with suppress(HydraException):
        override = OverridesParser.create().parse_override(text)
        if not override.is_delete():
            return override
    remedy = "write key=value, with quotes around lists, such as"
    example = "\"trainer.logger=['console','wandb']\""
    raise ConfigError(f"{text!r} is not an override: {remedy} {example}")


def _override(
    config: DictConfig, schema: Section, overrides: Iterable[str]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Merges overrides into `config`, but those with problems; these, with the keys meant, and the
    names and values of all."""
    defaults = {key: value for key, value, _ in schema.walk()}
    free = tuple(f"{key}." for key in defaults if key.endswith(OPEN))
    known = [key for key in defaults if not key.endswith(OPEN)]
    problems: dict[str, str] = {}
    given, values, written = [], dict[str, Any](), dict[str, tuple[str, Any]]()
    totals: dict[str, tuple[str, int]] = {}  # counts of all ranks, by the key of one rank's
    of_critic: list[str] = []  # problems that matter where there is one
    for text in filter(str.strip, overrides):
        try:
            override = parse_override(text)
        except ConfigError as error:
            problems[str(error)] = text
            continue
        name, value = override.key_or_group, override.value()
        key = own_name(name)
        if key.endswith("dtype") and isinstance(value, str):
            value = DTYPES.get(value, value)
        values[name] = value
        other, before = written.setdefault(key, (name, value))
        if other != name and before != value:
            problems[f"{name}={value} contradicts {other}={before}: one key, two names"] = key
        if override.is_sweep_override():
            problems[f"{text}: several values are several runs, and take -m"] = key
        elif key.startswith(free) or any(f"{k}.".startswith(f"{key}.") for k in defaults):
            follows = value is None and "${" in str(defaults.get(key))
            given.append((key, defaults[key] if follows else value, text.partition("=")[2].strip()))
        elif (one_rank := OF_ALL_RANKS.get(key)) and isinstance(value, int):
            totals[one_rank] = name, value
        elif one_rank and value is not None:
            problems[f"{name}={value}: must be a whole number"] = one_rank
        elif not (one_rank or without_effect(key, value) or key.startswith("hydra.")):
            refused = refusal(key)
            problem, near = (refused, key) if refused else unknown_key(known, key)
            problems[problem] = near
            if key.startswith("critic."):
                of_critic.append(problem)
    for key, value, written_as in given:
        try:
            OmegaConf.update(config, key, value, force_add=f"{key}.".startswith(free))
            if isinstance(value, int | float) and isinstance(OmegaConf.select(config, key), str):
                OmegaConf.update(config, key, written_as)  # 2026_01_02 is a name: not 20260102
        except OmegaConfBaseException as error:
            key, text = _explain(error)
            unknown = isinstance(error, ConfigKeyError | ConfigAttributeError)
            problems.update([unknown_key(known, key) if unknown else (text, key)])
    if OmegaConf.select(config, "algorithm.adv_estimator") not in (None, "gae"):
        for problem in of_critic:
            problems.pop(problem, None)
    for key, (name, count) in totals.items():
        share, ranks = _share_of_rank(config, key, count)
        if written.get(key, (key, share))[1] not in (None, share):
            problems[f"{name}={count} on {ranks} ranks contradicts {key}={written[key][1]}"] = key
        OmegaConf.update(config, key, share)
        logger.warning("%s=%d: %d of all %d ranks", key, share, count, ranks)
    return problems, values


def _share_of_rank(config: DictConfig, key: str, count: int) -> tuple[int, int]:
    """What one rank gets of a micro-batch size of all, for its `key`; the number of ranks."""
    split = 1
    if not key.startswith("reward_model."):
        part = config.actor_rollout_ref["ref" if ".ref." in key else "actor"]
        split = part.ulysses_sequence_parallel_size
    ranks = max(1, config.trainer.nnodes * config.trainer.n_gpus_per_node)
    return max(1, count * split // ranks), ranks


def _explain(error: Exception) -> tuple[str, str]:
    """The key that an error is about, if it is about one, and a line about it."""
    cause = error.__cause__ or error
    key = getattr(cause, "full_key", None) or ""
    text = " ".join(re.sub(r"\n *(full_key|reference_type|object_type).*", "", str(cause)).split())
    return key, f"{key}: {text}" if key else text


def unknown_key(known: Collection[str], key: str) -> tuple[str, str]:
    """What to say about a key that isn't known, and the nearest one that is."""
    alike = [k for k in known if key.rpartition(".")[2] in k.split(".")]
    (near,) = difflib.get_close_matches(key, alike or known, n=1, cutoff=0.0)
    return f"there is no key {key!r}; the nearest one is {near!r}", near
