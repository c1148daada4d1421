"""Runs on disk: their metrics and settings, which of them are alike, and where others differ."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from verl.trainer.ppo.metrics import validation_scores
from verl.trainer.ppo.tracking import read_metrics

METHODS = {
    "token-mean": "DAPO Norm",
    "token-mean-legacy": "DAPO Norm per micro-batch",
    "token-sum": "token sum",
    "seq-mean-token-mean": "GRPO Norm",
    "seq-mean-token-sum": "sequence sums",
    "seq-mean-token-sum-norm": "sequence sums / M",
    "luspo": "sequence sums",
    "lambda-grpo": "λ-GRPO",
    "dr-grpo": "Dr. GRPO (Norm)",
    "delta-l": "∆L Norm",
}
"""Names of the aggregations, by the mode that `response_weights` knows them by."""

# Names, places and seeds: runs that differ in nothing else are draws of the same experiment.
_INCIDENTAL = re.compile(
    r"(.*\.)?(seed|experiment_name|project_name|default_local_dir|default_hdfs_dir|"
    r"rollout_data_dir|validation_data_dir|resume_mode|resume_from_path|logger)"
)
# Always equal to the keys of `algorithm` that they interpolate.
_COPIES = re.compile(r"actor_rollout_ref\.actor\.(use_dr_grpo|use_grpopp|grpopp_config\..*)")
_SEED = re.compile(r"seed[-_=]?\d+(-[0-9a-f]{8})?")


@dataclass(slots=True)
class Run:
    """What a run's folder tells."""

    folder: Path
    settings: dict[str, Any]
    """``config.yaml``, keys joined by dots; empty if there is no such file."""
    frame: pd.DataFrame
    """``metrics.jsonl``: a row per step, a column per metric; NaN: no finite number."""

    @property
    def name(self) -> str:
        """The folder's."""
        return self.folder.name

    @property
    def steps(self) -> int:
        """The last training step."""
        return int(max(self.frame.index, default=0))

    @property
    def tokens(self) -> float:
        """Of prompts and responses trained on."""
        return float(self.series("perf/total_num_tokens").sum())

    @property
    def seconds(self) -> float:
        """Of training steps and the validations after them."""
        keys = ("perf/time_per_step", "timing_s/testing")
        return float(sum(self.series(key).sum() for key in keys))

    @property
    def seed(self) -> Any:
        """Of the data's order, or else of sampling."""
        settings = self.settings
        return settings.get("data.seed", settings.get("actor_rollout_ref.rollout.seed"))

    @property
    def mode(self) -> str | None:
        """The loss aggregation, a key of `METHODS`; None if the settings don't tell."""
        if self.settings.get("algorithm.use_grpopp"):
            return "delta-l"
        if self.settings.get("algorithm.use_dr_grpo"):
            return "dr-grpo"
        return self.settings.get("actor_rollout_ref.actor.loss_agg_mode")

    @property
    def method(self) -> str:
        """The loss aggregation in words, with the policy loss and the estimator if those aren't the
        usual ones."""
        loss = "actor_rollout_ref.actor.policy_loss.loss_mode"
        others = (self.settings.get(loss), self.settings.get("algorithm.adv_estimator"))
        named = [str(x).rpartition("/")[2] for x in others if x not in (None, "vanilla", "grpo")]
        return ", ".join([self.aggregation, *named])

    @property
    def aggregation(self) -> str:
        """The loss aggregation in words; the run's name if the settings don't tell."""
        alpha = self.settings.get("algorithm.grpopp_config.alpha", 0)
        if self.mode == "lambda-grpo":
            return f"λ-GRPO, λ = {0 - alpha:g}"
        if self.mode == "delta-l":
            shown = alpha if alpha == "auto" else f"{alpha:g}"
            return f"∆L Norm, α = {shown}" if alpha else "Dr. GRPO Norm"
        if self.mode == "dr-grpo":
            return "Dr. GRPO" + " Norm" * (not self.settings.get("algorithm.use_dr_grpo"))
        return METHODS.get(self.mode or "") or (self.mode or self.name).rpartition("/")[2]

    def series(self, key: str) -> pd.Series:
        """The steps where a metric has a value, and the values; empty without such a metric."""
        if key not in self.frame:
            return pd.Series(dtype=float)
        return self.frame[key].dropna()


@dataclass(slots=True)
class Group:
    """Runs that are alike but for seeds, paths and names."""

    label: str
    runs: list[Run]


def read_run(folder: Path) -> Run:
    """Reads a run's folder.

    Raises: FileNotFoundError or ValueError if it isn't one, or its files can't be understood.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no metrics.jsonl: name a run's folder (its trainer.default_local_dir)"
        )
    records = read_metrics(path)
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f"{path}, line {number}: no JSON object with a whole number as `step`")
    frame = pd.DataFrame(records or {"step": []}).set_index("step")
    frame = frame.apply(pd.to_numeric, errors="coerce").replace([float("inf"), -float("inf")], None)
    frame = frame[~frame.index.duplicated(keep="last")].sort_index().astype(float)
    return Run(folder, _read_settings(folder / "config.yaml"), frame)


def accuracy_columns(frame: pd.DataFrame) -> dict[str, str]:
    """Data source → the metric that is its validation accuracy."""
    return validation_scores({str(column): column for column in frame.columns})


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Example: ``{"a": {"b": 1}}`` → ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def shown(value: Any) -> str:
    """A setting as text; of a path the last two parts, which say what it is, not where."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, str) and value.count("/") > 1:
        return "…/" + "/".join(value.rstrip("/").split("/")[-2:])
    return "null" if value is None else str(value)


def comparable(settings: dict[str, Any]) -> dict[str, str]:
    """The settings that make a run another experiment, as text: paths without a seed in them."""
    return {
        key: _SEED.sub("seed", shown(value))
        for key, value in settings.items()
        if not _INCIDENTAL.fullmatch(key) and not _COPIES.fullmatch(key)
    }


def group_runs(runs: list[Run]) -> list[Group]:
    """Runs with the same settings and validation sets together, in the order of their first.

    A run without settings is a group of its own. Labels are the method's name, and what else sets
    groups of one method apart.
    """
    by_settings: dict[Any, list[Run]] = {}
    for run in runs:
        identity = tuple(sorted(comparable(run.settings).items())) or run.folder
        by_settings.setdefault((identity, tuple(accuracy_columns(run.frame))), []).append(run)
    groups = [Group(alike[0].method, alike) for alike in by_settings.values()]
    for same in _by_label(groups):
        for key, values in list(differences(same).items())[:2]:
            for group, value in zip(same, values, strict=True):
                group.label += f", {key.split('.')[-1]} = {value}"
            if not _by_label(same):
                break
    for same in _by_label(groups):
        for group in same:
            group.label += f" ({group.runs[0].name})"
    return groups


def differences(groups: list[Group]) -> dict[str, list[str]]:
    """The settings that aren't the same in all groups: key → a value for each group."""
    all_settings = [comparable(group.runs[0].settings) for group in groups]
    keys = dict.fromkeys(key for settings in all_settings for key in settings)
    rows = {key: [settings.get(key, "–") for settings in all_settings] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _by_label(groups: list[Group]) -> list[list[Group]]:
    """Groups that share a label with others."""
    labels: dict[str, list[Group]] = {}
    for group in groups:
        labels.setdefault(group.label, []).append(group)
    return [same for same in labels.values() if len(same) > 1]


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} isn't YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no settings (key: value)")
    return flatten(tree)
