"""These tests run in a process of their own, as `pytest tests/vllm`: vLLM changes torch's settings
and the default process group of the process that imports it."""

import importlib.util
import sys

if not importlib.util.find_spec("vllm") or not any("tests/vllm" in arg for arg in sys.argv):
    collect_ignore_glob = ["test_*.py"]
