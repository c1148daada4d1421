"""Choices that depend on the device, where no GPU is."""

import pytest
import torch
import transformers.utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from verl.models.packing import over_ranks
from verl.utils import device

GPU = torch.device("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_torch_cannot_use_is_an_error_with_its_reason() -> None:
    with pytest.raises(ValueError, match=r"PyTorch can't use the GPU: .*\(python -m verl\.tools"):
        device.get_device("cuda")
    assert device.get_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("installed", "capability", "dtype", "name"),
    [
        (True, (9, 0), torch.bfloat16, "flash_attention_3"),
        (True, (8, 0), torch.bfloat16, "packed_varlen"),
        (True, (10, 0), torch.bfloat16, "packed_varlen"),
        (False, (9, 0), torch.bfloat16, "packed_varlen"),
        (True, (9, 0), torch.float32, "packed_attention"),
    ],
)
def test_the_attention_of_packed_rows(
    installed: bool,
    capability: tuple[int, int],
    dtype: torch.dtype,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transformers.utils, "is_flash_attn_3_available", lambda: installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert device.default_packed_attention(GPU, dtype) == name
    assert ALL_ATTENTION_FUNCTIONS[name].func is over_ranks  # which splits sequences
    assert device.default_packed_attention(torch.device("cpu"), dtype) == "packed_attention"


def test_weights_take_the_fastest_way_that_the_engine_knows() -> None:
    ways = ("host", "ipc", "nccl")
    assert device.default_weight_transfer("cuda", ways, split=False) == "ipc"
    assert device.default_weight_transfer("cuda", ways, split=True) == "nccl"
    assert device.default_weight_transfer("cuda", ("host",), split=True) == "host"
    assert device.default_weight_transfer("cpu", ways, split=False) == "host"


def test_products_of_16_bits_are_kept_in_32() -> None:
    row, column = torch.tensor([[256.0, 1.0]]).bfloat16(), torch.ones(2, 1).bfloat16()
    assert device.product(row, column).item() == 257.0  # a number that bfloat16 doesn't have
    assert (row @ column).item() != 257.0
