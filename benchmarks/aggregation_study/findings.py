"""From finished runs and measurements to tables, plots and a page in plain words."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.aggregation_study.gradients import Measurement
from benchmarks.aggregation_study.noise import NAMES, REFERENCE, Key, Noise, noise_of
from verl.trainer.ppo.metrics import validation_scores
from verl.trainer.ppo.tracking import read_metrics

COLORS = dict(zip(NAMES, ("C0", "C1", "C4", "C5", "#8fd18f", "C2", "#0b6b0b"), strict=True))
BASELINES = ("DAPO Norm", "GRPO Norm", "Dr. GRPO", "Dr. GRPO Norm")
OURS = "∆L 0.75"
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
    noise = noise_of(measurements)
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
    _csv(folder / "gradients.csv", [row for n in noise for row in n.rows()])
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
        "entropy": float(np.mean([r["actor/entropy"] for r in last if "actor/entropy" in r])),
        "grad_norm_mean": float(norms.mean()),
        "grad_norm_cv": float(norms.std() / norms.mean()),
    }


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
    noise: Sequence[Noise],
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
    lines += [
        "A difference counts as *ahead* or *behind* if its mean is more than "
        f"{_quantile(seeds)} times its standard error from 0 (Student's t, two-sided 1.25 %: 5 % "
        "for the four comparisons together, Bonferroni). *No difference shown* is no proof "
        "that there is none.",
        "",
    ]
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
    shown = len(d) > 1 and abs(t) > _quantile(len(d))
    word = ("ahead" if t > 0 else "behind") if shown else "no difference shown"
    return f"{other}: {d.mean():+.1f} ± {spread:.1f} (standard deviation; {listed}): {word}"


def _quantile(seeds: int) -> float:
    return T_QUANTILES.get(seeds, 3.11)


def _noise_words(noise: Sequence[Noise]) -> list[str]:
    lines = [
        "## Noise of the gradient",
        "",
        "CV = √(E‖g − E g‖²) / ‖E g‖ of a batch's gradient on a fixed policy, over all seeds. "
        f"*Relative* is to {REFERENCE}'s on the same batches, with the 95 % interval of a "
        "bootstrap over the batches of each seed, and the smallest and largest of the seeds; "
        "*predicted* is the same ratio from the lengths alone, √(Σ w² L) / Σ w. A CV of 4 "
        "says that the noise of one batch's gradient is four times as long as its mean. DAPO Norm "
        "weighs all responses of a batch alike, as Dr. GRPO Norm does: their gradients differ "
        "by one factor per batch.",
    ]
    for mean in (n for n in noise if n.seed == "all"):
        lines += ["", f"Policy {mean.policy}:", ""]
        lines += [
            "| method | CV | 95 % interval | relative | 95 % interval | seeds | predicted |",
            "|---|---|---|---|---|---|---|",
        ]
        rows = [r for n in noise if n.policy == mean.policy and n is not mean for r in n.rows()]
        for row in mean.rows():
            seeds = [r["relative"] for r in rows if r["method"] == row["method"]]
            cells = [
                f"{row['cv']:.2f}",
                f"{row['cv_low']:.2f}–{row['cv_high']:.2f}",
                f"{row['relative']:.3f}",
                f"{row['relative_low']:.3f}–{row['relative_high']:.3f}",
                f"{min(seeds):.3f}–{max(seeds):.3f}",
                f"{row['predicted_relative']:.3f}",
            ]
            lines.append(f"| {row['method']} | {' | '.join(cells)} |")
        lines += ["", mean.least()]
    lines = [line.replace("inf", "∞") if line.startswith("|") else line for line in lines]
    return [*lines, "", "![Measured and predicted noise](gradients.png)", ""]


def _slope_words(slopes: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "## Does the variance of a response's gradient grow like its length?",
        "",
        "Exponent b of E‖Σ_t ∇ log π(a_t)‖² ∝ L^b, over the responses with an advantage. The "
        "method supposes b = 1, and that the expected gradient of a response doesn't depend on its "
        "length; weights L^(−b) would then have the least noise. Where another alpha than b has it "
        "(see above), not all of this holds. The fit is one line through means of bins, also where "
        "these are not on a line.",
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


def _plot_noise(path: Path, noise: Sequence[Noise]) -> None:
    policies = list(dict.fromkeys(n.policy for n in noise))
    rows = [row for n in noise for row in n.rows()]
    figure, panels = _figure(5.5 * len(policies), 4, len(policies))
    for axes, policy in zip(panels, policies, strict=True):
        for y, name in enumerate(reversed(NAMES)):
            *seeds, mean = (row for row in rows if (row["policy"], row["method"]) == (policy, name))
            axes.barh(y, mean["relative"], color=COLORS[name], alpha=0.5)
            axes.plot([mean["relative_low"], mean["relative_high"]], [y, y], color=COLORS[name])
            axes.plot(
                [r["relative"] for r in seeds], [y] * len(seeds), "o", color=COLORS[name], ms=4
            )
            axes.plot(mean["predicted_relative"], y, "kx", ms=7)
        axes.set_yticks(range(len(NAMES)), list(reversed(NAMES)))
        axes.axvline(1, color="0.5", lw=1)
        axes.set(title=f"policy {policy}", xlabel=f"CV of the gradient, relative to {REFERENCE}")
    figure.suptitle(
        "bars: all seeds, with the 95 % interval; dots: seeds; crosses: predicted from the lengths",
        fontsize=10,
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
