"""``sample_inputs``: whatever a caller has for a model to look at, as rows of token ids.

Calibration and planning share this file, so that both read the same text alike and name a mistake
alike: what is wrong, and where in ``sample_inputs``.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from gpu_poor.metrics_input import LENGTH, as_text, check_tokenizer, n_positions, tokenizer_of

#: Token ids as a tensor or nested lists, a tokenizer's output, a text, or an iterable of these.
SampleInputs = Tensor | Mapping | str | Iterable
#: Calibration on fewer tokens comes with a warning: on the models here it did worse than none.
MIN_CALIBRATION_TOKENS = 1024


def token_rows(
    model: nn.Module,
    sample_inputs: SampleInputs,
    tokenizer: Callable | None = None,
    *,
    length: int = LENGTH,
    n_tokens: int | None = None,
) -> list[Tensor]:
    """Normalise ``sample_inputs`` to int64 ``[1, T]`` on the CPU, one for each sequence.

    Args:
        model: gives the size of the vocabulary and the longest sequence.
        sample_inputs: integer ids ``[T]`` or ``[B, T]``; a dict of a tokenizer with ``input_ids``
            and perhaps ``attention_mask``, whose padding is left out; a text; or an iterable of
            them, such as a DataLoader, which is read no further than needed.
        tokenizer: for texts; default: the one saved with the model.
        length: a text becomes rows of at most so many tokens, at most the model's positions; the
            rest of the text that fills no row is a shorter row. Token ids are never cut.
        n_tokens: stop after so many tokens, the last row cut to fit; None for everything.

    Raises:
        ValueError: nothing, or an empty sequence; values that are no integers; ids outside of the
            vocabulary; ids longer than the model's positions; a mask that does not fit its ids.
            The message says where.
        TypeError: something else altogether.
    """
    if length < 1 or (n_tokens is not None and n_tokens < 1):
        raise ValueError(f"needs length >= 1 and n_tokens >= 1, got {length} and {n_tokens}")
    check_tokenizer(tokenizer)
    reader = _Reader(model, tokenizer, length)
    rows, left = [], n_tokens
    for row in reader.read(sample_inputs, "sample_inputs"):
        rows.append(row if left is None else row[:, :left])
        if left is not None:
            left -= row.shape[1]
            if left <= 0:
                break
    return rows


class _Reader:
    """What is known of the model while its inputs are read."""

    def __init__(self, model: nn.Module, tokenizer: Callable | None, length: int):
        self.model, self.tokenizer = model, tokenizer
        self.n_positions = n_positions(model)
        self.n_vocab = vocabulary(model)
        self.length = min(length, self.n_positions)

    def read(self, item: object, where: str) -> Iterator[Tensor]:
        """The rows of one item, or of everything in it."""
        if isinstance(item, str):
            yield from self._text(item, where)
        elif isinstance(item, Mapping):
            yield from self._mapping(item, where)
        elif isinstance(item, Tensor) or hasattr(item, "__array__") or _is_ids(item):
            yield from self._ids(item, None, where)
        elif isinstance(item, Iterable) and not isinstance(item, bytes) and not _is_file(item):
            part = None
            for i, part in enumerate(item):
                yield from self.read(part, f"{where}[{i}]")
            if part is None:
                raise ValueError(f"{where} is empty: pass some of what the model is for")
        else:
            as_text(item)  # says what a path or a file should have been
            raise TypeError(f"{where} must be token ids or text, got {type(item).__name__}")

    def _text(self, text: str, where: str) -> Iterator[Tensor]:
        try:
            as_text(text, self.tokenizer)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if self.tokenizer is None:
            self.tokenizer = tokenizer_of(self.model)
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = torch.as_tensor(encoded, dtype=torch.int64).flatten()
        for row in ids.split(self.length):
            yield self._checked(row, where)

    def _mapping(self, item: Mapping, where: str) -> Iterator[Tensor]:
        if "input_ids" not in item:
            keys = ", ".join(map(str, item)) or "no keys"
            raise ValueError(f"{where} has no 'input_ids', only {keys}")
        ids, mask = item["input_ids"], item.get("attention_mask")
        if isinstance(ids, list | tuple) and not _is_ids(ids):  # a batch, not of one length
            masks = [None] * len(ids) if mask is None else mask
            if len(masks) != len(ids):
                raise ValueError(f"{where}: {len(masks)} attention masks for {len(ids)} rows")
            for i, pair in enumerate(zip(ids, masks, strict=True)):
                yield from self._ids(*pair, f"{where}, row {i}")
        else:
            yield from self._ids(ids, mask, where)

    def _ids(self, item: object, mask: object, where: str) -> Iterator[Tensor]:
        ids = _integers(item, where)
        keep = torch.ones_like(ids) if mask is None else torch.as_tensor(mask).cpu()
        keep = (keep[None] if keep.dim() == 1 else keep) != 0
        if keep.shape != ids.shape:
            raise ValueError(
                f"{where}: attention_mask {tuple(keep.shape)} does not fit input_ids "
                f"{tuple(ids.shape)}"
            )
        for i, (row, kept) in enumerate(zip(ids, keep, strict=True)):
            at = f"{where}, row {i}" if len(ids) > 1 else where
            starts = kept[1:] & ~kept[:-1]
            if int(starts.sum()) + int(kept[:1].sum()) > 1:
                raise ValueError(f"{at}: attention_mask has a hole between tokens")
            yield self._checked(row[kept], at)

    def _checked(self, row: Tensor, where: str) -> Tensor:
        """``[T]`` -> ``[1, T]``, if the model can read it."""
        if not len(row):
            raise ValueError(f"{where} has no tokens")
        if len(row) > self.n_positions:
            raise ValueError(
                f"{where} has {len(row)} tokens; the model takes at most {self.n_positions}: pass "
                "the text itself, which is cut, or a list of shorter sequences"
            )
        low, high = int(row.min()), int(row.max())
        if low < 0 or (self.n_vocab is not None and high >= self.n_vocab):
            known = "0 or more" if self.n_vocab is None else f"in 0..{self.n_vocab - 1}"
            raise ValueError(f"{where} has the token id {low if low < 0 else high}, not {known}")
        return row[None].clone()


def warn_if_few(rows: list[Tensor]) -> None:
    """Warn, on behalf of the public function that calls this, of calibration that may do harm."""
    n_tokens = sum(row.numel() for row in rows)
    if n_tokens < MIN_CALIBRATION_TOKENS:
        warnings.warn(
            f"sample_inputs has {n_tokens} token{'s' * (n_tokens != 1)}: calibration on fewer than "
            f"{MIN_CALIBRATION_TOKENS} may be worse than none; use thousands, or leave it out",
            stacklevel=4,  # past quantize, and the wrapper that inference_mode puts around it
        )


def vocabulary(model: nn.Module) -> int | None:
    """How many token ids the model's input embedding knows; None if there is none to be found."""
    try:
        table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    except NotImplementedError:
        table = None
    return getattr(table, "num_embeddings", None)


def _is_ids(item: object) -> bool:
    """Whether a list is one sequence of token ids, or means to be."""
    numbers = isinstance(item, list | tuple) and bool(item)
    return numbers and all(isinstance(each, int | float) for each in item)


def _is_file(item: object) -> bool:
    return hasattr(item, "read")


def _integers(item: object, where: str) -> Tensor:
    """int64 ``[B, T]`` on the CPU."""
    ids = torch.as_tensor(item).detach().cpu()
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{where} must hold integer token ids, got {ids.dtype} values")
    if ids.dim() not in (1, 2):
        raise ValueError(f"{where} must be token ids [T] or [B, T], got shape {tuple(ids.shape)}")
    ids = ids.to(torch.int64)
    return ids[None] if ids.dim() == 1 else ids
