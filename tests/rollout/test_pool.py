"""Generation on several engines over a real Ray: shares, early ends, engines that die."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from tests.helpers import starting_warm
from tests.rollout.test_hf import make_prompts
from tests.rollout.test_in_flight import scored
from verl.cluster import WorkerGroup, reserve_devices, start_ray
from verl.config.schema import Config, FSDPConfig, ModelConfig, OptimConfig, TrainerConfig
from verl.models.policy import PolicyWorker
from verl.protocol import Sample
from verl.rollout.engine import SamplingParams, engine_class
from verl.rollout.hf import HFEngine
from verl.rollout.in_flight import InFlight
from verl.rollout.pool import EnginePool
from verl.weight_sync import WeightSync

PROMPTS = make_prompts([3, 9, 5, 4, 6, 8, 7, 3, 5])
NUMBERS = list(range(len(PROMPTS)))
PARAMS = SamplingParams(3, 60, seed=(7, 1))


def make_config(model: Path) -> Config:
    """Engines of this model, for sequences of at most 80 tokens."""
    config = Config(trainer=TrainerConfig(device="cpu"))
    config.actor_rollout_ref.model = ModelConfig(path=str(model))
    config.data.max_prompt_length, config.data.max_response_length = 20, 60
    return config


OF_VLLM = pytest.param("vllm", marks=pytest.mark.series(4, "a pool of vLLM's engines"))


@pytest.fixture(scope="module", params=["hf", OF_VLLM])
def workers(
    request: pytest.FixtureRequest, tiny_model: Path
) -> Iterator[tuple[WorkerGroup, EnginePool]]:
    """An actor, and two engines that hold four of the nine prompts each."""
    try:
        engine = engine_class(request.param)
    except ValueError as missing:
        pytest.skip(str(missing))
    with starting_warm():
        start_ray(3)
    slots = reserve_devices(1, 2, "cpu")
    actor = WorkerGroup(PolicyWorker, slots[:1], "cpu", [("cpu",)])
    actor.connect()
    config = make_config(tiny_model)
    config.actor_rollout_ref.rollout.max_num_seqs = 12
    actor.call("build", config.actor_rollout_ref.model, FSDPConfig(), OptimConfig(), 10)
    engines = EnginePool(engine, slots, "cpu", config, 0.5)
    engines.wait_ready()
    yield actor, engines
    ray.shutdown()


@pytest.fixture
def engines(workers: tuple[WorkerGroup, EnginePool]) -> EnginePool:
    return workers[1]


def pids_of(engines: EnginePool) -> list[int]:
    return engines.wait([w.__ray_call__.remote(lambda _: os.getpid()) for w in engines.workers])


def tokens(samples: list[Sample]) -> list[tuple[int, int, list[int]]]:
    return sorted((s.group, s.response_index, s.response_ids.tolist()) for s in samples)


def generate(engines: EnginePool) -> list[Sample]:
    return [s for batch in engines.generate(PROMPTS, NUMBERS, PARAMS) for s in batch]


def restarting(actor: WorkerGroup, engines: EnginePool) -> tuple[WeightSync, EnginePool, list[int]]:
    """The engines get weights when they start again; also the list of those that did."""
    sync, restarted = WeightSync(actor, engines, "host", None), []
    engines.on_restart = lambda engine: (restarted.append(engine), sync(engine))
    return sync, engines, restarted


@pytest.fixture(scope="module")
def expected(workers: tuple[WorkerGroup, EnginePool]) -> list[tuple[int, int, list[int]]]:
    """What one engine draws, undisturbed."""
    return tokens(workers[1].call("generate_all", PROMPTS, NUMBERS, PARAMS, only=0)[0])


def test_every_prompt_is_answered_once(engines: EnginePool, expected: list) -> None:
    assert len(expected) == 27
    found = generate(engines)
    assert tokens(found) == expected
    assert all(any(s.prompt is p for p in PROMPTS) for s in found)


def test_fewer_prompts_than_engines_and_none(engines: EnginePool, expected: list) -> None:
    found = [s for batch in engines.generate(PROMPTS[:1], [0], PARAMS) for s in batch]
    assert tokens(found) == expected[:3]
    assert list(engines.generate([], [], PARAMS)) == []


def test_a_closed_generation_leaves_the_engines_free(engines: EnginePool, expected: list) -> None:
    for _ in range(2):
        stream = engines.generate(PROMPTS, NUMBERS, PARAMS)
        assert next(stream)
        stream.close()
    found = generate(engines)
    assert tokens(found) == expected


def test_engines_that_sleep_get_weights_before_they_generate(
    workers: tuple[WorkerGroup, EnginePool], expected: list
) -> None:
    """As a reward model has the devices in between."""
    _, engines, restarted = restarting(*workers)
    engines.sleep()
    for _ in range(2):
        assert tokens(generate(engines)) == expected
    assert restarted == [None]


def test_a_generation_that_is_closed_at_once_ends(engines: EnginePool) -> None:
    """Some calls have not begun by then."""
    long = SamplingParams(100, 60, seed=(7, 1), ignore_eos=True)
    started = time.monotonic()
    for _ in engines.generate(PROMPTS * 100, list(range(900)), long):  # minutes of work
        break
    assert time.monotonic() - started < 30


def test_an_engine_that_dies_loses_and_doubles_nothing(
    workers: tuple[WorkerGroup, EnginePool], expected: list
) -> None:
    _, engines, restarted = restarting(*workers)
    for victim in (0, 1):
        pids = pids_of(engines)
        stream = engines.generate(PROMPTS, NUMBERS, PARAMS)
        found = list(next(stream))
        os.kill(pids[victim], signal.SIGKILL)
        found += [s for batch in stream for s in batch]
        assert tokens(found) == expected
        engines.refresh_dead()  # it may have died after its last response
        assert restarted[-1] == victim
        assert pids_of(engines)[victim] != pids[victim]
    assert restarted == [0, 1]


def test_an_engine_that_died_idle_gets_weights_before_it_is_asked(
    workers: tuple[WorkerGroup, EnginePool], expected: list
) -> None:
    _, engines, restarted = restarting(*workers)
    os.kill(pids_of(engines)[1], signal.SIGKILL)
    assert tokens(generate(engines)) == expected
    assert restarted == [1]


@pytest.mark.parametrize("workers", ["hf"], indirect=True)
def test_an_engine_that_died_between_steps_gets_the_next_weights(
    workers: tuple[WorkerGroup, EnginePool], expected: list
) -> None:
    sync, engines, restarted = restarting(*workers)
    os.kill(pids_of(engines)[0], signal.SIGKILL)
    sync()
    assert restarted == []
    assert tokens(generate(engines)) == expected
    os.kill(pids_of(engines)[1], signal.SIGKILL)
    assert engines.call_all("sleep") == [None, None]
    assert restarted == [1]
    sync()
    assert tokens(generate(engines)) == expected


@pytest.mark.parametrize("workers", [OF_VLLM], indirect=True)
def test_an_engine_that_dies_while_it_takes_weights_ends_no_update(
    workers: tuple[WorkerGroup, EnginePool], expected: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are in the middle of theirs, and get all weights once more."""
    sync, engines, restarted = restarting(*workers)
    monkeypatch.setattr("verl.weight_sync.CHUNK_BYTES", 4096)
    pids, submit, calls = pids_of(engines), engines.submit, []

    def submit_and_kill(method: str, *args: Any, **options: Any) -> list[Any]:
        calls.append(method)
        if calls == ["start_update", "load_weights", "load_weights"]:
            os.kill(pids[1], signal.SIGKILL)
        return submit(method, *args, **options)

    monkeypatch.setattr(engines, "submit", submit_and_kill)
    sync()
    assert (calls.count("start_update"), calls.count("finish_update")) == (2, 1)
    assert pids_of(engines)[0] == pids[0] and pids_of(engines)[1] != pids[1]
    assert tokens(generate(engines)) == expected
    assert restarted == []


