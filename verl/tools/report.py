"""A page about one run, or about several of them side by side.

``python -m verl.tools.report RUN [RUN …] -o report.html`` reads the folders of runs and writes one
file that needs nothing else, not even a network. Runs whose settings differ only in seeds, paths
and names are one group: a mean with a band. A summary goes to standard output.
"""

import argparse
import base64
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
import pandas as pd

from verl.tools.curves import PALETTE, Section, sections
from verl.tools.runs import (
    Group,
    Run,
    accuracy_columns,
    differences,
    group_runs,
    read_run,
    shown,
)
from verl.tools.samples import dumps
from verl.trainer.ppo.tracking import align

HERE = Path(__file__).parent
DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "4 2")
MARKERS = (  # around (0, 0), 7 wide
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z",
    "M-3-3h6v6h-6z",
    "M0-4l4 7h-8z",
    "M0-4.2l4.2 4.2l-4.2 4.2l-4.2-4.2z",
    "M0 4l4-7h-8z",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m verl.tools.report",
        description="Write a page about runs: settings, curves, sample responses.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("-o", "--output", type=Path, default="report.html", help="[%(default)s]")
    parser.add_argument("--title", help="heading of the page [name of the run]")
    parser.add_argument(
        "--smooth", type=int, metavar="STEPS", help="mean over so many steps [a 15th of the run]"
    )
    parser.add_argument("--png", type=Path, metavar="DIR", help="the plots as PNG files, too")
    args = parser.parse_args(arguments)
    if args.smooth is not None and args.smooth < 1:
        parser.error(f"--smooth {args.smooth}: a number of steps, 1 or more")
    try:
        folders = [*dict.fromkeys(p.resolve() for p in args.runs)]
        if started := [f for f in folders if (f / "metrics.jsonl").is_file()]:
            for other in (f for f in folders if f not in started):  # as * finds them
                print(f"left out: {other} has no metrics.jsonl", file=sys.stderr)
        runs = [read_run(folder) for folder in started or folders]
        groups = group_runs(runs)
        page, plots = render(groups, args.title, args.smooth)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(page, encoding="utf-8", errors="replace")
        if args.png:
            from verl.tools.pictures import draw_all  # matplotlib takes a second to import

            draw_all(plots, args.png)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("\n\n".join(summary(run, named=len(runs) > 1) for run in runs))


def render(
    groups: list[Group], title: str | None = None, window: int | None = None
) -> tuple[str, list[Section]]:
    """The page as HTML, and what it plots.

    Args:
        title: its heading; default: the name of the run, or how many there are.
        window: curves are means over so many steps; default: a 15th of the longest run.
    """
    runs = [run for group in groups for run in group.runs]
    window = window or 2 * round(max(len(run.frame) for run in runs) / 30) + 1
    window += 1 - window % 2
    plots = sections(groups, window)
    script = (HERE / "report.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("report.html")
    page = template.render(
        title=title or (runs[0].name if len(runs) == 1 else f"{len(runs)} runs"),
        groups=groups,
        cards=[_card(group) for group in groups],
        differences=differences(groups),
        settings=[(group.label, _settings(group)) for group in groups],
        table=_table(groups),
        sections=plots,
        window=window,
        dumps=[(run.name, found) for run in runs if (found := dumps(run))],
        palette=PALETTE,
        dashes=DASHES,
        markers=MARKERS,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=(HERE / "report.css").read_text(encoding="utf-8"),
        data=script_json(
            {
                "charts": [chart for section in plots for chart in section.charts],
                "colors": len(PALETTE),
                "dashes": DASHES,
                "markers": MARKERS,
            }
        ),
    )
    return page, plots


def script_json(value: Any) -> str:
    """JSON that can stand within a ``<script>``: it can't end it, nor begin a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def summary(run: Run, named: bool = False) -> str:
    """The first and the last value of a run's figures, and its size, as text."""
    rows = [["", "before", "after"]]
    for label, first, last, _, form in figures(run):
        rows.append([label, form.format(first), form.format(last)])
    heading = f"{run.name}\n" if named else ""
    return f"{heading}{align(rows)}\n  {size(run)}"


def size(run: Run) -> str:
    """Example: ``40 training steps, 0.965 million tokens, 3 min 01 s``."""
    tokens = f"{run.tokens / 1e6:.3g} million tokens"
    return f"{run.steps} training steps, {tokens}, {duration(run.seconds)}"


def figures(run: Run) -> Iterator[tuple[str, float, float, tuple[float, int] | None, str]]:
    """(label, first, last, (best, its step) for accuracies, format) of what the run recorded."""
    accuracies = accuracy_columns(run.frame)
    names = {f"validation accuracy ({source})": key for source, key in accuracies.items()}
    names |= {
        "training reward": "critic/rewards/mean",
        "response length, tokens": "response_length/mean",
        "truncated responses": "response_length/clip_ratio",
    }
    for label, key in names.items():
        values = run.series(key)
        if values.empty:
            continue
        accuracy = key in accuracies.values()
        best = (float(values.max()), int(values.idxmax())) if accuracy else None
        form = "{:.1%}" if accuracy or key.endswith("ratio") else "{:.3f}"
        form = "{:.1f}" if "tokens" in label else form
        yield label, float(values.iloc[0]), float(values.iloc[-1]), best, form


def duration(seconds: float) -> str:
    """Example: 75 → `1 min 15 s`, 3700 → `1 h 01 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _card(group: Group) -> dict[str, Any]:
    """The headline of a group, means over its runs: accuracy (mean over data sources, too) or else
    the reward."""
    kind, form = "validation accuracy", "{:.1%}"
    curves = [r.series(key) for r in group.runs for key in accuracy_columns(r.frame).values()]
    ends = _mean_ends(curves)
    if not ends:
        kind, form = "training reward", "{:.3f}"
        ends = _mean_ends([run.series("critic/rewards/mean") for run in group.runs])
    steps = sorted({run.steps for run in group.runs})
    facts = {
        "steps": "–".join(map(str, dict.fromkeys([steps[0], steps[-1]]))),
        "tokens": _millions(fmean(run.tokens for run in group.runs)),
        "time": duration(fmean(run.seconds for run in group.runs)),
    }
    lengths = _mean_ends([run.series("response_length/mean") for run in group.runs])
    if lengths:
        facts["mean length"] = "{:.0f} → {:.0f}".format(*lengths)
    shown_ends = [form.format(end) for end in ends]
    card = {"label": group.label, "kind": kind, "runs": len(group.runs)}
    return card | {"ends": shown_ends, "facts": facts}


def _mean_ends(curves: list[pd.Series]) -> list[float]:
    """Means of the first and of the last values; nothing if there is none."""
    ends = [(curve.iloc[0], curve.iloc[-1]) for curve in curves if len(curve)]
    return [fmean(values) for values in zip(*ends, strict=True)]


def _table(groups: list[Group]) -> tuple[list[str], list[dict[str, Any]]]:
    """A row for each run: labels of the columns, and the rows' cells."""
    rows: list[dict[str, Any]] = []
    for index, group in enumerate(groups):
        for run in group.runs:
            cells = {}
            for label, first, last, best, form in figures(run):
                cells[label] = (
                    f"{form.format(first)} → {form.format(last)}",
                    f"best {form.format(best[0])} at step {best[1]}" if best else "",
                )
            row = {"index": index, "group": group.label, "run": run, "cells": cells}
            rows.append(
                row | {"tokens": _millions(run.tokens), "hours": f"{run.seconds / 3600:.2f}"}
            )
    return list(dict.fromkeys(label for row in rows for label in row["cells"])), rows


def _millions(tokens: float) -> str:
    return f"{tokens / 1e6:.3g} M"


def _settings(group: Group) -> dict[str, str]:
    return {key: shown(value) for key, value in group.runs[0].settings.items()}


if __name__ == "__main__":
    main()
