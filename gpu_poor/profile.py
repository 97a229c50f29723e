"""Where a token's time goes: ``print(gpu_poor.profile(model))``.

Two kinds of runs of ``generate`` take turns, batch 1 and greedy. Plain ones say how long a token
takes. In the others torch's profiler times each operator, and hooks for all modules (which are on
no module, so that fused blocks stay fused) say within which module it ran. What the operators do
not account for is Python between them: the last row is the plain time less all the others, for the
profiler itself slows down Python, but hardly an operator.
"""

import json
import os
import statistics
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from gpu_poor import isa
from gpu_poor.files import replace_whole
from gpu_poor.modules import Holder, hooked, unwrap
from gpu_poor.nn import QuantizedModule

PROMPT_TOKENS = 32
#: What ends a text: looking for it costs what it always does, but is in vain.
NO_TOKEN = torch.iinfo(torch.int64).max
#: Names of the ranges that we record: of a module by its name, of the cache, of a token.
MODULE, CACHE, TOKEN = "gpu_poor.module:", "gpu_poor.cache", "gpu_poor.token"
BETWEEN = "Python between"
_BAR = 30  # characters
_LOG_LEVEL = "KINETO_LOG_LEVEL"


@dataclass(frozen=True)
class Row:
    """One kind of work, per token."""

    #: "linear", "attention", "cache", "norm", "embedding", "activation", "elementwise", "fused",
    #: "generate" (sampling and bookkeeping), or "Python between".
    kind: str
    #: The role of a linear, the module of an elementwise operator, the name of a fused one.
    what: str
    ms: float
    #: Operators; None for Python.
    calls: float | None
    #: Of the time of a token.
    share: float


