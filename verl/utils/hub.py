"""The Hugging Face hub, and machines that can't reach it."""

import logging
import os
import threading
from contextlib import suppress
from functools import cache

from huggingface_hub import constants, get_session

logger = logging.getLogger(__name__)

ANSWER_S = 5


@cache
def ask_hub() -> None:
    """Unless the hub answers, this process and those that it starts take what the hub's cache holds
    (HF_HUB_OFFLINE): else every file would be asked for six times, which takes half a minute."""
    answers: list[object] = []

    def ask() -> None:
        with suppress(Exception):  # of any of the libraries beneath
            answers.append(get_session().head(constants.ENDPOINT))

    if "HF_HUB_OFFLINE" not in os.environ:
        # In a thread: the name's look-up knows no time limit.
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(ANSWER_S)
        if not answers:
            text = "%s doesn't answer: only its cache counts (HF_HUB_OFFLINE=0 waits for it)"
            logger.info(text, constants.ENDPOINT)
            os.environ["HF_HUB_OFFLINE"] = "1"
            constants.HF_HUB_OFFLINE = True  # what the variable said when this was imported
