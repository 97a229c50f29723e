"""How close each kernel is to what the machine can do. ``python -m benchmarks.kernels [--quick]``.

Few tokens (M <= 16): weights of each format rotate through more than 2 GB, and between any two
measurements the read-only stream of machine.c passes over the same bytes; the figure is the % of
the two streams around it. More than 102 % means the weights were in a cache: that run fails.
Many tokens (M = 512): TOPS, % of the register-only AMX peak, speed against torch's own matmuls, all
interleaved. Every case is first compared with the reference kernel, then timed.
Shapes are written N x K (out x in features). A sample includes the operator call and its output.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks import machine, timing
from gpu_poor import formats, isa, ops

SHAPES = ((4096, 4096), (5120, 1280), (1280, 5120), (50257, 1280))
GEMM_SHAPES = ((4096, 4096), (5120, 1280))
GEMM_M = 512
MODES = ops.ACTIVATIONS
INT4 = tuple(formats.find(name) for name in ("int4_g32", "int4_g128"))
#: Above this the weights cannot have come from memory.
STREAM_LIMIT = 1.02
#: A case slower than this per sweep continues its rotation in the next sample.
SAMPLE_S = 0.25


class Rotation:
    """Weights [N, K] in one format, cut from one cold buffer and taken in turn, with scales."""

    def __init__(self, buffer: torch.Tensor, form: formats.Format, n: int, k: int):
        (shape, dtype), (scale_shape, scale_dtype) = form.storage(n, k)
        size = math.prod(shape)
        self.form, self.shape = form, (n, k)
        self.count = buffer.numel() // size
        self.weights = buffer[: self.count * size].view(dtype).view(self.count, *shape).unbind()
        scales = torch.empty(self.count, *scale_shape, dtype=scale_dtype)
        self.scales = scales.uniform_(1e-4, 1e-3).unbind()
        self.turn = itertools.cycle(range(self.count))
        self.bytes = formats.stored_bytes(form, n, k)

    def linear(self, x: torch.Tensor, i: int, activation_bits: int) -> torch.Tensor:
        n = self.shape[0]
        return self.form.linear(x, self.weights[i], self.scales[i], None, n, activation_bits)

    def seconds(self, x: torch.Tensor, activation_bits: int, n_calls: int) -> float:
        """Of one linear, over the next weights."""
        turns = list(itertools.islice(self.turn, n_calls))

        def sweep():
            for i in turns:
                self.linear(x, i, activation_bits)

        return timing.once(sweep) / n_calls


def verify(x: torch.Tensor, rotation: Rotation, bits: int, cap: str) -> float:
    """Compare an ISA with the reference; returns the relative error against float64.

    Raises RuntimeError if what must be the same bits is not, or a32 of int8 differs by more than
    rounding.
    """
    with isa.cap("ref"):
        expected = rotation.linear(x, 0, bits)
    with isa.cap(cap):
        y = rotation.linear(x, 0, bits)
    form, (weight, scale) = rotation.form, (rotation.weights[0], rotation.scales[0])
    exact = x.double() @ form.dequantize(weight, scale, rotation.shape, torch.float32).double().T
    same = torch.equal(y, expected) if bits != 32 else torch.allclose(
        y, expected, rtol=0, atol=1e-5 * float(exact.abs().max())
    )  # fmt: skip
    if not same:
        raise RuntimeError(f"{form.name} {cap} a{bits} {rotation.shape} M={len(x)}: not ref")
    return float((y.double() - exact).norm() / exact.norm())


def gemv(stream: machine.Stream, form: formats.Format, n: int, k: int, cases: list[tuple],
         rounds: int) -> list[dict]:  # fmt: skip
    """Rows for few tokens on one shape; ``cases`` are (M, mode, ISA)."""
    rotation = Rotation(stream.buffer, form, n, k)
    rows, work = [], []
    op = f"int{form.bits}_linear"
    for m, mode, cap in cases:
        x, bits = torch.randn(m, k), MODES[mode]
        error = verify(x[:1], rotation, bits, cap)
        with isa.cap(cap):
            kernel = isa.kernels()["int8_linear" if form is formats.INT8 else "grouped_linear"]
            per_call = rotation.seconds(x, bits, min(8, rotation.count))
        n_calls = max(2, min(rotation.count, int(SAMPLE_S / per_call)))
        work.append((cap, x, bits, n_calls, [], [], []))
        rows.append({"op": op, "format": form.name, "n": n, "k": k, "m": m, "mode": mode,
                     "isa": cap, "kernel": kernel, "bytes": rotation.bytes,
                     "relative_error": error})  # fmt: skip
    for _ in range(rounds):
        before = stream.gb_s()
        for cap, x, bits, n_calls, seconds, streams, shares in work:
            with isa.cap(cap):
                seconds.append(rotation.seconds(x, bits, n_calls))
            after = stream.gb_s()
            streams.append((before + after) / 2)
            shares.append(rotation.bytes / seconds[-1] / 1e9 / streams[-1])
            before = after
    for row, (_, _, _, _, seconds, streams, shares) in zip(rows, work, strict=True):
        row |= {
            "seconds": timing.summary(seconds),
            "gb_s": rotation.bytes / timing.summary(seconds)["median"] / 1e9,
            "stream_gb_s": timing.summary(streams)["median"],
            "of_stream": timing.summary(shares),
        }
    return rows


def warm_rows(rows: list[dict]) -> list[str]:
    """The rows whose weights came faster than memory can give them: a broken measurement."""
    return [
        f"{row['format']} {row['n']}x{row['k']} M={row['m']} {row['mode']} {row['isa']}: "
        f"{row['of_stream']['median']:.1%} of the stream"
        for row in rows
        if "of_stream" in row and row["of_stream"]["median"] > STREAM_LIMIT
    ]


def gemm_contenders(buffer: torch.Tensor, n: int, k: int, m: int) -> dict[str, Callable]:
    """What multiplies [M, K] by [N, K]: gpu-poor's formats, modes and ISAs, torch's own ops."""
    x = torch.randn(m, k)
    calls: dict[str, Callable] = {}

    def ours(name: str, rotation: Rotation, cap: str, bits: int, x: torch.Tensor) -> None:
        def call():
            with isa.cap(cap):
                rotation.linear(x, next(rotation.turn), bits)

        calls[name] = call

    caps = [c for c in isa.available() if c not in ("torch", "ref")]
    for form in (formats.INT8, *INT4):
        rotation = Rotation(buffer[: 8 * n * k], form, n, k)
        label = "" if form is formats.INT8 else f"{form.name} "
        for cap in caps if form is formats.INT8 else caps[-1:]:
            for mode, bits in MODES.items():
                verify(x[:16], rotation, bits, cap)
                # Results do not depend on how M is split, so a few rows vouch for the whole.
                with isa.cap(cap):
                    whole, part = (rotation.linear(r, 0, bits)[:16] for r in (x, x[:16]))
                if bits != 32 and not torch.equal(whole, part):
                    raise RuntimeError(f"{form.name} {cap} {mode} {n}x{k}: M=512 is not M=16")
                ours(f"{label}{mode} {cap}", rotation, cap, bits, x)
        if form is formats.INT8:
            for mode in ("a8", "a16"):
                name = f"{mode} {caps[-1]} bf16 in and out"
                ours(name, rotation, caps[-1], MODES[mode], x.bfloat16())
    for dtype, name in ((torch.float32, "torch fp32"), (torch.bfloat16, "torch bf16")):
        turn, xt = itertools.cycle([torch.randn(n, k).to(dtype) for _ in range(4)]), x.to(dtype)
        calls[name] = lambda turn=turn, xt=xt: F.linear(xt, next(turn))
    x8 = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    plain = Rotation(buffer[: 8 * n * k], formats.INT8, n, k)
    turn8 = itertools.cycle([weight.T for weight in plain.weights])
    calls["torch _int_mm (no scales)"] = lambda: torch._int_mm(x8, next(turn8))
    return calls


def gemm(buffer: torch.Tensor, n: int, k: int, rounds: int, threads: int) -> list[dict]:
    """Rows for M = 512 on one shape.

    The AMX peak is the threads' own timing (machine.peaks): a call short enough to take turns here
    is mostly thread start, which made the shares twice too good.
    """
    calls = gemm_contenders(buffer, n, k, GEMM_M)
    peak_tops = machine.peaks(threads)["amx_tops"]
    samples = timing.interleave(calls, rounds, warmup=2)
    operations = 2 * GEMM_M * n * k
    rows = []
    for name, seconds in samples.items():
        row = {"op": "matmul", "n": n, "k": k, "m": GEMM_M, "name": name,
               "seconds": timing.summary(seconds),
               "tops": operations / timing.summary(seconds)["median"] / 1e12}  # fmt: skip
        for rival in ("torch fp32", "torch bf16"):
            row[f"speedup_{rival.split()[1]}"] = timing.summary(
                timing.ratios(samples[rival], seconds)
            )
        if peak_tops:
            shares = [operations / second / 1e12 / peak_tops for second in seconds]
            row["of_amx_peak"] = timing.summary(shares)
        rows.append(row)
    return rows


def others(buffer: torch.Tensor, rounds: int) -> list[dict]:
    """The remaining operators: GB/s read and written, and gram against torch.mm."""
    n, k = 4096, 4096
    floats = [torch.randn(n, k) * 0.02 for _ in range(6)]
    halves = [f.bfloat16() for f in floats]
    quantized = Rotation(buffer[: 16 * n * k], formats.INT8, n, k)
    table = Rotation(buffer[: 4 * 50257 * 1280], formats.INT8, 50257, 1280)
    tokens = torch.randint(0, 50257, (512,))
    tall = torch.randn(2048, 1280)
    gram = torch.zeros(1280, 1280)

    def over(items, function):
        turn = itertools.cycle(items)
        return lambda: function(next(turn))

    pairs = list(zip(quantized.weights, quantized.scales, strict=True))
    tables = list(zip(table.weights, table.scales, strict=True))
    calls = {  # name: (call, bytes read and written, shape)
        "int8_quantize f32": (over(floats, ops.int8_quantize), 5 * n * k, "4096x4096"),
        "int8_quantize bf16": (over(halves, ops.int8_quantize), 3 * n * k, "4096x4096"),
        "int8_dequantize to f32": (
            over(pairs, lambda p: ops.int8_dequantize(*p)), 5 * n * k, "4096x4096"),
        "int8_dequantize to bf16": (
            over(pairs, lambda p: ops.int8_dequantize(*p, torch.bfloat16)), 3 * n * k, "4096x4096"),
        "int8_embedding, 512 tokens": (
            over(tables, lambda p: ops.int8_embedding(tokens, *p)), 5 * 512 * 1280, "50257x1280"),
        "channel_stats": (over([tall], ops.channel_stats), 4 * tall.numel(), "2048x1280"),
        "gram_": (lambda: ops.gram_(gram, tall), 4 * tall.numel(), "2048x1280"),
        "torch.mm(x.T, x)": (lambda: torch.mm(tall.T, tall), 4 * tall.numel(), "2048x1280"),
    }  # fmt: skip
    samples = timing.interleave({name: c for name, (c, _, _) in calls.items()}, rounds, warmup=2)
    rows = []
    for name, (_, n_bytes, shape) in calls.items():
        summary = timing.summary(samples[name])
        rows.append({"name": name, "shape": shape, "bytes": n_bytes, "seconds": summary,
                     "gb_s": n_bytes / summary["median"] / 1e9})  # fmt: skip
    slower = timing.ratios(samples["gram_"], samples["torch.mm(x.T, x)"])
    next(row for row in rows if row["name"] == "gram_")["time_of_torch_mm"] = timing.summary(slower)
    return rows


def gemv_cases(quick: bool) -> list[tuple]:
    """(M, mode, ISA): everything on the fastest ISA, the ends of the range on the slower ones."""
    caps = [cap for cap in isa.available() if cap not in ("torch", "ref")]
    best = [(m, mode, caps[-1]) for m in ((1, 16) if quick else (1, 2, 4, 16)) for mode in MODES]
    rest = [(m, mode, cap) for cap in caps[:-1] for m in (1, 16) for mode in MODES]
    return best if quick else best + rest


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one or two shapes, 3 rounds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="default: benchmarks/results/kernels.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rounds = 3 if args.quick else args.rounds
    stream = machine.Stream(machine.cold_buffer(2.2), args.threads)
    loops = stream.tune()
    record = {"header": machine.header(args.threads), "isa": isa.current(),
              "stream_gb_s": max(loops.values()), "gemv": [], "gemm": [], "others": []}  # fmt: skip
    with torch.inference_mode():
        for n, k in SHAPES[:: 2 if args.quick else 1]:
            for form in (formats.INT8, *INT4):
                for row in gemv(stream, form, n, k, gemv_cases(args.quick), rounds):
                    record["gemv"].append(row)
                    print("{format} {n}x{k} M={m} {mode} {isa}: {gb_s:.1f} GB/s, ".format(**row)
                          + f"{row['of_stream']['median']:.1%} of the stream")  # fmt: skip
        for n, k in GEMM_SHAPES[: 1 if args.quick else 2]:
            for row in gemm(stream.buffer, n, k, 3 * rounds, args.threads):
                record["gemm"].append(row)
                print("{n}x{k} M={m} {name}: {tops:.2f} TOPS, ".format(**row)
                      + f"{row['speedup_bf16']['median']:.2f} x torch bf16")  # fmt: skip
        record["others"] = others(stream.buffer, 3 * rounds)
        for row in record["others"]:
            print("{name} {shape}: {gb_s:.1f} GB/s".format(**row))
    record["warm"] = warm_rows(record["gemv"])
    machine.save(record, args.json, "kernels.json")
    for line in record["warm"]:
        print(f"FAILED, not cold: {line}", file=sys.stderr)
    return 1 if record["warm"] else 0


if __name__ == "__main__":
    sys.exit(main())
