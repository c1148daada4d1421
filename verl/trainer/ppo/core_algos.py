"""The names by which users of verl know the maths of a step; it stands in `verl.algorithms`."""
# ruff: noqa: F401

from verl.algorithms.advantages import ADVANTAGES, advantages
from verl.algorithms.kl import KL_ESTIMATORS, adapted_kl_coef, kl_divergence
from verl.algorithms.policy_losses import POLICY_LOSSES, policy_loss
from verl.algorithms.rollout_correction import rollout_is_weights
from verl.algorithms.weights import WEIGHTS, response_weights
