"""What a type can't express: ranges, contradictions, keys without effect, changes on resume."""

import json
import math
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any

from verl.config.base import OWN, Section, SFTConfig, shown
from verl.config.rollout_correction import rejections
from verl.config.schema import WITHOUT_GROUPS, Config
from verl.config.verl_keys import WITHOUT_EFFECT, refusal

LIMITS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "low": (operator.ge, "at least"),
    "above": (operator.gt, "more than"),
    "high": (operator.le, "at most"),
}


def validate(config: Config | SFTConfig, wrong: Collection[str] = ()) -> list[str]:
    """A line with key and remedy for each problem, but of keys in `wrong`, which users know of."""
    values = list(_values(config))
    wrong = {*wrong, *(key for key, _ in values)}
    found = [*_common(config)]
    if isinstance(config, Config):
        found += [*_method(config), *_ranks(config), *_engines(config)]
        found += [] if config.trainer.val_only else _training(config)
    lines = [_filled(text, config) for text in found]
    return [text for _, text in values] + [x for x in lines if not any(key in x for key in wrong)]


def ignored_keys(config: Section, given: Collection[str]) -> dict[str, str]:
    """Those of the overridden keys that can't matter in this run, each with its reason."""
    conditions = {key: rules.idle_if for key, _, rules in config.walk()}
    found = {key: WITHOUT_EFFECT[key] for key in given if key in WITHOUT_EFFECT}
    for key in given:
        for condition in conditions.get(key, ()):
            switch = condition.partition("=")[0]  # one that is off is not idle
            if not f".{key}".endswith(f".{switch}") and config.holds(condition, key):
                found.setdefault(key, condition)
    return found


def changed_keys(saved: Mapping[str, Any], config: Config) -> dict[str, list[str]]:
    """Keys that differ from a checkpoint's configuration, nested dicts with fewer keys perhaps, as
    ``key: old → new``, by what the change means (`Rules.on_resume`): `error`, `warn`, …"""
    found: dict[str, list[str]] = defaultdict(list)
    for key, value, rules in config.walk():
        with suppress(KeyError):
            old = reduce(operator.getitem, key.split("."), saved)
            if old != (new := json.loads(json.dumps(value))):
                on_resume, _, condition = rules.on_resume.partition(" unless ")
                matters = not on_resume or (condition and config.holds(condition, key))
                if not ignored_keys(config, [key]):
                    found["error" if matters else on_resume].append(f"{key}: {old} → {new}")
    return found


def _values(config: Section) -> Iterator[tuple[str, str]]:
    """Key and line for each value out of its range."""
    for key, value, rules in config.walk():
        if ".actor.grpopp_config." in key or (value is None and not rules.auto):  # copies
            continue
        if rules.auto and not isinstance(value, float):
            if value != "auto":
                yield key, f"{key}={shown(value)}: give a number, or auto"
            continue
        if key.startswith("critic.") and config.holds("adv_estimator!=gae"):  # there is none
            continue
        chosen = value if isinstance(value, list) else [value]
        if not all(math.isfinite(one) for one in chosen if isinstance(one, float)):
            yield key, f"{key}={value}: must be finite"
        own = OWN.fullmatch(str(value)) if rules.own else None
        if own and not Path(own[1]).expanduser().is_file():
            yield key, f"{key}={value}: there is no file {own[1]}"
        elif rules.choices and not own and not all(one in rules.choices for one in chosen):
            text = f"{refused};" if (refused := refusal(f"{key}={value}")) else f"{key}={value}:"
            more = ", or path/to/file.py:function" if rules.own else ""
            yield key, f"{text} choose from {', '.join(map(str, rules.choices))}{more}"
        for name, (holds, words) in LIMITS.items():
            limit = getattr(rules, name)
            if limit is not None and not holds(value, limit):
                yield key, f"{key}={value}: must be {words} {limit}"


def _filled(text: str, config: Section) -> str:
    """`{end of a key}` becomes the whole key; `{end of a key=}` the key and its value."""

    def fill(found: re.Match[str]) -> str:
        (key, value), *_ = config.ending(found[1]).items()
        return f"{key}={value}" if found[2] else key

    return re.sub(r"{([\w.]+)(=?)}", fill, text)


