"""One contender in its own process: ``python -m benchmarks.peers.worker NAME SHAPE THREADS``.

Reads one JSON request a line, answers one JSON line: ``round`` (a plan), ``linears``, ``close``.
The parent (compete.py) lets one worker work at a time.
"""

import json
import os
import sys
import traceback


def answer_to(session, request: dict):
    from benchmarks.peers.runner import Plan

    if "round" in request:
        plan = request["round"]
        return session.round(Plan(tuple(plan["prompts"]), plan["decode_prompt"],
                                  plan["decode_tokens"]))  # fmt: skip
    if "linears" in request:
        return session.linears() if hasattr(session, "linears") else None
    session.close()
    return None


def main() -> None:
    # The libraries print to stdout; answers go to a copy of it that only we have.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, shape, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])

    def reply(function) -> None:
        try:
            print(json.dumps({"ok": function()}), file=answers)
        except Exception as error:  # a peer may fail in any way: its message is the result
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            print(json.dumps({"error": f"{type(error).__name__}: {lines[0]}"}), file=answers)

    session = None

    def start():
        nonlocal session
        import torch

        from benchmarks import peers

        torch.set_num_threads(threads)
        module, _, variant = name.partition(":")
        session = peers.load(module).setup(shape, threads, variant)
        return {"bytes": session.bytes, "bytes_before": session.bytes_before, "note": session.note,
                "details": getattr(session, "details", None)}  # fmt: skip

    reply(start)
    for line in sys.stdin:
        request = json.loads(line)
        reply(lambda request=request: answer_to(session, request))
        if "close" in request:
            break


if __name__ == "__main__":
    main()
