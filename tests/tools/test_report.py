"""The page about runs: what it computes, what it escapes, and bad input."""

import json
import os
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from matplotlib.image import imread

from tests.helpers import warm_python
from verl.tools.curves import PHASES, mean_and_band, sections, smooth
from verl.tools.report import main, render, script_json, summary
from verl.tools.runs import Group, differences, group_runs, read_run, shown
from verl.tools.samples import dumps, pick

ROOT = Path(__file__).parents[2]
HOSTILE = '</script><script>hacked=1</script><img src=x onerror="hacked=1">\'&amp;{{ 7*7 }}'


def settings(alpha=0.75, seed=0, **others):
    """As in a run's config.yaml, so far as reports look at it."""
    return {
        "data": {
            "seed": seed,
            "max_response_length": 256,
            "train_files": f"/data/warm-up-seed-{seed}-0123abcd/train.parquet",
        },
        "algorithm": {
            "use_grpopp": alpha is not None,
            "use_dr_grpo": False,
            "grpopp_config": {"alpha": alpha or 0.0},
        },
        "actor_rollout_ref": {
            "actor": {"loss_agg_mode": "token-mean", "optim": {"lr": 1e-6}, "use_grpopp": True}
        },
        "trainer": {"experiment_name": f"run-{seed}", "default_local_dir": f"/runs/{seed}"},
    } | others


def records(steps=40, shift=0.0, source="countdown"):
    found = [{"step": 0, f"val-core/{source}/acc/mean@4": 0.125 + shift}]
    for step in range(1, steps + 1):
        progress = step / steps
        record = {
            "step": step,
            "critic/rewards/mean": 0.1 + shift + 0.5 * progress + 0.03 * (-1) ** step,
            "response_length/mean": 200 - 100 * progress,
            "response_length/clip_ratio": 0.25 * (1 - progress),
            "actor/grad_norm": 0.3 if step != 5 else None,
            "loss_agg/cv": 0.4,
            "loss_agg/cv/token-mean": 0.5,
            "loss_agg/cv/dr-grpo": 0.5,
            "loss_agg/cv/seq-mean-token-mean": 0.3,
            "timing_s/gen": 60.0,
            "timing_s/update_actor": 39.0,
            "timing_s/adv": 0.1,
            "timing_s/step": 99.1,
            "perf/time_per_step": 99.1,
            "perf/total_num_tokens": 25_000.0,
        }
        if step % 10 == 0:
            record[f"val-core/{source}/acc/mean@4"] = 0.125 + shift + 0.5 * progress
        found.append(record)
    return found


