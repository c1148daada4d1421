"""The picture and the summary of a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

from matplotlib.image import imread

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from plot_run import plot_run, summary_table  # noqa: E402


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def run(path, steps=40):
    records = [{"step": 0, "val-core/countdown/acc/mean@4": 0.125}]
    for step in range(1, steps + 1):
        progress = step / steps
        record = {
            "step": step,
            "critic/rewards/mean": 0.1 + 0.5 * progress + 0.03 * (-1) ** step,
            "response_length/mean": 200 - 100 * progress,
            "response_length/clip_ratio": 0.25 * (1 - progress),
            "actor/grad_norm": 0.3 if step != 5 else None,
            "perf/time_per_step": 100.0,
        }
        if step % 10 == 0:
            record["val-core/countdown/acc/mean@4"] = 0.125 + 0.5 * progress
        records.append(record)
    return write(path, records)


def test_plot(tmp_path):
    png = tmp_path / "run.png"
    plot_run(run(tmp_path / "metrics.jsonl"), png, "countdown, ∆L", max_response_length=256)
    height, width, _ = imread(png).shape
    assert (width, height) == (1690, 494)
    assert imread(png)[..., :3].std() > 0.05  # not a blank page


def test_plot_of_a_run_that_has_barely_begun(tmp_path):
    for name, records in {
        "empty": [],
        "validated": [{"step": 0, "val-core/a/acc/mean@1": 0.5}],
        "one": [{"step": 1, "critic/rewards/mean": 0.5, "actor/grad_norm": None}],
    }.items():
        metrics = write(tmp_path / name, records)
        plot_run(metrics, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert "training steps in 0 s" in summary_table(metrics)


def test_summary_table(tmp_path):
    assert summary_table(run(tmp_path / "metrics.jsonl")).splitlines() == [
        "                                   before  after",
        "  validation accuracy (countdown)   0.125  0.625",
        "  training reward                   0.083  0.630",
        "  response length, tokens           197.5  100.0",
        "  truncated responses               24.4%   0.0%",
        "  40 training steps in 1 h 06 min",
    ]


def test_command_line(tmp_path):
    metrics, png = run(tmp_path / "metrics.jsonl", steps=2), tmp_path / "out.png"
    script = ROOT / "examples" / "plot_run.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script, metrics, png, "--title", "two"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "2 training steps in 3 min 20 s" in done.stdout
    assert png.exists()
