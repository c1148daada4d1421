"""Every key of `verl.trainer.main_ppo`, and its `Rules`; docs/keys.md is made from this."""

from contextlib import suppress
from typing import Any

from verl.config.base import (
    FREE,
    OTHER_LOGGERS,
    SIZE,
    FSDPConfig,
    ModelConfig,
    OptimConfig,
    RayInitConfig,
    RunConfig,
    Section,
    TrainFilesConfig,
    key,
)
from verl.config.critic import CriticConfig
from verl.config.rewards import CustomRewardConfig, RewardModelConfig
from verl.config.rollout import RolloutConfig
from verl.config.rollout_correction import RolloutCorrectionConfig

LOSS_AGG_MODES = (
    "token-mean",
    "token-mean-legacy",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "luspo",
    "lambda-grpo",
    "dr-grpo",
    "delta-l",
)
WITHOUT_GROUPS = ("reinforce_plus_plus", "remax", "gae")
"""Estimators that compare no responses to the same prompt, so that one is enough."""
BY_STD = ("grpo", "grpo_vectorized", "grpo_passk", "gdpo")
ADV_ESTIMATORS = (
    *BY_STD,
    *WITHOUT_GROUPS,
    "rloo",
    "rloo_vectorized",
    "reinforce_plus_plus_baseline",
    "opo",
    "gpg",
)
LOSS_MODES = (
    "vanilla",
    "gspo",
    "gspo-token",
    "geo_mean",
    "clip_cov",
    "kl_cov",
    "gpg",
    "cispo",
    "sapo",
    "dppo_tv",
    "dppo_kl",
    "vespo",
)
WITHOUT_CLIP = tuple(f"loss_mode={name}" for name in ("kl_cov", "gpg", "sapo", "vespo"))
GRPOPP: Any = ("${algorithm.grpopp_config.alpha}", "${algorithm.grpopp_config.scope}")
NO_ALPHA = "use_grpopp=False and loss_agg_mode!=delta-l and loss_agg_mode!=lambda-grpo"
KL_ESTIMATORS = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
SHOW_GENERATIONS = ("wandb", "tensorboard", *OTHER_LOGGERS[:-1])
CONTENTS = ("model", "optimizer", "extra", "hf_model")


class DataConfig(TrainFilesConfig):
    """`data`: files with the columns prompt, data_source, reward_model, extra_info."""

    val_files: Any = key("~/data/countdown_nochat/test.parquet", on_resume="validation")
    """The same for validation; null if nothing is validated."""
    val_max_samples: int = key(-1, low=-1, on_resume="validation")
    """Rows of them to use, chosen as by train_max_samples."""
    reward_fn_key: str = "data_source"
    """Column that chooses the reward function."""
    apply_chat_template: bool = True
    """Render chat messages with the tokenizer's template; False: prompts are plain strings."""
    apply_chat_template_kwargs: dict[str, Any] = key(dict, idle_if="apply_chat_template=False")
    """What the template gets beside the messages, such as {enable_thinking: False} of Qwen3's."""
    max_prompt_length: int = key(512, low=1)
    """Longest prompt, in tokens."""
    max_response_length: int = key(512, low=1)
    """Longest response, in tokens: the constant M of the loss aggregation."""
    gen_batch_size: int = key("${.train_batch_size}", low=1, idle_if="filter_groups.enable=False")
    """Prompts of one generation round of algorithm.filter_groups; null: train_batch_size."""
    val_batch_size: int | None = key(None, **SIZE)
    """Prompts of one validation round; null: all at once."""
    filter_overlong_prompts: bool = False
    """Drop prompts longer than max_prompt_length."""
    truncation: str = key("error", choices=("error", "left", "right", "middle"))
    """For longer prompts: stop with an error, or cut tokens off the left, right or middle."""


class GrpoppConfig(Section):
    """`grpopp_config`: ∆L Normalization (arXiv 2509.07558)."""

    alpha: Any = key(0.75, low=-10, high=10, auto=True)
    """Exponent α ≥ 0: w_i ∝ L_i^(−α). 0 is Dr. GRPO Norm. `auto`: each step takes the exponent that
    the gradients of earlier ones had (docs/methods.md). Of loss_agg_mode=lambda-grpo it is −λ, and
    may be negative."""
    scope: str = key("batch", choices=("batch", "mini_batch"), idle_if="loss_agg_mode=lambda-grpo")
    """Average L_i^(−α) over the rollout batch (published code) or the mini-batch (paper)."""

    def __post_init__(self) -> None:
        if isinstance(self.alpha, int | str) and not isinstance(self.alpha, bool):
            with suppress(ValueError):  # then it is a word
                self.alpha = float(self.alpha)


