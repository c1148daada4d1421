"""What a GPU does with this project, in minutes and without Ray, vLLM, wandb or hydra:

    python tests/gpu/bare.py [--small] [--device cuda|cpu] [--out FILE.json]

needs torch from 2.11 on, transformers from 5.16 on and numpy, no network and no other file than the
project's own. Models are random, with the shapes of Qwen2.5-3B. It prints a line for each section,
and at the end a table; FILE.json gets all figures. A section that fails leaves its traceback there,
and the others go on. `--small` takes tiny shapes (on a CPU half a minute).
"""
# ruff: noqa: E402  where the project is must be known before it is imported

import argparse
import inspect
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.distributed as dist
import transformers

from tests.gpu import bare_engine, bare_update
from tests.gpu.bare_common import (
    Run,
    Sizes,
    device_memory,
    fitting_layers,
    median_seconds,
    small_sizes,
)
from verl.models.policy import PolicyWorker

MINUTES = 8
OPTIONAL = ("flash_attn", "flash_attn_interface", "triton", "vllm", "ray")


def adapt_varlen() -> str | None:
    """Lets `packed_varlen` run with an older torch, whose function takes fewer arguments; returns
    what is missing there."""
    try:
        from torch.nn.attention import varlen
    except ImportError as error:
        return f"torch has no variable-length attention: {error}"
    original: Any = varlen.varlen_attn
    known = inspect.signature(original).parameters
    missing = sorted({"enable_gqa", "scale", "window_size"} - set(known))
    if not missing:
        return None

    def with_fewer(*args: Any, **options: Any) -> Any:
        # Its kernel takes fewer heads of keys without being told; its scale is the usual one.
        if "window_size" in missing and "is_causal" in known:
            options["is_causal"] = True
        return original(*args, **{k: v for k, v in options.items() if k not in missing})

    varlen.varlen_attn = with_fewer
    return f"varlen_attn of torch {torch.__version__} lacks {', '.join(missing)}: left out"


def environment(run: Run, out: dict[str, Any]) -> str:
    """The card, its versions, and the two rates that nothing exceeds."""
    out |= {"torch": torch.__version__, "transformers": transformers.__version__}
    out |= {"python": platform.python_version(), "cuda": torch.version.cuda}
    out["packages"] = [name for name in OPTIONAL if _is_there(name)]
    out["memory"] = device_memory(run.device)
    out["device"] = platform.processor() or platform.machine()
    if run.cuda:
        out["device"] = torch.cuda.get_device_name(run.device)
        out["capability"] = torch.cuda.get_device_capability(run.device)
        out["free memory"] = torch.cuda.mem_get_info(run.device)[0]
        out["allocator"] = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
        out["driver"] = _driver()
    sizes, dtype = run.sizes, torch.bfloat16 if run.cuda else torch.float32
    source = torch.randint(0, 255, (sizes.copied,), dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    cost = median_seconds(run.device, lambda: target.copy_(source), 5, calls=5)
    out["copy, bytes/s"] = 2 * sizes.copied / cost  # read and written
    n = sizes.product
    a, b = (torch.randn(n, n, device=run.device).to(dtype) for _ in range(2))
    cost = median_seconds(run.device, lambda: a @ b, 5, calls=10)
    out["product, operations/s"] = run.measured_flops = 2 * n**3 / cost
    text = f"{out['device']}, torch {torch.__version__}, {out['memory'] / 2**30:.0f} GiB; copies "
    text += f"{out['copy, bytes/s'] / 1e12:.2f} TB/s, "
    text += f"multiplies {run.measured_flops / 1e12:.1f} TFLOP/s"
    return text


def _is_there(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def _driver() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()


def context_memory(run: Run, out: dict[str, Any]) -> str:
    """What CUDA has taken for itself beside torch's memory, which the estimate assumes."""
    from verl.tools.memory_plan import CONTEXT

    out["assumed bytes"] = CONTEXT
    if not run.cuda:
        return "only on a GPU"
    run.free()
    free, total = torch.cuda.mem_get_info(run.device)
    out["bytes"] = total - free - torch.cuda.memory_reserved(run.device)
    return f"{out['bytes'] / 2**30:.2f} GiB, assumed {CONTEXT / 2**30:.0f}"


SECTIONS: dict[str, Callable[[Run, dict[str, Any]], str]] = {
    "environment": environment,
    "attention": bare_update.attention,
    "gradients": bare_update.gradients,
    "head": bare_update.head,
    "precision of the head": bare_update.precision_of_the_head,
    "update": bare_update.update,
    "log-probabilities": bare_update.log_probs,
    "optimizer": bare_update.optimizers,
    "generation": bare_engine.generation,
    "weights": bare_engine.weights_to_another_process,
    "CUDA's own memory": context_memory,
    "checkpoint": bare_engine.checkpoints,
    "update, offloaded": bare_update.offloaded_update,
}
"""In this order, the cheapest and most telling first; each returns a line and fills in figures."""


def run_section(run: Run, name: str) -> dict[str, Any]:
    """The figures of a section, whether it went well, and if not, why."""
    figures: dict[str, Any] = {}
    start = time.monotonic()
    print(f"… {name}", file=sys.stderr, flush=True)
    found: dict[str, Any] = {"ok": False, "figures": figures}
    try:
        if run.left() < 0:
            raise TimeoutError("no time is left")
        found["summary"] = SECTIONS[name](run, figures)
        found["ok"] = True
    except Exception as error:  # whatever it is, the next section may work
        found["error"] = traceback.format_exc()
        found["summary"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    found["seconds"] = time.monotonic() - start
    verdict = "ok" if found["ok"] else "FAILED"
    print(f"[{found['seconds']:5.1f} s] {name}: {verdict}: {found['summary']}", flush=True)
    run.free()
    return found


def connect(device: torch.device) -> None:
    """A process group of this process alone."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    PolicyWorker(device.type).connect(0, 1, f"tcp://127.0.0.1:{port}")


def main() -> None:
    """Exits with 1 if a section failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    parser.add_argument("--out", type=Path, help="file for all figures, as JSON")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="then no section begins")
    parser.add_argument("--only", nargs="*", choices=tuple(SECTIONS), help="these sections alone")
    args = parser.parse_args()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", 0)
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "small": args.small,
        "sections": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        sizes = small_sizes() if args.small else Sizes()
        run = Run(device, sizes, Path(folder), time.monotonic() + 60 * args.minutes)
        if missing := adapt_varlen():
            run.notes.append(missing)
        layers = sizes.model["num_hidden_layers"]
        if (fitting := fitting_layers(run)) < layers:
            sizes.model = sizes.model | {"num_hidden_layers": fitting}
            run.notes.append(f"the large model has {fitting} of {layers} layers: more don't fit")
        connect(device)
        for name in SECTIONS:
            if args.only is None or name in args.only:
                report["sections"][name] = run_section(run, name)
                report["notes"] = run.notes
                if args.out:
                    args.out.write_text(json.dumps(report, indent=1, default=str))
        dist.destroy_process_group()
    print(*(f"note: {note}" for note in run.notes), sep="\n")
    print("\n| section | | |\n|---|---|---|")
    for name, found in report["sections"].items():
        print(f"| {name} | {'ok' if found['ok'] else 'FAILED'} | {found['summary']} |")
    sys.exit(not all(found["ok"] for found in report["sections"].values()))


if __name__ == "__main__":
    main()