def test_an_interrupted_generation_goes_on_with_what_has_begun(
    workers: tuple[WorkerGroup, EnginePool],
) -> None:
    """Greedily, as vLLM goes on with other random numbers; and with an engine that dies."""
    _, engines, restarted = restarting(*workers)
    params = replace(PARAMS, temperature=0.0, ignore_eos=True)
    prompts = PROMPTS * 5  # so that engines are still busy in the third round
    whole = engines.generate(prompts, range(len(prompts)), params)
    expected = tokens([s for part in whole for s in part])
    flight = InFlight(scored, params)
    flight.engines = engines
    flight.add(prompts)
    found: list[Sample] = []
    for round_ in range(4):
        flight.start()
        if round_ == 2:
            os.kill(engines.processes[1], signal.SIGKILL)
        time.sleep(0.05)
        flight.pause()
        begun = [r.num_begun for group in flight.line for r in group.missing.values()]
        assert round_ or any(begun)
    while flight.line:
        found += flight.next()
    assert tokens(found) == expected
    assert [s.prompt.index for s in found] == [i for i in NUMBERS * 5 for _ in range(3)]
    assert restarted == [1]
    flight.thread.shutdown()


def test_an_interruption_that_comes_before_the_engines_begin_ends_them(engines: EnginePool) -> None:
    long = SamplingParams(100, 60, seed=(7, 1), ignore_eos=True)  # minutes of work
    flight = InFlight(scored, long)
    flight.engines = engines
    flight.add(PROMPTS * 100)
    started = time.monotonic()
    for _ in range(3):
        flight.start()
        flight.pause()
    assert time.monotonic() - started < 30
    assert flight.metrics()["async/complete_groups"] < 100
    flight.thread.shutdown()


