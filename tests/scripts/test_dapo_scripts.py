"""The scripts of recipe/dapo: what each resolves to, compared with the published command lines."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import warm_children, warm_python
from tests.scripts.published_dapo import PUBLISHED
from tests.scripts.test_scripts import STEERING, TASKS, Result, dry_run, method, resolved

ROOT = Path(__file__).parents[2]

FILTERING = {"algorithm.filter_overlong_response.enable": True}
PUNISHMENT = {"reward_model.overlong_buffer.enable": True}
DELTA_L = {"algorithm.use_grpopp": True, "actor_rollout_ref.actor.use_grpopp": True}
# Name → what sets it apart.
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "countdown-dapo-3b-wo-sp-wo-of": {},
    "countdown-dapo-3b-w-overlong-filtering": FILTERING,
    "countdown-dapo-3b-w-soft-punishment": PUNISHMENT,
    "countdown-dapo-3b-delta-L-norm-alpha-1": DELTA_L,
    "math-dapo-3b-wo-sp-wo-of": {},
    "math-dapo-3b-w-overlong-filtering": FILTERING,
    "math-dapo-3b-w-soft-punishment": PUNISHMENT,
    "math-dapo-3b-delta-L-norm-alpha-0.75": DELTA_L,
}
METHODS = {
    "countdown-dapo-3b-delta-L-norm-alpha-1": ("token-mean", True, False, 1.0),
    "math-dapo-3b-delta-L-norm-alpha-0.75": ("token-mean", True, False, 0.75),
}

COMMON = {
    "algorithm.adv_estimator": "grpo",
    "algorithm.use_kl_in_reward": False,
    "algorithm.kl_ctrl.kl_coef": 0.0,
    "algorithm.filter_groups.enable": True,
    "algorithm.filter_groups.max_num_gen_batches": 10,
    "algorithm.filter_overlong_response.enable": False,
    "algorithm.use_grpopp": False,
    "data.train_batch_size": 128,
    "data.gen_batch_size": 384,
    "data.max_response_length": 3072,
    "data.filter_overlong_prompts": True,
    "data.apply_chat_template": False,
    "actor_rollout_ref.model.path": "Qwen/Qwen2.5-3B",
    "actor_rollout_ref.model.use_remove_padding": True,
    "actor_rollout_ref.actor.optim.lr": 1e-6,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 32,
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 4,
    "actor_rollout_ref.actor.grad_clip": 1.0,
    "actor_rollout_ref.actor.clip_ratio_low": 0.2,
    "actor_rollout_ref.actor.clip_ratio_high": 0.3,
    "actor_rollout_ref.actor.clip_ratio_c": 10.0,
    "actor_rollout_ref.actor.loss_agg_mode": "token-mean",
    "actor_rollout_ref.actor.entropy_coeff": 0.0,
    "actor_rollout_ref.actor.use_kl_loss": False,
    "actor_rollout_ref.actor.kl_loss_coef": 0.0,
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size": 1,
    "actor_rollout_ref.actor.fsdp_config.param_offload": True,
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload": True,
    "actor_rollout_ref.ref.fsdp_config.param_offload": True,
    "actor_rollout_ref.ref.ulysses_sequence_parallel_size": 1,
    "actor_rollout_ref.rollout.name": "vllm",
    "actor_rollout_ref.rollout.n": 8,
    "actor_rollout_ref.rollout.temperature": 1.0,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
    "actor_rollout_ref.rollout.gpu_memory_utilization": 0.8,
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 4,
    "actor_rollout_ref.rollout.val_kwargs.n": 8,
    "actor_rollout_ref.rollout.val_kwargs.do_sample": True,
    "actor_rollout_ref.rollout.val_kwargs.temperature": 1.0,
    "reward_model.reward_manager": "dapo",
    "reward_model.overlong_buffer.enable": False,
    "reward_model.overlong_buffer.len": 2048,
    "reward_model.overlong_buffer.penalty_factor": 1.0,
    "trainer.logger": ["console", "wandb"],
    "trainer.project_name": "LatestVerlExperiment",
    "trainer.n_gpus_per_node": 8,
    "trainer.nnodes": 1,
    "trainer.val_before_train": False,
    "trainer.save_freq": 1000,
}
OF_TASK: dict[str, dict[str, Any]] = {
    "countdown": {
        "data.max_prompt_length": 256,
        "algorithm.filter_groups.metric": "acc",
        "trainer.total_epochs": 1500,
        "trainer.test_freq": 25,
    },
    "math": {
        "data.max_prompt_length": 1024,
        "algorithm.filter_groups.metric": "seq_final_reward",
        "trainer.total_epochs": 15,
        "trainer.test_freq": 50,
    },
}
TINY = {
    "countdown-dapo-tiny-wo-sp-wo-of": ("token-mean", False, False, None),
    "countdown-dapo-tiny-delta-L-norm-alpha-1": ("token-mean", True, False, 1.0),
}
GRPO_NORM = ("seq-mean-token-mean", False, False, None)
DELTA_L_HALF = ("token-mean", True, False, 0.5)


def files(task: str) -> dict[str, Any]:
    return {key: value for key, value in TASKS[task].items() if key.endswith("_files")}


def main_dapo(*arguments: str, cwd: Path = ROOT) -> Result:
    """`python -m recipe.dapo.main_dapo` with DRY_RUN=1."""
    environment = {key: value for key, value in os.environ.items() if key not in STEERING}
    return subprocess.run(
        [warm_python(), "-m", "recipe.dapo.main_dapo", *arguments],
        env=environment | {"DRY_RUN": "1", "PYTHONPATH": str(ROOT)} | warm_children(),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def results() -> dict[str, tuple[Result, Result]]:
    """Of every experiment: its script, and the published overrides; side by side."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ours = pool.map(lambda name: dry_run(f"../recipe/dapo/{name}"), EXPERIMENTS)
        overrides = [[f"{k}={v}" for k, v in PUBLISHED[name].items()] for name in EXPERIMENTS]
        theirs = pool.map(lambda given: main_dapo(*given), overrides)
        return dict(zip(EXPERIMENTS, zip(ours, theirs, strict=True), strict=True))


