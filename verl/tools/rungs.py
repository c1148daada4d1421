"""The rungs of a first run (`verl.tools.first_run`): what each is, and the commands that it starts.

This file is also that of the tiny model's reward, `share_of_numbers`."""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.tools import machine

REPO = Path(__file__).parents[2]
SCRIPT = REPO / "train_scripts" / "countdown-3b-delta-l-norm-alpha-1.sh"
ENVIRONMENT = {
    "DRY_RUN": "0",
    "SUBMIT": "0",
    "PREFLIGHT": "0",  # rung 0 has looked
    "VERL_PYTHON": sys.executable,
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "PYTHONUNBUFFERED": "1",
}


# Settings of all rungs; of those with the tiny model; and of those that the script starts. A step
# of the tiny model changes each log-probability by about 0.3 nats: weights that an engine doesn't
# get are seen, in bfloat16 too, whose rounding makes 0.002.
ALL = """
    actor_rollout_ref.rollout.verify_weights=True trainer.logger=[console]
    trainer.val_before_train=False trainer.test_freq=-1 trainer.save_freq=-1
    trainer.max_actor_ckpt_to_keep=1
"""
TINY = """
    algorithm.use_grpopp=True algorithm.grpopp_config.alpha=1
    custom_reward_function.name=share_of_numbers
    data.apply_chat_template=False data.train_batch_size=16
    data.max_prompt_length=16 data.max_response_length=64
    actor_rollout_ref.model.use_remove_padding=True
    actor_rollout_ref.actor.optim.lr=1e-2 actor_rollout_ref.actor.ppo_mini_batch_size=8
    actor_rollout_ref.actor.use_dynamic_bsz=True
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=8192
    actor_rollout_ref.rollout.n=4 actor_rollout_ref.rollout.max_num_seqs=64
    actor_rollout_ref.rollout.gpu_memory_utilization=0.3
"""
TOLERANCE = "actor_rollout_ref.rollout.verify_weights_tolerance=1e-3"  # in float32
VLLM = "actor_rollout_ref.rollout.name=vllm"
HOST = "actor_rollout_ref.rollout.weight_transfer=host"
IPC = "actor_rollout_ref.rollout.weight_transfer=ipc"
GRAPHS = "actor_rollout_ref.rollout.enforce_eager=False"
ONE_RANK = "trainer.n_gpus_per_node=1"  # starts sooner; rungs 1 and 2 have two
MAKE_PROBLEMS = "data_preprocess/countdown.py --generate"
MAKE_TINY = (
    f"{MAKE_PROBLEMS} --template_type tiny --min_operands 3 --max_operands 3 --max_number 10"
    " --max_target 50 --train_size 256 --test_size 16",
    "tiny_countdown.py --sft_size 1",
)


def share_of_numbers(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None
) -> float:
    """The reward of the tiny model: from the first step on, other responses have another one."""
    words = solution_str.split()
    return sum(word.isdigit() for word in words) / max(1, len(words))


@dataclass(frozen=True, slots=True)
class Job:
    """A command of a rung, which makes the steps up to `last`."""

    last: int
    settings: str = ""


@dataclass(frozen=True, slots=True)
class Rung:
    """What stands on it, for instance `Rung("tiny-hf", "a tiny model, hf", 10)`."""

    name: str
    about: str
    """In words; {model}: the large one, or on the CPU the tiny one."""
    minutes: float
    """Time limit for each of its jobs."""
    settings: str = ""
    """Of each job, beside those of its kind."""
    on_cpu: str | None = ""
    """The same on the CPU, which win; None: the rung is left out there."""
    jobs: tuple[Job, ...] = (Job(3),)
    """One after the other in the same folder: the second resumes."""
    script: bool = False
    """On GPUs the 3B script is started, on the CPU the tiny model with vLLM."""


TABLE = (
    Rung("preflight", "what a run needs of this machine", 20),
    Rung("tiny-hf", "a tiny model, hf", 15),
    Rung("tiny-vllm-host", "a tiny model, vLLM, weights by host memory", 20, f"{VLLM} {HOST}"),
    Rung(
        "tiny-vllm-ipc",
        "the same by CUDA IPC, CUDA graphs",
        20,
        f"{VLLM} {IPC} {GRAPHS}",
        None,
    ),
    Rung(
        "resume",
        "{model}, saved and resumed",
        60,
        "data.max_response_length=512",
        f"data.max_response_length=128 {ONE_RANK}",
        (Job(2, "trainer.save_freq=2 trainer.save_hf_model=False"), Job(3)),
        script=True,
    ),
    Rung(
        "full-length",
        "{model}, responses of full length",
        120,
        # Else responses without advantage, such as those cut off, leave the update's passes.
        "trainer.save_hf_model=False actor_rollout_ref.actor.entropy_coeff=1e-6",
        f"data.max_response_length=256 {ONE_RANK}",
        (Job(2),),
        script=True,
    ),
)


