"""Compile what pytest benchmarks would time, several at once, into the caches that the timing then reads.

    python -m benchmarks.precompile [--processes 6] [--seconds 200] [--skip-measured FILE]

The compiled rows in the order in which they are timed, each in a process of its own, until the seconds are over: of a row's
minutes nearly all are the compiler's. Nothing is timed, and nothing kept of what the compiler chooses by time while others use
the GPU: that is left for the timing, which is alone then. Of "tuned" rows so only the candidates are kept, compiled.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.test_models import gpu_cases
from benchmarks.test_operations import operation_cases


def compiled_cases() -> dict[str, measure.Case]:
    """By id, in the order of the timing."""
    ways = ("compiled", "tuned", "graphed")
    cases = [case for case in (*gpu_cases(), *operation_cases(True)) if case.info["provider"].endswith(ways)]
    return {case.id: case for case in measure.in_order(cases)}


def compile_one(id: str) -> None:
    measure.settings()
    torch._inductor.config.autotune_local_cache = False  # others compile beside it, and would choose for it
    torch._inductor.config.fx_graph_cache = not id.endswith("tuned")
    start = time.perf_counter()
    case = compiled_cases()[id]
    case.build().run(0)
    torch.cuda.synchronize()
    print(f"{id}: {time.perf_counter() - start:.0f} s", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precompile", description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=6, help="at once (default 6)")
    parser.add_argument("--seconds", type=float, default=200, help="after which what is not done is left (default 200)")
    parser.add_argument(
        "--skip-measured", type=Path, action="append", default=[], metavar="FILE", help="not the rows that this result has"
    )
    parser.add_argument("--case", help="compile this row alone, in this process")
    options = parser.parse_args(arguments)
    if not measure.GPU:
        sys.exit("benchmarks.precompile: torch sees no GPU on this machine, there is nothing to compile for")
    if options.case:
        compile_one(options.case)
        return 0
    try:
        known = measure.measured_in(options.skip_measured)
    except ValueError as error:
        parser.error(str(error))
    waiting = [id for id in compiled_cases() if id not in known]
    deadline, running, done = time.perf_counter() + options.seconds, [], 0
    threads = max(1, (os.cpu_count() or 1) // options.processes)
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(threads), "OMP_NUM_THREADS": "1"}
    while (waiting or running) and time.perf_counter() < deadline:
        still = [child for child in running if child.poll() is None]
        done += len(running) - len(still)
        running = still
        while waiting and len(running) < options.processes:
            command = [sys.executable, "-m", "benchmarks.precompile", "--case", waiting.pop(0)]
            running.append(subprocess.Popen(command, env=environment))
        time.sleep(0.2)
    for child in running:
        child.kill()
        child.wait()
    print(f"benchmarks.precompile: {done} rows done, {len(waiting) + len(running)} are left to the timing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
