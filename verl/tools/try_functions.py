"""Tries the user's functions of a configuration, which comes as YAML on standard input, as a run
does before anything starts. `DRY_RUN=1` calls it where there are any."""

import sys

from verl.config.load import exit_with
from verl.tools.memory_plan import read_config
from verl.trainer.ppo.workers import loss_config
from verl.utils import own_functions


def main() -> None:
    """Ends with 2 and a line about a function that can't be used."""
    config = read_config(sys.stdin.read())
    try:
        own_functions.check(config, loss_config(config))
    except ValueError as error:
        exit_with(2, f"error: {error}")


if __name__ == "__main__":
    main()
