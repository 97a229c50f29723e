"""Time and memory of quantizing to 4 bits, with and without data.

``python -m benchmarks.calibration``. A model of a published shape, random bfloat16 weights, is
saved and loaded as anybody loads one (its weights lie in the mapped file), in a process of its own.
Measured: ``quantize(bits=4)`` without data, and with 128 x 512 random calibration tokens (gptq),
and how far the process grows above one that has imported everything and quantized a tiny model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time

import torch
import transformers

import gpu_poor
from benchmarks import machine, shapes
from benchmarks.memory_child import Peak

ROWS, LENGTH = 128, 512


def child(folder: str, rows: int, length: int, threads: int) -> None:
    """Print one JSON line; no rows: without data."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    tiny = shapes.build("tiny-llama")
    gpu_poor.quantize(tiny, 4, sample_inputs=torch.arange(64)[None], verbose=False)
    del tiny
    facts = {}
    with Peak() as peak:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        block = next(iter(model.model.layers if hasattr(model, "model") else model.transformer.h))
        facts["block_fp32_bytes"] = 4 * sum(p.numel() for p in block.parameters())
        samples = torch.randint(model.config.vocab_size, (rows, length)) if rows else None
        start = time.perf_counter()
        gpu_poor.quantize(model, 4, sample_inputs=samples, verbose=False, progress=bool(rows))
        facts["seconds"] = time.perf_counter() - start
    facts["bytes"] = gpu_poor.memory.parameter_bytes(model)
    facts["remarks"] = model.gpu_poor_receipt.remarks
    print(json.dumps(facts | peak.above_start()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["tinyllama-1.1b"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a tiny shape and 4 x 64 tokens")
    parser.add_argument("--json", help="default: benchmarks/results/calibration.json")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        folder, rows, length = args.child
        child(folder, int(rows), int(length), args.threads)
        return 0
    names = ["tiny-llama"] if args.quick else args.shapes
    rows, length = (4, 64) if args.quick else (ROWS, LENGTH)
    record = {"header": machine.header(args.threads), "complete": False, "rows": []}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            shapes.build(name, torch.bfloat16).save_pretrained(folder)
            for n in (0, rows):
                command = [sys.executable, "-m", "benchmarks.calibration", "--threads",
                           str(args.threads), "--child", folder, str(n), str(length)]  # fmt: skip
                done = subprocess.run(
                    command, stdout=subprocess.PIPE, text=True, cwd=machine.HERE.parent, check=True
                )
                facts = json.loads(done.stdout.splitlines()[-1])
                how = "gptq" if n else "mse"
                row = {"shape": name, "strategy": how, "tokens": n * length} | facts
                # Anonymous memory: the mapped file's pages are the kernel's to take back.
                row["above"] = facts["peak_anon"] - facts["bytes"] - facts["block_fp32_bytes"]
                record["rows"].append(row)
                print(f"{name} {how}: {facts['seconds']:.0f} s, peak {row['peak_anon'] / 1e6:.0f} "
                      f"MB for a model of {facts['bytes'] / 1e6:.0f} MB")  # fmt: skip
                machine.save(record, args.json, "calibration.json")
    record["complete"] = True
    machine.save(record, args.json, "calibration.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
