"""Where the metrics of a run go: metrics.jsonl, console, Weights & Biases, TensorBoard."""

from __future__ import annotations

import html
import json
import logging
import math
import os
import re
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from verl.trainer.config.schema import TrainerConfig

CONSOLE_COLUMNS = (  # label, key, format
    ("reward", "critic/rewards/mean", "6.3f"),
    ("acc", "reward/acc", "5.3f"),
    ("length", "response_length/mean", "7.1f"),
    ("loss", "train/loss", "7.4f"),
    ("entropy", "actor/entropy", "6.3f"),
    ("grad norm", "actor/grad_norm", "7.3f"),
    ("tokens/s", "perf/throughput", "6.0f"),
    ("seconds", "perf/time_per_step", "6.1f"),
)
RUN_ID = "wandb_run_id"
"""File in a run's folder."""
GENERATIONS = "val/generations"
_CORE = re.compile(r"val-core/(.+)/(?:acc|reward)/((?:mean|best|maj)@\d+)(?:/mean)?")


class Tracking:
    """Writes the metrics of each training step to every logger of `trainer.logger`.

    Example::

        with Tracking(config.trainer, run_dir, total_steps, config_dict, step=resumed_step) as t:
            t.log_validation(validation, step, generations)  # now and then
            t.log(metrics, step)                             # once a step

    * `run_dir/metrics.jsonl`, always: one JSON object a step, with the key `step`. NaN and infinity
      are written as null. A resumed run drops the lines after its step: each step stands once.
    * `console`: one line a step on standard output, and, in a terminal, a progress bar with the
      time left on standard error.
      A full disk stops nothing: lines that can't be written are written later.
    * `wandb`: Weights & Biases; offline without credentials. `run_dir/wandb_run_id`, which is
      always written, keeps the id by which a resumed run continues the same one.
    * `tensorboard`: event files in TENSORBOARD_DIR or, without that variable,
      `run_dir/tensorboard`. TensorBoard hides the events of earlier runs there from the first step
      on that this one logs.
    """

    def __init__(
        self,
        trainer: TrainerConfig,
        run_dir: str | os.PathLike[str],
        total_steps: int,
        config: Mapping[str, Any],
        step: int = 0,
    ) -> None:
        """Opens the loggers; makes `run_dir` if it doesn't exist.

        Args:
            config: the resolved configuration as plain dicts, shown in wandb.
            step: the last step of the checkpoint that the run resumes from; 0: a new run, which
                starts its metrics anew.
        """
        loggers = [trainer.logger] if isinstance(trainer.logger, str) else trainer.logger
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.total_steps = total_steps
        id_file = self.run_dir / RUN_ID
        if not (step and id_file.exists()):
            id_file.write_text(uuid.uuid4().hex[:8])
        self.run_id = id_file.read_text().strip()
        self._open_file(step)
        self.bar = self.wandb = self.wandb_table = self.tensorboard = None
        if "console" in loggers:
            self.bar = tqdm(  # disable=None: no bar without a terminal
                total=total_steps, initial=step, unit="step", dynamic_ncols=True, disable=None
            )
        if "wandb" in loggers:
            self.wandb = self._start_wandb(trainer, config)
        if "tensorboard" in loggers:
            from torch.utils.tensorboard import SummaryWriter

            folder = os.environ.get("TENSORBOARD_DIR") or self.run_dir / "tensorboard"
            self.tensorboard = SummaryWriter(folder, purge_step=step + 1 if step else 0)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Records the numbers of `step`, which is then complete, and prints its line."""
        record = self._record(metrics, step, complete=True)
        if self.bar is not None:
            self._print(step_line(record, step, self.total_steps))
            self.bar.update(step - self.bar.n)

    def log_validation(
        self,
        metrics: Mapping[str, Any],
        step: int,
        generations: Sequence[tuple[str, str, float]] = (),
    ) -> None:
        """Records what a validation after `step` found, before `log` completes the step, and prints
        it as a table.

        Args:
            generations: (prompt, response, score) of some samples, for loggers that show text.
        """
        self._record(metrics, step, complete=False)
        if generations and self.wandb is not None:
            self._log_table(generations, step)
        if generations and self.tensorboard is not None:
            text = generations_markdown(generations)
            self._to_tensorboard(lambda writer: writer.add_text(GENERATIONS, text, step))
        if self.bar is not None:
            self._print(f"validation at step {step}\n{validation_table(metrics)}")

    def flush(self) -> bool:
        """Writes the lines that wait, and waits until the disk has them all; whether it has."""
        try:
            self.file.seek(self.end)
            left = memoryview(self.waiting)
            while left:
                left = left[self.file.write(left) :]
            self.file.truncate()
            self.end, self.waiting = self.end + len(self.waiting), b""
            os.fsync(self.file.fileno())
        except OSError as error:
            logger.error("%s: %s; its last lines are written later", self.file.name, error)
            return False
        return True

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes the loggers; wandb shows a run that ends with an error as failed."""
        if self.bar is not None:
            self.bar.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=0 if kind is None else 1)
        self._to_tensorboard(lambda writer: writer.close())
        if self.waiting:
            self.flush()
        self.file.close()

    def _print(self, text: str) -> None:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def _open_file(self, step: int) -> None:
        """Opens metrics.jsonl with the lines up to `step`; a new run (step 0) starts it anew."""
        path = self.run_dir / "metrics.jsonl"
        kept = read_metrics(path) if step and path.exists() else []
        # Written aside and renamed while open: a run killed right here loses nothing.
        aside = self.run_dir / "metrics.jsonl.tmp"
        self.file = aside.open("wb", buffering=0)
        self.last: dict[str, Any] = {}
        self.last_start = self.end = 0  # bytes: where the last line begins, and where it ends
        self.waiting = b""
        for record in kept:
            if record["step"] <= step:
                self._write(record)
        if self.waiting:
            raise OSError(f"{aside} can't be written: make room on the disk")
        aside.replace(path)

    def _record(self, metrics: Mapping[str, Any], step: int, complete: bool) -> dict[str, Any]:
        """Adds `metrics` to the line of `step`, and returns all that this line holds."""
        floats = {name: float(value) for name, value in metrics.items()}
        finite = {name: x if math.isfinite(x) else None for name, x in floats.items()}
        record = self._write({"step": step} | finite)
        if self.wandb is not None:
            self.wandb.log(floats, step=step, commit=complete)

        def add_scalars(writer: Any) -> None:
            for name, value in floats.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        self._to_tensorboard(add_scalars)
        return record

    def _log_table(self, generations: Sequence[tuple[str, str, float]], step: int) -> None:
        """Adds a row, laid out as verl does: step, input_1, output_1, score_1, input_2, …

        wandb uploads only the rows that are new to a table in its mode INCREMENTAL, and continues
        the table of a resumed run. In the others a table that grows is uploaded as a whole each
        time, and begins anew with the process.
        """
        import wandb

        if self.wandb_table is None:
            names = ("input", "output", "score")
            columns = [f"{name}_{i}" for i in range(1, len(generations) + 1) for name in names]
            self.wandb_table = wandb.Table(columns=["step", *columns], log_mode="INCREMENTAL")
        self.wandb_table.add_data(step, *(value for sample in generations for value in sample))
        self.wandb.log({GENERATIONS: self.wandb_table}, step=step, commit=False)

    def _to_tensorboard(self, write: Callable[[Any], None]) -> None:
        """Writes with the SummaryWriter, if there is one. What a full disk cuts off in the middle
        of an event file hides all that comes after it there, so nothing does."""
        if self.tensorboard is None:
            return
        try:
            write(self.tensorboard)
        except OSError as error:
            folder, self.tensorboard = self.tensorboard.log_dir, None
            logger.error(
                "%s: %s; TensorBoard gets no more of this run until it is resumed (metrics.jsonl "
                "has everything)",
                folder,
                error,
            )

    def _write(self, record: dict[str, Any]) -> dict[str, Any]:
        """Appends a line, or extends the last one if it is of the same step."""
        if self.last.get("step") == record["step"]:
            record = self.last | record
            self.end, self.waiting = self.last_start, self.before
        else:
            assert not self.last or self.last["step"] < record["step"], "steps must increase"
        self.last, self.last_start, self.before = record, self.end, self.waiting
        self.waiting += (json.dumps(record) + "\n").encode()
        self.flush()
        return record

    def _start_wandb(self, trainer: TrainerConfig, config: Mapping[str, Any]) -> Any:
        import wandb

        mode = os.environ.get("WANDB_MODE")
        # Asked of wandb itself: where it keeps keys, and for which host, changes with its version.
        if not mode and not wandb.login(prompt=False, verify=False):
            mode = "offline"
            print(
                "wandb: no WANDB_API_KEY and no `wandb login`, so this run is kept offline; "
                "upload it later with `wandb sync`",
                file=sys.stderr,
            )
        return wandb.init(
            project=trainer.project_name,
            name=trainer.experiment_name,
            config=dict(config),
            dir=str(self.run_dir),
            id=self.run_id,
            resume="allow",
            mode=mode,
        )


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, one dict per step; without a half-written last line.

    Raises: ValueError if another line isn't JSON.
    """
    lines = Path(path).read_text().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
    return records


def validation_scores(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The accuracy of each data source: ``val-core/{source}/{acc or reward}/mean@N``."""
    matches = ((_CORE.fullmatch(key), value) for key, value in metrics.items())
    return {m[1]: value for m, value in matches if m and m[2].startswith("mean@")}


