"""What a first run's job must show (`verl.tools.first_run`): checks of its metrics."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from verl.config.schema import Config
from verl.tools.memory_plan import GIB, Plan, machine, read_models
from verl.trainer.ppo.checks import ordinary_difference

Records = Sequence[dict[str, Any]]

MARGIN, BESIDE = 1.2, 1.0
"""Memory may be so many times the estimate, and so many GiB for what libraries take."""
LOW_MFU = 0.1
FINITE = ("actor/", "train/", "critic/", "rollout/")
"""Metrics that must be finite begin so."""


@dataclass(slots=True)
class Findings:
    """What the checks of a job say."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    """Of the last step: seconds, tokens_s, mfu; of all: difference, memory, estimate (GiB)."""
    seconds: int = 0
    """That all jobs of the rung took."""

    def cells(self) -> list[str]:
        """For a table: seconds, seconds a step, tokens/s, difference, memory, MFU."""
        forms = {"step_s": ".1f", "tokens_s": ",.0f", "difference": ".1e", "memory": ".1f"}
        found = [
            f"{self.figures[k]:{form}}" if k in self.figures else "–" for k, form in forms.items()
        ]
        if "estimate" in self.figures:
            found[-1] += f" of {self.figures['estimate']:.1f}"
        found[-1] += " GiB" if "memory" in self.figures else ""
        mfu = f"{self.figures['mfu']:.0%}" if "mfu" in self.figures else "–"
        return [str(self.seconds), *found, mfu]

    def __str__(self) -> str:
        """A line of figures."""
        if not self.figures:
            return "ok"
        _, step, tokens, difference, memory, mfu = self.cells()
        return (
            f"{step} s a step, {tokens} tokens/s, difference {difference}, memory {memory}"
            f"{'' if mfu == '–' else f', MFU {mfu}'}"
        )


def read_config(file: Path) -> Config:
    """config.yaml of a run."""
    merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(file))
    config: Any = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def memory_estimate(config: Config) -> float | None:
    """GiB that PyTorch allocates on a rank's GPU at most, by `verl.tools.memory_plan`: that of an
    update, or of resuming; without what CUDA takes for the process. None: the model isn't known."""
    try:
        model, beside = read_models(config)
        plan = Plan(config, model, "cuda", *machine("cuda")[:2], beside)
    except ValueError:
        return None
    phases = [plan.training(), plan.resuming()]
    phases += [plan.training_critic(plan.critic)] if plan.critic else []
    return max(sum(parts.values()) - parts["process"] for parts in phases) / GIB


def judge_preflight(report: Path) -> Findings:
    """What the report of `verl.tools.preflight` says, with the remedies."""
    found = Findings()
    if report.exists():
        for check in json.loads(report.read_text())["checks"]:
            remedy = f"; {check['remedy']}" if check["remedy"] else ""
            text = f"{check['name']}: {check['text']}{remedy}"
            for status, lines in (("failure", found.problems), ("warning", found.warnings)):
                lines += [text] if check["status"] == status else []
    return found


def judge(records: Records, config_file: Path, last: int | None, cpu: bool) -> Findings:
    """`judge_metrics` with what config.yaml of the run says."""
    config = read_config(config_file)
    return judge_metrics(records, config, last, cpu, None if cpu else memory_estimate(config))


def judge_metrics(
    records: Records, config: Config, last: int | None, cpu: bool, estimate: float | None
) -> Findings:
    """Checks the metrics of a job that was to make the steps up to `last`; None: it has failed, and
    has made some of them at most. `estimate`: of memory, in GiB."""
    problems = [] if last is None else list(wrong_steps(records, last))
    problems += not_finite(records)
    tolerance = config.actor_rollout_ref.rollout.verify_weights_tolerance
    largest, _ = ordinary_difference(config, "cpu" if cpu else "cuda")
    limits = {
        "rollout/verify_logprob_diff": tolerance or largest,
        "rollout/logprob_diff_mean": largest,
    }
    for key, limit in limits.items():
        problems += too_large(records, key, limit)
    if records and not any(record.get("actor/grad_norm") for record in records):
        problems.append("actor/grad_norm is 0 in all steps: nothing was learned, nothing compared")
    findings = Findings(problems, [], figures_of(records))
    if not cpu:
        judge_memory(records, estimate, findings)
        full = config.data.max_response_length >= 8192
        if full and findings.figures.get("mfu", 1.0) < LOW_MFU:
            findings.warnings.append(
                f"perf/mfu is {findings.figures['mfu']:.3f}; less than {LOW_MFU} at full length is "
                "slow: see timing_s/update_actor, and whether states are offloaded"
            )
    return findings


