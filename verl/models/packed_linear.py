"""Linear layers for inference on a CPU, whose weights lie as oneDNN's matrix products want them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from verl.utils.device import multiplies_faster_packed

ROWS = 32
"""oneDNN chooses the layout for inputs of so many rows; it is good for others, too."""


@torch.no_grad()
def pack_linears(model: torch.nn.Module) -> None:
    """Makes the linear layers that gain by it multiply with a packed copy of their weight. Call it
    again when weights have changed."""
    for module in model.modules():
        if type(module) is torch.nn.Linear and multiplies_faster_packed(module.weight):
            packed = torch.ops.mkldnn._reorder_linear_weight(module.weight, ROWS)
            module.forward = partial(_linear, packed, module.bias)


def _linear(packed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
