"""Every configuration key: its type, its default, its unit, and what it does.

The names are verl's. YAML files beside this one only select other defaults.
`verl.trainer.config.load_config` turns YAML and command-line overrides into a read-only `Config`
and rejects what can't be.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from verl.trainer.config.model_schema import FSDPConfig, ModelConfig, OptimConfig
from verl.trainer.config.section import Section, number, one_of

LOSS_AGG_MODES = (
    "token-mean",
    "token-mean-legacy",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)
KL_ESTIMATORS = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")


@dataclass
class DataConfig(Section):
    """`data`: parquet files with the columns prompt, data_source, reward_model, extra_info."""

    train_files: Any = "~/data/countdown_nochat/train.parquet"
    """Training parquet: a path or a list of paths."""
    val_files: Any = "~/data/countdown_nochat/test.parquet"
    """Validation parquet: a path or a list of paths; null if nothing is validated."""
    tokenizer: str | None = None
    """Tokenizer path; null: the model's."""
    prompt_key: str = "prompt"
    """Column with the prompt: a string (apply_chat_template=False) or a list of chat messages."""
    reward_fn_key: str = "data_source"
    """Column that chooses the reward function."""
    apply_chat_template: bool = True
    """Render chat messages with the tokenizer's template; False: prompts are plain strings."""
    max_prompt_length: int = number(512, 1)
    """Longest prompt, in tokens."""
    max_response_length: int = number(512, 1)
    """Longest response, in tokens: the constant M of the loss aggregation."""
    train_batch_size: int = number(1024, 1)
    """Prompts of one training step."""
    gen_batch_size: int = number(1024, 1)
    """Prompts of one generation round of algorithm.filter_groups."""
    val_batch_size: int | None = number(None, 1)
    """Prompts of one validation round; null: all at once."""
    shuffle: bool = True
    """Shuffle the training prompts anew in each epoch."""
    seed: int = number(1, 0)
    """Seed of the order of the training prompts."""
    filter_overlong_prompts: bool = False
    """Drop prompts longer than max_prompt_length."""
    truncation: str = one_of("error", "error", "left", "right")
    """For longer prompts: stop with an error, or cut tokens off the left or the right."""


@dataclass
class GrpoppConfig(Section):
    """`grpopp_config`: ∆L Normalization (arXiv 2509.07558)."""

    alpha: float = number(0.75, 0)
    """Exponent α: w_i ∝ L_i^(−α). 0 is Dr. GRPO Norm."""
    scope: str = one_of("batch", "batch", "mini_batch")
    """Lengths over which L_i^(−α) is averaged: the rollout batch (published code) or the
    mini-batch of the optimizer step (paper)."""


