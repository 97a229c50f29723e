"""Reformer's attention by hashing: approximate, experimental, for long prompts.

A query attends to the keys that a random rotation sends into the same bucket (Kitaev et al. 2020,
Reformer: The Efficient Transformer, section 2; angular hashing of Andoni et al. 2015):

    bucket(x) = argmax [x R; -x R]           R: random, [head_dim, buckets / 2]

Keys are sorted by bucket, and by position within; so are queries, which are cut into chunks. A
chunk attends to a window of two chunks of keys that ends where its last query belongs, and never
to the future. Several rounds, each with its own R, are one softmax over what all of them found.
Time and memory grow with rounds * length * chunk, not with length squared.

Models share no queries and keys, as Reformer's do, and were trained to attend to everything. So, in
:func:`lsh_attention` without ``shared_qk``, deviating from the paper:

- queries and keys are hashed each by itself. The hash sees directions only, lengths do not count;
  keys are centred first, which no softmax notices: in trained models they point to one side.
- one more round is the window of the nearest positions, so that a query finds its neighbours.
- a key that several rounds find counts once.
- the head of a group of queries hashes its keys once, for all of the group.

Which past keys a query finds depends, through the borders of chunks and the centre, on what comes
later, as in Reformer: no later value gets in, but with a longer text an answer is another one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gpu_poor import _needs_transformers, metrics
from gpu_poor.attention.interface import Call, attention_function
from gpu_poor.metrics_input import Text, n_positions
from gpu_poor.modules import unwrap

with _needs_transformers("gpu_poor.attention.lsh"):
    from transformers import PreTrainedModel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

#: What the function is registered as: ``model.set_attn_implementation("gpu_poor_lsh")``.
NAME = "gpu_poor_lsh"

#: Logits of what may not be seen, and of a token itself where it is the last resort (Reformer's).
MASKED, SELF = -1e9, -1e5


@dataclass(frozen=True)
class Settings:
    """Of :func:`use_lsh_attention`."""

    rounds: int = 4
    chunk: int = 64
    buckets: int | None = None
    seed: int = 0

    def __post_init__(self):
        for name, lowest in (("rounds", 1), ("chunk", 1), ("buckets", 2), ("seed", 0)):
            value = getattr(self, name)
            if name == "buckets" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ValueError(f"{name} must be an integer >= {lowest}, got {value!r}")
        if self.buckets is not None and self.buckets % 2:
            raise ValueError(f"buckets must be even, got {self.buckets}")


def lsh_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    settings: Settings,
    mask: Tensor | None = None,
    shared_qk: bool = False,
) -> Tensor:
    """Causal attention to the keys that hashing finds; see the head of this file.

    Args:
        q: ``[B, H, L, D]``.
        k, v: ``[B, H_kv, L, D]`` and ``[B, H_kv, L, D_v]``; H_kv divides H.
        scaling: of the products of queries and keys.
        mask: bool ``[B or 1, H or 1, L, L]``, True where attention is allowed, besides causality.
        shared_qk: as in Reformer: keys are queries, normalised by the caller; one hash for both, a
            token sees itself only where there is nothing else, the first chunk looks back into the
            round before, and a key counts in every round that finds it.

    Returns:
        ``[B, H, L, D_v]``.

    Raises:
        ValueError: shapes do not fit.
    """
    batch, heads, length, dim = q.shape
    kv_heads = k.shape[1]
    fits = k.shape == (batch, kv_heads, length, dim) and v.shape[:3] == k.shape[:3]
    if not fits or heads % kv_heads or (shared_qk and heads != kv_heads):
        raise ValueError(
            f"lsh_attention: queries {tuple(q.shape)}, keys {tuple(k.shape)} and values "
            f"{tuple(v.shape)} do not fit"
        )
    rotations = _rotations(kv_heads, dim, n_buckets(length, settings), settings, q.device)
    group = heads // kv_heads
    out = []
    for row in range(batch):
        allowed = None if mask is None else mask[row % len(mask)].expand(heads, length, length)
        for head in range(kv_heads):
            queries = slice(head * group, (head + 1) * group)
            buckets = _buckets(q[row, queries], k[row, head], rotations[head], shared_qk)
            rounds = _Rounds(*buckets, settings.chunk, wrap=shared_qk)
            masked = None if allowed is None else allowed[queries]
            out.append(rounds.attend(q[row, queries], k[row, head], v[row, head], scaling, masked))
    return torch.stack(out).view(batch, heads, length, -1)


def n_buckets(length: int, settings: Settings) -> int:
    """As many as Reformer takes: the power of two at or below twice the number of chunks."""
    if settings.buckets is not None:
        return settings.buckets
    return 2 ** int(math.log2(max(2, 2 * (length // settings.chunk))))


def _rotations(heads: int, dim: int, buckets: int, settings: Settings, device) -> Tensor:
    """``[H_kv, D, rounds, buckets / 2]``, drawn on the CPU: what Reformer draws of a seed."""
    generator = torch.Generator().manual_seed(settings.seed)
    shape = heads, dim, settings.rounds, buckets // 2
    return torch.randn(shape, generator=generator).to(device)


@torch.no_grad()
def _buckets(q: Tensor, k: Tensor, rotations: Tensor, shared_qk: bool) -> tuple[Tensor, Tensor]:
    """int64 ``[rounds, G, L]`` of queries ``[G, L, D]``, ``[rounds, L]`` of keys ``[L, D]``."""
    if not shared_qk:
        # Every position is in bucket 0 of the first round: the nearest ones.
        k = k - k.mean(0)
    hashed = []
    for x in (q,) if shared_qk else (q, k):
        rotated = torch.einsum("...ld,drn->r...ln", x.float(), rotations)
        bucket = torch.cat([rotated, -rotated], -1).argmax(-1)
        hashed.append(bucket if shared_qk else torch.cat([torch.zeros_like(bucket[:1]), bucket]))
    return (hashed[0], hashed[0][:, 0]) if shared_qk else (hashed[0], hashed[1])


class _Rounds:
    """Who meets whom: for each round the sorted queries and keys of one key/value head.

    Args:
        q_buckets, k_buckets: ``[rounds, G, L]`` and ``[rounds, L]``.
        wrap: a window that begins before the first key of a round ends goes on with the last ones
            of the round before; else it begins with the first key.
    """

    @torch.no_grad()
    def __init__(self, q_buckets: Tensor, k_buckets: Tensor, chunk: int, wrap: bool):
        self.wrap = wrap
        n_rounds, group, length = q_buckets.shape
        self.chunk, self.width = chunk, min(2 * chunk, length)
        position = torch.arange(length, device=q_buckets.device)
        q_codes, k_codes = q_buckets * length + position, k_buckets * length + position
        k_codes, self.k_order = k_codes.sort(-1)  # [R, L]
        q_codes, q_order = q_codes.sort(-1)  # [R, G, L]
        # The last chunk is filled up with its last query.
        n_chunks = -(-length // chunk)
        filled = torch.arange(n_chunks * chunk, device=position.device).clamp(max=length - 1)
        self.q_order = q_order[..., filled].unflatten(-1, (n_chunks, chunk))  # [R, G, C, c]
        last = q_codes[..., filled].unflatten(-1, (n_chunks, chunk))[..., -1]  # [R, G, C]
        ends = torch.searchsorted(k_codes, last.flatten(1).contiguous(), right=True).view_as(last)
        self.starts = ends - self.width if wrap else (ends - self.width).clamp(min=0)
        self.q_rank = q_order.argsort(-1)  # [R, G, L]
        self.k_rank = self.k_order.argsort(-1)  # [R, L]

    def attend(self, q, k, v, scaling: float, allowed: Tensor | None) -> Tensor:
        """``[G, L, D_v]`` of queries ``[G, L, D]`` and keys and values ``[L, D]``."""
        total = out = None
        for r in range(len(self.starts)):
            found, weight = self._round(r, q, k, v, scaling, allowed)
            if out is None:
                out, total = found, weight
                continue
            both = torch.logaddexp(total, weight)
            out = out * (total - both).exp()[..., None] + found * (weight - both).exp()[..., None]
            total = both
        return out.to(v.dtype)

    def _round(self, r: int, q, k, v, scaling: float, allowed) -> tuple[Tensor, Tensor]:
        """What a round finds, ``[G, L, D_v]``, and the logarithm of its weight, ``[G, L]``."""
        of_q = self.q_order[r]  # [G, C, c]
        window = self.starts[r][..., None] + torch.arange(self.width, device=q.device)
        if self.wrap:
            of_k = self.k_order.flatten()[(window + r * q.shape[1]) % self.k_order.numel()]
        else:
            of_k = self.k_order[r][window]  # [G, C, w]
        each = torch.arange(len(q), device=q.device)[:, None, None]
        scores = torch.matmul(q[each, of_q], k[of_k].transpose(-1, -2))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scaling
        past, future = of_q[..., None], of_k[..., None, :]
        visible = future <= past
        if allowed is not None:
            visible &= allowed[each[..., None], past, future]
        if not self.wrap:
            for earlier in range(r):
                visible &= ~self._seen(earlier, each, of_q, of_k)
        scores = scores.masked_fill(~visible, MASKED)
        if self.wrap:
            scores = scores.masked_fill(past == future, SELF)
        weight = scores.logsumexp(-1)  # [G, C, c]
        share = (scores - weight[..., None]).exp()
        found = torch.matmul(share.to(v.dtype), v[of_k]).to(share.dtype)
        rank = self.q_rank[r]
        found = found.flatten(1, 2).gather(1, rank[..., None].expand(-1, -1, v.shape[-1]))
        return found, weight.flatten(1).gather(1, rank)

    def _seen(self, r: int, each: Tensor, of_q: Tensor, of_k: Tensor) -> Tensor:
        """Whether queries ``[G, C, c]`` meet keys ``[G, C, w]`` in round r: ``[G, C, c, w]``."""
        start = self.starts[r].gather(1, (self.q_rank[r] // self.chunk))[each, of_q][..., None]
        rank = self.k_rank[r][of_k][..., None, :]
        return (start <= rank) & (rank < start + self.width)


# -- models ------------------------------------------------------------------------------------

#: Where a module keeps its :class:`Settings`.
_SETTINGS = "gpu_poor_lsh"


def use_lsh_attention(
    model: nn.Module,
    *,
    rounds: int = Settings.rounds,
    chunk: int = Settings.chunk,
    buckets: int | None = None,
    seed: int = 0,
    text: Text | None = None,
    tokenizer: Callable | None = None,
) -> nn.Module:
    """Have a model attend by hashing where it reads a long prompt. Experimental and approximate.

    It changes the answers: models are trained with full attention. Only prompts longer than a
    chunk, read at once, are hashed; what follows them one token at a time, or a prompt that
    goes on after a cache, is exact. ``model.set_attn_implementation("sdpa")`` undoes it.

    Args:
        model: a causal transformers model, quantized or not.
        rounds: of hashing, besides the one of the nearest positions. More find more.
        chunk: queries in a chunk; a window is two chunks of keys.
        buckets: even; default: the power of two at or below twice the number of chunks.
        seed: of the rotations; layers differ.
        text: to print the perplexity on with exact attention and with this one, in windows as long
            as the model's context (at most 4096 tokens).
        tokenizer: for text; default: the one saved with the model.

    Returns:
        The same model.

    Raises:
        TypeError: no transformers model.
        ValueError: settings that cannot be, a model without causal attention or whose attention is
            not exchangeable, or that adds biases or sinks of its own (when it runs).
    """
    inner = unwrap(model)
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"use_lsh_attention takes a model of transformers: {type(inner)}")
    settings = Settings(rounds, chunk, buckets, seed)
    modules = [m for m in inner.modules() if getattr(m, "is_causal", False) and _has_layer(m)]
    if not modules:
        raise ValueError(f"{type(inner).__name__} has no causal self-attention to replace")
    if not inner._can_set_attn_implementation():
        raise ValueError(f"{type(inner).__name__} has attention of its own, not exchangeable")
    length, exact = min(n_positions(inner), 4096), inner.config._attn_implementation
    if exact == NAME:  # called again, with other settings
        exact = "sdpa"
        inner.set_attn_implementation(exact)
    if text is not None:
        before = metrics.perplexity(inner, text, tokenizer, length=length)
    inner.set_attn_implementation(NAME)
    for module in modules:
        setattr(module, _SETTINGS, settings)
    if text is not None:
        try:
            after = metrics.perplexity(inner, text, tokenizer, length=length)
        except ValueError:
            inner.set_attn_implementation(exact)
            raise
        print(
            f"LSH attention, {rounds} rounds, chunks of {chunk}, windows of {length} tokens: "
            f"perplexity {before:.4f} exact, {after:.4f} hashed, ratio {after / before:.4f}"
        )
    return model


def _has_layer(module: nn.Module) -> bool:
    return isinstance(getattr(module, "layer_idx", None), int)


@attention_function(NAME, sdpa_mask)
def attend(call: Call) -> Tensor:
    """Hashed for a whole long prompt, exact for the rest.

    Raises:
        ValueError: dropout, or a mask that adds numbers, where it hashes.
    """
    settings = getattr(call.module, _SETTINGS, Settings())
    length = call.query.shape[2]
    if not call.is_causal or length != call.key.shape[2] or length <= settings.chunk:
        return sdpa_attention_forward(
            call.module,
            call.query,
            call.key,
            call.value,
            call.mask,
            dropout=call.dropout,
            scaling=call.scaling,
            is_causal=call.is_causal,
        )[0]
    if call.dropout:
        raise ValueError("LSH attention has no dropout: model.eval(), or attention_dropout=0")
    allowed = None if call.mask is None else _allowed(call.mask)
    scaling = call.query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
    layer = getattr(call.module, "layer_idx", None) or 0
    settings = replace(settings, seed=settings.seed + layer)
    out = lsh_attention(call.query, call.key, call.value, scaling, settings, allowed)
    return out.transpose(1, 2).contiguous()


def _allowed(mask: Tensor) -> Tensor:
    """A mask as bool: of floats, as some models make it, 0 is allowed and the lowest is not."""
    if mask.dtype == torch.bool:
        return mask
    allowed = mask == 0
    if not bool((allowed | (mask <= torch.finfo(mask.dtype).min)).all()):
        raise ValueError("LSH attention cannot do a mask that adds numbers to the logits")
    return allowed
