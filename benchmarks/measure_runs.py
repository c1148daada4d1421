"""Real runs of the trainer on this machine, and the simulator's prediction of them.

Engine and trainer speeds come from four colocated runs (one and two ranks, small and large
batches). The other runs differ in batch size, lengths, n, placement, filter and max_policy_age;
their lengths are drawn from those of the two with long responses, not looked up.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cluster import Draw, Result, Run, Trainer, simulate, train_seconds
from cluster_engine import Engine, batch_seconds
from cluster_in_flight import simulate_in_flight
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
PROMPT = 5  # tokens of a tiny prompt
Record = dict[str, Any]


def environment() -> dict[str, str]:
    """For all processes: quiet, offline, without threads that spin."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TQDM_DISABLE": "1",
    }


def make_policy(folder: Path, quick: bool) -> None:
    """CountDown problems, and a tiny model that answers them with ragged lengths: a warmed-up one,
    or in a quick run one with random weights, of whose answers none is right."""
    print(f"making problems and a tiny model in {folder}", file=sys.stderr)
    sizes = "--min_operands 3 --max_operands 3 --max_number 10 --max_target 50 --train_size 1600"
    commands = [
        f"{ROOT}/examples/data_preprocess/countdown.py --generate --local_dir {folder} --seed 0 "
        f"--template_type tiny {sizes} --test_size 64",
        f"{ROOT}/examples/tiny_countdown.py --local_dir {folder} --sft_size 12800",
        f"-m verl.trainer.main_sft data.train_files={folder}/sft.parquet "
        f"model.path={folder}/model trainer.default_local_dir={folder}/sft "
        "data.train_batch_size=32 data.max_length=256 optim.lr=4e-3 optim.betas=[0.9,0.95] "
        "optim.lr_warmup_steps=50 optim.warmup_style=linear trainer.total_epochs=1 "
        "trainer.n_gpus_per_node=2 trainer.device=cpu",
    ]
    if quick:
        import policies

        del commands[1:]
        policies.make_policy(folder / "sft" / "huggingface", "0.2M", mean_length=48)
    for command in commands:
        arguments = [sys.executable, *command.split()]
        subprocess.run(arguments, env=environment(), check=True, stdout=subprocess.DEVNULL)


def record(file: str) -> None:
    """In a process of its own: trains as each list of overrides in `file` says, and writes there
    what each step took."""
    import ray

    from verl.config.load import load_config
    from verl.models.hf import load_tokenizer
    from verl.trainer.ppo.batches import has_spread, split_groups
    from verl.trainer.ppo.metrics import age_metrics, several_versions
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    records: list[Record] = []

    class Recorder(RayPPOTrainer):
        def step_metrics(self, samples: Any, steps: Any, timer: Any) -> dict[str, float]:
            groups = split_groups(samples)
            records.append(
                {
                    "at": time.perf_counter(),
                    "phases": dict(timer.seconds),
                    "ages": [
                        age_metrics(samples, self.state.step - 1)["rollout/policy_age_mean"],
                        several_versions(samples),
                    ],
                    "lengths": [[s.length for s in group] for group in groups],
                    "keeps": [has_spread(group, "acc") for group in groups],
                }
            )
            return super().step_metrics(samples, steps, timer)

    done: list[list[Record]] = []
    for name, settings in json.loads(Path(file).read_text()):
        print(f"run {name}", file=sys.stderr, flush=True)
        config = load_config(settings)
        trainer = Recorder(config, load_tokenizer(config.actor_rollout_ref.model))
        trainer.start_workers()
        trainer.fit()
        trainer.close()
        ray.shutdown()
        done.append(list(records))
        records.clear()
    Path(file).write_text(json.dumps(done))


