"""What `verl.tools.preflight` makes of a machine, and its probes in their form for CPUs."""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.helpers import ROOT, long_test, warm_children, warm_python
from verl.models.packing import packed_attention
from verl.tools import machine, preflight, probes
from verl.tools.machine import GB, GPU
from verl.tools.preflight import FAILURE, OK, WARNING, Check

DEFAULT = GPU("0", "GPU-1", "NVIDIA H100", "Default", 80 * GB, 0.5 * GB)


def gpu(mode: str = "Default", used: float | None = 0.5, total: float | None = 80) -> GPU:
    """With sizes in GB."""
    sizes = [None if size is None else size * GB for size in (total, used)]
    return GPU("1", "GPU-2", "NVIDIA H100", mode, *sizes)


def facts(**changes: object) -> dict[str, object]:
    """What the probe `torch` finds on a machine with two GPUs."""
    found = {"torch": "2.13.0", "cuda": "13.0", "available": True, "gpus": ["H100 (9.0)"] * 2}
    return found | changes


@pytest.mark.parametrize(
    ("driver", "cuda", "available", "status"),
    [
        ("580.65.06", "13.0", True, OK),
        ("580.65.06", "13.0", False, OK),
        ("570.86.15", "13.0", False, FAILURE),
        ("570.86.15", "13.0", True, WARNING),  # NVIDIA's package for forward compatibility
        ("570.86.15", "12.8", False, OK),
        ("525.60.13", "12.8", False, OK),
        ("520.61.05", "12.8", False, FAILURE),
        ("570.86.15", None, False, FAILURE),  # a wheel for CPUs: its replacement will need 580
        (None, "13.0", False, FAILURE),
        (None, "13.0", True, WARNING),
    ],
)
def test_driver(driver: str | None, cuda: str | None, available: bool, status: str) -> None:
    check = preflight.driver_check(driver, cuda, available)
    assert check.status == status
    assert bool(check.remedy) >= (status == FAILURE)


def test_an_old_driver_is_told_what_is_needed() -> None:
    check = preflight.driver_check("570.86.15", "13.0")
    assert "570.86.15, but CUDA 13.0 needs 580" in check.text and "580" in check.remedy


def test_torch() -> None:
    check = preflight.torch_check(facts(), "cuda")
    assert (check.status, check.text) == (OK, "2.13.0, CUDA 13.0: 2 × H100 (9.0)")
    check = preflight.torch_check(facts(torch="2.13.0+cpu", cuda=None), "cuda")
    assert check.status == FAILURE and "2.13.0+cpu is built without CUDA" in check.text
    reason = "The NVIDIA driver on your system is too old\n(found version 12080)."
    check = preflight.torch_check(facts(available=False, reason=reason), "cuda")
    assert check.status == FAILURE and "is too old (found version 12080)" in check.text
    check = preflight.torch_check(None, "cuda", "ImportError: libcudart.so.13")
    assert check.status == FAILURE and "libcudart.so.13" in check.text
    assert preflight.torch_check(facts(cuda=None), "cpu").status == OK


@pytest.mark.parametrize(
    ("mode", "shared", "status"),
    [
        ("Default", True, OK),
        ("Exclusive_Process", True, FAILURE),
        ("Exclusive_Process", False, OK),
        ("Prohibited", True, FAILURE),
        ("Prohibited", False, FAILURE),
    ],
)
def test_compute_mode(mode: str, shared: bool, status: str) -> None:
    check = preflight.compute_mode_check([DEFAULT, gpu(mode)], shared)
    assert check.status == status
    assert (f"GPU 1 {mode}" in check.text) == (status == FAILURE)


@pytest.mark.parametrize(
    ("used", "share", "status"),
    [
        (0.5, None, OK),
        (3, None, WARNING),
        (15, 0.8, WARNING),  # 65 of 80 GB are free, of which 64 are needed
        (17, 0.8, FAILURE),
        (17, None, WARNING),  # who knows what will be run
        (17, 0.5, WARNING),
        (41, 0.5, FAILURE),
        (None, 0.8, OK),  # of that GPU nothing is known
    ],
)
def test_gpu_memory(used: float | None, share: float | None, status: str) -> None:
    check = preflight.gpu_memory_check([DEFAULT, gpu(used=used)], share)
    assert check.status == status
    assert ("GPU 1" in check.text) == (status != OK) and "GPU 0" not in check.text


