"""`actor_rollout_ref.rollout`: how responses are generated."""

from typing import Any

from verl.config.base import FREE, SIZE, Section, key

VLLM = FREE | {"idle_if": "rollout.name=hf"}


class SamplingConfig(Section):
    """`rollout.val_kwargs`: sampling during validation."""

    n: int = key(8, low=1)
    """Responses per prompt."""
    do_sample: bool = True
    """False: greedy."""
    temperature: float = key(1.0, low=0)
    """Sampling temperature; 0 is greedy. The actor's probabilities are those at the rollout's."""
    top_p: float = key(1.0, high=1, above=0)
    """Sample from the smallest set of tokens with this probability mass."""
    top_k: int = key(-1, low=-1)
    """Sample from this many most probable tokens; -1 or 0: all."""


class EngineKwargs(Section):
    """`rollout.engine_kwargs`."""

    vllm: dict[str, Any] = key(dict)
    """Any of vLLM's engine arguments; these win over what the keys above say."""


class RolloutConfig(SamplingConfig):
    """`actor_rollout_ref.rollout`: the generation engines."""

    name: str = key("hf", choices=("hf", "vllm"), on_resume="warn")
    """Engine: vLLM, or `hf`: any Hugging Face causal model with this project's sampler."""
    ignore_eos: bool = False
    """Go on to the length limit after an end-of-sequence token."""
    seed: int = key(0, low=0)
    """Seed of the sampling."""
    dtype: str | None = key(None, choices=("float32", "bfloat16", "float16"), on_resume="warn")
    """Type of the engine's weights; null: bfloat16 on a GPU, float32 on a CPU."""
    max_num_seqs: int = key(1024, **SIZE)
    """Sequences that one engine holds at a time."""
    log_prob_micro_batch_size_per_gpu: int | None = key(
        None, **SIZE, idle_if="log_prob_use_dynamic_bsz=True"
    )
    """Responses of one forward pass that computes log-probabilities; null: the actor's."""
    log_prob_use_dynamic_bsz: bool = key("${..actor.use_dynamic_bsz}", **FREE)
    """Follows actor.use_dynamic_bsz."""
    log_prob_max_token_len_per_gpu: int = key(
        "${..actor.ppo_max_token_len_per_gpu}", **SIZE, idle_if="log_prob_use_dynamic_bsz=False"
    )
    """Follows actor.ppo_max_token_len_per_gpu."""
    max_model_len: int | None = key(None, low=1, **VLLM)
    """vLLM: longest sequence; null: max_prompt_length + max_response_length."""
    tensor_model_parallel_size: int = key(1, low=1, **VLLM)
    """vLLM: devices of one engine, of one machine or all of several."""
    gpu_memory_utilization: float = key(0.5, high=1, above=0, **VLLM)
    """vLLM: share of a GPU's memory for weights and KV cache. On a CPU the KV cache takes up to
    5 % of the memory, or what engine_kwargs.vllm.kv_cache_memory_bytes says."""
    max_num_batched_tokens: int = key(8192, low=1, **VLLM)
    """vLLM: tokens of one engine step."""
    enable_chunked_prefill: bool = key(True, **VLLM)
    """vLLM: split long prompts over engine steps."""
    enable_prefix_caching: bool = key(True, **VLLM)
    """vLLM: compute the beginnings that prompts share once."""
    enforce_eager: bool = key(True, **FREE)
    """False: vLLM makes CUDA graphs, and hf compiles its decoding step with torch.compile, which
    takes up to half a minute at the start and, on a CPU, needs a C++ compiler."""
    cudagraph_capture_sizes: list[int] | None = key(
        None, **FREE, idle_if=("rollout.name=hf", "enforce_eager=True")
    )
    """vLLM: numbers of tokens for which a CUDA graph is made; null: vLLM's own."""
    disable_log_stats: bool = key(True, **VLLM)
    """vLLM: don't log its speed and the use of its cache every ten seconds."""
    fp32_lm_head: bool = key(False, **VLLM)
    """vLLM: logits in float32, as the actor's are: slower, and nearer to the actor's."""
    free_cache_engine: bool = key(True, **VLLM)
    """vLLM: free the memory of weights and KV cache while the actor trains."""
    weight_transfer: str | None = key(None, choices=("host", "ipc", "nccl"), **FREE)
    """How engines get weights; null: host for hf and on CPUs, else ipc, or nccl between GPUs."""
    verify_weights: bool | None = key(None, **FREE)
    """Compare log-probabilities of each engine with the actor's. True: after each transfer, as
    rollout/verify_logprob_diff. null: at the start alone, and only vLLM's."""
    verify_weights_tolerance: float | None = key(
        None,
        above=0,
        **FREE,
        idle_if=("verify_weights=False", "verify_weights=null and rollout.name=hf"),
    )
    """Largest mean difference, in nats a token; more is an error at start and a warning later.
    null: 0.05, or 1e-3 where engines and actor compute in float32."""
    engine_kwargs: EngineKwargs = key(EngineKwargs, on_resume="warn", idle_if="rollout.name=hf")
    val_kwargs: SamplingConfig = key(
        lambda: SamplingConfig(n=1, do_sample=False, temperature=0.0), on_resume="validation"
    )