def step_line(metrics: Mapping[str, Any], step: int, total_steps: int) -> str:
    """One line for the console: the `CONSOLE_COLUMNS` that there are, and the validation accuracy
    (mean over the data sources)."""
    parts = [f"step {step:{len(str(total_steps))}d}/{total_steps}"]
    for label, key, form in CONSOLE_COLUMNS:
        if key in metrics:
            value = math.nan if metrics[key] is None else metrics[key]
            parts.append(f"{label} {value:{form}}")
    scores = [score for score in validation_scores(metrics).values() if score is not None]
    if scores:
        parts.append(f"val acc {sum(scores) / len(scores):.3f}")
    return " | ".join(parts)


def validation_table(metrics: Mapping[str, Any]) -> str:
    """An aligned table of ``val-core/*``, a row per data source, with the length of the responses
    in tokens and the share of truncated ones."""
    rows: dict[str, dict[str, str]] = {}
    for key, value in metrics.items():
        if match := _CORE.fullmatch(key):
            rows.setdefault(match[1], {})[match[2]] = f"{value:.3f}"
    for source, row in rows.items():
        for name, label, form in (("mean", "length", ".1f"), ("clip_ratio", "truncated", ".1%")):
            key = f"val-aux/{source}/response_length/{name}"
            if key in metrics:
                row[label] = f"{metrics[key]:{form}}"
    header = ["data source", *dict.fromkeys(label for row in rows.values() for label in row)]
    cells = [
        [source, *(row.get(label, "") for label in header[1:])] for source, row in rows.items()
    ]
    return align([header, *cells])


def generations_markdown(generations: Sequence[tuple[str, str, float]]) -> str:
    """(prompt, response, score) of some samples as TensorBoard's Markdown. The texts are one line
    of HTML each, in which nothing is left that either language knows: a response can't break the
    page, nor look like another one."""
    parts = []
    for number, (*texts, score) in enumerate(generations, start=1):
        lines = (html.escape(text).splitlines() for text in texts)
        shown = ["<pre>" + "&#10;".join(part) + "</pre>" for part in lines]
        parts += [f"**{number}**, score {score:g}", *shown]
    return "\n\n".join(parts)


def align(rows: list[list[str]]) -> str:
    """Text table: the first column flush left, the others flush right, two spaces between them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(["", first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)
