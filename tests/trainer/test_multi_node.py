"""The main job on a Ray cluster of two nodes, each with room for one rank and one engine."""

from pathlib import Path

import pytest
import ray
from ray._private.state import actors

from tests.helpers import ROOT, ray_cluster, starting_warm, whole_run
from tests.trainer.test_main_ppo import finished, read, run, settings  # noqa: F401  fixtures


@whole_run
def test_two_nodes_train_and_resume_like_one(
    settings: list[str],  # noqa: F811
    finished: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As the scripts start it: from any folder, with the code in PYTHONPATH."""
    monkeypatch.chdir(tmp_path)
    here = ("trainer.default_local_dir=two", "trainer.nnodes=2", "trainer.n_gpus_per_node=1")
    with starting_warm(), ray_cluster({"num_cpus": 2}, {"num_cpus": 2}) as address:
        monkeypatch.setenv("PYTHONPATH", str(ROOT))  # which the nodes don't have
        monkeypatch.setenv("RAY_ADDRESS", address)
        run(settings, *here, "trainer.total_training_steps=2")
        caplog.set_level("INFO")
        run(settings, *here)
        ray.init(logging_level="warning")
        nodes: dict[tuple[str, str], set[str]] = {}
        for actor in actors().values():
            pair = nodes.setdefault((actor["JobID"], actor["ActorClassName"]), set())
            pair.add(actor["Address"]["NodeID"])
    assert len(nodes) == 4  # actors and engines of both runs
    assert all(len(pair) == 2 for pair in nodes.values())
    assert "resuming from" in caplog.text
    steps = read(Path("two"))
    assert [step["step"] for step in steps] == [0, 1, 2, 3, 4]
    assert steps == read(finished)
