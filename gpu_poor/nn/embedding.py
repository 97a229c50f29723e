"""Embeddings with quantized rows, and the few subclasses of nn.Embedding that add to the lookup.

A subclass of nn.Embedding with a forward of its own is taken only if it is in one of the tables
below; any other stays in float, and the receipt says so.
"""

import torch
from torch import Tensor, nn

from gpu_poor.nn.base import QuantizedModule, Stored, is_plain, register

#: Class names end so when forward(input_ids) is the lookup times ``embed_scale``.
SCALED_SUFFIX = "ScaledWordEmbedding"
#: forward(attention_mask, past_key_values_length, position_ids): positions count the mask.
MASK_POSITION_EMBEDDINGS = {"OPTLearnedPositionalEmbedding", "BioGptLearnedPositionalEmbedding"}
#: forward(input_ids, past_key_values_length, position_ids): positions count up from the past.
POSITION_EMBEDDINGS = {
    "BartLearnedPositionalEmbedding",
    "MBartLearnedPositionalEmbedding",
    "MvpLearnedPositionalEmbedding",
    "PLBartLearnedPositionalEmbedding",
    "TrOCRLearnedPositionalEmbedding",
}


def _is_lookup(module: nn.Module) -> bool:
    """A table that a plain gather can replace: max_norm would rewrite the rows it reads."""
    if not isinstance(module, nn.Embedding) or not is_plain(module):
        return False
    return module.max_norm is None and set(module._parameters) == {"weight"}


@register
class QuantizedEmbedding(QuantizedModule):
    """Rows of a weight by index, in ``dtype``, which follows ``.to(dtype)``.

    Args:
        stored: the weight, ``[num_embeddings, embedding_dim]``.
        dtype: of the output.
        padding_idx: kept for callers that read it; it only ever mattered to gradients.
    """

    kind = "embedding"

    def __init__(
        self,
        stored: Stored,
        dtype: torch.dtype = torch.float32,
        padding_idx: int | None = None,
    ):
        super().__init__(dtype=dtype)
        self.num_embeddings, self.embedding_dim = stored.shape
        self.padding_idx = padding_idx
        self.set_weight("weight", stored)

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return _is_lookup(module) and type(module).forward is nn.Embedding.forward

    @classmethod
    def from_float(
        cls, module: nn.Module, weights: dict[str, Stored], activation: str
    ) -> "QuantizedEmbedding":
        return cls(weights["weight"], module.weight.dtype, module.padding_idx)

    def forward(self, input: Tensor) -> Tensor:
        return self.formats["weight"].embedding(
            input,
            self._parameters["weight"],
            self.scale("weight_scale"),
            self.shapes["weight"],
            self.dtype,
        )

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Module:
        size = (self.num_embeddings, self.embedding_dim, self.padding_idx)
        return self._with_weight(nn.Embedding(*size, device="meta"), dtype)

    def _with_weight(self, embedding: nn.Embedding, dtype: torch.dtype | None) -> nn.Module:
        embedding.weight = nn.Parameter(self.dequantize(dtype or self.dtype))
        return embedding

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format.name}, {self.dtype}"


@register
class QuantizedScaledEmbedding(QuantizedEmbedding):
    """The lookup times ``embed_scale``: the Bart and Gemma families.

    The factor is a plain float here. Gemma's is a buffer that takes the dtype of the weight,
    which was the dtype of the output; ``rounded`` keeps that rounding.
    """

    kind = "scaled_embedding"

    def __init__(
        self,
        *args,
        embed_scale: float = 1.0,
        rounded: bool = False,
    ):
        super().__init__(*args)
        self.embed_scale = embed_scale
        self.rounded = rounded

    @staticmethod
    def _factor(module: nn.Module) -> float | None:
        factor = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None))
        if isinstance(factor, Tensor):
            factor = None if factor.device.type == "meta" else factor.item()
        return None if factor is None else float(factor)

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        named = type(module).__name__.endswith(SCALED_SUFFIX)
        return named and _is_lookup(module) and cls._factor(module) is not None

    @classmethod
    def from_float(
        cls, module: nn.Module, weights: dict[str, Stored], activation: str
    ) -> "QuantizedScaledEmbedding":
        embedding = cls(
            weights["weight"],
            module.weight.dtype,
            module.padding_idx,
            embed_scale=cls._factor(module),
            rounded=isinstance(module.embed_scale, Tensor),
        )
        embedding.float_class = type(module)
        return embedding

    def forward(self, input: Tensor) -> Tensor:
        if self.rounded:
            return super().forward(input) * torch.tensor(self.embed_scale, dtype=self.dtype)
        return super().forward(input) * self.embed_scale

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Module:
        size = (self.num_embeddings, self.embedding_dim, self.padding_idx)
        return self._with_weight(self.float_class(*size, embed_scale=self.embed_scale), dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, embed_scale={self.embed_scale}"


@register
class QuantizedMaskPositionEmbedding(QuantizedEmbedding):
    """Positions counted over the attention mask, shifted by ``offset``: OPT, BioGPT."""

    kind = "mask_position_embedding"
    _class_names = MASK_POSITION_EMBEDDINGS

    def __init__(self, *args, offset: int = 0):
        super().__init__(*args)
        self.offset = offset

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return type(module).__name__ in cls._class_names and _is_lookup(module)

    @classmethod
    def from_float(
        cls, module: nn.Module, weights: dict[str, Stored], activation: str
    ) -> "QuantizedMaskPositionEmbedding":
        embedding = cls(
            weights["weight"], module.weight.dtype, module.padding_idx, offset=module.offset
        )
        embedding.float_class = type(module)
        return embedding

    def forward(
        self,
        attention_mask: Tensor,
        past_key_values_length: int = 0,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        if position_ids is None:
            position_ids = torch.cumsum(attention_mask, dim=1)
            position_ids = (position_ids * attention_mask - 1).long()
            position_ids = position_ids[:, past_key_values_length:]
        return super().forward(position_ids + self.offset)

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Module:
        # The class adds the offset to the size it is given.
        size = (self.num_embeddings - self.offset, self.embedding_dim)
        return self._with_weight(self.float_class(*size), dtype)


@register
class QuantizedPositionEmbedding(QuantizedMaskPositionEmbedding):
    """Positions counted up from the length of the past, shifted by ``offset``: the Bart family."""

    kind = "position_embedding"
    _class_names = POSITION_EMBEDDINGS

    def forward(
        self,
        input_ids: Tensor,
        past_key_values_length: int = 0,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        if position_ids is None:
            batch, length = input_ids.shape[:2]
            end = past_key_values_length + length
            position_ids = torch.arange(past_key_values_length, end, device=self.weight.device)
            position_ids = position_ids.expand(batch, -1)
        else:
            position_ids = position_ids.unsqueeze(0)
        return QuantizedEmbedding.forward(self, position_ids + self.offset)
