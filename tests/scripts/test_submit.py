"""SUBMIT=1 and RAY_ADDRESS: where a script's run goes."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.helpers import ROOT, free_address, long_test
from tests.scripts.test_scripts import Result, dry_run

SCRIPT = "../recipe/dapo/countdown-dapo-3b-wo-sp-wo-of"


def start(*arguments: str, **variables: str) -> Result:
    """The script, not as a dry run; none of these get as far as a model."""
    return dry_run(SCRIPT, *arguments, DRY_RUN="0", **variables)


def port() -> str:
    return free_address().rpartition(":")[2]


def last_error(result: Result) -> str:
    assert "Traceback" not in result.stderr, result.stderr
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")][-1]


def test_a_job_server_is_no_cluster_to_join() -> None:
    result = start(RAY_ADDRESS="http://127.0.0.1:8265")
    assert result.returncode == 2
    assert "SUBMIT=1 sends the run there" in last_error(result)


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "ray://127.0.0.1:10001", "auto"])
def test_a_cluster_to_join_is_no_job_server(address: str) -> None:
    result = start("trainer.totl_epochs=1", SUBMIT="1", RAY_ADDRESS=address)
    assert result.returncode == 2
    (error,) = [line for line in result.stderr.splitlines() if line]
    assert error == last_error(result)
    assert f"RAY_ADDRESS={address} is no job server: give the http:// address" in error


def test_a_missing_client_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "aiohttp.py").write_text("raise ImportError")
    result = start(SUBMIT="1", PYTHONPATH=str(tmp_path), PYTHON=sys.executable)
    assert result.returncode == 2
    assert f"{sys.executable} -m pip install 'ray[default]'" in last_error(result)


@pytest.mark.parametrize("waiting", [None, 0, 3])
def test_no_job_server_is_one_line(waiting: int | None) -> None:
    """Nobody listens there, or nobody answers: not even to whoever wants to connect, if as many
    wait already as may."""
    with socket.socket() as server, ExitStack() as clients:
        server.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        if waiting is not None:
            server.listen(0 if waiting else 1)
        for _ in range(waiting or 0):
            client = clients.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        started = time.monotonic()
        result = start(SUBMIT="1", RAY_ADDRESS=address)
    assert time.monotonic() - started < 15
    assert result.returncode == 2
    (error,) = result.stderr.splitlines()
    assert f"RAY_ADDRESS={address}: no job server answers there" in error


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """Variables that lead to a cluster of our own with a job server, in token mode."""
    folder = tempfile.mkdtemp(dir="/tmp")  # sockets need a short path
    variables = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex,
        "RAY_USAGE_STATS_ENABLED": "0",
        # What `python3` means in a job is settled where the cluster starts.
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    address = f"127.0.0.1:{port()}"
    options = {
        "port": port(),
        "dashboard-port": address.rpartition(":")[2],
        "dashboard-agent-listen-port": port(),
        "ray-client-server-port": port(),
        "min-worker-port": "0",
        "max-worker-port": "0",
        "num-cpus": "4",
        "temp-dir": folder,
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    head = subprocess.Popen(
        [*command, *(f"--{name}={value}" for name, value in options.items())],
        env=os.environ | variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not answers(address):
            assert head.poll() is None and time.monotonic() < deadline
            time.sleep(0.5)
        yield variables | {"SUBMIT": "1", "RAY_ADDRESS": f"http://{address}"}
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(30)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(head.pid, signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)


def answers(address: str) -> bool:
    """Whether an HTTP server is there, though it may ask for a token first."""
    try:
        urllib.request.urlopen(f"http://{address}/api/version", timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@long_test
def test_a_wrong_override_is_never_sent(cluster: dict[str, str]) -> None:
    result = start("trainer.totl_epochs=1", **cluster)
    assert (result.returncode, result.stdout) == (2, "")
    assert "'trainer.total_epochs'" in last_error(result)


@long_test
def test_a_missing_token_is_one_line(cluster: dict[str, str]) -> None:
    result = start(**cluster | {"RAY_AUTH_MODE": "disabled"})
    assert result.returncode == 2
    assert "set RAY_AUTH_MODE=token" in last_error(result)


@long_test
def test_a_job_runs_in_a_copy_of_the_repository(cluster: dict[str, str], tmp_path: Path) -> None:
    model = tmp_path / "no model"
    result = start(
        "actor_rollout_ref.rollout.name=hf",
        "trainer.default_local_dir='my runs/1'",
        MODEL_PATH=str(model),
        WANDB_MODE="offline",
        **cluster,
    )
    # The job gets as far as the model, and its status is the script's.
    assert result.returncode == 1
    errors = [line for line in result.stdout.splitlines() if line.startswith("error: ")]
    assert errors and all(f"model.path={model}" in line for line in errors)
    assert f"{ROOT}/my runs/1" in result.stdout
    listed = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "job", "list"],
        env=os.environ | cluster,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "'WANDB_MODE': 'offline'" in listed and "'working_dir': 'gcs://" in listed
