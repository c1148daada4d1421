"""Imports point downward only, and the lowest modules import nothing heavy."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ORDER = (
    ("config", "protocol"),
    ("algorithms",),
    ("utils",),
    ("data", "rewards", "models", "utils.reward_score"),
    ("rollout", "cluster", "weight_sync"),
    ("trainer",),
    ("tools",),
)
"""Packages and modules of `verl`, from the ground up. Each imports what stands below it, or beside
it in its own place, and nothing else; `recipe` stands on top. verl's name for the rewards,
`utils.reward_score`, stands beside them."""
LAYERS = {f"verl.{name}": i for i, names in enumerate(ORDER) for name in names}
LAYERS["recipe"] = len(ORDER)


def unit_of(module: str) -> str | None:
    """The key of `LAYERS` that `module` belongs to: the longest."""
    units = [u for u in LAYERS if module == u or module.startswith(u + ".")]
    return max(units, key=len, default=None)


def imported(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Names of all modules that `source` imports, within functions and for types, too.

    `from package import name` yields both, as `name` may be a module.
    """
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
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
    if theirs is None:  # not ours, or the empty package `verl`
        return True
    return mine is not None and LAYERS[theirs] <= LAYERS[mine]


def module_names() -> dict[str, Path]:
    """All modules of the three code folders."""
    files = [path for top in ("verl", "recipe", "server") for path in (ROOT / top).rglob("*.py")]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in files
    }


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """`importer → target` for each import that points up or sideways."""
    return [
        f"{module} → {target}"
        for target in imported(source, module, is_package)
        if not allowed(module, target)
    ]


def test_every_module_has_a_layer():
    names = [name for name in module_names() if name.split(".")[0] != "server"]
    assert [name for name in names if unit_of(name) is None] == ["verl"]


def test_imports_point_downward():
    modules = module_names()
    assert len(modules) > 20
    found = []
    for name, path in modules.items():
        found += violations(name, path.read_text(), path.name == "__init__.py")
    assert found == []


def test_no_two_modules_import_each_other_not_even_through_others():
    paths = module_names()
    imports = {
        name: {t for t in imported(path.read_text(), name, path.name == "__init__.py")}
        & paths.keys()
        for name, path in paths.items()
    }
    done: set[str] = set()
    while ready := {name for name in imports.keys() - done if imports[name] - {name} <= done}:
        done |= ready
    assert sorted(imports.keys() - done) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("verl.models.policy", "from verl.trainer.ppo.batches import Batches"),
        ("verl.models.policy", "from verl.trainer.ppo import batches"),
        ("verl.models.policy", "def f():\n    import verl.trainer.ppo.ray_trainer"),
        ("verl.models.fsdp", "from verl import cluster"),
        ("verl.models.fsdp", "from ..rollout import hf"),
        ("verl.models.x", "if TYPE_CHECKING:\n    from verl.weight_sync import WeightSync"),
        ("verl.config.load", "from verl.tools import memory_plan"),
        ("verl.protocol", "from verl.algorithms.weights import response_weights"),
        ("verl.utils.samples", "from verl.data.dataset import load_prompts"),
        ("verl.utils.samples", "from verl.utils.reward_score import gsm8k"),
        ("verl.trainer.main_ppo", "from verl.tools import report"),
        ("verl.rewards.math", "from server.math import client"),
        ("server.math.client", "import verl"),
        ("server.math.server", "from verl.rewards import countdown"),
        ("server.math.server", "from ...verl import protocol"),
    ],
)
def test_an_import_upward_is_found(module, source):
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("verl.models.policy", "from verl.algorithms.losses import LOSSES"),
        ("verl.models.policy", "from verl import protocol"),
        ("verl.rollout.hf", "from .engine import RolloutEngine"),
        ("verl.weight_sync", "from verl.rollout.pool import EnginePool"),
        ("verl.utils.reward_score.gsm8k", "from verl.rewards import gsm8k"),
        ("verl.tools.report", "from verl.trainer.ppo.metrics import validation_scores"),
        ("recipe.dapo.main_dapo", "from verl.trainer.main_ppo import run"),
        ("server.math.client", "from server.math import equivalence\nimport json"),
        ("server.math.judge", "from . import equivalence\nimport json"),
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
    loaded = loaded_by(
        "verl.trainer.ppo.core_algos",
        *(f"verl.algorithms.{name}" for name in ("weights", "advantages", "losses", "kl")),
        "verl.protocol",
        "verl.config.schema",
    )
    assert {"torch", "verl"} <= loaded
    assert not loaded & HEAVY


def test_configuration_and_protocol_do_not_even_load_torch():
    loaded = loaded_by("verl", "verl.protocol", "verl.config.load", "verl.trainer.main_ppo")
    assert "verl" in loaded
    assert not loaded & (HEAVY | {"torch"})


def test_a_trainer_process_never_loads_vllm():
    loaded = loaded_by("verl.trainer.ppo.ray_trainer", "verl.rollout.vllm")
    assert {"ray", "transformers"} <= loaded
    assert "vllm" not in loaded
