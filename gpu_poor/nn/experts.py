"""Mixture-of-experts layers whose experts transformers fuses into 3-D parameters.

transformers marks such a class with ``@use_experts_implementation``, which means that any
implementation of "route, up, gate, down, weigh" may replace its forward; this file is ours. Every
expert is a pair of quantized linears on the 2-D slices ``weight[e]``, ``scale[e]``.
"""

import torch
from torch import Tensor, nn

from gpu_poor.nn.base import QuantizedModule, Stored, is_plain, register

_UP = ("gate_up_proj", "up_proj")


def _up_name(module: nn.Module) -> str | None:
    return next((name for name in _UP if name in module._parameters), None)


@register
class QuantizedExperts(QuantizedModule):
    """``sum_k weight_k * down_e(act(gate_e(x)) * up_e(x))`` over the k experts e of each token.

    ``gate_up_proj`` (``up_proj`` without a gate) stands for ``[E, N, K]`` and ``down_proj`` for
    ``[E, K, N']``, whichever way the float class stores them.
    """

    kind = "experts"

    def __init__(self, module: nn.Module, weights: dict[str, Stored], activation: str):
        super().__init__(activation, module.down_proj.dtype)
        # The class's own gate reads what it likes (act_fn, alpha, limit...), so keep it all.
        plain = {k: v for k, v in vars(module).items() if k not in vars(nn.Module())}
        self.__dict__.update(plain)
        for name, child in module.named_children():
            self.add_module(name, child)
        self.float_class = type(module)
        self.up_name, _ = self.weight_names = self.weights_of(module)
        self.num_experts = module.down_proj.shape[0]
        for name, stored in weights.items():
            self.set_weight(name, stored)
            bias = module._parameters.get(f"{name}_bias")
            self.register_parameter(f"{name}_bias", bias)

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        up = _up_name(module)
        known = {up, f"{up}_bias", "down_proj", "down_proj_bias"}
        return (
            is_plain(module)
            and up is not None
            and {up, "down_proj"} <= set(module._parameters) <= known
            and all(module._parameters[name].dim() == 3 for name in (up, "down_proj"))
            # What @use_experts_implementation leaves on its instances.
            and hasattr(module, "is_transposed")
            and hasattr(type(module), "_apply_gate")
            and not getattr(module, "has_post_expert_norm", False)
        )

    @classmethod
    def weights_of(cls, module: nn.Module) -> tuple[str, ...]:
        return (_up_name(module), "down_proj")

    @classmethod
    def to_rows(cls, source: nn.Module, name: str, tensor: Tensor) -> Tensor:
        return tensor.transpose(-1, -2) if source.is_transposed else tensor

    @classmethod
    def from_float(
        cls, module: nn.Module, weights: dict[str, Stored], activation: str
    ) -> "QuantizedExperts":
        return cls(module, weights, activation)

    def _project(self, name: str, expert: int, x: Tensor) -> Tensor:
        weight, scale = self._parameters[name], self.scale(f"{name}_scale")
        bias = self._parameters[f"{name}_bias"]
        return self.formats[name].linear(
            x,
            weight[expert],
            None if scale is None else scale[expert],
            None if bias is None else bias[expert],
            self.shapes[name][-2],
            self._activation_bits,
        )

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        x = self._project(self.up_name, expert, x)
        gated = self.up_name == "gate_up_proj"
        x = self.float_class._apply_gate(self, x) if gated else self.act_fn(x)
        return self._project("down_proj", expert, x)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states ``[T, H]``, top_k_index int ``[T, k]``, top_k_weights ``[T, k]``.

        An index of ``num_experts`` or more marks a slot without an expert and adds nothing.
        """
        if torch.compiler.is_compiling():
            return self._forward_dense(hidden_states, top_k_index, top_k_weights)
        top_k = top_k_index.shape[1]
        flat = top_k_index.reshape(-1)
        order = flat.argsort(stable=True)  # slots grouped by expert
        counts = torch.bincount(flat, minlength=self.num_experts).tolist()
        tokens = order // top_k
        parts, start = [], 0
        for expert, count in enumerate(counts[: self.num_experts]):
            if count:
                rows = tokens[start : start + count]
                parts.append(self._expert(expert, hidden_states[rows]))
                start += count
        if not parts:
            return torch.zeros_like(hidden_states)
        slots = order[:start]
        y = torch.cat(parts) * top_k_weights.reshape(-1, 1)[slots]
        out = hidden_states.new_zeros(flat.shape[0], y.shape[1], dtype=y.dtype)
        out = out.index_copy(0, slots, y)
        return out.view(-1, top_k, y.shape[1]).sum(1).to(hidden_states.dtype)

    def _forward_dense(self, hidden_states, top_k_index, top_k_weights):
        """Every expert on every token: no shape depends on the routing, so it compiles whole."""
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            here = top_k_index == expert
            weight = torch.where(here, top_k_weights, 0).sum(1, keepdim=True)
            y = self._expert(expert, hidden_states) * weight
            # Not just times 0: what overflows on a token that the expert never gets would be NaN.
            out = out + torch.where(here.any(1, keepdim=True), y, 0).to(out.dtype)
        return out

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Module:
        dtype = dtype or self.dtype
        with torch.device("meta"):
            module = self.float_class(self.config)
        for name in self.weight_names:
            rows = self.dequantize(dtype, name)
            rows = type(self).to_rows(self, name, rows).contiguous()
            setattr(module, name, nn.Parameter(rows))
            if self._parameters[f"{name}_bias"] is not None:
                setattr(module, f"{name}_bias", self._parameters[f"{name}_bias"])
        return module

    def extra_repr(self) -> str:
        up = self.shapes[self.up_name]
        form = self.format.name
        return f"{self.num_experts} experts, {self.up_name}={up}, {form}, {self.activation}"