def test_gpu_memory_that_nobody_tells_is_a_warning() -> None:
    assert preflight.gpu_memory_check([gpu(used=None)]).status == WARNING
    assert preflight.gpu_memory_check([]).status == WARNING


def test_compiler(tmp_path: Path) -> None:
    assert preflight.compiler_check(None).status == FAILURE
    compiler = machine.find_compiler()
    if compiler is None:
        pytest.skip("needs gcc or clang")
    (tmp_path / "Python.h").touch()
    assert machine.compile_problem(compiler, str(tmp_path)) is None
    (tmp_path / "Python.h").unlink()
    problem = machine.compile_problem(compiler, str(tmp_path))
    assert problem and "Python.h" in problem
    check = preflight.compiler_check(compiler, problem)
    assert check.status == FAILURE and "python3-dev" in check.remedy
    assert machine.compile_problem("/no/compiler")
    assert preflight.compiler_check(compiler, None).status == OK


def test_no_compiler_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert machine.find_compiler() is None
    monkeypatch.setenv("CC", "/my/cc")
    assert machine.find_compiler() == "/my/cc"


@pytest.mark.parametrize(
    ("settings", "problem", "ipc", "status"),
    [
        ("", "Operation not permitted", True, OK),
        ("max_split_size_mb:512", "Operation not permitted", True, OK),
        ("expandable_segments:False", "Operation not permitted", True, OK),
        ("expandable_segments:True", None, True, OK),
        ("expandable_segments:True", "Operation not permitted", True, WARNING),
        ("max_split_size_mb:512,expandable_segments:True", "Function not …", True, WARNING),
        ("expandable_segments:True", "Operation not permitted", False, OK),
    ],
)
def test_expandable_segments(settings: str, problem: str | None, ipc: bool, status: str) -> None:
    check = preflight.allocator_check(settings, problem, "1", ipc)
    assert check.status == status
    if status == FAILURE:
        assert str(problem) in check.text and "ptrace_scope=1" in check.text
        assert "weight_transfer=host" in check.remedy


def test_pidfd_getfd_is_really_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that isn't open can't be taken: the error is that of the system call itself."""
    usual = machine.getfd_problem()
    if usual is not None:
        pytest.skip(f"not allowed here: {usual}")
    monkeypatch.setattr(machine, "GETFD", machine.GETFD.replace("438, file, 0", "438, file, 9999"))
    assert machine.getfd_problem() == os.strerror(9)  # EBADF


def test_disk() -> None:
    def status(free: float) -> str:
        return preflight.disk_check("checkpoints", "/data", free * GB, 50 * GB).status

    assert [status(free) for free in (0.5, 2, 49, 51)] == [FAILURE, WARNING, WARNING, OK]
    remedy = preflight.disk_check("temporary files", "/tmp", 0, GB).remedy
    assert "TMPDIR" in remedy and "default_local_dir" not in remedy


def test_disk_of_a_folder_that_will_be_made(tmp_path: Path) -> None:
    future = machine.free_disk(tmp_path / "not" / "yet")
    assert future == pytest.approx(machine.free_disk(tmp_path), rel=0.1)


def test_shared_memory() -> None:
    """64 MB is what Docker gives."""

    def status(free: float, gpus: int) -> str:
        return preflight.shared_memory_check(64 * GB, free * GB, gpus).status

    assert [status(0.064, gpus) for gpus in (0, 1, 2)] == [WARNING, WARNING, FAILURE]
    assert [status(2, 8), status(16, 8)] == [WARNING, OK]


def test_host_memory_and_open_files() -> None:
    assert preflight.host_memory_check(100 * GB, 8).status == WARNING
    assert preflight.host_memory_check(100 * GB, 4).status == OK
    assert preflight.host_memory_check(5 * GB, 0).status == OK
    assert preflight.open_files_check(1024).status == WARNING
    assert preflight.open_files_check(65536).status == OK


# --- What is read of the machine ------------------------------------------------------------------

SMI = """#!/bin/sh
case "$1" in
  *driver_version) printf '580.65.06\\n580.65.06\\n' ;;
  *compute_mode*)
    echo "0, GPU-aaaa, NVIDIA H100 80GB HBM3, Default, 81559, 4"
    echo "1, GPU-bbbb, NVIDIA H100 80GB HBM3, Exclusive_Process, [N/A], [N/A]" ;;
