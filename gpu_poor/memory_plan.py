"""A plan of which format each module gets: what it will take, what it will cost, as table and JSON.

:func:`gpu_poor.plan` makes one; what is measured afterwards stands beside what was predicted.
"""

import glob
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import nn

from gpu_poor import memory
from gpu_poor.files import replace_whole

MB = 1e6
#: ``{basis of the predictions: what it means}``
BASES = {
    "samples": "from gradients on {n_tokens} tokens of sample_inputs",
    "own text": "from gradients on {n_tokens} tokens that the model wrote itself",
    "weights": "unknown: ranked by the relative squared error of the weights alone",
}


@dataclass
class Decision:
    """What modules that share their weights become. ``format``: None where they stay in float."""

    names: list[str]
    format: str | None
    bytes_before: int
    bytes: int
    #: In nats of mean KL; with the basis "weights" a relative squared error.
    loss: float


@dataclass
class MemoryPlan:
    """What :func:`plan_memory` found. All sizes in bytes; print it for a table.

    ``gap``: at most this fraction of the predicted loss could be saved by any other choice.
    """

    model: str
    memory_target: float | int | str
    target_bytes: int
    context: int | None
    kv_bytes: int
    original_bytes: int
    #: Of the quantized model, as :func:`gpu_poor.memory.parameter_bytes` will count it.
    predicted_bytes: int
    #: Nats of mean KL to the float model; None where the basis is the weights alone.
    predicted_kl: float | None
    gap: float
    basis: str
    n_tokens: int
    decisions: list[Decision]
    #: Patterns of what was asked to stay in float.
    asked: list[str] = field(default_factory=list)
    measured_bytes: int | None = None
    measured_kl: float | None = None

    @property
    def overrides(self) -> dict[str, str]:
        """``{name: format}`` for :func:`gpu_poor.quantize`."""
        chosen = [d for d in self.decisions if d.format is not None]
        return {glob.escape(name): d.format for d in chosen for name in d.names}

    @property
    def exclude(self) -> list[str]:
        """The modules that stay in float, for :func:`gpu_poor.quantize`."""
        kept = [name for d in self.decisions if d.format is None for name in d.names]
        return [*self.asked, *map(glob.escape, kept)]

    @property
    def options(self) -> dict:
        """``quantize(model, **plan.options)`` carries the plan out."""
        return dict(overrides=self.overrides, exclude=self.exclude, allow_partial=True)

    def measure(self, model: nn.Module, kl: float | None = None) -> "MemoryPlan":
        """Put beside the predictions what a quantized model takes and, if measured, its KL."""
        self.measured_bytes = memory.parameter_bytes(model)
        self.measured_kl = kl
        return self

    def to_dict(self) -> dict:
        """Plain numbers and strings, for JSON."""
        return asdict(self) | dict(overrides=self.overrides, exclude=self.exclude)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; a file that is there is replaced whole, or not at all."""
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        replace_whole(Path(path), lambda name: Path(name).write_text(text, encoding="utf-8"))

    def __str__(self) -> str:
        return _table(self)


def _table(plan: MemoryPlan) -> str:
    """Decisions by kind of module, then the totals, predicted and measured."""
    rows = [("", "formats", "before MB", "planned MB", "loss")]
    kinds: dict[str, list[Decision]] = {}
    for decision in plan.decisions:
        kinds.setdefault(_kind(decision), []).append(decision)
    for kind, group in kinds.items():
        counts = Counter(decision.format or "float" for decision in group)
        before, after = (sum(getattr(d, key) for d in group) for key in ("bytes_before", "bytes"))
        rows.append((
            kind,
            ", ".join(f"{count} {form}" for form, count in counts.most_common()),
            f"{before / MB:.2f}",
            f"{after / MB:.2f}",
            f"{sum(decision.loss for decision in group):.1e}",
        ))  # fmt: skip
    rest = plan.original_bytes - sum(d.bytes_before for d in plan.decisions)
    rows.append(("everything else", "as it is", f"{rest / MB:.2f}", f"{rest / MB:.2f}", ""))
    rows.append(
        ("total", "", f"{plan.original_bytes / MB:.2f}", f"{plan.predicted_bytes / MB:.2f}", "")
    )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [_head(plan)]
    for row in rows:
        left = (cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True))
        right = (cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True))
        lines.append(f"  {'  '.join([*left, *right])}".rstrip())
    return "\n".join([*lines, *_foot(plan)])


def _kind(decision: Decision) -> str:
    """The name with its numbers as stars: the blocks of a model are listed as one."""
    first, *others = (re.sub(r"\b\d+\b", "*", name) for name in decision.names)
    return " = ".join([first, *others])


def _head(plan: MemoryPlan) -> str:
    cache = f", {plan.kv_bytes / MB:.2f} of them for the KV cache of {plan.context} tokens"
    return (
        f"{plan.model}: memory_target {plan.memory_target} is {plan.target_bytes / MB:.2f} MB"
        f"{cache if plan.kv_bytes else ''}"
    )


def _foot(plan: MemoryPlan) -> list[str]:
    total = plan.predicted_bytes + plan.kv_bytes
    used = f"{total / plan.target_bytes:.2%} of the target"
    kl = "mean KL " if plan.predicted_kl is None else f"mean KL {plan.predicted_kl:.2e} nats, "
    kl += BASES[plan.basis].format(n_tokens=plan.n_tokens)
    lines = [
        f"  predicted: {plan.predicted_bytes:,} bytes, {used}; {kl}",
        f"  no other choice of these formats is predicted to be better by more than {plan.gap:.2%}",
    ]
    if not plan.overrides:
        lines[1] = "  the model fits as it is: nothing is to be quantized"
    if plan.measured_bytes is not None:
        found = "not measured" if plan.measured_kl is None else f"{plan.measured_kl:.2e} nats"
        lines.append(f"  measured: {plan.measured_bytes:,} bytes; mean KL {found}")
    return lines