@dataclass(frozen=True)
class Profile:
    """What :func:`profile` measured; print it."""

    model: str
    #: Median over the tokens of the plain runs; the rows add up to it.
    ms_per_token: float
    #: The same under the profiler: how much it slows down, mostly Python.
    profiled_ms_per_token: float
    #: Median time to the first token, of plain runs.
    first_token_ms: float
    prompt_tokens: int
    new_tokens: int
    threads: int
    kernel: str
    rows: list[Row]

    def to_dict(self) -> dict:
        """Plain numbers and strings, for JSON."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_dict` as JSON; the file is written whole or not at all."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        replace_whole(Path(path), lambda name: Path(name).write_text(text, encoding="utf-8"))

    def of(self, kind: str) -> float:
        """Milliseconds a token of one kind of work."""
        return sum(row.ms for row in self.rows if row.kind == kind)

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {self.ms_per_token:.3f} ms a token after the first, {self.threads} "
            f"thread{'s' * (self.threads != 1)}, kernel {self.kernel}",
            f"  {'':<36} {'ms':>9} {'share':>7} {'calls':>7}",
        ]
        for row in self.rows:
            calls = "" if row.calls is None else f"{row.calls:.0f}"
            bar = "#" * round(_BAR * max(0.0, row.share))
            name = f"{row.kind} {row.what}".strip()
            lines.append(f"  {name:<36.36} {row.ms:>9.4f} {row.share:>7.1%} {calls:>7}  {bar}")
        lines.append(
            f"  first token {self.first_token_ms:.1f} ms for a prompt of {self.prompt_tokens}; "
            f"under the profiler a token took {self.profiled_ms_per_token:.3f} ms"
        )
        return "\n".join(lines)


def profile(
    model: "nn.Module | Holder",
    prompt: "str | Tensor | list[int] | None" = None,
    *,
    tokenizer: Callable | None = None,
    n_tokens: int = 32,
    runs: int = 3,
    trace: str | Path | None = None,
    verbose: bool = True,
) -> Profile:
    """Measure where the time of a generated token goes, on the CPU.

    The model and its answers stay as they are. A fused block is one row; ``gpu_poor.unfuse(model)``
    before shows what it is made of, in the time that it takes unfused. Nothing else should use the
    machine meanwhile; on a busy one the last row may even be negative.

    Args:
        model: a transformers model, quantized or not, or a QuantizedModel.
        prompt: a text, or token ids; default: some 32 tokens. Attention takes longer after a
            longer prompt.
        tokenizer: for a text; default: the QuantizedModel's, or the one saved with the model.
        n_tokens: to generate, >= 2; all but the first are measured.
        runs: plain and profiled, each; >= 1.
        trace: a file for the last profiled run as chrome://tracing and Perfetto show it.
        verbose: print the result.

    Raises:
        TypeError: no model that generates.
        ValueError: a model on another device, numbers too small, or no room in the context.
    """
    holder, model = model, unwrap(model)
    if not callable(getattr(model, "generate", None)):
        raise TypeError(f"profile takes a model that generates text, got {type(model).__name__}")
    if type(n_tokens) is not int or type(runs) is not int or n_tokens < 2 or runs < 1:
        raise ValueError(f"needs integers n_tokens >= 2, runs >= 1, got {n_tokens!r} and {runs!r}")
    if model.device.type != "cpu":
        raise ValueError(f"the model is on {model.device}: profile measures on the CPU")
    ids = _ids(holder, prompt, tokenizer, n_tokens)
    generate = _generator(model, ids, n_tokens)
    generate(_Clock())  # warm up
    plain, firsts, profiled, tables = [], [], [], []
    for _ in range(runs):
        clock = _Clock()
        start = time.perf_counter()
        generate(clock)
        firsts.append(clock.times[0] - start)
        plain += _differences(clock.times)
        with _marking(model), _recording() as recording:
            clock = _Clock()
            generate(clock)
        profiled += _differences(clock.times)
        tables += _tables(model, recording.events())
    if trace is not None:
        replace_whole(Path(trace), recording.export_chrome_trace)
    ms = 1e3 * statistics.median(plain)
    result = Profile(
        model=type(model).__name__,
        ms_per_token=ms,
        profiled_ms_per_token=1e3 * statistics.median(profiled),
        first_token_ms=1e3 * statistics.median(firsts),
        prompt_tokens=ids.shape[1],
        new_tokens=n_tokens,
        threads=torch.get_num_threads(),
        kernel=isa.current(),
        rows=_rows(tables, ms),
    )
    if verbose:
        print(result)
    return result


# -- runs ----------------------------------------------------------------------------------------


class _Clock:
    """A streamer: notes when each new token is there, and marks it for the profiler."""

    def __init__(self):
        self.times: list[float] = []
        self._is_prompt = True

    def put(self, ids: Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        with torch.profiler.record_function(TOKEN):
            self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _differences(times: list[float]) -> list[float]:
    return [after - before for before, after in zip(times, times[1:], strict=False)]


def _ids(holder, prompt, tokenizer, n_tokens: int) -> Tensor:
    """int64 ``[1, L]``."""
    from gpu_poor.metrics_input import n_positions, tokenizer_of

    model = unwrap(holder)
    if isinstance(prompt, str):
        own = getattr(holder, "tokenizer", None) if isinstance(holder, Holder) else None
        prompt = (tokenizer or own or tokenizer_of(model))(prompt)["input_ids"]
    if prompt is None:
        prompt = torch.arange(PROMPT_TOKENS) % model.config.get_text_config().vocab_size
    ids, words = torch.as_tensor(prompt), model.config.get_text_config().vocab_size
    if not ids.numel():
        raise ValueError("the prompt is empty")
    if ids.is_floating_point() or ids.dim() > 2 or ids.dim() == 2 and len(ids) > 1:
        raise ValueError(f"the prompt must be one row of token ids, got {ids.dtype} {[*ids.shape]}")
    if not 0 <= int(ids.min()) <= int(ids.max()) < words:
        raise ValueError(f"the prompt has tokens that are not in the vocabulary of {words}")
    ids = ids.to(torch.int64).reshape(1, -1)
    if ids.shape[1] + n_tokens > n_positions(model):
        raise ValueError(
            f"{ids.shape[1]} tokens of prompt and {n_tokens} new ones do not fit into the model's "
            f"context of {n_positions(model)}"
        )
    return ids


def _generator(model: nn.Module, ids: Tensor, n_tokens: int) -> Callable[[_Clock], None]:
    def generate(clock: _Clock) -> None:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            max_new_tokens=n_tokens,
            eos_token_id=NO_TOKEN,
            pad_token_id=0,
            streamer=clock,
        )

    return generate


@contextmanager
def _recording() -> Iterator[torch.profiler.profile]:
    """Torch's profiler, without the lines that torch 2.13's writes to stderr at start and stop."""
    is_set = _LOG_LEVEL in os.environ
    os.environ.setdefault(_LOG_LEVEL, "99")  # read once, when a process first profiles
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recording:
            yield recording
    finally:
        if not is_set:
            del os.environ[_LOG_LEVEL]


@contextmanager
def _marking(model: nn.Module) -> Iterator[None]:
    """Record each call of a module of the model, and of a cache's update, as a range."""
    from transformers import Cache

    names = {id(module): MODULE + name for name, module in model.named_modules()}
    open_ranges: list = []

    def enter(module, args):
        name = names.get(id(module))
        open_ranges.append(name and torch.profiler.record_function(name))
        if name:
            open_ranges[-1].__enter__()

    def leave(module, args, output):
        if (current := open_ranges.pop()) is not None:
            current.__exit__(None, None, None)

    update = Cache.update

    def recorded(*args, **kwargs):
        with torch.profiler.record_function(CACHE):
            return update(*args, **kwargs)

    Cache.update = recorded
    try:
        before = register_module_forward_pre_hook(enter)
        after = register_module_forward_hook(leave, always_call=True)
        with hooked([before, after]):
            yield
    finally:
        Cache.update = update


