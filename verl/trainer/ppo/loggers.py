"""Where people look at metrics beside the console: one small adapter for each package."""

import html
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from verl.config.base import shown

GENERATIONS = "val/generations"

Metrics = Mapping[str, Any]
Generations = Sequence[tuple[str, str, float]]  # (prompt, response, score), for people to read


class Logger(NamedTuple):
    """Shows metrics to people."""

    name: str
    log: Callable[[Metrics, int, Metrics | None], Any]  # what is new; all of a complete step
    close: Callable[[bool], Any]  # whether the run ends with an error
    log_generations: Callable[[Generations, int], Any] = lambda generations, step: None


class Run(NamedTuple):
    """What loggers know of a run."""

    config: Any  # a `Config` or `SFTConfig`
    folder: Path
    id: str
    step: int  # steps made: more than 0 if it is resumed
    board: Path  # for TensorBoard's files

    @property
    def described(self) -> dict[str, Any]:
        """Arguments that most packages have."""
        trainer = self.config.trainer
        names = {"project": trainer.project_name, "name": trainer.experiment_name}
        return names | {"config": asdict(self.config)}


def start_wandb(new: Run) -> Logger:
    """Weights & Biases; offline without credentials. A run that ends with an error has failed."""
    import wandb

    mode: Any = os.environ.get("WANDB_MODE")
    # Asked of wandb itself: where it keeps keys, and for which host, changes with its version.
    if not mode and not wandb.login(prompt=False, verify=False):
        mode = "offline"
        text = "wandb: no WANDB_API_KEY and no `wandb login`, so this run is kept offline; "
        print(text + "upload it later with `wandb sync`", file=sys.stderr)
    where: Any = {"dir": str(new.folder), "id": new.id, "resume": "allow", "mode": mode}
    run = wandb.init(**new.described, **where)
    table: Any = None

    def log(metrics: Metrics, step: int, whole_step: Metrics | None) -> None:
        run.log(dict(metrics), step=step, commit=whole_step is not None)

    def log_generations(generations: Generations, step: int) -> None:
        """Adds a row, laid out as verl does: step, input_1, output_1, score_1, input_2, …"""
        nonlocal table
        if table is None:  # only new rows are uploaded, in the mode INCREMENTAL
            names = ("input", "output", "score")
            columns = [f"{name}_{i}" for i in range(1, len(generations) + 1) for name in names]
            table = wandb.Table(columns=["step", *columns], log_mode="INCREMENTAL")
        table.add_data(step, *(value for sample in generations for value in sample))
        run.log({GENERATIONS: table}, step=step, commit=False)

    return Logger("Wandb", log, lambda failed: run.finish(int(failed)), log_generations)


def start_vemlp_wandb(run: Run) -> Logger:
    """Volcengine's Weights & Biases, with the credentials of the environment that verl takes."""
    import volcengine_ml_platform
    from volcengine_ml_platform import wandb

    names = {"ak": "VOLC_ACCESS_KEY_ID", "sk": "VOLC_SECRET_ACCESS_KEY"}
    names["region"] = "MLP_TRACKING_REGION"
    volcengine_ml_platform.init(**{key: os.environ[name] for key, name in names.items()})
    wandb.init(**run.described, sync_tensorboard=True)
    return _plain("vemlp_wandb", wandb, lambda failed: wandb.finish(exit_code=int(failed)))


def start_swanlab(run: Run) -> Logger:
    """SwanLab, in SWANLAB_MODE; offline without a key. A resumed run continues the same one."""
    import swanlab

    mode = os.environ.get("SWANLAB_MODE")
    mode = mode or ("online" if swanlab.Settings().api_key else "offline")
    folder = os.environ.get("SWANLAB_LOG_DIR", str(run.folder / "swanlab"))
    where: Any = {"mode": mode, "log_dir": folder}
    if mode in ("online", "cloud"):
        where |= {"id": run.id, "resume": "allow"}
    swanlab.init(**run.described, **where)

    def log_generations(generations: Generations, step: int) -> None:
        texts = [swanlab.Text(p + r, caption=f"score {score:g}") for p, r, score in generations]
        swanlab.log({GENERATIONS: texts}, step=step)

    def close(failed: bool) -> None:
        swanlab.finish(**({"state": "crashed", "error": "error.log"} if failed else {}))

    return _plain("SwanLab", swanlab, close, log_generations)


def start_trackio(run: Run) -> Logger:
    """Trackio, in its own folder (TRACKIO_DIR). A resumed run continues the one of its name."""
    import trackio

    trackio.init(**run.described, resume="allow" if run.step else "never", embed=False)

    def log_generations(generations: Generations, step: int) -> None:
        trackio.log({GENERATIONS: trackio.Table(dataframe=_table(generations))}, step=step)

    return _plain("Trackio", trackio, lambda failed: trackio.finish(), log_generations)