class PolicyLossConfig(Section):
    """`actor_rollout_ref.actor.policy_loss`: the loss of a token (docs/from-verl.md)."""

    loss_mode: str = key(
        "vanilla",
        choices=LOSS_MODES,
        own=True,
        idle_if="bypass_old_log_prob=True and loss_type=reinforce",
    )
    """Policy loss; `vanilla` is PPO's. The weights of responses are loss_agg_mode's alone. A
    function of your own: docs/your_own_method.md."""
    top_entropy_quantile: float = key(
        1.0, above=0, high=1, idle_if="bypass_old_log_prob=True and loss_type=reinforce"
    )
    """Only this share of an optimizer step's tokens, those of the largest entropy before the
    update, have a gradient of the policy loss (arXiv 2506.01939: 0.2). 1: all."""
    clip_cov_ratio: float = key(0.0002, above=0, high=1, idle_if="loss_mode!=clip_cov")
    """clip_cov: share of an optimizer step's tokens that have no loss; at least one token."""
    clip_cov_lb: float = key(1.0, idle_if="loss_mode!=clip_cov")
    """They have a covariance of advantage and log-probability above this."""
    clip_cov_ub: float = key(5.0, idle_if="loss_mode!=clip_cov")
    """And below this."""
    kl_cov_ratio: float = key(0.0002, above=0, high=1, idle_if="loss_mode!=kl_cov")
    """kl_cov: share of an optimizer step's tokens, those of the largest covariance, that have a
    penalty; at least one token."""
    ppo_kl_coef: float = key(0.1, low=0, idle_if="loss_mode!=kl_cov")
    """Weight of that penalty, |log π/π_old|."""
    vespo_k_pos: float = key(2.0, low=0, idle_if="loss_mode!=vespo")
    """vespo: the factor W^k·exp(λ·(1 − W)) of a response with ratio W has this k where A ≥ 0."""
    vespo_lambda_pos: float = key(3.0, above=0, idle_if="loss_mode!=vespo")
    """And this λ."""
    vespo_k_neg: float = key(3.0, low=0, idle_if="loss_mode!=vespo")
    """k where A < 0."""
    vespo_lambda_neg: float = key(2.0, above=0, idle_if="loss_mode!=vespo")
    """λ where A < 0."""


class CheckpointConfig(Section):
    """`actor_rollout_ref.actor.checkpoint`: what a checkpoint holds of the policy."""

    save_contents: list[str] = key(lambda: [*CONTENTS[:3]], choices=CONTENTS, **FREE)
    """A list: `model` (the parameters, in the type that is trained), `optimizer` (its states) and
    `hf_model` (a folder in Hugging Face format, `actor/huggingface`). `extra` is always there."""
    load_contents: list[str] = key("${.save_contents}", choices=CONTENTS, **FREE)
    """What a resumed run takes of these; null: save_contents. Without `optimizer` its states begin
    anew; without `model` the weights are those of `hf_model`, which may be rounded."""


