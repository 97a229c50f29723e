"""The receipt of a quantization: bytes before and after by class, what was kept and why."""

from collections import Counter
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import nn

from gpu_poor import isa, memory
from gpu_poor.nn import QuantizedModule
from gpu_poor.plan import Kept

MB = 1e6
#: The quality of a model that was compared with nothing.
UNMEASURED = "unmeasured"
#: The activation mode where no activation is rounded: 16-bit weights, or tables only.
FLOAT = "float"


@dataclass
class Imported:
    """What a weight of somebody else's checkpoint became; errors are against its float values.

    ``how``: "exact" (equal values), "rounded" (the same integers, scales or minima rounded to
    float16), "re-quantized", or "float".
    """

    name: str
    #: What it was, e.g. "Q4_0".
    source: str
    form: str
    how: str
    #: The largest difference, and the root mean square one relative to that of the weight.
    max_error: float = 0.0
    relative_error: float = 0.0


@dataclass
class Receipt:
    """What :func:`gpu_poor.quantize` did to a model. All sizes in bytes, shared memory once."""

    model: str
    #: ``{format: how many modules have it}``.
    formats: dict[str, int]
    #: The modes of the linears that have one, or :data:`FLOAT`.
    activation: str
    #: The implementation of the linear in use: "ref", "avx2", "avx512_vnni", "amx" or "torch".
    kernel: str
    modules: dict[str, int]
    before: dict[str, int]
    after: dict[str, int]
    kept: list[Kept] = field(default_factory=list)
    #: How the numbers were chosen, and what could not be done as asked.
    remarks: list[str] = field(default_factory=list)
    #: What :func:`gpu_poor.evaluate` measured against the float model, or :data:`UNMEASURED`.
    quality: dict | str = UNMEASURED
    #: Of the gpu_poor that quantized the model.
    version: str = ""
    seconds: float | None = None
    #: Of a model that was loaded from another library's checkpoint: every matrix of it.
    imported: list[Imported] = field(default_factory=list)

    @property
    def bytes_before(self) -> int:
        return sum(self.before.values())

    @property
    def bytes_after(self) -> int:
        return sum(self.after.values())

    @property
    def reduction(self) -> float:
        """The fraction of the bytes that is gone: 0.75 is four times smaller."""
        return 1 - self.bytes_after / max(1, self.bytes_before)

    def to_dict(self) -> dict:
        """Plain numbers and strings, for JSON."""
        totals = ("bytes_before", "bytes_after", "reduction")
        return asdict(self) | {name: getattr(self, name) for name in totals}

    def saved(self) -> dict:
        """What a checkpoint keeps: the rest can be seen from the model, as it runs here."""
        kept = ("model", "before", "kept", "remarks", "quality", "version", "imported")
        totals = ("bytes_before", "bytes_after")
        return {name: value for name, value in self.to_dict().items() if name in kept + totals}

    def __str__(self) -> str:
        took = "" if self.seconds is None else f" in {self.seconds:.1f} s"
        mode = "" if self.activation == FLOAT else f"{self.activation} activations, "
        lines = [
            f"{self.model}: {', '.join(self.formats)} weights, {mode}kernel {self.kernel}",
            f"  {'':<14} {'modules':>7} {'before MB':>11} {'after MB':>11}",
        ]
        for name in memory.CLASSES:
            if before := self.before.get(name):
                count = self.modules.get(name) or ""
                after = self.after[name]
                lines.append(f"  {name:<14} {count:>7} {before / MB:>11.2f} {after / MB:>11.2f}")
        lines.append(
            f"  {'total':<14} {sum(self.modules.values()):>7} {self.bytes_before / MB:>11.2f} "
            f"{self.bytes_after / MB:>11.2f}   {self.reduction:.1%} smaller{took}"
        )
        lines += [
            f"  kept in float: {kept.count} x {kept.module_class} "
            f"({kept.n_bytes / MB:.2f} MB, e.g. {kept.example}): {kept.reason}"
            for kept in self.kept
        ]
        lines += [f"  {remark}" for remark in self.remarks] + summarize(self.imported)
        if self.quality == UNMEASURED:
            lines.append("  quality: unmeasured")
        else:
            lines.append(
                "  quality: mean KL {kl_mean:.2e} nats, 99th percentile {kl_p99:.2e}, perplexity "
                "ratio {perplexity_ratio:.4f}, same next token {top1:.2%} on {n_tokens} "
                "tokens".format(**self.quality)
            )
        return "\n".join(lines)


