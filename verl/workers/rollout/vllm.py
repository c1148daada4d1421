"""vLLM (https://docs.vllm.ai) as the generation engine.

Only an engine's process imports vLLM: it changes torch's settings, and the default process group.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from verl.models.hf import load_hf_config, stop_token_ids
from verl.protocol import Prompt, Sample
from verl.trainer.config.model_schema import ModelConfig
from verl.trainer.config.schema import RolloutConfig
from verl.utils.device import default_dtype, get_device, kv_cache_bytes
from verl.workers.rollout.base import RolloutEngine, SamplingParams


class VLLMEngine(RolloutEngine):
    """`actor_rollout_ref.rollout.name=vllm`: vLLM in this process, stepped by `generate`.

    With `tensor_model_parallel_size` above 1, vLLM's own workers hold the model.
    """

    continuous = True
    needs = "vllm"
    parallel = True

    def __init__(
        self, model: ModelConfig, rollout: RolloutConfig, device: str | None, max_model_len: int
    ) -> None:
        super().__init__(rollout)
        from vllm.config.weight_transfer import WeightTransferConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        from verl.workers.rollout.vllm_weights import BACKEND, register

        register()
        where = get_device(device)
        dtype = rollout.dtype or default_dtype(where)
        self.stop_ids = stop_token_ids(model)
        self.sleeps = rollout.free_cache_engine and current_platform.is_sleep_mode_available()
        self.asleep = False
        parallel = rollout.tensor_model_parallel_size
        arguments: dict[str, Any] = dict(
            model=str(Path(model.path).expanduser()),
            hf_overrides=dict(model.override_config),
            trust_remote_code=model.trust_remote_code,
            dtype=dtype,
            skip_tokenizer_init=True,
            generation_config="vllm",  # the sampling is all ours
            max_model_len=max_model_len,
            max_num_seqs=rollout.max_num_seqs,
            max_num_batched_tokens=rollout.max_num_batched_tokens,
            enable_chunked_prefill=rollout.enable_chunked_prefill,
            enable_prefix_caching=True,
            enforce_eager=rollout.enforce_eager,
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            kv_cache_memory_bytes=kv_cache_bytes(
                where, load_hf_config(model), dtype, max_model_len, rollout.max_num_seqs
            ),
            tensor_parallel_size=parallel,
            distributed_executor_backend="ray" if parallel > 1 else "uni",
            enable_sleep_mode=self.sleeps,
            logprobs_mode="processed_logprobs",
            weight_transfer_config=WeightTransferConfig(backend=BACKEND),
            seed=rollout.seed,
            disable_log_stats=True,
        )
        arguments |= rollout.engine_kwargs.vllm
        self.engine = LLMEngine.from_engine_args(EngineArgs(**arguments))

    @staticmethod
    def environment(rollout: RolloutConfig) -> dict[str, str]:
        """Variables that vLLM reads when it is imported."""
        variables = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in our process
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # engines would all bind to the same core
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
        }
        if rollout.enforce_eager:
            variables["TORCHDYNAMO_DISABLE"] = "1"  # else the first log-probabilities compile
        return variables

    @classmethod
    def check(cls, rollout: RolloutConfig) -> None:
        """Compares `engine_kwargs.vllm` with vLLM's engine arguments, without importing it."""
        spec = importlib.util.find_spec(cls.needs)
        source = Path(spec.origin).with_name("engine") / "arg_utils.py"
        classes = [
            n for n in ast.walk(ast.parse(source.read_text())) if isinstance(n, ast.ClassDef)
        ]
        body = next((c.body for c in classes if c.name == "EngineArgs"), [])
        known = [str(n.target.id) for n in body if isinstance(n, ast.AnnAssign)]
        for key in rollout.engine_kwargs.vllm if known else ():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"actor_rollout_ref.rollout.engine_kwargs.vllm.{key}: vLLM has no such engine "
                    f"argument; the nearest one is {near}"
                )

    def _generate(self, params: SamplingParams) -> Iterator[list[Sample]]:
        """See `RolloutEngine._generate`. At most `max_num_seqs` responses are drawn at a time;
        those of a prompt share its prefill through the prefix cache."""
        running: dict[str, tuple[str, Prompt, int, int]] = {}  # vLLM's own name comes first
        try:
            while not self.stopped:
                room = max(self.max_num_seqs - len(running), params.n if not running else 0)
                for prompt, group in self._take(room // params.n, wait=not running):
                    for draw in range(params.n):
                        name = f"{group}-{draw}"
                        request = self._request(name, prompt, group, draw, params)
                        running[name] = request, prompt, group, draw
                if not running:
                    return
                finished = [output for output in self.engine.step() if output.finished]
                if finished:
                    yield [self._sample(o, *running.pop(o.request_id)[1:]) for o in finished]
        finally:
            if running:
                self.engine.abort_request([request for request, *_ in running.values()], True)

    def _request(
        self, name: str, prompt: Prompt, group: int, draw: int, params: SamplingParams
    ) -> str:
        """Hands one response to vLLM, which draws it with a seed of its own."""
        import vllm
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        seed = np.random.SeedSequence([*params.seed, group, draw]).generate_state(1, np.uint64)
        sampling = vllm.SamplingParams(
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=max(params.top_k, 0),
            ignore_eos=params.ignore_eos,
            stop_token_ids=[] if params.ignore_eos else self.stop_ids,
            seed=int(seed[0] >> 1),  # what fits into an int64
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        return self.engine.add_request(name, tokens_input(prompt.token_ids.tolist()), sampling)

    def _sample(self, output: Any, prompt: Prompt, group: int, draw: int) -> Sample:
        response = output.outputs[0]
        tokens = np.array(response.token_ids, np.int64)
        log_probs = np.array(response.logprobs.logprobs, np.float32)
        assert len(tokens) == len(log_probs)
        ended = int(tokens[-1]) in self.stop_ids
        return Sample(
            prompt=prompt,
            group=group,
            draw=draw,
            response_ids=tokens,
            finish_reason="stop" if ended else "length",
            rollout_log_probs=log_probs,
        )

    def connect(self, rank: int, world_size: int, address: str) -> None:
        """Joins the group over which weights are broadcast, as rank `rank` of `world_size` (and the
        next `tensor_model_parallel_size` - 1)."""
        info = {"rank": rank, "world_size": world_size, "address": address}
        self._rpc("init_weight_transfer_engine", init_info=info)

    def start_update(self) -> None:
        """Wakes the memory of the weights up, and prepares vLLM for new ones."""
        if self.asleep:
            self.engine.wake_up(["weights"])
        self._rpc("start_weight_update")

    def load_weights(self, bucket: dict[str, Any]) -> None:
        """See `RolloutEngine.load_weights`."""
        self._rpc("update_weights", update_info=bucket)

    def finish_update(self, version: int) -> None:
        """Forgets what was computed with the old weights, and wakes the KV cache up."""
        self._rpc("finish_weight_update")
        if self.asleep:
            self.engine.wake_up(["kv_cache"])
            self.asleep = False
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM keeps its prefix cache: requests are running")
        super().finish_update(version)

    def sleep(self) -> None:
        """Frees the memory of weights and KV cache: the next weights are on their way."""
        if self.sleeps and not self.asleep:
            self.engine.sleep(level=2)
            self.asleep = True

    def _rpc(self, method: str, **arguments: Any) -> None:
        self.engine.collective_rpc(method, kwargs=arguments)
