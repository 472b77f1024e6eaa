"""A seeded fuzzer: the fused operations and the fused model against the reference, by the one rule of the house.

    python -m tests.fuzz --count 10000 --processes 4 --json fuzz.json
    python -m tests.fuzz --seed 0 --case inner:123              (one of them again, told in full)

Seed, kind and index determine a case: ``pixel_embed``, ``inner``, ``fold``, ``outer`` are calls of an operation, ``model``
whole models, ``surgery`` models that somebody did something to. Every tensor, and whatever the operations allocate, lies inside
of NaN that has to be the same bits afterwards. Without a GPU Triton's interpreter runs the kernels, and never in bfloat16.

A case (``fuzz_cases``) is *right* by ``fuzz_rule``; or a *named error* of an operation for one of its ``RESTRICTIONS``; or a
*reason* of dispatch; or the *reference raises too*. Anything else is wrong: another answer, a NaN of its own, an answer where
the reference has none, a bare exception, a write outside, a process that dies, a case that does not end.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import random
import signal
import sys
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import numpy
import timm
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent))  # as pytest does

from fuzz_cases import draw
from fuzz_rule import DEVICE, Wrong
from interpreter import hasten

if DEVICE == "cpu":
    hasten()
KINDS = {"pixel_embed": 4, "inner": 7, "fold": 5, "outer": 3, "block": 2, "model": 1, "surgery": 4}
LIMIT_S = 120.0  # seconds for a case; the slowest takes a tenth of that on a busy machine
VERDICTS = ("right", "named error", "reason", "reference raises too", "wrong")


def kind_of(seed: int, index: int) -> str:
    return random.Random(f"{seed}:{index}").choices(list(KINDS), list(KINDS.values()))[0]


def examine(seed: int, kind: str, index: int) -> tuple[str, str]:
    """Verdict and, where it is "wrong", what and of which case."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    case = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case = draw(seed, kind, index)
            about = case.describe()  # before the call, which may end this process
            return case.judge(), ""
        except Wrong as wrong:
            return "wrong", f"{wrong}\n{about}"
        except Exception as error:
            told = about if case else "while it was drawn"
            return "wrong", f"{type(error).__name__}: {error}\n{told}\n{traceback.format_exc().strip()}"
        finally:
            torch.use_deterministic_algorithms(False)


def replay(seed: int, kind: str, index: int) -> str:
    return f"python -m tests.fuzz --seed {seed} --case {kind}:{index}"


def _work(pipe, seed: int, work: Callable[[int, str, int], tuple[str, str]]) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the first one ends these
    try:
        pipe.send("ready")
        while True:
            pipe.send(work(seed, *pipe.recv()))
    except (EOFError, BrokenPipeError):
        return


def run(
    seed: int, cases: list[tuple[str, int]], processes: int, limit: float = LIMIT_S, work: Callable = examine
) -> Iterator[tuple[str, int, str, str]]:
    """(kind, index, verdict, what) as they come. A process that dies or does not end a case is replaced; the case is wrong."""
    context = multiprocessing.get_context("spawn")  # forked, torch's threads are lost
    waiting, busy = deque(cases), {}  # busy: of every pipe its process, the case, None while it starts, and the end of its time

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, seed, work), daemon=True)
        process.start()
        theirs.close()
        busy[ours] = process, None, math.inf

    try:
        for _ in range(min(processes, len(waiting))):
            start()
        while busy:
            ready = wait(list(busy), timeout=1.0)
            late = [pipe for pipe, (_, _, end) in busy.items() if pipe not in ready and time.monotonic() > end]
            for pipe in [*ready, *late]:
                process, case, _ = busy.pop(pipe)
                try:
                    if pipe in late:
                        process.kill()
                        raise EOFError(f"not done after {limit:.0f} s")
                    result = pipe.recv()
                except (EOFError, OSError) as error:
                    process.join()
                    if case is None:
                        raise RuntimeError(f"a process ended at its start, with exit code {process.exitcode}") from error
                    result = "wrong", str(error) or f"its process ended with exit code {process.exitcode}"
                    if waiting:
                        start()
                else:
                    if waiting:
                        following = waiting.popleft()
                        pipe.send(following)
                        busy[pipe] = process, following, time.monotonic() + limit
                    else:
                        pipe.close()  # at which the process ends
                if case is not None:
                    yield *case, *result
    finally:
        for process, _, _ in busy.values():
            process.kill()


