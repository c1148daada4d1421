"""Which members of a series run (conftest.py)."""

import subprocess
from pathlib import Path

import pytest

from tests.helpers import ROOT, warm_python

MODULE = """
import pytest

@pytest.mark.series(2)
@pytest.mark.parametrize("i", range(4))
def test_one(i): pass

@pytest.mark.series(3, "named")
@pytest.mark.parametrize("i", [0, pytest.param(1, marks=pytest.mark.always)])
def test_two(i): pass

@pytest.mark.series(3, "named")
@pytest.mark.parametrize("i", range(8))
def test_three(i): pass

def test_four(): pass
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("series") / "test_members.py"
    path.write_text(MODULE)
    return path


def collected(module: Path, *options: str) -> list[str]:
    command = [warm_python(), "-m", "pytest", "-p", "tests.conftest", "--collect-only", "-q"]
    done = subprocess.run(
        [*command, "--rootdir", str(module.parent), str(module), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]


def test_as_many_as_the_mark_says_by_the_seed(module: Path) -> None:
    samples = [collected(module, "--sample-seed", seed) for seed in ("a", "b", "a")]
    assert samples[0] == samples[2] != samples[1]
    for names in samples:
        assert sum(name.startswith("test_one") for name in names) == 2
        assert sum(name.startswith(("test_two[0]", "test_three")) for name in names) == 3
        assert {"test_two[1]", "test_four"} <= {*names} and len(names) == 7


def test_all_members_run_on_request(module: Path) -> None:
    assert len(collected(module, "--all")) == 15
