"""Whether a run on GPUs can work on this machine: `python -m verl.tools.preflight`. One line for
each check, a remedy for each that fails, a file to attach to a bug report. Status 1 if one fails.

The scripts call it with --quick and their overrides before a run, `bash setup.sh gpu` without.
"""

import argparse
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from verl.tools import machine
from verl.tools.machine import GB, GPU

OK, WARNING, FAILURE = "ok", "warning", "failure"
MINIMUM_DRIVER = {11: 450, 12: 525, 13: 580}
"""For each release of CUDA, the oldest driver:
https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html"""
SHARE = 0.8
"""`gpu_memory_utilization` of the scripts."""


@dataclass(frozen=True, slots=True)
class Check:
    """What was found, for instance `Check("driver", FAILURE, "there is none", "install it")`."""

    name: str
    status: str  # OK, WARNING or FAILURE
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        """A line, and another one for the remedy."""
        line = f"{self.status:<8} {self.name:<16} {self.text}"
        return f"{line}\n{'':<25} → {self.remedy}" if self.remedy else line


def driver_check(driver: str | None, cuda: str | None, available: bool = False) -> Check:
    """Whether NVIDIA's driver, such as 580.65.06, is new enough for torch's CUDA, such as 13.0.
    `available`: torch has used a GPU, so that it is, whatever its number."""
    if driver is None:
        text = "neither nvidia-smi nor /proc/driver/nvidia names one"
        remedy = "install NVIDIA's driver, or give the container its GPUs (docker run --gpus all)"
        return Check("driver", WARNING if available else FAILURE, text, remedy)
    major = int(cuda.split(".")[0]) if cuda else max(MINIMUM_DRIVER)
    needed = MINIMUM_DRIVER.get(major, max(MINIMUM_DRIVER.values()))
    if int(driver.split(".")[0]) >= needed:
        return Check("driver", OK, driver)
    text = f"{driver}, but CUDA {cuda or major} needs {needed}"
    if available:
        return Check("driver", WARNING, f"{text}: works here by forward compatibility")
    return Check("driver", FAILURE, text, f"install NVIDIA's driver {needed} or a newer one")


def torch_check(facts: dict[str, Any] | None, device: str, problem: str = "") -> Check:
    """`facts`: those of `verl.tools.probes`, None if they couldn't be had, for which `problem`."""
    if facts is None:
        remedy = "mend the environment with bash setup.sh gpu; if it is whole, reset the GPUs"
        return Check("torch", FAILURE, problem, remedy)
    if device == "cpu":
        return Check("torch", OK, f"{facts['torch']}, on the CPU")
    if facts["cuda"] is None:
        remedy = "take PyTorch's CPU index out of pip's settings, delete .venv, bash setup.sh gpu"
        return Check("torch", FAILURE, f"{facts['torch']} is built without CUDA", remedy)
    if not facts["available"]:
        reason = " ".join(facts.get("reason", "no GPU").split())
        remedy = "mend what torch names; in a container, run it with docker run --gpus all"
        return Check("torch", FAILURE, f"{facts['torch']} finds no GPU: {reason}", remedy)
    kinds = {name: facts["gpus"].count(name) for name in facts["gpus"]}
    found = ", ".join(f"{count} × {name}" for name, count in kinds.items())
    return Check("torch", OK, f"{facts['torch']}, CUDA {facts['cuda']}: {found}")


def compute_mode_check(gpus: Sequence[GPU], shared: bool = True) -> Check:
    """Whether processes may use each GPU; if `shared`, a rank and its engine at once."""
    allowed = ("Default",) if shared else ("Default", "Exclusive_Process")
    others = [f"GPU {g.index} {g.compute_mode}" for g in gpus if g.compute_mode not in allowed]
    if not others:
        return Check("compute mode", OK, ", ".join(sorted({g.compute_mode for g in gpus})))
    text = f"{', '.join(others)}: a rank and its engine can't share a GPU"
    return Check("compute mode", FAILURE, text, "sudo nvidia-smi -c DEFAULT")


