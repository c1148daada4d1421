"""A run's folder, and where its metrics go: a file, the console, and `LOGGERS`."""

import fcntl
import json
import logging
import math
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from omegaconf import OmegaConf
from tqdm import tqdm

from verl.config.schema import Config
from verl.protocol import OptimizerStep, Sample
from verl.trainer.ppo.loggers import LOGGERS, Logger, Metrics, Run
from verl.trainer.ppo.metrics import VAL_CORE
from verl.utils import own_functions
from verl.utils.samples import some_generations, write_responses

logger = logging.getLogger(__name__)

CONSOLE_COLUMNS = {
    "critic/rewards/mean": "reward {:6.3f}",
    "reward/acc": "acc {:5.3f}",
    "response_length/mean": "len {:5.0f}",
    "train/loss": "loss {:7.4f}",
    "actor/entropy": "entropy {:5.3f}",
    "actor/grad_norm": "grad {:6.3f}",
    "perf/throughput": "{:6.0f} tok/s",
    "perf/time_per_step": "{:6.1f} s",
}
REMEDY = "this logger gets no more until the run is resumed (metrics.jsonl has everything)"
HOME = "trainer.default_local_dir"
LATEST = "latest_checkpointed_iteration.txt"
RUN_ID = "wandb_run_id"  # file with the id of the run that a folder belongs to
RUN_FILES = re.compile(
    r"(global_step_\d+|latest_checkpointed_iteration\.txt|metrics\.jsonl|huggingface)(\..+)?|"
    r"config\.yaml|own_functions|wandb|tensorboard|swanlab|events\.out\.tfevents\..+|error\.log|val_only|"
    r"(skipped_step_)?\d+\.parquet"
)
"""What a run leaves; but math_server.log, to which a server may be writing already."""
DATA_FILES = re.compile(r"events\.out\.tfevents\..+|\d+\.parquet")  # of it in other folders
LOCKS: dict[Path, TextIO] = {}  # of the folders that this process writes to


@contextmanager
def _never_fatal(name: str, consequence: str) -> Iterator[None]:
    """Whatever fails in a report to people is logged, and costs no more than that report."""
    try:
        yield
    except Exception as error:
        logger.error("%s: %s: %s; %s", name, type(error).__name__, error, consequence)