def measure(
    folder: Path, runs: list[tuple[str, dict[str, Any], int]], steps: int
) -> list[list[Record]]:
    """Runs (name, settings, seed) of `steps` steps, with the seconds of each as `wall`; one after
    the other in one process. Two steps before don't count, with max_policy_age=k 2 k more, nor do
    k after them, for which the line gets shorter."""
    file = folder / "runs.json"
    commands = []
    for i, (name, settings, seed) in enumerate(runs):
        base = [
            f"data.train_files={folder}/train.parquet",
            f"actor_rollout_ref.model.path={folder}/sft/huggingface",
            f"trainer.default_local_dir={folder}/runs/{i}",
            f"trainer.total_training_steps={steps + 2 + 3 * settings.get('age', 0)}",
            f"data.seed={seed}",
            f"actor_rollout_ref.rollout.seed={seed}",
            "data.apply_chat_template=False",
            "data.max_prompt_length=16",
            "actor_rollout_ref.model.enable_gradient_checkpointing=False",
            "actor_rollout_ref.actor.use_dynamic_bsz=True",
            "actor_rollout_ref.actor.entropy_coeff=1e-9",  # so that all go through the update
            "actor_rollout_ref.actor.optim.lr=1e-30",  # so that lengths stay as they are
            "trainer.logger=[file]",
            "trainer.device=cpu",
            "trainer.val_before_train=False",
            "trainer.resume_mode=disable",
            "trainer.save_hf_model=False",
        ]
        commands.append((name, [*base, *overrides(settings)]))
    file.write_text(json.dumps(commands))
    command = [sys.executable, __file__, str(file)]
    subprocess.run(command, env=environment(), check=True, stdout=subprocess.DEVNULL)
    done = json.loads(file.read_text())
    for records in done:
        for before, after in pairwise(records):
            after["wall"] = after["at"] - before["at"]
    begin = [2 + 2 * settings.get("age", 0) for _, settings, _ in runs]
    return [records[b : b + steps] for b, records in zip(begin, done, strict=True)]


def non_negative(features: list[list[float]], values: list[float]) -> NDArray[np.float64]:
    """Least squares of the relative error with coefficients of at least 0."""
    X, y = np.array(features, float), np.array(values)
    X = X / y[:, None]
    used = list(range(X.shape[1]))
    while True:
        found = np.linalg.lstsq(X[:, used], np.ones(len(y)), rcond=None)[0]
        if (found >= 0).all():
            break
        used.pop(int(found.argmin()))
    result = np.zeros(X.shape[1])
    result[used] = found
    return result


