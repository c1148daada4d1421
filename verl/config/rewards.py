"""`reward_model` and `custom_reward_function`: what scores responses."""

from typing import Any

from verl.config.base import FREE, SIZE, ClassifierConfig, FSDPConfig, Section, key


class OverlongBufferConfig(Section):
    """`reward_model.overlong_buffer`: soft overlong punishment (arXiv 2503.14476, eq. 13)."""

    enable: bool = False
    """Punish long responses (reward_manager=dapo)."""
    len: int = key(0, low=0)
    """Length of the ramp in tokens, which ends at max_response_length."""
    penalty_factor: float = key(0.0, low=0)
    """Punishment at the end of the ramp."""
    log: bool = False
    """Report the mean punishment as reward/overlong_reward."""


class MathServerConfig(Section):
    """`reward_model.math_server`: the LaTeX server (`server/math`), which math data sources ask."""

    url: str | None = key(None, **FREE)
    """null: MATH_SERVER_URL of the environment, else http://127.0.0.1:6284."""
    autostart: bool = key(False, **FREE)
    """Start the server where none answers at `url`, and again should it end; stop it at the end."""
    max_wait_s: float = key(600.0, above=0, **FREE)
    """Seconds to wait for a server that went away; then the run stops, with a checkpoint."""
    answer_rule: str = key("standard", choices=("standard", "published"))
    """What a response answers. `standard`: the last box or answer tag after the thinking.
    `published` (arXiv 2509.07558): the last innermost box of all."""
    max_answer_length: int = key(30, low=0)
    """Characters; a longer answer is wrong unless it is identical to the reference. By the standard
    rule spaces don't count, and 20 more than the reference has are never too many."""
    batch_size: int = key(64, low=1, high=2048, **FREE)
    """Pairs of one request, at most; the server takes 2,048 unless it is told otherwise."""
    max_connections: int = key(8, **SIZE)
    """Requests that are under way at the same time."""


class RewardModelModelConfig(Section):
    """`reward_model.model`: a sequence classifier with one label. It reads the conversation with
    the response, and its output at the last token is the score."""

    path: str | None = None
    """Hugging Face model with a `score` head, and its tokenizer: a folder or a name on the hub."""
    input_tokenizer: str | None = "policy"
    """The policy's tokenizer (`policy`, or its path): responses are decoded, and the conversation
    is rendered and tokenized by the reward model's own. null: the model reads the policy's
    tokens as they are."""
    override_config: dict[str, Any] = key(dict)
    """Values that replace those of the model's config.json."""
    use_remove_padding: bool = key("${actor_rollout_ref.model.use_remove_padding}", **FREE)
    """Packed forward pass; null: as the policy's."""
    trust_remote_code: bool = False
    """Run Python code that the model's folder brings along."""
    fsdp_config: FSDPConfig = key(FSDPConfig)

    def classifier(self) -> ClassifierConfig:
        """The model as `verl.models` takes it."""
        assert self.path is not None
        return ClassifierConfig(
            path=self.path,
            override_config=self.override_config,
            enable_gradient_checkpointing=False,
            use_remove_padding=self.use_remove_padding,
            trust_remote_code=self.trust_remote_code,
        )


class RewardModelConfig(Section):
    """`reward_model`."""

    enable: bool = False
    """Let a model score the responses, instead of a function. In validations it scores rows whose
    `reward_model.style` is `model`; functions score the others."""
    model: RewardModelModelConfig = key(RewardModelModelConfig, idle_if="reward_model.enable=False")
    micro_batch_size_per_gpu: int | None = key(
        None, **SIZE, idle_if=("reward_model.enable=False", "reward_model.use_dynamic_bsz=True")
    )
    """Conversations of one forward pass of the reward model on a rank; null: a token budget."""
    use_dynamic_bsz: bool = key(
        "${verl.is_null:${.micro_batch_size_per_gpu}}", **FREE, idle_if="reward_model.enable=False"
    )
    """Micro-batches by token budget instead of by count; null: where no count is given."""
    forward_max_token_len_per_gpu: int = key(
        "${verl.token_budget:${data.max_prompt_length},${data.max_response_length}}",
        **SIZE,
        idle_if=("reward_model.enable=False", "reward_model.use_dynamic_bsz=False"),
    )
    """That budget (a longer conversation stands alone); null: 16384, or max_prompt_length +
    max_response_length if that is more."""
    max_length: int | None = key(None, low=1, idle_if="reward_model.enable=False")
    """Longer conversations are cut on the right, in tokens of the reward model, with a warning;
    null: max_prompt_length + max_response_length."""
    reward_manager: str = key("naive", choices=("naive", "dapo", "gdpo"))
    """`dapo` adds the overlong punishment to the score. `gdpo` is another name of `naive`."""
    skip_special_tokens: bool = False
    """Leave all special tokens out of the text that is scored, not only the one that ended it."""
    num_workers: int = key(8, **SIZE, idle_if="custom_reward_function.path=null")
    """Calls of a custom reward function at a time, in threads (`async` ones: tasks of a thread)."""
    overlong_buffer: OverlongBufferConfig = key(
        OverlongBufferConfig, idle_if="overlong_buffer.enable=False"
    )
    math_server: MathServerConfig = key(
        MathServerConfig, idle_if="custom_reward_function.path!=null"
    )


class CustomRewardConfig(Section):
    """`custom_reward_function`: called by name, with those of `data_source`, `solution_str`,
    `ground_truth` and `extra_info` that it takes."""

    path: str | None = None
    """Python file; null: `verl.rewards.compute_score`."""
    name: str = "compute_score"
    """Function in that file; returns a number, or a dict with `score`."""
    reward_kwargs: dict[str, Any] = key(dict, idle_if="custom_reward_function.path=null")
    """More arguments of it, always the same."""
    timeout_s: float = key(300.0, above=0, **FREE, idle_if="custom_reward_function.path=null")
    """Seconds of one call; then the run stops, with a checkpoint unless it holds Python's lock."""