def wrong_steps(records: Records, last: int) -> Iterator[str]:
    """Steps that are missing."""
    steps = [record["step"] for record in records]
    if steps != list(range(1, last + 1)):
        yield f"metrics.jsonl has the steps {steps}, not those from 1 to {last}"


def not_finite(records: Records) -> Iterator[str]:
    """Metrics that are no finite number (null in the file), and optimizer steps left out for it."""
    for record in records:
        for key, value in record.items():
            if key.startswith(FINITE) and (value is None or not math.isfinite(value)):
                yield f"{key} is not finite (step {record['step']})"
        if skipped := record.get("actor/skipped_steps"):
            yield f"actor/skipped_steps is {skipped:.0f} (step {record['step']}), not 0"


def too_large(records: Records, key: str, limit: float) -> Iterator[str]:
    """The largest value above the limit; or that a step that learned something has none."""
    values = {record["step"]: record[key] for record in records if record.get(key) is not None}
    if absent := [r["step"] for r in records if key not in r and r.get("actor/grad_norm") != 0]:
        yield f"{key} is missing in step {absent[0]}: nothing was compared"
    step = max(values, key=lambda step: values[step], default=None)
    if step is not None and values[step] > limit:
        yield f"{key} is {values[step]:.3g} (step {step}), above {limit:g}: engine and actor differ"


def judge_memory(records: Records, estimate: float | None, findings: Findings) -> None:
    """What PyTorch has allocated must be in the estimate. What it keeps beside that, in pieces, is
    no more than a warning: it gives it back where others need it."""
    if estimate is None:
        findings.warnings.append("no estimate of memory for this model: not compared")
        return
    findings.figures["estimate"] = estimate
    limit = MARGIN * estimate + BESIDE
    for kind, target in (("allocated", findings.problems), ("reserved", findings.warnings)):
        key = f"perf/max_memory_{kind}_gb"
        values = [record[key] for record in records if record.get(key) is not None]
        if not values:
            target.append(f"{key} is missing: the job ran without a GPU")
        elif max(values) > limit:
            target.append(
                f"{key} is {max(values):.1f} GiB, the estimate {estimate:.1f} GiB: more than "
                f"{MARGIN - 1:.0%} and {BESIDE:g} GiB above it"
            )


def judge_resumed(before: Records, after: Records) -> Iterator[str]:
    """`before`: the steps that an earlier job of the same folder made. They must stay as they were,
    even their seconds, and others follow."""
    if list(after[: len(before)]) != list(before):
        yield f"steps 1 to {len(before)} were made again instead of resuming after them"
    elif before and len(after) == len(before):
        yield f"the resumed job made no step after step {len(before)}"


def figures_of(records: Records) -> dict[str, float]:
    """For people: of the last step, and the largest of all."""
    if not records:
        return {}
    record = records[-1]
    found = {"mfu": record.get("perf/mfu"), "step_s": record.get("perf/time_per_step")}
    if found["step_s"]:
        found["tokens_s"] = record.get("perf/total_num_tokens", 0) / found["step_s"]
    for name, key in (
        ("difference", "rollout/logprob_diff_mean"),
        ("memory", "perf/max_memory_gb"),
    ):
        found[name] = max((r[key] for r in records if r.get(key) is not None), default=None)
    return {name: value for name, value in found.items() if value is not None}
