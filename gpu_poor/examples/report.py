"""The demo's results as text for a person who sees the project for the first time."""

import textwrap


def report(results: dict) -> str:
    """Several sections of plain text, at most 100 columns wide."""
    sections = (_head, _memory, _speed, _quality, _samples, _verdict)
    return "\n\n".join(section(results) for section in sections)


def _head(r: dict) -> str:
    e = r["environment"]
    line = (
        f"{r['model']} ({r['source']}): {r['architecture']}, {r['n_parameters'] / 1e6:.1f} M "
        f"parameters\nquantized to int8 in {r['quantize_s']:.2f} s; activations "
        f"{r['activation']}, kernel {r['kernel']}, {e['threads']} threads, torch {e['torch']}"
    )
    if r["source"] == "random weights":
        line += "\nRANDOM WEIGHTS: memory and speed are real, texts and quality would be noise"
    return line


def _memory(r: dict) -> str:
    m, layers = r["memory"], r["layers"]
    rows = [f"{'MEMORY (MB)':<24}{'float':>12}{'int8':>12}{'smaller by':>14}"]
    everything = {"before_mb": m["before_mb"], "after_mb": m["after_mb"]}
    for name, c in {**m["components"], "total": everything}.items():
        gone = 1 - c["after_mb"] / c["before_mb"]
        rows.append(f"  {name:<22}{c['before_mb']:>12.3f}{c['after_mb']:>12.3f}{gone:>13.1%}")
    counts = [
        f"{layers[key]} {word}"
        for key, word in (
            ("int8_linear", "linear"),
            ("int8_embedding", "embedding"),
            ("int8_experts", "fused experts"),
        )
        if layers[key]
    ]
    shared = "; embedding and lm_head share one table" if layers["shared_lm_head"] else ""
    rows.append(f"  in int8: {', '.join(counts)}{shared}")
    rows += [
        f"  in float: {k['count']} {k['module']} ({k['mb']:.3f} MB): {k['why']}"
        for k in layers["kept"]
    ]
    return "\n".join(rows)


def _speed(r: dict) -> str:
    s = r["speed"]
    turns = "taking turns" if s["took_turns"] else "one after the other: both do not fit"
    rows = [
        f"SPEED, {len(s['runs'])} runs {turns}",
        f"  {'':<6}{'generating, ms per token':^34}  {'prompt, ms':^34}".rstrip(),
        f"  {'run':<6}" + 2 * f"{'float':>11}{'int8':>11}{'ratio':>12}  ",
    ]
    for i, run in enumerate(s["runs"], 1):
        rows.append(
            f"  {i:<6}{run['float_ms_per_token']:>11.2f}{run['quantized_ms_per_token']:>11.2f}"
            f"{run['decode_ratio']:>11.2f}x  {run['float_prefill_ms']:>11.2f}"
            f"{run['quantized_prefill_ms']:>11.2f}{run['prefill_ratio']:>11.2f}x"
        )
    rows.append(
        f"  median ratio: generating {s['decode_ratio']:.2f}x, a prompt of "
        f"{s['prefill_tokens']} tokens {s['prefill_ratio']:.2f}x"
    )
    return "\n".join(rows)


def _quality(r: dict) -> str:
    q = r["quality"]
    if not isinstance(q, dict):
        return "QUALITY\n  unmeasured: random weights have none"
    return (
        f"QUALITY against the float model, {q['n_tokens']} tokens of text\n"
        f"  perplexity      {q['perplexity_reference']:.3f} -> {q['perplexity']:.3f}, ratio "
        f"{q['perplexity_ratio']:.5f} +- {q['perplexity_ratio_se']:.5f}\n"
        f"  KL divergence   mean {q['kl_mean']:.2e} +- {q['kl_mean_se']:.0e}, "
        f"99th percentile {q['kl_p99']:.2e} nats\n"
        f"  same next token {q['top1']:.2%} +- {q['top1_se']:.2%}"
    )


def _samples(r: dict) -> str:
    if not r["samples"]:
        return "TEXTS\n  none: random weights write noise"
    rows = ["TEXTS, greedy"]
    for s in r["samples"]:
        rows.append(f"  {s['prompt']!r}: first {s['n_same']} of {s['n_tokens']} tokens the same")
        for label, text in (("float", s["before"]), ("int8", s["after"])):
            wrapped = textwrap.wrap(" ".join(text.split()), 88) or [""]
            rows += [f"    {label:<6}{wrapped[0]}", *(f"          {w}" for w in wrapped[1:])]
    return "\n".join(rows)


def _verdict(r: dict) -> str:
    marks = {True: "pass", False: "FAIL", None: "  - "}
    rows = [f"VERDICT  {r['verdict']['text']}"]
    for c in r["verdict"]["checks"]:
        value = "" if c["value"] is None else f"{c['value']:.4g}"
        rows.append(f"  {marks[c['passed']]}  {c['check']:<20}{value:>12}   {c['needs']}")
    return "\n".join(rows)