def test_no_script_is_left_out() -> None:
    assert {path.stem for path in (ROOT / "recipe/dapo").glob("*.sh")} == {*EXPERIMENTS, *TINY}


@pytest.mark.parametrize("name", TINY)
def test_siblings_of_the_quick_start(tmp_path: Path, name: str) -> None:
    config = resolved(dry_run(f"../recipe/dapo/{name}", "--out", str(tmp_path / "out")))
    quick_start = resolved(dry_run("quickstart", "--out", str(tmp_path / "out")))
    assert method(config) == TINY[name]
    differing = {key for key in config if config[key] != quick_start[key]}
    assert {key for key in differing if "grpopp" not in key} == {
        "trainer.experiment_name",
        "trainer.default_local_dir",
        "trainer.rollout_data_dir",
        "trainer.validation_data_dir",
        "reward_model.reward_manager",
        "data.gen_batch_size",
        "algorithm.filter_groups.enable",
        "algorithm.filter_groups.metric",
        "algorithm.filter_groups.max_num_gen_batches",
        "actor_rollout_ref.actor.clip_ratio_low",
        "actor_rollout_ref.actor.clip_ratio_high",
        "actor_rollout_ref.actor.clip_ratio_c",
    }
    assert config["trainer.experiment_name"].startswith("dapo-")


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("countdown-dapo-tiny-delta-L-norm-alpha-1", ("--method", "grpo-norm"), GRPO_NORM),
        ("countdown-dapo-tiny-delta-L-norm-alpha-1", ("--alpha=0.5",), DELTA_L_HALF),
        ("countdown-dapo-tiny-wo-sp-wo-of", ("--method", "grpo-norm"), GRPO_NORM),
        ("countdown-dapo-tiny-wo-sp-wo-of", ("--method=delta-l-norm", "--alpha=0.5"), DELTA_L_HALF),
    ],
)
def test_siblings_take_other_methods(
    tmp_path: Path, name: str, arguments: tuple[str, ...], expected: tuple[Any, ...]
) -> None:
    config = resolved(dry_run(f"../recipe/dapo/{name}", "--out", str(tmp_path), *arguments))
    assert method(config) == expected


