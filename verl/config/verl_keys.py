"""Keys of verl that the schema lacks (`verl_keys.yaml`): other names of its keys, keys without
effect, and refused ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from verl.config.base import shown

BOTH = "{actor,ref}"
TABLES: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_suffix(".yaml")))
SAME_AS, OF_ALL_RANKS, WITHOUT_EFFECT, NOT_SUPPORTED = (
    {k.replace(BOTH, x): v.replace(BOTH, x) for k, v in table.items() for x in ("actor", "ref")}
    for table in TABLES.values()
)


def own_name(name: str) -> str:
    """The key that a name of verl's stands for, also below a section of another name."""
    above = name
    while above and above not in SAME_AS:
        above = above.rpartition(".")[0]
    return SAME_AS[above] + name[len(above) :] if above else name


def without_effect(key: str, value: Any) -> str | None:
    """Why an override of verl's changes nothing here; None if it is none of those."""
    text = f"{value:g}" if type(value) in (int, float) else shown(value)
    if reason := _nearest(WITHOUT_EFFECT, key) or WITHOUT_EFFECT.get(f"{key}={text}"):
        return reason
    off = value is None or value is False or value in ({}, [])
    return "it asks for nothing" if off and _nearest(NOT_SUPPORTED, key) else None


def refusal(key: str) -> str | None:
    """What to say about a key of verl's that is not supported; None if it is none of those."""
    reason = _nearest(NOT_SUPPORTED, key)
    return reason and f"{key} is known in verl, but not supported here: {reason}"


def _nearest(table: Mapping[str, str], key: str) -> str | None:
    """The entry of a key or, if it has none, of the section nearest above it."""
    while key and key not in table:
        key = key.rpartition(".")[0]
    return table.get(key)
