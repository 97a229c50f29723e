"""Decode through ``generate``: how close to the read stream, and where a token's time goes.

``python -m benchmarks.decode [--shapes ...] [--bits 8 4] [--threads 2] [--quick]``. Published
shapes with random weights, batch 1. Ways of one shape take turns in one process: fused blocks of
each format, the same int8 weights unfused, transformers in float32. The bound is what reading every
weight once takes at the read stream measured in the same round; the step's C call and the head are
timed inside of the fused way, what is left is Python. Then another process keeps one core busy.
After that: speed over context length, an ablation and a timeline (benchmarks/decode_contexts.py).
"""

import argparse
import contextlib
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

import gpu_poor
from benchmarks import decode_contexts, machine, shapes, timing
from benchmarks.peers.runner import TransformersRunner
from gpu_poor import ops

SHAPES = ("gpt2", "gpt2-large", "tinyllama-1.1b")


class Spans:
    """Seconds spent in the step's operator and in the head, of a model's fused path."""

    def __init__(self, model):
        self.seconds = {"step": [], "head": []}
        self._model, self._step = model, ops.decoder_step

    def __enter__(self) -> "Spans":
        ops.decoder_step = self._timed
        head = self._model.get_output_embeddings()
        start = []
        self._hooks = [
            head.register_forward_pre_hook(lambda *args: start.append(time.perf_counter())),
            head.register_forward_hook(
                lambda *args: self.seconds["head"].append(time.perf_counter() - start.pop())
            ),
        ]
        return self

    def __exit__(self, *args) -> None:
        ops.decoder_step = self._step
        for hook in self._hooks:
            hook.remove()

    def _timed(self, *args):
        start = time.perf_counter()
        try:
            return self._step(*args)
        finally:
            self.seconds["step"].append(time.perf_counter() - start)

    def median(self, name: str) -> float:
        """Raises ValueError if the fused path never ran: its figures would be another path's."""
        if not self.seconds[name]:
            raise ValueError(f"no {name} was timed: {gpu_poor.explain(self._model)}")
        return statistics.median(self.seconds[name])


def _spin(stop) -> None:
    while not stop.is_set():
        sum(range(100_000))


@contextlib.contextmanager
def busy_core():
    """Another process of equal priority that never waits."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    process = context.Process(target=_spin, args=(stop,), daemon=True)
    process.start()
    time.sleep(1.0)
    try:
        yield
    finally:
        stop.set()
        process.join()


def touched(model) -> int:
    """Bytes of the weights that a token reads: all but a table that is no head."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tables = {id(table)} if head.weight is not table.weight else set()
    seen = {}
    for module in model.modules():
        if id(module) in tables or "Embedding" in type(module).__name__ and module is not table:
            continue
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            seen[tensor.data_ptr()] = tensor.nbytes
    return sum(seen.values())


def ways(shape: str, args) -> dict[str, nn.Module]:
    """The models of a shape by name: ``int8``, ``int4``, ``int8 unfused``, ``fp32``."""
    models = {}
    for bits in args.bits:
        model = gpu_poor.quantize(
            shapes.build(shape), bits, activation=args.activation, verbose=False, fuse=True
        )
        models[f"int{bits}"] = model
        if bits == 8:
            models["int8 unfused"] = gpu_poor.unfuse(decode_contexts.twin(model))
    return models | {"fp32": shapes.build(shape)}


def measure(shape: str, args, stream: machine.Stream) -> dict:
    """One shape: seconds a token of each way, and of the parts of the fused ones."""
    models = ways(shape, args)
    runners = {name: TransformersRunner(model, 0) for name, model in models.items()}
    spans = {name: Spans(model) for name, model in models.items() if name in _fused(args)}

    def decode(name: str) -> float:
        return runners[name].generate(args.prompt, args.tokens + 1)[1]

    for name in models:
        decode(name)
    samples: dict[str, list[float]] = {name: [] for name in models}
    rates = []
    for r in range(args.rounds):
        rates.append(1e9 * stream.best())
        for name in list(models)[:: 1 if r % 2 == 0 else -1]:
            with spans.get(name, contextlib.nullcontext()):
                samples[name].append(decode(name))
    with busy_core():
        busy = {name: [decode(name) for _ in range(args.rounds)] for name in spans}
    rows = []
    for name, seconds in samples.items():
        row = {"name": name, "bytes": touched(models[name]), "seconds": timing.summary(seconds),
               "samples": seconds}  # fmt: skip
        row["of_stream"] = timing.summary(
            [row["bytes"] / s / rate for s, rate in zip(seconds, rates, strict=True)]
        )
        for base in ("fp32", "int8"):
            if base in samples:
                row[f"over_{base}"] = timing.summary(timing.ratios(samples[base], seconds))
        if name in spans:
            row["step_s"], row["head_s"] = map(spans[name].median, ("step", "head"))
            row["python_s"] = row["seconds"]["median"] - row["step_s"] - row["head_s"]
            row["kept_when_busy"] = timing.summary(timing.ratios(seconds, busy[name]))
        rows.append(row)
    return {"shape": shape, "stream_gb_s": timing.summary(rates)["median"] / 1e9, "rows": rows}


def _fused(args) -> list[str]:
    return [f"int{bits}" for bits in args.bits]


def report(shape: str, row: dict) -> str:
    parts = [f"{1e3 * row['seconds']['median']:.2f} ms, {row['of_stream']['median']:.0%} of the "
             f"stream, {row['over_fp32']['median']:.2f} x fp32"]  # fmt: skip
    if "step_s" in row:
        step, head, rest = (1e3 * row[key] for key in ("step_s", "head_s", "python_s"))
        parts.append(f"step {step:.2f}, head {head:.2f}, the rest {rest:.2f}")
        parts.append(f"with a busy core {row['kept_when_busy']['median']:.0%} of the speed")
    return f"{shape} {row['name']}: " + "; ".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4], choices=(4, 8))
    parser.add_argument("--activation", default="a16", choices=ops.ACTIVATIONS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    decode_contexts.add_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, 2 rounds")
    parser.add_argument("--json", help="default: benchmarks/results/decode.json")
    parser.add_argument(
        "--only-shapes", action="store_true", help="keep what the file has of all that comes after"
    )
    args = parser.parse_args(argv)
    if args.quick:
        args.shapes, args.rounds, args.tokens = ["tiny-gpt2", "tiny-llama"], 2, 8
        decode_contexts.make_quick(args)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    parts: dict[str, Callable] = {
        "contexts": decode_contexts.contexts,
        "ablation": decode_contexts.ablation,
        "timeline": decode_contexts.timeline,
    }
    kept = {}
    if args.only_shapes:
        found = machine.saved(args.json, "decode.json")
        kept = {name: found[name] for name in parts}
    stream = machine.Stream(machine.cold_buffer(1.1), args.threads)
    record = {"header": machine.header(args.threads), "complete": False,
              "stream_gb_s": max(stream.tune().values()), "shapes": [], **kept}  # fmt: skip
    for shape in args.shapes:
        record["shapes"].append(measure(shape, args, stream))
        for row in record["shapes"][-1]["rows"]:
            print(report(shape, row), flush=True)
        machine.save(record, args.json, "decode.json")
    del stream
    for name, measured in parts.items():
        if name in kept:
            continue
        record[name] = measured(args)
        machine.save(record, args.json, "decode.json")
    record["complete"] = True
    machine.save(record, args.json, "decode.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
