"""Builders of real objects for tests."""

import os
import shutil
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from filelock import FileLock  # comes with torch

from verl.algorithms.weights import response_weights
from verl.cluster import free_port
from verl.protocol import OptimizerStep, Prompt, Sample, response_lengths

ROOT = Path(__file__).parents[1]
whole_run = pytest.mark.series(4, "whole runs")  # except those of test_main_ppo.py
long_test = pytest.mark.series(3, "other long tests")
needs_onednn = pytest.mark.skipif(
    "not __import__('torch').backends.mkldnn.is_available()", reason="PyTorch without oneDNN"
)
VOCABULARY = ["<eos>", "<pad>", "<unk>", *map(str, range(100)), "+", "-", "*", "/", "(", ")", "="]


def make_tokenizer(vocabulary: Sequence[str] = VOCABULARY, **options: Any) -> Any:
    """A word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options |= dict(eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


QWEN_3B = dict(
    model_type="qwen2",
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    vocab_size=151936,
    tie_word_embeddings=True,
)
"""config.json of Qwen2.5-3B, as far as it matters."""


TINY: dict[str, Any] = dict(
    vocab_size=len(VOCABULARY),
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    initializer_range=0.1,
    eos_token_id=0,
    pad_token_id=1,
)


def make_tiny_model(
    folder: Path, kind: str = "Qwen3", task: str = "CausalLM", **overrides: Any
) -> Path:
    """Saves a random decoder of this kind and its tokenizer; `overrides`: what isn't as in `TINY`,
    where None is left out."""
    import torch
    import transformers

    settings = {name: value for name, value in (TINY | overrides).items() if value is not None}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(bos_token_id=None, **settings)
    auto_class = getattr(transformers, f"AutoModelFor{task}")
    auto_class.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tiny_reward_model(folder: Path, kind: str = "Llama", **overrides: Any) -> Path:
    """Saves a random classifier with one label. Its tokenizer has other ids than the policy's, and
    a chat template that ends a turn with `=` (the user's) or `*`."""
    options = {"tie_word_embeddings": False, "num_labels": 1} | overrides
    make_tiny_model(folder, kind, "SequenceClassification", **options)
    template = "{% for m in messages %}{{ m.content }} {{ '=' if m.role == 'user' else '*' }} "
    words = [*VOCABULARY[:3], *reversed(VOCABULARY[3:])]
    make_tokenizer(words, chat_template=template + "{% endfor %}").save_pretrained(folder)
    return folder


def make_samples(
    lengths: list[int], seed: int = 0, prompt_length: int = 5, **fields: Any
) -> list[Sample]:
    """Samples with random tokens, log-probabilities and advantages, two a group."""
    rng = np.random.default_rng(seed)
    samples = []
    for i, length in enumerate(lengths):
        prompt = Prompt(i // 2, rng.integers(3, 100, prompt_length + i % 3), "countdown", {})
        log_probs = rng.normal(-4.5, 0.3, (3, length)).astype(np.float32)
        ids = rng.integers(3, 100, length).astype(np.int32)
        sample = Sample(prompt, i // 2, ids, "stop")
        sample.rollout_log_probs, sample.old_log_probs, sample.ref_log_probs = log_probs
        sample.advantage = rng.normal()
        for name, value in fields.items():
            setattr(sample, name, value)
        samples.append(sample)
    return samples


def make_step(samples: list[Sample], mode: str = "token-mean", **options: Any) -> OptimizerStep:
    """These samples with the weights of an aggregation; `options`: those of `response_weights`."""
    options = {"max_response_length": 100} | options
    weights = response_weights(response_lengths(samples), mode, **options)
    return OptimizerStep(samples, weights.numpy())


def free_address() -> str:
    """Where a process group of this machine can meet."""
    return f"tcp://127.0.0.1:{free_port()}"


def made_once(base: Path, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` that `make` fills when it is first asked for, whichever of the workers of
    pytest-xdist that is; `base`: pytest's folder of temporary files."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, done = base / name, base / f"{name}.done"
    with FileLock(base / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            done.touch()
    return folder


def warm_python() -> str:
    """An interpreter that has its imports behind it, for whatever isn't about how it starts."""
    python, deadline = os.environ["WARM_PYTHON"], time.monotonic() + 60
    while not os.path.exists(python):  # in the first moments
        assert time.monotonic() < deadline, "tests/warm_python.py doesn't serve"
        time.sleep(0.01)
    return python


def warm_children() -> dict[str, str]:
    """The variable by which a program of `warm_python` starts others with it, too."""
    return {"WARM_CHILDREN": warm_python()}


SETTLED_S = 2  # after so long a process is the program that it was started for


class Processes:
    """The processes of a program that is started with this `python` and these `variables`, wherever
    they are: they carry a mark in their environment. Unless `warm` they are ordinary ones."""

    def __init__(self, warm: bool) -> None:
        self.mark = uuid.uuid4().hex
        self.python = warm_python() if warm else sys.executable
        self.variables = {"TEST_JOB": self.mark} | (warm_children() if warm else {})
        self._known: dict[psutil.Process, bool] = {}  # all that were seen: whether it is a part

    def alive(self) -> list[psutil.Process]:
        """Those that live; of `warm_python` both the fork and its starter."""
        for file in Path(warm_python()).parent.glob(f"{self.mark}.*"):
            with suppress(psutil.Error):
                self._known[psutil.Process(int(file.suffix[1:]))] = True
        for process in psutil.process_iter():
            if process not in self._known:
                with suppress(psutil.Error):
                    mine = process.environ().get("TEST_JOB") == self.mark
                    # A program that has just begun may show another's environment, or none.
                    if mine or time.time() > process.create_time() + SETTLED_S:
                        self._known[process] = mine
        return [process for process, mine in self._known.items() if mine and is_alive(process)]

    def kill(self) -> None:
        """Ends those that live."""
        for process in self.alive():
            with suppress(psutil.NoSuchProcess):  # a fork and its starter end together
                process.kill()


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs, which a zombie doesn't."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@contextmanager
def starting_warm() -> Iterator[None]:
    """`sys.executable` is `warm_python`: for Ray, for jobs, and for what they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm_python())
        patch.setenv(*warm_children().popitem())
        yield


@contextmanager
def ray_cluster(*nodes: dict[str, float]) -> Iterator[str]:
    """The address of a Ray cluster with these nodes, all on this machine; `nodes`: the resources of
    each, `num_cpus` and `num_gpus`, which Ray only counts. Ends this process's connection, too."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for resources in nodes:
        cluster.add_node(include_dashboard=False, **resources)
    try:
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


def close(actual: Any, expected: Any, rtol: float = 1e-6, atol: float = 1e-7) -> None:
    """Asserts that two tensors, numbers or lists agree, in float64."""
    import torch

    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=rtol,
        atol=atol,
    )


def server_python() -> str | None:
    """The interpreter of the LaTeX server's environment; None if there is none."""
    named = os.environ.get("MATH_SERVER_PYTHON")
    usual = ROOT / ".venv-server" / "bin" / "python"
    return named or (str(usual) if usual.exists() else None)


class LatexServer:
    """A LaTeX server of its own process, to be killed and started again on the same port."""

    def __init__(self, *arguments: str) -> None:
        self.arguments = arguments
        self.port = int(free_address().rpartition(":")[2])
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Returns when it answers."""
        self.process = subprocess.Popen(
            ["bash", ROOT / "server/math/start.sh", "--port", str(self.port), *self.arguments],
            env=os.environ | {"MATH_SERVER_PYTHON": str(server_python())},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.get("/health", wait=60)

    def get(self, path: str, wait: float = 0) -> str:
        """The body of an answer; tries for `wait` seconds."""
        deadline = time.monotonic() + wait
        while True:
            try:
                with urllib.request.urlopen(self.url + path, timeout=60) as response:
                    return response.read().decode()
            except OSError:
                assert self.process.poll() is None, "the server has ended"
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def metric(self, line: str) -> float:
        """The value of a line of /metrics, such as ``latex_pairs_total{status="ok"}``."""
        lines = [x.rpartition(" ") for x in self.get("/metrics").splitlines()]
        return sum(float(value) for name, _, value in lines if name == line)

    def kill(self) -> None:
        """As a crash would."""
        self.process.kill()
        self.process.wait()
