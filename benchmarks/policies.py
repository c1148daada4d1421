"""Random policies whose responses end by chance, and so differ in length."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

# Not Qwen2: next to one, AutoTokenizer replaces any tokenizer by Qwen2's byte-level one.
SIZES: dict[str, dict[str, Any]] = {
    "0.2M": dict(kind="Qwen3", vocab=120, hidden=96, layers=2, heads=3, kv_heads=3, ffn=256),
    "2M": dict(kind="Qwen3", vocab=120, hidden=192, layers=4, heads=6, kv_heads=6, ffn=512),
    "10M": dict(kind="Qwen3", vocab=512, hidden=384, layers=6, heads=6, kv_heads=2, ffn=1024),
    "SmolLM2-135M": dict(
        kind="Llama", vocab=49152, hidden=576, layers=30, heads=9, kv_heads=3, ffn=1536
    ),
}
EOS, PAD = 0, 1


def make_policy(folder: Path, size: str, mean_length: float) -> Path:
    """Saves a model of `SIZES` with random weights and its tokenizer. At each token a response ends
    by chance, so that `mean_length` tokens are expected if there is no limit."""
    s = SIZES[size]
    torch.manual_seed(0)
    config = getattr(transformers, f"{s['kind']}Config")(
        vocab_size=s["vocab"],
        hidden_size=s["hidden"],
        intermediate_size=s["ffn"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["kv_heads"],
        head_dim=s["hidden"] // s["heads"],
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    _set_mean_length(model, mean_length)
    model.save_pretrained(folder)
    save_tokenizer(folder, s["vocab"])
    return folder


def save_tokenizer(folder: Path, size: int) -> None:
    """Saves one of `size` words."""
    words = {"<eos>": EOS, "<pad>": PAD, "<unk>": 2} | {f"t{i}": i for i in range(3, size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)


@torch.no_grad()
def _set_mean_length(model: Any, wanted: float) -> None:
    """Gives all embeddings the same value in one dimension that no layer adds to, and the end token
    more of it: the head shares the embeddings, so that this adds to its logit alone."""
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0
    embedding = model.get_input_embeddings().weight
    embedding[:, 0] = 1
    hidden = model.model(torch.randint(3, len(embedding), (16, 64))).last_hidden_state
    logits = model.lm_head(hidden)
    low, high = -10.0, 10.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        logits[..., EOS] = hidden @ embedding[EOS] + middle * hidden[..., 0]
        length = (1 / logits.softmax(-1)[..., EOS]).mean()
        low, high = (low, middle) if length < wanted else (middle, high)
    embedding[EOS, 0] += high


def make_token_prompts(size: str, count: int, shortest: int = 12, longest: int = 40) -> list[Any]:
    """Prompts of random tokens, with lengths between these two."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(shortest, longest + 1, count)
    return [rng.integers(3, SIZES[size]["vocab"], n) for n in lengths]
