"""The actor's weights → the generation engines, in buckets, through host memory."""

from __future__ import annotations

from verl.workers.group import WorkerGroup

BUCKET_BYTES = 256 * 2**20
"""About the size of one bucket."""
BUCKETS_AHEAD = 2
"""Buckets that wait in the object store while the engines read one."""


def sync_weights(actor: WorkerGroup, rollout: WorkerGroup) -> None:
    """Gives every engine the actor's current weights.

    All actor ranks gather each tensor, rank 0 puts the buckets into Ray's object store, and every
    engine reads them from there, in the type it computes in.
    """
    dtype = rollout.call("weight_dtype")[0]
    arguments = [(dtype, BUCKET_BYTES)] * len(actor)
    for bucket in actor.references("export_weights", arguments, BUCKETS_AHEAD):
        rollout.call("load_weights", bucket)