@dataclass
class ActorConfig(Section):
    """`actor_rollout_ref.actor`."""

    strategy: str = one_of("fsdp2", "fsdp2", "fsdp")
    """Both names mean FSDP2."""
    ppo_mini_batch_size: int = number(256, 1)
    """Prompts of one optimizer step (times rollout.n responses). Must divide train_batch_size."""
    ppo_micro_batch_size_per_gpu: int | None = number(None, 1)
    """Responses of one forward/backward pass on a rank; null: use_dynamic_bsz must be on."""
    use_dynamic_bsz: bool = False
    """Micro-batches by token budget instead of by count."""
    ppo_max_token_len_per_gpu: int = number(16384, 1)
    """Token budget (prompts and responses) of a micro-batch with use_dynamic_bsz."""
    ppo_epochs: int = number(1, 1)
    """Passes over the train batch in each step."""
    shuffle: bool = False
    """Draw the mini-batches in random order."""
    grad_clip: float = number(1.0, 0)
    """Largest norm of the gradient."""
    clip_ratio: float = number(0.2, 0)
    """PPO's ε, where clip_ratio_low or clip_ratio_high is null."""
    clip_ratio_low: float | None = number(None, 0)
    """The ratio is clipped at 1 − clip_ratio_low."""
    clip_ratio_high: float | None = number(None, 0)
    """The ratio is clipped at 1 + clip_ratio_high."""
    clip_ratio_c: float = number(3.0, 1)
    """Dual clip: with a negative advantage A the loss is at most −c·A."""
    loss_agg_mode: str = one_of("token-mean", *LOSS_AGG_MODES)
    """Loss aggregation, unless use_dr_grpo or use_grpopp chooses one."""
    use_dr_grpo: bool = False
    """Follows algorithm.use_dr_grpo."""
    use_grpopp: bool = False
    """Follows algorithm.use_grpopp."""
    grpopp_config: GrpoppConfig = field(default_factory=GrpoppConfig)
    """Follows algorithm.grpopp_config."""
    entropy_coeff: float = number(0.0)
    """Weight of the entropy bonus, which is subtracted from the loss."""
    use_kl_loss: bool = False
    """Add the divergence from the reference policy to the loss."""
    kl_loss_coef: float = number(0.001, 0)
    """Weight of that term."""
    kl_loss_type: str = one_of("low_var_kl", *KL_ESTIMATORS)
    """Estimator of that term."""
    ulysses_sequence_parallel_size: int = number(1, 1, 1)
    """Sequence parallelism; only 1 (none) is supported."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    fsdp_config: FSDPConfig = field(default_factory=FSDPConfig)


@dataclass
class RefConfig(Section):
    """`actor_rollout_ref.ref`: exists only when a KL term needs it."""

    log_prob_micro_batch_size_per_gpu: int | None = number(None, 1)
    """Responses of one forward pass; null: rollout.log_prob_micro_batch_size_per_gpu."""
    ulysses_sequence_parallel_size: int = number(1, 1, 1)
    """Sequence parallelism; only 1 (none) is supported."""
    fsdp_config: FSDPConfig = field(default_factory=FSDPConfig)


@dataclass
class ValKwargs(Section):
    """`rollout.val_kwargs`: sampling during validation."""

    n: int = number(1, 1)
    """Responses per prompt."""
    do_sample: bool = False
    """False: greedy."""
    temperature: float = number(0.0, 0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = number(1.0, high=1, above=0)
    """Sample from the smallest set of tokens with this probability mass."""
    top_k: int = number(-1, -1)
    """Sample from this many most probable tokens; -1 or 0: all."""


@dataclass
class EngineKwargs(Section):
    """`rollout.engine_kwargs`."""

    vllm: dict[str, Any] = field(default_factory=dict)
    """Any of vLLM's engine arguments; these win over what the keys above say."""


@dataclass
class RolloutConfig(Section):
    """`actor_rollout_ref.rollout`: the generation engines."""

    name: str = one_of("hf", "hf", "vllm")
    """Engine: vLLM, or `hf`: any Hugging Face causal model with this project's sampler."""
    n: int = number(1, 1)
    """Responses per prompt."""
    do_sample: bool = True
    """False: greedy."""
    temperature: float = number(1.0, 0)
    """Sampling temperature; the policy that is trained is the one at this temperature."""
    top_p: float = number(1.0, high=1, above=0)
    """Sample from the smallest set of tokens with this probability mass."""
    top_k: int = number(-1, -1)
    """Sample from this many most probable tokens; -1 or 0: all."""
    ignore_eos: bool = False
    """Go on to the length limit after an end-of-sequence token."""
    seed: int = number(0, 0)
    """Seed of the sampling."""
    dtype: str | None = one_of(None, "float32", "bfloat16", "float16")
    """Type of the engine's weights; null: bfloat16 on a GPU, float32 on a CPU."""
    max_num_seqs: int = number(1024, 1)
    """Sequences that one engine holds at a time."""
    log_prob_micro_batch_size_per_gpu: int | None = number(None, 1)
    """Responses of one forward pass that computes log-probabilities; null: the actor's."""
    log_prob_use_dynamic_bsz: bool = False
    """Follows actor.use_dynamic_bsz."""
    log_prob_max_token_len_per_gpu: int = number(16384, 1)
    """Follows actor.ppo_max_token_len_per_gpu."""
    tensor_model_parallel_size: int = number(1, 1)
    """vLLM: devices of one engine."""
    gpu_memory_utilization: float = number(0.5, high=1, above=0)
    """vLLM: share of a GPU's memory for weights and KV cache. On a CPU the KV cache takes up to
    5 % of the memory, or what engine_kwargs.vllm.kv_cache_memory_bytes says."""
    max_num_batched_tokens: int = number(8192, 1)
    """vLLM: tokens of one engine step."""
    enable_chunked_prefill: bool = True
    """vLLM: split long prompts over engine steps."""
    enforce_eager: bool = True
    """vLLM: no CUDA graphs."""
    free_cache_engine: bool = True
    """vLLM: free the memory of weights and KV cache while the actor trains."""
    weight_transfer: str | None = one_of(None, "host", "ipc", "nccl")
    """How new weights reach the engines (`verl.workers.weight_sync`); null: host for hf and on
    CPUs, else ipc for colocated engines and nccl for those on GPUs of their own."""
    verify_weights: bool = False
    """After each transfer every engine draws a few tokens, and their log-probabilities are compared
    with the actor's: rollout/verify_logprob_diff."""
    verify_weights_tolerance: float = number(0.05, above=0)
    """Largest mean difference, in nats a token; more is an error at start and a warning later."""
    engine_kwargs: EngineKwargs = field(default_factory=EngineKwargs)
    val_kwargs: ValKwargs = field(default_factory=ValKwargs)


