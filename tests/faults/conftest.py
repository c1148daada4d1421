"""The run that the fault tests disturb, and the same run undisturbed."""

from tests.trainer.test_main_ppo import finished, settings
from tests.trainer.test_math_run import settings as math_settings

__all__ = ["finished", "math_settings", "settings"]
