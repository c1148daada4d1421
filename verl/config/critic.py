"""`critic`: the value model of adv_estimator=gae."""

from typing import Any

from verl.config.base import (
    FREE,
    SIZE,
    CriticModelConfig,
    FSDPConfig,
    OptimConfig,
    Section,
    key,
)


class CriticModelSection(Section):
    """`critic.model`: a decoder with a head of one number. Where its files have no such head, as
    those of a language model, all values are 0 at the beginning."""

    path: str = "${actor_rollout_ref.model.path}"
    """Hugging Face model: a folder or a name on the hub. It reads the policy's tokens."""
    override_config: dict[str, Any] = key(dict)
    """Values that replace those of the model's config.json. Dropout is always off."""
    enable_gradient_checkpointing: bool = key(True, **FREE)
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    use_remove_padding: bool = key("${actor_rollout_ref.model.use_remove_padding}", **FREE)
    """Packed forward pass; null: as the policy's."""
    trust_remote_code: bool = False
    """Run Python code that the model's folder brings along."""
    external_lib: Any = "${actor_rollout_ref.model.external_lib}"
    """Module, or list of modules, to import before the model is loaded; null: as the policy's."""
    fsdp_config: FSDPConfig = key(FSDPConfig)

    def classifier(self) -> CriticModelConfig:
        """The model as `verl.models` takes it."""
        return CriticModelConfig(
            path=self.path,
            override_config=self.override_config | {"num_labels": 1},
            enable_gradient_checkpointing=self.enable_gradient_checkpointing,
            use_remove_padding=self.use_remove_padding,
            trust_remote_code=self.trust_remote_code,
            external_lib=self.external_lib,
        )


class CriticConfig(Section):
    """`critic`: what predicts the value of each token, and is trained beside the actor, with the
    same weights of responses. It lies on the actor's devices."""

    model: CriticModelSection = key(CriticModelSection)
    optim: OptimConfig = key(lambda: OptimConfig(lr=1e-5), on_resume="warn")
    ppo_mini_batch_size: int = key("${actor_rollout_ref.actor.ppo_mini_batch_size}", low=1)
    """Prompts of one optimizer step (times n responses); divides train_batch_size; null: as the
    actor's."""
    ppo_epochs: int = key("${actor_rollout_ref.actor.ppo_epochs}", low=1)
    """Passes over the train batch in each step; null: as the actor's."""
    shuffle: bool = key("${actor_rollout_ref.actor.shuffle}")
    """Draw the mini-batches in random order; null: as the actor's."""
    ppo_micro_batch_size_per_gpu: int | None = key(
        None, **SIZE, idle_if="critic.use_dynamic_bsz=True"
    )
    """Responses of one forward/backward pass on a rank; null: a token budget."""
    use_dynamic_bsz: bool = key("${verl.is_null:${.ppo_micro_batch_size_per_gpu}}", **FREE)
    """Micro-batches by token budget instead of by count; null: where no count is given."""
    ppo_max_token_len_per_gpu: int = key(
        "${verl.token_budget:${.ulysses_sequence_parallel_size},${data.max_prompt_length},"
        "${data.max_response_length}}",
        **SIZE,
        idle_if="critic.use_dynamic_bsz=False",
    )
    """That budget of a rank (prompts and responses); null: as the actor's default."""
    forward_micro_batch_size_per_gpu: int | None = key(
        "${.ppo_micro_batch_size_per_gpu}", **SIZE, idle_if="critic.use_dynamic_bsz=True"
    )
    """Responses of one forward pass that computes values; null: ppo_micro_batch_size_per_gpu."""
    forward_max_token_len_per_gpu: int = key(
        "${.ppo_max_token_len_per_gpu}", **SIZE, idle_if="critic.use_dynamic_bsz=False"
    )
    """Token budget of such a pass; null: ppo_max_token_len_per_gpu."""
    ulysses_sequence_parallel_size: int = key(1, **SIZE)
    """Ranks that split the sequences of a micro-batch, as the actor's key."""
    grad_clip: float = key(1.0, above=0)
    """Largest norm of the gradient."""
    cliprange_value: float = key(0.5, above=0)
    """The loss counts a value that moved further than this from where it was before the step as if
    it had moved so far, if that makes the loss larger."""