def start_mlflow(run: Run) -> Logger:
    """MLflow, at MLFLOW_TRACKING_URI. A resumed run continues the same one, which its tag tells."""
    import mlflow

    trainer, same = run.config.trainer, []
    if "MLFLOW_RUN_ID" not in os.environ:  # which start_run takes
        mlflow.set_experiment(trainer.project_name)
        query: Any = {"filter_string": f"tags.verl_run_id = '{run.id}'", "output_format": "list"}
        same = mlflow.search_runs(**query)
    if same:
        mlflow.start_run(run_id=same[0].info.run_id)
    else:
        mlflow.start_run(run_name=trainer.experiment_name, tags={"verl_run_id": run.id})
        mlflow.log_params({key: shown(value) for key, value, _ in run.config.walk()})

    def log(metrics: Metrics, step: int, _: Metrics | None) -> None:
        # MLflow's names have no @; verl writes _at_ for it.
        names = {name: re.sub(r"[^/\w.\- :]", "_", name.replace("@", "_at_")) for name in metrics}
        mlflow.log_metrics({names[name]: value for name, value in metrics.items()}, step=step)

    def log_generations(generations: Generations, step: int) -> None:
        mlflow.log_table(_table(generations), f"{GENERATIONS}/{step}.json")

    def close(failed: bool) -> None:
        mlflow.end_run("FAILED" if failed else "FINISHED")

    return Logger("MLflow", log, close, log_generations)


def start_clearml(run: Run) -> Logger:
    """ClearML. A resumed run continues the last task of its name."""
    import clearml

    names = {"project_name": run.described["project"], "task_name": run.described["name"]}
    # 0: steps are not counted on from the last one.
    again: Any = {"continue_last_task": 0} if run.step else {"reuse_last_task_id": False}
    # Else it would upload checkpoints, and read command lines that aren't argparse's.
    again |= {"auto_connect_frameworks": False, "auto_connect_arg_parser": False}
    # Threads report. After a fork, waiting for a finished git process may hang.
    no_fork: Any = False
    clearml.Task._report_subprocess_enabled = no_fork
    task: Any = clearml.Task.init(**names, **again, output_uri=False)
    task.connect_configuration(run.described["config"], name="Hyperparameters")
    to = task.get_logger()

    def log(metrics: Metrics, step: int, _: Metrics | None) -> None:
        for name, value in metrics.items():
            title, series = name.split("/", 1) if "/" in name else (name, name)
            to.report_scalar(title, series, value, step)

    def log_generations(generations: Generations, step: int) -> None:
        to.report_table(*GENERATIONS.split("/"), iteration=step, table_plot=_table(generations))

    def close(failed: bool) -> None:
        if failed:
            task.mark_failed(status_message="see error.log")
        task.close()

    return Logger("ClearML", log, close, log_generations)


def start_tensorboard(run: Run) -> Logger:
    """Event files, which hide from earlier ones what comes after the step that a run resumes at."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(run.board, purge_step=run.step + 1 if run.step else 0)

    def log(metrics: Metrics, step: int, _: Metrics | None) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def log_generations(generations: Generations, step: int) -> None:
        writer.add_text(GENERATIONS, generations_markdown(generations), step)

    return Logger("TensorBoard", log, lambda failed: writer.close(), log_generations)


def generations_markdown(generations: Generations) -> str:
    """Samples as TensorBoard's Markdown. A text is one line of HTML, in which nothing is left that
    either language knows: it can't break the page, nor look like another response."""
    parts = []
    for number, (*texts, score) in enumerate(generations, start=1):
        lines = (html.escape(text).splitlines() for text in texts)
        shown = ["<pre>" + "&#10;".join(part) + "</pre>" for part in lines]
        parts += [f"**{number}**, score {score:g}", *shown]
    return "\n\n".join(parts)


def _plain(
    name: str,
    package: Any,
    close: Callable[[bool], Any],
    log_generations: Callable[[Generations, int], Any] = lambda generations, step: None,
) -> Logger:
    """Of a package that logs a dict at a step."""

    def log(metrics: Metrics, step: int, _: Metrics | None) -> None:
        package.log(dict(metrics), step=step)

    return Logger(name, log, close, log_generations)


def _table(generations: Generations) -> pd.DataFrame:
    return pd.DataFrame(generations, columns=["input", "output", "score"])


LOGGERS: dict[str, Callable[[Run], Logger]] = {
    "wandb": start_wandb,
    "tensorboard": start_tensorboard,
    "mlflow": start_mlflow,
    "swanlab": start_swanlab,
    "trackio": start_trackio,
    "clearml": start_clearml,
    "vemlp_wandb": start_vemlp_wandb,
}
"""Names in `trainer.logger`, but `console` and `file`; their packages are called so, too."""
OTHER_PACKAGES = {"vemlp_wandb": "volcengine_ml_platform"}


def check_packages(names: str | Sequence[str]) -> None:
    """Raises ValueError if one of `trainer.logger` needs a package that isn't installed."""
    for name in [names] if isinstance(names, str) else names:
        package = OTHER_PACKAGES.get(name, name)
        if name in LOGGERS and not find_spec(package):
            remedy = f"install it (`pip install {package}`), or leave this logger out"
            raise ValueError(f"trainer.logger={name} needs the package {package}: {remedy}")
