"""The figures the project set itself, and what the JSON files say of each: met or missed.

Each function takes a record (or None) and yields ``(goal, measured, met)``. The measured value is
always the worst case over what the goal covers.
"""

import math
from collections.abc import Iterator

Goal = tuple[str, str, bool]


def _worst(rows: list[dict], value, highest: bool = False) -> tuple[float, dict] | None:
    scored = [(value(row), i) for i, row in enumerate(rows)]
    if not scored:
        return None
    best = max(scored) if highest else min(scored)
    return best[0], rows[best[1]]


def at_least(text: str, rows: list[dict], value, limit: float, show, where) -> Iterator[Goal]:
    """One goal that every row must reach."""
    worst = _worst(rows, value)
    if worst:
        yield f"{text} ≥ {show(limit)}", f"{show(worst[0])} ({where(worst[1])})", worst[0] >= limit


def at_most(text: str, rows: list[dict], value, limit: float, show, where) -> Iterator[Goal]:
    """One goal that no row may exceed."""
    worst = _worst(rows, value, highest=True)
    if worst:
        yield f"{text} ≤ {show(limit)}", f"{show(worst[0])} ({where(worst[1])})", worst[0] <= limit


def percent(x: float) -> str:
    return f"{100 * x:.1f} %"


def times(x: float) -> str:
    return f"{x:.2f}x"


def kernels(record: dict | None) -> Iterator[Goal]:
    if not record:
        return
    best = record["isa"]

    def gemv(what, limit, op, isa, m, modes):
        rows = [r for r in record["gemv"] if (r["op"], r["isa"], r["m"]) == (op, isa, m)]
        return at_least(
            f"{op} {what}, of the read stream", [r for r in rows if r["mode"] in modes],
            lambda r: r["of_stream"]["median"], limit, percent,
            lambda r: f"{r['format']} {r['n']}x{r['k']} {r['mode']}")  # fmt: skip

    both = ("a8", "a16")
    yield from gemv("M=1 a8", 0.92, "int8_linear", best, 1, ("a8",))
    yield from gemv("M=1 a16", 0.90, "int8_linear", best, 1, ("a16",))
    yield from gemv("M=1 on AVX2", 0.80, "int8_linear", "avx2", 1, both)
    yield from gemv("M=16", 0.80, "int8_linear", best, 16, both)
    yield from gemv("M=1 a8", 0.85, "int4_linear", "avx512_vnni", 1, ("a8",))
    yield from gemv("M=1 a16", 0.80, "int4_linear", "avx512_vnni", 1, ("a16",))
    yield from gemv("M=1 on AVX2", 0.60, "int4_linear", "avx2", 1, both)

    def gemm(text, limit, name, key, show=times):
        rows = [r for r in record["gemm"] if r["name"] == name and key in r]
        return at_least(text, rows, lambda r: r[key]["median"], limit, show,
                        lambda r: f"{r['n']}x{r['k']}")  # fmt: skip

    yield from gemm("M=512 a8, of the AMX peak", 0.50, f"a8 {best}", "of_amx_peak", percent)
    yield from gemm("M=512 a8 over torch bf16", 2.5, f"a8 {best}", "speedup_bf16")
    yield from gemm("M=512 a16 over torch bf16", 1.4, f"a16 {best}", "speedup_bf16")
    yield from gemm("M=512 a8 without AMX over torch fp32", 3.0, "a8 avx512_vnni", "speedup_fp32")
    gram = [r for r in record["others"] if "time_of_torch_mm" in r]
    yield from at_most("gram_, time of torch.mm", gram, lambda r: r["time_of_torch_mm"]["median"],
                       2.0, times, lambda r: r["shape"])  # fmt: skip


INT8, INT4 = "gpu_poor:int8", "gpu_poor:int4"
#: Shapes that no cache holds.
BIG = ("gpt2-large", "tinyllama-1.1b")


def ours(
    record: dict, shapes: tuple[str, ...] | None = None, names: tuple[str, ...] = (INT8,)
) -> list[dict]:
    """gpu-poor's rows with their shape, where they ran."""
    return [
        row | {"shape": shape}
        for shape, result in record["shapes"].items()
        if shapes is None or shape in shapes
        for row in result["rows"]
        if row["name"] in names and not row["error"]
    ]


