"""What :mod:`gpu_poor.metrics` is given: texts cut into windows, and mistakes named.

A metric of the wrong text or of the wrong model still prints a figure, often a perfect one. So
what cannot be meant is an error that names the argument and says what is expected there.
"""

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import PurePath

import torch
from torch import Tensor, nn

from gpu_poor.nn import QuantizedModule

N_TOKENS = 4096
LENGTH = 256
#: Figures over fewer predicted tokens come with a warning.
MIN_TOKENS = 128

Text = str | list[str] | list[int] | Tensor


# -- models -------------------------------------------------------------------------------------


def _what(x: object) -> str:
    """An argument as a message shows it: short texts themselves, of others the type."""
    shown = f" {x!r}" if isinstance(x, str) and len(x) <= 60 else ""
    return f"got {'text' if isinstance(x, str) else type(x).__name__}{shown}"


def check_model(model: object, name: str, or_else: str = "") -> None:
    """Raise TypeError unless ``model`` is a loaded model."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{name} must be a loaded model, such as AutoModelForCausalLM.from_pretrained(...)"
            f"{or_else}; {_what(model)}"
        )


def check_float(reference: nn.Module) -> None:
    """Raise ValueError if the reference is quantized itself."""
    if any(isinstance(m, QuantizedModule) for m in reference.modules()):
        raise ValueError(
            "reference is quantized itself, so it is no float model to compare with. quantize() "
            "works in place: keep a float copy with copy.deepcopy(model) before it, or load the "
            "original again"
        )


def check_pair(model: object, reference: object) -> None:
    """Raise unless this is a model and another one, in float, to compare it with."""
    check_model(model, "model")
    check_model(reference, "reference", " of the float model, or what metrics.record kept of it")
    if model is reference:
        raise ValueError(
            "model and reference are the same object, which always agrees with itself. quantize() "
            "works in place: keep a float copy with copy.deepcopy(model) before it, or load the "
            "original again"
        )
    check_float(reference)


def n_positions(model: nn.Module) -> int:
    """The longest input the model can take; as long as asked for where its config has no limit."""
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def tokenizer_of(model: nn.Module) -> Callable:
    """The tokenizer saved with a transformers model.

    Raises:
        ValueError: the model does not name the folder that it was loaded from.
    """
    from gpu_poor import _needs_transformers

    with _needs_transformers("text without a tokenizer"):
        from transformers import AutoTokenizer

    path = getattr(model, "name_or_path", "")
    if not path:
        raise ValueError("the model does not name its tokenizer; pass tokenizer=")
    return AutoTokenizer.from_pretrained(path)


# -- texts --------------------------------------------------------------------------------------


def check_tokenizer(tokenizer: object) -> None:
    """Raise TypeError unless it can be called on a text; None is for the caller to judge."""
    if isinstance(tokenizer, nn.Module) or not (tokenizer is None or callable(tokenizer)):
        raise TypeError(
            "tokenizer must be a transformers tokenizer, such as "
            f"AutoTokenizer.from_pretrained(...); {_what(tokenizer)}"
        )


def as_text(text: object, tokenizer: object = None) -> "str | Tensor":
    """One string, or token ids as an integer tensor ``[n]``.

    Raises:
        TypeError: neither a string, strings nor integers; the message says what to pass.
        ValueError: the name of a file in place of its content, or nothing at all.
    """
    expected = "text must be a string, a list of strings or token ids"
    if callable(text) and not isinstance(text, Tensor):
        swapped = " (text comes before tokenizer)" if isinstance(tokenizer, str) else ""
        raise TypeError(f"{expected}; {_what(text)}{swapped}")
    check_tokenizer(tokenizer)
    if isinstance(text, list | tuple) and text and all(isinstance(part, str) for part in text):
        text = "\n\n".join(text)
    if isinstance(text, str):
        if not text.strip():
            raise ValueError("text is empty: pass some pages of what the model is for")
        if os.path.isfile(text):
            raise ValueError(
                f"text is the name of a file, {text!r}; pass its content: open({text!r}).read()"
            )
        return text
    hints = (
        (PurePath, "pass the file's content: path.read_text()"),
        (bytes | bytearray, "decode it: text.decode()"),
        (Mapping, 'of what a tokenizer returns, pass ["input_ids"]'),
    )
    hint = next((hint for kind, hint in hints if isinstance(text, kind)), None)
    if hint is None and hasattr(text, "read"):
        hint = "pass what it holds: file.read()"
    if hint is not None:
        raise TypeError(f"{expected}; {_what(text)}: {hint}")
    try:
        ids = torch.as_tensor(text)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{expected}; {_what(text)}") from error
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise TypeError(f"{expected}; got {ids.dtype} values, which are no token ids")
    return ids.to(torch.int64).flatten()


def windows(
    text: Text,
    tokenizer: Callable | None = None,
    length: int = LENGTH,
    n_tokens: int | None = N_TOKENS,
) -> Tensor:
    """Cut a text into windows in which every token after the first is predicted exactly once.

    Window i is ``ids[i * (length - 1):][:length]``: the last token of one is the first of the
    next, which gives context for it but is not predicted again. No special token is added.

    Args:
        text: a string, strings (joined by an empty line), or token ids ``[n]``.
        tokenizer: a transformers tokenizer; needed for a string.
        length: tokens per window, >= 2.
        n_tokens: predict at most so many tokens, rounded down to whole windows; None for all.

    Returns:
        int64 ``[n_windows, length]``; shorter windows only if the whole text is shorter than one.

    Raises:
        TypeError: an argument is of another kind; the message names it.
        ValueError: fewer than two tokens, or nothing would be predicted.
    """
    if length < 2 or (n_tokens is not None and n_tokens < 1):
        raise ValueError(f"needs length >= 2 and n_tokens >= 1, got {length} and {n_tokens}")
    ids = as_text(text, tokenizer)
    if isinstance(ids, str):
        if tokenizer is None:
            raise ValueError("text is a string, which needs a tokenizer; or pass token ids")
        encoded = tokenizer(ids, add_special_tokens=False, verbose=False)["input_ids"]
        ids = torch.as_tensor(encoded, dtype=torch.int64).flatten()
    if len(ids) < 2:
        raise ValueError(
            f"text is too short: {len(ids)} token{'s' * (len(ids) != 1)}, and the first of a text "
            "is not predicted; pass some pages of what the model is for"
        )
    available = len(ids) - 1 if n_tokens is None else min(n_tokens, len(ids) - 1)
    step = min(length - 1, available)
    return ids[: available // step * step + 1].unfold(0, step + 1, step).clone()


def warn_if_few(ids: Tensor) -> None:
    """Warn, on behalf of the public function that calls this, if windows are noise."""
    n_predicted = ids[:, 1:].numel()
    if n_predicted < MIN_TOKENS:
        warnings.warn(
            f"the text has only {n_predicted} token{'s' * (n_predicted != 1)} to predict: figures "
            f"from so few are noise; use a text of thousands, at least {MIN_TOKENS}",
            stacklevel=3,
        )
