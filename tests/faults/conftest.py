"""The run that the fault tests disturb, and the same run undisturbed."""

from __future__ import annotations

from tests.trainer.test_main_ppo import finished, settings

__all__ = ["finished", "settings"]
