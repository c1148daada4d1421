"""From finished runs and measurements to tables, plots and a page in plain words."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.aggregation_study.gradients import METHODS, Measurement, coefficient_of_variation
from verl.utils.tracking import read_metrics, validation_scores

Key = tuple[str, int]  # (method or policy, seed)
NAMES = [method.name for method in METHODS]
COLORS = dict(zip(NAMES, ("C0", "C1", "C4", "C5", "#8fd18f", "C2", "#0b6b0b"), strict=True))
BASELINES = ("DAPO Norm", "GRPO Norm", "Dr. GRPO", "Dr. GRPO Norm")
OURS = "∆L 0.75"
BOOTSTRAP = 2000
T_QUANTILES = {2: 50.9, 3: 8.86, 4: 5.39, 5: 4.31, 6: 3.81, 7: 3.52, 8: 3.34, 9: 3.21, 10: 3.11}
"""Number of seeds → the |t| of a paired difference that is exceeded with probability 1.25 % where
there is none (Student's t, two-sided): 5 % for the four baselines together (Bonferroni)."""


def write(
    folder: Path,
    runs: Mapping[Key, Path],
    measurements: Mapping[Key, Measurement],
    settings: Mapping[str, Any],
) -> None:
    """Writes runs.csv, curves.csv, gradients.csv, lengths.csv, three plots and README.md."""
    folder.mkdir(parents=True, exist_ok=True)
    curves = {key: _curve(run) for key, run in runs.items()}
    table = [_run_row(key, run, curves[key]) for key, run in runs.items()]
    noise = [row for key, m in measurements.items() for row in _noise_rows(key, m)]
    slopes = [_slope_row(key, m) for key, m in measurements.items()]
    _csv(folder / "runs.csv", table)
    _csv(
        folder / "curves.csv",
        [
            {"method": name, "seed": seed, "step": step, "accuracy": accuracy}
            for (name, seed), curve in curves.items()
            for step, accuracy in curve
        ],
    )
    _csv(folder / "gradients.csv", noise)
    _csv(folder / "lengths.csv", slopes)
    _plot_curves(folder / "accuracy.png", curves)
    _plot_noise(folder / "gradients.png", noise)
    _plot_lengths(folder / "lengths.png", measurements)
    (folder / "README.md").write_text(page(table, noise, slopes, settings))


# --------------------------------------------------------------------------------------- numbers


def paired(table: Sequence[Mapping[str, Any]], a: str, b: str, column: str) -> NDArray[np.float64]:
    """`column` of method a minus that of method b, for each seed that both have."""
    values = {(row["method"], row["seed"]): row[column] for row in table}
    seeds = sorted({seed for _, seed in values})
    return np.array([values[a, s] - values[b, s] for s in seeds if {(a, s), (b, s)} <= set(values)])


def interval(gram: NDArray[np.float64], rng: np.random.Generator) -> tuple[float, float]:
    """95 % bootstrap interval of the coefficient of variation over batches, [K, K] → (low, high).

    A batch that is drawn twice makes a pair with itself; such pairs are left out.
    """
    k = len(gram)
    values = []
    for _ in range(BOOTSTRAP):
        chosen = rng.integers(k, size=k)
        sub, same = gram[np.ix_(chosen, chosen)], chosen[:, None] == chosen
        square, mean_square = np.diag(sub).mean(), sub[~same].mean()
        good = mean_square > 0
        values.append(np.sqrt(max(square - mean_square, 0) / mean_square) if good else np.inf)
    low, high = np.quantile(values, [0.025, 0.975], method="nearest")
    return float(low), float(high)


def power_law(lengths: NDArray[Any], squares: NDArray[Any]) -> float:
    """Exponent b of E‖h‖² ∝ L^b: least squares through the logarithms of the means of bins with
    equally many responses."""
    return float(np.polyfit(*np.log(bin_means(lengths, squares)), 1)[0])


def bin_means(
    lengths: NDArray[Any], squares: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean length and mean ‖h‖² of up to ten bins with equally many responses, shortest first."""
    order = np.argsort(lengths, kind="stable")
    bins = np.array_split(order, min(10, max(2, len(order) // 20)))
    return (
        np.array([lengths[b].mean() for b in bins]),
        np.array([squares[b].mean() for b in bins]),
    )


def _curve(run: Path) -> list[tuple[int, float]]:
    rows = read_metrics(run / "metrics.jsonl")
    points = [(int(r["step"]), list(validation_scores(r).values())) for r in rows]
    return [(step, float(np.mean(values))) for step, values in points if values]


def _run_row(key: Key, run: Path, curve: list[tuple[int, float]]) -> dict[str, Any]:
    steps = [r for r in read_metrics(run / "metrics.jsonl") if "actor/grad_norm" in r]
    norms = np.array([r["actor/grad_norm"] for r in steps])
    last = steps[-10:]
    return {
        "method": key[0],
        "seed": key[1],
        "accuracy_before": curve[0][1],
        "accuracy_after": curve[-1][1],
        "accuracy_mean": float(np.mean([accuracy for _, accuracy in curve[1:]])),
        "response_length": float(np.mean([r["response_length/mean"] for r in last])),
        "truncated": float(np.mean([r["response_length/clip_ratio"] for r in last])),
        "entropy": float(np.mean([r["actor/entropy"] for r in last])),
        "grad_norm_mean": float(norms.mean()),
        "grad_norm_cv": float(norms.std() / norms.mean()),
    }


def _noise_rows(key: Key, m: Measurement) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    reference = NAMES.index("Dr. GRPO Norm")
    measured = [coefficient_of_variation(gram) for gram in m.grams]
    predicted = m.predicted.mean(1)
    rows = []
    for i, name in enumerate(NAMES):
        low, high = interval(m.grams[i], rng)
        rows.append(
            {
                "policy": key[0],
                "seed": key[1],
                "method": name,
                "cv": measured[i],
                "cv_low": low,
                "cv_high": high,
                "relative": measured[i] / measured[reference],
                "predicted_relative": predicted[i] / predicted[reference],
            }
        )
    return rows


def _slope_row(key: Key, m: Measurement) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    members = [np.flatnonzero(m.batches == b) for b in np.unique(m.batches)]
    slopes = []
    for _ in range(200):
        chosen = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        slopes.append(power_law(m.lengths[chosen], m.squares[chosen]))
    low, high = np.quantile(slopes, [0.025, 0.975])
    return {
        "policy": key[0],
        "seed": key[1],
        "responses": len(m.lengths),
        "length_mean": float(m.lengths.mean()),
        "length_cv": float(m.lengths.std() / m.lengths.mean()),
        "exponent": power_law(m.lengths, m.squares),
        "exponent_low": float(low),
        "exponent_high": float(high),
    }


# ------------------------------------------------------------------------------------------ words


def page(
    table: Sequence[Mapping[str, Any]],
    noise: Sequence[Mapping[str, Any]],
    slopes: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> str:
    """The findings, in Markdown; every sentence with a verdict follows from the numbers."""
    seeds, steps, batches = (settings[k] for k in ("seeds", "steps", "batches"))
    lines = [
        "# Aggregation study: findings",
        "",
        f"The quick start's CountDown task: {seeds} seeds, each with a warm-up of its own that all "
        f"methods start from; {steps} steps of 32 prompts × 8 responses; accuracy on 512 fresh "
        "problems, four answers each at temperature 1. Made by "
        "`.venv/bin/python benchmarks/aggregation_study/study.py"
        f" --seeds {seeds} --steps {steps} --batches {batches}`.",
        "",
        "## Accuracy",
        "",
        "Mean over seeds, in % (smallest–largest). *Mean of all* is over all validations after the "
        "start, so that it tells how fast a method learns.",
        "",
        "| method | before | after | mean of all | tokens, last 10 steps | truncated | "
        "gradient norm: deviation / mean |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in NAMES:
        mine = [row for row in table if row["method"] == name]
        percent = [
            _spread([100 * row[k] for row in mine], ".1f")
            for k in ("accuracy_before", "accuracy_after", "accuracy_mean")
        ]
        cells = [
            _spread([row["response_length"] for row in mine], ".0f"),
            _spread([100 * row["truncated"] for row in mine], ".1f") + " %",
            _spread([row["grad_norm_cv"] for row in mine], ".2f"),
        ]
        lines.append(f"| {name} | {' | '.join([*percent, *cells])} |")
    lines += ["", "![Validation accuracy](accuracy.png)", ""]
    for label, column in (
        ("After the last step", "accuracy_after"),
        ("Over all validations", "accuracy_mean"),
    ):
        lines += [f"{label}, {OURS} against, seed by seed (percentage points):", ""]
        lines += [f"* {_verdict(paired(table, OURS, other, column), other)}" for other in BASELINES]
        lines.append("")
    lines += _noise_words(noise)
    lines += _slope_words(slopes)
    return "\n".join(lines)


def _verdict(differences: NDArray[np.float64], other: str) -> str:
    d = 100 * differences
    listed = ", ".join(f"{x:+.1f}" for x in d)
    spread = d.std(ddof=1) if len(d) > 1 else float("nan")
    t = d.mean() / (spread / np.sqrt(len(d))) if len(d) > 1 else 0.0
    shown = len(d) > 1 and abs(t) > T_QUANTILES.get(len(d), 3.11)
    word = ("ahead" if t > 0 else "behind") if shown else "no difference shown"
    return f"{other}: {d.mean():+.1f} ± {spread:.1f} (standard deviation; {listed}): {word}"


def _noise_words(noise: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "## Noise of the gradient",
        "",
        "CV = √(E‖g − E g‖²) / ‖E g‖ of a batch's gradient on a fixed policy. *Relative* is to Dr. "
        "GRPO Norm's on the same batches; *predicted* is the same ratio from the lengths alone, "
        "√(Σ w² L) / Σ w. Mean over seeds (smallest–largest); the interval is the widest of the "
        "seeds' 95 % bootstrap intervals.",
    ]
    for policy in dict.fromkeys(row["policy"] for row in noise):
        lines += ["", f"Policy {policy}:", ""]
        lines += ["| method | CV | interval | relative | predicted |", "|---|---|---|---|---|"]
        for name in NAMES:
            mine = [row for row in noise if (row["policy"], row["method"]) == (policy, name)]
            low, high = min(r["cv_low"] for r in mine), max(r["cv_high"] for r in mine)
            cells = [
                _spread([row["cv"] for row in mine], ".2f"),
                f"{low:.2f}–{high:.2f}",
                _spread([row["relative"] for row in mine], ".3f"),
                _spread([row["predicted_relative"] for row in mine], ".3f"),
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        best = {
            seed: min(
                (row for row in noise if (row["policy"], row["seed"]) == (policy, seed)),
                key=lambda row: row["cv"],
            )["method"]
            for seed in sorted({row["seed"] for row in noise})
        }
        text = ", ".join(f"seed {seed}: {name}" for seed, name in best.items())
        lines += ["", f"Least noise: {text}."]
    return [*lines, "", "![Measured and predicted noise](gradients.png)", ""]


def _slope_words(slopes: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "## Does the variance of a response's gradient grow like its length?",
        "",
        "Exponent b of E‖Σ_t ∇ log π(a_t)‖² ∝ L^b, over the responses with an advantage; the "
        "method rests on b = 1.",
        "",
        "| policy | seed | responses | mean length | length CV | b | 95 % interval |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in slopes:
        lines.append(
            f"| {row['policy']} | {row['seed']} | {row['responses']} | {row['length_mean']:.0f} | "
            f"{row['length_cv']:.2f} | {row['exponent']:.2f} | "
            f"{row['exponent_low']:.2f}–{row['exponent_high']:.2f} |"
        )
    return [*lines, "", "![Squared norm against length](lengths.png)", ""]


def _spread(values: Iterable[float], form: str) -> str:
    v = list(values)
    return f"{np.mean(v):{form}} ({min(v):{form}}–{max(v):{form}})"


# ------------------------------------------------------------------------------------------ files


def _csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            rounded = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(rounded)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for a in axes:
        a.grid(alpha=0.25)
        a.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plot_curves(path: Path, curves: Mapping[Key, list[tuple[int, float]]]) -> None:
    figure, (axes,) = _figure(8.5, 4.5)
    for name in NAMES:
        mine = [curve for (method, _), curve in curves.items() if method == name]
        steps = [step for step, _ in mine[0]]
        y = 100 * np.array([[accuracy for _, accuracy in curve] for curve in mine])
        axes.plot(
            steps, y.mean(0), color=COLORS[name], lw=2, label=name, ls="-" if "∆" in name else "--"
        )
        axes.fill_between(steps, y.min(0), y.max(0), color=COLORS[name], alpha=0.08, lw=0)
    axes.set(xlabel="training step", ylabel="validation accuracy (%)")
    axes.set_title("mean over seeds; bands: smallest to largest", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(path)


def _plot_noise(path: Path, noise: Sequence[Mapping[str, Any]]) -> None:
    policies = list(dict.fromkeys(row["policy"] for row in noise))
    figure, panels = _figure(5.5 * len(policies), 4, len(policies))
    for axes, policy in zip(panels, policies, strict=True):
        for y, name in enumerate(reversed(NAMES)):
            mine = [row for row in noise if (row["policy"], row["method"]) == (policy, name)]
            values = [row["relative"] for row in mine]
            axes.barh(y, np.mean(values), color=COLORS[name], alpha=0.5)
            axes.plot(values, [y] * len(values), "o", color=COLORS[name], ms=4)
            axes.plot(np.mean([row["predicted_relative"] for row in mine]), y, "kx", ms=7)
        axes.set_yticks(range(len(NAMES)), list(reversed(NAMES)))
        axes.axvline(1, color="0.5", lw=1)
        axes.set(title=f"policy {policy}", xlabel="CV of the gradient, relative to Dr. GRPO Norm")
    figure.suptitle(
        "bars: mean over seeds; dots: seeds; crosses: predicted from the lengths", fontsize=10
    )
    figure.savefig(path)


def _plot_lengths(path: Path, measurements: Mapping[Key, Measurement]) -> None:
    policies = list(dict.fromkeys(policy for policy, _ in measurements))
    figure, panels = _figure(5.5 * len(policies), 4, len(policies))
    for axes, policy in zip(panels, policies, strict=True):
        for (name, seed), m in measurements.items():
            if name != policy:
                continue
            x, y = bin_means(m.lengths, m.squares)
            axes.loglog(x, y, "o-", label=f"seed {seed}", color=f"C{seed}")
            axes.loglog(x, x * (y / x).mean(), ":", color=f"C{seed}", lw=1)
        axes.set(title=f"policy {policy}", xlabel="response length (tokens)")
        axes.set_ylabel("mean of ‖Σ ∇ log π‖²")
        axes.legend(frameon=False)
    figure.suptitle("dotted: proportional to the length", fontsize=10)
    figure.savefig(path)
