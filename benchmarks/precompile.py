"""Compile what pytest benchmarks would time, several at once, into the caches that the timing then reads.

    python -m benchmarks.precompile [--processes 6] [--seconds 200]

The compiled rows of the models in the order of the suite, each in a process of its own, until the seconds are over: of a row's
minutes nearly all are Inductor's. Nothing is timed; what Inductor chooses by time is left for the timing, which is alone then.
"""

import argparse
import os
import subprocess
import sys
import time

import torch

from benchmarks import measure
from benchmarks.test_models import gpu_cases


def compiled_cases() -> dict[str, measure.Case]:
    return {case.id: case for case in gpu_cases() if case.info["provider"].endswith("-compiled")}


def compile_one(id: str) -> None:
    torch._inductor.config.autotune_local_cache = False  # others compile beside it, and would choose for it
    torch.backends.cudnn.allow_tf32 = False  # as conftest.py has it
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    start = time.perf_counter()
    case = compiled_cases()[id]
    case.build().run(0)
    torch.cuda.synchronize()
    print(f"{id}: {time.perf_counter() - start:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precompile", description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=6, help="at once (default 6)")
    parser.add_argument("--seconds", type=float, default=200, help="after which what is not done is left (default 200)")
    parser.add_argument("--case", help="compile this row alone, in this process")
    options = parser.parse_args()
    if not measure.GPU:
        sys.exit("benchmarks.precompile: torch sees no GPU on this machine, there is nothing to compile for")
    if options.case:
        compile_one(options.case)
        return 0
    deadline, waiting, running = time.perf_counter() + options.seconds, list(compiled_cases()), []
    threads = max(1, (os.cpu_count() or 1) // options.processes)
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(threads), "OMP_NUM_THREADS": "1"}
    while (waiting or running) and time.perf_counter() < deadline:
        running = [child for child in running if child.poll() is None]
        while waiting and len(running) < options.processes:
            command = [sys.executable, "-m", "benchmarks.precompile", "--case", waiting.pop(0)]
            running.append(subprocess.Popen(command, env=environment))
        time.sleep(0.2)
    for child in running:
        child.kill()
        child.wait()
    print(f"benchmarks.precompile: {len(waiting) + len(running)} rows are left to the timing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
