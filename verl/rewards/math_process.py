"""The LaTeX server as a child of the trainer: `reward_model.math_server.autostart`."""

from __future__ import annotations

import logging
import math
import subprocess
import time
from pathlib import Path
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

START_SCRIPT = Path(__file__).parents[2] / "server" / "math" / "start.sh"
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
RESTART_PAUSE_S = 5.0


class ServerProcess:
    """Starts `server/math/start.sh` at `url` and, at the end, stops it. The child also ends when
    this process is gone, however that came about: its standard input closes then."""

    def __init__(self, url: str, log_file: Path) -> None:
        """Starts nothing yet; what the server prints will go to `log_file`.

        Raises: ValueError if the URL isn't one of this machine, or the server's code isn't there.
        """
        address = urlsplit(url)
        if address.scheme != "http" or address.hostname not in LOCAL_HOSTS:
            raise ValueError(
                f"reward_model.math_server.autostart=True starts a server on this machine, but its "
                f"URL is {url}: start that one by hand, or use http://127.0.0.1:6284"
            )
        if not START_SCRIPT.is_file():
            raise ValueError(
                f"reward_model.math_server.autostart=True needs {START_SCRIPT}, which is part of "
                "the repository: run from a clone of it, or start a server by hand"
            )
        self.url, self.log_file = url, log_file
        self.arguments = ["--host", address.hostname, "--port", str(address.port or 80)]
        self._process: subprocess.Popen[bytes] | None = None
        self._started = -math.inf

    def start(self) -> None:
        """Starts the server; it takes some seconds until it answers."""
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                ["bash", START_SCRIPT, *self.arguments, "--stop-at-end-of-input", "1"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the trainer, which needs its server still
            )
        self._started = time.monotonic()

    def failure(self) -> str | None:
        """The last lines of a server that has ended; None while it lives."""
        if self._process is None or self._process.poll() is None:
            return None
        end = "\n  ".join(self.log_file.read_text(errors="replace").splitlines()[-5:])
        return f"exit status {self._process.returncode}; {self.log_file} ends with\n  {end}"

    def start_if_dead(self) -> None:
        """Starts a server that has not been started or has ended, at most every few seconds."""
        if self._process is not None and self._process.poll() is None:
            return
        if time.monotonic() - self._started > RESTART_PAUSE_S:
            logger.warning("starting the LaTeX server at %s (log: %s)", self.url, self.log_file)
            self.start()

    def stop(self) -> None:
        """Ends the server, if it was started."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
