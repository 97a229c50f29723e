"""Linear layers with quantized weights: nn.Linear, and GPT-2's Conv1D, which stores W.T."""

import torch
from torch import Tensor, nn

from gpu_poor.formats import Storage
from gpu_poor.nn.base import QuantizedModule, Stored, is_plain, register
from gpu_poor.ops.common import check_float

#: Subclasses of nn.Linear with a forward of their own that still is ``x @ W.T + b``.
PLAIN_LINEARS = {"FalconLinear"}
#: Of input scales, whose numbers are within 2 ** 10, up and down.
INPUT_SCALE = torch.float16


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, told by name so that transformers need not be imported."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


@register
class QuantizedLinear(QuantizedModule):
    """``y = x @ w.T + bias``; not an nn.Linear, for ``weight`` is no float matrix.

    Where an input scale s is kept, it is ``y = (s x) @ w'.T + bias``: what is stored is
    ``w' = w diag(1 / s)``, and :meth:`dequantize` gives w, exactly so if s is a power of two. The
    buffer ``input_scale`` is float16 ``[in_features]``, above 0, else None.

    Args:
        stored: the weight, ``[out_features, in_features]``, with its input scale.
        bias: ``[out_features]`` of a float dtype, or None.
        activation: "a8", "a16" or "a32".
        dtype: of the float weight.
    """

    kind = "linear"

    def __init__(
        self,
        stored: Stored,
        bias: Tensor | None = None,
        activation: str = "a16",
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(activation, dtype)
        self.out_features, self.in_features = stored.shape
        self.set_weight("weight", stored)
        self.register_buffer("input_scale", stored.input_scale)
        self.register_parameter("bias", bias)

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        if not isinstance(module, nn.Linear) or not is_plain(module):
            return False
        # nn.MultiheadAttention reads the weight of its out_proj and never calls it.
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return False
        plain = type(module).forward is nn.Linear.forward or type(module).__name__ in PLAIN_LINEARS
        return plain and set(module._parameters) == {"weight", "bias"}

    @classmethod
    def from_float(
        cls, module: nn.Module, weights: dict[str, Stored], activation: str
    ) -> "QuantizedLinear":
        return cls(weights["weight"], module.bias, activation, module.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if (input_scale := self._buffers["input_scale"]) is None:
            return self._linear(x)
        check_float("linear", "x", x.dtype)
        # In float32: float16 may not hold the products, though it holds their sums.
        return self._linear(x.float() * input_scale).to(x.dtype)

    def _linear(self, x: Tensor) -> Tensor:
        # The dicts, for nn.Module.__getattr__ costs a microsecond a name and a token has hundreds.
        parameters = self._parameters
        return self.formats["weight"].linear(
            x,
            parameters["weight"],
            self.scale("weight_scale"),
            parameters["bias"],
            self.out_features,
            self._activation_bits,
        )

    def storage(self) -> dict[str, Storage]:
        found = super().storage()
        if self._buffers["input_scale"] is not None:
            found["input_scale"] = (self.in_features,), INPUT_SCALE
        return found

    def dequantize(self, dtype: torch.dtype = torch.float32, name: str = "weight") -> Tensor:
        if self.input_scale is None:
            return super().dequantize(dtype, name)
        return (super().dequantize(torch.float32, name) * self.input_scale).to(dtype)

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Module:
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight = nn.Parameter(self.dequantize(dtype or self.dtype))
        linear.bias = self.bias
        return linear

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.format.name}, {self.activation}"
            f"{'' if self.input_scale is None else ', input_scale'}"
        )


@register
class QuantizedConv1D(QuantizedLinear):
    """A linear made from transformers' Conv1D: stored ``[N, K]`` like any other linear."""

    kind = "conv1d"

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return _is_conv1d(module) and is_plain(module)

    @classmethod
    def to_rows(cls, source: nn.Module, name: str, tensor: Tensor) -> Tensor:
        return tensor.t()

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Module:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            conv = Conv1D(self.out_features, self.in_features)
        conv.weight = nn.Parameter(self.dequantize(dtype or self.dtype).t().contiguous())
        conv.bias = self.bias
        return conv
