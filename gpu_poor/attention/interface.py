"""How the models of transformers call an attention function of ours."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from gpu_poor import _needs_transformers

with _needs_transformers("gpu_poor.attention"):
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

#: Arguments that would change the answer, and that none of our functions knows.
UNKNOWN = ("softcap", "s_aux", "sinks", "position_bias", "head_mask", "cache", "cu_seq_lens_q")


@dataclass(frozen=True)
class Call:
    """What a layer asks of an attention function."""

    module: nn.Module
    query: Tensor  # [B, H, T, D]
    key: Tensor  # [B, H_kv, L, D]: H_kv divides H
    value: Tensor  # [B, H_kv, L, D]
    mask: Tensor | None
    dropout: float
    scaling: float | None  # None: 1 / sqrt(D)
    is_causal: bool
    sliding_window: int | None


def attention_function(name: str, mask: Callable) -> Callable:
    """Decorator: ``attend(call) -> [B, T, H, D]`` becomes the attention function ``name``.

    ``model.set_attn_implementation(name)`` has a model use it, with the masks that ``mask`` makes.
    A model that asks for attention weights, or anything in :data:`UNKNOWN`, gets a ValueError.
    """

    def register(attend: Callable[[Call], Tensor]) -> Callable[[Call], Tensor]:
        def forward(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            dropout: float = 0.0,
            scaling: float | None = None,
            is_causal: bool | None = None,
            sliding_window: int | None = None,
            **others,
        ) -> tuple[Tensor, None]:
            for unknown in UNKNOWN:
                if others.get(unknown) is not None:
                    raise ValueError(
                        f'the attention function "{name}" has no {unknown}, '
                        f"which {type(module).__name__} needs"
                    )
            if others.get("output_attentions"):
                raise ValueError(
                    f'the attention function "{name}" keeps no attention weights: '
                    'model.set_attn_implementation("eager") does'
                )
            if is_causal is None:
                is_causal = getattr(module, "is_causal", True)
            options = dropout, scaling, is_causal, sliding_window
            return attend(Call(module, query, key, value, attention_mask, *options)), None

        AttentionInterface.register(name, forward)
        AttentionMaskInterface.register(name, mask)
        return attend

    return register
