"""∆L Normalization in TRL (1.16): `GRPOTrainer` with an `alpha`.

TRL generates a batch, scores it, shuffles it and cuts it into micro-batches, each of which it
averages. Only where a batch has just been scored are all its lengths known, so there the advantages
get their factors (`delta_l.advantage_scales`), and micro-batches are averaged over N·M cells, which
adds up to the same gradient however the batch was cut.
"""

from typing import Any, ClassVar

import torch
from trl import GRPOTrainer

from delta_l.weights import advantage_scales

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
"""Values of `loss_type` with one loss of a token, PPO's: they differ only in the aggregation."""
TOKEN_MEANS = ("cispo", "vespo")
SEQUENCE_MEANS = ("sapo",)


class DeltaLGRPOTrainer(GRPOTrainer):
    """`GRPOTrainer` whose loss is Σ_i w_i Σ_t ℓ_it with the weights of ∆L (arXiv 2509.07558).

    `alpha`: ∆L's exponent, from 0 (Dr. GRPO's aggregation) to 1 (least variance). The other
    arguments are TRL's. `loss_type` chooses ℓ and gives up its own aggregation; M is
    `max_completion_length`; L_i are the tokens of a completion that TRL doesn't mask (a tool's, and
    with `mask_truncated_completions` those of truncated completions), and are compared over the
    generation batch of all processes. Terms without an advantage keep TRL's own average: the KL
    term is 1/(N·M) of its sum over tokens (`sapo`: 1/(N·L_i)), the entropy bonus a mean over each
    micro-batch's tokens. Raises: ValueError for a `loss_type` that it doesn't know, a negative
    `alpha`, or without `max_completion_length`.
    """

    # For the model's card.
    _tag_names: ClassVar = ["trl", "grpo", "delta-l"]
    _name = "GRPO with ∆L Normalization"
    _paper: ClassVar = {
        "title": "∆L Normalization: Rethink Loss Aggregation in RLVR",
        "id": "2509.07558",
    }

    def __init__(self, *args: Any, alpha: float = 0.75, **kwargs: Any) -> None:
        if not alpha >= 0:
            raise ValueError(f"alpha={alpha}: choose 0 or more; the paper's are 0.75 and 1")
        super().__init__(*args, **kwargs)
        known = CLIPPED + TOKEN_MEANS + SEQUENCE_MEANS
        if self.loss_type not in known:
            raise ValueError(f"loss_type={self.loss_type!r}: ∆L knows {', '.join(known)}")
        if self.max_completion_length is None:
            raise ValueError("∆L needs max_completion_length, the M that it divides by")
        self.alpha = alpha
        if self.loss_type in CLIPPED:
            self.loss_type = "dr_grpo"  # averages over N·M cells

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        lengths = (batch["completion_mask"] * batch.get("tool_mask", 1)).sum(-1)
        everyones, M = self.accelerator.gather(lengths), self.max_completion_length
        # On the CPU: some devices have no float64.
        scales = advantage_scales(lengths.cpu(), self.alpha, everyones.cpu()).to(lengths.device)
        if self.loss_type in SEQUENCE_MEANS:
            scales = scales * lengths / M  # TRL divides by N·L_i
        elif self.loss_type in TOKEN_MEANS:  # by this, for each optimizer step its share of it
            cells = len(everyones) * M
            batch["num_items_in_batch"] = batch["num_items_in_batch"].new_tensor(cells)
        # [N], or of a subclass [N, T]
        batch["advantages"] = torch.einsum("n...,n->n...", batch["advantages"], scales)
        return batch
