"""A whole run on a laptop's CPU: problems, a tiny model, its warm-up, RL, a table, a report.

``python examples/tiny_run.py TASK`` does it for one of ``TASKS``; ``--help`` lists them. The quick
start, ``train_scripts/math-tiny-*.sh`` and ``recipe/dapo/countdown-dapo-tiny-*.sh`` make the
environment and then start this program.

It is a template, too. For a task of your own,

1. write a script that makes its data. It gets ``--local_dir`` and ``--seed``, and writes
   ``train.parquet`` and ``test.parquet`` (problems), ``model/`` (an untrained model with its
   tokenizer) and ``sft.parquet`` (texts for the warm-up). ``tiny_math.py`` is one to copy;
2. add a ``Task`` to ``TASKS``, like ``MATH``. The ``data_source`` of its problems selects the
   reward, or ``custom_reward_function.path=FILE`` among its settings does.
"""

import argparse
import contextlib
import hashlib
import io
import os
import runpy
import shutil
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

EXAMPLES = Path(__file__).resolve().parent
REPO = EXAMPLES.parent
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait cost more than they gain
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # no warning about GPUs that nobody asked for
    "PYTHONUNBUFFERED": "1",
}

# Settings that all tasks share: of the warm-up (verl.trainer.main_sft), and of the RL part.
WARM_UP = """
    data.train_batch_size=32 data.max_length=256 trainer.total_epochs=1
    optim.lr=4e-3 optim.betas=[0.9,0.95] optim.lr_warmup_steps=50 optim.warmup_style=linear
    trainer.n_gpus_per_node=2 trainer.device=cpu
"""
RL = """
    data.apply_chat_template=False data.train_batch_size=32
    actor_rollout_ref.model.enable_gradient_checkpointing=False
    actor_rollout_ref.actor.ppo_mini_batch_size=32 actor_rollout_ref.actor.use_dynamic_bsz=True
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=8192
    actor_rollout_ref.actor.optim.lr=1.5e-4 actor_rollout_ref.actor.optim.betas=[0.9,0.95]
    actor_rollout_ref.rollout.name=hf actor_rollout_ref.rollout.n=8
    actor_rollout_ref.rollout.val_kwargs.n=1 actor_rollout_ref.rollout.val_kwargs.do_sample=True
    actor_rollout_ref.rollout.val_kwargs.temperature=1
    trainer.logger=[console] trainer.n_gpus_per_node=2 trainer.device=cpu
    trainer.test_freq=10 trainer.save_freq=10 trainer.max_actor_ckpt_to_keep=1
"""
LORA = """
    actor_rollout_ref.model.lora_rank=8 actor_rollout_ref.model.lora_alpha=16
    actor_rollout_ref.actor.optim.lr=1.5e-3
"""
METHODS = {
    "delta-l-norm": "algorithm.use_grpopp=True algorithm.grpopp_config.alpha={alpha}",
    "dapo-norm": "actor_rollout_ref.actor.loss_agg_mode=token-mean",
    "grpo-norm": "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean",
    "dr-grpo-norm": "algorithm.use_grpopp=True algorithm.grpopp_config.alpha=0",
    "dr-grpo": "algorithm.use_dr_grpo=True",
}
OWN_METHOD = "a function of your own, path/to/file.py:function"
OF_METHODS = (".use_grpopp=", ".use_dr_grpo=", ".grpopp_config.alpha=", ".loss_agg_mode=")


@dataclass(frozen=True, slots=True)
class Task:
    """What a task has of its own. Its settings (``key=value …``) win over those that all share."""

    about: str
    """One line for ``--help``."""
    project: str
    """Folder in ``outputs/``, and ``trainer.project_name``."""
    data: tuple[str, ...]
    """Commands that make the data, in this order: a script in ``examples/`` and its options."""
    lesson: str
    """What the warm-up teaches, in words."""
    warm_up: str = ""
    """Settings of the warm-up."""
    rl: str = ""
    """Settings of the RL part."""
    math_server: bool = False
    """Whether the LaTeX server judges: the one at ``MATH_SERVER_URL``, else one that is started."""
    trainer: str = "verl.trainer.main_ppo"
    """Module of the RL part."""
    prefix: str = ""
    """Begins the names of its runs."""
    method: str = "delta-l-norm"
    """Default of ``--method``."""
    alpha: str = "0.75"
    """Default of ``--alpha``."""


