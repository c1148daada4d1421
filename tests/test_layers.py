"""Imports point downward only, and the lowest modules import nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = {
    "recipe": 6,
    "verl.trainer.main_ppo": 5,
    "verl.trainer.main_sft": 5,
    "verl.trainer": 4,
    "verl.workers": 3,
    "verl.models": 2,
    "verl.data": 2,
    "verl.rewards": 2,
    "verl.trainer.ppo.core_algos": 1,
    "verl.trainer.config": 1,
    "verl.protocol": 1,
    "verl.tools": 1,
    "verl.utils": 0,
}
"""Module or package → its layer. The longest name that fits counts."""
UTILS_MAY_USE = ("verl.utils", "verl.protocol", "verl.trainer.config")


def unit_of(module: str) -> str | None:
    """The key of `LAYERS` that `module` belongs to."""
    fitting = [unit for unit in LAYERS if module == unit or module.startswith(unit + ".")]
    return max(fitting, key=len, default=None)


def imported(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Names of all modules that `source` imports, within functions too; not those only for types.

    `from package import name` yields both, as `name` may be a module.
    """
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            parent = parts[: len(parts) - node.level + is_package] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        pending += ast.iter_child_nodes(node)


def allowed(importer: str, target: str) -> bool:
    """Whether the module `importer` may import the module or name `target`."""
    if importer.split(".")[0] == "server":
        return target.split(".")[0] not in ("verl", "recipe")
    if target.split(".")[0] == "server":
        return False
    mine, theirs = unit_of(importer), unit_of(target)
    if theirs is None:  # not ours
        return True
    if mine == "verl.utils":
        return theirs in UTILS_MAY_USE
    # `from verl.trainer.ppo import core_algos` also yields its parent, a package without code.
    return mine == theirs or LAYERS[theirs] < LAYERS[mine]


def module_names() -> dict[str, Path]:
    """All modules of the three code folders."""
    files = [path for top in ("verl", "recipe", "server") for path in (ROOT / top).rglob("*.py")]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in files
    }


def is_empty_package(name: str) -> bool:
    """Packages without code of their own stand for nothing."""
    init = ROOT.joinpath(*name.split("."), "__init__.py")
    return init.is_file() and not ast.parse(init.read_text()).body


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """`importer → target` for each import that points up or sideways."""
    return [
        f"{module} → {target}"
        for target in imported(source, module, is_package)
        if not allowed(module, target)
        and not (module.startswith("verl.") and is_empty_package(target))
    ]


def test_every_module_has_a_layer():
    without = [
        name
        for name, path in module_names().items()
        if unit_of(name) is None and name.split(".")[0] != "server" and path.read_text()
    ]
    assert without == []


def test_imports_point_downward():
    modules = module_names()
    assert len(modules) > 20
    found = []
    for name, path in modules.items():
        found += violations(name, path.read_text(), path.name == "__init__.py")
    assert found == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("verl.workers.actor", "from verl.trainer.ppo.batching import TrainBatches"),
        ("verl.workers.actor", "from verl.trainer.ppo import batching"),
        ("verl.workers.actor", "def f():\n    import verl.trainer.ppo.ray_trainer"),
        ("verl.models.fsdp", "from verl.workers import actor"),
        ("verl.models.fsdp", "from verl.data.dataset import PromptOrder"),
        ("verl.models.fsdp", "from ..workers import actor"),
        ("verl.protocol", "from verl.trainer.config.schema import Config"),
        ("verl.trainer.ppo.core_algos", "from verl.protocol import Sample"),
        ("verl.trainer.ppo.metrics", "from verl.trainer.main_ppo import run"),
        ("verl.utils.tracking", "from verl.rewards import compute_score"),
        ("verl.rewards.math_http", "from server.math import client"),
        ("server.math.client", "import verl"),
        ("server.math.server", "from verl.rewards import countdown"),
    ],
)
def test_an_import_upward_is_found(module, source):
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("verl.workers.actor", "from verl.trainer.ppo.core_algos import policy_loss"),
        ("verl.workers.actor", "from verl.trainer.ppo import core_algos"),
        ("verl.workers.rollout.hf", "from .base import RolloutEngine"),
        ("verl.utils.checkpoint", "from verl.trainer.config.schema import TrainerConfig"),
        ("verl.utils.x", "if TYPE_CHECKING:\n    from verl.workers.actor import Policy"),
        ("recipe.dapo.main_dapo", "from verl.trainer.main_ppo import run"),
        ("server.math.client", "from server.math import equivalence\nimport json"),
    ],
)
def test_an_import_downward_is_not(module, source):
    assert violations(module, source) == []


def loaded_by(*modules: str) -> set[str]:
    """Top-level packages in `sys.modules` of a fresh interpreter that imported `modules`."""
    code = f"import sys, {', '.join(modules)}; print(*{{m.split('.')[0] for m in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


HEAVY = {"ray", "vllm", "transformers", "flash_attn"}


def test_the_maths_and_the_schema_load_nothing_heavy():
    loaded = loaded_by("verl.trainer.ppo.core_algos", "verl.protocol", "verl.trainer.config.schema")
    assert {"torch", "verl"} <= loaded
    assert not loaded & HEAVY


def test_configuration_and_protocol_do_not_even_load_torch():
    loaded = loaded_by("verl", "verl.protocol", "verl.trainer.config", "verl.trainer.main_ppo")
    assert "verl" in loaded
    assert not loaded & (HEAVY | {"torch"})


def test_a_trainer_process_never_loads_vllm():
    loaded = loaded_by("verl.trainer.ppo.ray_trainer", "verl.workers.rollout.vllm")
    assert {"ray", "transformers"} <= loaded
    assert "vllm" not in loaded