def models(record: dict | None, peers: dict | None) -> Iterator[Goal]:
    def speed(source, measurement, base, label, limit, name=INT8):
        if not source:
            return
        rows = [r for r in ours(source, BIG, (name,)) if measurement in r["speedup"].get(base, {})]
        yield from at_least(
            f"{name[-4:]}: {measurement.replace('_', ' ')} over {label}", rows,
            lambda r: r["speedup"][base][measurement]["median"], limit, times,
            lambda r: r["shape"],
        )  # fmt: skip

    yield from speed(record, "decode", "torch_fp32", "transformers fp32", 2.3)
    yield from speed(record, "decode", "torch_bf16", "transformers bf16", 2.0)
    yield from speed(record, "prefill_128", "torch_fp32", "transformers fp32", 3.5)
    yield from speed(record, "prefill_128", "torch_bf16", "transformers bf16", 1.4)
    yield from speed(peers, "prefill_128", "llama_cpp:q8_0", "llama.cpp Q8_0", 1.6)
    yield from speed(peers, "prefill_512", "llama_cpp:q4_0", "llama.cpp Q4_0", 1.5, INT4)
    if record:
        gpt2 = ours(record, ("distilgpt2", "gpt2", "gpt2-medium", "gpt2-large"))
        yield from at_least("parameter bytes reduced, GPT-2 family", gpt2,
                            lambda r: 1 - r["bytes"] / r["bytes_before"], 0.745, percent,
                            lambda r: r["shape"])  # fmt: skip


def memory(record: dict | None) -> Iterator[Goal]:
    if not record:
        return
    rows = [row for row in record["rows"] if "of_bytes" in row]
    yield from at_most("process above one without a model, of the model's bytes", rows,
                       lambda r: r["of_bytes"], 1.05, percent,
                       lambda r: f"{r['shape']} {r['how'].replace('_', ' ')}")  # fmt: skip
    large = [r for r in rows if r["shape"] == "gpt2-large" and "quantize_s" in r]
    yield from at_most("quantize() of GPT-2-large in memory", large, lambda r: r["quantize_s"],
                       4.0, lambda x: f"{x:.1f} s", lambda r: "seconds, float32")  # fmt: skip
    streamed = [row for row in record["streamed"] if "peak_of_goal" in row]
    for key, pages in (("peak_of_goal", "with file pages"), ("peak_anon_of_goal", "anonymous")):
        text = f"peak while loading ({pages}), of 1.10 x the model + largest tensor"
        yield from at_most(text, streamed, lambda r, key=key: r[key], 1.0, percent,
                           lambda r: r["shape"])  # fmt: skip
    big = record.get("big")
    if big:
        goal = (f"{big['shape']}, {big['checkpoint_bytes'] / 1e9:.1f} GB checkpoint, quantized and "
                f"used within {big['limit_bytes'] / 1e9:.1f} GB")  # fmt: skip
        done = f"works ({big['limit']}, {len(big.get('tokens', []))} tokens)"
        yield goal, big.get("error") or done, "error" not in big


def quality(record: dict | None) -> Iterator[Goal]:
    if not record:
        return
    rows = [row["quality"] | row for row in record["rows"]]
    plain = [row for row in rows if row["variant"] == "plain" and row["mode"] == "a16"]
    name = lambda r: r["model"]  # noqa: E731
    yield from at_most("mean KL, a16, every model", plain, lambda r: r["kl_mean"], 7e-4,
                       "{:.1e}".format, name)  # fmt: skip
    yield from at_most("perplexity ratio", plain, lambda r: r["perplexity_ratio"], 1.003,
                       "{:.4f}".format, name)  # fmt: skip
    yield from at_least("top-1 agreement", plain, lambda r: r["top1"], 0.975, percent, name)
    exact = {(r["model"], r["variant"]): r["kl_mean"] for r in rows if r["mode"] == "a32"}
    close = [r for r in rows if r["mode"] == "a16"]
    yield from at_most("mean KL of a16 away from a32, outlier variants included", close,
                       lambda r: abs(r["kl_mean"] - exact[r["model"], r["variant"]]), 1e-5,
                       "{:.1e}".format, lambda r: f"{r['model']} {r['variant']}")  # fmt: skip