class ActorConfig(Section):
    """`actor_rollout_ref.actor`."""

    ppo_mini_batch_size: int = key("${data.train_batch_size}", low=1)
    """Prompts of one optimizer step (times n responses); divides train_batch_size; null: all."""
    ppo_micro_batch_size_per_gpu: int | None = key(
        None,
        low=1,
        on_resume="free unless loss_agg_mode=token-mean-legacy",
        idle_if="actor.use_dynamic_bsz=True and loss_agg_mode!=token-mean-legacy",
    )
    """Responses of one forward/backward pass on a rank; null: a token budget."""
    use_prefix_grouper: bool = key(True, on_resume="free", idle_if="use_remove_padding=False")
    """Compute a packed prompt once for its responses, in the reference, too (docs/models.md)."""
    use_dynamic_bsz: bool = key("${verl.is_null:${.ppo_micro_batch_size_per_gpu}}", **FREE)
    """Micro-batches by token budget instead of by count; null: where no count is given."""
    ppo_max_token_len_per_gpu: int = key(
        "${verl.token_budget:${.ulysses_sequence_parallel_size},${data.max_prompt_length},"
        "${data.max_response_length}}",
        **SIZE,
        idle_if="actor.use_dynamic_bsz=False",
    )
    """That budget of a rank (prompts and responses); null: 16384, or its part of the longest
    sequence if that is longer."""
    ppo_epochs: int = key(1, low=1)
    """Passes over the train batch in each step."""
    shuffle: bool = False
    """Draw the mini-batches in random order."""
    grad_clip: float = key(1.0, above=0)
    """Largest norm of the gradient."""
    clip_ratio: float = key(
        0.2,
        above=0,
        idle_if=("clip_ratio_low!=null and clip_ratio_high!=null", *WITHOUT_CLIP),
    )
    """PPO's ε, where clip_ratio_low or clip_ratio_high is null."""
    clip_ratio_low: float | None = key(None, above=0, idle_if=WITHOUT_CLIP)
    """The ratio is clipped at 1 − clip_ratio_low; of geo_mean and dppo_… it bounds something else
    (docs/from-verl.md)."""
    clip_ratio_high: float | None = key(None, above=0, idle_if=WITHOUT_CLIP)
    """The ratio is clipped at 1 + clip_ratio_high."""
    clip_ratio_c: float = key(
        3.0,
        above=1,
        idle_if="loss_mode!=vanilla and loss_mode!=dppo_tv and loss_mode!=dppo_kl",
    )
    """Dual clip: with a negative advantage A the loss is at most −c·A; under dppo_… the ratio is at
    most c."""
    tau_pos: float = key(1.0, above=0, idle_if="loss_mode!=sapo")
    """sapo: steepness of its soft clip where A > 0."""
    tau_neg: float = key(1.05, above=0, idle_if="loss_mode!=sapo")
    """The same where A ≤ 0."""
    policy_loss: PolicyLossConfig = key(PolicyLossConfig)
    loss_agg_mode: str = key(
        "token-mean",
        choices=LOSS_AGG_MODES,
        own=True,
        idle_if=("actor.use_grpopp=True", "actor.use_dr_grpo=True"),
    )
    """Loss aggregation (docs/methods.md), unless use_dr_grpo or use_grpopp chooses one. `delta-l`
    is that of use_grpopp; `dr-grpo` are the weights of use_dr_grpo alone. A function of your own:
    docs/your_own_method.md."""
    use_dr_grpo: bool = key("${algorithm.use_dr_grpo}", **FREE)
    """Follows algorithm.use_dr_grpo."""
    use_grpopp: bool = key("${algorithm.use_grpopp}", **FREE)
    """Follows algorithm.use_grpopp."""
    grpopp_config: GrpoppConfig = key(
        lambda: GrpoppConfig(*GRPOPP),
        **FREE,
        idle_if=NO_ALPHA,
    )
    regularizer_agg_mode: str | None = key(
        None, choices=("token-mean",), idle_if="use_kl_loss=False and entropy_coeff=0.0"
    )
    """Aggregation of KL loss and entropy bonus; null: that of the loss, the weights w_i.
    `token-mean`: a mean over all tokens of the optimizer step, as under use_grpopp and use_dr_grpo
    in the code of arXiv 2509.07558."""
    entropy_coeff: float = 0.0
    """Weight of the entropy bonus, which is subtracted from the loss."""
    use_kl_loss: bool = False
    """Add the divergence from the reference policy to the loss."""
    kl_loss_coef: float = key(0.001, low=0, idle_if="use_kl_loss=False")
    """Weight of that term."""
    kl_loss_type: str = key("low_var_kl", choices=KL_ESTIMATORS, idle_if="use_kl_loss=False")
    """Estimator of that term."""
    ulysses_sequence_parallel_size: int = key(1, **SIZE)
    """Ranks that split the sequences of a micro-batch (arXiv 2309.14509), which may hold so many
    times ppo_max_token_len_per_gpu. It divides the ranks and the attention heads."""
    optim: OptimConfig = key(OptimConfig, on_resume="warn")
    fsdp_config: FSDPConfig = key(FSDPConfig)
    checkpoint: CheckpointConfig = key(CheckpointConfig)


class RefConfig(Section):
    """`actor_rollout_ref.ref`: exists only when a KL term needs it."""

    log_prob_micro_batch_size_per_gpu: int | None = key(
        None, **SIZE, idle_if="ref.log_prob_use_dynamic_bsz=True"
    )
    """Responses of one forward pass; null: rollout.log_prob_micro_batch_size_per_gpu."""
    log_prob_use_dynamic_bsz: bool = key("${..rollout.log_prob_use_dynamic_bsz}", **FREE)
    """Follows rollout.log_prob_use_dynamic_bsz."""
    log_prob_max_token_len_per_gpu: int = key(
        "${..rollout.log_prob_max_token_len_per_gpu}",
        **SIZE,
        idle_if="ref.log_prob_use_dynamic_bsz=False",
    )
    """Follows rollout.log_prob_max_token_len_per_gpu."""
    ulysses_sequence_parallel_size: int = key(
        "${..actor.ulysses_sequence_parallel_size}",
        idle_if=("lora_rank!=0", "lora_adapter_path!=null"),
        **SIZE,
    )
    """Follows actor.ulysses_sequence_parallel_size."""
    fsdp_config: FSDPConfig = key(FSDPConfig, idle_if=("lora_rank!=0", "lora_adapter_path!=null"))


