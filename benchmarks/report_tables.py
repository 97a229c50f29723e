"""Tables of RESULTS.md and the README: each function turns one JSON record into markdown."""

from benchmarks.report_goals import INT4, INT8, at_bits, ours, percent, times

NOT_YET = "Not measured yet.\n"
NAMES = {
    "distilgpt2": "DistilGPT-2", "gpt2": "GPT-2 124M", "gpt2-medium": "GPT-2 medium",
    "gpt2-large": "GPT-2 large", "tinyllama-1.1b": "TinyLlama 1.1B", "llama-7b": "Llama 7B",
}  # fmt: skip


def table(headings: list[str], rows: list[list]) -> str:
    """A markdown table; columns of numbers to the right. None becomes an empty cell."""
    cells = [["" if c is None else str(c) for c in row] for row in rows]
    numbers = [all(r[i][:1].isdigit() or not r[i] for r in cells) for i in range(len(headings))]
    lines = ["| " + " | ".join(headings) + " |"]
    lines += ["|" + "|".join("--:" if right else "---" for right in numbers) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join(lines) + "\n"


def mb(n_bytes: float | None) -> str | None:
    return (
        None
        if n_bytes is None
        else f"{n_bytes / 1e6:.0f}"
        if n_bytes > 2e7
        else f"{n_bytes / 1e6:.2f}"
    )


def ms(summary: dict | None) -> str | None:
    if summary is None:
        return None
    median, iqr = 1e3 * summary["median"], 1e3 * summary["iqr"]
    return f"{median:.1f} ± {iqr / 2:.1f}" if median < 1000 else f"{median:.0f} ± {iqr / 2:.0f}"


def named(shape: str) -> str:
    return NAMES.get(shape, shape)


def speedup(row: dict, base: str, measurement: str) -> str | None:
    summary = row["speedup"].get(base, {}).get(measurement)
    return None if summary is None else times(summary["median"])


# -- model.json --------------------------------------------------------------------------------


def summary(record: dict | None, shapes: tuple[str, ...] | None = None) -> str:
    """One row a model and format: what a user gets. shapes: only these."""
    if not record:
        return NOT_YET
    rows = []
    for row in ours(record, names=(INT8, INT4)):
        if shapes is not None and row["shape"] not in shapes:
            continue
        rows.append([
            named(row["shape"]), row["name"][-4:], mb(row["bytes_before"]), mb(row["bytes"]),
            percent(1 - row["bytes"] / row["bytes_before"]),
            speedup(row, "torch_fp32", "decode"), speedup(row, "torch_bf16", "decode"),
            speedup(row, "torch_fp32", "prefill_128"), speedup(row, "torch_bf16", "prefill_128"),
        ])  # fmt: skip
    return table(["model shape", "weights", "fp32 MB", "MB", "smaller", "decode, x fp32",
                  "x bf16", "prefill 128, x fp32", "x bf16"], rows)  # fmt: skip


def speed(record: dict | None) -> str:
    """Times of every contender on every shape."""
    if not record:
        return NOT_YET
    rows = []
    for shape, result in record["shapes"].items():
        for row in result["rows"]:
            t = row["seconds"]
            rows.append([
                named(shape), row["label"], mb(row.get("bytes")),
                *(ms(t.get(k)) for k in ("decode", "prefill_128", "prefill_512")),
                speedup(row, "torch_fp32", "decode"), row["error"] or None,
            ])  # fmt: skip
    if not any(row[-1] for row in rows):
        rows = [row[:-1] for row in rows]
    headings = ["model shape", "", "MB", "decode, ms/token", "prefill 128, ms", "prefill 512, ms",
                "decode, x fp32", "failure"]  # fmt: skip
    return table(headings[: len(rows[0])] if rows else headings, rows)


def runs(record: dict | None) -> str:
    """Every single round, so that the spread can be seen."""
    if not record:
        return NOT_YET
    rows = [
        [named(shape), row["label"], " ".join(f"{1e3 * s:.1f}" for s in row["samples"]["decode"]),
         " ".join(f"{1e3 * s:.0f}" for s in row["samples"].get("prefill_128", []))]
        for shape, result in record["shapes"].items()
        for row in result["rows"]
        if row["samples"].get("decode")
    ]  # fmt: skip
    return table(["model shape", "", "decode ms/token, each round", "prefill 128 ms, each round"],
                 rows)  # fmt: skip


def layer_decisions(record: dict | None) -> str:
    """What became of every tensor, one row a group of layers."""
    if not record:
        return NOT_YET
    parts = []
    for row in ours(record):
        groups = (row.get("details") or {}).get("layers", [])
        rows = [
            [f"`{g['name']}`", g["count"], "x".join(map(str, g["shape"])), g["module"],
             "shared with the embedding" if g["shared"] else "int8" if g["int8"] and
             g["dtype"] == "int8" else f"{g['dtype']}{' scale' if g['int8'] else ', kept'}",
             mb(g["bytes"])]
            for g in groups
        ]  # fmt: skip
        counts = row["details"]["receipt"]["modules"] if row.get("details") else {}
        found = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
        headings = ["tensor", "layers", "shape", "module", "stored as", "MB"]
        parts.append(f"**{named(row['shape'])}** ({found})\n\n" + table(headings, rows))
    return "\n".join(parts)


def components(record: dict | None) -> str:
    """Bytes by class, before and after."""
    if not record:
        return NOT_YET
    rows = []
    for row in ours(record):
        receipt = (row.get("details") or {}).get("receipt")
        if not receipt:
            continue
        for name, before in receipt["before"].items():
            if before:
                after = receipt["after"][name]
                rows.append(
                    [named(row["shape"]), name, mb(before), mb(after), percent(1 - after / before)]
                )
    return table(["model shape", "component", "fp32 MB", "int8 MB", "smaller"], rows)


def overhead(record: dict | None, stream_gb_s: float | None) -> str:
    """A decode step split: reading the weights at stream speed, the matrix modules, the rest."""
    if not record or not stream_gb_s:
        return NOT_YET
    rows = []
    for shape, result in record["shapes"].items():
        for row in result["rows"]:
            if row["error"] or not row.get("linears_s"):
                continue
            step = row["seconds"]["decode"]["median"]
            read = row["bytes"] / stream_gb_s / 1e9
            rest = step - row["linears_s"]
            rows.append(
                [
                    named(shape),
                    row["label"],
                    f"{1e3 * step:.1f}",
                    f"{1e3 * read:.1f}",
                    f"{1e3 * row['linears_s']:.1f}",
                    f"{1e3 * rest:.1f}",
                    percent(rest / step),
                ]
            )
    return table(["model shape", "", "decode, ms", "all weights once at stream speed, ms",
                  "matrix modules alone, ms", "the rest, ms", "its share"], rows)  # fmt: skip


# -- kernels.json, machine.json ------------------------------------------------------------------


def machine(record: dict | None) -> str:
    if not record:
        return NOT_YET
    rows = [
        [r["threads"], f"{r['read_gb_s']:.1f}", r["loop"], f"{r['huge_pages_read_gb_s']:.1f}",
         *(f"{r[k]:.2f}" if r[k] else "absent" for k in ("vnni_tops", "amx_tops"))]
        for r in record["rows"]
    ]  # fmt: skip
    return table(["threads", "read stream, GB/s", "its loop", "with huge pages, GB/s",
                  "VNNI peak, TOPS", "AMX peak, TOPS"], rows)  # fmt: skip


def gemv(record: dict | None) -> str:
    if not record:
        return NOT_YET
    rows = [
        [r["format"], f"{r['n']}x{r['k']}", r["m"], r["mode"], r["isa"],
         f"{1e6 * r['seconds']['median']:.0f}", f"{r['gb_s']:.1f}", f"{r['stream_gb_s']:.1f}",
         percent(r["of_stream"]["median"]), f"{r['relative_error']:.1e}"]
        for r in record["gemv"]
    ]  # fmt: skip
    return table(["format", "N x K", "M", "mode", "up to", "µs", "GB/s", "stream, GB/s",
                  "of the stream", "relative error"], rows)  # fmt: skip


def gemm(record: dict | None) -> str:
    if not record:
        return NOT_YET
    rows = [
        [f"{r['n']}x{r['k']}", r["name"], f"{1e3 * r['seconds']['median']:.2f}", f"{r['tops']:.2f}",
         percent(r["of_amx_peak"]["median"]) if "of_amx_peak" in r else None,
         times(r["speedup_fp32"]["median"]), times(r["speedup_bf16"]["median"])]
        for r in record["gemm"]
    ]  # fmt: skip
    return table(["N x K", "M = 512", "ms", "TOPS", "of the AMX peak", "x torch fp32",
                  "x torch bf16"], rows)  # fmt: skip


def others(record: dict | None) -> str:
    if not record:
        return NOT_YET
    rows = [
        [r["name"], r["shape"], f"{1e6 * r['seconds']['median']:.0f}", f"{r['gb_s']:.1f}",
         times(r["time_of_torch_mm"]["median"]) if "time_of_torch_mm" in r else None]
        for r in record["others"]
    ]  # fmt: skip
    return table(["operator", "shape", "µs", "GB/s read and written", "time of torch.mm"], rows)


# -- memory.json -------------------------------------------------------------------------------


def memory(record: dict | None) -> str:
    if not record:
        return NOT_YET
    rows = [
        [named(r["shape"]), {"in_memory": "quantized in memory", "saved": "loaded from int8 files",
                             "streamed": "quantized while loading bf16"}[r["how"]]
         + (f", may have {r['limit_bytes'] / 1e9:.1f} GB" if r.get("limit_bytes") else ""),
         mb(r.get("bytes")), r.get("error") or mb(r["above"]),
         percent(r["of_bytes"]) if "of_bytes" in r else None,
         mb(r.get("peak_total")), mb(r.get("peak_anon")),
         f"{r.get('quantize_s', r.get('load_s', 0)):.1f}"]
        for r in (*record["rows"], *record["streamed"], *filter(None, [record.get("big")]))
    ]  # fmt: skip
    headings = ["model shape", "how", "model MB", "process above one without it, MB",
                "of the model", "peak while loading, MB", "its anonymous part, MB",
                "seconds"]  # fmt: skip
    return table(headings, rows)


# -- quality.json ------------------------------------------------------------------------------


def quality(record: dict | None, variants: tuple[str, ...] = ("plain",), modes=("a16",)) -> str:
    if not record:
        return NOT_YET
    rows = []
    for row in record["rows"]:
        if row["variant"] not in variants or row["mode"] not in modes:
            continue
        q = row["quality"]
        name = row["model"] + (" with outliers" if row["variant"] == "outliers" else "")
        rows.append([
            name, row["mode"], f"{q['kl_mean']:.2e} ± {q['kl_mean_se']:.0e}", f"{q['kl_p99']:.1e}",
            f"{q['perplexity_ratio']:.4f} ± {q['perplexity_ratio_se']:.4f}",
            f"{100 * q['top1']:.2f} ± {100 * q['top1_se']:.2f} %",
        ])  # fmt: skip
    return table(["model", "mode", "mean KL, nats", "KL p99", "perplexity ratio",
                  "same next token"], rows)  # fmt: skip


def samples(record: dict | None) -> str:
    if not record:
        return NOT_YET
    parts = []
    for row in record["rows"]:
        if "sample" in row:
            s = {k: v.strip().replace("\n", " ⏎ ") for k, v in row["sample"].items()}
            same = "the same" if s["float"] == s["int8"] else "different"
            parts.append(f"**{row['model']}** after `…{s['prompt'][-60:]}` ({same} words)\n\n"
                         f"- float: {s['float']}\n- int8: {s['int8']}\n")  # fmt: skip
    return "\n".join(parts)


# -- planning.json -----------------------------------------------------------------------------


def predictions(record: dict | None) -> str:
    """How predicted KL goes with measured KL: ranks, and the ratio with its range."""
    if not record:
        return NOT_YET
    cells: dict[tuple, dict] = {}
    for row in record["summary"]:
        cells.setdefault((row["model"], row["basis"]), {})[row["rows"]] = row
    rows = []
    for (model, basis), by in cells.items():
        kinds = [by["modules"], by["plans"], by["equal"]]
        ratios = [f"{r['ratio']:.2f} ({r['ratio_least']:.2f} to {r['ratio_most']:.2f})"
                  for r in kinds[:2]]  # fmt: skip
        rows.append([model, basis, *(f"{r['spearman']:.3f} of {r['n']}" for r in kinds),
                     *(ratios if basis != "weights" else ("", ""))])  # fmt: skip
    return table(["model", "predicted from", "Spearman: modules", "plans", "plans of one size",
                  "predicted / measured: modules", "plans"], rows)  # fmt: skip


def targets(record: dict | None) -> str:
    """What plans for targets took and cost."""
    if not record:
        return NOT_YET
    rows = [
        [r["model"], f"{r['target']:.2f}", r["basis"], f"{r['bytes']:,}",
         f"{100 * r['bytes'] / r['target_bytes']:.2f} %",
         "exact" if r["bytes"] == r["predicted_bytes"] else f"{r['predicted_bytes']:,}",
         f"{r['predicted'][r['basis']]:.2e}", f"{r['kl']:.2e} ± {r['kl_se']:.0e}"]
        for r in record["rows"] if r["kind"] == "planned" and "kl" in r
    ]  # fmt: skip
    return table(["model", "target", "predicted from", "bytes", "of the target", "predicted bytes",
                  "predicted KL", "measured KL"], rows)  # fmt: skip


# -- strategies.json ---------------------------------------------------------------------------


def strategies(record: dict | None) -> str:
    """Formats and strategies on every model; within a model and format the best one first."""
    if not record:
        return NOT_YET
    order = list(dict.fromkeys((r["model"], r["variant"], r["format"]) for r in record["rows"]))
    ranked = sorted(record["rows"], key=lambda r: (
        order.index((r["model"], r["variant"], r["format"])), r["quality"]["kl_mean"]))  # fmt: skip
    rows = []
    for row in ranked:
        q = row["quality"]
        rows.append([
            row["model"] + (" with outliers" if row["variant"] == "outliers" else ""),
            row["format"], " + ".join(row["strategy"]), f"{row['bits_per_weight']:.2f}",
            f"{q['kl_mean']:.2e} ± {q['kl_mean_se']:.0e}", f"{q['kl_p99']:.1e}",
            f"{q['perplexity_ratio']:.4f}", percent(q["top1"]),
            row["calibration_tokens"] or None, f"{row['seconds']:.1f}",
        ])  # fmt: skip
    return table(["model", "format", "strategy", "bits per weight", "mean KL, nats", "KL p99",
                  "perplexity ratio", "same next token", "calibration tokens", "seconds"],
                 rows)  # fmt: skip


def peer_weights(record: dict | None) -> str:
    """The rivals' weights, and the default without data at as many bits."""
    rows = []
    for row in (record or {}).get("peers", []):
        q, ours_kl = row["quality"], at_bits(record["rows"], row["model"], row["bits_per_weight"])
        rows.append([
            row["model"], row["peer"], f"{row['bits_per_weight']:.2f}",
            f"{q['kl_mean']:.2e} ± {q['kl_mean_se']:.0e}", f"{q['perplexity_ratio']:.4f}",
            percent(q["top1"]), f"{ours_kl:.2e}" if ours_kl else None,
            times(ours_kl / q["kl_mean"]) if ours_kl else None,
        ])  # fmt: skip
    return table(["model", "", "bits per weight", "mean KL, nats", "perplexity ratio",
                  "same next token", "gpu-poor at as many bits", "over the rival"],
                 rows) if rows else NOT_YET  # fmt: skip


def strategy_summary(record: dict | None) -> str:
    """Mean KL of the plain models: a row for each strategy, a column for each model and format."""
    if not record:
        return NOT_YET
    forms = ("int4_g64_asym", "int4_g32_asym")
    rows = [r for r in record["rows"] if r["variant"] == "plain" and r["format"] in forms]
    kl = {(r["model"], r["format"], " + ".join(r["strategy"])): r["quality"]["kl_mean"]
          for r in rows}  # fmt: skip
    columns = list(dict.fromkeys((r["model"], r["format"]) for r in rows))
    strategies = list(dict.fromkeys(" + ".join(r["strategy"]) for r in rows))
    cells = [
        [name, *(f"{kl[(*c, name)]:.5f}" if (*c, name) in kl else None for c in columns)]
        for name in strategies
    ]
    headings = [f"{model}, {form.removeprefix('int4_')}" for model, form in columns]
    return table(["strategy", *headings], cells)


# -- peers.json --------------------------------------------------------------------------------


def peers(record: dict | None, shapes: tuple[str, ...] | None = None) -> str:
    if not record:
        return NOT_YET
    rows = []
    for shape, result in record["shapes"].items():
        if shapes is not None and shape not in shapes:
            continue
        for row in result["rows"]:
            t = row["seconds"]
            rows.append([
                named(shape), row["label"], mb(row.get("bytes")),
                *(ms(t.get(k)) for k in ("decode", "prefill_128", "prefill_512")),
                speedup(row, "torch_fp32", "decode"), speedup(row, "torch_fp32", "prefill_128"),
                f"fails: {row['error']}" if row["error"] else row.get("note"),
            ])  # fmt: skip
    return table(["model shape", "", "MB", "decode, ms/token", "prefill 128, ms", "prefill 512, ms",
                  "decode, x fp32", "prefill 128, x fp32", "remark"], rows)  # fmt: skip


def peer_notes(record: dict | None) -> str:
    if not record:
        return ""
    notes = {}
    for result in record["shapes"].values():
        for row in result["rows"]:
            if row["peer_note"]:
                versions = ", ".join(row["requirements"]) or "in torch"
                notes[row["label"]] = f"- {row['label']} ({versions}): {row['peer_note']}.\n"
    return "".join(notes.values())
