"""Whole models through ``generate``: transformers fp32 and bf16, gpu-poor int8 and int4.

``python -m benchmarks.model [--shapes ...]``. Published shapes with random weights, batch 1: time
to the first token of a prompt of 128 and 512 tokens, time per further token. Each contender in its
own process, alternating; ratios within a round. Real models and text: benchmarks.quality.
"""

import argparse
import sys

from benchmarks import machine
from benchmarks.peers import contenders
from benchmarks.peers.compete import compete
from benchmarks.peers.runner import Plan

SHAPES = ("distilgpt2", "gpt2", "gpt2-medium", "gpt2-large", "tinyllama-1.1b")
CONTENDERS = ("torch_fp32", "torch_bf16", "gpu_poor")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="the smallest shape, 3 rounds")
    parser.add_argument("--json", help="default: benchmarks/results/model.json")
    args = parser.parse_args(argv)
    plan = Plan()
    if args.quick:
        args.shapes, args.rounds, plan = ["distilgpt2"], 3, Plan((128,), 16, 8)
    record = {"header": machine.header(args.threads), "complete": False, "shapes": {}}
    names = contenders(CONTENDERS)
    for shape in args.shapes:
        print(f"{shape}:", file=sys.stderr)
        result = compete(shape, names, args.rounds, args.threads, plan)
        record["shapes"][shape] = result
        for row in result["rows"]:
            faster = row["speedup"].get("torch_fp32", {})
            print(f"{shape} {row['name']} {row['error']}: " + ", ".join(
                f"{key} {1e3 * value['median']:.1f} ms ({faster[key]['median']:.2f} x fp32)"
                for key, value in row["seconds"].items()))  # fmt: skip
        record["complete"] = shape == args.shapes[-1]
        machine.save(record, args.json, "model.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