class ActorRolloutRefConfig(Section):
    """`actor_rollout_ref`."""

    model: ModelConfig = key(lambda: ModelConfig(tokenizer_path="${data.tokenizer}"))
    actor: ActorConfig = key(ActorConfig)
    ref: RefConfig = key(RefConfig, idle_if="use_kl_loss=False and use_kl_in_reward=False")
    rollout: RolloutConfig = key(RolloutConfig)
    nccl_timeout: int | None = key(None, low=1, **FREE)
    """Seconds that ranks wait for each other; null: PyTorch's own, 600 on GPUs and 1800 on CPUs."""

    @property
    def splits(self) -> tuple[int, int]:
        """Ranks that split sequences: of the actor, and of the reference, which under LoRA is the
        actor's own model."""
        actor, ref = (max(1, s.ulysses_sequence_parallel_size) for s in (self.actor, self.ref))
        return actor, actor if self.model.uses_lora else ref


class KLControlConfig(Section):
    """`algorithm.kl_ctrl`: the coefficient of the KL term in the reward."""

    type: str = key("fixed", choices=("fixed", "adaptive"))
    """`adaptive` steers the divergence towards target_kl (arXiv 1909.08593, section 2.2)."""
    kl_coef: float = key(0.001, low=0)
    """The coefficient, or its first value."""
    horizon: int = key(10000, low=1, idle_if="kl_ctrl.type=fixed")
    """Adaptive: larger is slower."""
    target_kl: float = key(0.1, above=0, idle_if="kl_ctrl.type=fixed")
    """Adaptive: divergence per token to steer towards, in nats."""


class GroupFilterConfig(Section):
    """`algorithm.filter_groups`: DAPO's dynamic sampling (arXiv 2503.14476, section 3.2)."""

    enable: bool = False
    """Drop prompts whose responses all have the same metric, and generate more."""
    metric: str | None = key(None, choices=("acc", "score", "seq_reward", "seq_final_reward"))
    """What must differ within a group."""
    max_num_gen_batches: int = 0
    """Generation rounds of a step, which then trains on whole mini-batches; 0 or less: no limit."""
    carry_over: bool = True
    """Prompts kept but not needed start the next step (docs/dapo.md). False: they are dropped."""


class FilterOverlongConfig(Section):
    """`algorithm.filter_overlong_response`."""

    enable: bool = False
    """Truncated responses get weight 0 and leave every denominator."""


class AlgorithmConfig(Section):
    """`algorithm`."""

    adv_estimator: str = key("grpo", choices=ADV_ESTIMATORS, own=True)
    """Advantage estimator (docs/methods.md). A function of your own: docs/your_own_method.md."""
    own_functions: list[str] = key(
        "${verl.own_functions:${.adv_estimator},${actor_rollout_ref.actor.loss_agg_mode},"
        "${actor_rollout_ref.actor.policy_loss.loss_mode}}"
    )
    """Follows the functions of your own: which they are, and how the SHA-256 of their files begin,
    so that a run doesn't resume with another text."""
    gamma: float = key(1.0, above=0, high=1, idle_if="adv_estimator!=gae")
    """gae: what a reward counts for one token earlier."""
    lam: float = key(1.0, low=0, high=1, idle_if="adv_estimator!=gae")
    """gae: its λ. 1: what followed minus the value; 0: what the next token's value says."""
    norm_adv_by_std_in_grpo: Any = key(
        True,
        choices=(True, False, "batch"),
        idle_if=(" and ".join(f"adv_estimator!={x}" for x in BY_STD), "use_dr_grpo=True"),
    )
    """grpo, grpo_passk, gdpo: divide by the standard deviation of the group's rewards. `batch`: by
    that of the whole batch's, as TRL's scale_rewards=batch."""
    gdpo_reward_keys: list[str] | None = key(None, idle_if="adv_estimator!=gdpo")
    """gdpo: the numbers that it normalizes one by one, of those that the reward function returns
    (`score` and `overlong_reward` included)."""
    gdpo_reward_weights: list[float] | None = key(None, idle_if="adv_estimator!=gdpo")
    """Weight of each of them; null: 1."""
    use_dr_grpo: bool = False
    """Dr. GRPO: weights 1/(N·M), advantages without the division (arXiv 2503.20783)."""
    use_grpopp: bool = False
    """∆L Normalization: weights ∝ L_i^(−α) (arXiv 2509.07558)."""
    grpopp_config: GrpoppConfig = key(GrpoppConfig, idle_if=NO_ALPHA)
    use_kl_in_reward: bool = False
    """Subtract the divergence from the reference policy from the reward."""
    kl_penalty: str = key("kl", choices=KL_ESTIMATORS, idle_if="use_kl_in_reward=False")
    """Estimator of that divergence."""
    kl_ctrl: KLControlConfig = key(KLControlConfig, idle_if="use_kl_in_reward=False")
    filter_groups: GroupFilterConfig = key(GroupFilterConfig, idle_if="filter_groups.enable=False")
    filter_overlong_response: FilterOverlongConfig = key(FilterOverlongConfig)
    rollout_correction: RolloutCorrectionConfig = key(RolloutCorrectionConfig)
    bypass_old_log_prob: bool = False
    """The engines' log-probabilities are the old ones. The actor computes none before the update,
    unless a rejection or rollout_is_batch_normalize needs them."""


