"""`bare.py` in its small form on a CPU, without the packages that it must do without."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen

from tests.gpu import bare, bare_common
from tests.gpu.bare_common import Sizes, Wrong, require
from tests.helpers import ROOT
from verl.models.packing import packed_varlen, sequence_kwargs

MISSING = ("ray", "vllm", "hydra", "wandb", "omegaconf", "psutil", "pandas", "pyarrow")
HIDE = f"""
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, *args):
        return None if name.partition(".")[0] in {MISSING} else super().find_spec(name, *args)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What it writes."""
    folder: Path = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(HIDE)  # also for the process that it starts
    # By itself it takes 15 s.
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tests/gpu/bare.py", "--small", "--device", "cpu"]
    command += ["--out", str(folder / "out.json")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    assert all(f"{name}: ok: " in done.stdout for name in found["sections"])
    return found


def figures(report: dict[str, Any], name: str) -> dict[str, Any]:
    """Of a section."""
    found: dict[str, Any] = report["sections"][name]["figures"]
    return found


def test_every_section_runs_without_the_missing_packages(report: dict[str, Any]) -> None:
    assert len(report["sections"]) == 13
    assert [name for name, found in report["sections"].items() if not found["ok"]] == []
    assert not {"ray", "vllm"} & {*figures(report, "environment")["packages"]}
    assert any("psutil is not installed" in note for note in report["notes"])


def test_gradients_agree(report: dict[str, Any]) -> None:
    found = figures(report, "gradients")
    assert found["float32: packed against padded"] < 1e-5
    # bfloat16 rounds to 8 bits, in every layer anew
    assert 1e-4 < found["packed: bfloat16 against float32"] < 2e-2
    assert 1e-5 < found["bfloat16: packed against padded"] < 2e-2


def test_what_leaves_the_actor_is_equal(report: dict[str, Any]) -> None:
    sent, saved = figures(report, "weights")["host"], figures(report, "checkpoint")
    assert sent["equal"] and sent["bytes"] > 4 * 320 * 64  # the embeddings alone
    assert saved["equal"] and saved["bytes"] > 3 * sent["bytes"]  # with two moments
    assert figures(report, "generation")["tokens"] == 8 * 8
    assert figures(report, "generation")["log-probabilities, mean difference"] < 1e-5


def test_an_update_has_a_rate_and_memory_beside_the_estimate(report: dict[str, Any]) -> None:
    for section in ("update", "update, offloaded"):
        for name in ("checkpointing on", "checkpointing off"):
            found = figures(report, section)[name]
            assert found["tokens/s"] > 0 and found["seconds of the optimizer"] > 0
            assert found["tflops"] > 0 and found["mfu"] is None  # of a CPU
            assert 0.4 < found["peak bytes"] / found["estimated bytes"] < 1.25
    kept = [figures(report, "update")[f"checkpointing {x}"]["peak bytes"] for x in ("on", "off")]
    assert kept[0] < kept[1]
    assert 0.8 < figures(report, "update")["coefficient of variation"] < 1.1


def test_the_head_is_measured(report: dict[str, Any]) -> None:
    assert max(figures(report, "head")["tiles"]["relative errors"]) < 1e-5
    moved = figures(report, "precision of the head")
    assert 1e-4 < moved["mean"] < moved["max"] < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_runs_on_a_gpu() -> None:
    command = [sys.executable, "tests/gpu/bare.py", "--small", "--device", "cuda"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_section_that_fails_is_reported(tmp_path: Path) -> None:
    command = [sys.executable, "tests/gpu/bare.py", "--small", "--device", "cpu", "--minutes", "0"]
    command += ["--out", str(tmp_path / "out.json"), "--only", "environment", "head"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "environment: FAILED: TimeoutError" in done.stdout
    sections = json.loads((tmp_path / "out.json").read_text())["sections"]
    assert [*sections] == ["environment", "head"]  # it went on
    assert all("Traceback" in found["error"] and not found["ok"] for found in sections.values())


def test_nan_is_out_of_all_bounds() -> None:
    with pytest.raises(Wrong, match="too much"):
        require(float("nan") < 1, "too much")


def test_a_smaller_card_gets_fewer_layers() -> None:
    """16 bytes of each of 3.09 billion parameters are 46 GiB: 48 GB can't hold all 36 layers."""
    large, small = (bare_common.Run(torch.device("cuda"), Sizes(), Path(), 0) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bare_common, "device_memory", lambda _: 79 * 2**30)
        assert bare_common.fitting_layers(large) == 36
        patch.setattr(bare_common, "device_memory", lambda _: 47 * 2**30)
        assert bare_common.fitting_layers(small) == 18


def test_an_older_torch_gets_the_arguments_that_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its variable-length attention takes fewer heads of keys without being told."""
    calls = []

    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
        calls.append((query.shape, key.shape, max_q, window_size))
        return query

    def newer(*, scale, window_size, enable_gqa):
        raise AssertionError

    monkeypatch.setattr(varlen, "varlen_attn", newer)
    assert bare.adapt_varlen() is None and varlen.varlen_attn is newer
    monkeypatch.setattr(varlen, "varlen_attn", older)
    assert "lacks enable_gqa, scale" in bare.adapt_varlen()
    q, kv = torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 5, 8)
    options = sequence_kwargs([2, 3], torch.device("cpu")) | {"scaling": 8**-0.5}
    packed_varlen(None, q, kv, kv, **options)
    assert calls == [((5, 4, 8), (5, 2, 8), 3, (-1, 0))]
