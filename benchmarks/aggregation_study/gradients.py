"""How noisy the gradient of a training step is under each aggregation, measured on a fixed policy.

Many independent batches are drawn from one policy. Of every response the gradient of
Σ_t log π(a_t), h_i, is computed on its own; a method's gradient of a batch is then the sum
Σ_i w_i A_i h_i, for all methods from the same responses.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from tqdm import tqdm

from verl.algorithms.advantages import advantages
from verl.algorithms.weights import response_weights
from verl.config.schema import Config
from verl.data.dataset import load_prompts
from verl.models.hf import load_hf_model, load_tokenizer
from verl.models.logprobs import PolicyModel
from verl.models.packing import pack
from verl.protocol import Sample, response_lengths
from verl.rewards.scorer import RewardManager
from verl.rollout.engine import SamplingParams
from verl.rollout.hf import HFEngine


@dataclass(frozen=True)
class Method:
    """One aggregation: how it is named, weighed and asked for."""

    name: str
    mode: str
    """A key of `verl.algorithms.weights.WEIGHTS`."""
    script: tuple[str, ...]
    """Arguments of the quick start."""
    alpha: float = 0.0
    norm_by_std: bool = True


METHODS = (
    Method("GRPO Norm", "seq-mean-token-mean", ("--method", "grpo-norm")),
    Method("DAPO Norm", "token-mean", ("--method", "dapo-norm")),
    Method("Dr. GRPO", "dr-grpo", ("--method", "dr-grpo"), norm_by_std=False),
    Method("Dr. GRPO Norm", "dr-grpo", ("--method", "dr-grpo-norm")),
    *(
        Method(
            f"∆L {alpha:g}", "delta-l", ("--method", "delta-l-norm", "--alpha", f"{alpha:g}"), alpha
        )
        for alpha in (0.5, 0.75, 1.0)
    ),
)


@dataclass
class Measurement:
    """What one policy's batches showed. K batches of N responses, M methods."""

    grams: NDArray[np.float64]
    """Inner products of the batches' gradients, [M, K, K]."""
    predicted: NDArray[np.float64]
    """sqrt(Σ w_i² L_i) / Σ w_i of each batch, [M, K]."""
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Of the responses with an advantage, in tokens, [R]."""
    squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """‖h_i‖² of those responses, [R]."""
    batches: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Which batch each of those responses is from, [R]."""

    def save(self, path: Path) -> None:
        """Writes an npz file; aside first, so that a file is a whole one."""
        aside = path.with_suffix(".tmp.npz")
        np.savez_compressed(aside, **vars(self))
        aside.rename(path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """The inverse of `save`."""
        with np.load(path) as arrays:
            return cls(**arrays)


def batch_gradients(
    policy: PolicyModel, samples: list[Sample], max_response_length: int
) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[np.float64]]:
    """The gradient of each method's loss on one batch, of which every response is new (π = π_old).

    Returns: gradients float32 [M, P]; predicted coefficients of variation, [M]; ‖h_i‖² of each
    response, [N], NaN where no method gives it an advantage.
    """
    lengths = response_lengths(samples)
    coefficients, predicted = [], []
    for method in METHODS:
        w = response_weights(lengths, method.mode, max_response_length, method.alpha).numpy()
        rewards, groups = [s.reward for s in samples], [s.group for s in samples]
        a = advantages(rewards, groups, lengths, "grpo", method.norm_by_std).numpy()
        coefficients.append(w * a)
        predicted.append(np.sqrt(w**2 @ lengths) / w.sum())
    C = np.array(coefficients, np.float32)  # [M, N]
    parameters = list(policy.parameters())
    size = sum(p.numel() for p in parameters)
    gradients, squares = np.zeros((len(METHODS), size), np.float32), np.full(len(samples), np.nan)
    for i, sample in enumerate(samples):
        if not C[:, i].any():
            continue
        batch = pack([sample], torch.device("cpu"), remove_padding=False)
        log_probs, _ = policy(batch, 1.0)
        parts = torch.autograd.grad(-log_probs.sum(), parameters)
        h = torch.cat([part.flatten() for part in parts]).numpy()
        squares[i] = float(h.astype(np.float64) @ h)
        gradients += C[:, i, None] * h
    return gradients, np.array(predicted), squares


def measure(config_yaml: str, model_path: str, batches: int, seed: int, name: str) -> Measurement:
    """Draws `batches` train batches from the policy at `model_path`, with the data and the sampling
    of a resolved configuration (YAML text), and measures each."""
    torch.set_num_threads(1)
    node = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(config_yaml))
    node.actor_rollout_ref.model.path = model_path
    config: Config = OmegaConf.to_object(node)  # type: ignore[assignment]
    data, model = config.data, config.actor_rollout_ref.model
    rollout = config.actor_rollout_ref.rollout
    tokenizer = load_tokenizer(model)
    prompts = load_prompts(data.train_files, data, tokenizer)
    longest = data.max_prompt_length + data.max_response_length
    engine = HFEngine()
    engine.build(model, rollout, "cpu", longest)
    policy = PolicyModel(load_hf_model(model, torch.float32))
    rewards = RewardManager(config, tokenizer)

    def draw(number: int) -> list[Sample]:
        rng = np.random.default_rng([seed, number])
        chosen = rng.choice(len(prompts), data.train_batch_size, replace=False)
        params = SamplingParams(
            rollout.n, data.max_response_length, rollout.temperature, seed=(seed, 3, number)
        )
        work = [prompts[i] for i in chosen]
        samples = engine.generate_all(work, range(len(work)), params)
        rewards.submit(samples).result()
        return sorted(samples, key=lambda s: (s.group, s.response_index))

    def rows() -> Iterator[tuple[Any, ...]]:
        for k in tqdm(range(batches), desc=name, mininterval=5):
            samples = draw(k)
            gradients, predicted, squares = batch_gradients(
                policy, samples, data.max_response_length
            )
            used = ~np.isnan(squares)
            lengths = response_lengths(samples)[used]
            yield gradients, predicted, lengths, squares[used], np.full(used.sum(), k)

    columns = list(zip(*rows(), strict=True))
    rewards.close()
    g = np.stack(columns[0], 1).astype(np.float64)  # [M, K, P]
    return Measurement(
        np.einsum("mkp,mlp->mkl", g, g, optimize=True),
        np.stack(columns[1], 1),
        *map(np.concatenate, columns[2:]),
    )