class Tracking(AbstractContextManager["Tracking"]):
    """Writes metrics to metrics.jsonl and every logger of `trainer.logger`; responses to files."""

    def __init__(
        self, config: Any, run_dir: Path, run_id: str, total_steps: int, step: int, tokenizer: Any
    ) -> None:
        """`config`: a `Config` or `SFTConfig`; `run_id`: as for `claim`; `step`: steps made."""
        self.config, self.trainer, self.tokenizer = config, config.trainer, tokenizer
        settings = asdict(config)
        trainer, names = settings["trainer"], self.trainer.logger
        names = [names] if isinstance(names, str) else names
        part = "val_only" if trainer.get("val_only") else ""
        folders = {
            "trainer.rollout_data_dir": not part and trainer.get("rollout_data_dir"),
            "trainer.validation_data_dir": trainer.get("validation_data_dir"),
            "TENSORBOARD_DIR": "tensorboard" in names and os.environ.get("TENSORBOARD_DIR"),
        }
        self.folders = {key: Path(f).expanduser() / part for key, f in folders.items() if f}
        run_id = claim({HOME: run_dir} | self.folders, run_id)
        (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(settings))
        if isinstance(config, Config):
            for key, (_, text) in own_functions.sources(config).items():
                (run_dir / "own_functions").mkdir(exist_ok=True)
                (run_dir / "own_functions" / f"{key.rpartition('.')[2]}.py").write_text(text)
        self.file = MetricsFile(run_dir / "metrics.jsonl", step)
        board = self.folders.get("TENSORBOARD_DIR", run_dir / "tensorboard")
        run = Run(config, run_dir, run_id, step, board)
        self.loggers: list[Logger] = []
        starts = {"console": lambda _: start_console(total_steps, step)} | LOGGERS
        for name in (name for name in starts if name in names):
            with _never_fatal(name, REMEDY):
                self.loggers.append(starts[name](run))

    def log_validation(self, metrics: Metrics, step: int, samples: Sequence[Sample] = ()) -> None:
        """Records figures and some responses of a validation, before `log` completes `step`."""
        self.log(metrics, step, complete=False)
        self.dump("validation", samples, step)
        if number := min(len(samples), self.trainer.log_val_generations):
            with _never_fatal("trainer.log_val_generations", "no responses are shown"):
                skip = self.config.reward_model.skip_special_tokens
                shown = some_generations(samples, number, self.tokenizer, skip)
                self._tell(lambda logger: logger.log_generations(shown, step))

    def log(self, metrics: Metrics, step: int, complete: bool = True) -> None:
        """Records numbers of `step`; a line is printed when it is complete."""
        floats = {name: float(value) for name, value in metrics.items()}
        finite = {name: x if math.isfinite(x) else None for name, x in floats.items()}
        whole_step = self.file.write({"step": step} | finite)
        self._tell(lambda logger: logger.log(floats, step, whole_step if complete else None))

    def _tell(self, what: Callable[["Logger"], None]) -> None:
        """A logger that fails is left out from then on: its file may end in half a record."""
        loggers, self.loggers = self.loggers, []
        for each in loggers:
            with _never_fatal(each.name, REMEDY):
                what(each)
                self.loggers.append(each)

    def dump(self, kind: str, samples: Sequence[Sample], step: int, *taken: OptimizerStep) -> None:
        """Keeps responses in `trainer.{kind}_data_dir`, if there is such a folder."""
        if folder := self.folders.get(key := f"trainer.{kind}_data_dir"):
            with _never_fatal(key, f"the responses of step {step} are not kept"):
                skip = self.config.reward_model.skip_special_tokens
                write_responses(folder, step, samples, self.tokenizer, taken, skip)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._tell(lambda logger: logger.close(kind is not None))
        self.file.flush()
        self.file.file.close()


class MetricsFile:
    """metrics.jsonl: one JSON object a step, with the key `step`; NaN and infinity are null. A
    resumed run drops the lines after its step. What a full disk doesn't take is written later."""

    def __init__(self, path: Path, step: int) -> None:
        """Opens it with the lines up to `step`. Raises: OSError if it can't be written."""
        before = read_metrics(path) if path.exists() else []
        # Records that are to be written, and the last one, which may grow.
        self.pending = [record for record in before if record["step"] <= step]
        # Written aside and renamed while open: a run killed right here loses nothing.
        aside = path.with_suffix(".jsonl.tmp")
        self.path, self.file, self.start = path, aside.open("wb", buffering=0), 0
        if not self.flush():
            raise OSError(f"{aside} can't be written: make room on the disk")
        aside.replace(path)

    def write(self, record: dict[str, Any]) -> dict[str, Any]:
        """Appends a line, or extends the last one of the same step; all that it holds then."""
        if self.pending and self.pending[-1]["step"] == record["step"]:
            record = self.pending.pop() | record
        assert all(r["step"] < record["step"] for r in self.pending), "steps must increase"
        self.pending.append(record)
        self.flush()
        return record

    def flush(self) -> bool:
        """Writes the lines that wait; whether the disk has them all."""
        lines = [(json.dumps(record) + "\n").encode() for record in self.pending]
        left = memoryview(b"".join(lines))
        try:
            self.file.seek(self.start)
            while left:
                left = left[self.file.write(left) :]
            self.file.truncate()
            os.fsync(self.file.fileno())
        except OSError as error:
            logger.error("%s: %s; its last lines are written later", self.path, error)
            return False
        self.start += sum(map(len, lines[:-1]))
        self.pending = self.pending[-1:]
        return True


