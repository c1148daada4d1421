"""Products of linear layers for inference on a CPU: with oneDNN's order of the weights, and one for
all layers of the same input."""

from collections.abc import Sequence
from functools import partial
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from verl.utils.device import multiplies_faster_reordered

REORDERED_ROWS = 32  # the layout is chosen for such inputs; good for 1 to 128 (benchmarks/LOG.md)
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear layers of a module that most models give the same input."""

_numbers = count()
_joint = WeakValueDictionary[int, "JointLinear"]()


class JointLinear:
    """Linear layers with one product for all of them: the first that gets an input computes the
    others' outputs, too. Whatever inputs they get, each returns its own product."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers, self.number = layers, next(_numbers)
        _joint[self.number] = self
        self.sizes = [layer.out_features for layer in layers]
        self.reorder()
        for i, layer in enumerate(layers):
            layer.forward = partial(self.output, i)  # type: ignore[method-assign]  # its own

    @torch.no_grad()
    def reorder(self) -> None:
        """Takes the layers' present weights."""
        weights = [layer.weight.data for layer in self.layers]
        biases = [layer.bias.data for layer in self.layers if layer.bias is not None]
        bias = torch.cat(biases) if biases else None
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]  # without a copy
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight, REORDERED_ROWS)
        rest: dict[str, Any] = {"attr": "none", "scalars": [], "algorithm": ""}
        self.product = partial(torch.ops.mkldnn._linear_pointwise, W=reordered, B=bias, **rest)
        self.input: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}  # of the input, those nobody has asked for yet

    def output(self, i: int, x: Tensor) -> Tensor:
        """That of layer `i`."""
        if x is not self.input or i not in self.outputs:
            if torch.compiler.is_compiling():
                every = product_of(x, self.number, sum(self.sizes))
            else:
                every = self.product(x)
            self.input, self.outputs = x, dict(enumerate(every.split(self.sizes, -1)))
        found = self.outputs.pop(i)
        if not self.outputs:
            self.input = None
        return found


@torch.library.custom_op("verl::product", mutates_args=())
def product_of(x: Tensor, number: int, size: int) -> Tensor:
    """The `size` outputs of the `JointLinear` with this number, as an operation of a graph."""
    return _joint[number].product(x)


@product_of.register_fake
def _(x: Tensor, number: int, size: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], size)


def join_linears(model: nn.Module) -> list[JointLinear]:
    """Lets linear layers that gain by it multiply with a reordered copy of their weights, those of
    the same input together. New weights count after `JointLinear.reorder`."""
    found = []
    for parent in model.modules():
        left = {name: m for name, m in parent.named_children() if type(m) is nn.Linear}
        groups: list[list[nn.Linear]] = []
        for names in SAME_INPUT:
            same = [left[name] for name in names if name in left]
            if len({(layer.bias is None, layer.in_features) for layer in same}) == 1:
                groups.append(same)
                left = {name: m for name, m in left.items() if m not in same}
        groups += [[layer] for layer in left.values()]
        for layers in groups:
            if multiplies_faster_reordered(*(layer.weight for layer in layers)):
                found.append(JointLinear(layers))
    return found