def test_a_generation_can_be_cancelled(engines: EnginePool, expected: list) -> None:
    stream = engines.generate(PROMPTS, NUMBERS, PARAMS)
    next(stream)
    engines.cancelled = True
    with pytest.raises(RuntimeError, match="cancelled"):
        list(stream)
    engines.cancelled = False
    found = generate(engines)
    assert tokens(found) == expected


@pytest.mark.parametrize("workers", ["hf"], indirect=True)
def test_the_batches_are_the_same_in_every_run(engines: EnginePool) -> None:
    """To the last bit: other batches would round the log-probabilities otherwise."""
    first, second = (
        sorted(generate(engines), key=lambda s: (s.group, s.response_index)) for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.rollout_log_probs, b.rollout_log_probs)


class Doomed(HFEngine):
    """Dies of every prompt."""

    def generate_rows(self, *_: Any) -> Iterator[list[Sample]]:
        os.kill(os.getpid(), signal.SIGKILL)
        yield []


@pytest.mark.parametrize("workers", ["hf"], indirect=True)
def test_an_engine_that_always_dies_ends_the_run(engines: EnginePool, tiny_model: Path) -> None:
    slots = reserve_devices(1, 1, "cpu", timeout_s=30)
    doomed = EnginePool(Doomed, slots, "cpu", make_config(tiny_model), 0.5)
    with pytest.raises(ray.exceptions.RayActorError):
        list(doomed.generate(PROMPTS[:1], [0], PARAMS))


def test_an_error_of_an_engine_is_raised(engines: EnginePool, expected: list) -> None:
    bad = SamplingParams(3, 60, seed=(-1,))  # for numpy no seed
    with pytest.raises(ValueError, match=r"non-negative|unsigned|negative"):
        list(engines.generate(PROMPTS, NUMBERS, bad))
    found = generate(engines)
    assert tokens(found) == expected
    assert np.isfinite([s.rollout_log_probs.sum() for s in found]).all()
