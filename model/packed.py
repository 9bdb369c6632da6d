"""Linear layers for generation on a CPU: weights laid out once as oneDNN multiplies them.

A step of generation multiplies each matrix by a few rows, so it waits for memory, and torch's product reads a weight
[out, in] slower than memory gives it. PyTorch's own compiler packs frozen weights in the same way. What it gained:
records/2026-11-27-smollm2-generation.
"""

import torch
from torch import Tensor, nn

from model.layers import Linear

ROWS = 8  # the number of rows that the layout is chosen for; others cost nothing measurable


def packs(weight: Tensor) -> bool:
    """Whether this machine can pack the weight: on a CPU, in fp32, or in bf16 where the CPU multiplies it."""
    ops = torch.ops.mkldnn
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not hasattr(ops, "_linear_pointwise"):
        return False
    return weight.dtype == torch.float32 or weight.dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported()


class PackedLinear(nn.Module):
    """A frozen Linear whose weight [out, in] is packed. Inputs must have the weight's dtype; no gradients."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.shape = tuple(weight.shape)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)
        self.bias = None if bias is None else bias.detach().to(weight.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] as one plain tensor of ``dtype``."""
        return self.packed.to_dense().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def head(weight_VD: Tensor):
    """The function from hidden states [N, D] to logits [N, V], its weight packed where that can be done."""
    return PackedLinear(weight_VD) if packs(weight_VD) else lambda hidden_ND: hidden_ND @ weight_VD.t()


def pack(model: nn.Module) -> nn.Module:
    """``model`` with its Linear layers packed in place where that can be done, one at a time: a layer's weight is freed
    before the next is packed. The model is for generation alone from then on."""
    for path, layer in [*model.named_modules()]:
        if type(layer) is Linear and layer.weight.dtype == model.dtype and packs(layer.weight):
            model.set_submodule(path, PackedLinear(layer.weight, layer.bias))
            layer.weight = None  # the list above still holds the layer
    return model