esac
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that answers as nvidia-smi does with two GPUs, first on PATH."""
    (program := tmp_path / "bin" / "nvidia-smi").parent.mkdir()
    program.write_text(SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return program


@pytest.mark.parametrize(
    ("visible", "indices"), [(None, "01"), ("1", "1"), ("GPU-aa", "0"), ("0, 1", "01"), ("", "")]
)
def test_gpus(
    smi: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, indices: str
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert "".join(found.index for found in machine.read_gpus()) == indices


def test_what_nvidia_smi_says(smi: Path) -> None:
    assert machine.driver_version() == "580.65.06"
    first, second = machine.read_gpus()
    name = "NVIDIA H100 80GB HBM3"
    assert first == GPU("0", "GPU-aaaa", name, "Default", 81559 * 2**20, 4 * 2**20)
    assert second == GPU("1", "GPU-bbbb", name, "Exclusive_Process", None, None)
    smi.write_text("#!/bin/sh\necho Failed to initialize NVML; exit 18\n")
    assert machine.read_gpus() == []


# --- Processes that don't come back ---------------------------------------------------------------


def probe(code: str, limit: float = 20) -> tuple[Check, str]:
    return preflight.probe_check("probe", [sys.executable, "-c", code], limit, "mend it")


def test_a_probe_that_works() -> None:
    check, output = probe("print('much'); print('2 ranks')")
    assert (check, output) == (Check("probe", OK, "2 ranks"), "much\n2 ranks\n")


def test_a_probe_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    late = tmp_path / "late"
    child = f"import time; time.sleep(3); open({str(late)!r}, 'w')"
    code = (
        "import subprocess, sys, time; print('begun', flush=True); "
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    start = time.monotonic()
    check, output = probe(code, limit=1)
    assert time.monotonic() - start < 5
    assert check == Check("probe", FAILURE, "not done after 1 s; last output: begun", "mend it")
    assert output == "begun\n"
    time.sleep(3)
    assert not late.exists()


def test_a_probe_that_crashes() -> None:
    check, _ = probe("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert check.status == FAILURE and "crashed (SIGSEGV)" in check.text


def test_a_probe_that_fails_names_the_error_in_one_line() -> None:
    code = "import torch; raise torch.OutOfMemoryError('CUDA out of memory\\nTried to allocate')"
    check, output = probe(code)
    assert check.text == "torch.OutOfMemoryError: CUDA out of memory"
    assert "Traceback" in output and "Tried to allocate" in output


# --- The whole ------------------------------------------------------------------------------------


def run(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    return subprocess.run(
        [warm_python(), "-m", "verl.tools.preflight", *arguments],
        env=environment | {"PYTHONPATH": str(ROOT)} | warm_children() | variables,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


@long_test
def test_all_probes_on_the_cpu(tmp_path: Path) -> None:
    """All of them really run, vLLM too where it is installed."""
    file = tmp_path / "found.json"
    secrets = {"WANDB_API_KEY": "0123456789abcdef", "HF_TOKEN": 'hf_say"so'}
    done = run(
        "--device=cpu",
        f"--report={file}",
        cwd=tmp_path,
        **secrets,
        VLLM_API_KEY="another-secret",
        VLLM_LOGGING_LEVEL="INFO",
        NCCL_DEBUG="INFO",
        HF_ENDPOINT="https://me:password@mirror.example/x",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = file.read_text()
    report = json.loads(text)
    checks = {check["name"]: check for check in report["checks"]}
    assert {"share", "all-reduce", "attention", "vllm"} <= checks.keys()
    assert all(check["status"] != FAILURE for check in checks.values())
    assert "2 process(es)" in checks["all-reduce"]["text"]
    if find_spec("vllm"):
        assert "generates the same" in checks["vllm"]["text"]
    lines = [line for line in done.stdout.splitlines() if "→" not in line]
    assert len(lines) == len(checks) + 2 and lines[-1].endswith(str(file))
    assert report["versions"]["torch"] and report["versions"]["uname"].startswith("Linux")
    assert report["environment"]["NCCL_DEBUG"] == "INFO"
    assert report["environment"]["HF_ENDPOINT"] == "https://<user>@mirror.example/x"
    for secret in ("0123456789abcdef", "say", "another-secret", "password"):
        assert secret not in text
    assert list(tmp_path.iterdir()) == [file]


def test_a_wrong_attention_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lets a sequence see those before it."""
    right = packed_attention
    assert "is SDPA" in probes.attention("cpu")

    def wrong(*args: Any, **options: Any) -> Any:
        return right(*args, **options | {"sequence_lengths": [304]})

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "packed_attention", wrong)
    with pytest.raises(RuntimeError, match="differs from SDPA"):
        probes.attention("cpu")


