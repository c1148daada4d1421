"""The interpreter that tests start other programs with: a fork is what they would be."""

import marshal
import multiprocessing
import multiprocessing.spawn
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers import Processes, warm_python


def test_a_fork_has_what_its_starter_gives_it(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['A'], os.getcwd(), sys.argv[1:], input()); sys.exit(3)"
    done = subprocess.run(
        [warm_python(), "-c", code, "x y"],
        env=os.environ | {"A": "b"},
        cwd=tmp_path,
        input="given",
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == f"b {tmp_path} ['x y'] given\n"


def test_an_error_and_a_module_are_those_of_python() -> None:
    python = warm_python()
    failed = subprocess.run([python, "-c", "1 / 0"], capture_output=True, text=True)
    assert failed.returncode == 1 and "ZeroDivisionError: division by zero" in failed.stderr
    done = subprocess.run([python, "-m", "json.tool"], input="{}", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "{}\n")


def _note(file: Path) -> None:
    file.write_text(f"{os.getppid()} {'torch' in sys.modules}")


def test_a_process_may_be_spawned_with_it(tmp_path: Path) -> None:
    """As torch's tests of several ranks do in workers of pytest-xdist, which write no bytecode."""
    spawn, before = multiprocessing.get_context("spawn"), sys.dont_write_bytecode
    usual = multiprocessing.spawn.get_executable()
    try:
        spawn.set_executable(warm_python())
        sys.dont_write_bytecode = True
        process = spawn.Process(target=_note, args=(tmp_path / "note",))
        process.start()
        process.join(60)
    finally:
        sys.dont_write_bytecode = before
        spawn.set_executable(usual)
    assert process.exitcode == 0
    parent, has_torch = (tmp_path / "note").read_text().split()
    assert int(parent) != os.getpid() and has_torch == "True"


@pytest.mark.parametrize("victim", ["the fork", "its starter"])
def test_each_ends_with_the_other(victim: str) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with subprocess.Popen([warm_python(), "-c", code], stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        fork = psutil.Process(int(starter.stdout.readline()))
        os.kill(fork.pid if victim == "the fork" else starter.pid, signal.SIGKILL)
        assert starter.wait(60) == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while fork.is_running():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_handed_on_and_a_marked_fork_can_be_found(number: int) -> None:
    """The first one is waited for; the second one ends the fork."""
    code = (
        f"import os, signal; signal.pthread_sigmask(signal.SIG_BLOCK, [{number}]);"
        " print(os.getpid(), flush=True);"
        f" print(signal.sigwait([{number}]), flush=True); signal.signal({number}, signal.SIG_DFL);"
        f" signal.pthread_sigmask(signal.SIG_UNBLOCK, [{number}]); print(flush=True); input()"
    )
    processes, pipe = Processes(warm=True), subprocess.PIPE
    environment, command = os.environ | processes.variables, [processes.python, "-c", code]
    with subprocess.Popen(
        command,
        env=environment,
        stdin=pipe,
        stdout=pipe,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # nohup and & leave some ignored
    ) as starter:
        assert starter.stdout is not None
        fork = int(starter.stdout.readline())
        assert {process.pid for process in processes.alive()} == {starter.pid, fork}
        starter.send_signal(number)
        assert starter.stdout.readline() == b"%d\n" % number
        starter.stdout.readline()
        starter.send_signal(number)
        assert starter.wait(60) == -number
    assert not processes.alive()
    assert not list(Path(warm_python()).parent.glob(f"{processes.mark}.*"))


def test_a_starter_that_is_gone_before_its_fork_ends_nobody_else() -> None:
    address = str(Path(warm_python()).with_name("socket"))
    request = marshal.dumps((["-c", "input()"], dict(os.environ), "/", [0], []))
    with socket.socket(socket.AF_UNIX) as starter, open(os.devnull) as file:
        starter.connect(address)
        socket.send_fds(starter, [len(request).to_bytes(4, "little")], [file.fileno()])
        starter.sendall(request)
    test_an_error_and_a_module_are_those_of_python()


def test_nothing_of_the_server_closes_a_file_of_a_fork() -> None:
    """vLLM unfroze the server's objects, and collecting them closed gloo's sockets."""
    code = (
        "import gc, os; files = [os.open('/dev/null', 0) for _ in range(50)]; gc.unfreeze();"
        " gc.collect(); [os.fstat(file) for file in files]"
    )
    done = subprocess.run([warm_python(), "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
