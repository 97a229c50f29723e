"""Tables of attention.json and decode.json, for RESULTS.md and marked places of other documents."""

from benchmarks.report_goals import percent, times
from benchmarks.report_tables import NOT_YET, mb, ms, named, peer_notes, peers, table


def attention(record: dict | None) -> str:
    """Decode attention of one token, every format and length."""
    if not record:
        return NOT_YET
    rows = [
        [f"{r['heads']} / {r['kv_heads']} x {r['head_dim']}", f"{r['length']}", r["name"],
         f"{1e6 * r['seconds']['median']:.0f}", f"{r['gb_s']:.1f}",
         percent(r["of_stream"]["median"]), times(r["over_sdpa_fp32"]["median"]),
         f"{r['error']:.0e}" if "error" in r else None]
        for r in record["rows"]
    ]  # fmt: skip
    return table(["heads / of keys x dim", "tokens", "keys and values", "µs", "GB/s",
                  "of the stream", "x SDPA fp32", "error"], rows)  # fmt: skip


def prompts(record: dict | None) -> str:
    """Attention of whole prompts."""
    if not record or "prompts" not in record:
        return NOT_YET
    rows = [
        [f"{r['heads']} / {r['kv_heads']} x {r['head_dim']}", f"{r['tokens']}", r["name"],
         f"{1e3 * r['seconds']['median']:.2f}", f"{r['gflop_s']:.0f}",
         times(r["over_sdpa_fp32"]["median"]), f"{r['error']:.0e}" if "error" in r else None]
        for r in record["prompts"]
    ]  # fmt: skip
    return table(["heads / of keys x dim", "tokens", "keys and values", "ms", "GFLOP/s",
                  "x SDPA fp32", "error"], rows)  # fmt: skip


def cache_memory(record: dict | None) -> str:
    """What a cache adds to its process."""
    if not record:
        return NOT_YET
    rows = [
        [r["head_dim"], r["name"], f"{r['tokens']}", f"{r['bytes'] / 1e6:.1f}",
         f"{r['rss'] / 1e6:.1f}", times(r["smaller_than_fp16"])]
        for r in record["memory"]
    ]  # fmt: skip
    return table(["head dim", "cache", "tokens", "its numbers, MB", "resident, MB",
                  "smaller than fp16 pages"], rows)  # fmt: skip


def decode(record: dict | None) -> str:
    """Each way of each shape against the read stream."""
    if not record:
        return NOT_YET
    rows = []
    for result in record["shapes"]:
        for r in result["rows"]:
            parts = [f"{1e3 * r[key]:.2f}" if key in r else None
                     for key in ("step_s", "head_s", "python_s")]  # fmt: skip
            rows.append([
                named(result["shape"]), r["name"], mb(r["bytes"]), ms(r["seconds"]),
                percent(r["of_stream"]["median"]), times(r["over_fp32"]["median"]),
                times(r["over_int8"]["median"]) if "over_int8" in r else None, *parts,
                percent(r["kept_when_busy"]["median"]) if "kept_when_busy" in r else None,
            ])  # fmt: skip
    return table(["model shape", "", "MB read a token", "ms a token", "of the stream", "x fp32",
                  "x int8", "all blocks, ms", "head, ms", "Python, ms",
                  "speed with one core busy"], rows)  # fmt: skip


def contexts(record: dict | None) -> str:
    """Tokens per second over context length."""
    if not record or "contexts" not in record:
        return NOT_YET
    cells: dict[tuple, dict] = {}
    for r in record["contexts"]:
        cells.setdefault((r["shape"], r["context"]), {})[r["name"]] = r
    names = list(dict.fromkeys(r["name"] for r in record["contexts"]))
    rows = [
        [named(shape), f"{context}", *(f"{1 / by[n]['seconds']['median']:.1f}" for n in names),
         times(max(r["over_fp32"]["median"] for r in by.values()))]
        for (shape, context), by in cells.items()
    ]  # fmt: skip
    return table(["model shape", "context", *names, "best, x fp32"], rows)


def ablation(record: dict | None) -> str:
    """What each measure brings: memory of weights and cache, speed."""
    if not record or "ablation" not in record:
        return NOT_YET
    rows = [
        [named(r["shape"]), r["name"], mb(r["weight_bytes"]), f"{r['kv_bytes'] / 1e6:.1f}",
         times(r["smaller"]), f"{r['first_token_s']['median']:.2f}",
         times(r["first_token_over_fp32"]["median"]), f"{1 / r['seconds']['median']:.1f}",
         times(r["over_fp32"]["median"])]
        for r in record["ablation"]
    ]  # fmt: skip
    context = " and ".join(dict.fromkeys(f"{r['context']}" for r in record["ablation"]))
    return table(["model shape", f"{context} tokens of context", "weights, MB", "KV cache, MB",
                  "smaller than fp32", "first token, s", "faster", "tokens/s", "faster than fp32"],
                 rows)  # fmt: skip


def timeline(record: dict | None) -> str:
    """``gpu_poor.profile`` as tables."""
    if not record or "timeline" not in record:
        return NOT_YET
    parts = []
    for found in record["timeline"]:
        rows = [[f"{r['kind']} {r['what']}".strip(), f"{r['ms']:.3f}", percent(r["share"]),
                 None if r["calls"] is None else f"{r['calls']:.0f}"]
                for r in found["rows"]]  # fmt: skip
        parts.append(
            f"{named(found['shape'])}, {found['way']}: {found['ms_per_token']:.2f} ms a token\n\n"
            + table(["", "ms", "share", "calls"], rows)
        )
    return "\n".join(parts)


def sections(records: dict, plot: str) -> str:
    """All of it, as parts of one section; what has not been measured is left out.

    Args:
        plot: path of the picture of :func:`contexts` from the document.
    """
    limits = {
        "Decode against the read stream": "Through `generate`, batch 1, all ways in turn; the "
        "stream is measured in each round. int8 and int4 are fused.\n\n"
        + decode(records["decode"]),
        "Tokens per second over context length": f"![Tokens per second over context length]({plot})"
        "\n\n" + contexts(records["decode"]),
        "What each measure brings": "Through `generate`, prompt included. Fused blocks keep exact "
        "fp32 pages unless they are told otherwise, and attend by our kernel with or without "
        "`flash`.\n\n" + ablation(records["decode"]),
        "Where a token's time goes": timeline(records["decode"]),
        "Decode attention": "One token; keys and values of many layers in turn, more than any "
        "cache holds; error against float64 over the same stored numbers.\n\n"
        + attention(records["attention"]),
        "Attention of a prompt": "One layer, causal; the error as above.\n\n"
        + prompts(records["attention"]),
        "Memory of the cache": "Anonymous memory that a cache adds to a process.\n\n"
        + cache_memory(records["attention"]),
        "AVX2 alone": "gpu-poor with GPU_POOR_ISA=avx2, torch and its libraries held to AVX2 too, "
        "against llama.cpp built for AVX2.\n\n" + peers(records["peers_avx2"])
        + "\n" + peer_notes(records["peers_avx2"]),
    }  # fmt: skip
    return "\n".join(
        f"### {title}\n\n{body}" for title, body in limits.items() if NOT_YET not in body
    )