def test_a_secret_in_the_output_of_a_probe_stays_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", 'top"secret')
    found = preflight.Preflight("cpu", None, outputs={"vllm": 'Authorization: Bearer top"secret'})
    assert "secret" not in found.report([], "")
    assert "Bearer <MY_TOKEN>" in found.report([], "")


def test_quick_on_the_cpu_says_one_line_and_leaves_no_file(tmp_path: Path) -> None:
    start = time.monotonic()
    done = run("--quick", "--device=cpu", "a.b=c", "--config-name=x", cwd=tmp_path)
    assert done.returncode == 0 and "checks passed" in done.stdout
    assert not any(line.startswith(OK) for line in done.stdout.splitlines())
    assert time.monotonic() - start < 30 and not list(tmp_path.iterdir())


def test_a_machine_whose_torch_has_no_cuda(smi: Path, tmp_path: Path) -> None:
    """nvidia-smi shows GPUs, and torch is the wheel for CPUs: a run would be there."""
    import torch

    if torch.version.cuda:
        pytest.skip("needs the wheel for CPUs")
    done = run("--quick", cwd=tmp_path)
    assert done.returncode == 1
    assert "is built without CUDA\n" in done.stdout and "compute mode" in done.stdout
    report = json.loads((tmp_path / "preflight.json").read_text())
    assert report["driver"] == "580.65.06" and len(report["gpus"]) == 2
    assert "checks failed" in report["verdict"]


def test_the_verdict() -> None:
    checks = [Check("a", OK, ""), Check("b", WARNING, ""), Check("c", OK, "")]
    assert preflight.verdict_of(checks) == "3 checks passed, 1 with a warning"
    assert "1 of 4 checks failed" in preflight.verdict_of([*checks, Check("d", FAILURE, "")])


def test_what_a_run_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = "actor_rollout_ref.rollout"
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    given = ["--quick", f"{rollout}.name=vllm", f"{rollout}.gpu_memory_utilization=0.8"]
    given.append("trainer.n_gpus_per_node=4")

    def read(*overrides: str) -> preflight.Preflight:
        return preflight.read_arguments([*given, *overrides])[1]

    usual = read()
    assert (usual.share, usual.shared, usual.ipc, usual.checkpoints) == (0.8, True, True, ".")
    assert usual.count == 4
    assert read(f"{rollout}.gpu_memory_utilization=0.3").share == 0.3  # the last one counts
    assert read(f"{rollout}.weight_transfer=host").ipc is False
    hf = read(f"{rollout}.name=hf")
    assert (hf.share, hf.shared, hf.ipc) == (None, True, False)
    split = read("trainer.rollout_gpus_per_node=2")
    assert (split.shared, split.ipc, split.count) == (False, False, 6)
    assert read("trainer.device=cpu").device == "cpu"
    folder = "trainer.default_local_dir='/data/${trainer.project_name}/x'"
    assert read(folder).checkpoints == "/data/"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert read().share is None  # who knows on which machine


def test_wrong_options_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        preflight.read_arguments(["--skip-vlm"])
    assert "there is no option --skip-vlm" in capsys.readouterr().err


def test_a_report_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "preflight.json").mkdir()  # as root may write into any folder
    place = Path(preflight.write_report("{}", None))
    assert place.read_text() == "{}" and place.parent != tmp_path
    place.unlink()
