"""Sends a run to a Ray cluster: `python _submit.py MODULE key=value …`, for _common.sh.

What `ray job submit` gets, and what follows from it for overrides: docs/dapo.md.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import requests
import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

REPO = Path(__file__).resolve().parents[1]
VARIABLES = ("WANDB_", "HF_", "MATH_SERVER_")
"""Beginnings of the names of the variables that a job gets."""
ANSWER_S = 5  # Ray itself would wait for ever


def run_folder(command: list[str]) -> str:
    """The run's folder as a path that holds outside of the job's working directory, which is gone
    after it. Ends the process if the configuration is wrong.

    Args:
        command: module and overrides.
    """
    dry_run = subprocess.run(
        [sys.executable, "-m", *command],
        env=os.environ | {"DRY_RUN": "quiet"},
        stdout=subprocess.PIPE,
        text=True,
    )
    if dry_run.returncode:
        raise SystemExit(dry_run.returncode)
    folder = yaml.safe_load(dry_run.stdout)["trainer"]["default_local_dir"]
    return folder if folder.startswith("~") else os.path.abspath(folder)


def check_server(address: str) -> None:
    """Ends the process, with one message, if no job can be sent to `address`."""
    try:
        requests.get(address, timeout=ANSWER_S)
        JobSubmissionClient(address)
        return
    except OSError:
        problem = (
            "no job server answers there: start one with `ray start --head` in an environment that "
            "has ray[default], or name another"
        )
    except AuthenticationError:
        problem = (
            "it wants a token: set RAY_AUTH_MODE=token, and put the cluster's token into "
            "RAY_AUTH_TOKEN or ~/.ray/auth_token"
        )
    except (RuntimeError, ValueError) as error:
        problem = str(error)
    _stop(f"RAY_ADDRESS={address}: {problem}")


def main() -> None:
    """Checks what can be checked here and becomes `ray job submit`."""
    address = os.environ.get("RAY_ADDRESS") or "http://127.0.0.1:8265"
    if not address.startswith(("http://", "https://")):
        _stop(
            f"RAY_ADDRESS={address} is no job server: give the http:// address of the cluster's "
            "dashboard, such as http://127.0.0.1:8265; without SUBMIT=1 a host:port is joined"
        )
    try:
        import aiohttp  # noqa: F401  (what ray[default] adds for its job client)
    except ImportError:
        _stop(f"Ray's job client is missing: {sys.executable} -m pip install 'ray[default]'")
    os.environ["RAY_ADDRESS"] = address
    check_server(address)
    command = sys.argv[1:]
    command.append(f"trainer.default_local_dir='{run_folder(command)}'")
    variables = {k: v for k, v in os.environ.items() if k.startswith(VARIABLES)}
    # Through a pipe: arguments, and so the keys of services, are for every user to read.
    out, into = os.pipe()
    os.write(into, json.dumps({"env_vars": variables}).encode())
    os.close(into)
    os.set_inheritable(out, True)
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit"]
    options = ["--working-dir", str(REPO), "--runtime-env", f"/dev/fd/{out}"]
    os.execv(sys.executable, [*submit, *options, "--", "python3", "-m", *command])


def _stop(problem: str) -> NoReturn:
    print(f"error: SUBMIT=1: {problem}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
