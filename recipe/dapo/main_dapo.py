"""DAPO (arXiv 2503.14476) on the trainer of main_ppo, with other defaults:
`python -m recipe.dapo.main_dapo key=value …`."""

from pathlib import Path

from verl.config.load import entry_point
from verl.trainer.main_ppo import run

if __name__ == "__main__":
    entry_point(run, "dapo_trainer", Path(__file__).parent / "config")
