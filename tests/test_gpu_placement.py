"""Who gets which GPU, on a real Ray with one machine whose four GPUs are only counted."""

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import ray
from ray import cloudpickle
from ray.util import get_current_placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tests.helpers import ray_cluster, starting_warm
from verl.cluster import WORKERS_PER_DEVICE, Slots, WorkerGroup, reserve_devices, start_ray
from verl.config.load import load_config
from verl.config.schema import Config
from verl.rollout.pool import EnginePool
from verl.rollout.vllm import environment

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers needn't import all this
SHARE = 1 / WORKERS_PER_DEVICE


class Place:
    """A worker that says which GPUs Ray gives it, and which CUDA would show it."""

    def gpus(self) -> tuple[list[int], str | None]:
        return ray.get_gpu_ids(), os.environ.get("CUDA_VISIBLE_DEVICES")


class Engine(Place):
    """Starts workers of its own where vLLM's Ray executor does, by the variables that it reads."""

    parallel, stored = True, False

    def __init__(self, share: float, bundles: Sequence[int]) -> None:
        self.share, self.bundles = share, bundles

    def build(self, *settings: Any) -> None:
        self.longest = settings[-1]

    def built_for(self) -> int:
        return self.longest

    def given(self) -> tuple[float, list[int]]:
        return self.share, list(self.bundles)

    def workers_gpus(self, variables: dict[str, str]) -> list[tuple[list[int], str | None]]:
        share = float(variables["VLLM_RAY_PER_WORKER_GPUS"])
        group: Any = get_current_placement_group()
        self.workers = [
            ray.remote(num_cpus=0, num_gpus=share)(Place)
            .options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, int(bundle)))
            .remote()
            for bundle in variables["VLLM_RAY_BUNDLE_INDICES"].split(",")
        ]
        return ray.get([worker.gpus.remote() for worker in self.workers])


@pytest.fixture(scope="module", autouse=True)
def machine() -> Iterator[None]:
    """One machine with four GPUs."""
    with (
        starting_warm(),
        ray_cluster({"num_cpus": 8, "num_gpus": 4}) as address,
        pytest.MonkeyPatch.context() as environment,
    ):
        environment.setenv("RAY_ADDRESS", address)
        start_ray(4)
        yield


@pytest.fixture
def slots() -> Iterator[Slots]:
    """All four."""
    reserved = reserve_devices(1, 4, "cuda")
    yield reserved
    remove_placement_group(reserved[0][0])


def settings(parallel: int = 1, *others: str) -> Config:
    """Of engines on so many GPUs each."""
    size = f"actor_rollout_ref.rollout.tensor_model_parallel_size={parallel}"
    keys = ["actor_rollout_ref.rollout.name=vllm", "trainer.device=cuda", size]
    return load_config([*keys, *others, "trainer.n_gpus_per_node=4"])


def pool(slots: Slots, share: float, parallel: int = 1, *others: str) -> EnginePool:
    """Engines on these slots."""
    return EnginePool(Engine, slots, "cuda", settings(parallel, *others), share)  # type: ignore[arg-type]


def seen(places: list[tuple[list[int], str | None]]) -> list[int]:
    """The GPU of each worker: that of Ray, which is the only one that CUDA shows it."""
    assert [visible for _, visible in places] == [str(gpu) for (gpu,), _ in places]
    return [gpu for (gpu,), _ in places]


def test_a_rank_and_its_engine_share_a_gpu(slots: Slots) -> None:
    actors = WorkerGroup(Place, slots, "cuda", [()] * 4, SHARE)
    ranks, engines = seen(actors.call("gpus")), seen(pool(slots, SHARE).call("gpus"))
    assert ranks == engines and sorted(ranks) == [0, 1, 2, 3]


def test_engines_of_their_own_share_none(slots: Slots) -> None:
    actors = WorkerGroup(Place, slots[:2], "cuda", [()] * 2, 1.0)
    ranks, engines = seen(actors.call("gpus")), seen(pool(slots[2:], 1.0).call("gpus"))
    assert sorted(ranks + engines) == [0, 1, 2, 3]


def test_an_engine_on_two_gpus_shares_those_of_its_ranks(slots: Slots) -> None:
    """The engine's own process has none; each of its workers is beside one rank."""
    actors = WorkerGroup(Place, slots, "cuda", [()] * 4, SHARE)
    engines = pool(slots, SHARE, parallel=2)
    assert [ids for ids, _ in engines.call("gpus")] == [[], []]
    assert engines.call("given") == [(SHARE, [0, 1]), (SHARE, [2, 3])]
    rollout = settings(2).actor_rollout_ref.rollout
    variables = [environment(rollout, SHARE, bundles) for bundles in ((0, 1), (2, 3))]
    first, second = engines.scatter("workers_gpus", [(each,) for each in variables])
    assert seen(first) + seen(second) == seen(actors.call("gpus"))
    assert sorted(seen(first) + seen(second)) == [0, 1, 2, 3]


def test_an_engine_on_two_machines_leaves_the_ranks_devices_between_them(slots: Slots) -> None:
    """Of slots that come machine by machine, the second and the fourth are for engines alone."""
    assert pool(slots[1::2], 1.0, parallel=2).call("given") == [(1.0, [1, 3])]


def test_engines_are_built_for_the_longest_sequence_or_what_the_key_says(slots: Slots) -> None:
    for keys, longest in (((), 1024), (("actor_rollout_ref.rollout.max_model_len=2000",), 2000)):
        engines = pool(slots[:1], SHARE, 1, *keys)
        engines.wait_ready()
        assert engines.call("built_for") == [longest]
