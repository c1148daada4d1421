"""The engine's arguments of published scripts, as vLLM's code for CUDA resolves them: of a daily
sample, or of all with --all. With CUDA_WHEELS=FOLDER also by the package for CUDA itself, whose
wheel (330 MB) is kept there:

    CUDA_WHEELS=/tmp/wheels .venv/bin/python -m pytest tests/vllm/test_cuda_config.py --all
"""

import json
import os
import random
import re
import subprocess
import sys
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import ROOT, make_tokenizer, warm_children, warm_python
from tests.scripts.test_scripts import STEERING
from tests.tools.test_memory_emulated import QWEN_3B

SCRIPTS = sorted(
    path for where in ("train_scripts", "recipe/dapo") for path in (ROOT / where).glob("*-3b-*.sh")
)
MORE = {
    "graphs": [
        "actor_rollout_ref.rollout.enforce_eager=False",
        "actor_rollout_ref.rollout.cudagraph_capture_sizes=[1,8,24]",
        "actor_rollout_ref.rollout.enable_prefix_caching=False",
    ],
    "awake": ["actor_rollout_ref.rollout.free_cache_engine=False"],
    "whole": [
        "actor_rollout_ref.rollout.enable_chunked_prefill=False",
        "actor_rollout_ref.rollout.max_num_batched_tokens=32000",
        "actor_rollout_ref.rollout.max_num_seqs=96",
        "actor_rollout_ref.rollout.gpu_memory_utilization=0.625",
        "actor_rollout_ref.rollout.seed=7",
        "+actor_rollout_ref.rollout.engine_kwargs.vllm.block_size=32",
    ],
    "parallel": ["actor_rollout_ref.rollout.tensor_model_parallel_size=2"],
}
"""Overrides of the first script."""


@pytest.fixture(scope="module")
def configurations(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Name → resolved configuration, with a model of 3B's shapes."""
    folder: Path = tmp_path_factory.mktemp("scripts")
    model = QWEN_3B | {"architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 32768}
    (folder / "config.json").write_text(json.dumps(model | {"torch_dtype": "bfloat16"}))
    make_tokenizer().save_pretrained(folder)
    env = {key: value for key, value in os.environ.items() if key not in STEERING}
    env |= {"DRY_RUN": "quiet", "PYTHON": warm_python(), "MODEL_PATH": str(folder)}
    env |= warm_children()

    def resolve(name: str, script: Path, overrides: list[str]) -> tuple[str, Path]:
        command = ["bash", str(script), *overrides]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (folder / f"{name}.yaml").write_text(done.stdout)
        return name, folder / f"{name}.yaml"

    scripts = random.Random(request.config.getoption("sample_seed")).sample(SCRIPTS, 4)
    if request.config.getoption("all"):
        scripts = SCRIPTS
    todo = [(path.stem, path, []) for path in scripts]
    todo += [(name, SCRIPTS[0], overrides) for name, overrides in MORE.items()]
    with ThreadPoolExecutor(2) as threads:
        return dict(threads.map(lambda job: resolve(*job), todo))


@pytest.fixture(scope="module", params=["installed", "wheel"])
def engines(request: pytest.FixtureRequest, configurations: dict[str, Path], tmp_path_factory):
    """Name → vLLM's own configuration, by the installed package or by that for CUDA."""
    path = str(ROOT)
    if request.param == "wheel":
        if not (wheels := os.environ.get("CUDA_WHEELS")):
            pytest.skip("CUDA_WHEELS names no folder for the wheel")
        path = f"{unpacked(Path(wheels), tmp_path_factory.mktemp('vllm'))}:{path}"
    command = [sys.executable, "-m", "tests.vllm.cuda_config", *map(str, configurations.values())]
    env = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    env.pop("VLLM_TARGET_DEVICE", None)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return dict(zip(configurations, found, strict=True))


def unpacked(wheels: Path, folder: Path) -> Path:
    """The package for CUDA, without what it needs; downloaded if it isn't in `wheels`."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = [x for x in extras["optional-dependencies"]["gpu"] if x.startswith("vllm==")]
    name = wanted.replace("==", "-")
    if not list(wheels.glob(f"{name}-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, "-d", str(wheels), wanted], check=True)
    (wheel,) = wheels.glob(f"{name}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_there_are_eighteen_scripts() -> None:
    assert len(SCRIPTS) == 18


def test_the_engine_is_what_the_script_says(
    engines: dict[str, Any], configurations: dict[str, Path]
) -> None:
    for name, path in configurations.items():
        config, engine = yaml.safe_load(path.read_text()), engines[name]
        rollout, data = config["actor_rollout_ref"]["rollout"], config["data"]
        assert engine["device"] == "cuda" and engine["dtype"] == "torch.bfloat16"
        assert engine["max_model_len"] == data["max_prompt_length"] + data["max_response_length"]
        assert engine["sequences"] == rollout["max_num_seqs"]
        assert engine["batched_tokens"] == rollout["max_num_batched_tokens"]
        assert engine["chunked_prefill"] == rollout["enable_chunked_prefill"]
        assert engine["share"] == rollout["gpu_memory_utilization"]
        assert engine["sleep"] == rollout["free_cache_engine"]
        assert engine["eager"] == rollout["enforce_eager"]
        assert (engine["graphs"] == "NONE") == rollout["enforce_eager"]
        assert engine["parallel"] == rollout["tensor_model_parallel_size"]
        assert engine["cache_bytes"] is None  # the share decides
        assert engine["prefix_caching"] == rollout["enable_prefix_caching"]
        assert engine["seed"] == rollout["seed"]
        assert engine["logprobs_mode"] == "processed_logprobs"
        assert engine["transfer"] == "verl"
        assert re.search("ray" if engine["parallel"] > 1 else "uni", engine["executor"].lower())
    assert engines["parallel"]["variables"]["VLLM_RAY_BUNDLE_INDICES"] == "0,1"
    assert not engines["awake"]["sleep"] and not engines["graphs"]["eager"]
    assert engines["graphs"]["graph_sizes"] == [1, 8, 24]
    whole = engines["whole"]
    assert (whole["batched_tokens"], whole["sequences"], whole["share"]) == (32000, 96, 0.625)
    assert (whole["seed"], whole["block_size"], whole["chunked_prefill"]) == (7, 32, False)
