"""Linear layers for inference on a CPU, whose weights lie as oneDNN's matrix products want them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from verl.utils.device import multiplies_faster_reordered

ROWS = 32
"""oneDNN chooses the layout for inputs of so many rows. At 1 to 128 rows it was within 5 % of the
layouts chosen for just as many (benchmarks/LOG.md)."""


@torch.no_grad()
def reorder_linears(model: torch.nn.Module) -> None:
    """Makes the linear layers that gain by it multiply with a reordered copy of their weight, which
    takes as much memory again. Call it again when weights have changed."""
    for module in model.modules():
        if type(module) is torch.nn.Linear and multiplies_faster_reordered(module.weight):
            weight = torch.ops.mkldnn._reorder_linear_weight(module.weight, ROWS)
            module.forward = partial(_linear, weight, module.bias)


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
