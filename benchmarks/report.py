"""JSON -> RESULTS.md and the tables of other documents. ``python -m benchmarks.report [--check]``.

Every number comes from benchmarks/results/*.json; nothing is typed in. ``--check`` writes nothing
and fails if a file is not what the JSON says. Tables of README.md and docs/ stand between
``<!-- results:NAME -->`` and ``<!-- /results -->``.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from urllib.parse import quote

from benchmarks import report_decode
from benchmarks import report_tables as tables
from benchmarks.plot import contexts_svg, svg
from benchmarks.report_goals import all_goals, ours

ROOT = Path(__file__).resolve().parents[1]
PARTS = (
    "machine", "kernels", "model", "memory", "quality", "strategies", "planning", "calibration",
    "peers", "attention", "decode", "peers_avx2",
)  # fmt: skip
MARKERS = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def load(folder: Path) -> dict[str, dict | None]:
    """Every part's record, None where it has not been measured."""
    paths = {part: folder / f"{part}.json" for part in PARTS}
    return {part: json.loads(p.read_text()) if p.exists() else None for part, p in paths.items()}


def stream(records: dict) -> float | None:
    """The read stream in GB/s with the threads everything ran with."""
    rows = (records["machine"] or {}).get("rows", [])
    return rows[-1]["read_gb_s"] if rows else None


def environment(records: dict) -> str:
    """What each part ran on; parts are named where they differ."""
    headers = {part: r["header"] for part, r in records.items() if r}
    if not headers:
        return tables.NOT_YET
    rows = []
    for key in next(iter(headers.values())):
        parts: dict[str, list[str]] = {}
        for part, header in headers.items():
            value = header[key]
            parts.setdefault(" ".join(value) if isinstance(value, list) else str(value), []).append(
                part
            )
        values = [v if len(parts) == 1 else f"{v} ({', '.join(p)})" for v, p in parts.items()]
        rows.append([key.replace("_", " "), "; ".join(values)])
    return tables.table(["", ""], rows)


def another_machine(records: dict, plot: str) -> str:
    """The same measurements elsewhere, in short: users' machines differ."""
    parts = [
        environment(records), goals(records), tables.summary(records["model"]),
        tables.peers(records["peers"]), report_decode.sections(records, plot),
        "### Kernels\n", tables.gemv(records["kernels"]), tables.gemm(records["kernels"]),
    ]  # fmt: skip
    return "\n".join(part for part in parts if part)


def at_the_limit(records: dict, others: dict[str, dict], plot: str) -> str:
    """Decode and attention here, or where else they were measured."""
    elsewhere = [name for name, r in others.items() if report_decode.sections(r, "")]
    if found := report_decode.sections(records, plot):
        return found
    return f"Measured on {', '.join(elsewhere)}: see there.\n" if elsewhere else tables.NOT_YET


def goals(records: dict) -> str:
    rows = [[goal, measured, "met" if met else "**missed**"] for goal, measured, met in
            all_goals(records)]  # fmt: skip
    return tables.table(["goal", "measured, worst case", ""], rows) if rows else tables.NOT_YET


