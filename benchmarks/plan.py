"""Write tnt_fast/plan.json, the known times of training steps that ``tnt-fast plan`` scales, from committed results.

    python -m benchmarks.plan

And the table of docs/scaling.md, which is what the command then says of the paper's recipe.

The budget's simulated time is of the kernels as they are, compiled; where the budget holds one that was measured of the same
kernels, that. Else the newest measured row: the reference is timm's TNT bit for bit, so timm's rows are its times.
"""

import json
from typing import Any

import torch

from benchmarks.report import RESULTS, ROOT, put_into, read
from tnt_fast import plan, recipe
from tnt_fast.recipe import Config
from tnt_fast.writing import write

GPU, DEVICE, BATCH = "h200", "NVIDIA H200", 256
PAGE = ROOT / "docs" / "scaling.md"
ASKED = {"v100": 8, "h100": 8, "rtx4090": 1}  # GPUs, and how many, of the page's table
PRODUCTS = ("mm", "addmm", "addmm_")
Row = dict[str, Any]


def reached(budget: dict[str, Any]) -> float:
    """The part of the peak that the library's products reach in the budget of a training step."""
    work = us = 0.0
    for row in budget["tnt_s"]["train"]["rows"]:
        if row["by"] == "pytorch" and row["name"] in PRODUCTS and len(row["shapes"][-1]) == 2:
            (m, k), (_, n) = row["shapes"][-2:]
            work += row["launches"] * 2 * m * k * n
            us += row["launches"] * row["us"]
    return work / us / 1e6 / plan.GPUS[GPU].half


def rows(budget: dict[str, Any], measured: dict[str, Row]) -> list[Row]:
    found = []
    for name in ("tnt_ti", "tnt_s", "tnt_b"):
        about = plan.shape(Config("", model=f"{name}_patch16_224", drop_path=0.0), 1000)
        for path, provider in (("fused", "fused"), ("reference", "timm")):
            kept = plan.kept(about.model, torch.bfloat16, path == "fused").total().image
            counted = {"gmacs": round(about.macs / 1e9, 4), "kept_mb": round(kept / 1e6, 3)}
            for compiled in (False, True):
                one = budget.get(name, {}).get("train") if path == "fused" and compiled else None
                id = f"{name}/train/bf16/{BATCH}/{provider}-{'compiled' if compiled else 'eager'}"
                time = _of_budget(one) if one else _of_row(measured[id]) if id in measured else None
                if time:
                    found.append({"model": name, "path": path, "compiled": compiled, "batch": BATCH} | counted | time)
    return found


def _of_budget(one: Row) -> Row:
    late = next((row["us"] for row in one["rows"] if row["name"].startswith("host")), 0.0)
    host = round(one["gpu_ms"] + late / 1e3, 3) if late else None
    found = {"host_ms": host, "source": "benchmarks/results/budget.json"}
    if "measured_ms" in one:
        ms = one["measured_ms"]
        return {"ms": ms, "low": ms, "high": ms, "gpu_ms": ms, "kind": "measured"} | found
    return {key: one[key] for key in ("ms", "low", "high", "gpu_ms")} | {"kind": "simulated"} | found


def _of_row(row: Row) -> Row:
    ms, low, high = (round(1e3 * row[key], 3) for key in ("median", "q1", "q3"))
    source = f"benchmarks/results, {row['id']}, {row['run'][:16]}"
    return {"ms": ms, "low": low, "high": high, "gpu_ms": ms, "kind": "measured", "host_ms": None, "source": source}


def text() -> str:
    """All of plan.json."""
    budget = json.loads((RESULTS / "budget.json").read_text("utf-8"))
    device = read(sorted(RESULTS.glob("*/*.json")))[DEVICE]
    measured = {id: row for (suite, id), row in device["rows"].items() if suite == "models"}
    found = {"gpu": GPU, "dtype": "bfloat16", "depth": 12, "reached": round(reached(budget), 3), "rows": rows(budget, measured)}
    return json.dumps(found, indent=1) + "\n"


def line(found: dict[str, Any]) -> str:
    """Of the page's table, from a plan."""
    own = next(iter(found["ways"].values()))
    low, nominal, high = own["hours"]
    return (
        f"| {found['count']} × {found['gpu']['title']} | {found['path']}, {found['dtype']} | "
        f"{own['total'] / plan.GIB:.1f} of {found['gpu']['memory']:g} GiB | {own['accumulate']} × {own['batch']:,} | "
        f"{own['largest_batch']:,} | {nominal:.0f} ({low:.0f} to {high:.0f}) | {found['sources']['time'].partition(',')[0]} |"
    )


def table() -> str:
    config, _ = recipe.resolved({"data": "", "amp": "bfloat16", "compile": True}, "paper")
    plans = [plan.plan(config, plan.GPUS[name], count, *plan.IMAGENET) for name, count in ASKED.items()]
    head = ["| GPUs | path | memory | a GPU's batches a step | largest that fits | hours | time |", f"|{' --- |' * 7}"]
    return "\n".join(head + [line(found) for found in plans])


def main() -> int:
    write(plan.TIMES, text().encode())
    write(PAGE, put_into(PAGE.read_text("utf-8"), table()).encode())
    print(plan.TIMES, PAGE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
