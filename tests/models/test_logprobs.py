"""Chunked log-probabilities and entropies against a plain `log_softmax`."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from verl.models.logprobs import chunked_log_probs

ROWS, HIDDEN, VOCABULARY = 7, 5, 11


def inputs(dtype: torch.dtype, with_bias: bool = True, rows: int = ROWS):
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,)
    leaves = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]
    targets = torch.randint(VOCABULARY, (rows,), generator=generator)
    return leaves if with_bias else leaves[:2], targets


def plain(hidden, weight, bias, targets, temperature):
    logits = hidden @ weight.T + (0 if bias is None else bias)
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def objective(log_probs, entropy):
    """Something that depends on every number in a way of its own."""
    scale = torch.linspace(0.5, 2.0, len(log_probs), dtype=torch.float64)
    return (scale * log_probs).sum() - (scale.flip(0) * entropy).sum() * 1.5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tile", [(1, 11), (3, 4), (7, 1), (2, 11), None])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients(dtype, with_bias, tile, temperature):
    leaves, targets = inputs(dtype, with_bias)
    bias = leaves[2] if with_bias else None
    ours = chunked_log_probs(leaves[0], leaves[1], targets, temperature, bias, tile)
    theirs = plain(leaves[0], leaves[1], bias, targets, temperature)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-5)
    for a, b, leaf in zip(
        torch.autograd.grad(objective(*ours), leaves),
        torch.autograd.grad(objective(*theirs), leaves),
        leaves,
        strict=True,
    ):
        assert a.dtype == leaf.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("index", [0, 1])
def test_gradient_of_one_result_alone(index):
    leaves, targets = inputs(torch.float64)
    ours = chunked_log_probs(leaves[0], leaves[1], targets, 0.7, leaves[2], (2, 3))[index]
    theirs = plain(*leaves, targets, 0.7)[index]
    for a, b in zip(
        torch.autograd.grad(ours.sum(), leaves),
        torch.autograd.grad(theirs.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("result", ["both", "log_probs", "entropy"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("width", [1, 2, 4, 11])  # with 1, the second of the tiles is all masked
def test_tokens_of_probability_zero_are_as_if_they_were_not_there(width, temperature, result):
    leaves, _ = inputs(torch.float32)
    hidden, weight, bias = leaves
    allowed = torch.tensor([0, 2, 3, 7, 8, 10])
    place = torch.tensor([1, 5, 0, 0, 3, 2, 4])  # of each target among the allowed tokens
    masked = torch.full_like(bias, -torch.inf)
    masked[allowed] = bias.detach()[allowed]
    masked.requires_grad_()
    ours = chunked_log_probs(hidden, weight, allowed[place], temperature, masked, (3, width))
    theirs = plain(hidden, weight[allowed], bias[allowed], place, temperature)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    def loss(log_probs, entropy):
        parts = {"log_probs": (log_probs, 0 * entropy), "entropy": (0 * log_probs, 2 * entropy)}
        return objective(*parts.get(result, (log_probs, entropy)))

    gradients = torch.autograd.grad(loss(*ours), (hidden, weight, masked))
    expected = torch.autograd.grad(loss(*theirs), (hidden, weight, bias))
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_capped_logits(temperature):
    """c·tanh(x / c), and then the temperature."""
    leaves, targets = inputs(torch.float32)
    hidden, weight, bias = leaves
    ours = chunked_log_probs(hidden, weight, targets, temperature, bias, (3, 4), cap=1.5)
    log_p = (1.5 * torch.tanh((hidden @ weight.T + bias) / 1.5) / temperature).log_softmax(-1)
    theirs = log_p[torch.arange(len(targets)), targets], -(log_p.exp() * log_p).sum(-1)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(objective(*ours), leaves)
    expected = torch.autograd.grad(objective(*theirs), leaves)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_large_logits_do_not_overflow(width):
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    log_probs, entropy = chunked_log_probs(hidden, weight, torch.tensor([0, 0]), tile=(2, width))
    assert log_probs.tolist() == [0, -2e4]
    assert entropy.tolist() == [0, 0]
    (log_probs.sum() + entropy.sum()).backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.0], [2.0]]))


def test_zero_rows():
    leaves, targets = inputs(torch.float32, rows=0)
    log_probs, entropy = chunked_log_probs(leaves[0], leaves[1], targets, 1.0, leaves[2])
    assert log_probs.shape == entropy.shape == (0,)
    (log_probs.sum() + entropy.sum()).backward()
    assert leaves[0].grad.shape == (0, HIDDEN)
    assert not leaves[1].grad.any()
    assert not leaves[2].grad.any()


def test_bfloat16_parameters_get_bfloat16_gradients():
    leaves, targets = inputs(torch.bfloat16)
    ours = chunked_log_probs(leaves[0], leaves[1], targets, 1.0, leaves[2], (3, 4))
    exact = plain(*(leaf.float() for leaf in leaves), targets, 1.0)
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.05)
    gradients = torch.autograd.grad(objective(*ours), leaves)
    expected = torch.autograd.grad(objective(*exact), leaves)
    for a, b in zip(gradients, expected, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.1)


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_logits_of_bfloat16_are_not_rounded():
    """To bfloat16, 20.06 and 20.0 are the same."""
    (hidden, weight), targets = inputs(torch.float32, with_bias=False)
    halves = [(10 * x).bfloat16() for x in (hidden, weight)]
    exact = plain(*(x.double() for x in halves), None, targets, 1.0)
    for ours, theirs in zip(chunked_log_probs(*halves, targets), exact, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-4)


def test_no_more_logits_than_a_tile_exist_at_once():
    hidden = torch.randn(64, 2, requires_grad=True)
    weight = torch.randn(50, 2, requires_grad=True)
    targets = torch.randint(50, (64,))
    largest = {}
    for tile in ((4, 50), (64, 50), (16, 16)):
        with LargestTensor() as seen:
            log_probs, entropy = chunked_log_probs(hidden, weight, targets, tile=tile)
            (log_probs.sum() + entropy.sum()).backward()
        largest[tile] = seen.elements
    assert largest == {(4, 50): 4 * 50, (64, 50): 64 * 50, (16, 16): 16 * 16}


def test_a_largest_logit_that_comes_late_counts_as_one_that_comes_first():
    """Rising, falling: each tile after the first rescales what came before, or itself."""
    weight = torch.linspace(-30, 30, 12)[:, None]
    hidden, targets = torch.tensor([[1.0], [-1.0]]), torch.tensor([3, 8])
    found = chunked_log_probs(hidden, weight, targets, tile=(2, 2))
    expected = plain(hidden.double(), weight.double(), None, targets, 1.0)
    assert found[0][0] == found[0][1] and found[1][0] == pytest.approx(found[1][1].item())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-6)
