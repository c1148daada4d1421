"""A run's metrics.jsonl as a picture and as a small table.

``python examples/plot_run.py METRICS.jsonl OUT.png`` draws the one and prints the other.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl.utils.tracking import align, read_metrics, validation_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PathLike = str | os.PathLike[str]
Records = list[dict[str, Any]]


def plot_run(
    metrics_file: PathLike,
    png_file: PathLike,
    title: str = "",
    max_response_length: int | None = None,
) -> None:
    """Draws accuracy and reward, response length, and gradient norm over the training steps.

    Args:
        metrics_file: a run's metrics.jsonl.
        png_file: the picture to write.
        title: its heading.
        max_response_length: the limit in tokens, drawn as a dashed line.
    """
    # The object-oriented interface: no display, no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    records = read_metrics(metrics_file)
    figure = Figure(figsize=(13, 3.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, length, norm = figure.subplots(1, 3)
    _draw_accuracy(accuracy, records)
    _draw_line(length, records, "response_length/mean", "mean", color="C2")
    length.set(title="response length", ylabel="tokens")
    if max_response_length:
        length.axhline(max_response_length, ls="--", lw=1, color="0.5", label="limit")
        length.legend(frameon=False)
    length.set_ylim(bottom=0)
    _draw_line(norm, records, "actor/grad_norm", "gradient norm", color="C3")
    norm.set(title="gradient norm")
    norm.set_ylim(bottom=0)
    for axes in (accuracy, length, norm):
        axes.set_xlabel("training step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title)
    figure.savefig(Path(png_file), format="png")


def summary_table(metrics_file: PathLike) -> str:
    """Validation accuracy, and the responses of the first and the last training step, as text.

    The validation accuracy is that of the first and of the last validation. Below: the number of
    training steps, and their time (the sum of ``perf/time_per_step``).
    """
    records = read_metrics(metrics_file)
    rows = [["", "before", "after"]]
    for source in _sources(records):
        _, scores = _series(records, lambda r, s=source: validation_scores(r).get(s))
        rows.append([f"validation accuracy ({source})", *_first_last(scores, "{:.3f}")])
    for label, key, form in (
        ("training reward", "critic/rewards/mean", "{:.3f}"),
        ("response length, tokens", "response_length/mean", "{:.1f}"),
        ("truncated responses", "response_length/clip_ratio", "{:.1%}"),
    ):
        _, values = _series(records, lambda r, k=key: r.get(k))
        if values:
            rows.append([label, *_first_last(values, form)])
    steps = max((r["step"] for r in records), default=0)
    seconds = sum(r.get("perf/time_per_step", r.get("timing_s/step")) or 0.0 for r in records)
    return f"{align(rows)}\n  {steps} training steps in {_duration(seconds)}"


def main() -> None:
    """Command line: see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python examples/plot_run.py", description="Draw a run's metrics and print a summary."
    )
    parser.add_argument("metrics", help="metrics.jsonl in the run's folder")
    parser.add_argument("png", help="picture to write")
    parser.add_argument("--title", default="", help="heading of the picture")
    parser.add_argument("--max-response-length", type=int, help="limit in tokens, drawn dashed")
    args = parser.parse_args()
    plot_run(args.metrics, args.png, args.title, args.max_response_length)
    print(summary_table(args.metrics))


def _draw_accuracy(axes: Axes, records: Records) -> None:
    _draw_line(axes, records, "critic/rewards/mean", "training reward", color="0.6")
    for source in _sources(records):
        steps, scores = _series(records, lambda r, s=source: validation_scores(r).get(s))
        axes.plot(steps, scores, "o-", ms=5, lw=1.5, label=f"validation, {source}")
    axes.set(title="accuracy and reward")
    if axes.lines:
        axes.legend(frameon=False)


def _draw_line(axes: Axes, records: Records, key: str, label: str, color: str) -> None:
    steps, values = _series(records, lambda r: r.get(key))
    if steps:
        # A single step would be an invisible line.
        marker = "." if len(steps) == 1 else ""
        axes.plot(steps, values, lw=1, marker=marker, label=label, color=color)


def _sources(records: Records) -> list[str]:
    """Data sources with a validation accuracy, in the order in which they appear."""
    return list(dict.fromkeys(source for r in records for source in validation_scores(r)))


def _series(
    records: Records, value: Callable[[dict[str, Any]], float | None]
) -> tuple[list[int], list[float]]:
    """The steps that have a value, and the values."""
    pairs = [(r["step"], v) for r in records if (v := value(r)) is not None]
    return [step for step, _ in pairs], [v for _, v in pairs]


def _first_last(values: list[float], form: str) -> tuple[str, str]:
    return form.format(values[0]), form.format(values[-1])


def _duration(seconds: float) -> str:
    """Example: 75 → `1 min 15 s`, 3700 → `1 h 01 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


if __name__ == "__main__":
    main()
