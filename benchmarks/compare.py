"""What became slower between two result files, by more than the noise.

    python -m benchmarks.compare OLD NEW

A row is slower if its lower quartile now lies above its upper quartile then, and its median grew by more than 3%. Exit status:
0 nothing is slower, 1 something is, 2 the files cannot be compared.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

LEAST = 0.03


def load(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
        found["rows"] = {row["fullname"]: row for row in found["benchmarks"] if row["extra_info"].get("suite") in TIMED}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of pytest benchmarks --benchmark-json ({error!r})") from error
    return found


TIMED = ("models", "operations", "scaling")


def verdict(old: dict[str, float], new: dict[str, float]) -> str:
    """ "slower", "faster", or "same" within the noise, of two rows' statistics."""
    change = new["median"] / old["median"] - 1
    if new["q1"] > old["q3"] and change > LEAST:
        return "slower"
    return "faster" if new["q3"] < old["q1"] and change < -LEAST else "same"


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
    devices = [found["machine_info"].get("device") for found in (old, new)]
    if devices[0] != devices[1]:
        print(f"benchmarks.compare: {devices[0]} and {devices[1]} are different devices", file=sys.stderr)
        return 2
    counts = {"slower": [], "faster": [], "same": []}
    for name, row in new["rows"].items():
        if name in old["rows"]:
            before, after = old["rows"][name]["stats"], row["stats"]
            change = after["median"] / before["median"] - 1
            line = f"{before['median'] * 1e3:10.4g} → {after['median'] * 1e3:10.4g} ms {change:+7.1%}"
            counts[verdict(before, after)].append(f"{line}  {row['extra_info']['id']}")
    for kind in ("slower", "faster"):
        print(f"{kind}: {len(counts[kind])}", *sorted(counts[kind]), sep="\n  ")
    print(f"within the noise: {len(counts['same'])}")
    for kind, found, other in (("only in the old file", old, new), ("only in the new file", new, old)):
        if names := [name for name in found["rows"] if name not in other["rows"]]:
            print(f"{kind}: {len(names)}", *names, sep="\n  ")
    return 1 if counts["slower"] else 0


if __name__ == "__main__":
    sys.exit(main())
