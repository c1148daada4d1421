"""Keys of verl that the schema lacks (`verl_keys.yaml`): other names of its keys, keys without
effect, and refused ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

_TABLES: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_suffix(".yaml")))
SAME_AS: dict[str, str] = _TABLES["same_as"]
OF_ALL_RANKS: dict[str, str] = _TABLES["of_all_ranks"]
WITHOUT_EFFECT: dict[str, str] = _TABLES["without_effect"]
NOT_SUPPORTED: dict[str, str] = _TABLES["not_supported"]


def without_effect(key: str, value: Any) -> str | None:
    """Why an override of verl's changes nothing here; None if it is none of those."""
    text = "null" if value is None else str(value)
    if reason := _nearest(WITHOUT_EFFECT, key) or WITHOUT_EFFECT.get(f"{key}={text}"):
        return reason
    asks_for_nothing = value in (None, False, 0) and _nearest(NOT_SUPPORTED, key)
    return "it asks for nothing" if asks_for_nothing else None


def refusal(key: str) -> str | None:
    """What to say about a key of verl's that is not supported; None if it is none of those."""
    reason = _nearest(NOT_SUPPORTED, key)
    return reason and f"{key} is known in verl, but not supported here: {reason}"


def _nearest(table: Mapping[str, str], key: str) -> str | None:
    """The entry of a key or, if it has none, of the section nearest above it."""
    while key and key not in table:
        key = key.rpartition(".")[0]
    return table.get(key)