COUNTDOWN = Task(
    about="CountDown: reach a target with three numbers and + - * /",
    project="quickstart",
    data=(
        "data_preprocess/countdown.py --generate --template_type tiny --min_operands 3"
        " --max_operands 3 --max_number 10 --max_target 50 --train_size 1600 --test_size 512",
        "tiny_countdown.py --sft_size 44800 --give_up 0.8 --patient 0.2",
    ),
    lesson="to search, and to give up too early",
    rl="data.max_prompt_length=16 data.max_response_length=256 trainer.total_training_steps=40",
)
DAPO = replace(  # the same data and folder, so the same warmed-up model
    COUNTDOWN,
    about="CountDown with DAPO's dynamic sampling and clipping",
    rl=f"""{COUNTDOWN.rl} data.gen_batch_size=64
        algorithm.filter_groups.enable=True algorithm.filter_groups.metric=acc
        algorithm.filter_groups.max_num_gen_batches=10
        actor_rollout_ref.actor.clip_ratio_low=0.2 actor_rollout_ref.actor.clip_ratio_high=0.3
        actor_rollout_ref.actor.clip_ratio_c=10.0""",
    trainer="recipe.dapo.main_dapo",
    prefix="dapo-",
    method="dapo-norm",
)
DAPO_DELTA_L = replace(
    DAPO, about="the same with ∆L Normalization", method="delta-l-norm", alpha="1"
)
MATH = Task(
    about="equations and inequalities, judged by the LaTeX server",
    project="math-tiny",
    data=(
        "tiny_math.py --max_terms 16 --sft_size 80000 --give_up 0.6 --patient 0.25"
        " --num_layers 3 --intermediate_size 128",
    ),
    lesson="to solve step by step, and to guess too early",
    warm_up="data.train_batch_size=64",
    rl="data.max_prompt_length=32 data.max_response_length=160 trainer.total_training_steps=60",
    math_server=True,
)
TASKS = {
    "countdown": COUNTDOWN,
    "countdown-dapo": DAPO,
    "countdown-dapo-delta-l": DAPO_DELTA_L,
    "math": MATH,
}


def main(argv: list[str] | None = None) -> None:
    """Everything, from the options to the table."""
    started = time.monotonic()
    args = parse_arguments(argv)
    task = TASKS[args.task]
    warm, folder, settings = plan(task, args)
    dry_run = os.environ.get("DRY_RUN") or "0"
    os.environ |= ENVIRONMENT | {"DRY_RUN": "quiet" if dry_run == "0" else dry_run}
    sys.stdout.reconfigure(line_buffering=True)
    sys.path[:0] = [os.getcwd(), str(REPO)]  # as `python -m` has it, and if verl isn't installed
    # An error in the overrides shows here, before anything is made.
    configuration = printed(task.trainer, *settings)
    del os.environ["DRY_RUN"]
    if dry_run != "0":
        return print(configuration, end="")
    import yaml  # not at the top: --help needs no packages

    run_dir = Path(yaml.safe_load(configuration)["trainer"]["default_local_dir"]).expanduser()
    if args.fresh:
        if run_dir != folder:
            die(f"--fresh deletes no folder that you chose: delete {run_dir}")
        shutil.rmtree(run_dir, ignore_errors=True)
    elif (run_dir / "summary.txt").exists():
        print("This run is finished; --fresh deletes it, --seed and --method make others.")
        return show(run_dir)
    warm_up(task, args.seed, warm)
    if (run_dir / "latest_checkpointed_iteration.txt").exists():
        print(f"[3/3] RL with {args.method}, on from the last checkpoint in {run_dir}")
    else:
        print(f"[3/3] RL with {args.method}; Ctrl-C stops it, and the same command goes on")
    call(task.trainer, *settings)
    report(run_dir, folder.name)
    show(run_dir)
    minutes, seconds = divmod(int(time.monotonic() - started), 60)
    print(f"  altogether, with all before the steps: {minutes} min {seconds:02d} s")


def die(message: str) -> NoReturn:
    """Ends with status 2 and one line."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Called for a wrong option."""
        die(f"{message}; see --help")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """``task``, the options, and ``overrides``: what is left, each a ``key=value``."""
    parser = Parser(description=__doc__.partition("\n")[0])
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    end = """Stopped midway, the same command goes on from the last checkpoint; after a finished run
        it shows the result again. key=value overrides the configuration of the RL part, which
        DRY_RUN=1 prints, making nothing."""
    for name, task in TASKS.items():
        options = {"usage": argparse.SUPPRESS, "epilog": end, "allow_abbrev": False}
        add = tasks.add_parser(name, help=task.about, **options).add_argument
        methods = f"{', '.join(METHODS)}, or {OWN_METHOD} [{task.method}]"
        add("--method", default=task.method, metavar="METHOD", help=methods)
        add("--alpha", help=f"exponent of delta-l-norm, or auto [{task.alpha}]")
        add("--lora", action="store_true", help="train adapters of rank 8 beside a frozen model")
        add("--seed", type=int, default=0, help="of the problems, the weights and the sampling [0]")
        add("--out", default=REPO / "outputs" / task.project, help="for all files [%(default)s]")
        add(
            "--fresh",
            action="store_true",
            help="delete this run and start anew; the warmed-up model stays",
        )
    args, args.overrides = parser.parse_known_args(argv)
    for override in args.overrides:
        if override.startswith("-"):
            die(f"there is no option {override}; see --help")
        if "=" not in override:
            die(f"{override} is neither an option nor an override (key=value); see --help")
        if any(key in override for key in OF_METHODS):
            name = override.partition("=")[2]
            remedy = f": --method {name}" * (".py:" in name)
            text = "here --method and --alpha choose the aggregation, and name the run"
            die(f"{override}: {text}{remedy}")
    if args.seed < 0:
        die(f"--seed {args.seed}: a whole number, 0 or more")
    if args.method not in METHODS and ".py:" not in args.method:
        names = f"(choose from {', '.join(METHODS)}, or {OWN_METHOD})"
        die(f"argument --method: invalid choice: {args.method!r} {names}")
    if args.alpha and args.method in METHODS.keys() - {"delta-l-norm"}:
        die("--alpha belongs to --method delta-l-norm")
    return args


