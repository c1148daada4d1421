"""A reward model: a decoder with a head of one number, a Hugging Face sequence classifier."""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from verl.config.base import ClassifierConfig
from verl.models.folder import check_weights, fetch, skeleton
from verl.models.guard import check_family
from verl.models.hf import load_hf_config
from verl.models.packing import Batch


class RewardModel(nn.Module):
    """Decoder and `score` head with one forward pass."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
        """(scores, scores) at `batch.predictors`, float32 [T] each; they have no temperature. What
        is to be scored is a sample's prompt, with any one token as the response."""
        decoder, options = self.lm.base_model, batch.model_kwargs | {"use_cache": False}
        output = decoder(input_ids=batch.input_ids, position_ids=batch.position_ids, **options)
        hidden = output.last_hidden_state.flatten(0, 1)[batch.predictors]  # [T, H]
        scores = linear(hidden.float(), self.lm.score.weight.float())[:, 0]
        return scores, scores


def check_reward_model(model: ClassifierConfig, longest: int) -> None:
    """Downloads the model, if it is one of the hub. Raises: ValueError unless it is a decoder whose
    files hold a head of one label."""
    config, name = load_hf_config(model), f"{model.section}.path={model.path}"
    kind = ", ".join(config.architectures or ["model without a name"])
    if "SequenceClassification" not in kind:
        raise ValueError(f"{name} is a {kind}: a reward model is one …ForSequenceClassification")
    if (labels := config.num_labels) != 1:
        remedy = "take one with a single label (in its config.json: num_labels, or id2label)"
        raise ValueError(f"{name} has {labels} labels, which are no score: {remedy}")
    fetch(model, longest)
    check_weights(model)
    lm = skeleton(model)
    head = getattr(lm, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"{name}: a {kind} is not supported, only decoders with a `score` head")
    check_family(lm, model)
