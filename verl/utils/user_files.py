"""The Python files of users as modules `verl.utils.user_files.NAME`, for child processes, too."""

import os

FOLDERS = "VERL_USER_FILES"  # environment variable: where they are
__path__ = [*filter(None, os.environ.get(FOLDERS, "").split(os.pathsep))]
