"""Command line → read-only configuration. All errors come from here, before any process starts."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl.trainer.config.schema import Config
from verl.trainer.config.sft_schema import SFTConfig
from verl.trainer.config.validate import ignored_keys, validate, validate_sft

logger = logging.getLogger(__name__)

FREE = (".override_config.", ".engine_kwargs.vllm.")
"""Sections that take any key."""

HERE = Path(__file__).parent
ConfigStore.instance().store(name="schema", node=Config)
ConfigStore.instance().store(name="sft_schema", node=SFTConfig)


class ConfigError(ValueError):
    """A key or value that can't be; the message names it and the remedy."""


def compose_config(
    overrides: Sequence[str], config_name: str = "ppo_trainer", config_dir: str | Path = HERE
) -> DictConfig:
    """YAML file and `key=value` overrides, merged and type-checked against the schema.

    Raises: ConfigError for an unknown key (with the nearest valid one), a value of the wrong type,
    or an override that can't be parsed.
    """
    with initialize_config_dir(config_dir=str(Path(config_dir).resolve()), version_base="1.3"):
        base = compose(config_name)
        _check_keys(base, overrides)
        try:
            # These hold keys of the model or of vLLM, which no schema knows.
            given = [f"++{o.lstrip('+')}" if any(f in o for f in FREE) else o for o in overrides]
            config = compose(config_name, overrides=given)
            OmegaConf.to_container(config, resolve=True)
        except (HydraException, OmegaConfBaseException) as error:
            cause = error.__cause__ or error
            key = getattr(cause, "full_key", None)
            text = str(cause).strip().splitlines()[0]
            raise ConfigError(f"{key}: {text}" if key else text) from error
    return config


def to_config(config: DictConfig, overrides: Sequence[str] = ()) -> Any:
    """The dataclasses of `schema`, validated and locked; a warning names keys that can't matter.

    Raises: ConfigError for impossible values and contradictory flags.
    """
    typed = OmegaConf.to_object(config)
    try:
        if isinstance(typed, SFTConfig):
            validate_sft(typed)
        else:
            validate(typed)
            given = filter(None, map(_override_key, overrides))
            if ignored := ignored_keys(typed, given):
                logger.warning("these keys have no effect in this run: %s", "; ".join(ignored))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    typed.lock()
    return typed


def load_config(
    overrides: Sequence[str] = (), config_name: str = "ppo_trainer", config_dir: str | Path = HERE
) -> Any:
    """`compose_config` and `to_config` in one call: what tests and notebooks use."""
    return to_config(compose_config(overrides, config_name, config_dir), overrides)


def entry_point(
    run: Callable[[Any], None],
    config_name: str,
    config_dir: str | Path = HERE,
    argv: Sequence[str] | None = None,
) -> None:
    """What every `python -m …` does: parse, check, and run or, with DRY_RUN=1, print the
    configuration as YAML, and on standard error how much memory it will take (which DRY_RUN=quiet
    leaves out).

    Options: `--config-name NAME`, `--config-path DIR` (as in Hydra); all else is `key=value`.
    Exits with 2 and one message for a configuration error.
    """
    parser = argparse.ArgumentParser(
        usage="python -m … [--config-name NAME] [--config-path DIR] key=value …",
        description="Keys: verl/trainer/config/schema.py. DRY_RUN=1 prints them all.",
    )
    parser.add_argument("--config-name", default=config_name)
    parser.add_argument("--config-path", "--config-dir", default=config_dir)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        config = compose_config(args.overrides, args.config_name, args.config_path)
        typed = to_config(config, args.overrides)
    except (ConfigError, HydraException) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    dry_run = os.environ.get("DRY_RUN", "0")
    if dry_run not in ("", "0"):
        print(OmegaConf.to_yaml(config, resolve=True), end="")
        if isinstance(typed, Config) and dry_run != "quiet":
            from verl.utils.memory import estimate

            print(estimate(typed), file=sys.stderr)
        return
    run(typed)


def _override_key(override: str) -> str | None:
    """Dotted key of an override; None for Hydra's own keys."""
    try:
        key = OverridesParser.create().parse_override(override).key_or_group
    except HydraException:
        raise ConfigError(
            f"{override!r} is not an override: write key=value, with quotes around lists, such as "
            "\"trainer.logger=['console','wandb']\""
        ) from None
    return None if key.startswith("hydra.") else key


def _check_keys(base: DictConfig, overrides: Sequence[str]) -> None:
    """Raises ConfigError for the first override whose key is not in `base`."""
    known = _keys(OmegaConf.to_container(base, resolve=False))
    free = tuple(f"{k}." for k in known if f".{k}.".endswith(FREE))
    for override in overrides:
        key = _override_key(override)
        if key is None or key in known or key.startswith(free):
            continue
        ending = [k for k in known if k.endswith(f".{key}")]
        leaf = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
        leaves = [k for k in known if not any(other.startswith(f"{k}.") for other in known)]
        near = difflib.get_close_matches(key, ending or leaf or leaves, n=1, cutoff=0.0)
        raise ConfigError(f"there is no key {key!r}; the nearest one is {near[0]!r}")


def _keys(node: Any, prefix: str = "") -> list[str]:
    """All dotted keys below `node`, sections included."""
    if not isinstance(node, dict):
        return []
    names = [f"{prefix}{name}" for name in node]
    return names + [k for name in node for k in _keys(node[name], f"{prefix}{name}.")]
