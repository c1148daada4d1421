"""docs/keys.md is what the schema says."""

from verl.tools.keys import FILE, VERL_FILE, page, verl_page


def test_the_page_is_current() -> None:
    assert FILE.read_text() == page(), "run python -m verl.tools.keys"


def test_the_page_for_people_from_verl_is_current() -> None:
    text = VERL_FILE.read_text()
    assert text == verl_page(text), "run python -m verl.tools.keys"
    assert "- `actor_rollout_ref.model.use_shm`: the model is read where it lies\n" in text


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
