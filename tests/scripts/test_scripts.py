"""The scripts of train_scripts/: what each of them resolves to with DRY_RUN=1."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import QWEN_3B, warm_children, warm_python

SCRIPTS = Path(__file__).parents[2] / "train_scripts"
# Variables that steer the scripts: a test starts without the caller's.
STEERING = (
    "VERL_PYTHON",
    "VENV",
    "N_GPUS",
    "NNODES",
    "MODEL_PATH",
    "BASE_MODEL",
    "DATA_DIR",
    "RAY_ADDRESS",
    "CUDA_VISIBLE_DEVICES",
    "MATH_SERVER_URL",
    "SUBMIT",
    "GPU_GB",
    "PREFLIGHT",
)

# (loss_agg_mode, use_grpopp, use_dr_grpo, alpha)
METHODS = {
    "dapo-norm": ("token-mean", False, False, None),
    "grpo-norm": ("seq-mean-token-mean", False, False, None),
    "dr-grpo-norm": ("token-mean", True, False, 0.0),
    "dr-grpo": ("token-mean", False, True, None),
}
EXPERIMENTS = {
    **{f"{task}-3b-{name}": m for task in ("countdown", "math") for name, m in METHODS.items()},
    "countdown-3b-delta-l-norm-alpha-1": ("token-mean", True, False, 1.0),
    "math-3b-delta-l-norm-alpha-0.75": ("token-mean", True, False, 0.75),
}
# Names as in METHODS, and the method that quickstart.sh runs by default.
QUICKSTART = {**METHODS, "delta-l-norm": ("token-mean", True, False, 0.75)}
MATH_TINY = "math-tiny-delta-l-norm-alpha-0.75"

COMMON = {
    "algorithm.adv_estimator": "grpo",
    "algorithm.use_kl_in_reward": False,
    "data.train_batch_size": 128,
    "data.gen_batch_size": 128,
    "data.max_response_length": 8192,
    "data.filter_overlong_prompts": True,
    "data.apply_chat_template": False,
    "actor_rollout_ref.model.path": "Qwen/Qwen2.5-3B",
    "actor_rollout_ref.model.use_remove_padding": True,
    "actor_rollout_ref.actor.optim.lr": 1e-6,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 32,
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 4,
    "actor_rollout_ref.actor.clip_ratio_low": 0.2,
    "actor_rollout_ref.actor.clip_ratio_high": 0.3,
    "actor_rollout_ref.actor.entropy_coeff": 0.0,
    "actor_rollout_ref.actor.use_kl_loss": False,
    "actor_rollout_ref.actor.fsdp_config.param_offload": True,
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload": True,
    "actor_rollout_ref.ref.fsdp_config.param_offload": True,
    "actor_rollout_ref.rollout.name": "vllm",
    "actor_rollout_ref.rollout.n": 10,
    "actor_rollout_ref.rollout.temperature": 1.0,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
    "actor_rollout_ref.rollout.gpu_memory_utilization": 0.8,
    "actor_rollout_ref.rollout.enable_chunked_prefill": False,
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 4,
    "actor_rollout_ref.rollout.val_kwargs.n": 8,
    "actor_rollout_ref.rollout.val_kwargs.do_sample": True,
    "actor_rollout_ref.rollout.val_kwargs.temperature": 1.0,
    "trainer.logger": ["console", "wandb"],
    "trainer.project_name": "LatestVerlExperiment",
    "trainer.n_gpus_per_node": 4,
    "trainer.nnodes": 1,
    "trainer.total_epochs": 15,
    "trainer.val_before_train": True,
    "trainer.test_freq": 50,
}


def _data(folder: str, *tests: str) -> dict[str, Any]:
    path = Path.home() / "data" / folder
    files = [f"{path}/{test}.parquet" for test in tests]
    return {
        "data.train_files": f"{path}/train.parquet",
        "data.val_files": files if len(files) > 1 else files[0],
    }


TASKS: dict[str, dict[str, Any]] = {
    "countdown": {
        **_data("countdown_nochat", "test"),
        "data.max_prompt_length": 256,
        "actor_rollout_ref.rollout.max_num_batched_tokens": 8448,
        "trainer.save_freq": 1000,
    },
    "math": {
        **_data("open_reasoner_zero_nochat", "test1", "test2", "test_amc", "test_minerva"),
        "data.max_prompt_length": 1024,
        "actor_rollout_ref.rollout.max_num_batched_tokens": 9216,
        "trainer.save_freq": 2000,
    },
}

Result = subprocess.CompletedProcess[str]


def dry_run(name: str, *arguments: str, cwd: Path = SCRIPTS.parent, **variables: str) -> Result:
    """Starts a script of train_scripts/ with DRY_RUN=1, PUBLISHED=1 and our interpreter."""
    environment = {key: value for key, value in os.environ.items() if key not in STEERING}
    variables = {"PUBLISHED": "1"} | variables
    return subprocess.run(
        ["bash", SCRIPTS / f"{name}.sh", *arguments],
        env=environment | {"DRY_RUN": "1", "PYTHON": warm_python()} | warm_children() | variables,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def resolved(result: Result) -> dict[str, Any]:
    """The configuration on standard output, which must hold nothing else, with dotted keys."""
    assert result.returncode == 0, result.stderr
    config = yaml.safe_load(result.stdout)
    sections = ["data", "actor_rollout_ref", "critic"]
    assert list(config)[:3] == sections and result.stdout.startswith("data:\n")
    return dict(_flatten(config))


def _flatten(node: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in node.items():
        inner = isinstance(value, dict) and value
        pairs += _flatten(value, f"{prefix}{name}.") if inner else [(prefix + name, value)]
    return pairs


def method(config: dict[str, Any]) -> tuple[str, bool, bool, float | None]:
    """(loss_agg_mode, use_grpopp, use_dr_grpo, alpha if it counts); the actor must agree."""
    actor = "actor_rollout_ref.actor."
    for key in ("use_grpopp", "use_dr_grpo", "grpopp_config.alpha", "grpopp_config.scope"):
        assert config[f"algorithm.{key}"] == config[actor + key]
    use_grpopp = config["algorithm.use_grpopp"]
    alpha = config["algorithm.grpopp_config.alpha"] if use_grpopp else None
    return config[f"{actor}loss_agg_mode"], use_grpopp, config["algorithm.use_dr_grpo"], alpha


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Every experiment, every method of the quick start, and its counterpart for math; side by
    side, as each takes a second or two."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    calls = {name: (name,) for name in EXPERIMENTS} | {
        f"quickstart {name}": ("quickstart", "--method", name, "--out", str(out))
        for name in QUICKSTART
    }
    calls[MATH_TINY] = (MATH_TINY, "--out", str(out))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = dict(zip(calls, pool.map(lambda call: dry_run(*call), calls.values()), strict=True))
    assert not out.exists(), "DRY_RUN makes nothing"
    return done


def test_no_script_is_left_out() -> None:
    found = {path.stem for path in SCRIPTS.glob("*.sh")}
    assert found == {*EXPERIMENTS, "quickstart", "first_run", MATH_TINY, "_common", "_tiny"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment(results: dict[str, Result], name: str) -> None:
    config = resolved(results[name])
    assert method(config) == EXPERIMENTS[name]
    assert config["trainer.experiment_name"] == name
    expected = COMMON | TASKS[name.partition("-")[0]]
    assert {key: config[key] for key in expected} == expected


FSDP = "actor_rollout_ref.actor.fsdp_config"
FAST = {  # on four GPUs of 80 GB
    "actor_rollout_ref.rollout.enforce_eager": False,
    "actor_rollout_ref.rollout.enable_chunked_prefill": True,
    f"{FSDP}.param_offload": False,
    f"{FSDP}.optimizer_offload": False,
    "actor_rollout_ref.actor.use_dynamic_bsz": True,
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 32768,
}
FOLLOW = {
    f"actor_rollout_ref.{part}.log_prob_{key}": value
    for part in ("rollout", "ref")
    for key, value in (("use_dynamic_bsz", True), ("max_token_len_per_gpu", 32768))
}
ALL = FAST | FOLLOW
FEW = dict(list(FAST.items())[:4])
COUNT = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the config.json of Qwen2.5-3B."""
    folder = tmp_path_factory.mktemp("3b")
    (folder / "config.json").write_text(json.dumps(QWEN_3B))
    return str(folder)


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        ([], {}, FAST | FOLLOW),
        ([], {"PUBLISHED": "1"}, {}),
        ([f"{FSDP}.param_offload=True"], {}, {**FAST, **FOLLOW, f"{FSDP}.param_offload": True}),
        # 5.7 GiB of states don't fit beside vLLM's 80 %.
        ([], {"GPU_GB": "40"}, {**FAST, **FOLLOW, f"{FSDP}.optimizer_offload": True}),
        (["trainer.device=cpu"], {}, {"trainer.device": "cpu"}),
        ([f"{COUNT}=2"], {}, FEW | {COUNT: 2}),
        ([f"{FSDP}={{param_offload: True}}"], {}, {k: v for k, v in ALL.items() if FSDP not in k}),
    ],
    ids=["80 GB", "published", "one", "40 GB", "cpu", "count", "section"],
)
def test_settings_of_speed_suit_the_gpu(
    arguments: list[str], variables: dict[str, str], expected: dict[str, Any], model: str
) -> None:
    name, variables = "countdown-3b-delta-l-norm-alpha-1", {"PUBLISHED": "0"} | variables
    published = resolved(dry_run(name, MODEL_PATH=model))
    result = dry_run(name, *arguments, MODEL_PATH=model, **variables)
    differences = {k: v for k, v in resolved(result).items() if v != published[k]}
    assert differences == {k: v for k, v in expected.items() if v != published[k]}
    for key in differences.keys() & FAST.keys():
        assert f"{key}={differences[key]} (was {published[key]})" in result.stderr