def main(arguments: list[str] | None = None) -> int:
    from tqdm import tqdm

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the fused operations and the fused model.")
    parser.add_argument("--count", type=int, default=300, help="cases (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", choices=KINDS, help="one kind of cases")
    parser.add_argument("--case", metavar="KIND:INDEX", help="one case, in this process, told in full")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--again", type=Path, metavar="FILE", help="only the wrong cases of a result, of which it writes anew")
    args = parser.parse_args(arguments)
    if args.case:
        kind, _, index = args.case.partition(":")
        if kind not in KINDS or not index.isdigit():
            parser.error(f"--case {args.case!r} is not KIND:INDEX; kinds: {', '.join(KINDS)}")
        verdict, what = examine(args.seed, kind, int(index))
        print(f"{verdict}: {what or draw(args.seed, kind, int(index)).describe()}")
        return int(verdict == "wrong")
    cases = [(args.only or kind_of(args.seed, i), i) for i in range(args.count)]
    counts: dict[str, Counter] = {kind: Counter() for kind in KINDS}
    before: dict[str, Any] = {}
    if args.again:  # after a mend that no other case can have become wrong by; the file says which were judged again
        args.json, before = args.again, json.loads(args.again.read_text("utf-8"))
        args.seed, judged = before["seed"], [w["case"].split(":") for w in before["wrong"]]
        cases = [(kind, int(index)) for kind, index in judged]
        counts |= {kind: Counter(row) for kind, row in before["counts"].items()}
        for kind, _ in cases:
            counts[kind]["wrong"] -= 1
    wrong, began, stopped = [], time.monotonic(), False
    results = run(args.seed, cases, args.processes)
    try:
        for kind, index, verdict, what in tqdm(results, total=len(cases), unit="case", disable=None):
            counts[kind][verdict] += 1
            if verdict == "wrong":
                wrong.append({"case": f"{kind}:{index}", "replay": replay(args.seed, kind, index), "what": what})
                tqdm.write(f"{replay(args.seed, kind, index)}\n  " + "\n  ".join(what.splitlines()[:2]))
    except KeyboardInterrupt:
        stopped = True
        results.close()
    done = sum(sum(c.values()) for c in counts.values())
    table = {kind: {v: c[v] for v in VERDICTS} for kind, c in counts.items() if c}
    asked = before.get("asked", len(cases))
    print(f"{done} of {asked} cases, {len(wrong)} wrong, seed {args.seed}, {time.monotonic() - began:.0f} s")
    for kind, row in table.items():
        print(f"  {kind}: " + ", ".join([f"{n} {v}" for v, n in row.items() if n]))
    if args.json:
        versions = {m.__name__: m.__version__ for m in (torch, triton, timm, numpy)} | {"python": platform.python_version()}
        device = torch.cuda.get_device_name() if DEVICE == "cuda" else "Triton's interpreter on the CPU"
        result = {
            "seed": args.seed, "count": done, "asked": asked, "device": device, "versions": versions,
            "seconds": round(time.monotonic() - began) + before.get("seconds", 0), "counts": table, "wrong": wrong,
            "judged_again": before.get("judged_again", []) + [f"{kind}:{i}" for kind, i in cases] * bool(args.again),
        }  # fmt: skip
        args.json.parent.mkdir(parents=True, exist_ok=True)
        beside = args.json.with_name(args.json.name + ".part")
        beside.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
        beside.replace(args.json)
    return 130 if stopped else int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