def start_console(total_steps: int, step: int) -> Logger:
    """Lines and tables on standard output; in a terminal a progress bar on standard error."""
    # disable=None: no bar without a terminal
    options: Any = {"unit": "step", "dynamic_ncols": True, "leave": False, "disable": None}
    bar = tqdm(total=total_steps, initial=step, **options)

    def log(metrics: Metrics, step: int, whole_step: Metrics | None) -> None:
        if whole_step is None:
            text = f"validation at step {step}\n{validation_table(metrics)}"
        else:
            text = step_line(whole_step, step, total_steps)
            bar.update(step - bar.n)
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    return Logger("Console", log, lambda failed: bar.close())


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl, whose last line may be cut off. Raises: ValueError for others."""
    lines, records = Path(path).read_text().splitlines(), []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
    return records


def step_line(metrics: Metrics, step: int, total_steps: int) -> str:
    """A line for the console, of 120 columns at most: the `CONSOLE_COLUMNS` that there are."""
    start = f"step {step:{len(str(total_steps))}d}/{total_steps}"
    found = [(form, metrics[key]) for key, form in CONSOLE_COLUMNS.items() if key in metrics]
    return "  ".join([start, *(form.format(math.nan if x is None else x) for form, x in found)])


def validation_table(metrics: Metrics) -> str:
    """An aligned table of ``val-core/*``, a row per data source, with the responses' length."""
    rows: dict[str, dict[str, str]] = {}
    for key, value in metrics.items():
        if match := VAL_CORE.fullmatch(key):
            label = match[3] if match[2] == "acc" else f"reward {match[3]}"
            rows.setdefault(match[1], {})[label] = f"{value:.3f}"
    for source, row in rows.items():
        for name, label, form in (("mean", "length", ".1f"), ("clip_ratio", "truncated", ".1%")):
            if (value := metrics.get(f"val-aux/{source}/response_length/{name}")) is not None:
                row[label] = f"{value:{form}}"
    labels = list(dict.fromkeys(label for row in rows.values() for label in row))
    cells = [[source, *(row.get(x, "") for x in labels)] for source, row in rows.items()]
    return align([["data source", *labels], *cells])


def align(rows: list[list[str]]) -> str:
    """Text table: the first column flush left, the others flush right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    form = "  ".join(["", f"{{:{first}}}", *(f"{{:>{width}}}" for width in others)])
    return "\n".join(form.format(*row).rstrip() for row in rows)


def make_folder(path: str | Path, key: str = HOME) -> Path:
    """Makes and locks a folder. Raises: ValueError if it can't, or another run has."""
    folder = Path(path).expanduser().resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = LOCKS.get(folder) or LOCKS.setdefault(folder, (folder / ".lock").open("a"))
    except OSError as error:
        raise ValueError(f"{key}={folder} can't be written: {error}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        remedy = "wait for its end, or give this one another"
        other = " (by another trainer.experiment_name, if that is part of it)" * (key == HOME)
        raise ValueError(f"another run writes to {key}={folder}: {remedy}{other}") from None
    except OSError as error:  # file systems without locks
        logger.info("%s can't be locked: %s", folder, error)
    return folder


def owner(folder: Path) -> str | None:
    """The id of the run that a folder belongs to, as far as it tells."""
    path = folder / RUN_ID
    return path.read_text().strip() or None if path.is_file() else None


def claim(folders: Mapping[str, Path], run_id: str) -> str:
    """Gives folders, by their keys, to the run `run_id` (empty: a new one); returns its id. What
    another left is moved to a subfolder, `LATEST` first: after a kill nothing resumes from it."""
    new, token, moved = not run_id, uuid.uuid4().hex[:8], []
    run_id = run_id or token
    for key, path in folders.items():
        folder = make_folder(path, key)
        other, pattern = owner(folder), RUN_FILES if key == HOME else DATA_FILES
        left = [file for file in folder.iterdir() if pattern.fullmatch(file.name)]
        if key == HOME and not other and not (folder / "metrics.jsonl").exists():
            left = [file for file in left if file.name.startswith("global_step_")]
        if left and other != run_id and (new or other):
            aside = folder / f"earlier_run_{token}"
            aside.mkdir()
            (aside / RUN_ID).write_text(other or "")
            for file in sorted(left, key=lambda file: file.name != LATEST):
                file.rename(aside / file.name)
            moved.append(str(aside))
        (folder / RUN_ID).write_text(run_id)
    if moved:
        logger.warning("what another run left was moved to %s", ", ".join(moved))
    return run_id