def test_a_sweep_gets_the_settings_of_its_first_run(model: str) -> None:
    sweep = ["-m", "actor_rollout_ref.actor.optim.lr=1e-6,2e-6"]
    result = dry_run("countdown-3b-dapo-norm", *sweep, MODEL_PATH=model, PUBLISHED="0")
    assert result.returncode == 0 and "Traceback" not in result.stderr
    assert result.stdout.count("enforce_eager: false") == 2


def test_without_an_estimate_nothing_moves() -> None:
    """A pass still gets no more tokens than 4 responses of full length have."""
    name = "math-3b-grpo-norm"
    fast, published = (resolved(dry_run(name, PUBLISHED=p)) for p in ("0", "1"))
    assert {key: value for key, value in fast.items() if value != published[key]} == {
        "actor_rollout_ref.rollout.enforce_eager": False,
        "actor_rollout_ref.rollout.enable_chunked_prefill": True,
        "actor_rollout_ref.actor.use_dynamic_bsz": True,
        "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz": True,
        "actor_rollout_ref.ref.log_prob_use_dynamic_bsz": True,
    }


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_holds_only_what_differs(name: str) -> None:
    assert len((SCRIPTS / f"{name}.sh").read_text().splitlines()) <= 6


@pytest.mark.parametrize(
    ("variables", "arguments", "message"),
    [
        ({}, (), "n_gpus_per_node=4, but this machine has 2 GPUs: take 2 at most"),
        (
            {"N_GPUS": "2"},
            ("trainer.rollout_gpus_per_node=1",),
            "has 2 GPUs, 1 for engines alone: take 1 at most (in scripts by N_GPUS=1)",
        ),
        (
            {"CUDA_VISIBLE_DEVICES": ""},
            ("trainer.n_gpus_per_node=999",),
            "this machine has no GPU and ",
        ),
        ({"N_GPUS": "2"}, (), "no Hugging Face model there"),
        ({}, ("trainer.device=cpu",), "no Hugging Face model there"),
    ],
)
def test_more_ranks_than_devices_are_an_error_at_once(
    variables: dict[str, str], arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    (smi := tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho GPU 0\necho GPU 1\n")
    smi.chmod(0o755)
    variables |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MODEL_PATH": "/nowhere"}
    given = ("actor_rollout_ref.rollout.name=hf", *arguments)
    result = dry_run("countdown-3b-dapo-norm", *given, DRY_RUN="0", **variables)
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and message in error


@pytest.mark.parametrize(
    ("variables", "arguments", "looked"),
    [
        ({}, (), True),
        ({"PREFLIGHT": "0"}, (), False),
        ({}, ("trainer.device=cpu",), False),
        ({"DRY_RUN": "1"}, (), False),
    ],
)
def test_a_machine_that_cannot_run_it_is_told_before_the_run(
    variables: dict[str, str], arguments: tuple[str, ...], looked: bool, tmp_path: Path
) -> None:
    """Its driver is older than torch's CUDA; or, as in most tests, torch has none."""
    (smi := tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 520.61.05\n")
    smi.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MODEL_PATH": "/nowhere"} | variables
    given = ("actor_rollout_ref.rollout.name=hf", "trainer.n_gpus_per_node=2", *arguments)
    run = {"DRY_RUN": "0", "CUDA_VISIBLE_DEVICES": "0,1"} | variables
    result = dry_run("countdown-3b-dapo-norm", *given, cwd=tmp_path, **run)
    assert ("520.61.05, but CUDA" in result.stderr) == looked
    assert ("PREFLIGHT=0 starts it all the same" in result.stderr) == looked
    assert (tmp_path / "preflight.json").exists() == looked
    expected = 0 if run["DRY_RUN"] == "1" else 1 if looked else 2
    assert result.returncode == expected, result.stderr
    assert ("no Hugging Face model there" in result.stderr) == (expected == 2)


def test_keys_without_effect_are_named_on_stderr(results: dict[str, Result]) -> None:
    for key in "critic.optim.lr", "trainer.default_hdfs_dir":
        assert results["countdown-3b-dapo-norm"].stderr.count(key) == 1


@pytest.mark.parametrize("name", QUICKSTART)
def test_quickstart(results: dict[str, Result], name: str) -> None:
    config = resolved(results[f"quickstart {name}"])
    assert method(config) == QUICKSTART[name]
    assert config["trainer.logger"] == ["console"], "works without WANDB_API_KEY"
    assert config["actor_rollout_ref.rollout.name"] == "hf"
    assert config["trainer.device"] == "cpu"
    assert config["trainer.default_local_dir"].endswith(config["trainer.experiment_name"])
    assert config["actor_rollout_ref.model.path"].endswith("/sft/huggingface")


def test_math_tiny_starts_a_server_unless_one_is_named(results: dict[str, Result]) -> None:
    out = str(Path(resolved(results[MATH_TINY])["trainer.default_local_dir"]).parent)
    named = dry_run(MATH_TINY, "--out", out, MATH_SERVER_URL="http://127.0.0.1:7284")
    own, other = resolved(results[MATH_TINY]), resolved(named)
    autostart = "reward_model.math_server.autostart"
    assert (own.pop(autostart), other.pop(autostart)) == (True, False)
    assert own == other, "the same run, in the same folder"
    assert method(own) == EXPERIMENTS["math-3b-delta-l-norm-alpha-0.75"]
    assert own["custom_reward_function.path"] is None
    assert own["trainer.project_name"] == "math-tiny"
    # What test_tiny_math.py takes for granted.
    limits = ("data.max_prompt_length", "data.max_response_length")
    assert [own[key] for key in limits] == [32, 160]


def test_quickstart_runs_that_differ_have_folders_of_their_own(results: dict[str, Result]) -> None:
    calls = [("--seed", "1"), ("--alpha", "0.5"), ("--lora",), ("data.train_batch_size=64",), ()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        others = list(pool.map(lambda call: resolved(dry_run("quickstart", *call)), calls))
    folders = [c["trainer.default_local_dir"] for c in others]
    folders += [resolved(results[f"quickstart {m}"])["trainer.default_local_dir"] for m in METHODS]
    assert len({Path(folder).name for folder in folders}) == len(folders)
    assert [c["actor_rollout_ref.model.lora_rank"] for c in others] == [0, 0, 8, 0, 0]
    # The warmed-up model depends on the seed alone.
    models = [c["actor_rollout_ref.model.path"] for c in others]
    assert models[0] != models[1] and len(set(models[1:])) == 1
    seeds = ("data.seed", "actor_rollout_ref.rollout.seed")
    assert [others[0][key] for key in seeds] == [1, 1]
    assert method(others[1])[-1] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "ppo"), "invalid choice: 'ppo' (choose from"),
        (("--method", "grpo-norm", "--alpha", "1"), "--alpha belongs to"),
        (("--seed", "-1"), "a whole number"),
        (("--seed",), "expected one argument"),
        (("--sed", "1"), "there is no option --sed"),
        (("fresh",), "neither an option nor an override"),
    ],
)
def test_quickstart_rejects_wrong_options(arguments: tuple[str, ...], message: str) -> None:
    result = dry_run("quickstart", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    (error,) = result.stderr.splitlines()
    assert error.startswith("error: ") and message in error


@pytest.mark.parametrize("name", ["quickstart", MATH_TINY])
def test_help_is_the_text_at_the_top_of_the_script(name: str) -> None:
    result = dry_run(name, "--help")
    assert result.returncode == 0 and "--method" in result.stdout
    assert f"bash train_scripts/{name}.sh" in result.stdout
    assert "#" not in result.stdout and "source" not in result.stdout


@pytest.mark.parametrize("name", ["quickstart", "countdown-3b-dapo-norm"])
def test_help_needs_no_packages_and_makes_no_environment(name: str, tmp_path: Path) -> None:
    (python := tmp_path / "python").write_text(f'exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    bare = dry_run(name, "--help", PYTHON=str(python), DRY_RUN="0")
    assert (bare.returncode, bare.stderr) == (0, "")
    assert bare.stdout == dry_run(name, "--help").stdout
    started = dry_run(name, PYTHON=str(python))
    assert started.returncode == 1 and "lacks the packages" in started.stderr


def test_help_of_an_experiment_tells_what_it_is_and_what_may_be_set() -> None:
    result = dry_run("countdown-3b-dapo-norm", "--help")
    assert result.returncode == 0 and "CountDown, Qwen2.5-3B" in result.stdout
    assert "N_GPUS" in result.stdout and "MODEL_PATH" in result.stdout
    assert "#" not in result.stdout and "config-name" not in result.stdout


def test_a_laptop_script_leaves_the_method_to_its_options() -> None:
    result = dry_run("quickstart", "algorithm.grpopp_config.alpha=0.5")
    assert result.returncode == 2 and "--alpha" in result.stderr


def test_variables_arguments_and_working_directory(tmp_path: Path) -> None:
    config = resolved(
        dry_run(
            "countdown-3b-delta-l-norm-alpha-1",
            "algorithm.grpopp_config.alpha=0.5",
            "actor_rollout_ref.actor.optim.lr=2e-6",
            "trainer.experiment_name=mine",
            cwd=tmp_path,
            N_GPUS="8",
            NNODES="2",
            BASE_MODEL="/models/with space",
            DATA_DIR="/data/of mine",
        )
    )
    assert method(config) == ("token-mean", True, False, 0.5)
    assert config["actor_rollout_ref.actor.optim.lr"] == 2e-6
    assert config["trainer.experiment_name"] == "mine"
    assert (config["trainer.n_gpus_per_node"], config["trainer.nnodes"]) == (8, 2)
    assert config["actor_rollout_ref.model.path"] == "/models/with space"
    assert config["data.train_files"] == "/data/of mine/train.parquet"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["countdown-3b-dapo-norm", "../examples/smollm2_gsm8k_cpu"])
def test_the_interpreter_is_that_of_the_folder_venv(script: str, tmp_path: Path) -> None:
    (folder := tmp_path / "my env/bin").mkdir(parents=True)
    (python := folder / "python").write_text(f'echo mine >&2\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    result = dry_run(script, cwd=tmp_path, PYTHON="", VENV="my env")
    assert resolved(result) and "mine\n" in result.stderr


def test_model_path_wins_over_its_other_name() -> None:
    result = dry_run("math-3b-dr-grpo", MODEL_PATH="a", BASE_MODEL="b")
    assert resolved(result)["actor_rollout_ref.model.path"] == "a"


@pytest.mark.parametrize(
    ("name", "override", "messages"),
    [
        ("math-3b-grpo-norm", "data.trian_batch_size=64", ["'data.train_batch_size'"]),
        ("quickstart", "trainer.totl_epochs=1", ["'trainer.total_epochs'"]),
        (
            "countdown-3b-delta-l-norm-alpha-1",
            "actor_rollout_ref.actor.use_grpopp=False",
            ["algorithm.use_grpopp=True contradicts", "set algorithm.use_grpopp alone"],
        ),
    ],
)
def test_wrong_overrides_end_with_one_clear_line(
    name: str, override: str, messages: list[str]
) -> None:
    result = dry_run(name, override)
    assert (result.returncode, result.stdout) == (2, "")
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in result.stderr
    assert all(message in errors[0] for message in messages)
