"""A Python that starts as a fork of a process with torch and transformers in memory: whatever a
test starts with it has their seconds of imports behind it.

`python -m tests.warm_python FOLDER` serves the program `FOLDER/python`, which takes -u, -B, -c, -m
or a script as python does, and ignores -W. A fork has its starter's environment, working
directory, open files and signal mask, and each of the two ends when the other does; the starter
hands signals on. It is no child of its starter, though, nor of its process group, and
/proc/PID/environ isn't its own: where the variable TEST_JOB is set, there is an empty file
FOLDER/TEST_JOB.PID. What it starts by `sys.executable`, such as Ray, is an ordinary interpreter, or
what the variable WARM_CHILDREN names. The server and its forks end when its standard input does.
"""

import atexit
import fcntl
import gc
import marshal
import os
import runpy
import selectors
import shutil
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

MODULES = [
    "verl.config.load",
    "verl.models.policy",
    "verl.rollout.hf",
    "aiohttp.web",
    "grpc.aio",
    "google.protobuf",
    "requests",
    "jsonschema",
]
"""Imported before the first fork. Not Ray itself, which reads the environment on import; only what
it imports."""
CLIENT = """#!{python} -SEI
import _signal, _socket, marshal, os, sys
server = _socket.socket(_socket.AF_UNIX)
server.connect({address!r})
fds = [int(name) for name in os.listdir("/proc/self/fd")]
fds = [fd for fd in fds if fd != server.fileno() and os.path.exists(f"/proc/self/fd/{{fd}}")]
signals = [_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP]
mask = [int(number) for number in _signal.pthread_sigmask(_signal.SIG_BLOCK, signals)]
request = marshal.dumps((sys.argv[1:], dict(os.environ), os.getcwd(), fds, mask))
rights = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
size = len(request).to_bytes(4, "little")
server.sendmsg([size], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
server.sendall(request)
def answer():
    if len(found := server.recv(4)) < 4:
        os.write(2, b"the server of warm_python.py is gone\\n")
        os._exit(1)
    return int.from_bytes(found, "little", signed=True)
def hand_on(number, _):
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it has just ended
        pass
pid = answer()
for number in signals:
    if _signal.getsignal(number) is not _signal.SIG_IGN:
        _signal.signal(number, hand_on)
_signal.pthread_sigmask(_signal.SIG_SETMASK, mask)
status = answer()
if status < 0:  # a signal's number
    if -status != _signal.SIGKILL:
        _signal.signal(-status, _signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""
ABOVE = 500  # file descriptors that no program here uses


class Request(NamedTuple):
    """What a program is started with."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    numbers: list[int]
    """Of its open files; `received` are the same ones as they came."""
    mask: list[int]
    received: list[int]


def receive(server: socket.socket) -> tuple[socket.socket, Request]:
    """A program that asks for a fork, and what for."""
    peer, _ = server.accept()
    size, received, *_ = socket.recv_fds(peer, 4, 250)
    with peer.makefile("rb") as stream:
        return peer, Request(*marshal.loads(stream.read(int.from_bytes(size, "little"))), received)


def serve(server: socket.socket) -> Request:
    """Returns in each fork, with what it is to do."""
    waiting, forks = selectors.DefaultSelector(), set[int]()
    for file in (server, sys.stdin):
        waiting.register(file, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if waiting.get_map().get(key.fd) is not key:
                continue  # gone by what came before
            if key.fileobj is sys.stdin:
                for pid in forks:
                    os.kill(pid, signal.SIGKILL)
                shutil.rmtree(sys.argv[1], ignore_errors=True)
                sys.exit()
            elif key.fileobj is server:
                peer, request = receive(server)
                with warnings.catch_warnings(action="ignore"):
                    for name in MODULES:
                        import_module(name)
                gc.freeze()  # what a fork collects, it copies
                if (pid := os.fork()) == 0:
                    # Freed later, they would close files that have the same numbers by then.
                    for file in (waiting, peer, server):
                        file.close()
                    return request
                with suppress(OSError):  # its starter is gone; that it hears below
                    peer.sendall(pid.to_bytes(4, "little"))
                for fd in request.received:
                    os.close(fd)
                forks.add(pid)
                waiting.register(end := os.pidfd_open(pid), selectors.EVENT_READ, (pid, peer))
                waiting.register(peer, selectors.EVENT_READ, (pid, end))
            elif key.fileobj is key.fd:  # a fork has ended
                pid, peer = key.data
                for mark in Path(sys.argv[1]).glob(f"*.{pid}"):
                    mark.unlink()  # while no other process can have the number
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                forks.remove(pid)
                with suppress(OSError):
                    peer.sendall(status.to_bytes(4, "little", signed=True))
                for file in (key.fd, peer):
                    with suppress(KeyError):
                        waiting.unregister(file)
                os.close(key.fd)
                peer.close()
            else:  # its starter has
                waiting.unregister(key.fileobj)
                os.kill(key.data[0], signal.SIGKILL)


def take_over(request: Request) -> None:
    """The surroundings of the starter, and nothing of the server's."""
    os.setsid()  # one of Ray's processes kills its process group
    os.closerange(ABOVE, 2 * ABOVE)
    files = [fcntl.fcntl(fd, fcntl.F_DUPFD, ABOVE) for fd in request.received]
    os.closerange(0, ABOVE)
    for fd, number in zip(files, request.numbers, strict=True):
        os.dup2(fd, number)
    os.closerange(ABOVE, 2 * ABOVE)
    os.environ.clear()
    os.environ.update(request.environment)
    if mark := os.environ.get("TEST_JOB"):
        Path(sys.argv[1], f"{mark}.{os.getpid()}").touch()
    options = filter(None, os.environ.get("PYTHONWARNINGS", "").split(","))
    warnings._processoptions(options)  # type: ignore[attr-defined]
    sys.executable = os.environ.get("WARM_CHILDREN", sys.executable)
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [place for place in places if place and place not in sys.path]
    os.chdir(request.folder)
    signal.pthread_sigmask(signal.SIG_SETMASK, request.mask)


def execute(arguments: list[str]) -> None:
    """As `python ARGUMENTS…` does."""
    while arguments[0] in ("-u", "-B") or arguments[0].startswith("-W"):
        if arguments[0] == "-u":
            sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        elif arguments[0] == "-B":
            sys.dont_write_bytecode = True
        arguments = arguments[1:]
    first, *sys.argv = arguments
    if first == "-m":
        sys.path[0] = os.getcwd()
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        code, sys.argv[0], sys.path[0] = sys.argv[0], "-c", ""
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(code, names)
    else:
        assert not first.startswith("-"), arguments
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.realpath(first))
        runpy.run_path(first, run_name="__main__")


def end(action: Callable[[], None]) -> NoReturn:
    """Ends this process after `action` as an interpreter does, but without clearing its memory: of
    thousands of modules that takes a second."""
    status: Any = None
    try:
        action()
    except SystemExit as stopped:
        status = stopped.code
        if not isinstance(status, int | None):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status or 0)


if __name__ == "__main__":
    client, address = (Path(sys.argv[1]) / name for name in ("python", "socket"))
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(address))
    server.listen(100)
    client.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    client.chmod(0o755)
    request = serve(server)
    take_over(request)
    end(lambda: execute(request.arguments))
