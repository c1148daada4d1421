"""A reward model or a critic: a decoder with a head of one number, a Hugging Face sequence
classifier."""

from typing import Any

from torch import Tensor, nn

from verl.config.base import ClassifierConfig
from verl.models.folder import check_weights, fetch, skeleton
from verl.models.guard import check_family
from verl.models.hf import check_split, load_hf_config
from verl.models.packing import Batch


class ScoreModel(nn.Module):
    """Decoder and `score` head with one forward pass."""

    shares_prompts = False  # whether a packed prompt may be computed once for its responses

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
        """(scores, scores) at `batch.predictors`, float32 [T] each; they have no temperature. A
        critic's are the values before each token of a response. What a reward model is to score is
        a sample's prompt, with any one token as the response."""
        decoder, options = self.lm.base_model, batch.model_kwargs | {"use_cache": False}
        output = decoder(input_ids=batch.input_ids, position_ids=batch.position_ids, **options)
        hidden = output.last_hidden_state.flatten(0, 1)[batch.predictors]  # [T, H]
        scores = batch.of_all_ranks(hidden.float() @ self.lm.score.weight.float()[0])
        return scores, scores


def check_score_model(
    model: ClassifierConfig, longest: int, split: int = 1, vocabulary: int = 0
) -> None:
    """Downloads the model, if it is one of the hub. `split`: ranks that split its sequences;
    `vocabulary`: tokens that it must know. Raises: ValueError unless it is a decoder whose files
    hold a head of one label (of a critic, also one without a head)."""
    config, name = load_hf_config(model), f"{model.section}.path={model.path}"
    kind = ", ".join(config.architectures or ["model without a name"])
    if "SequenceClassification" not in kind and not model.new_weights:
        raise ValueError(f"{name} is a {kind}: a reward model is one …ForSequenceClassification")
    if (labels := config.num_labels) != 1:
        remedy = "take one with a single label (in its config.json: num_labels, or id2label)"
        raise ValueError(f"{name} has {labels} labels, which are no score: {remedy}")
    check_split(config.get_text_config(), split, f"{name} on {split} ranks")
    if (known := config.get_text_config().vocab_size) < vocabulary:
        raise ValueError(
            f"{name} knows {known} tokens, and the policy's tokenizer has {vocabulary}"
        )
    fetch(model, longest)
    lm = skeleton(model)
    check_weights(model)
    head = getattr(lm, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"{name}: a {kind} is not supported, only decoders with a `score` head")
    check_family(lm, model)
