"""Helpers of all layers, and what scripts import from verl."""

from verl.utils.tokenizer import hf_tokenizer

__all__ = ["hf_tokenizer"]