def gpu_memory_check(gpus: Sequence[GPU], share: float | None = None) -> Check:
    """Whether the GPUs are free. vLLM starts only where its `share` of the memory is; that of a run
    if it is known: less is a failure then."""
    known = [(g, g.used, g.total) for g in gpus if g.used is not None and g.total]
    if not known:
        return Check("GPU memory", WARNING, "nvidia-smi doesn't say how much is free")
    full = [(g, used) for g, used, total in known if total - used < (share or SHARE) * total]
    busy = full or [(g, used) for g, used, _ in known if used > 2 * GB]
    if not busy:
        least = min(total - used for _, used, total in known)
        return Check("GPU memory", OK, f"{least / GB:.0f} GB free on each GPU, or more")
    held = ", ".join(f"GPU {g.index}: {used / GB:.0f} GB" for g, used in busy)
    text = f"other processes hold {held}"
    if full:
        text += f"; vLLM starts where {share or SHARE:.0%} are free"
    status = FAILURE if full and share else WARNING
    remedy = "end those processes (nvidia-smi lists them), or choose others: CUDA_VISIBLE_DEVICES"
    return Check("GPU memory", status, text, remedy)


def compiler_check(compiler: str | None, problem: str | None = None) -> Check:
    """vLLM samples with Triton, which compiles C when it runs. `problem`: for Python.h."""
    remedy = "apt install gcc libc6-dev python3-dev (or name a compiler in CC)"
    if compiler is None:
        return Check("C compiler", FAILURE, "neither gcc nor clang; vLLM needs one", remedy)
    if problem is None:
        return Check("C compiler", OK, f"{compiler}, with Python.h")
    return Check("C compiler", FAILURE, f"{compiler} can't compile Python.h: {problem}", remedy)


def allocator_check(
    settings: str, problem: str | None, scope: str | None, ipc: bool = True
) -> Check:
    """Torch's allocator (`settings`: PYTORCH_CUDA_ALLOC_CONF) and CUDA IPC, if weights go that way.
    With expandable segments it takes pidfd_getfd. `problem`: why that fails; `scope`: Yama's
    ptrace_scope."""
    if not (ipc and re.search(r"expandable_segments:\s*true", settings, re.IGNORECASE)):
        return Check("allocator", OK, settings or "as torch has it")
    if problem is None:
        return Check("allocator", OK, f"{settings}, and pidfd_getfd works")
    text = f"{settings}, but pidfd_getfd fails: {problem} (ptrace_scope={scope})"
    remedy = (
        "a run's actor leaves expandable_segments out for CUDA IPC; docker run "
        "--cap-add=SYS_PTRACE keeps it"
    )
    return Check("allocator", WARNING, text, remedy)


def disk_check(name: str, folder: str, free: float, wanted: float) -> Check:
    """`free` and `wanted` bytes where `folder` is."""
    text = f"{free / GB:.1f} GB free for {folder}"
    if free >= wanted:
        return Check(name, OK, text)
    key = "trainer.default_local_dir" if name == "checkpoints" else "TMPDIR and RAY_TMPDIR"
    remedy = f"make room for {wanted / GB:.0f} GB, or name another disk in {key}"
    return Check(name, FAILURE if free < GB else WARNING, text, remedy)


def shared_memory_check(total: float, free: float, gpus: int) -> Check:
    """/dev/shm, in bytes: NCCL's buffers between `gpus` GPUs, and Ray's object store, which else
    goes to the disk."""
    text = f"{free / GB:.1f} of {total / GB:.1f} GB free in /dev/shm"
    if free >= 4 * GB:
        return Check("shared memory", OK, text)
    status = FAILURE if gpus > 1 and free < 0.5 * GB else WARNING
    remedy = "docker run --ipc=host (or --shm-size=16g); without a container, empty /dev/shm"
    return Check("shared memory", status, text, remedy)


def host_memory_check(free: float, gpus: int) -> Check:
    """Bytes of the host's memory, for `gpus` ranks (0: a run on the CPU)."""
    wanted = 16 * GB * max(gpus, 0.25)
    text = f"{free / GB:.0f} GB available"
    if free >= wanted:
        return Check("host memory", OK, text)
    remedy = "see what the run needs: DRY_RUN=1 before the script prints an estimate"
    return Check("host memory", WARNING, f"{text}; offloading may need more", remedy)


def open_files_check(limit: int) -> Check:
    """`ulimit -Hn`, up to which Ray raises its own limit. It wants 8192."""
    if limit >= 8192:
        return Check("open files", OK, f"{limit} at most")
    remedy = "raise the hard limit: /etc/security/limits.conf, or docker run --ulimit nofile=65536"
    return Check("open files", WARNING, f"{limit} at most", remedy)


