"""What became slower between two result files, by more than the noise.

    python -m benchmarks.compare OLD NEW

Rows of others (timm, plain and compiled PyTorch) are the control: their code has not changed. The median of their changes is
the drift of the machine, which is taken out of every row; nine tenths of them lie within the noise. A row of ours is slower if
its median grew by more than that noise, and by more than 3%, and all of the interval of its change lies above zero. Exit
status: 0 nothing is slower, 1 something is, or gets no time now because it is wrong, 2 the files cannot be compared.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

LEAST = 0.03
RESAMPLED, CONFIDENCE = 2000, 0.95
TIMED = ("models", "operations", "library", "scaling")
OTHERS = ("timm", "eager", "compiled", "sdpa", "xformers", "linear", "addmm", "addmm_", "flash", "cudnn", "efficient")


def load(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
        found["device"] = found["machine_info"]["device"]
        found["rows"] = {
            row["extra_info"]["id"]: row["stats"] | {"provider": row["extra_info"]["provider"]}
            for row in found["benchmarks"]
            if row["extra_info"].get("suite") in TIMED
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of pytest benchmarks --benchmark-json ({error!r})") from error
    return found


def ratio(times: Sequence[float], over: Sequence[float], paired: bool = True) -> list[float]:
    """Median over median, and the ends of its interval of 95%: by the bootstrap, which draws rounds and, where they are
    ``paired``, the same ones of both."""
    a, b = np.asarray(times), np.asarray(over)
    drawn = np.random.default_rng(0)
    of_a = drawn.integers(len(a), size=(RESAMPLED, len(a)))
    of_b = of_a if paired and len(a) == len(b) else drawn.integers(len(b), size=(RESAMPLED, len(b)))
    found = np.median(a[of_a], 1) / np.median(b[of_b], 1)
    ends = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return [float(f"{x:.4g}") for x in (np.median(a) / np.median(b), *ends)]


def is_control(row: dict[str, Any]) -> bool:
    return row["provider"].split("-")[0] in OTHERS


def drift_and_noise(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> tuple[float, float]:
    """Of the control: the median ratio of new to old, and how far from it nine tenths of the ratios lie."""
    ratios = [new["median"] / old["median"] for old, new in pairs if is_control(old)]
    if not ratios:
        return 1.0, LEAST
    drift = statistics.median(ratios)
    away = sorted(abs(ratio / drift - 1) for ratio in ratios)
    return drift, max(LEAST, away[min(len(away) - 1, round(0.9 * len(away)))])


def verdict(change: float, low: float, high: float, noise: float) -> str:
    """ "slower", "faster", or "same" within the noise, of a change and the ends of its interval."""
    if low > 0 and change > noise:
        return "slower"
    return "faster" if high < 0 and change < -noise else "same"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    try:
        old, new = load(options.old), load(options.new)
    except ValueError as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    if old["device"] != new["device"]:
        print(f"benchmarks.compare: {old['device']} and {new['device']} are different devices", file=sys.stderr)
        return 2
    both = {name: (old["rows"][name], row) for name, row in new["rows"].items() if name in old["rows"]}
    wrong = {name: reason for name, reason in new.get("left_out", {}).items() if name in old["rows"] and "not timed" in reason}
    if not wrong and not any(not is_control(row) for row, _ in both.values()):
        print(f"benchmarks.compare: {options.old} and {options.new} have no row of ours in common", file=sys.stderr)
        return 2
    drift, noise = drift_and_noise(list(both.values()))
    controls = sum(is_control(row) for row, _ in both.values())
    print(f"{len(both)} rows in both; drift of the machine {drift - 1:+.1%}, noise {noise:.1%} ({controls} rows of others)")
    found: dict[str, list[str]] = {"slower": [], "faster": [], "same": []}
    for name, (before, after) in both.items():
        if not is_control(before):
            change, low, high = (x / drift - 1 for x in ratio(after["data"], before["data"], paired=False))
            times = f"{before['median'] * 1e3:10.4g} → {after['median'] * 1e3:10.4g} ms"
            line = f"{times} {change:+7.1%} ({low:+.1%} to {high:+.1%})  {name}"
            found[verdict(change, low, high, noise)].append(line)
    for kind in ("slower", "faster"):
        print(f"{kind}: {len(found[kind])}", *sorted(found[kind]), sep="\n  ")
    print(f"within the noise: {len(found['same'])}")
    for kind, one, other in (("only in the old file", old, new), ("only in the new file", new, old)):
        if names := [name for name in one["rows"] if name not in other["rows"]]:
            print(f"{kind}: {len(names)}", *names, sep="\n  ")
    for name, reason in wrong.items():
        print(f"wrong now: {name}: {reason}")
    return 1 if found["slower"] or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