def write(folder, lines, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def make(folder, *args, config=None, **kwargs):
    return read_run(write(folder, records(*args, **kwargs), config or settings()))


def dump(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def response(i, **others):
    return {
        "step": 40,
        "prompt": f"make 24 from {i}",
        "response": HOSTILE,
        "answer": "24",
        "score": float(i % 2),
        "advantage": 0.5,
        "weight": 1e-4,
        "prompt_length": 5,
        "response_length": 256,
        "finish_reason": "length",
        "data_source": HOSTILE,
    } | others


# ------------------------------------------------------------------------------------ computations


def test_smoothing():
    curve = pd.Series([1.0, 2.0, 6.0, 4.0], index=[1, 2, 3, 4])
    assert list(smooth(curve, 1)) == [1, 2, 6, 4]
    assert list(smooth(curve, 3)) == [1.5, 3, 4, 5]
    assert smooth(curve, 3).index.tolist() == [1, 2, 3, 4]


def test_mean_and_band_at_the_steps_that_all_have():
    a, b = pd.Series([1.0, 3.0, 9.0], index=[0, 10, 20]), pd.Series([2.0, 7.0], index=[0, 10])
    mean, low, high = mean_and_band([a, b])
    assert mean.to_dict() == {0: 1.5, 10: 5}
    assert low.to_dict() == {0: 1, 10: 3}
    assert high.to_dict() == {0: 2, 10: 7}


def test_runs_that_differ_only_in_seeds_paths_and_names_are_a_group(tmp_path):
    runs = [make(tmp_path / f"d{seed}", config=settings(seed=seed)) for seed in (0, 1)]
    runs.insert(1, make(tmp_path / "dapo", config=settings(alpha=None)))
    groups = group_runs(runs)
    assert [g.label for g in groups] == ["∆L Norm, α = 0.75", "DAPO Norm"]
    assert [[run.name for run in g.runs] for g in groups] == [["d0", "d1"], ["dapo"]]
    assert differences(groups) == {
        "algorithm.use_grpopp": ["True", "False"],
        "algorithm.grpopp_config.alpha": ["0.75", "0.0"],
    }


def test_groups_of_one_method_are_told_apart(tmp_path):
    other = settings()
    other["actor_rollout_ref"]["actor"]["optim"]["lr"] = 3e-6
    other["trainer"]["test_freq"] = 5  # one difference says it already
    groups = group_runs([make(tmp_path / "a"), make(tmp_path / "b", config=other)])
    assert [g.label for g in groups] == [
        "∆L Norm, α = 0.75, lr = 1e-06",
        "∆L Norm, α = 0.75, lr = 3e-06",
    ]


def test_other_data_is_another_group(tmp_path):
    config = settings()
    config["data"]["train_files"] = "/data/math/train.parquet"
    validated = make(tmp_path / "c", source="math")
    groups = group_runs([make(tmp_path / "a"), make(tmp_path / "b", config=config), validated])
    assert len(groups) == 3
    assert len({g.label for g in groups}) == 3


def test_runs_without_settings_stay_apart(tmp_path):
    runs = [read_run(write(tmp_path / name, records())) for name in "ab"]
    assert [g.label for g in group_runs(runs)] == ["a", "b"]


@pytest.mark.parametrize(
    ("change", "label"),
    [
        ({"use_grpopp": True, "grpopp_config": {"alpha": 0.0}}, "Dr. GRPO Norm"),
        ({"use_grpopp": True, "grpopp_config": {"alpha": 1.0}}, "∆L Norm, α = 1"),
        ({"use_grpopp": True, "grpopp_config": {"alpha": "auto"}}, "∆L Norm, α = auto"),
        ({"use_dr_grpo": True}, "Dr. GRPO"),
        ({}, "DAPO Norm"),
    ],
)
def test_names_of_methods(tmp_path, change, label):
    assert make(tmp_path / "a", config=settings(algorithm=change)).method == label


def test_losses_and_estimators_name_their_methods(tmp_path):
    config = settings()
    config["algorithm"]["adv_estimator"] = "/home/me/own.py:mine"
    config["actor_rollout_ref"]["actor"]["policy_loss"] = {"loss_mode": "gspo"}
    found = make(tmp_path / "a", config=config).method
    assert found == "∆L Norm, α = 0.75, gspo, own.py:mine"
    config["actor_rollout_ref"]["actor"]["policy_loss"]["loss_mode"] = "vanilla"
    config["algorithm"]["adv_estimator"] = "grpo"
    assert make(tmp_path / "b", config=config).method == "∆L Norm, α = 0.75"


def test_a_function_of_the_users_names_its_method(tmp_path):
    config = settings(alpha=None)
    config["actor_rollout_ref"]["actor"]["loss_agg_mode"] = "/home/me/own.py:sqrt_length"
    runs = []
    for name, digest in ("a", "1" * 12), ("b", "1" * 12), ("c", "2" * 12):
        config["algorithm"]["own_functions"] = [f"/home/me/own.py:sqrt_length@{digest}"]
        runs.append(make(tmp_path / name, config=config))
    groups = group_runs(runs)  # two texts are two methods
    assert [len(g.runs) for g in groups] == [2, 1]
    assert all(g.label.startswith("own.py:sqrt_length, own_functions = ") for g in groups)


def test_of_a_path_only_the_end_is_shown():
    assert shown("/home/me/data/math/train.parquet") == "…/math/train.parquet"
    assert shown("Qwen/Qwen2.5-3B") == "Qwen/Qwen2.5-3B"
    assert shown(["/a/b/c", None, 1e-6]) == "[…/b/c, null, 1e-06]"


def test_curves_of_a_group(tmp_path):
    runs = [make(tmp_path / str(i), shift=0.1 * i, config=settings(seed=i)) for i in (0, 1)]
    curves, noise, times = sections(group_runs(runs), window=1)
    accuracy, reward, length = curves.charts[:3]
    assert accuracy["title"] == "Validation accuracy, countdown"
    (line,) = accuracy["lines"]
    assert line["x"] == [0, 10, 20, 30, 40]
    assert line["y"] == [17.5, 30, 42.5, 55, 67.5]  # per cent
    assert (line["lo"][0], line["hi"][0]) == (12.5, 22.5)
    assert reward["lines"][0]["raw"][1][1][:2] == [0.1825, 0.255]
    assert length["limit"] == 256
    assert curves.legend == ["∆L Norm, α = 0.75 (2 runs)"]
    # Methods that weigh alike are one line, whatever the order of the columns.
    assert noise.legend == ["∆L Norm", "DAPO Norm = Dr. GRPO (Norm)", "GRPO Norm"]
    assert [line["bold"] for line in noise.charts[0]["lines"]] == [True, False, False]
    # A tenth of a per cent is no phase of its own.
    assert times.legend == [PHASES["gen"], PHASES["update_actor"], "other"]
    assert [line["y"][0] for line in times.charts[0]["lines"]] == [60, 39, 0.1]


def test_of_a_long_curve_every_nth_step_is_plotted(tmp_path):
    (line,) = sections(group_runs([make(tmp_path / "run", steps=1000)]), window=1)[0].charts[1][
        "lines"
    ]
    assert line["x"] == [*range(1, 1001, 3)]
    (line,) = sections(group_runs([make(tmp_path / "run", steps=399)]), window=1)[0].charts[1][
        "lines"
    ]
    assert line["x"] == [*range(1, 400)]


def test_summary(tmp_path):
    assert summary(make(tmp_path / "run")).splitlines() == [
        "                                   before  after",
        "  validation accuracy (countdown)   12.5%  62.5%",
        "  training reward                   0.083  0.630",
        "  response length, tokens           197.5  100.0",
        "  truncated responses               24.4%   0.0%",
        "  40 training steps, 1 million tokens, 1 h 06 min",
    ]


# ---------------------------------------------------------------------------------------- samples


def test_the_picked_responses_are_of_different_prompts():
    scores = [0.0, 1.0, 1.0, 0.5, float("nan"), 0.0, None]
    prompts = ["a", "a", "a", "b", "b", "c", "c"]
    assert pick(scores, prompts, count=2) == ([1, 3], [0, 5])
    assert pick(scores, prompts, count=3) == ([1, 3, 5], [0])
    assert pick([1.0, 1.0], ["a", "b"], count=1) == ([0], [])
    assert pick([], [], count=3) == ([], [])


def test_dumps_of_the_last_step_that_can_be_read(tmp_path):
    run = make(tmp_path / "run")
    assert dumps(run) == []
    dump(tmp_path / "run" / "rollouts" / "9.parquet", [response(i) for i in range(8)])
    dump(tmp_path / "run" / "rollouts" / "40.parquet", [response(i) for i in range(7)])
    (tmp_path / "run" / "rollouts" / "41.parquet").write_bytes(b"PAR1 and killed")
    (found,) = dumps(run)
    assert (found.title, found.step, found.total) == ("Training", 40, 7)
    assert [s["prompt"] for s in found.best] == [f"make 24 from {i}" for i in (1, 3, 5)]
    assert [s["prompt"] for s in found.worst] == [f"make 24 from {i}" for i in (0, 2, 4)]
    assert found.best[0]["facts"]["weight"] == "0.0001"
    assert found.best[0]["truncated"]


def test_dumps_elsewhere_and_with_few_columns(tmp_path):
    config = settings(trainer={"validation_data_dir": str(tmp_path / "elsewhere")})
    run = make(tmp_path / "run", config=config)
    chat = [{"role": "user", "content": "Hallo"}]
    dump(tmp_path / "elsewhere" / "3.parquet", [{"prompt": chat, "response": "a"}])
    (found,) = dumps(run)
    assert found.best == [
        {"prompt": json.dumps(chat), "response": "a", "facts": {}, "truncated": False}
    ]


def test_dumps_of_an_earlier_run_and_of_an_evaluation(tmp_path):
    """Each run finds its own in the folder that all of them name."""
    place = tmp_path / "dumps"
    config = settings(trainer={"validation_data_dir": str(place)})
    parts = {"": "earlier_run_1", "earlier_run_1": "earlier_run_2", "val_only": "val_only"}
    for step, (name, part) in enumerate(parts.items(), start=1):
        make(tmp_path / "run" / name, config=config)
        dump(place / part / f"{step}.parquet", [{"prompt": "a", "response": "b"}])
        for folder in (tmp_path / "run" / name, place / part):
            (folder / "wandb_run_id").write_text(f"id {step}")
    (place / "wandb_run_id").write_text("of a run elsewhere")
    dump(place / "9.parquet", [{"prompt": "a", "response": "b"}])
    for step, name in enumerate(parts, start=1):
        (found,) = dumps(read_run(tmp_path / "run" / name))
        assert found.step == step
    (tmp_path / "run" / "wandb_run_id").write_text("of no dumps")
    assert dumps(read_run(tmp_path / "run")) == []


# --------------------------------------------------------------------------------------- the page


class Tags(HTMLParser):
    """The names of all tags."""

    def __init__(self, page):
        super().__init__()
        self.tags = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)


def hostile_run(folder):
    config = settings(data={"seed": HOSTILE, "max_response_length": HOSTILE})
    run = make(folder, source=HOSTILE.replace("/", "|"), config=config)
    rows = [response(i, prompt=HOSTILE + str(i)) for i in range(4)]
    for name in ("rollouts", "validation"):
        dump(folder / name / "40.parquet", rows)
    return run


def test_escaping(tmp_path):
    run = hostile_run(tmp_path / "<img src=x onerror=hacked=1>")
    page, _ = render([Group(HOSTILE, [run])], title=HOSTILE)
    tags = Tags(page).tags
    assert tags.count("script") == 2
    assert "img" not in tags
    assert page.count("&lt;/script&gt;&lt;script&gt;hacked=1") > 20
    assert "49" not in page.split('id="data"')[0].split("<main>")[1]  # text is no template
    assert script_json({"a": "</script><!--&"}) == '{"a":"\\u003c/script\\u003e\\u003c!--\\u0026"}'


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"step": 0, "val-core/a/acc/mean@1": 0.5}],
        [{"step": 1, "critic/rewards/mean": 0.5, "actor/grad_norm": None}],
        [{"step": 1, "critic/rewards/mean": float("nan"), "actor/grad_norm": float("inf")}],
        [{"step": 1, "train/loss": 2.5}],
    ],
)
def test_a_run_that_has_barely_begun(tmp_path, lines):
    run = read_run(write(tmp_path / "run", lines))
    page, plots = render(group_runs([run]))
    script_json([section.charts for section in plots])  # raises for NaN
    assert "<main>" in page
    assert "0 s" in summary(run)


