"""What the tests of models share."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from tests.helpers import free_address


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=free_address(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