def plan(task: Task, args: argparse.Namespace) -> tuple[Path, Path, list[str]]:
    """The folders of the warm-up and of the RL part, whose names tell settings apart, and the
    settings of the RL part. An override may move its folder."""
    out = Path(args.out).expanduser().absolute()
    scripts = [*(command.split()[0] for command in task.data), "tiny_model.py"]
    made_by = [(EXAMPLES / script).read_text() for script in scripts]
    of_warm_up = digest(*task.data, *WARM_UP.split(), *task.warm_up.split(), *made_by)
    warm = out / f"warm-up-seed-{args.seed}-{of_warm_up}"

    alpha = args.alpha or task.alpha
    own = f"actor_rollout_ref.actor.loss_agg_mode={args.method}"
    own += f" algorithm.grpopp_config.alpha={args.alpha}" * bool(args.alpha)
    method = METHODS.get(args.method, own)
    settings = f"{RL} {task.rl} {method.format(alpha=alpha)}".split()
    settings += LORA.split() * args.lora
    settings += [f"data.seed={args.seed}", f"actor_rollout_ref.rollout.seed={args.seed}"]
    settings += [f"trainer.project_name={task.project}", *args.overrides]
    files = [Path(s.partition("=")[2].partition(".py")[0] + ".py") for s in settings if ".py" in s]
    edited = [file.read_text() for file in files if file.is_file()]
    method = f"delta-l-norm-{alpha}" if args.method == "delta-l-norm" else args.method
    method = method.rpartition("/")[2].replace(".py:", "-")
    of_run = digest(warm.name, *settings, *edited)
    prefix = f"{task.prefix}{'lora-' * args.lora}"
    folder = out / f"{prefix}{method}-seed-{args.seed}-{of_run}"
    named = [
        f"data.train_files='{warm}/train.parquet'",
        f"data.val_files='{warm}/test.parquet'",
        f"actor_rollout_ref.model.path='{warm}/sft/huggingface'",
        f"trainer.experiment_name='{folder.name}'",
        f"trainer.default_local_dir='{folder}'",
        f"trainer.rollout_data_dir='{folder}/rollouts'",
        f"trainer.validation_data_dir='{folder}/validation'",
    ]
    own_server = task.math_server and not os.environ.get("MATH_SERVER_URL")
    named += ["reward_model.math_server.autostart=True"] if own_server else []
    return warm, folder, named + settings


def digest(*parts: str) -> str:
    """Eight characters that differ as the parts do."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def call(program: str, *arguments: str) -> None:
    """``python -m MODULE ARGUMENT…`` or ``python FILE ARGUMENT…``, but within this process: so that
    signals reach the trainer, and its exit status is this program's."""
    from verl.utils.signals import SIGNALS  # not at the top: --help needs no packages

    for number in set(SIGNALS) - {signal.SIGINT}:  # every time: Ray takes SIGTERM
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def printed(program: str, *arguments: str) -> str:
    """What `call` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        call(program, *arguments)
    return text.getvalue()


def warm_up(task: Task, seed: int, warm: Path) -> None:
    """The data and the warmed-up model, unless an earlier run made them."""
    if warm.is_dir():
        return print(f"[1/3] The warmed-up model of an earlier run: {warm}")
    aside = warm.with_name(f".warm-up-{os.getpid()}")  # renamed once it is finished
    try:
        print("[1/3] Problems, a tiny model, and text for its warm-up")
        for command in task.data:
            script, *options = command.split()
            call(f"{EXAMPLES}/{script}", f"--local_dir={aside}", f"--seed={seed}", *options)
        print(f"[2/3] Warm-up: learns {task.lesson}; about two minutes")
        files = [f"data.train_files='{aside}/sft.parquet'", f"model.path='{aside}/model'"]
        files += [f"trainer.default_local_dir='{aside}/sft'", f"data.seed={seed}"]
        call("verl.trainer.main_sft", *files, *WARM_UP.split(), *task.warm_up.split())
        if not warm.is_dir():
            aside.rename(warm)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"      moved, and kept for the next time: {warm}")


def report(run_dir: Path, title: str) -> None:
    """Writes ``report.html`` and ``summary.txt``, which is there once the run is finished."""
    page, table = run_dir / "report.html", run_dir / "summary.txt.tmp"
    table.write_text(printed("verl.tools.report", f"{run_dir}", f"-o{page}", f"--title={title}"))
    table.rename(run_dir / "summary.txt")
    print()


def show(run_dir: Path) -> None:
    """The table of a finished run, and where the rest is."""
    print((run_dir / "summary.txt").read_text(), end="")
    print(f"\n  report      {run_dir / 'report.html'}\n  everything  {run_dir}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