def summarize(imported: list[Imported]) -> list[str]:
    """A line for each way that weights have taken into the model."""
    ways: dict[tuple, list[Imported]] = {}
    for each in imported:
        ways.setdefault((each.source, each.form, each.how), []).append(each)
    lines = []
    for (source, form, how), group in ways.items():
        line = f"  imported: {len(group)} x {source}"
        if how == "float":
            lines.append(f"{line}, left as {form}")
            continue
        worst = max(group, key=lambda each: each.relative_error)
        error = f", error {worst.relative_error:.1e} at most ({worst.name})"
        lines.append(f"{line} as {form}, {how}{'' if how == 'exact' else error}")
    return lines


def count_modules(model: nn.Module) -> dict[str, int]:
    """How many quantized modules each class of :data:`memory.CLASSES` has.

    "shared lm_head" stays out: its modules are counted as the linear and the embedding they are.
    """
    counts = dict.fromkeys(memory.CLASSES, 0)
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            counts[memory.class_of(module)] += 1
    return counts


def count_formats(model: nn.Module) -> dict[str, int]:
    """How many quantized modules have each format, the most frequent first."""
    found = (m.format.name for m in model.modules() if isinstance(m, QuantizedModule))
    return dict(Counter(found).most_common())


def receipt(model: nn.Module) -> Receipt:
    """The receipt of a quantized model.

    After ``quantize`` it is the one that was printed; a saved model keeps it in its config. For one
    that has none, "before" is worked out as the size in the model's own float dtype.

    Raises:
        ValueError: the model has no quantized module.
    """
    if (found := getattr(model, "gpu_poor_receipt", None)) is not None:
        return found
    if not any(isinstance(module, QuantizedModule) for module in model.modules()):
        raise ValueError("the model is not quantized by gpu_poor: there is no receipt")
    dtype = getattr(model, "dtype", torch.float32)
    return make_receipt(model, memory.by_class(model, as_float=dtype))


def check_saved(saved: object) -> dict:
    """What a config says of a receipt, if it can be one.

    Raises:
        ValueError: it cannot.
    """
    try:
        before = {str(name): int(size) for name, size in saved["before"].items()}
        kept = [Kept(**each) for each in saved["kept"]]
        quality = saved["quality"]
        if quality != UNMEASURED:
            quality = {str(name): value for name, value in quality.items()}
            if not all(isinstance(value, int | float | str) for value in quality.values()):
                raise ValueError("quality holds more than numbers")
        if set(before) - set(memory.CLASSES):
            raise ValueError("bytes of unknown classes")
        remarks = [str(remark) for remark in saved["remarks"]]
        imported = [Imported(**each) for each in saved.get("imported", [])]
        # All of it will be printed.
        str(Receipt("", {}, "", "", {}, before, before, kept, remarks, quality, imported=imported))
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"receipt is none: {error!r:.200}") from error
    return {
        "model": str(saved.get("model")),
        "before": dict.fromkeys(memory.CLASSES, 0) | before,
        "kept": kept,
        "remarks": remarks,
        "quality": quality,
        "version": str(saved.get("version")),
        "imported": imported,
    }


def restore(model: nn.Module, saved: dict) -> None:
    """Give a loaded model the receipt it was saved with, unless only a part of it was loaded."""
    known = check_saved(saved)
    if known.pop("model") == type(model).__name__:
        found = make_receipt(model, known.pop("before"))
        model.gpu_poor_receipt = replace(found, **known)


def make_receipt(
    model: nn.Module,
    before: dict[str, int],
    kept: list[Kept] | None = None,
    remarks: list[str] | None = None,
) -> Receipt:
    """The receipt of a quantized model; ``before`` is :func:`memory.by_class` of the float one.

    Remarks on how numbers were chosen are left out where there was nothing to choose: in 16 bits.
    """
    chosen = any(m.format.levels for m in model.modules() if isinstance(m, QuantizedModule))
    return Receipt(
        model=type(model).__name__,
        formats=count_formats(model),
        activation=activations(model),
        kernel=isa.kernels()["int8_linear"],  # others' are of the same or the next slower one
        modules=count_modules(model),
        before=before,
        after=memory.by_class(model),
        kept=kept or [],
        remarks=remarks or [] if chosen else [],
        version=version(),
    )


def version() -> str:
    """Of this gpu_poor."""
    import gpu_poor  # at last, for it imports this module

    return gpu_poor.__version__


def activations(model: nn.Module) -> str:
    """The activation mode of a model, or e.g. "a16, a8" where modules differ."""
    modes = {
        module.activation
        for module in model.modules()
        if isinstance(module, QuantizedModule)
        and memory.class_of(module) != "embedding"
        and module.format.levels is not None
    }
    return ", ".join(sorted(modes)) or FLOAT
