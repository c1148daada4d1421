"""verl's way to a tokenizer, for scripts."""

from os.path import expanduser, isdir
from typing import Any


def hf_tokenizer(
    name_or_path: str, correct_pad_token: bool = True, correct_gemma2: bool = True, **kwargs: Any
) -> Any:
    """The tokenizer in a folder or on the hub; as in verl it pads with its end-of-sequence token if
    it names no other, and Gemma 2's instructed 2B model ends with its turn. Raises: OSError."""
    from transformers import AutoTokenizer

    from verl.utils.hub import ask_hub

    if not isdir(path := expanduser(name_or_path)):
        ask_hub()
    if correct_gemma2 and "gemma-2-2b-it" in path:
        kwargs["eos_token"] = "<end_of_turn>"
    tokenizer = AutoTokenizer.from_pretrained(path, **kwargs)
    if correct_pad_token and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
