"""The actor's weights → the generation engines, in buckets, through host memory."""

from __future__ import annotations

import ray

from verl.workers.group import WorkerGroup

BUCKET_BYTES = 256 * 2**20
"""At most about this much of the model is on its way at a time."""


def sync_weights(actor: WorkerGroup, rollout: WorkerGroup) -> None:
    """Gives every engine the actor's current weights.

    All actor ranks gather each tensor, rank 0 puts the buckets into Ray's object store, and every
    engine reads them from there, in the type it computes in.
    """
    dtype = rollout.call("weight_dtype")[0]
    first, *others = actor.streams("export_weights", [(dtype, BUCKET_BYTES)] * len(actor))
    for bucket in first:
        rollout.call("load_weights", bucket)
    for stream in others:
        ray.get(list(stream))