@pytest.mark.parametrize("name", TINY)
def test_an_exponent_for_a_method_without_one_is_an_error(name: str) -> None:
    result = dry_run(f"../recipe/dapo/{name}", "--method=grpo-norm", "--alpha=1")
    assert (result.returncode, result.stdout) == (2, "")
    assert "--alpha belongs to --method delta-l-norm" in result.stderr


@pytest.mark.parametrize(
    ("name", "chosen", "alpha"),
    [
        ("countdown-dapo-tiny-delta-L-norm-alpha-1", "delta-l-norm", "1"),
        ("countdown-dapo-tiny-wo-sp-wo-of", "dapo-norm", "0.75"),
    ],
)
def test_help_names_the_defaults_of_the_script(name: str, chosen: str, alpha: str) -> None:
    result = dry_run(f"../recipe/dapo/{name}", "--method", "dr-grpo", "--help")
    assert result.returncode == 0
    text = " ".join(result.stdout.split()).replace("- ", "-")  # lines break at hyphens
    methods = "dr-grpo-norm, dr-grpo, or a function of your own, path/to/file.py:function"
    assert f"{methods} [{chosen}] --alpha" in text
    assert f"exponent of delta-l-norm, or auto [{alpha}] --lora" in text
    assert "#" not in result.stdout and "source" not in result.stdout


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_settings(results: dict[str, tuple[Result, Result]], name: str) -> None:
    config = resolved(results[name][0])
    task = name.split("-")[0]
    expected = COMMON | files(task) | OF_TASK[task] | EXPERIMENTS[name]
    expected["trainer.experiment_name"] = name
    assert {key: config[key] for key in expected} == expected
    assert method(config) == METHODS.get(name, ("token-mean", False, False, None))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_published_overrides_mean_the_same(
    results: dict[str, tuple[Result, Result]], name: str
) -> None:
    ours, theirs = map(resolved, results[name])
    assert ours.keys() == theirs.keys()
    differ = {key: theirs[key] for key in ours if ours[key] != theirs[key]}
    if name == "countdown-dapo-3b-delta-L-norm-alpha-1":
        assert differ.pop("trainer.experiment_name") == f"{name}.sh"
        assert differ.pop("trainer.default_local_dir").endswith(f"/{name}.sh")
    if name.startswith("math"):  # which verl has no key for
        assert differ.pop("reward_model.math_server.answer_rule") == "standard"
        assert ours["reward_model.math_server.answer_rule"] == "published"
    assert differ in ({}, {"trainer.n_gpus_per_node": 4})


def test_main_dapo_differs_from_main_ppo_in_its_defaults_alone(tmp_path: Path) -> None:
    given = ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4"]
    given.append("actor_rollout_ref.rollout.n=2")
    (tmp_path / "mine.yaml").write_text(
        "hydra: {searchpath: ['pkg://verl.trainer.config']}\n"
        "defaults: [ppo_trainer, _self_]\n"
        "trainer: {project_name: mine}\n"
    )
    dapo = resolved(main_dapo(*given, cwd=tmp_path))
    mine = resolved(main_dapo("--config-path", ".", "--config-name", "mine", *given, cwd=tmp_path))
    assert mine["trainer.project_name"] == "mine"
    assert {key: value for key, value in dapo.items() if value != mine[key]} == {
        "actor_rollout_ref.rollout.name": "vllm",
        "reward_model.reward_manager": "dapo",
        "trainer.project_name": "verl-dapo",
        "trainer.default_local_dir": "checkpoints/verl-dapo/gsm8k",
    }


def test_variables_arguments_and_working_directory(tmp_path: Path) -> None:
    result = dry_run(
        "../recipe/dapo/math-dapo-3b-w-soft-punishment",
        "trainer.total_epochs=1",
        cwd=tmp_path,
        N_GPUS="2",
        NNODES="3",
        BASE_MODEL="/models/with space",
        DATA_DIR="/data/of mine",
        SUBMIT="1",  # DRY_RUN=1 wins
    )
    config = resolved(result)
    assert config["trainer.total_epochs"] == 1
    assert (config["trainer.n_gpus_per_node"], config["trainer.nnodes"]) == (2, 3)
    assert config["actor_rollout_ref.model.path"] == "/models/with space"
    assert config["data.val_files"][3] == "/data/of mine/test_minerva.parquet"
    assert not list(tmp_path.iterdir())
