"""The preflight where a GPU is: each check and each probe passes on a machine that can train."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def run(tmp_path: Path, *arguments: str, **variables: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Its status, and its checks by name."""
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "verl.tools.preflight", f"--report={file}", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    status = subprocess.run(command, env=environment, cwd=tmp_path, timeout=900).returncode
    report = json.loads(file.read_text())
    assert report["device"] == "cuda" and report["driver"]
    return status, {check["name"]: check for check in report["checks"]}


def test_all_checks_pass(tmp_path: Path) -> None:
    status, checks = run(tmp_path)
    assert status == 0, checks
    assert {"driver", "torch", "share", "all-reduce", "attention", "vllm"} <= checks.keys()
    assert torch.cuda.get_device_name() in checks["torch"]["text"]
    assert f"NCCL adds up over {torch.cuda.device_count()}" in checks["all-reduce"]["text"]
    assert "packed_varlen is SDPA" in checks["attention"]["text"]
    assert "sleeps" in checks["vllm"]["text"] or "not installed" in checks["vllm"]["text"]


def test_expandable_segments_are_judged_as_the_real_probe_does(tmp_path: Path) -> None:
    setting = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    _, checks = run(tmp_path, "--skip-vllm", **setting)
    assert (checks["allocator"]["status"] == "ok") == (checks["share"]["status"] == "ok")
