"""Draws docs/why.png from the study's results: gradient noise and accuracy of five aggregations.

.venv/bin/python benchmarks/aggregation_study/why.py
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from benchmarks.aggregation_study.findings import (  # noqa: E402
    BASELINES,
    OURS,
    T_QUANTILES,
    paired,
)

RESULTS = Path(__file__).parent / "results"
ROWS = (*BASELINES, OURS)  # from bottom to top
COLORS = {name: "C2" if name == OURS else "0.35" for name in ROWS}
POLICIES = {"warmed-up": (0.15, "white", "before RL"), "after 40 steps": (-0.15, None, "after RL")}
"""Policy → shift of its row, fill of its marker (None: the method's color), label."""


def draw_noise(axes: Axes, table: pd.DataFrame) -> None:
    """Noise relative to Dr. GRPO Norm: all seeds, with the 95 % interval of the bootstrap."""
    table = table[table["seed"] == "all"].set_index(["policy", "method"])
    for policy, (shift, fill, label) in POLICIES.items():
        for y, name in enumerate(ROWS):
            row, color = table.loc[policy, name], COLORS[name]
            axes.plot([row["relative_low"], row["relative_high"]], [y + shift] * 2, color=color)
            axes.plot(row["relative"], y + shift, "o", color=color, mfc=fill or color)
        axes.plot([], [], "o", color="0.35", mfc=fill or "0.35", label=label)
    axes.axvline(1, color="0.6", lw=0.8, zorder=0)
    axes.set_title("Gradient noise (less is better)", fontsize=11)
    axes.set_xlabel("relative to Dr. GRPO Norm")
    axes.legend(frameon=False, fontsize=9, loc="lower left")


def draw_accuracy(axes: Axes, table: pd.DataFrame) -> None:
    """Accuracy behind ∆L's: every seed, and the mean with an interval that holds for all four
    comparisons together with 95 % (Student's t, Bonferroni)."""
    records = table.to_dict("records")
    for y, name in enumerate(BASELINES):
        points = 100 * paired(records, name, OURS, "accuracy_mean")
        half = T_QUANTILES[len(points)] * points.std(ddof=1) / np.sqrt(len(points))
        axes.plot([points.mean() - half, points.mean() + half], [y, y], color=COLORS[name])
        axes.plot(points.mean(), y, "o", color=COLORS[name])
        axes.plot(points, [y - 0.25] * len(points), "o", color=COLORS[name], ms=2.5, alpha=0.6)
    axes.plot(0, len(BASELINES), "o", color=COLORS[OURS])
    axes.axvline(0, color=COLORS[OURS], lw=0.8, zorder=0)
    axes.set_title("Accuracy while training (more is better)", fontsize=11)
    axes.set_xlabel(f"percentage points, {OURS} = 0")


def main() -> None:
    """Write the picture."""
    figure = Figure(figsize=(8, 3), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    draw_noise(left, pd.read_csv(RESULTS / "gradients.csv"))
    draw_accuracy(right, pd.read_csv(RESULTS / "runs.csv"))
    left.set_yticks(range(len(ROWS)), ROWS, fontsize=10)
    left.get_yticklabels()[-1].set(color=COLORS[OURS], fontweight="bold")
    for axes in (left, right):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", alpha=0.25)
    figure.savefig(REPO / "docs" / "why.png")


if __name__ == "__main__":
    main()
