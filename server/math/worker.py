"""The processes behind the pool: a template that only forks, and the workers it forks.

    server ──control socket──▶ template ──fork──▶ worker ◀──socket of its own──▶ server

The template has imported and warmed up all that a job needs, holds one thread and none of the
server's sockets, so that a new worker is ready within milliseconds and inherits nothing. It dies
with the server (its control socket closes), a worker dies with it (`PR_SET_PDEATHSIG`). `pool.Pool`
starts it:  python -m server.math.worker CONTROL_FD MODULE:FUNCTION MEMORY_LIMIT
"""

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import pkgutil
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# What goes over the control socket: FORK with a socket attached forks a worker that serves this
# socket, any other number is the process id of a worker to kill.
COMMAND, FORK = struct.Struct("!q"), 0
PR_SET_PDEATHSIG = 1


def serve(connection: Connection, function: Callable[..., Any]) -> None:
    """Answer jobs until the server closes the socket: first goes out the process id, then for each
    JSON list of arguments one of `["ok", result]`, `["memory", null]`, `["error", text]`."""
    with contextlib.suppress(EOFError, ConnectionError):
        connection.send_bytes(json.dumps(os.getpid()).encode())
        while True:
            arguments = json.loads(connection.recv_bytes())
            try:
                result = function(*arguments)
                reply = json.dumps(["ok", result], default=dataclasses.asdict)
            except MemoryError:
                reply = '["memory", null]'
            except Exception as error:  # hostile input found a bug: this job fails, not the worker
                reply = json.dumps(["error", f"{type(error).__name__}: {error}"[:500]])
            connection.send_bytes(reply.encode())


def become_worker(memory_limit: int, template: int) -> None:
    """Tie this process to the life of its parent `template`, and limit its memory (bytes)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != template:  # it died before the line above
        os._exit(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))


def run_template(control: socket.socket, function: Callable[..., Any], memory_limit: int) -> None:
    """Fork and kill workers as told, until the server closes `control`; then end them all. Only
    process ids that were not reaped yet are signalled: none can have become another process."""
    template, children = os.getpid(), set()
    while True:
        message, sockets, _, _ = socket.recv_fds(control, COMMAND.size, 1)
        if len(message) < COMMAND.size:
            break
        (command,) = COMMAND.unpack(message)
        if command == FORK and not (child := os.fork()):
            control.close()
            become_worker(memory_limit, template)
            serve(Connection(sockets[0]), function)
            os._exit(0)
        if command == FORK:
            children.add(child)
            os.close(sockets[0])
        elif command in children:
            os.kill(command, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while reaped := os.waitpid(-1, os.WNOHANG)[0]:
                children.discard(reaped)
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)


def main() -> None:
    """Prepare this process as the template, and run it."""
    # A signal to the whole group is the server's business, which finishes its requests first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    control_fd, target, memory_limit = sys.argv[1:]
    function = pkgutil.resolve_name(target)
    getattr(sys.modules[function.__module__], "preload", lambda: None)()
    gc.collect()
    gc.freeze()  # the collector of a worker leaves the pages that it shares with the template alone
    with socket.socket(fileno=int(control_fd)) as control:
        run_template(control, function, int(memory_limit))


if __name__ == "__main__":
    main()