def _common(config: Any) -> Iterator[str]:
    trainer, is_rl = config.trainer, isinstance(config, Config)
    trains = not (is_rl and trainer.val_only)
    validates = is_rl and (trainer.val_before_train or trainer.val_only or trainer.test_freq > 0)
    for key in ["train_files"] * trains + ["val_files"] * validates:
        given = getattr(config.data, key)
        paths = [given] if isinstance(given, str) else given
        if not (isinstance(paths, list) and paths and all(p and isinstance(p, str) for p in paths)):
            other = ", or set {val_before_train}=False and {test_freq}=-1" * (key == "val_files")
            yield f"{{data.{key}=}}: give a path or a list of paths{other}"
    own = (Path(trainer.default_local_dir).expanduser() / "huggingface").resolve()
    read = config.ending("model.path") | config.ending("lora_adapter_path")
    for key, path in (read | config.ending("data.tokenizer")).items():
        if (
            trains
            and path
            and not ignored_keys(config, [key])
            and Path(path).expanduser().resolve().is_relative_to(own)
        ):
            yield f"{key}={path} is where the run writes its model: change {{experiment_name}}"
    ranks = trainer.nnodes * trainer.n_gpus_per_node
    for key, size in config.ending("fsdp_config.fsdp_size").items():
        if size == 0 or ranks % abs(size):
            yield f"{{{key}=}} must divide the {ranks} ranks, or be -1"
    for key in ("target_modules", "exclude_modules"):
        for name, value in config.ending(key).items():
            names = [value] if isinstance(value, str) else value
            none = value is None and key == "exclude_modules"
            if not (none or (isinstance(names, list) and names and all(map(_is_text, names)))):
                yield f"{name}={value}: give names of layers as a list, or a regular expression"
    if trainer.logger is None:
        yield "{trainer.logger=}: give a name or a list of names"
    for key, betas in config.ending("optim.betas").items():
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            yield f"{{{key}=}}: give two numbers from 0 to below 1"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _method(config: Config) -> Iterator[str]:
    algorithm, actor, reward = config.algorithm, config.actor_rollout_ref.actor, config.reward_model
    groups, buffer = algorithm.filter_groups, reward.overlong_buffer
    val = config.actor_rollout_ref.rollout.val_kwargs
    for name in ("use_grpopp", "use_dr_grpo", "grpopp_config.alpha", "grpopp_config.scope"):
        value = operator.attrgetter(name)
        if value(algorithm) != value(actor):
            remedy = f"set algorithm.{name} alone, the actor follows it"
            yield f"{{algorithm.{name}=}} contradicts {{actor.{name}=}}: {remedy}"
    modes = {"use_grpopp": "delta-l", "use_dr_grpo": "dr-grpo"}
    methods = [name for name in modes if getattr(algorithm, name)]
    if len(methods) == 2:
        yield "algorithm.use_grpopp and algorithm.use_dr_grpo are two methods: turn one of them off"
    if methods and actor.loss_agg_mode not in ("token-mean", modes[methods[0]]):
        yield f"{{algorithm.{methods[0]}=}} chooses the loss aggregation: drop {{loss_agg_mode=}}"
    if actor.policy_loss.clip_cov_lb >= actor.policy_loss.clip_cov_ub:
        yield "{clip_cov_lb=} must be less than {clip_cov_ub=}"
    alpha, mode = algorithm.grpopp_config.alpha, actor.loss_agg_mode
    if isinstance(alpha, float) and alpha < 0 and mode != "lambda-grpo":
        yield "{algorithm.grpopp_config.alpha=}: must be at least 0, but for lambda-grpo"
    if alpha == "auto" and not methods and (mode == "lambda-grpo" or OWN.fullmatch(mode)):
        yield "{algorithm.grpopp_config.alpha=} is for ∆L alone: give {loss_agg_mode=} a number"
    contents = actor.checkpoint.save_contents, actor.checkpoint.load_contents
    if not {"model", "hf_model"}.intersection(*contents):
        yield "{save_contents=} and {load_contents=} must share a policy: model or hf_model"
    if actor.ppo_micro_batch_size_per_gpu is None:
        if actor.loss_agg_mode == "token-mean-legacy":
            yield "{loss_agg_mode=} averages over micro-batches: set {ppo_micro_batch_size_per_gpu}"
        if not actor.use_dynamic_bsz:
            yield "{actor.use_dynamic_bsz=}: set {ppo_micro_batch_size_per_gpu}, or drop it"
    if groups.enable and groups.metric is None:
        yield "{filter_groups.enable=} needs {filter_groups.metric}, like acc"
    if algorithm.use_kl_in_reward and groups.metric == "seq_final_reward":
        yield "{filter_groups.metric=}: no two are equal with {use_kl_in_reward=}; take seq_reward"
    if reward.enable:
        yield from _reward_model(config)
    if buffer.enable and reward.reward_manager != "dapo":
        yield "{overlong_buffer.enable=} needs {reward_manager}=dapo"
    if buffer.enable and not 1 <= buffer.len <= config.data.max_response_length:
        yield "{overlong_buffer.len=} must be between 1 and {data.max_response_length=}"
    if config.trainer.resume_mode == "resume_path" and config.trainer.resume_from_path is None:
        yield "{trainer.resume_mode=} needs {trainer.resume_from_path}"
    if val.n > 1 and (not val.do_sample or val.temperature == 0):
        others = "{val_kwargs.do_sample}=True and {val_kwargs.temperature}=1"
        yield "{val_kwargs.n=}: greedy responses don't differ: set " + others


