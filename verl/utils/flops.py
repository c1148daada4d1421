"""Floating-point operations of an update, for `perf/mfu`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from verl.utils.memory import weight_shapes


def update_flops(model: dict[str, Any], prompts: ArrayLike, responses: ArrayLike) -> float:
    """Of a forward and a backward pass over sequences of these many tokens of prompt and response.

    A matrix product costs 2 operations for each of its weights and tokens, and its backward pass
    twice that. A sequence of P + R tokens goes through the decoder layers without its last one, T =
    P + R − 1 tokens, and its R hidden states that predict a response token go through the head:

        6·(weights of all layers)·T + 6·(vocabulary × hidden)·R + 12·layers·heads·head_dim·T(T+1)/2

    The last term is attention: each of the T(T+1)/2 causal pairs costs a product with a key and one
    with a value. Not counted: what is no matrix product (embedding, norms, rotary, softmax), and
    what gradient checkpointing computes again, which is no progress. A sliding window isn't looked
    at.

    Args:
        model: the content of config.json. prompts, responses: lengths in tokens, [N].

    Raises: ValueError for a model whose layers are not known here.

    Example: one layer, hidden and inner size 2, one head, vocabulary 5, P = 1, R = 2: 28 weights in
    the layer, so 6·28·2 + 6·10·2 + 12·1·2·3 = 528.
    """
    _, layer = weight_shapes(model)
    layers, wide = model["num_hidden_layers"], layer[0][0]
    weights = layers * sum(rows * columns for rows, columns in layer if columns > 1)
    head = model["vocab_size"] * model["hidden_size"]
    R = np.asarray(responses, np.float64)
    T = np.asarray(prompts, np.float64) + R - 1
    pairs = T * (T + 1) / 2
    return float((6 * weights * T + 6 * head * R + 12 * layers * wide * pairs).sum())
