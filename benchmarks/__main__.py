"""The whole campaign: ``python -m benchmarks --models DIR --data DIR`` (``make bench``).

Runs every part in its own process, each writing one JSON file, then RESULTS.md and the README's
tables. A part measured at this commit already is skipped, so an interrupted campaign goes on where
it stopped. Takes about 70 minutes on two cores; nothing else should run meanwhile.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import machine

#: part -> arguments; its result is <part>.json.
PARTS = {
    "machine": ["benchmarks.machine"],
    "kernels": ["benchmarks.kernels"],
    "model": ["benchmarks.model"],
    "quality": ["benchmarks.quality"],
    "strategies": ["benchmarks.strategies"],
    "planning": ["benchmarks.planning"],
    "calibration": ["benchmarks.calibration"],
    "memory": ["benchmarks.memory"],
    "attention": ["benchmarks.attention"],
    "decode": ["benchmarks.decode"],
    "peers": ["benchmarks.peers", "run"],
    "peers_avx2": [
        "benchmarks.peers", "run", "--peers", "gpu_poor:int8-a8-avx2", "llama_cpp_avx2:q8_0",
        "--shapes", "gpt2-large", "tinyllama-1.1b",
    ],
}  # fmt: skip


def is_done(out: Path, commit: str) -> bool:
    """Measured at this commit, to its end, and not refused by its own check."""
    record = json.loads(out.read_text()) if out.exists() else {}
    whole = record.get("complete", True) and not record.get("warm")
    return bool(record) and record["header"]["commit"] == commit and whole


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", type=Path, help="folder of real models, for quality and plans")
    parser.add_argument("--data", type=Path, help="folder of texts, for quality and plans")
    parser.add_argument(
        "--machine", help="a name: results of another machine, beside the main one's"
    )
    parser.add_argument("--force", action="store_true", help="measure again what is there")
    parser.add_argument("--quick", action="store_true", help="a trial: small, into build/bench")
    args = parser.parse_args(argv)
    folder = machine.HERE.parent / "build" / "bench" if args.quick else machine.RESULTS
    folder /= args.machine or ""
    commit, _ = machine.commit()
    failed = []
    for part in args.parts:
        command = [sys.executable, "-m", *PARTS[part], "--json", str(folder / f"{part}.json")]
        if part in ("quality", "strategies", "planning"):
            if not (args.models and args.data):
                print(f"{part}: left out, it needs --models and --data", file=sys.stderr)
                continue
            command += ["--models", str(args.models), "--data", str(args.data)]
        if args.quick:
            command.append("--quick")
            if part.startswith("peers"):
                command += ["--shapes", "tiny-llama", "--rounds", "2"]
        if not (args.force or args.quick) and is_done(folder / f"{part}.json", commit):
            print(f"{part}: measured at this commit already", file=sys.stderr)
            continue
        start = time.perf_counter()
        code = subprocess.run(command, cwd=machine.HERE.parent).returncode
        print(f"{part}: status {code}, {time.perf_counter() - start:.0f} s", file=sys.stderr)
        if code:
            failed.append(part)
    if not args.quick:
        subprocess.run([sys.executable, "-m", "benchmarks.report"], cwd=machine.HERE.parent)
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
