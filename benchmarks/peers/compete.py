"""Contenders against each other on one shape: every one in its own process, alternating rounds.

All models stay loaded; in each round each contender works alone, the order turning every round.
Ratios are taken within a round.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict

from benchmarks import timing
from benchmarks.peers import ROOT, environment, load
from benchmarks.peers.runner import Plan

BASELINES = ("torch_fp32", "torch_bf16", "llama_cpp:q8_0", "llama_cpp:q4_0", "llama_cpp_avx2:q8_0")
PLAIN = ("torch_fp32", "torch_bf16", "gpu_poor:int8")


class Worker:
    """A contender's process. An ``error`` means it is out; the rest of its life is recorded."""

    def __init__(self, name: str, shape: str, threads: int, timeout_s: float = 400):
        self.name, self.error, self.info, self.timeout_s = name, "", {}, timeout_s
        start = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers.worker", name, shape, str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads),
                                        "TOKENIZERS_PARALLELISM": "false"} | environment(name),
        )  # fmt: skip
        os.set_blocking(self.process.stderr.fileno(), False)
        self.info = self._read() or {}
        self.setup_s = time.perf_counter() - start

    def _read(self):
        """The next answer; drains stderr so that a chatty peer cannot block on a full pipe."""
        import selectors

        log = ""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            selector.register(self.process.stderr, selectors.EVENT_READ)
            end = time.monotonic() + self.timeout_s
            while time.monotonic() < end:
                for key, _ in selector.select(timeout=1.0):
                    if key.fileobj is self.process.stderr:
                        chunk = self.process.stderr.read() or ""
                        log = (log + chunk)[-4000:]
                        if not chunk:
                            selector.unregister(self.process.stderr)
                        continue
                    line = self.process.stdout.readline()
                    if not line:
                        code = self.process.wait()
                        last = (log.strip().splitlines() or [""])[-1]
                        self.error = f"the process ended with status {code}: {last[:200]}"
                        return None
                    reply = json.loads(line)
                    self.error = reply.get("error", "")[:300]
                    return reply.get("ok")
        self.process.kill()
        self.error = f"no answer in {self.timeout_s:.0f} s"
        return None

    def ask(self, request: dict):
        if self.error:
            return None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.error = "the process ended by itself"
            return None
        return self._read()

    def close(self) -> None:
        if self.process.poll() is None:
            try:
                self.process.stdin.write('{"close": true}\n')
                self.process.stdin.close()
                self.process.wait(timeout=30)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                self.process.kill()
                self.process.wait()


def record(worker: Worker, label: str, samples: dict[str, list[float]]) -> dict:
    """A contender's part of the result, without the ratios."""
    module = load(worker.name.partition(":")[0])
    return {
        "name": worker.name,
        "label": label,
        "peer_note": module.NOTE,
        "requirements": list(module.REQUIREMENTS),
        "error": worker.error,
        "setup_s": worker.setup_s,
        **worker.info,
        "seconds": {key: timing.summary(values) for key, values in samples.items() if values},
        "samples": samples,
    }


def compete(shape: str, names: dict[str, str], rounds: int, threads: int, plan: Plan) -> dict:
    """Run contenders ``name -> label`` on a shape. Failures are rows with an ``error``."""
    workers = []
    for name in names:
        workers.append(Worker(name, shape, threads))
        state = workers[-1].error or f"{workers[-1].info['bytes'] / 1e6:.0f} MB"
        print(f"  {name}: {state} ({workers[-1].setup_s:.0f} s)", file=sys.stderr)
    samples: dict[str, dict[str, list[float]]] = {w.name: {} for w in workers}
    request = {"round": asdict(plan)}
    for worker in workers:  # warm up: the first call of every shape allocates and picks kernels
        worker.ask({"round": request["round"] | {"decode_tokens": 4}})
    for r in range(rounds):
        for worker in workers[r % len(workers) :] + workers[: r % len(workers)]:
            for key, seconds in (worker.ask(request) or {}).items():
                samples[worker.name].setdefault(key, []).append(seconds)
    rows = []
    for worker in workers:
        # Only where the modules are known to hold one plain matrix each.
        linears = worker.ask({"linears": True}) if worker.name in PLAIN else None
        worker.close()
        rows.append(record(worker, names[worker.name], samples[worker.name]))
        rows[-1]["linears_s"] = linears
    add_speedups(rows)
    return {"shape": shape, "threads": threads, "rounds": rounds, "plan": asdict(plan),
            "rows": rows}  # fmt: skip


def add_speedups(rows: list[dict]) -> None:
    """``speedup[baseline][measurement]``: baseline's time over this row's, round by round."""
    by_name = {row["name"]: row for row in rows}
    for row in rows:
        row["speedup"] = {}
        for base in BASELINES:
            theirs = by_name.get(base, {}).get("samples", {})
            shared = [k for k in row["samples"] if len(theirs.get(k, ())) == len(row["samples"][k])]
            if shared:
                row["speedup"][base] = {
                    k: timing.summary(timing.ratios(theirs[k], row["samples"][k])) for k in shared
                }
