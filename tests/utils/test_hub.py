"""A hub that can't be reached costs seconds, and says so in one line."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.helpers import ROOT

ASK = """
import huggingface_hub, os
from verl.utils.hub import ask_hub
ask_hub()
print(huggingface_hub.is_offline_mode(), os.environ.get("HF_HUB_OFFLINE"))
"""
MAIN = ["-m", "verl.trainer.main_ppo", "actor_rollout_ref.model.path=a/b"]
without_hub = pytest.mark.series(2, "a hub that does not answer")
EXAMPLES = "examples/data_preprocess"


@contextmanager
def endpoint(kind: str) -> Iterator[str]:
    """Address of a hub where nobody listens, that never answers, or that has nothing."""
    if kind == "empty":
        with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # 501 to everything
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()
    else:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            if kind == "silent":
                server.listen()
            yield f"http://127.0.0.1:{server.getsockname()[1]}"


def run(kind: str, folder: Path, *arguments: str, **variables: str) -> tuple[list[str], list[str]]:
    """Lines of output and of errors."""
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder)}
    started = time.monotonic() - sum(os.times()[2:4])
    with endpoint(kind) as address:
        done = subprocess.run(
            [sys.executable, *arguments],
            env=environment | {"HF_ENDPOINT": address} | variables,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    # Without what processors took, of which other tests may leave little: retries wait as long.
    assert time.monotonic() - sum(os.times()[2:4]) - started < 28
    return done.stdout.splitlines(), done.stderr.splitlines()


@pytest.mark.parametrize(
    ("kind", "variable", "expected"),
    [
        ("dead", None, "True 1"),
        ("silent", None, "True 1"),
        ("empty", None, "False None"),
        ("dead", "0", "False 0"),
    ],
)
def test_only_a_hub_that_answers_is_asked(
    kind: str, variable: str | None, expected: str, tmp_path: Path
) -> None:
    variables = {"HF_HUB_OFFLINE": variable} if variable else {}
    assert run(kind, tmp_path, "-c", ASK, **variables) == ([expected], [])


class Hub(BaseHTTPRequestHandler):
    """A hub with one model, `a/b`, whose files are in `folder`."""

    folder: Path
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        place = self.path.partition("?")[0]
        file = self.folder / place.rpartition("/")[2]
        body, kind, status = b"", "application/octet-stream", 200
        if place.startswith("/api/models/a/b"):
            found: object = {"id": "a/b", "sha": 40 * "1"}
            if "/tree/" in place:
                files = [(path.name, path.stat().st_size) for path in self.folder.iterdir()]
                found = [
                    {"type": "file", "path": name, "size": size, "oid": name}
                    for name, size in files
                ]
            body, kind = json.dumps(found).encode(), "application/json"
        elif file.is_file():
            body = file.read_bytes()
        elif place != "/":
            status = 404
        self.send_response(status)
        headers = {"X-Repo-Commit": 40 * "1", "ETag": f'"{file.name}"', "Content-Type": kind}
        if status == 404:
            headers |= {"X-Error-Code": "EntryNotFound"}
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        pass


CHECK = """
from verl.config.schema import ModelConfig
from verl.models.folder import check_model
check_model(ModelConfig("a/b"), 10, export=False)
"""
LOAD = """
from verl.config.schema import ModelConfig
from verl.models.hf import load_hf_model
import torch
print(load_hf_model(ModelConfig("a/b"), torch.float32).num_parameters())
"""


def test_a_model_of_the_hub_is_there_before_workers_start(tiny_model: Path, tmp_path: Path) -> None:
    """With no more than what makes it."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "model.gguf").write_text("the same for others")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home")}
    handler = type("Handler", (Hub,), {"folder": folder})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        run_python = partial(subprocess.run, cwd=ROOT, check=True, capture_output=True, text=True)
        run_python([sys.executable, "-c", CHECK], env=environment | address)
        server.shutdown()
    found = run_python([sys.executable, "-c", LOAD], env=environment | {"HF_HUB_OFFLINE": "1"})
    assert int(found.stdout) > 0
    assert {p.name for p in (tmp_path / "home").rglob("snapshots/*/*")} == {
        p.name for p in tiny_model.iterdir()
    }


@without_hub
@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        ([f"{EXAMPLES}/gsm8k.py"], "pass --train_file and --test_file"),
        ([f"{EXAMPLES}/countdown.py"], "pass --generate"),
        (MAIN, "actor_rollout_ref.model.path=a/b: no Hugging Face model there; name a folder or"),
    ],
)
def test_what_cannot_be_had_is_one_line(command: list[str], remedy: str, tmp_path: Path) -> None:
    _, lines = run("dead", tmp_path, *command)
    (error,) = [line for line in lines if not line.startswith(("INFO ", "WARNING "))]
    assert error.startswith("error: ") and remedy in error


@without_hub
def test_a_tokenizer_is_named_by_its_key(tiny_model: Path, tmp_path: Path) -> None:
    model = f"actor_rollout_ref.model.path={tiny_model}"
    _, lines = run("dead", tmp_path, *MAIN[:2], model, "data.tokenizer=a/b")
    assert lines[-1].startswith("error: data.tokenizer=a/b: no Hugging Face model there")
