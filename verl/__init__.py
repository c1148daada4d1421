"""Reinforcement learning with verifiable rewards, with ∆L Normalization."""

import gc

# Torch and transformers make 400,000 objects that stay. With Python's own threshold of 700 the
# collector looks through them again and again: a fifth of the time that their import takes.
gc.set_threshold(10_000)
