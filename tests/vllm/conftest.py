"""These tests run in a process of their own, as `pytest tests/vllm`: vLLM changes torch's settings
and the default process group of the process that imports it."""

import importlib.util
import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"

if not importlib.util.find_spec("vllm") or not any("tests/vllm" in arg for arg in sys.argv):
    collect_ignore_glob = ["test_*.py"]