def recommendations(records: dict) -> str:
    """By use. The figures behind each sentence are looked up; a use without them is left out."""
    lines = []
    model, peers, quality = records["model"], records["peers"], records["quality"]
    rows = ours(model) if model else []
    if rows:
        decode = [r["speedup"]["torch_fp32"]["decode"]["median"] for r in rows]
        prefill = [r["speedup"]["torch_fp32"]["prefill_128"]["median"] for r in rows]
        lines += [
            f"- **Chat, one answer at a time**: the default. Decode is {min(decode):.1f} to "
            f"{max(decode):.1f} times fp32's speed on the shapes above.",
            f"- **Long prompts, short answers**: the default; {min(prefill):.1f} to "
            f"{max(prefill):.1f} times fp32's speed for 128 tokens.",
        ]
    if quality:
        kl = {(r["variant"], r["mode"]): 0.0 for r in quality["rows"]}
        for r in quality["rows"]:
            key = r["variant"], r["mode"]
            kl[key] = max(kl[key], r["quality"]["kl_mean"])
        lines += [
            f'- **Least time per prompt, answers may differ more**: `activation="a8"`. Worst '
            f"mean KL {kl['plain', 'a8']:.1e} against {kl['plain', 'a16']:.1e} of a16; with "
            f"massive activation channels {kl['outliers', 'a8']:.1e} against "
            f"{kl['outliers', 'a16']:.1e}.",
            f'- **Training adapters, reference results**: `activation="a32"`, float activations '
            f"({kl['plain', 'a32']:.1e}).",
        ]
    for shape, result in (peers or {"shapes": {}})["shapes"].items():
        by_name = {r["name"]: r for r in result["rows"] if not r["error"] and r["seconds"]}
        mine, theirs = by_name.get("gpu_poor:int8"), by_name.get("llama_cpp:q8_0")
        if mine and theirs:
            a, b = (1e3 * r["seconds"]["decode"]["median"] for r in (mine, theirs))
            better = "llama.cpp is faster" if b < a else "gpu-poor is faster"
            lines.append(
                f"- **No Python needed, {tables.named(shape)}**: decode takes {a:.1f} ms a token "
                f"here and {b:.1f} ms in llama.cpp Q8_0; {better}."
            )
    return "\n".join(lines) + "\n" if lines else tables.NOT_YET


REPRODUCTION = """```
make dev
.venv/bin/python -m benchmarks.peers install all     # the rivals, into .peers/; 15 minutes
make bench MODELS=<folder of models> DATA=<folder of texts>   # 70 minutes, an idle machine
make results                                         # this file and the README's tables
```

One part alone: `python -m benchmarks.kernels` (or `machine`, `model`, `memory`, `quality`,
`strategies`, `planning`, `calibration`, `attention`, `decode`, `peers run`); each has `--quick` and
`--help`.
"""


def four_bits(record: dict | None, plot: str) -> str:
    if not record:
        return tables.NOT_YET
    tokens = record["n_tokens"]
    return (
        "The matrices of the blocks in a format, head and embedding at 8 bits, a16; "
        f"{tokens} predicted tokens of text that calibration has not seen. `equalize + mse` and "
        "`equalize + gptq` are the defaults, without and with `sample_inputs`; "
        "[docs/methods.md](docs/methods.md) says what each does. Bits count scales and padding.\n\n"
        f"![Mean KL divergence over stored bits per weight]({plot})\n\n"
        "Dashed: without data. Hollow: symmetric groups of 32.\n\n"
        + tables.strategies(record)
        + "\nThe same blocks rounded by other packages, without data, and run with float "
        "activations; beside them the default without data, interpolated at as many bits:\n\n"
        + tables.peer_weights(record)
    )


