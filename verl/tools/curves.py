"""What the plots of a report show, as plain data: for the page and for pictures."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from verl.tools.runs import METHODS, Group, accuracy_columns

PALETTE = (  # light, dark; told apart with any colour vision, and dashes and markers differ, too
    ("#0067b1", "#5ab4f0"),
    ("#c84d00", "#ff9a4d"),
    ("#00835f", "#3ccba0"),
    ("#a8457e", "#eb9cc9"),
    ("#8a6d00", "#e3c64a"),
    ("#5b6470", "#aab4c0"),
    ("#6a4fc4", "#b3a2ff"),
)
CHARTS = (  # title, metric, unit
    ("Reward", "critic/rewards/mean", ""),
    ("Response length", "response_length/mean", "tokens"),
    ("Truncated responses", "response_length/clip_ratio", "%"),
    ("Gradient norm", "actor/grad_norm", ""),
    ("Entropy", "actor/entropy", "nats"),
    ("Clip fraction", "actor/pg_clipfrac", "%"),
    ("Predicted gradient noise", "loss_agg/cv", "loss_agg/cv"),
    ("Loss", "train/loss", ""),
)
PHASES = {
    "gen": "generation",
    "reward": "scoring",
    "old_log_prob": "old log-probabilities",
    "ref": "reference log-probabilities",
    "adv": "advantages",
    "gradient_norms": "gradient norms",
    "update_actor": "actor update",
    "update_weights": "weight transfer",
    "testing": "validation",
}
"""Readable names of ``timing_s/…``, in the order of a step."""

MAX_POINTS = 400
Line = dict[str, Any]
"""``key`` (index in the legend), ``x`` (steps), ``y``; perhaps ``lo`` and ``hi``, ``raw`` (curves
``[x, y]``), ``bold``."""


@dataclass(slots=True)
class Section:
    """Charts with one legend."""

    title: str
    note: str
    legend: list[str]
    charts: list[dict[str, Any]]
    """``title``, ``unit``, ``lines``; perhaps ``limit``, ``stack``, ``points``."""


def smooth(values: pd.Series, window: int) -> pd.Series:
    """Mean of the `window` values around each (an odd number); at the ends, of those there are."""
    return values.rolling(window, center=True, min_periods=1).mean()


def mean_and_band(curves: list[pd.Series], window: int = 1) -> tuple[pd.Series, ...]:
    """Mean, minimum and maximum of smoothed curves at the steps that all of them have."""
    table = pd.concat([smooth(curve, window) for curve in curves], axis=1, join="inner")
    return table.mean(axis=1), table.min(axis=1), table.max(axis=1)


def sections(groups: list[Group], window: int) -> list[Section]:
    """All charts of a report; without those that have no data."""
    found = [_comparison(groups, window), _noise(groups, window), _times(groups, window)]
    return [section for section in found if section.charts]


def _comparison(groups: list[Group], window: int) -> Section:
    sources = dict.fromkeys(s for g in groups for r in g.runs for s in accuracy_columns(r.frame))
    charts = []
    for source in sources:
        title = f"Validation accuracy, {source}"
        lines = [
            _line(
                key, [r.series(accuracy_columns(r.frame).get(source, "")) for r in g.runs], 1, 100
            )
            for key, g in enumerate(groups)
        ]
        charts.append({"title": title, "unit": "%", "lines": lines, "points": True})
    for title, metric, unit in CHARTS:
        scale = 100 if unit == "%" else 1
        lines = [
            _line(key, [run.series(metric) for run in group.runs], window, scale)
            for key, group in enumerate(groups)
        ]
        charts.append({"title": title, "unit": unit, "lines": lines})
        limits = {run.settings.get("data.max_response_length") for g in groups for run in g.runs}
        if title == "Response length" and len(limits) == 1 and limits != {None}:
            charts[-1]["limit"] = limits.pop()
    labels = [f"{g.label} ({len(g.runs)} runs)" if len(g.runs) > 1 else g.label for g in groups]
    note = f"By training step. Lines are means over {window} steps; accuracies are as measured."
    if any(len(group.runs) > 1 for group in groups):
        note += " Several runs: their mean, and the band from the least to the greatest."
    return Section("Curves", note, labels, _filled(charts))


def _noise(groups: list[Group], window: int) -> Section:
    """A chart a group: the noise predicted for each method, those that coincide as one line."""
    legend: list[str] = []
    charts = []
    for group in groups:
        curves: list[tuple[set[str], pd.Series]] = []
        used = METHODS.get(group.runs[0].mode or "", "method in use")
        columns = [c for c in group.runs[0].frame.columns if c.startswith("loss_agg/cv")]
        for column in sorted(columns):
            name = METHODS.get(column.rpartition("/")[2], column.rpartition("/")[2])
            name = used if column == "loss_agg/cv" else name
            mean = mean_and_band([run.series(column) for run in group.runs], window)[0]
            twins = next((names for names, curve in curves if _same(curve, mean)), None)
            if twins is None:
                curves.append(({name}, mean))
            else:
                twins.add(name)
        lines = []
        for names, mean in curves:
            label = " = ".join(sorted(names, key=[*METHODS.values(), *names].index))
            if label not in legend:
                legend.append(label)
            lines.append(_points(legend.index(label), mean) | {"bold": used in names})
        charts.append({"title": group.label, "unit": "", "lines": lines})
    note = (
        "loss_agg/cv: the noise of the gradient relative to it, as the lengths of each step's "
        "responses predict it, for each aggregation, up to a factor that the policy decides: "
        "compare the aggregations of a step, not the steps. Thick: the one in use."
    )
    return Section("Gradient noise by aggregation", note, legend, _filled(charts))


def _times(groups: list[Group], window: int) -> Section:
    """A chart a group: seconds a step, stacked by phase. Phases below 1 % everywhere are one."""
    shares: dict[str, float] = {}
    tables = []
    for group in groups:
        columns = {c for run in group.runs for c in run.frame if c.startswith("timing_s/")}
        names = [c.removeprefix("timing_s/") for c in sorted(columns - {"timing_s/step"})]
        steps = [run.frame.loc[run.frame.index > 0] for run in group.runs]
        table = {}
        for name in names:
            curves = [f[f"timing_s/{name}"].fillna(0) for f in steps if f"timing_s/{name}" in f]
            table[name] = mean_and_band(curves, window)[0]
        tables.append(pd.DataFrame(table).dropna())
        total = tables[-1].to_numpy().sum() or 1.0
        for name in names:
            shares[name] = max(shares.get(name, 0.0), tables[-1][name].sum() / total)
    large = [
        name
        for name in [*PHASES, *sorted(set(shares) - set(PHASES))]
        if shares.get(name, 0) >= 0.01
    ]
    large = large[: len(PALETTE) - 1]
    legend = [PHASES.get(name, name) for name in large] + ["other"]
    charts = []
    for group, table in zip(groups, tables, strict=True):
        parts = [table[name] if name in table else 0 * table.sum(axis=1) for name in large]
        parts.append(table[[name for name in table if name not in large]].sum(axis=1))
        lines = [_points(key, part) for key, part in enumerate(parts)]
        charts.append({"title": group.label, "unit": "s", "lines": lines, "stack": True})
    return Section(
        "Time per step", f"Seconds by phase, means over {window} steps.", legend, _filled(charts)
    )


def _line(key: int, curves: list[pd.Series], window: int, scale: float) -> Line:
    """A group's curve: of one run, or the mean of several and a band."""
    curves = [curve * scale for curve in curves if len(curve)]
    if not curves:
        return {"key": key, "x": [], "y": []}
    mean, low, high = mean_and_band(curves, window)
    line = _points(key, mean)
    if len(curves) > 1:
        line |= {"lo": _coordinates(low)[1], "hi": _coordinates(high)[1]}
    if window > 1 or len(curves) > 1:
        line["raw"] = [list(_coordinates(curve)) for curve in curves]
    return line


def _points(key: int, curve: pd.Series) -> Line:
    x, y = _coordinates(curve)
    return {"key": key, "x": x, "y": y}


def _coordinates(curve: pd.Series) -> tuple[list[int], list[float]]:
    """Steps and values; of a long curve every n-th up to the last, as many as a plot can show."""
    curve = curve.iloc[:: -(len(curve) // MAX_POINTS + 1)].iloc[::-1]
    return curve.index.tolist(), [float(f"{value:.5g}") for value in curve]


def _same(a: pd.Series, b: pd.Series) -> bool:
    return a.index.equals(b.index) and bool(((a - b).abs() <= 1e-9 * a.abs()).all())


def _filled(charts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for chart in charts:
        chart["lines"] = [line for line in chart["lines"] if line["x"]]
    return [chart for chart in charts if chart["lines"]]