def probe_check(name: str, command: Sequence[str], limit: float, remedy: str) -> tuple[Check, str]:
    """The last line of a process, which is what it found or its error; and all its output."""
    status, output = machine.run_limited(command, limit)
    last = ([line for line in output.splitlines() if line.strip()] or ["no output"])[-1].strip()
    if status == 0:
        return Check(name, OK, last), output
    if status is None:
        last = f"not done after {limit:.0f} s; last output: {last}"
    elif status < 0:
        last = f"crashed ({signal.Signals(-status).name}); last output: {last}"
    else:  # of the error of a child of its own, the first line that names one
        last = (re.findall(r"^\w*(?:\.\w+)*(?:Error|Exception): .*", output, re.M) or [last])[-1]
    return Check(name, FAILURE, last, remedy), output


PROBES = (
    (
        "share",
        120,
        "unset PYTORCH_CUDA_ALLOC_CONF, run the container with --ipc=host, or set "
        "actor_rollout_ref.rollout.weight_transfer=host",
    ),
    (
        "all-reduce",
        180,
        "see the report; NCCL_DEBUG=INFO says more, NCCL_P2P_DISABLE=1 avoids broken links",
    ),
    (
        "attention",
        180,
        "set actor_rollout_ref.model.use_remove_padding=False, and report it",
    ),
    ("vllm", 600, "see the report; actor_rollout_ref.rollout.name=hf does without vLLM"),
)
"""Of `verl.tools.probes`: name, limit in seconds, and remedy."""


@dataclass(slots=True)
class Preflight:
    """What is asked for, and what has been found so far."""

    device: str
    driver: str | None  # of NVIDIA's
    quick: bool = False
    skip_vllm: bool = False
    checkpoints: str = "."
    count: int | None = None  # of the GPUs that a run takes, the first ones; None: all
    shared: bool = True  # whether a rank and an engine have one GPU
    ipc: bool = True  # whether weights go from one to the other by CUDA IPC
    share: float | None = None  # of a GPU's memory that the run's vLLM takes, if that is known

    outputs: dict[str, str] = field(default_factory=dict)  # of the probes
    gpus: Sequence[GPU] = ()

    def probe(self, name: str, limit: float, remedy: str = "") -> Check:
        """Starts one of `verl.tools.probes`."""
        command = [sys.executable, "-m", "verl.tools.probes", name, self.device]
        check, self.outputs[name] = probe_check(name, command, limit, remedy)
        return check

    def checks(self) -> Iterator[Check]:
        """All checks, as they are made."""
        found = self.probe("torch", 180)
        facts = json.loads(found.text) if found.status == OK else None
        cuda = self.device == "cuda"
        if cuda:
            ready = bool(facts and facts["available"])
            yield driver_check(self.driver, facts and facts["cuda"], ready)
        yield torch_check(facts, self.device, found.text)
        if cuda:
            self.gpus = machine.read_gpus()[: self.count]
            yield from self.gpu_checks()
        elif facts and facts["cuda"]:
            text = "no NVIDIA driver, or no GPU visible: a run would be on the CPU; GPUs not tried"
            yield Check("driver", WARNING, text)
        yield from self.host_checks()
        if self.quick or facts is None or (cuda and not facts["available"]):
            return
        for name, limit, remedy in PROBES:
            if name == "vllm" and self.skip_vllm:
                continue
            if name == "vllm" and find_spec("vllm") is None:
                status = WARNING if cuda else OK
                yield Check(name, status, "not installed: only rollout.name=hf runs")
                continue
            yield self.probe(name, limit, remedy)

    def gpu_checks(self) -> Iterator[Check]:
        """What nvidia-smi and the compiler tell."""
        if self.gpus:
            yield compute_mode_check(self.gpus, self.shared)
        yield gpu_memory_check(self.gpus, self.share)
        compiler = machine.find_compiler()
        yield compiler_check(compiler, machine.compile_problem(compiler) if compiler else None)
        settings = machine.allocator_settings()
        scope = machine.ptrace_scope()
        yield allocator_check(settings, machine.getfd_problem(), scope, self.ipc)

    def host_checks(self) -> Iterator[Check]:
        """Disks, memory and limits of the machine."""
        cuda, place = self.device == "cuda", Path(self.checkpoints).expanduser().absolute()
        wanted = (50 if cuda else 5) * GB
        yield disk_check("checkpoints", str(place), machine.free_disk(place), wanted)
        temporary = tempfile.gettempdir()
        yield disk_check("temporary files", temporary, machine.free_disk(temporary), 5 * GB)
        if os.path.isdir("/dev/shm"):
            shm = os.statvfs("/dev/shm")
            total, free = (shm.f_frsize * blocks for blocks in (shm.f_blocks, shm.f_bavail))
            yield shared_memory_check(total, free, len(self.gpus))
        yield host_memory_check(machine.host_memory(), len(self.gpus))
        yield open_files_check(machine.open_files())

    def report(self, checks: Sequence[Check], verdict: str) -> str:
        """JSON of all that was found, without secrets."""
        content = {
            "verdict": verdict,
            "device": self.device,
            "checks": [asdict(check) for check in checks],
            "driver": self.driver,
            "gpus": [asdict(gpu) for gpu in self.gpus],
            "versions": machine.versions(),
            "environment": machine.environment(),
            "outputs": {name: text[-20000:] for name, text in self.outputs.items()},
        }
        return machine.without_secrets(json.dumps(content, indent=1, ensure_ascii=False)) + "\n"


