"""No key without an effect that a test sees: `effects.toml` names the test."""

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT
from verl.config.base import Section, SFTConfig
from verl.config.schema import Config
from verl.config.verl_keys import WITHOUT_EFFECT


def flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Dotted keys and their tests."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, [value] if isinstance(value, str) else value


FILE = Path(__file__).with_name("effects.toml")
EFFECTS = {name: dict(flat(table)) for name, table in tomllib.loads(FILE.read_text()).items()}


def seen_by(program: str, key: str) -> list[str]:
    """Those that see what a key does; of a section, one that sees it arrive comes first."""
    table, section = EFFECTS[program], key
    while section and section not in table:
        section = section.rpartition(".")[0]
    assert section, f"{key} of {program} is neither in effects.toml nor without effect"
    if section == key:
        return table[key]
    shared = EFFECTS[section.rpartition(".")[2]]
    rest = key.removeprefix(f"{section}.")
    assert rest in shared, f"{rest} is missing in effects.toml, for {key}"
    return [*table[section], *shared[rest]]


@cache
def names(file: str) -> set[str]:
    nodes = ast.parse((ROOT / "tests" / file).read_text()).body
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


PROGRAMS: dict[str, Section] = {"main_ppo": Config(), "main_sft": SFTConfig()}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_key_has_a_test_that_sees_its_effect_or_is_known_to_have_none(program: str) -> None:
    keys = [key for key, _, _ in PROGRAMS[program].walk()]
    for key in keys:
        if program == "main_ppo" and key in WITHOUT_EFFECT:
            continue
        for test in seen_by(program, key):
            file, _, name = test.partition("::")
            assert name in names(file), f"{test}, of {key}, does not exist"
    for entry in EFFECTS[program]:
        assert any(f"{key}.".startswith(f"{entry}.") for key in keys), f"there is no key {entry}"


def shared_keys() -> Iterator[tuple[str, str]]:
    """Of the tables of sections: name and key."""
    for section, table in EFFECTS.items():
        if section not in PROGRAMS:
            yield from ((section, key) for key in table)


def test_no_entry_of_a_shared_section_is_left_over() -> None:
    keys = [key for config in PROGRAMS.values() for key, _, _ in config.walk()]
    for section, key in shared_keys():
        assert any(f".{k}".endswith(f".{section}.{key}") for k in keys), f"{section}.{key}"