def _advantages(config: Config) -> Iterator[str]:
    algorithm, buffer = config.algorithm, config.reward_model.overlong_buffer
    if config.actor_rollout_ref.rollout.n == 1 and algorithm.filter_groups.enable:
        yield "{filter_groups.enable=} compares a prompt's responses: set {rollout.n} to 2 or more"
    if algorithm.adv_estimator == "reinforce_plus_plus" and algorithm.gamma != 1:
        yield "{algorithm.gamma=}: a response has one advantage under {adv_estimator=}: set it to 1"
    if algorithm.adv_estimator != "gdpo":
        return
    keys, weights = algorithm.gdpo_reward_keys or [], algorithm.gdpo_reward_weights
    if not keys:
        yield "{adv_estimator=} needs {gdpo_reward_keys}, such as [correct,format]"
    if weights is not None and len(weights) != len(keys):
        yield "{gdpo_reward_weights=}: give one number for each of {gdpo_reward_keys=}"
    if algorithm.use_kl_in_reward:
        yield "{adv_estimator=} takes no KL term in its rewards: set {use_kl_loss}=True instead"
    if config.reward_model.enable and set(keys) - {"score", "overlong_reward"}:
        yield "{gdpo_reward_keys=}: a reward model gives a score alone"
    if buffer.enable and not (buffer.log and "overlong_reward" in keys):
        remedy = "add overlong_reward to {gdpo_reward_keys}, and set {overlong_buffer.log}=True"
        yield "{overlong_buffer.enable=} is no part of gdpo's rewards: " + remedy


def _critic(config: Config) -> Iterator[str]:
    critic, data = config.critic, config.data
    split = max(1, critic.ulysses_sequence_parallel_size)
    if data.train_batch_size % max(1, critic.ppo_mini_batch_size):
        yield "{critic.ppo_mini_batch_size=} must divide {train_batch_size=} (both count prompts)"
    if critic.ppo_micro_batch_size_per_gpu is None and not critic.use_dynamic_bsz:
        yield "{critic.use_dynamic_bsz=}: set {critic.ppo_micro_batch_size_per_gpu}, or drop it"
    longest = data.max_prompt_length + data.max_response_length
    for key in ("ppo_max_token_len_per_gpu", "forward_max_token_len_per_gpu"):
        if critic.use_dynamic_bsz and getattr(critic, key) * split < longest:
            yield f"{{critic.{key}=}} can't hold one sequence of {longest} tokens"


