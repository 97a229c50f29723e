"""How much worse a quantized language model is: perplexity, KL divergence, top-1 agreement.

One definition each, per predicted token, from float32 logits, computed in float64:

    nll  = -log p(token)                       perplexity = exp(mean nll)
    kl   = sum_v p(v) (log p(v) - log q(v))    in nats; p: reference, q: model
    same = argmax p == argmax q                top-1 agreement = mean same

These are the definitions of llama.cpp's ``perplexity --kl-divergence``. Judge by KL and top-1
agreement: both use the whole distribution at every token, while the perplexity ratio mixes gains
and losses that cancel and is noise below about half a percent on a few thousand tokens.

    quality = gpu_poor.evaluate(model, reference, text)            # both in memory
    recording = record(reference, text); ...; evaluate(model, recording)   # one after the other
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gpu_poor import memory
from gpu_poor.blocks import Blocks
from gpu_poor.metrics_input import (
    LENGTH,
    N_TOKENS,
    Text,
    as_text,
    check_float,
    check_model,
    check_pair,
    n_positions,
    tokenizer_of,
    warn_if_few,
    windows,
)
from gpu_poor.modules import evaluating
from gpu_poor.progress import bar
from gpu_poor.spill import Spilled

#: float64 elements per chunk of rows: 8 MB, several times, so that vocabularies of 150,000 do not
#: blow memory.
CHUNK = 2**20
#: float32 logits computed at once by one forward pass: 16 MB, or one window if that is more.
BATCH = 4 * 2**20


def sha256(ids: Tensor) -> str:
    """Fingerprint of token ids, so that two figures can be seen to come from one text."""
    return hashlib.sha256(ids.contiguous().to(torch.int64).numpy().tobytes()).hexdigest()


# -- per-token statistics -----------------------------------------------------------------------


@dataclass
class TokenStats:
    """float64 ``[n]`` each, one element per predicted token, paired."""

    nll_reference: Tensor
    nll: Tensor
    kl: Tensor
    same: Tensor

    @staticmethod
    def cat(parts: "list[TokenStats]") -> "TokenStats":
        names = TokenStats.__dataclass_fields__
        return TokenStats(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names})


def _log_softmax(logits: Tensor, whose: str) -> Tensor:
    logits = logits.float()
    # -inf is a token ruled out, which models do on purpose; NaN and +inf are never an answer.
    if logits.isnan().any() or logits.isposinf().any():
        raise ValueError(f"the {whose}'s logits are not finite: its output is garbage")
    return logits.double().log_softmax(-1)


def token_nll(logits: Tensor, targets: Tensor, whose: str = "model") -> Tensor:
    """``-log p(target)`` in nats: logits ``[n, V]``, targets ``[n]`` -> float64 ``[n]``."""
    rows = max(1, CHUNK // logits.shape[-1])
    parts = [
        -_log_softmax(part, whose).gather(-1, t[:, None])[:, 0]
        for part, t in zip(logits.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(parts)


def compare(reference: Tensor, logits: Tensor, targets: Tensor) -> TokenStats:
    """Statistics of each token from both models' logits.

    Args:
        reference, logits: ``[n, V]`` of any float dtype, of the float and the quantized model.
        targets: int64 ``[n]``, the tokens that followed.

    Raises:
        ValueError: shapes differ, or logits are NaN or +inf.
    """
    if reference.shape != logits.shape or reference.dim() != 2 or len(targets) != len(logits):
        raise ValueError(
            f"compare: logits {tuple(reference.shape)} and {tuple(logits.shape)} and targets "
            f"{tuple(targets.shape)} must be [n, V], [n, V] and [n]"
        )
    parts, rows = [], max(1, CHUNK // logits.shape[-1])
    for a, b, t in zip(reference.split(rows), logits.split(rows), targets.split(rows), strict=True):
        log_p, log_q = _log_softmax(a, "reference"), _log_softmax(b, "model")
        p = log_p.exp()
        # A token ruled out by the reference adds nothing, whatever the model says of it.
        kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
        parts.append(
            TokenStats(
                nll_reference=-log_p.gather(-1, t[:, None])[:, 0],
                nll=-log_q.gather(-1, t[:, None])[:, 0],
                kl=kl.clamp_min(0.0),  # rounding may leave -1e-17
                same=(a.argmax(-1) == b.argmax(-1)).double(),
            )
        )
    return TokenStats.cat(parts)


# -- summary ------------------------------------------------------------------------------------


def mean_and_error(x: Tensor) -> tuple[float, float]:
    """Mean of ``[n]`` and its standard error (0 for a single element)."""
    return float(x.mean()), float(x.std() / math.sqrt(len(x))) if len(x) > 1 else 0.0


@dataclass(frozen=True)
class Quality:
    """A quantized model against its float original on one text. Errors (``_se``) are standard
    errors over tokens; the ratio's is of the paired difference of nll, so common noise cancels."""

    perplexity_reference: float
    perplexity: float
    perplexity_ratio: float
    perplexity_ratio_se: float
    kl_mean: float
    kl_mean_se: float
    kl_p99: float
    top1: float
    top1_se: float
    n_tokens: int
    window: int
    text_sha256: str

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"perplexity      {self.perplexity_reference:.4f} float, {self.perplexity:.4f} "
            f"quantized: ratio {self.perplexity_ratio:.5f} +- {self.perplexity_ratio_se:.5f}\n"
            f"KL divergence   mean {self.kl_mean:.2e} +- {self.kl_mean_se:.1e} nats, "
            f"99th percentile {self.kl_p99:.2e}\n"
            f"same next token {100 * self.top1:.2f} % +- {100 * self.top1_se:.2f} %\n"
            f"measured on     {self.n_tokens} tokens, windows of {self.window}, "
            f"text {self.text_sha256[:12]}"
        )


