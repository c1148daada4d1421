"""Generation on several engines over a real Ray: one queue, early ends, engines that die."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from tests.workers.test_hf_rollout import make_prompts
from verl.protocol import Sample
from verl.trainer.config.model_schema import FSDPConfig, ModelConfig, OptimConfig
from verl.trainer.config.schema import RolloutConfig
from verl.workers.actor import ActorWorker
from verl.workers.engines import EngineGroup
from verl.workers.group import WorkerGroup, place, start_ray
from verl.workers.rollout.base import ENGINES, SamplingParams, engine_class
from verl.workers.rollout.hf import HFEngine
from verl.workers.weight_sync import WeightSync

PROMPTS = make_prompts([3, 9, 5, 4, 6, 8, 7, 3, 5])
NUMBERS = list(range(len(PROMPTS)))
PARAMS = SamplingParams(3, 60, seed=(7, 1))


@pytest.fixture(scope="module", params=ENGINES)
def groups(
    request: pytest.FixtureRequest, tiny_model: Path
) -> Iterator[tuple[WorkerGroup, EngineGroup]]:
    """An actor, and two engines that hold four of the nine prompts each."""
    try:
        engine = engine_class(request.param)
    except ValueError as missing:
        pytest.skip(str(missing))
    start_ray(3)
    slots = place(1, 2, "cpu")
    actor = WorkerGroup(ActorWorker, slots[:1], "cpu", [("cpu",)])
    actor.connect()
    model, rollout = ModelConfig(path=str(tiny_model)), RolloutConfig(max_num_seqs=12)
    actor.call("build", model, FSDPConfig(), OptimConfig(), 10)
    engines = EngineGroup(engine, slots, "cpu", 0.5, model, rollout, 80)
    yield actor, engines
    ray.shutdown()


@pytest.fixture
def engines(groups: tuple[WorkerGroup, EngineGroup]) -> EngineGroup:
    return groups[1]


def pids_of(engines: EngineGroup) -> list[int]:
    return engines.wait([w.__ray_call__.remote(lambda _: os.getpid()) for w in engines.workers])


def tokens(samples: list[Sample]) -> list[tuple[int, int, list[int]]]:
    return sorted((s.group, s.draw, s.response_ids.tolist()) for s in samples)


def generate(engines: EngineGroup) -> list[Sample]:
    return [s for batch in engines.generate(PROMPTS, NUMBERS, PARAMS) for s in batch]


def restarting(
    actor: WorkerGroup, engines: EngineGroup
) -> tuple[WeightSync, EngineGroup, list[int]]:
    """The engines get weights when they start again; also the list of those that did."""
    sync, restarted = WeightSync(actor, engines, "host", None), []
    engines.on_restart = lambda engine: (restarted.append(engine), sync(engine))
    return sync, engines, restarted


@pytest.fixture(scope="module")
def expected(groups: tuple[WorkerGroup, EngineGroup]) -> list[tuple[int, int, list[int]]]:
    """What one engine draws, undisturbed."""
    method = groups[1].workers[0].generate.options(num_returns="streaming")
    stream = method.remote(PROMPTS, NUMBERS, PARAMS)
    return tokens([s for batch in stream for s in ray.get(batch)])


def test_every_prompt_is_answered_once(engines: EngineGroup, expected: list) -> None:
    assert len(expected) == 27
    found = generate(engines)
    assert tokens(found) == expected
    assert all(any(s.prompt is p for p in PROMPTS) for s in found)


def test_fewer_prompts_than_engines_and_none(engines: EngineGroup, expected: list) -> None:
    found = [s for batch in engines.generate(PROMPTS[:1], [0], PARAMS) for s in batch]
    assert tokens(found) == expected[:3]
    assert list(engines.generate([], [], PARAMS)) == []


def test_a_closed_generation_leaves_the_engines_free(engines: EngineGroup, expected: list) -> None:
    for _ in range(2):
        stream = engines.generate(PROMPTS, NUMBERS, PARAMS)
        assert next(stream)
        stream.close()
    found = generate(engines)
    assert tokens(found) == expected


def test_an_engine_that_dies_loses_and_doubles_nothing(
    groups: tuple[WorkerGroup, EngineGroup], expected: list
) -> None:
    _, engines, restarted = restarting(*groups)
    for victim in (0, 1):
        pids = pids_of(engines)
        stream = engines.generate(PROMPTS, NUMBERS, PARAMS)
        found = list(next(stream))
        os.kill(pids[victim], signal.SIGKILL)
        found += [s for batch in stream for s in batch]
        assert tokens(found) == expected
        assert restarted[-1] == victim
        assert pids_of(engines)[victim] != pids[victim]
    assert restarted == [0, 1]


def test_an_engine_that_died_idle_gets_weights_before_it_is_asked(
    groups: tuple[WorkerGroup, EngineGroup], expected: list
) -> None:
    sync, engines, restarted = restarting(*groups)
    os.kill(pids_of(engines)[1], signal.SIGKILL)
    found = generate(engines)
    assert tokens(found) == expected
    os.kill(pids_of(engines)[0], signal.SIGKILL)
    sync()
    assert restarted == [1]
    found = generate(engines)
    assert tokens(found) == expected


def test_a_generation_can_be_cancelled(engines: EngineGroup, expected: list) -> None:
    stream = engines.generate(PROMPTS, NUMBERS, PARAMS)
    next(stream)
    engines.cancelled = True
    with pytest.raises(RuntimeError, match="cancelled"):
        list(stream)
    engines.cancelled = False
    found = generate(engines)
    assert tokens(found) == expected


class Doomed(HFEngine):
    """Dies of every prompt."""

    def _generate(self, params: SamplingParams) -> Iterator[list[Sample]]:
        os.kill(os.getpid(), signal.SIGKILL)
        yield []


@pytest.mark.parametrize("groups", ["hf"], indirect=True)
def test_an_engine_that_always_dies_ends_the_run(engines: EngineGroup, tiny_model: Path) -> None:
    model, slots = ModelConfig(path=str(tiny_model)), place(1, 1, "cpu", timeout_s=30)
    doomed = EngineGroup(Doomed, slots, "cpu", 0.5, model, RolloutConfig(), 80)
    with pytest.raises(ray.exceptions.RayActorError):
        list(doomed.generate(PROMPTS[:1], [0], PARAMS))


def test_an_error_of_an_engine_is_raised(engines: EngineGroup, expected: list) -> None:
    bad = SamplingParams(3, 60, seed=(-1,))  # for numpy no seed
    with pytest.raises(ValueError, match=r"non-negative|unsigned|negative"):
        list(engines.generate(PROMPTS, NUMBERS, bad))
    found = generate(engines)
    assert tokens(found) == expected
    assert np.isfinite([s.rollout_log_probs.sum() for s in found]).all()