def _reward_model(config: Config) -> Iterator[str]:
    reward, actor = config.reward_model, config.actor_rollout_ref.model
    read_as, tokens = reward.model.input_tokenizer, "set it to null if the model has the policy's"
    if not reward.model.path:
        yield "{reward_model.enable=} needs {reward_model.model.path}"
    if config.custom_reward_function.path is not None:
        yield (
            "{reward_model.enable=} and {custom_reward_function.path=} are two rewards: drop one "
            "(functions that ask a generative reward model are not supported)"
        )
    if config.algorithm.filter_groups.enable and config.algorithm.filter_groups.metric == "acc":
        yield "{filter_groups.metric=}: a reward model only gives a score: set it to score"
    if read_as not in (None, "policy", actor.path, config.data.tokenizer):
        yield f"{{input_tokenizer=}}: responses are the policy's: set it to policy ({tokens})"
    if read_as is not None and not config.data.apply_chat_template:
        yield (
            "{data.apply_chat_template=}: a reward model reads chat messages: drop it, or set "
            "{input_tokenizer}=null for a model that reads the policy's tokens"
        )
    if reward.micro_batch_size_per_gpu is None and not reward.use_dynamic_bsz:
        yield "{reward_model.use_dynamic_bsz=}: set {reward_model.micro_batch_size_per_gpu}"


def _training(config: Config) -> Iterator[str]:
    rollout, groups = config.actor_rollout_ref.rollout, config.algorithm.filter_groups
    if config.data.train_batch_size % max(1, config.actor_rollout_ref.actor.ppo_mini_batch_size):
        yield "{ppo_mini_batch_size=} must divide {train_batch_size=} (both count prompts)"
    yield from _advantages(config)
    estimator = config.algorithm.adv_estimator
    if estimator == "gae":
        yield from _critic(config)
    if rollout.n == 1 and estimator not in WITHOUT_GROUPS and not OWN.fullmatch(estimator):
        yield (
            "{rollout.n=}: advantages compare a prompt's responses, so n must be at least 2, or "
            f"{{adv_estimator}} one of {', '.join(WITHOUT_GROUPS)}"
        )
    if not rollout.do_sample:
        yield "{rollout.do_sample=}: greedy responses don't differ; training needs do_sample=True"
    if rollout.temperature == 0:
        yield "{rollout.temperature=}: greedy responses don't differ; take temperature > 0"
    correction = config.algorithm.rollout_correction
    if correction.decoupled and not correction.rollout_is:
        yield "{rollout_correction.decoupled=} corrects by {rollout_is}: set it to token"
    try:
        rejections(correction)
    except ValueError as error:
        yield str(error)
    off: dict[str, Any] = {"async_rollout": False, "bypass_old_log_prob": False}
    off |= dict.fromkeys(("rollout_is", "rollout_rs", "rollout_token_veto_threshold"), "null")
    if groups.enable:
        off["carry_over"] = False
        if config.trainer.async_rollout and groups.carry_over:
            yield "{async_rollout=}: what is carried over would be too old; set {carry_over}=False"
    if config.trainer.max_policy_age:
        off |= {"max_policy_age": 0}
        off.pop("carry_over", None)  # what is left stays in line
        most = groups.max_num_gen_batches * config.data.gen_batch_size
        if groups.enable and 0 < most < config.data.train_batch_size:
            text = "{max_policy_age=}: steps of fewer than {train_batch_size=} prompts would let "
            yield text + "the others grow old; raise {max_num_gen_batches=} or {gen_batch_size=}"
    if rollout.top_p < 1 or rollout.top_k > 0:
        for name in [name for name in off if any(config.ending(name).values())]:
            text = f"{{{name}=}} compares the engines' log-probabilities with the actor's, but "
            text += "{rollout.top_p=} and {rollout.top_k=} change the engines': set "
            yield text + f"{{{name}}}={off[name]}, or top_p=1 and top_k=-1"