def summarize(stats: TokenStats, window: int, text_sha256: str) -> Quality:
    """The figures of :class:`Quality` from paired per-token statistics."""
    difference, difference_se = mean_and_error(stats.nll - stats.nll_reference)
    kl, kl_se = mean_and_error(stats.kl)
    top1, top1_se = mean_and_error(stats.same)
    return Quality(
        perplexity_reference=math.exp(stats.nll_reference.mean()),
        perplexity=math.exp(stats.nll.mean()),
        perplexity_ratio=math.exp(difference),
        perplexity_ratio_se=math.exp(difference) * difference_se,  # of exp(x), to first order
        kl_mean=kl,
        kl_mean_se=kl_se,
        kl_p99=float(stats.kl.quantile(0.99)),
        top1=top1,
        top1_se=top1_se,
        n_tokens=len(stats.kl),
        window=window,
        text_sha256=text_sha256,
    )


# -- models -------------------------------------------------------------------------------------


def _windows_for(model: nn.Module, text, tokenizer, length, n_tokens) -> Tensor:
    text = as_text(text, tokenizer)
    if isinstance(text, str) and tokenizer is None:
        tokenizer = tokenizer_of(model)
    return windows(text, tokenizer, min(length, n_positions(model)), n_tokens)


def logits_of(
    model: nn.Module, ids: Tensor, counter: tqdm | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run the windows ``[n, length]`` through a causal LM, a few at a time, without gradients.

    Yields:
        logits ``[b * (length - 1), V]`` on the CPU and the targets they predict, in order.
    """
    device = next(model.parameters()).device
    start, batch = 0, 1
    with evaluating(model):
        while start < len(ids):
            part = ids[start : start + batch]
            with torch.inference_mode():
                logits = model(input_ids=part.to(device), use_cache=False).logits[:, :-1]
            yield logits.flatten(0, 1).cpu(), part[:, 1:].flatten()
            start += len(part)
            batch = _batch(ids, logits.shape[-1])
            if counter is not None:
                counter.update(part.numel())


def perplexity(
    model: nn.Module,
    text: Text,
    tokenizer: Callable | None = None,
    length: int = LENGTH,
    n_tokens: int | None = N_TOKENS,
) -> float:
    """``exp`` of the mean negative log-likelihood; arguments as for :func:`evaluate`."""
    check_model(model, "model")
    ids = _windows_for(model, text, tokenizer, length, n_tokens)
    warn_if_few(ids)
    return math.exp(torch.cat([token_nll(*pair) for pair in logits_of(model, ids)]).mean())


@dataclass
class Recording:
    """A float model's logits on a text, kept so that the model itself can go: float32, in order.

    ``n_tokens * V * 4`` bytes, most of them in a temporary file (gpu_poor.spill): 0.8 GB for 4096
    tokens of GPT-2's 50257-word vocabulary.
    """

    ids: Tensor
    logits: Spilled


def record(
    reference: nn.Module,
    text: Text,
    tokenizer: Callable | None = None,
    length: int = LENGTH,
    n_tokens: int | None = N_TOKENS,
    *,
    by_block: bool | None = None,
    progress: bool | None = False,
) -> Recording:
    """Compute the reference's side of :func:`evaluate` now; ``quantize`` works in place, so do this
    before it when float and quantized model do not fit side by side.

    Args:
        reference: the float model; it may be larger than memory if its weights lie in mapped files,
            as ``from_pretrained`` leaves them unless it has to convert them to another dtype.
        by_block: run one block over the whole text, then the next, so that each weight is read once
            and no more is in memory than one block. The same logits. Default: where most of the
            weights lie in mapped files; a model that cannot be run that way is then run as a whole,
            with a warning.
        progress: show a bar; None: on a terminal.

    Raises:
        TypeError, ValueError: as :func:`evaluate`; or ``by_block`` is True, and the model cannot
            be run block by block.
        OSError: the disk of the temporary file is full.
    """
    check_model(reference, "reference")
    check_float(reference)
    ids = _windows_for(reference, text, tokenizer, length, n_tokens)
    with evaluating(reference), torch.inference_mode():
        blocks = _blocks_of(reference, ids, by_block)
        if blocks is not None:
            return Recording(ids, _logits_by_block(blocks, ids, progress))
    with bar("measuring the float model", " tokens", progress, ids.numel()) as counter:
        logits = (logits.float() for logits, _ in logits_of(reference, ids, counter))
        return Recording(ids, Spilled(logits))


def _blocks_of(reference: nn.Module, ids: Tensor, by_block: bool | None) -> Blocks | None:
    if not (memory.in_files(reference) if by_block is None else by_block):
        return None
    try:
        return Blocks(reference, ids)
    except ValueError as error:
        if by_block:
            raise
        warnings.warn(f"{error}. It is run as a whole, slowly if memory is short", stacklevel=3)
        return None


def _logits_by_block(blocks: Blocks, ids: Tensor, progress: bool | None) -> Spilled:
    """What :func:`logits_of` yields of the model, in the same batches."""
    if blocks.n_vocab is None:
        raise ValueError(f"{type(blocks.model).__name__} answers no logits")
    first, rest = ids[:1], ids[1:]
    batches = [first, *rest.split(_batch(ids, blocks.n_vocab))] if len(rest) else [first]
    states = Spilled(blocks.enter(part) for part in batches)
    with bar("measuring the float model", " blocks", progress, over=blocks.modules) as modules:
        for i, block in enumerate(modules):
            for b, hidden in enumerate(states):
                states[b] = blocks.run(i, hidden)
            memory.let_go(block)
    logits = Spilled()
    for part, hidden in zip(batches, states, strict=True):
        logits.append(blocks.leave(part, hidden)[:, :-1].flatten(0, 1).float().cpu())
    memory.let_go(blocks.model)
    return logits


def _batch(ids: Tensor, n_vocab: int) -> int:
    """How many windows go through a model at once."""
    return max(1, BATCH // (ids.shape[1] * n_vocab))


def evaluate(
    model: nn.Module,
    reference: "nn.Module | Recording",
    text: Text | None = None,
    tokenizer: Callable | None = None,
    *,
    length: int = LENGTH,
    n_tokens: int | None = N_TOKENS,
    progress: bool | None = False,
) -> Quality:
    """Measure a quantized causal LM against its float original on a text.

    Args:
        model: the quantized model.
        reference: the float model, or what :func:`record` kept of it (then without ``text``).
            ``quantize`` works in place, so this is a copy made before it, or loaded again.
        text: what to predict: a string, strings or token ids. Use text like what the model is
            for, and not what it was calibrated on; thousands of tokens, or it is noise.
        tokenizer: default: the one saved with the reference.
        length: tokens per window, at most the model's positions.
        n_tokens: how many tokens to predict; None for the whole text.
        progress: show a bar; None: on a terminal.

    Returns:
        :class:`Quality`; print it.

    Raises:
        TypeError: an argument is of another kind, such as a name in place of a model.
        ValueError: no text, a text too short, a reference that is quantized or the model itself,
            of another vocabulary than the model's, or logits that are not finite.
    """
    if isinstance(reference, Recording):
        if text is not None:
            raise ValueError("a recording has its own text; leave out text")
        check_model(model, "model")
        ids, expected = reference.ids, iter(reference.logits)
    else:
        check_pair(model, reference)
        if text is None:
            raise ValueError("needs a text, for example some pages of your own")
        ids = _windows_for(reference, text, tokenizer, length, n_tokens)
        expected = (logits for logits, _ in logits_of(reference, ids))
    warn_if_few(ids)
    # Both generators cut the windows alike: the first batch is one window, the rest by vocabulary.
    parts = []
    with bar("measuring the model", " tokens", progress, ids.numel()) as counter:
        for p, (q, targets) in zip(expected, logits_of(model, ids, counter), strict=True):
            if p.shape[1] != q.shape[1]:
                raise ValueError(
                    f"model answers with {q.shape[1]} logits a token, reference with {p.shape[1]}: "
                    "they are not one model, quantized and in float"
                )
            parts.append(compare(p, q, targets))
    return summarize(TokenStats.cat(parts), window=ids.shape[1], text_sha256=sha256(ids))
