"""Settings of speed and memory that suit the GPU: `python -m verl.tools.gpu_settings KEY…` reads a
resolved configuration on standard input, as DRY_RUN=1 prints it, and prints overrides, one a line.
The scripts of `train_scripts` and `recipe/dapo` call it, unless PUBLISHED=1; KEY… are the overrides
that users gave, whose keys are left alone.

What is learned stays as published: the settings here decide where tensors lie, how a mini-batch is
split, and how vLLM computes. The GPU is this machine's, or that of GPU_GB (`memory_plan`).
"""

import sys
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from verl.config.schema import Config
from verl.config.verl_keys import OF_ALL_RANKS, SAME_AS
from verl.tools.memory_plan import Plan, changed, machine, read_config, read_models

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
OFFLOADING = [f"{ACTOR}.fsdp_config.{name}_offload" for name in ("param", "optimizer")]
PLACES = [(False, False), (False, True), (True, True)]
"""Values of `OFFLOADING`, the fastest first."""
BUDGETS = (32768, 24576, 16384)
"""Tokens of a micro-batch: more make a GPU no faster."""
MARGIN = 0.95
"""Share of the memory that may be planned for: the estimate is as good as that."""
BATCHING = {f"{ACTOR}.{name}" for name in ("use_dynamic_bsz", "ppo_micro_batch_size_per_gpu")}

Settings = dict[str, Any]


def for_vllm(config: Config) -> Settings:
    """CUDA graphs, and prompts in parts: without either, vLLM decodes slowly, and warns."""
    if config.actor_rollout_ref.rollout.name != "vllm":
        return {}
    return {f"{ROLLOUT}.enforce_eager": False, f"{ROLLOUT}.enable_chunked_prefill": True}


def for_memory(config: Config, free: set[str]) -> Iterator[Settings]:
    """Where tensors lie and how much goes into a pass, the fastest first; of the keys in `free`."""
    split = min(config.actor_rollout_ref.splits)
    longest = -(-(config.data.max_prompt_length + config.data.max_response_length) // split)
    budgets = [tokens for tokens in BUDGETS if tokens > longest] + [longest]
    for place in PLACES:
        offload = {key: value for key, value in zip(OFFLOADING, place, strict=True) if key in free}
        for tokens in budgets if free >= BATCHING else budgets[:1]:
            batching: Settings = {f"{ACTOR}.use_dynamic_bsz": True}
            batching |= {f"{ACTOR}.ppo_max_token_len_per_gpu": tokens}
            yield offload | {key: value for key, value in batching.items() if free >= BATCHING}


def gpu_settings(config: Config, given: set[str]) -> Settings:
    """What suits the GPU best and is not so already, without the keys in `given` and below them.
    Where no estimate can be made, tensors stay where they are, and a pass gets at most what it got
    before."""
    if config.trainer.device == "cpu":
        return {}
    names = tuple(f"{SAME_AS.get(key, OF_ALL_RANKS.get(key, key))}." for key in given)
    free = {key for key, _, _ in config.walk() if not f"{key}.".startswith(names)}
    found = {key: value for key, value in for_vllm(config).items() if key in free}
    choices = list(for_memory(config, free))
    try:
        memory, host, _ = machine("cuda")
        models = read_models(config)
        found |= next((c for c in choices if fits(config, found | c, models, memory, host)), {})
    except ValueError:  # what the model needs is not known
        moderate = choices[min(BUDGETS.index(16384), len(choices) - 1)]
        found |= {key: value for key, value in moderate.items() if key not in OFFLOADING}
    return {key: value for key, value in found.items() if attrgetter(key)(config) != value}


def fits(
    config: Config, settings: Settings, models: tuple[Any, Any], memory: float, host: float
) -> bool:
    """Whether the estimate says that a run with these settings does, with a margin. Raises:
    ValueError if there is none."""
    for key, value in settings.items():
        config = changed(config, key, value)
    model, beside = models
    return Plan(config, model, "cuda", MARGIN * memory, MARGIN * host, beside).fits()


def main() -> None:
    """Prints the overrides, and on standard error how they differ from the configuration."""
    text = sys.stdin.read()
    if not text:  # the configuration has an error, which the run itself reports
        return
    config = read_config(text.partition("\n---\n")[0])  # of several runs (-m), the first
    given = {override.partition("=")[0].lstrip("+") for override in sys.argv[1:]}
    settings = gpu_settings(config, given)
    old = {key: attrgetter(key)(config) for key in settings}
    differences = [f"{key}={new} (was {old[key]})" for key, new in settings.items()]
    if differences:
        print("for speed, not as published (PUBLISHED=1 is):", *differences, file=sys.stderr)
    for key, value in settings.items():
        print(f"{key}={value}")


if __name__ == "__main__":
    main()