@dataclass
class ActorRolloutRefConfig(Section):
    """`actor_rollout_ref`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    ref: RefConfig = field(default_factory=RefConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)


@dataclass
class CriticOptimConfig(Section):
    """`critic.optim`."""

    lr: float = number(1e-5, 0)
    """No estimator here has a critic: accepted, without effect."""


@dataclass
class CriticConfig(Section):
    """`critic`."""

    optim: CriticOptimConfig = field(default_factory=CriticOptimConfig)


@dataclass
class OverlongBufferConfig(Section):
    """`reward_model.overlong_buffer`: soft overlong punishment (arXiv 2503.14476, eq. 13)."""

    enable: bool = False
    """Punish long responses (reward_manager=dapo)."""
    len: int = number(0, 0)
    """Length of the ramp in tokens, which ends at max_response_length."""
    penalty_factor: float = number(0.0, 0)
    """Punishment at the end of the ramp."""
    log: bool = False
    """Report the mean punishment as reward/overlong_reward."""


@dataclass
class MathServerConfig(Section):
    """`reward_model.math_server`: the LaTeX server (`server/math`), which math data sources ask."""

    url: str | None = None
    """null: MATH_SERVER_URL of the environment, else http://127.0.0.1:6284."""
    autostart: bool = False
    """Start the server, in its own environment, where none answers at `url`, and again should it
    end in mid-run; stop it at the end."""
    max_wait_s: float = number(600.0, above=0)
    """Seconds to wait for a server that went away; then the run stops, with a checkpoint."""
    max_answer_length: int = number(30, 0)
    """Characters; a longer answer is wrong unless it is identical to the reference."""
    batch_size: int = number(64, 1, 2048)
    """Pairs of one request, at most; the server takes 2,048 unless it is told otherwise."""
    max_connections: int = number(8, 1)
    """Requests that are under way at the same time."""


@dataclass
class RewardModelConfig(Section):
    """`reward_model`."""

    enable: bool = False
    """Rewards are functions here; a model that scores responses is not supported."""
    reward_manager: str = one_of("naive", "naive", "dapo")
    """`dapo` adds the overlong punishment to the score."""
    num_workers: int = number(8, 1)
    """Calls of a custom reward function at the same time, in threads (or, if it is `async`, as
    tasks of one thread)."""
    overlong_buffer: OverlongBufferConfig = field(default_factory=OverlongBufferConfig)
    math_server: MathServerConfig = field(default_factory=MathServerConfig)


@dataclass
class CustomRewardConfig(Section):
    """`custom_reward_function`: `fn(data_source, solution_str, ground_truth, extra_info)`."""

    path: str | None = None
    """Python file; null: `verl.rewards.compute_score`."""
    name: str = "compute_score"
    """Function in that file; returns a number, or a dict with `score`."""
    timeout_s: float = number(300.0, above=0)
    """Longest time of one call, in seconds; then the run stops, with a checkpoint (after twice that
    time, without one, if the function holds Python's global lock)."""


@dataclass
class KLControlConfig(Section):
    """`algorithm.kl_ctrl`: the coefficient of the KL term in the reward."""

    type: str = one_of("fixed", "fixed", "adaptive")
    """`adaptive` steers the divergence towards target_kl (arXiv 1909.08593, section 2.2)."""
    kl_coef: float = number(0.001, 0)
    """The coefficient, or its first value."""
    horizon: int = number(10000, 1)
    """Adaptive: larger is slower."""
    target_kl: float = number(0.1, 0)
    """Adaptive: divergence per token to steer towards, in nats."""