def test_the_last_line_of_a_killed_run_is_left_out(tmp_path):
    folder = write(tmp_path / "run", records(steps=3))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "critic/rew')
    assert read_run(folder).steps == 3


def test_command_line(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    write(a, records(), settings())
    write(b, records(shift=0.1), settings(alpha=None))
    page, png = tmp_path / "new" / "report.html", tmp_path / "png"
    command = [warm_python(), "-m", "verl.tools.report", a, b, a, "-o", page, "--title", "two"]
    command += ["--smooth", "4", "--png", png]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("40 training steps") == 2
    assert "Lines are means over 5 steps" in page.read_text()
    assert len(list(png.iterdir())) == 11  # 6 of both runs, 2 of each, and the overview
    assert imread(png / "overview.png")[..., :3].std() > 0.05  # not a blank page


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no metrics.jsonl: name a run's folder (its trainer.default_local_dir)"),
        ({"metrics.jsonl": "{}\n"}, "line 1: no JSON object with a whole number as `step`"),
        ({"metrics.jsonl": 'x\n{"step": 1}\n'}, "line 1: not JSON"),
        ({"metrics.jsonl": "", "config.yaml": "a: [1"}, "config.yaml isn't YAML"),
        ({"metrics.jsonl": "", "config.yaml": "- a"}, "config.yaml holds no settings"),
    ],
)
def test_what_is_no_run(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path), "-o", str(tmp_path / "report.html")])
    assert message in end.value.code
    assert end.value.code.startswith("error: ")
    assert str(tmp_path) in end.value.code
    assert len(end.value.code.splitlines()) == 1
    assert not (tmp_path / "report.html").exists()
