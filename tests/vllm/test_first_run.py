"""A rung of train_scripts/first_run.sh with vLLM."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers import starting_warm
from verl.tools.first_run import climb, read_passed
from verl.tools.rungs import TABLE, FirstRun, Job


def test_a_rung_with_vllm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rung = replace(TABLE[2], jobs=(Job(1),))
    first = FirstRun(tmp_path / "out", True, 1, (), (*TABLE[:2], rung))
    with starting_warm():
        assert climb(first, 2) == 0, capsys.readouterr().out
        done = read_passed(first.folder(rung), first.commands(rung))
    assert done is not None and 0 < done.findings.figures["difference"] < 1e-5