@dataclass
class FilterGroupsConfig(Section):
    """`algorithm.filter_groups`: DAPO's dynamic sampling (arXiv 2503.14476, section 3.2)."""

    enable: bool = False
    """Drop prompts whose responses all have the same metric, and generate more."""
    metric: str | None = one_of(None, "acc", "score", "seq_reward", "seq_final_reward")
    """What must differ within a group."""
    max_num_gen_batches: int = number(0, None)
    """Rounds of generation for one training step, which then trains on the whole mini-batches that
    it has; 0 or less: no limit."""
    carry_over: bool = True
    """Prompts that were kept but not needed start the next step, with the log-probabilities of
    the policy that drew them as the old ones; never later than that. False: they are dropped."""


@dataclass
class FilterOverlongConfig(Section):
    """`algorithm.filter_overlong_response`."""

    enable: bool = False
    """Truncated responses get weight 0 and leave every denominator."""


@dataclass
class RolloutCorrectionConfig(Section):
    """`algorithm.rollout_correction`: the engines' log-probabilities are not quite the actor's."""

    rollout_is: str | None = one_of(None, "token", "sequence")
    """Truncated importance sampling: the loss of a token is multiplied by π_old/π_rollout of the
    token or of its whole response."""
    rollout_is_threshold: float = number(2.0, above=0)
    """The factor is at most this."""


@dataclass
class AlgorithmConfig(Section):
    """`algorithm`."""

    adv_estimator: str = one_of("grpo", "grpo", "rloo", "reinforce_plus_plus_baseline")
    """Advantage estimator."""
    norm_adv_by_std_in_grpo: bool = True
    """grpo: divide by the group's standard deviation (use_dr_grpo never does)."""
    use_dr_grpo: bool = False
    """Dr. GRPO: weights 1/(N·M), advantages without the division (arXiv 2503.20783)."""
    use_grpopp: bool = False
    """∆L Normalization: weights ∝ L_i^(−α) (arXiv 2509.07558)."""
    grpopp_config: GrpoppConfig = field(default_factory=GrpoppConfig)
    use_kl_in_reward: bool = False
    """Subtract the divergence from the reference policy from the reward."""
    kl_penalty: str = one_of("kl", *KL_ESTIMATORS)
    """Estimator of that divergence."""
    kl_ctrl: KLControlConfig = field(default_factory=KLControlConfig)
    filter_groups: FilterGroupsConfig = field(default_factory=FilterGroupsConfig)
    filter_overlong_response: FilterOverlongConfig = field(default_factory=FilterOverlongConfig)
    rollout_correction: RolloutCorrectionConfig = field(default_factory=RolloutCorrectionConfig)
    bypass_old_log_prob: bool = False
    """The engines' log-probabilities are the old ones: the actor doesn't compute them."""


@dataclass
class RunConfig(Section):
    """What the `trainer` sections of RL and of the supervised warm-up share."""

    total_training_steps: int | None = number(None, 1)
    """Training steps; null: total_epochs decides."""
    nnodes: int = number(1, 1)
    """Machines."""
    n_gpus_per_node: int = number(8, 1)
    """GPUs of each machine; where there is no GPU, ranks and engines of each machine."""
    device: str | None = one_of(None, "cuda", "cpu")
    """null: cuda where there is a GPU, else cpu."""
    max_skipped_steps: int = number(3, 1)
    """Optimizer steps in a row whose loss or gradient is not finite, all of them left out, after
    which the run stops and writes their batch to a file."""
    default_local_dir: str = "checkpoints/${trainer.project_name}/${trainer.experiment_name}"
    """The run's folder: metrics.jsonl, checkpoints, the resolved configuration. With several nodes
    on a file system that all of them see."""