def results_md(records: dict, others: dict[str, dict], results: str) -> str:
    """The whole of RESULTS.md.

    Args:
        others: records of further machines by name.
        results: the path of the records' folder, and the pictures', from RESULTS.md.
    """
    sections = {
        "Environment": environment(records),
        "Summary": tables.summary(records["model"])
        + "\nWeights of these shapes are random: right for speed and memory, worthless for "
        "quality, which is measured on real models below.\n\n" + goals(records),
        "Per-model metrics": "Median of the rounds ± half the interquartile range. Batch 1, "
        "through `generate`; prefill is the time to the first token, decode that of each further "
        "one.\n\n" + tables.speed(records["model"]),
        "Per-layer decisions": "Every matrix is int8 with one float32 scale a row; norms and "
        "biases stay.\n\n" + tables.layer_decisions(records["model"]),
        "Memory by component": tables.components(records["model"]),
        "Memory as the system sees it": "Anonymous memory and resident pages of weight files, "
        "above the same process without a model.\n\n" + tables.memory(records["memory"]),
        "Where the overhead goes and how it scales": "A decode step reads every weight once. The "
        "rest of its time is attention, norms and the Python between the modules: about the same "
        "for every row of a model, so the larger the model, the smaller its share.\n\n"
        + tables.overhead(records["model"], stream(records)),
        "Kernels": "What this machine can do:\n\n" + tables.machine(records["machine"])
        + "\nFew tokens, cold weights rotating through more than 2 GB; `up to` is the cap set by "
        "GPU_POOR_ISA; the error is relative to a float64 product with the same int8 weights:\n\n"
        + tables.gemv(records["kernels"]) + "\nMany tokens, the whole operator:\n\n"
        + tables.gemm(records["kernels"]) + "\nThe other operators:\n\n"
        + tables.others(records["kernels"]),
        "Decode at the memory limit": at_the_limit(records, others, f"{results}/decode.svg"),
        "Speed per run": tables.runs(records["model"]),
        "Peers": "Each in its own process, alternating rounds. bf16 models where their "
        "documentation has them.\n\n" + tables.peers(records["peers"]) + "\n"
        + tables.peer_notes(records["peers"]),
        "Quality": "Real trained models, everything quantized, against the float32 model. "
        "`with outliers`: the same function with massive activation channels; `float` there is "
        "the variant itself before quantization. a16 is the default.\n\n"
        + tables.quality(records["quality"], ("plain", "outliers"), ("float", "a8", "a16", "a32")),
        "Formats and strategies": four_bits(records["strategies"], f"{results}/quality.svg"),
        "Quality samples": "Greedy continuations, float and int8 (a16).\n\n"
        + tables.samples(records["quality"]),
        "Plans": "Does `gpu_poor.plan` keep its promises? Single modules in a format, plans for "
        "targets, random ones, and random ones of one size, against the KL measured through "
        "`quantize` on another text; docs/planning.md has the method.\n\n"
        + tables.predictions(records["planning"]) + "\nPlans for targets:\n\n"
        + tables.targets(records["planning"]),
        "Recommendations by use": recommendations(records),
        **{f"Another machine: {name}": another_machine(r, f"{results}/{quote(name)}/decode.svg")
           for name, r in others.items()},
        "Reproduction": REPRODUCTION,
    }  # fmt: skip
    head = "# Results\n\nGenerated by `make results` from benchmarks/results/*.json; do not edit.\n"
    return head + "".join(f"\n## {title}\n\n{body}" for title, body in sections.items())


def marked_tables(records: dict) -> dict[str, str]:
    return {
        "summary": tables.summary(records["model"], ("gpt2", "gpt2-large", "tinyllama-1.1b")),
        "speed": tables.speed(records["model"]),
        "quality": tables.quality(records["quality"]),
        "strategies": tables.strategy_summary(records["strategies"]),
        "peers": tables.peers(records["peers"], ("gpt2-large",)),
        "planning": tables.predictions(records["planning"]),
        "attention": report_decode.attention(records["attention"]),
        "decode": report_decode.decode(records["decode"]),
        "ablation": report_decode.ablation(records["decode"]),
    }


def fill(text: str, values: dict[str, str]) -> str:
    """A document with every marked table replaced. Raises KeyError on an unknown name."""
    return MARKERS.sub(lambda m: m[1] + values[m[2]] + m[3], text)


def render(root: Path, folder: Path) -> dict[Path, str]:
    """What each generated file should be."""
    records = load(folder)
    others = {p.name: load(p) for p in sorted(folder.iterdir()) if p.is_dir()}
    for other in others.values():  # quality hardly depends on the machine, which is named above
        records["strategies"] = records["strategies"] or other["strategies"]
    results = Path(os.path.relpath(folder, root)).as_posix()
    files = {root / "RESULTS.md": results_md(records, others, results)}
    if records["strategies"]:
        files[folder / "quality.svg"] = svg(records["strategies"]["rows"])
    for name, measured in {"": records, **others}.items():
        if rows := (measured["decode"] or {}).get("contexts"):
            files[folder / name / "decode.svg"] = contexts_svg(rows)
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        if path.exists():
            files[path] = fill(path.read_text(), marked_tables(records))
    return files


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a file is not current")
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    stale = []
    for path, text in render(args.root, args.results).items():
        if path.exists() and path.read_text() == text:
            continue
        if args.check:
            stale.append(path.name)
        else:
            path.write_text(text)
            print(f"wrote {path.name}")
    if stale:
        print(f"not current: {', '.join(stale)}; run `make results`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