def planning(record: dict | None) -> Iterator[Goal]:
    if not record:
        return
    plans = [r for r in record["summary"] if r["rows"] == "plans" and r["basis"] != "weights"]
    yield from at_least("predicted KL ranks plans as measured KL does: Spearman", plans,
                        lambda r: r["spearman"], 0.9, "{:.3f}".format,
                        lambda r: f"{r['model']}, {r['basis']}")  # fmt: skip
    made = [r for r in record["rows"] if r["kind"] == "planned" and "bytes" in r]
    used = lambda r: r["bytes"] / r["target_bytes"]  # noqa: E731
    where = lambda r: f"{r['model']}, {r['target']} of the float model"  # noqa: E731
    yield from at_least("memory_target used", made, used, 0.99, percent, where)
    yield from at_most("memory_target used", made, used, 1.0, percent, where)


#: ``{(format, strategy): (what, {model: largest mean KL})}``; the strategies are the defaults.
LOW_BITS = {
    ("int4_g64_asym", "equalize + mse"): (
        "4.5 bits without data", {"stories260k-llama": 0.085, "tinystories-656k-llama": 0.055}),
    ("int4_g32_asym", "equalize + mse"): (
        "5.0 bits without data", {"stories260k-llama": 0.060, "tinystories-656k-llama": 0.038}),
    ("int4_g64_asym", "equalize + gptq"): (
        "4.5 bits, calibrated", {"stories260k-llama": 0.055, "tinystories-656k-llama": 0.034}),
    ("int4_g32_asym", "equalize + gptq"): (
        "5.0 bits, calibrated", {"stories260k-llama": 0.043, "tinystories-656k-llama": 0.025}),
}  # fmt: skip


def at_bits(rows: list[dict], model: str, bits: float) -> float | None:
    """Mean KL of the default without data at some bits per weight: log KL is linear between two."""
    points = sorted(
        (r["bits_per_weight"], math.log(r["quality"]["kl_mean"])) for r in rows
        if (r["model"], r["variant"], tuple(r["strategy"])) == (model, "plain", ("equalize", "mse"))
        and r["format"] != "int4_g32"
    )  # fmt: skip
    if len(points) < 2:
        return None
    i = next((i for i in range(1, len(points) - 1) if bits <= points[i][0]), len(points) - 1)
    (b0, k0), (b1, k1) = points[i - 1 : i + 1]
    return math.exp(k0 + (k1 - k0) * (bits - b0) / (b1 - b0))


def strategies(record: dict | None) -> Iterator[Goal]:
    if not record:
        return
    rows = [
        row["quality"] | row | {"strategy": " + ".join(row["strategy"])} for row in record["rows"]
    ]
    for (form, strategy), (text, limits) in LOW_BITS.items():
        for model, limit in limits.items():
            found = [r for r in rows if (r["model"], r["variant"], r["format"], r["strategy"])
                     == (model, "plain", form, strategy)]  # fmt: skip
            yield from at_most(
                f"mean KL, {text}, {model}", found, lambda r: r["kl_mean"], limit,
                "{:.4f}".format, lambda r: f"{r['format']}, {r['strategy']}",
            )  # fmt: skip
    outliers = [r for r in rows if (r["variant"], r["format"], r["strategy"])
                == ("outliers", "int8", "equalize + mse")]  # fmt: skip
    yield from at_most(
        "mean KL, 8 bits without data, outlier variants", outliers, lambda r: r["kl_mean"],
        1.2e-3, "{:.1e}".format, lambda r: r["model"],
    )  # fmt: skip
    peers = [(r, at_bits(record["rows"], r["model"], r["bits_per_weight"]))
             for r in record.get("peers", [])]  # fmt: skip
    yield from at_most(
        "mean KL without data, over a rival's at as many bits", [p for p in peers if p[1]],
        lambda p: p[1] / p[0]["quality"]["kl_mean"], 1.0, "{:.3f}x".format,
        lambda p: f"{p[0]['peer']}, {p[0]['model']}",
    )  # fmt: skip


def calibration(record: dict | None) -> Iterator[Goal]:
    if not record:
        return
    for how, limit in (("mse", 60), ("gptq", 1200)):
        yield from at_most(f"quantize(bits=4) by {how}, seconds",
                           [r for r in record["rows"] if r["strategy"] == how],
                           lambda r: r["seconds"], limit, "{:.0f} s".format,
                           lambda r: f"{r['shape']}, {r['tokens']} tokens")  # fmt: skip
    yield from at_most("gptq, peak above the quantized model and one block in float32",
                       [r for r in record["rows"] if r["strategy"] == "gptq"],
                       lambda r: r["above"] / 1e9, 1.0, "{:.2f} GB".format,
                       lambda r: r["shape"])  # fmt: skip


