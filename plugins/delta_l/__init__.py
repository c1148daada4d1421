"""∆L Normalization (arXiv 2509.07558) for trainers that have none: `delta_l.trl`, `delta_l.verl`,
`delta_l.skyrl`. Nothing but torch is imported here."""

from delta_l.weights import advantage_scales, response_weights

__all__ = ["advantage_scales", "response_weights"]