class TrainerConfig(RunConfig):
    """`trainer`."""

    rollout_gpus_per_node: int | None = key(None, low=1)
    """GPUs of each machine for engines alone, beside n_gpus_per_node; null: they share those."""
    async_rollout: bool = key(False, on_resume="warn")
    """Draw the next step's batch while this one trains; needs rollout_gpus_per_node."""
    max_policy_age: int = key(0, low=0, on_resume="warn")
    """Generate continuously: a token's policy may be up to so many steps older than the one that is
    trained. Responses under way go on with new weights; with rollout_gpus_per_node, while a step
    trains. 0: each step waits for all its responses (docs/asynchronous.md)."""
    critic_warmup: int = key(0, low=0, idle_if="adv_estimator!=gae", on_resume="warn")
    """gae: the actor rests in the steps before this one, while its schedule goes on; 0: in none."""
    balance_batch: bool = True
    """Give every rank about the same number of tokens; False: the same number of responses."""
    val_before_train: bool = True
    """Validate before the first step of a new run."""
    val_only: bool = False
    """Validate (a resumed run, too) and stop. What that writes is in default_local_dir/val_only."""
    test_freq: int = key(-1, low=-1)
    """Validate every so many steps, and after the last; -1: never during training."""
    save_freq: int = key(-1, low=-1)
    """Write a checkpoint every so many steps, and after the last; -1: never."""
    resume_mode: str = key("auto", choices=("auto", "disable", "resume_path"))
    """`auto`: go on from the latest checkpoint in default_local_dir, if there is one, with the same
    method and data. `resume_path`: from any, and a warning names what has changed since."""
    resume_from_path: str | None = key(None, idle_if="resume_mode!=resume_path")
    """Checkpoint folder (`.../global_step_N`) for resume_mode=resume_path."""
    max_actor_ckpt_to_keep: int | None = key(None, low=0, idle_if="save_freq=-1")
    """Older checkpoints are deleted; null or 0: all are kept."""
    max_restarts: int = key(0, low=0)
    """Times that the run goes on by itself from its latest checkpoint after a worker died."""
    rollout_data_dir: str | None = None
    """Folder for the responses of each training step, {step}.parquet; null: they are not kept."""
    validation_data_dir: str | None = None
    """The same for those of each validation."""
    log_val_generations: int = key(
        0,
        low=0,
        idle_if=" and ".join(f"trainer.logger lacks {name}" for name in SHOW_GENERATIONS),
    )
    """Responses of each validation shown as val/generations, always to the same prompts."""
    save_hf_model: bool = True
    """Write the final model in Hugging Face format to default_local_dir/huggingface."""


class Config(Section):
    """All keys of `verl.trainer.main_ppo`."""

    data: DataConfig = key(DataConfig)
    actor_rollout_ref: ActorRolloutRefConfig = key(ActorRolloutRefConfig)
    critic: CriticConfig = key(CriticConfig, idle_if="adv_estimator!=gae")
    reward_model: RewardModelConfig = key(RewardModelConfig)
    custom_reward_function: CustomRewardConfig = key(CustomRewardConfig)
    algorithm: AlgorithmConfig = key(AlgorithmConfig)
    trainer: TrainerConfig = key(TrainerConfig, **FREE)
    ray_init: RayInitConfig = key(RayInitConfig, **FREE)
