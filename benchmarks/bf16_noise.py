"""How far apart two correct bfloat16 computations of a log-probability are.

    .venv/bin/python benchmarks/bf16_noise.py

* the check of the start (`Workers.verify_engines`): a random Qwen2 draws tokens with a KV cache, as
  an engine does, and computes them again in one pass, as the actor does. How often does the mean
  over k tokens exceed 0.05 nats in one of eight engines, none of which is wrong?
* the head: what rounding logits to bfloat16 alone does, for 151,936 words
"""

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Qwen2Config, Qwen2ForCausalLM

TOLERANCE, ENGINES, STARTS = 0.05, 8, 500
RESPONSES, LENGTH, PROMPT = 48, 96, 8
PART = 16  # tokens of a response that the check looks at


@torch.no_grad()
def differences(spread: float) -> NDArray[np.float32]:
    """|Δ log p| of each token, [RESPONSES, LENGTH], of a model whose weights have this standard
    deviation."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        initializer_range=spread,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config).eval()
    model.lm_head.weight.mul_(3)  # an entropy as low as a trained model's
    model = model.bfloat16()
    ids = torch.randint(config.vocab_size, (RESPONSES, PROMPT))
    drawn, cache, step = [], None, ids
    for _ in range(LENGTH):
        output = model(step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        log_probs = output.logits[:, -1].float().log_softmax(-1)
        step = torch.multinomial(log_probs.exp(), 1)
        drawn.append(log_probs.gather(1, step))
        ids = torch.cat([ids, step], 1)
    again = model(ids[:, :-1]).logits[:, PROMPT - 1 :].float().log_softmax(-1)
    chosen = again.gather(2, ids[:, PROMPT:, None])[..., 0]
    return (torch.cat(drawn, 1) - chosen).abs().numpy()


def stopped(noise: NDArray[np.float32], tokens: int) -> float:
    """Share of starts in which a mean over `tokens` of one of the engines is over the tolerance."""
    rng, means = np.random.default_rng(0), []
    part = min(tokens, PART)
    for _ in range(ENGINES * STARTS):
        rows = rng.integers(0, RESPONSES, max(1, tokens // PART))
        first = rng.integers(0, LENGTH - PART)
        means.append(noise[rows, first : first + part].mean())
    return float((np.reshape(means, (STARTS, ENGINES)).max(1) > TOLERANCE).mean())


def print_starts() -> None:
    """A row for each mean difference that a model may have."""
    counts = (8, 32, 64, 128)
    print("| mean difference |", *(f"{k} tokens |" for k in counts))
    print("|---:|" + "---:|" * len(counts))
    noise = differences(0.03)
    for mean in (0.02, 0.03, 0.035):
        scaled = noise / noise.mean() * mean
        print(f"| {mean} |", *(f"{stopped(scaled, k):.1%} |" for k in counts))


def print_head() -> None:
    """What bfloat16 logits move, over the entropy of the distribution."""
    print("\n| entropy, nats | largest logit | mean difference | largest |\n|---:|---:|---:|---:|")
    for spread in (0.05, 0.08, 0.12):
        torch.manual_seed(0)
        weight = (torch.randn(151_936, 2048) * spread).bfloat16()
        hidden = torch.randn(256, 2048).bfloat16()
        exact = hidden.float() @ weight.float().T
        p, q = exact.log_softmax(-1), (hidden @ weight.T).float().log_softmax(-1)
        tokens = torch.multinomial(p.exp(), 1)
        moved = (p.gather(1, tokens) - q.gather(1, tokens)).abs()
        entropy = -(p.exp() * p).sum(-1).mean()
        print(f"| {entropy:.1f} | {exact.max():.0f} | {moved.mean():.3f} | {moved.max():.3f} |")


if __name__ == "__main__":
    print_starts()
    print_head()
