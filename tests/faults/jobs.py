"""Main jobs in processes of their own, and what a test does to them."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoModelForCausalLM

from tests.helpers import Processes
from verl.trainer.ppo.tracking import read_metrics

PATIENCE_S = 300
fault = pytest.mark.series(2, "faults")


class Job:
    """A main job. Unless `warm` it is an ordinary process, in whose process group Ray's are."""

    def __init__(
        self,
        settings: list[str],
        folder: Path,
        *overrides: str,
        module: str = "verl.trainer.main_ppo",
        warm: bool = True,
    ) -> None:
        self.folder, self.processes = folder, Processes(warm)
        self.log_file = folder.with_name(f"{folder.name}-{self.processes.mark}.log")
        overrides = f"trainer.default_local_dir={folder}", *overrides
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                [self.processes.python, "-m", module, *settings, *overrides],
                env=os.environ | self.processes.variables,
                start_new_session=True,
                stdout=log,
                stderr=log,
            )

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def until(self, condition: Callable[[], Any], pause: float = 0.02) -> Any:
        """Waits until it holds, and returns what it says; None if the job ends before."""
        deadline = time.monotonic() + PATIENCE_S
        while self.running:
            if found := condition():
                return found
            assert time.monotonic() < deadline, self.log
            time.sleep(pause)
        return None

    def until_step(self, step: int) -> Any:
        """Waits until the metrics of `step` are there."""
        if step < 0:
            return True
        return self.until(lambda: [line for line in lines(self.folder) if line["step"] >= step])

    def until_workers(self) -> Any:
        """Waits until there are actor ranks, which engines follow."""
        return self.until(lambda: self.find("ray::PolicyWorker"), pause=0.2)

    def find(self, text: str) -> list[psutil.Process]:
        """Those of its processes whose command line holds `text`."""
        found = []
        for process in self.processes.alive():
            with suppress(psutil.Error):
                if text.lower() in " ".join(process.cmdline()).lower():
                    found.append(process)
        return found

    def kill(self, text: str, choose: Callable[[list[Any]], Any] = lambda found: found[0]) -> bool:
        """Kills one of the processes whose command line holds `text`; False if there is none."""
        found = self.find(text)
        if found:
            choose(found).kill()
        return bool(found)

    def kill_driver(self) -> None:
        """Kills the driver alone; what it had started ends by itself."""
        self.process.kill()
        self.process.wait()
        # Ray's agents first try for a minute to tell their cluster, which is gone.
        self.assert_nothing_is_left(but="agent")

    def end(self, status: int = 0) -> str:
        """Waits for it; its log."""
        found = self.process.wait(PATIENCE_S)
        assert found == status, f"status {found}\n{self.log}"
        self.assert_nothing_is_left()
        return self.log

    def assert_nothing_is_left(self, but: str | None = None) -> None:
        """Waits until all its processes are gone, but those whose command line holds `but`."""
        deadline = time.monotonic() + 60
        while left := set(self.processes.alive()) - set(self.find(but) if but else ()):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)


@contextmanager
def job(settings: list[str], folder: Path, *overrides: str, **options: Any) -> Iterator[Job]:
    """A job (with `Job`'s options) that ends with the block, whatever happens in it."""
    started = Job(settings, folder, *overrides, **options)
    try:
        yield started
    finally:
        if started.running:
            os.killpg(started.process.pid, signal.SIGKILL)
            started.process.wait()
        started.processes.kill()


def lines(folder: Path) -> list[dict[str, Any]]:
    """The metrics so far, without what the clock and the machine say."""
    path = folder / "metrics.jsonl"
    found = read_metrics(path) if path.exists() else []
    ours = ("timing", "perf/")
    return [{k: v for k, v in line.items() if not k.startswith(ours)} for line in found]


def assert_same(folder: Path, reference: Path) -> None:
    """The same metrics line by line, and the same parameters bit for bit."""
    assert lines(folder) == lines(reference)
    models = [AutoModelForCausalLM.from_pretrained(f / "huggingface") for f in (folder, reference)]
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert a.equal(b)