def calibrate(runs: list[list[Record]], ranks: int) -> tuple[Engine, Trainer]:
    """Speeds from runs in which every engine had one batch a step, and each step two optimizer
    steps, with log-probabilities before the second."""
    records = [r for run in runs for r in run]
    units = [Engine(1.0, continuous=False), Engine(0, 1.0)]
    gen, updates, log_probs = [], [], []
    for r in records:
        lengths = np.array(r["lengths"])
        room = -(-len(lengths) // ranks)
        batches = [lengths[i : i + room].ravel() for i in range(0, len(lengths), room)]
        each = [[float(batch_seconds(unit, b, PROMPT).max()) for unit in units] for b in batches]
        gen.append(max(each, key=lambda features: features[1]))
        half = -(-len(lengths) // 2)
        updates.append([2.0, _tokens(ranks, lengths, half)])
        log_probs.append([1.0, _tokens(ranks, lengths[half:], len(lengths))])
    step, sequence = non_negative(
        gen, [r["phases"]["gen"] + r["phases"].get("reward", 0) for r in records]
    )
    update, per_token = non_negative(updates, [r["phases"]["update_actor"] for r in records])
    forward, forward_token = non_negative(log_probs, [r["phases"]["old_log_prob"] for r in records])
    sync = float(np.median([r["phases"]["update_weights"] for r in records]))
    names = ("gen", "reward", "update_actor", "old_log_prob", "update_weights")
    other = [r["wall"] - sum(r["phases"].get(n, 0) for n in names) for r in records]
    responses = [np.size(r["lengths"]) for r in records]
    fixed, per_response = non_negative([[1.0, n] for n in responses], other)
    engine = Engine(float(step), float(sequence), prefill_s=forward_token, continuous=False)
    trainer = Trainer(
        token_s=per_token,
        update_s=update,
        micro_tokens=8192,
        log_prob_s=forward_token,
        log_prob_call_s=forward,
        sync_s=sync,
        other_s=fixed,
        response_s=per_response,
    )
    return engine, trainer


def _tokens(ranks: int, lengths: NDArray[np.int64], mini_batch: int) -> float:
    return train_seconds(Trainer(1.0), ranks, lengths, PROMPT, mini_batch)[0]


def draw_from(runs: list[list[Record]], seed: int, n: int, longest: int) -> Draw:
    """Draws prompts from those of measured runs, and n of each one's responses."""
    lengths = np.concatenate([r["lengths"] for run in runs for r in run])
    keeps = np.concatenate([r["keeps"] for run in runs for r in run])
    rng = np.random.default_rng(seed)

    def draw(count: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        rows = rng.integers(len(lengths), size=count)
        columns = rng.permuted(np.tile(np.arange(lengths.shape[1]), (count, 1)), axis=1)
        columns = np.concatenate([columns, columns], axis=1)[:, :n]
        return lengths[rows[:, None], columns].clip(max=longest), keeps[rows]

    return draw


KEYS = {
    "prompts": "data.train_batch_size",
    "mini": "actor_rollout_ref.actor.ppo_mini_batch_size",
    "n": "actor_rollout_ref.rollout.n",
    "longest": "data.max_response_length",
    "ranks": "trainer.n_gpus_per_node",
    "engines": "trainer.rollout_gpus_per_node",
    "ahead": "trainer.async_rollout",
    "age": "trainer.max_policy_age",
    "seqs": "actor_rollout_ref.rollout.max_num_seqs",
    "round": "data.gen_batch_size",
}
CALIBRATION = {
    "one rank, many short ones": dict(prompts=40, mini=20, n=8, longest=64, ranks=1),
    "one rank, few long ones": dict(prompts=8, mini=4, n=8, longest=256, ranks=1),
    "two ranks, many short ones": dict(prompts=80, mini=40, n=8, longest=64, ranks=2),
    "two ranks, few long ones": dict(prompts=16, mini=8, n=8, longest=256, ranks=2),
}
TO_PREDICT = {
    "colocated 1 rank": dict(prompts=24, mini=24, n=4, longest=128, ranks=1),
    "colocated 2 ranks": dict(prompts=40, mini=10, n=6, longest=256, ranks=2),
    "colocated 2 ranks, engines with 64 sequences at a time": dict(
        prompts=48, mini=48, n=8, longest=128, ranks=2, seqs=64
    ),
    "split 1+1": dict(prompts=24, mini=12, n=8, longest=256, ranks=1, engines=1),
    "split 1+1, one step ahead": dict(
        prompts=24, mini=6, n=8, longest=256, ranks=1, engines=1, ahead=True
    ),
    "colocated 2 ranks, dynamic sampling with early stop": dict(
        prompts=12, mini=12, n=8, longest=256, ranks=2, round=48, seqs=64
    ),
    "colocated 2 ranks, dynamic sampling with carry-over": dict(
        prompts=16, mini=16, n=8, longest=256, ranks=2, round=32, carry=True
    ),
    "colocated 2 ranks, max_policy_age=1": dict(
        prompts=16, mini=8, n=8, longest=256, ranks=2, seqs=64, age=1
    ),
    "colocated 2 ranks, max_policy_age=2": dict(
        prompts=16, mini=8, n=8, longest=256, ranks=2, seqs=64, age=2
    ),
    "split 1+1, max_policy_age=1": dict(
        prompts=24, mini=6, n=8, longest=256, ranks=1, engines=1, seqs=128, age=1
    ),
    "split 1+1, max_policy_age=2": dict(
        prompts=24, mini=6, n=8, longest=256, ranks=1, engines=1, seqs=128, age=2
    ),
}


def overrides(settings: dict[str, Any]) -> list[str]:
    """Of a run, from the short names of `KEYS`."""
    text = [f"{KEYS[name]}={value}" for name, value in settings.items() if name != "carry"]
    if "round" in settings:
        text += ["algorithm.filter_groups.enable=True", "algorithm.filter_groups.metric=acc"]
        text += [f"algorithm.filter_groups.carry_over={settings.get('carry', False)}"]
    return text


def predict(
    settings: dict[str, Any], one: tuple[Engine, Trainer], two: tuple[Engine, Trainer], draw: Draw
) -> Result:
    """Of a step. One rank that works alone has a core to itself; while two processes work,
    each is slower by what the runs with two ranks show."""
    ranks = settings["ranks"]
    engine, trainer = one if ranks == 1 else two
    engine = replace(engine, max_num_seqs=settings.get("seqs", 1024))
    run = Run(
        engines=settings.get("engines", ranks),
        ranks=ranks,
        split="engines" in settings,
        ahead=settings.get("ahead", False),
        prompts=settings["prompts"],
        prompt=PROMPT,
        mini_batch=settings["mini"],
        round_size=settings.get("round", 0),
        carry_over=settings.get("carry", False),
        age=settings.get("age", 0),
    )
    example = draw(64)[0].ravel()
    times = [batch_seconds(e, example, PROMPT).max() for e in (one[0], two[0])]
    slower = max(1.0, times[1] / times[0])
    way = simulate_in_flight if run.age else simulate
    return way(run, engine, trainer, draw, steps=200, scale=slower)


class Comparison(NamedTuple):
    """A run, and the simulator's word on it."""

    name: str
    predicted: Result
    measured: float
    """Seconds of a step."""
    error: float
    """Its standard error."""
    ages: list[float]
    """Mean age of a token, share of responses of several policies."""

    @property
    def ratio(self) -> float:
        """Predicted over measured step time."""
        return self.predicted.step_s / self.measured


def compare(
    calibration: dict[str, list[Record]], measured: dict[str, list[Record]]
) -> list[Comparison]:
    """One for each run."""
    by_ranks = [[r for n, r in calibration.items() if n.startswith(x)] for x in ("one", "two")]
    two = calibrate(by_ranks[1], 2)
    one = calibrate(by_ranks[0], 1) if by_ranks[0] else two
    for label, speeds in (("one rank", one), ("two ranks", two)):
        print(f"{label}: {speeds[0]}\n{speeds[1]}", file=sys.stderr)
    long = [records for name, records in calibration.items() if "long" in name]
    rows = []
    for i, (name, records) in enumerate(measured.items()):
        settings = TO_PREDICT[name]
        draw = draw_from(long, i, settings["n"], settings["longest"])
        walls = [r["wall"] for r in records]
        error = float(np.std(walls) / len(walls) ** 0.5)
        ages = np.mean([r["ages"] for r in records], axis=0).tolist()
        predicted = predict(settings, one, two, draw)
        rows.append(Comparison(name, predicted, float(np.mean(walls)), error, ages))
    return rows


def validate(folder: Path, quick: bool) -> tuple[list[Comparison], float]:
    """Makes what is missing, runs everything, and compares. Also returns how much longer a
    calibration run takes when it is repeated at the end, with the same seeds: 1 if the machine was
    as fast all the time. Where it was not, the comparison says nothing about the simulator; a quick
    run doesn't repeat it, and returns NaN."""
    make_policy(folder, quick)
    first = {n: s for n, s in CALIBRATION.items() if not quick or n.startswith("two")}
    rest = {n: s for n, s in TO_PREDICT.items() if not quick or n == "colocated 2 ranks"}
    runs = [(n, s, 100 + i) for i, (n, s) in enumerate(first.items())]
    last = [] if quick else runs[-1:]
    runs += [(n, s, 200 + i) for i, (n, s) in enumerate(rest.items())]
    found = measure(folder, runs + last, steps=3 if quick else 10)
    calibration = dict(zip(first, found, strict=False))
    rows = compare(calibration, dict(zip(rest, found[len(first) :], strict=False)))
    walls = [float(np.median([r["wall"] for r in found[i]])) for i in (len(first) - 1, -1)]
    return rows, float("nan") if quick else walls[1] / walls[0]


if __name__ == "__main__":
    record(sys.argv[1])
