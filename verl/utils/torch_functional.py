"""verl's functions of masked tensors, by its names: values and mask of one shape, such as [batch,
time]. The trainer itself needs none of them."""

from typing import Any

import torch
from torch import Tensor

from verl.algorithms.advantages import whitened


def masked_sum(values: Tensor, mask: Tensor, axis: Any = None) -> Tensor:
    """Σ of the values where the mask is 1, over all or some axes; others may even be NaN."""
    return torch.where(mask.bool(), values, 0.0).sum(axis)


def masked_mean(values: Tensor, mask: Tensor, axis: Any = None) -> Tensor:
    """Their mean, over all or some axes; 0 without any."""
    return masked_sum(values, mask, axis) / (mask.sum(axis) + 1e-8)


def masked_mean_allavg(values: Tensor, mask: Tensor) -> Tensor:
    """Their sum over the number of *all* cells, masked ones included, as in the code of arXiv
    2509.07558: the weights `dr-grpo`, with the width of the tensor as M."""
    return masked_sum(values, mask) / values.numel()


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Their variance. Raises: ValueError if it is to be unbiased, of fewer than two values."""
    count = mask.sum()
    if unbiased and count < 2:
        raise ValueError(f"an unbiased variance takes two values or more, not {int(count)}")
    variance = masked_mean((values - masked_mean(values, mask)) ** 2, mask)
    return variance * count / (count - 1) if unbiased else variance


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(v − mean) / sqrt(variance + 1e-8) everywhere, as `whitened`; + mean without `shift_mean`. Of
    one value the variance is 0. No value may be NaN."""
    white = whitened(values.flatten(), mask.flatten()).view_as(values)
    return white if shift_mean else white + masked_mean(values, mask)
