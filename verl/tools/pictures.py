"""The plots of a report as PNG files."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl.tools.curves import PALETTE, Section

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1.5)))
MARKERS = "os^Dv"


def draw_all(sections: list[Section], folder: Path) -> None:
    """Writes a picture per chart, and `overview.png` with all that compare the runs."""
    folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for number, chart in enumerate(section.charts, start=1):
            name = chart["title"] if section is sections[0] else f"{section.title} {number}"
            name = re.sub(r"[^\w.=-]+", "-", name).strip("-").lower()
            _save([chart], section.legend, folder / f"{name}.png", columns=1)
    if sections:
        _save(sections[0].charts, sections[0].legend, folder / "overview.png", columns=3)


def _save(charts: list[dict[str, Any]], legend: list[str], path: Path, columns: int) -> None:
    # The object-oriented interface: no display, no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(charts) // columns)
    figure = Figure(figsize=(4.4 * columns + 1, 3.1 * rows + 0.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    handles: dict[str, Any] = {}
    for number, chart in enumerate(charts, start=1):
        handles |= _draw(figure.add_subplot(rows, columns, number), chart, legend)
    legend_box = figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)
    legend_box.set_frame_on(False)
    figure.savefig(path)


def _draw(axes: "Axes", chart: dict[str, Any], legend: list[str]) -> dict[str, Any]:
    """Draws a chart; returns what the legend shows of each line, by its label."""
    handles: dict[str, Any] = {}
    below: list[float] = []
    for line in chart["lines"]:
        key, x, y = line["key"], line["x"], line["y"]
        color, label = PALETTE[key % len(PALETTE)][0], legend[key]
        if chart.get("stack"):
            below = below or [0.0] * len(y)
            top = [a + b for a, b in zip(below, y, strict=True)]
            handles[label] = axes.fill_between(x, below, top, color=color, alpha=0.85, lw=0)
            below = top
            continue
        for raw in line.get("raw", []):
            axes.plot(*raw, color=color, alpha=0.25, lw=0.8)
        if "lo" in line:
            axes.fill_between(x, line["lo"], line["hi"], color=color, alpha=0.15, lw=0)
        style = {"color": color, "ls": STYLES[key % 5], "marker": MARKERS[key % 5], "ms": 4}
        width = 2.6 if line.get("bold") else 1.4
        marked = None if chart.get("points") and len(x) <= 40 else [len(x) - 1]
        (handles[label],) = axes.plot(x, y, lw=width, markevery=marked, **style)
    title = chart["title"] + (f" ({chart['unit']})" if chart["unit"] else "")
    if limit := chart.get("limit"):
        title += f", limit {limit}"
        if limit < 1.5 * axes.get_ylim()[1]:
            axes.axhline(limit, ls="--", lw=1, color="0.5")
    axes.set_title(title, fontsize=10, loc="left")
    low, high = axes.dataLim.intervaly
    if 0 <= low < 0.6 * high or high == 0:
        axes.set_ylim(bottom=0, top=None if high else 1)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("training step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return handles
