"""``python -m benchmarks.peers list | install NAME... | run``: the rivals, side by side.

``install all`` fetches and builds every one (llama.cpp takes a quarter of an hour). A peer that is
not installed, fails, or changes nothing is a row that says so. With AVX2 only, in one run::

    python -m benchmarks.peers run --peers gpu_poor:int8-a8-avx2 llama_cpp_avx2:q8_0 --json FILE
"""

import argparse
import sys

from benchmarks import machine, peers
from benchmarks.peers.compete import compete
from benchmarks.peers.runner import Plan


def run(args: argparse.Namespace) -> int:
    names = peers.contenders(tuple(args.peers))
    plan = Plan((32,), 8, 4) if args.quick else Plan(decode_tokens=16)
    results = {"header": machine.header(args.threads), "complete": False, "shapes": {}}
    if args.add:
        results["shapes"] = machine.saved(args.json, "peers.json")["shapes"]
    for shape in args.shapes:
        print(f"{shape}:", file=sys.stderr)
        results["shapes"][shape] = compete(shape, names, args.rounds, args.threads, plan)
        results["complete"] = shape == args.shapes[-1]
        machine.save(results, args.json, "peers.json")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    sub = parser.add_subparsers(dest="command", required=True)
    sub.add_parser("list")
    install = sub.add_parser("install")
    install.add_argument("names", nargs="+", choices=[*peers.MODULES, "all"])
    go = sub.add_parser("run")
    go.add_argument("--shapes", nargs="+", default=["gpt2", "gpt2-large", "tinyllama-1.1b"])
    go.add_argument(
        "--peers", nargs="+", default=peers.DEFAULT, help="names, or one variant as name:variant"
    )
    go.add_argument("--rounds", type=int, default=4)
    go.add_argument("--threads", type=int, default=2)
    go.add_argument("--quick", action="store_true", help="short prompts; for trying it out")
    go.add_argument("--json", help="default: benchmarks/results/peers.json")
    go.add_argument("--add", action="store_true", help="keep what the file has of other shapes")
    args = parser.parse_args(argv)
    if args.command == "run":
        return run(args)
    for name in peers.MODULES if args.command == "list" or "all" in args.names else args.names:
        if args.command == "install":
            peers.install(name)
        peer = peers.load(name)
        print(f"{name}: {' '.join(peer.REQUIREMENTS) or 'nothing to install'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
