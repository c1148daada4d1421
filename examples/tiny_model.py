"""A tiny model for the examples that run on a laptop: a Qwen3 and a tokenizer with whole words."""

import argparse
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

EOS, PAD, UNK = "<|endoftext|>", "<|pad|>", "<|unk|>"
LENGTH = 1024  # longest text in tokens


def argument_parser(description: str, sft_size: int) -> argparse.ArgumentParser:
    """The options that every maker of a tiny model has; ``sft_size`` is a default."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of everything that is drawn")
    add("--sft_size", type=int, default=sft_size, help="warm-up examples")
    add("--hidden_size", type=int, default=96, help="a multiple of 32, the size of a head")
    add("--intermediate_size", type=int, default=256, help="width of the feed-forward layers")
    add("--num_layers", type=int, default=2, help="decoder layers")
    return parser


def probability(text: str) -> float:
    """Type of an option.

    Raises:
        argparse.ArgumentTypeError: it is not a number from 0 to 1.
    """
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a probability")
    return float(text)


def build_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token per word; decoding joins words with spaces, so that nothing is lost either way."""
    vocab = {word: index for index, word in enumerate([PAD, EOS, UNK, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        model_max_length=LENGTH,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 with heads of size 32, the smallest that vLLM runs.

    Not a Qwen2: next to a Qwen2, AutoTokenizer replaces any tokenizer by Qwen2's byte-level one.
    The normalised queries and keys of a Qwen3 also learn such tasks in fewer steps.

    Raises:
        ValueError: ``--hidden_size`` is not a multiple of 32.
    """
    if args.hidden_size % 32:
        raise ValueError("--hidden_size must be a multiple of 32, the size of a head")
    torch.manual_seed(args.seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.hidden_size // 32,
        num_key_value_heads=args.hidden_size // 32,
        head_dim=32,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def write(
    folder: Path,
    words: Iterable[str],
    warm_up: Iterable[tuple[str, str]],
    args: argparse.Namespace,
) -> None:
    """Write ``model/`` (model and tokenizer) and ``sft.parquet`` (prompts and responses)."""
    tokenizer = build_tokenizer(words)
    model = build_model(tokenizer, args)
    tokenizer.save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    frame = pd.DataFrame(warm_up, columns=["prompt", "response"])
    frame.to_parquet(folder / "sft.parquet", index=False)
    print(f"{folder / 'model'}: {model.num_parameters():,} parameters, {len(tokenizer)} words")
    example = " ".join(frame.iloc[0])
    print(f"{folder / 'sft.parquet'}: {len(frame)} examples, {example!r}, …")
