"""What can go wrong with rewards in mid-run. None of it is ever a score."""


class RewardError(RuntimeError):
    """A response could not be scored."""


class RewardServerError(RewardError):
    """A server that rewards depend on has not answered for too long."""