# -- events --------------------------------------------------------------------------------------

_Table = dict[tuple[str, str], list]


def _tables(model: nn.Module, events) -> list[_Table]:
    """For each token but the first ``{(kind, what): [ms, calls]}`` of its operators."""
    marks = sorted(event.time_range.start for event in events if event.name == TOKEN)
    thread = next(event.thread for event in events if event.name == TOKEN)
    modules = dict(model.named_modules())
    tables: list[_Table] = [defaultdict(lambda: [0.0, 0]) for _ in marks[1:]]
    for event in events:
        parent = event.cpu_parent
        is_outermost = parent is None or _is_range(parent)
        token = bisect_right(marks, event.time_range.start) - 1
        if _is_range(event) or not is_outermost or event.thread != thread:
            continue
        if 0 <= token < len(tables):
            row = tables[token][_kind(event.name, parent, modules)]
            row[0] += event.time_range.elapsed_us() / 1e3
            row[1] += 1
    return tables


def _is_range(event) -> bool:
    return event.name.startswith((MODULE, CACHE, TOKEN))


def _kind(operator: str, parent, modules: dict[str, nn.Module]) -> tuple[str, str]:
    """What an operator is for: by the module that called it, else by its name."""
    if parent is None:
        return "generate", ""
    if parent.name == CACHE:
        return "cache", ""
    name = parent.name.removeprefix(MODULE)
    module, role = modules[name], name.rpartition(".")[2]
    cls = type(module).__name__
    if isinstance(module, QuantizedModule):
        return ("embedding" if "embedding" in module.kind else "linear"), role
    if isinstance(module, nn.Linear) or cls == "Conv1D":
        return "linear", role
    if isinstance(module, nn.Embedding):
        return "embedding", role
    if "Norm" in cls:
        return "norm", ""
    library, _, short = operator.rpartition("::")
    if "attention" in short or ("Attention" in cls and short in _ATTENTION):
        return "attention", ""
    if library == "gpu_poor":
        for part, kind in (("linear", "linear"), ("append", "cache"), ("gather", "cache")):
            if part in short:
                return kind, short
        return "fused", short
    if type(module).__module__ in ("torch.nn.modules.activation", "transformers.activations"):
        return "activation", ""
    return "elementwise", cls


#: What attention is made of where it is not one operator.
_ATTENTION = ("matmul", "bmm", "baddbmm", "softmax", "repeat_interleave")


def _rows(tables: list[_Table], ms: float) -> list[Row]:
    """Medians over the tokens, the longest first, and what is left."""
    rows = []
    for kind, what in {key: None for table in tables for key in table}:
        found = [table.get((kind, what), (0.0, 0)) for table in tables]
        time_ms, calls = (statistics.median(column) for column in zip(*found, strict=True))
        rows.append(Row(kind, what, time_ms, calls, time_ms / ms))
    rows.sort(key=lambda row: -row.ms)
    left = ms - sum(row.ms for row in rows)
    return [*rows, Row(BETWEEN, "", left, None, left / ms)]