def _ranks(config: Config) -> Iterator[str]:
    ranks, models = config.trainer.nnodes * config.trainer.n_gpus_per_node, config.actor_rollout_ref
    parts = []
    for name, split in zip(("actor", "ref"), models.splits, strict=True):
        if name == "actor" or split != models.splits[0]:  # else it follows
            parts.append((name, split, "actor_rollout_ref.model", models.model.use_remove_padding))
    if config.algorithm.adv_estimator == "gae":
        split, model = max(1, config.critic.ulysses_sequence_parallel_size), config.critic.model
        parts.append(("critic", split, "critic.model", model.use_remove_padding))
    for name, split, model_name, packed in parts:
        if ranks % split:
            yield f"{{{name}.ulysses_sequence_parallel_size=}} must divide the {ranks} ranks"
        if split > 1 and not packed:
            remedy = f"splits packed sequences: set {{{model_name}.use_remove_padding}}=True"
            yield f"{{{name}.ulysses_sequence_parallel_size=}} {remedy}"


def _engines(config: Config) -> Iterator[str]:
    data, trainer, actor = config.data, config.trainer, config.actor_rollout_ref.actor
    rollout, split = config.actor_rollout_ref.rollout, trainer.rollout_gpus_per_node
    transfer, tokens = rollout.weight_transfer, rollout.max_num_batched_tokens
    longest = data.max_prompt_length + data.max_response_length
    lengths = "({data.max_prompt_length=}, {data.max_response_length=})"
    short = f"can't hold one sequence of {longest} tokens {lengths}"
    splits = config.actor_rollout_ref.splits
    if actor.use_dynamic_bsz and actor.ppo_max_token_len_per_gpu * splits[0] < longest:
        yield "{ppo_max_token_len_per_gpu=} " + short
    sections: Any = rollout, config.actor_rollout_ref.ref
    parts = zip(("rollout", "ref"), sections, splits, strict=True)
    for name, part, ranks in parts:
        budget = part.log_prob_max_token_len_per_gpu * ranks
        if part.log_prob_use_dynamic_bsz and budget < longest:
            yield f"{{{name}.log_prob_max_token_len_per_gpu=}} " + short
            break  # the reference's follows
    if trainer.async_rollout and not split:
        yield "{async_rollout=} needs engines on devices of their own: set {rollout_gpus_per_node}"
    if trainer.async_rollout and trainer.max_policy_age:
        yield "{async_rollout=} is one way and {max_policy_age=} another: drop one of them"
    if transfer in ("ipc", "nccl") and rollout.name == "hf":
        yield "{weight_transfer=} is for rollout.name=vllm: set it to null"
    if (transfer == "ipc" and split) or (transfer == "nccl" and not split):
        yield "{weight_transfer=}: take ipc without {rollout_gpus_per_node}, nccl with it, or null"
    if rollout.name == "hf":
        return
    devices = split or trainer.n_gpus_per_node
    size = max(1, rollout.tensor_model_parallel_size)
    if devices % size and (size % devices or trainer.nnodes * devices % size):  # whole machines
        other = ", or be all of several of the {trainer.nnodes=}" * (trainer.nnodes > 1)
        text = f"{{tensor_model_parallel_size=}} must divide the {devices} devices for engines"
        yield f"{text}{' of a machine' * bool(other)}{other}"
    if trainer.device == "cpu" and rollout.tensor_model_parallel_size != 1:
        yield "{tensor_model_parallel_size=}: vLLM has one process per engine on a CPU"
    if trainer.device == "cpu" and transfer == "ipc":
        yield "{weight_transfer=} is for GPUs: set it to null"
    if rollout.max_model_len and rollout.max_model_len < longest:
        yield "{max_model_len=} " + short
    if tokens < rollout.max_num_seqs:
        yield "{max_num_batched_tokens=} is less than max_num_seqs: raise it"
    if tokens < longest and not rollout.enable_chunked_prefill:
        yield "{max_num_batched_tokens=} " + short + ": raise it, or {enable_chunked_prefill}=True"
    own = {"tensor_parallel_size", "weight_transfer_config", "logprobs_mode", "max_model_len"}
    if taken := own & rollout.engine_kwargs.vllm.keys():
        yield f"{{engine_kwargs.vllm}}.{min(taken)} is set by other keys: drop it"