def decode(record: dict | None) -> Iterator[Goal]:
    if not record:
        return
    rows = [row | {"shape": result["shape"]} for result in record["shapes"]
            for row in result["rows"]]  # fmt: skip

    def goal(text, name, key, limit, show, shapes=None):
        found = [r for r in rows if r["name"] == name and key in r
                 and (shapes is None or r["shape"] in shapes)]  # fmt: skip
        return at_least(text, found, lambda r: r[key]["median"], limit, show,
                        lambda r: r["shape"])  # fmt: skip

    yield from goal("int8: decode, of the read stream", "int8", "of_stream", 0.85, percent, BIG)
    yield from goal("int8: decode over transformers fp32, fused", "int8", "over_fp32", 3.0, times)
    yield from goal("int4: decode over int8", "int4", "over_int8", 1.4, times, BIG)
    yield from goal("int8: decode with one of two cores busy, speed kept", "int8",
                    "kept_when_busy", 0.4, percent)  # fmt: skip


def attention(record: dict | None) -> Iterator[Goal]:
    if not record:
        return
    shape = {"length": 8192, "heads": 32, "kv_heads": 8, "head_dim": 128}
    rows = [
        r for r in record["rows"] if r["name"].startswith("pages") and shape.items() <= r.items()
    ]
    name = lambda r: r["name"]  # noqa: E731
    yield from at_least("decode attention, 8192 tokens, of the read stream", rows,
                        lambda r: r["of_stream"]["median"], 0.5, percent, name)  # fmt: skip
    yield from at_least("decode attention, 8192 tokens, over SDPA fp32", rows,
                        lambda r: r["over_sdpa_fp32"]["median"], 3.0, times, name)  # fmt: skip
    yield from at_least("int8 keys and values, times smaller than fp16 in resident memory",
                        [r for r in record["memory"] if r["name"] == "pages int8"],
                        lambda r: r["smaller_than_fp16"], 1.9, "{:.3f}x".format,
                        lambda r: f"head dim {r['head_dim']}")  # fmt: skip


def rivals(record: dict | None, avx2: dict | None) -> Iterator[Goal]:
    """Against llama.cpp with as many bits, in the same run."""

    def over(source, text, name, base, measurement, limit, shapes):
        rows = [r for r in ours(source, shapes, (name,))
                if measurement in r["speedup"].get(base, {})]  # fmt: skip
        return at_least(text, rows, lambda r: r["speedup"][base][measurement]["median"], limit,
                        times, lambda r: r["shape"])  # fmt: skip

    if record:
        for shape, limit in (("gpt2-large", 1.1), ("tinyllama-1.1b", 1.0), ("gpt2", 0.95)):
            yield from over(record, f"int8: decode over llama.cpp Q8_0, {shape}", INT8,
                            "llama_cpp:q8_0", "decode", limit, (shape,))  # fmt: skip
        yield from over(record, "int4: decode over llama.cpp Q4_0", INT4, "llama_cpp:q4_0",
                        "decode", 1.0, BIG)  # fmt: skip
        if "amx_int8" in record["header"]["features"]:
            yield from over(record, "int8: prefill 512 over llama.cpp Q8_0, AMX", INT8,
                            "llama_cpp:q8_0", "prefill_512", 2.5, BIG)  # fmt: skip
    if avx2:
        yield from over(avx2, "int8 a8: prefill 512 over llama.cpp Q8_0, both AVX2 only",
                        "gpu_poor:int8-a8-avx2", "llama_cpp_avx2:q8_0", "prefill_512", 0.9,
                        BIG)  # fmt: skip


def all_goals(records: dict[str, dict | None]) -> list[Goal]:
    return [
        *kernels(records["kernels"]),
        *models(records["model"], records["peers"]),
        *decode(records["decode"]),
        *attention(records["attention"]),
        *rivals(records["peers"], records["peers_avx2"]),
        *memory(records["memory"]),
        *quality(records["quality"]),
        *strategies(records["strategies"]),
        *planning(records["planning"]),
        *calibration(records["calibration"]),
    ]
