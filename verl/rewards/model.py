"""What a reward model reads: the conversation with the response, in its own chat template."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from verl.config.schema import Config
from verl.models.hf import load_tokenizer, num_embeddings, vocabulary_size
from verl.protocol import Prompt, Sample
from verl.rewards.math import RewardError

logger = logging.getLogger(__name__)

END = np.zeros(1, np.int32)  # a response of which only the place counts (`ScoreModel.forward`)


class Conversations:
    """Responses → what the reward model scores, with `input_tokenizer` as in verl 0.4's
    `RewardModelWorker`, but that only the token that ended the response is left out."""

    def __init__(self, config: Config) -> None:
        """Raises: ValueError if the model has no chat template, or lacks tokens of the policy."""
        data, reward, policy = config.data, config.reward_model, config.actor_rollout_ref.model
        model = reward.model.classifier()
        self.size, self.path = num_embeddings(model), model.path
        self.max_length = reward.max_length or data.max_prompt_length + data.max_response_length
        self.tokenizer: Any = None  # None: the policy's tokens are read as they are
        if reward.model.input_tokenizer is not None:
            self.tokenizer = load_tokenizer(model)
            if getattr(self.tokenizer, "chat_template", None) is None:
                remedy = "add one, or set reward_model.model.input_tokenizer=null if it reads the"
                problem = f"{self.path}: the tokenizer has no chat template: {remedy}"
                raise ValueError(f"{problem} policy's tokens as they are")
        elif (most := min(vocabulary_size(policy), num_embeddings(policy))) > self.size:
            problem = f"the policy has {most} tokens, and the reward model {self.path} {self.size}"
            raise ValueError(f"{problem}: leave out reward_model.model.input_tokenizer=null")

    def render(self, prompt: Prompt, text: str) -> str:
        """The conversation, with `text` as the assistant's turn. Raises: ValueError if the template
        rejects it."""
        chat = [*(prompt.messages or ()), {"role": "assistant", "content": text}]
        try:
            return str(self.tokenizer.apply_chat_template(chat, tokenize=False))
        except Exception as error:  # templates raise what they like, Jinja's own errors included
            problem = f"the chat template of {self.path} rejects it: {error}"
            raise ValueError(f"{prompt.location}: {problem}") from error

    def read(self, samples: Sequence[Sample], texts: Sequence[str]) -> list[Sample]:
        """A sample for each, with the whole conversation as its prompt. Raises: RewardError for a
        token that the model lacks."""
        if self.tokenizer is None:
            rows = [np.concatenate([s.prompt.token_ids, s.response_ids]) for s in samples]
        else:
            rendered = [self.render(s.prompt, t) for s, t in zip(samples, texts, strict=True)]
            options = {"add_special_tokens": False, "verbose": False}
            rows = [np.asarray(i) for i in self.tokenizer(rendered, **options)["input_ids"]]
        if cut := sum(len(row) > self.max_length for row in rows):
            text = "%d of %d conversations were cut on the right to reward_model.max_length=%d"
            logger.warning(text, cut, len(rows), self.max_length)
        found: list[Sample] = []
        for s, row in zip(samples, rows, strict=True):
            if row.max() >= self.size:
                problem = f"the tokenizer gives token {row.max()}, but the model has {self.size}"
                raise RewardError(f"reward model {self.path}, {s.prompt.location}: {problem}")
            prompt = Prompt(s.prompt.index, row[: self.max_length], s.prompt.data_source, None)
            found.append(Sample(prompt, s.group, END, "length", s.response_index))
        return found