def verdict_of(checks: Sequence[Check]) -> str:
    """One sentence."""
    failures, warnings = (sum(c.status == s for c in checks) for s in (FAILURE, WARNING))
    if failures:
        return f"{failures} of {len(checks)} checks failed: a run would stop, or go wrong"
    return f"{len(checks)} checks passed" + (f", {warnings} with a warning" if warnings else "")


def write_report(text: str, file: str | None) -> str:
    """Writes it to the file, else to preflight.json in this folder, else in the temporary one;
    returns where it is."""
    if file is not None:
        Path(file).write_text(text)
        return file
    try:
        Path("preflight.json").write_text(text)
    except OSError:
        with tempfile.NamedTemporaryFile(
            "w", prefix="preflight-", suffix=".json", delete=False
        ) as other:
            other.write(text)
        return other.name
    return "preflight.json"


def read_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, Preflight]:
    """The options, and what they and the overrides ask for."""
    parser = argparse.ArgumentParser(prog="python -m verl.tools.preflight", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="[cuda where a driver is]")
    parser.add_argument("--quick", action="store_true", help="no probes; print what isn't ok")
    parser.add_argument("--skip-vllm", action="store_true", help="don't start a vLLM engine")
    usual = "[preflight.json; with --quick none, unless a check fails]"
    parser.add_argument("--report", metavar="FILE", help=usual)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="those of a run")
    options, others = parser.parse_known_args(arguments)
    if others and not options.quick:  # a run may have some of its own
        parser.error(f"there is no option {others[0]}")
    given = dict(override.lstrip("+").partition("=")[::2] for override in options.overrides)
    given = {key: value.strip("'\"") for key, value in given.items() if value != "null"}
    device, driver = options.device or given.get("trainer.device", ""), machine.driver_version()
    if device not in ("cpu", "cuda"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1")
        device = "cuda" if visible and driver else "cpu"
    preflight = Preflight(device, driver, options.quick, options.skip_vllm)
    preflight.checkpoints = given.get("trainer.default_local_dir", ".").partition("${")[0]
    preflight.shared = "trainer.rollout_gpus_per_node" not in given
    rollout = "actor_rollout_ref.rollout"
    engine, transfer = given.get(f"{rollout}.name"), given.get(f"{rollout}.weight_transfer", "ipc")
    preflight.ipc = preflight.shared and engine != "hf" and transfer == "ipc"
    with suppress(KeyError, ValueError):  # not given, or for the run to report
        engines = int(given.get("trainer.rollout_gpus_per_node", 0))
        preflight.count = int(given["trainer.n_gpus_per_node"]) + engines
        if engine == "vllm" and not os.environ.get("RAY_ADDRESS"):  # which has others, too
            preflight.share = float(given[f"{rollout}.gpu_memory_utilization"])
    return options, preflight


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a check failed."""
    options, preflight = read_arguments(sys.argv[1:] if arguments is None else arguments)
    checks = []
    for check in preflight.checks():
        checks.append(check)
        if not (options.quick and check.status == OK):
            print(check, flush=True)
    verdict = verdict_of(checks)
    print(f"preflight ({preflight.device}): {verdict}")
    failed = any(check.status == FAILURE for check in checks)
    if failed or options.report or not options.quick:
        place = write_report(preflight.report(checks, verdict), options.report)
        print(f"report, to attach to a question or an issue: {place}", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