class RungFailed(Exception):
    """Each argument is a line: what is wrong."""


@dataclass(slots=True)
class FirstRun:
    """What is asked for."""

    out: Path
    cpu: bool = False
    devices: int = 1
    overrides: tuple[str, ...] = ()
    table: tuple[Rung, ...] = TABLE

    def folder(self, rung: Rung) -> Path:
        """That of a rung."""
        return self.out / f"rung-{self.table.index(rung)}-{rung.name}"

    def about(self, rung: Rung) -> str:
        """A rung in words."""
        return rung.about.format(model="a tiny model" if self.cpu else Path(self.model).name)

    @property
    def model(self) -> str:
        """The large one."""
        return os.environ.get("MODEL_PATH") or os.environ.get("BASE_MODEL") or "Qwen/Qwen2.5-3B"

    def commands(self, rung: Rung) -> list[list[str]]:
        """Those of a rung's jobs."""
        place = f"trainer.default_local_dir='{self.folder(rung)}'"
        if rung.name == "preflight":
            command = [sys.executable, "-m", "verl.tools.preflight", "--report"]
            command += [
                str(self.folder(rung) / "preflight.json"),
                "--device",
                "cpu" if self.cpu else "cuda",
            ]
            command += ["--skip-vllm"] if self.cpu else []  # which rung 2 tries
            return [[*command, f"trainer.n_gpus_per_node={self.devices}", place]]
        if rung.script and not self.cpu:
            command = ["bash", str(SCRIPT), *self.files("countdown", self.model)]
        else:
            tiny = [*self.files("tiny", str(self.out / "tiny" / "model")), *self.tiny_settings()]
            command = [sys.executable, "-m", "verl.trainer.main_ppo", *tiny]
        own = rung.settings
        if self.cpu:
            own = f"{VLLM if rung.script else ''} {own} {rung.on_cpu or ''}"
        command += [*ALL.split(), *own.split(), f"trainer.experiment_name={rung.name}", place]
        ends = [
            [f"trainer.total_training_steps={job.last}", *job.settings.split()] for job in rung.jobs
        ]
        return [[*command, *end, *self.overrides] for end in ends]

    def files(self, data: str, model: str) -> list[str]:
        """Settings that name all that decides: a rung is run again where they have changed."""
        return [
            f"data.train_files='{self.out}/{data}/train.parquet'",
            f"data.val_files='{self.out}/{data}/test.parquet'",
            f"actor_rollout_ref.model.path='{model}'",
            f"trainer.n_gpus_per_node={self.devices}",
        ]

    def tiny_settings(self) -> list[str]:
        """What the tiny model's rungs share."""
        device = ["trainer.device=cpu", TOLERANCE] if self.cpu else ["trainer.device=cuda"]
        reward = f"custom_reward_function.path='{Path(__file__).resolve()}'"
        return [reward, *device, *TINY.split()]

    def prepare(self) -> None:
        """Makes problems and the tiny model, if they aren't there. Raises: RungFailed."""
        sets: dict[str, tuple[str, ...]] = {"tiny": MAKE_TINY}
        if not self.cpu:
            sets["countdown"] = (f"{MAKE_PROBLEMS} --train_size 4096 --test_size 64",)
        for name, scripts in sets.items():
            if (self.out / name).is_dir():
                continue
            shutil.rmtree(aside := self.out / f".{name}", ignore_errors=True)
            for script in scripts:
                file, *options = script.split()
                command = [sys.executable, str(REPO / "examples" / file), *options]
                status, text = machine.run_limited([*command, f"--local_dir={aside}"], 300)
                if status != 0:
                    raise RungFailed(f"{file} can't make its data (status {status}):\n{text}")
            aside.rename(self.out / name)

    def environment(self) -> dict[str, str]:
        """Of the jobs."""
        return os.environ | ENVIRONMENT | {"N_GPUS": str(self.devices)}
