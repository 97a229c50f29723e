"""Where a token's time goes: decode through ``generate``, fused blocks against eager ones.

``python -m benchmarks.decode [--shapes ...] [--bits 8] [--threads 2] [--busy]``. Published shapes
with random weights, batch 1. Fused and eager take turns in one process, on the same weights; the
step's C call and the head are timed inside of the fused one, what is left is Python. The bound is
what reading every weight once takes at the best read loop of this machine, measured in between.
With ``--busy`` another process keeps one core busy, and the quiet figure is measured beside it.
"""

import argparse
import contextlib
import json
import multiprocessing
import statistics
import sys
import time

import torch

import gpu_poor
from benchmarks import machine, shapes, timing
from benchmarks.peers.runner import TransformersRunner
from gpu_poor import ops


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
        return statistics.median(self.seconds[name]) if self.seconds[name] else float("nan")


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


def measure(shape: str, args) -> dict:
    """One shape: seconds a token of each path in each round, and of the parts of the fused one."""
    model = gpu_poor.quantize(
        shapes.build(shape), args.bits, activation=args.activation, verbose=False, fuse=True
    )
    runner = TransformersRunner(model, 0)

    def fused():
        return runner.generate(args.prompt, args.tokens + 1)[1]

    def eager():
        gpu_poor.unfuse(model)
        try:
            return runner.generate(args.prompt, args.tokens + 1)[1]
        finally:
            gpu_poor.fuse(model)

    ways = {"fused": fused} if args.only_fused else {"fused": fused, "eager": eager}
    for way in ways.values():
        way()
    samples = {name: [] for name in ways}
    spans = Spans(model)
    for r in range(args.rounds):
        for name in list(ways)[:: 1 if r % 2 == 0 else -1]:
            with spans if name == "fused" else contextlib.nullcontext():
                samples[name].append(ways[name]())
    if args.busy:
        with busy_core():
            samples["busy"] = [fused() for _ in range(args.rounds)]
    step, head = spans.median("step"), spans.median("head")
    n_bytes = touched(model)
    result = {
        "shape": shape,
        "bytes": n_bytes,
        "seconds": {name: timing.summary(values) for name, values in samples.items()},
        "step_s": step,
        "head_s": head,
        "python_s": statistics.median(samples["fused"]) - step - head,
        "explained": str(gpu_poor.explain(model)),
    }
    if "busy" in samples:
        result["kept_when_busy"] = timing.summary(timing.ratios(samples["fused"], samples["busy"]))
    return result


def report(result: dict, read_gb_s: float) -> str:
    bound = result["bytes"] / 1e9 / read_gb_s
    seconds = {name: s["median"] for name, s in result["seconds"].items()}
    parts = [f"{name} {1e3 * s:.2f} ms" for name, s in seconds.items()]
    parts.append(
        f"of the fused: step {1e3 * result['step_s']:.2f}, head {1e3 * result['head_s']:.2f}, "
        f"the rest {1e3 * result['python_s']:.2f}"
    )
    parts.append(f"bound {1e3 * bound:.2f} ms ({100 * bound / seconds['fused']:.0f} %)")
    if "kept_when_busy" in result:
        parts.append(f"busy core: {100 * result['kept_when_busy']['median']:.0f} % of the speed")
    return f"{result['shape']}: " + "; ".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["gpt2", "gpt2-large", "tinyllama-1.1b"])
    parser.add_argument("--bits", type=int, default=8, choices=(4, 8, 16))
    parser.add_argument("--activation", default="a16", choices=ops.ACTIVATIONS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--only-fused", action="store_true")
    parser.add_argument("--busy", action="store_true", help="and with another process on one core")
    parser.add_argument("--read-gb-s", type=float, help="the read stream, if it is known")
    parser.add_argument("--json", help="where to write the record; default: nowhere")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    stream = args.read_gb_s
    if stream is None:
        loops = machine.Stream(machine.cold_buffer(1.1), args.threads)
        stream = max(loops.tune().values())
    print(f"read stream {stream:.1f} GB/s, {args.threads} threads, {args.bits} bits", flush=True)
    record = {"header": machine.header(args.threads), "read_gb_s": stream, "shapes": []}
    for shape in args.shapes:
        record["shapes"].append(measure(shape, args))
        print(report(record["shapes"][-1], stream), flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(record | {"options": vars(args)}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
