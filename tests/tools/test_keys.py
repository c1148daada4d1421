"""docs/keys.md is what the schema says."""

from verl.tools.keys import FILE, page


def test_the_page_is_current() -> None:
    assert FILE.read_text() == page(), "run python -m verl.tools.keys"


def test_a_key_has_its_default_bounds_and_effect_on_the_page() -> None:
    entry = """
- **`gpu_memory_utilization`**: float; default `0.5`; more than 0; at most 1.
  vLLM: share of a GPU's memory for weights and KV cache. On a CPU the KV cache takes up to 5 % of
  the memory, or what engine_kwargs.vllm.kv_cache_memory_bytes says. May change on resume. No effect
  with `rollout.name=hf`.
"""
    assert entry in page()


def test_lines_fit() -> None:
    assert max(len(line) for line in page().splitlines()) <= 100