@dataclass
class TrainerConfig(RunConfig):
    """`trainer`."""

    total_epochs: int = number(30, 1)
    """Passes over the training prompts. With filter_groups this counts one generation round per
    step; the prompts are passed more often (more rounds) or less (what is carried over)."""
    project_name: str = "verl_examples"
    """Project in wandb, and first part of default_local_dir."""
    experiment_name: str = "gsm8k"
    """Run in wandb, and second part of default_local_dir."""
    logger: Any = field(default_factory=lambda: ["console", "wandb"])
    """Any of console, wandb, tensorboard, file. metrics.jsonl is always written."""
    rollout_gpus_per_node: int | None = number(None, 1)
    """GPUs of each machine for engines alone, beside n_gpus_per_node for the actor; null: engines
    share the actor's."""
    async_rollout: bool = False
    """Draw the next step's batch while this one trains; needs rollout_gpus_per_node."""
    balance_batch: bool = True
    """Give every rank about the same number of tokens; False: the same number of responses."""
    val_before_train: bool = True
    """Validate before the first step of a new run."""
    val_only: bool = False
    """Validate (a resumed run, too) and stop."""
    test_freq: int = number(-1, -1)
    """Validate every so many steps, and after the last; -1: never during training."""
    save_freq: int = number(-1, -1)
    """Write a checkpoint every so many steps, and after the last; -1: never."""
    resume_mode: str = one_of("auto", "auto", "disable", "resume_path")
    """`auto`: go on from the latest checkpoint in default_local_dir, if there is one, with the same
    method and data. `resume_path`: from any, and a warning names what has changed since."""
    resume_from_path: str | None = None
    """Checkpoint folder (`.../global_step_N`) for resume_mode=resume_path."""
    max_actor_ckpt_to_keep: int | None = number(None, 1)
    """Older checkpoints are deleted; null: all are kept."""
    max_restarts: int = number(0, 0)
    """Times that the run goes on by itself from its latest checkpoint after a worker died."""
    rollout_data_dir: str | None = None
    """Folder for the responses of each training step, {step}.parquet; null: they are not kept."""
    validation_data_dir: str | None = None
    """The same for those of each validation."""
    log_val_generations: int = number(0, 0)
    """Responses of each validation, always to the same prompts, that wandb and tensorboard show as
    val/generations."""
    save_hf_model: bool = True
    """Write the final model in Hugging Face format to default_local_dir/huggingface."""
    default_hdfs_dir: str | None = None
    """Only null is supported: checkpoints go to default_local_dir."""
    critic_warmup: int = number(0, 0)
    """No estimator here has a critic: accepted, without effect."""


@dataclass
class RayInitConfig(Section):
    """`ray_init`."""

    num_cpus: int | None = number(None, 1)
    """CPUs that a Ray started here offers; null: as many as are needed. Unused with RAY_ADDRESS."""


@dataclass
class Config(Section):
    """All keys of `verl.trainer.main_ppo`."""

    data: DataConfig = field(default_factory=DataConfig)
    actor_rollout_ref: ActorRolloutRefConfig = field(default_factory=ActorRolloutRefConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    custom_reward_function: CustomRewardConfig = field(default_factory=CustomRewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    ray_init: RayInitConfig = field(default_factory=RayInitConfig)


@dataclass(frozen=True, slots=True)
class LossAggregation:
    """The aggregation flags, resolved once at start: all that the maths sees of them.

    Example: ``LossAggregation(mode="delta-l", alpha=0.75, max_response_length=8192)``
    """

    mode: str
    """A key of `verl.trainer.ppo.core_algos.WEIGHTS`."""
    max_response_length: int
    """M, in tokens."""
    alpha: float = 0.0
    """Exponent of ∆L, also where ∆L is only compared with."""
    scope: str = "batch"
    """Lengths over which ∆L averages L_i^(−α): `batch` (rollout batch) or `mini_batch`."""
    norm_by_std: bool = True
    """Whether grpo's advantages are divided by the group's standard deviation."""
    group_size: int | None = None
    """Responses per micro-batch of token-mean-legacy."""


def resolve_aggregation(config: Config) -> LossAggregation:
    """Turns loss_agg_mode, use_dr_grpo, use_grpopp and grpopp_config into one value object."""
    algorithm, actor = config.algorithm, config.actor_rollout_ref.actor
    mode = actor.loss_agg_mode
    if algorithm.use_grpopp:
        mode = "delta-l"
    elif algorithm.use_dr_grpo:
        mode = "dr-grpo"
    return LossAggregation(
        mode=mode,
        max_response_length=config.data.max_response_length,
        alpha=algorithm.grpopp_config.alpha,
        scope=algorithm.grpopp_config.scope,
        norm_by_std=algorithm.norm_adv_by_std_in_grpo and not algorithm.use_dr_grpo,
        group_size=actor.ppo_micro_batch_size_per_gpu if mode == "token-mean-legacy" else None,
    )
