"""Write the tables, the pictures and summary.json from result files of ``--benchmark-json``.

    python -m benchmarks.report [FILE ...]        default: benchmarks/results/*/*.json

Into README.md what a reader wants first, into benchmarks/results/README.md every row, into docs/performance.md the budget, all
between markers; pictures and summary.json beside the results. Of each group of a device the newest run counts that has ours
and others; ratios are taken within one run.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import stack
from benchmarks.compare import is_control, ratio
from benchmarks.measure import exponent
from tnt_fast.dispatch import OPERATIONS
from tnt_fast.writing import write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
TOP1 = {  # published, ImageNet-1k at 224 px: TNT, CNNs: Table 3 of arXiv:2103.00112; DeiT undistilled, arXiv:2012.12877
    "tnt_ti": 73.9, "tnt_s": 81.5, "tnt_b": 82.9, "deit_ti": 72.2, "deit_s": 79.8, "deit_b": 81.8,
    "cnn_resnet50": 76.2, "cnn_regnety_4g": 80.0,
}  # fmt: skip
TITLES = {
    "tnt_ti": "TNT-Ti", "tnt_s": "TNT-S", "tnt_b": "TNT-B", "tnt_s_legacy": "TNT-S legacy",
    "tnt_s_inner4": "TNT-S, 4 inner blocks",
    "deit_ti": "DeiT-Ti", "deit_s": "DeiT-S", "deit_b": "DeiT-B",
    "cnn_resnet50": "ResNet-50", "cnn_regnety_4g": "RegNetY-4G",
}  # fmt: skip
HEADLINE = ({"inference": 256, "train": 256, "latency_graph": 1}, "bf16")  # of a GPU: mode → batch, and dtype
PICTURES = {
    "throughput": "img/s against published top-1 and against multiply-adds",
    "waterfall": "what each fused operation saves",
    "memory": "peak memory",
    "scaling": "cost as the work grows",
    "roofline": "operations under the machine's roofs",
}
Row = dict[str, Any]
Device = dict[str, Any]


# ---- reading ----


def read(files: Iterable[Path]) -> dict[str, Device]:
    """By device: "machine" of its last run, "rows" by suite and id, "roofs" by run and dtype, "runs" by their time."""
    runs = []
    for path in files:
        try:
            found = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON ({error}); an interrupted run may have left it empty") from error
        if isinstance(found, dict) and "benchmarks" in found and {"device", "kind"} <= found.get("machine_info", {}).keys():
            runs.append((found["datetime"], f"{path.parent.name}/{path.name}", found))
    devices: dict[str, Device] = {}
    for when, file, run in sorted(runs, key=lambda each: each[:2]):
        machine = run["machine_info"]
        device = devices.setdefault(machine["device"], {"groups": {}, "roofs": {}, "runs": {}})
        device["machine"] = machine
        device["roofs"][when] = run.get("roofs", {})
        about = {"file": file, "date": when[:10], "machine": machine, "rows": len(run["benchmarks"])}
        device["runs"][when] = about | {"left_out": run.get("left_out", {})}
        groups: dict[tuple[str, str], list[Row]] = {}
        for bench in run["benchmarks"]:
            if "suite" not in bench["extra_info"]:
                continue
            row = bench["extra_info"] | {"median": bench["stats"]["median"], "run": when}
            row |= {name: bench["stats"][name] for name in ("q1", "q3", "data")} | {"group": bench.get("group")}
            groups.setdefault((row["suite"], bench.get("group") or row["id"]), []).append(row)
        for name, found in groups.items():
            if name not in device["groups"] or compares(found) or not compares(device["groups"][name]):
                device["groups"][name] = found
    for device in devices.values():
        device["rows"] = {(row["suite"], row["id"]): row for found in device.pop("groups").values() for row in found}
    return devices


def compares(group: list[Row]) -> bool:
    """Whether a group has rows of ours and of others."""
    return len({is_control(row) for row in group if "provider" in row}) == 2


def newest(device: Device) -> str:
    return max(device["runs"])


def rows(device: Device, suite: str) -> list[Row]:
    return [row for (kind, _), row in device["rows"].items() if kind == suite]


def models(device: Device) -> list[Row]:
    """The rows of whole models, without the steps of the waterfall."""
    return [row for row in rows(device, "models") if not is_step(row)]


def plain(device: Device) -> list[Row]:
    """Those of ours, timm's TNT and DeiT as they are, eager and compiled: for pictures and the first table."""
    return [row for row in models(device) if way(row) != "tuned" and path(row) not in ("cudnn", "outer")]


def is_step(row: Row) -> bool:
    return row["provider"].split("+")[0] == "eager"


def path(row: Row) -> str:
    return row["provider"].split("-")[0]


def way(row: Row) -> str:
    return row["provider"].split("-")[1]


def who(row: Row) -> str:
    """ "tnt_fast", "timm" (its TNT), "deit" or "cnn"."""
    if row["model"].startswith(("deit", "cnn")):
        return row["model"].split("_")[0]
    return "timm" if row["provider"].startswith("timm") else "tnt_fast"


def key(row: Row) -> tuple[str, str, int]:
    return row["mode"], row["dtype"], row["batch"]


def newest_counts(devices: dict[str, Device]) -> Device | None:
    """Of the devices that have counted rows (they are the same on every device) the one that ran last."""
    counted = [device for device in devices.values() if rows(device, "flops")]
    return max(counted, key=newest, default=None)


def against(device: Device, row: Row) -> dict[str, list[float]]:
    """How much faster a row of our TNT is than its peers of the same run, with the interval: "timm_compiled", "deit_eager", …,
    of DeiT with cuDNN's attention or our outer kernels "deit_cudnn_compiled", "deit_outer_compiled"."""
    found, deit = {}, "deit_" + row["model"].split("_")[1]
    for other in models(device):
        peer = who(other) == "timm" and other["model"] == row["model"] or other["model"] == deit
        if peer and key(other) == key(row) and other["run"] == row["run"]:
            name = "_".join((who(other), *([path(other)] if path(other) in ("cudnn", "outer") else ()), way(other)))
            found[name] = ratio(other["data"], row["data"], paired=other["group"] == row["group"])
    return found


def summary(devices: dict[str, Device]) -> dict[str, dict[str, Row]]:
    """By device and model/mode/dtype/batch: the fastest provider (of a TNT: of ours; of DeiT: without our kernels), and how
    much faster than others, with the interval of 95%."""
    found: dict[str, dict[str, Row]] = {}
    for name, device in devices.items():
        flat = found.setdefault(name, {})
        for row in models(device):
            label = "/".join(map(str, (row["model"], *key(row))))
            if who(row) == "timm" or path(row) == "outer" or (label in flat and flat[label]["ms"] <= row["median"] * 1e3):
                continue
            entry = {"img_s": row["img_s"], "ms": round(row["median"] * 1e3, 4), "provider": row["provider"]}
            kept = ("peak_mib", "percent_of_roof", "joules", "p99_ms", "warm_p50_ms", "sustained_img_s", "residual")
            entry |= {part: row[part] for part in kept if part in row}
            for name, found_ratio in against(device, row).items() if who(row) == "tnt_fast" else ():
                entry[f"vs_{name}"], *entry[f"vs_{name}_interval"] = found_ratio
            flat[label] = entry
    return found


def exponents(device: Device) -> dict[tuple[str, str], float]:
    """Of each sweep and provider: p of time ~ size^p."""
    sweeps: dict[tuple[str, str], list[Row]] = {}
    for row in rows(device, "scaling"):
        sweeps.setdefault((row["sweep"], row["provider"]), []).append(row)
    return {
        name: round(exponent([r["size"] for r in found], [r["median"] for r in found]), 2)
        for name, found in sweeps.items()
        if len({r["size"] for r in found}) > 1
    }


# ---- tables ----


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def number(value: float) -> str:
    """Three digits or all before the point, whichever is more."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{1 if value >= 10 else 2 if value >= 1 else 3}f}"


def label(device: Device) -> str:
    """The device, and date, commit and versions of every run that rows are from."""
    used = {row["run"] for row in device["rows"].values()}
    parts: dict[str, list[str]] = {}
    for when, run in device["runs"].items():
        if when in used:
            machine = run["machine"]
            versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value)
            note = f"; {machine['note']}" if machine.get("note") else ""
            parts.setdefault(versions + note, []).append(f"{run['date']}, commit {machine['commit'] or 'unknown'}")
    threads = f", {device['machine']['threads']} threads" if device["machine"]["kind"] == "cpu" else ""
    found = "; ".join(f"{' and '.join(dict.fromkeys(when))}, {versions}" for versions, when in parts.items())
    return f"{device['machine']['device']}{threads}, {found}"


def dates(device: Device) -> str:
    """Date and commit of every run that rows are from."""
    used = {row["run"] for row in device["rows"].values()}
    runs = [(run["date"], run["machine"]["commit"] or "unknown") for when, run in device["runs"].items() if when in used]
    return "; ".join(f"{date}, commit {commit}" for date, commit in dict.fromkeys(runs))


def headline(device: Device) -> str:
    """img/s (of a train step: and peak MiB) of TNT and DeiT of one size side by side; of a GPU at the batches of HEADLINE."""
    found: dict[tuple, dict[str, str]] = {}
    columns = []
    gpu = device["machine"]["kind"] != "cpu"
    for row in plain(device):
        mode, dtype, batch = key(row)
        if row["model"].split("_", 1)[1] not in ("s", "b") or (gpu and (HEADLINE[0].get(mode), HEADLINE[1]) != (batch, dtype)):
            continue
        path = " (reference)" if row["provider"].startswith("reference") else ""
        columns.append({"tnt_fast": f"tnt_fast{path}", "timm": "timm TNT", "deit": "DeiT"}[who(row)] + f", {way(row)}")
        memory = f" ({row['peak_mib']:,.0f})" if "peak_mib" in row and row["mode"] == "train" else ""
        found.setdefault((row["model"].split("_")[1], mode, dtype, batch), {})[columns[-1]] = number(row["img_s"]) + memory
    columns = list(dict.fromkeys(columns))
    lines = []
    for (size, mode, dtype, batch), cells in found.items():
        name = {"latency_graph": "CUDA graph"}.get(mode, mode)
        lines.append([f"{size.capitalize()}, {name}, {dtype}, batch {batch}", *(cells.get(c, "") for c in columns)])
    memory = " (peak MiB)" if any("peak_mib" in row and row["mode"] == "train" for row in models(device)) else ""
    return table([f"img/s{memory}", *columns], lines) if lines else ""


def work_table(device: Device, chosen: Iterable[str], short: bool = False) -> str:
    by_model: dict[str, dict[str, Row]] = {}
    for row in rows(device, "flops"):
        by_model.setdefault(row["model"], {})[row["path"]] = row
    lines = []
    for model in chosen:
        paths = [by_model[model][path] for path in ("eager", "fused") if path in by_model[model]]
        lines.append([
            TITLES[model], f"{paths[0]['parameters'] / 1e6:.2f}", f"{paths[0]['macs'] / 1e9:.3f}",
            f"{paths[0]['macs_with_norms'] / 1e9:.3f}", f"{TOP1[model]}" if model in TOP1 else "",
            " → ".join(f"{row['bytes'] / 2**20:.0f}" for row in paths),
            " → ".join(f"{row['flop_per_byte']:.0f}" for row in paths),
        ])  # fmt: skip
    head = ["one image", "M parameters", "GMACs", "with LayerNorms", "published top-1", "MiB moved", "FLOP/byte"]
    kept = [i for i, name in enumerate(head) if not short or name not in ("with LayerNorms", "FLOP/byte")]
    return table([head[i] for i in kept], [[line[i] for i in kept] for line in lines])


def cells(row: Row, columns: dict[str, str]) -> list[str]:
    return ["" if name not in row else row[name] if isinstance(row[name], str) else number(row[name]) for name in columns]


def ratio_table(device: Device) -> str | None:
    """How many times as fast as its peers each row of our TNT is, with the interval of 95%, taken within one run."""
    found = {row["id"]: against(device, row) for row in plain(device) if who(row) == "tnt_fast"}
    columns = list(dict.fromkeys(name for each in found.values() for name in each))
    if not columns:
        return None
    lines = [
        [f"`{id}`", *("{:.2f} ({:.2f} to {:.2f})".format(*each[c]) if c in each else "" for c in columns)]
        for id, each in found.items()
        if each
    ]
    return table(["times as fast as", *(c.replace("_", " ") for c in columns)], lines)


def every_row(device: Device) -> list[str]:
    """Tables of all rows of a device."""
    parts = []
    columns = {
        "img_s": "img/s", "p50_ms": "p50 ms", "p99_ms": "p99 ms", "warm_p50_ms": "p50 ms, L2 warm",
        "sustained_img_s": "img/s sustained", "sustained_ms": "ms sustained", "mhz": "MHz", "peak_mib": "peak MiB",
        "joules": "J a call", "residual": "residual stream", "tflop_s": "model TFLOP/s", "gb_s": "GB/s",
        "percent_of_roof": "% of roof", "percent_of_issue": "% of issue bound", "error_over_eager": "error over eager's",
    }  # fmt: skip
    for suite in ("models", "operations", "library"):
        if found := rows(device, suite):
            found = [row | {"mhz": row["clock"]["sm_mhz"][1]} if "clock" in row else row for row in found]
            used = {name: title for name, title in columns.items() if any(name in row for row in found)}
            parts.append(table([suite, *used.values()], [[f"`{row['id']}`", *cells(row, used)] for row in found]))
    if (ratios := ratio_table(device)) is not None:
        parts.append(ratios)
    if found := rows(device, "scaling"):
        lines = [[f"`{row['id']}`", f"{row['gmacs']:.3f}", number(row["p50_ms"])] for row in found]
        parts.append(table(["scaling", "GMACs an image", "p50 ms"], lines))
        fitted = ", ".join(f"{provider} ~ {sweep}^{p}" for (sweep, provider), p in exponents(device).items())
        parts.append(f"Fitted: time of {fitted}.")
    roofs = {
        (run["date"], dtype): roof for when, run in device["runs"].items() for dtype, roof in device["roofs"][when].items()
    }
    if roofs:
        lines = [
            [dtype, date, number(roof["bytes_per_s"] / 1e9), number(roof["flop_per_s"] / 1e12), roof.get("statistic", "best")]
            for (date, dtype), roof in roofs.items()
        ]
        parts.append(table(["roof", "date", "copy, GB/s", "product, TFLOP/s", "of its times"], lines))
    return parts


def static_table(device: Device) -> str:
    found = [kernel for row in rows(device, "static_cost") for kernel in row["rows"]]
    lines = [
        [f"`{r['function']}`", str(r["registers"]), str(r["stack_bytes"]), f"{r['warp_instructions_per_patch']:.0f}"]
        for r in found
    ]
    return table(["TNT-S, bf16, sm_90", "registers", "bytes of stack", "warp instructions a patch"], lines)


def missing(devices: dict[str, Device]) -> str:
    """The rows that no GPU has yet, by suite and kind."""
    from benchmarks.test_library import library_cases
    from benchmarks.test_models import gpu_cases
    from benchmarks.test_operations import attention_cases, operation_cases
    from benchmarks.test_scaling import scaling_cases

    have = {row["id"] for device in devices.values() if device["machine"]["kind"] != "cpu" for row in device["rows"].values()}
    kinds: dict[str, list[bool]] = {}
    for case in [*gpu_cases(), *operation_cases(True), *attention_cases(True), *library_cases(), *scaling_cases(True)]:
        info = case.info
        kind = f"{info['suite']}, {info.get('sweep', info['mode'])}, {info['dtype']}"
        if info["suite"] == "models":
            kind += ", waterfall" if is_step(info) else f", {way(info)}"
        kinds.setdefault(kind, []).append(case.id in have)
    lines = [[kind, str(found.count(False)), str(len(found))] for kind, found in kinds.items() if not all(found)]
    if not lines:
        return "None."
    total = [str(sum(int(line[i]) for line in lines)) for i in (1, 2)]
    return table(["rows of a GPU", "missing", "of"], [*lines, ["all of these", *total]])


def ratios(devices: dict[str, Device], results: Path) -> str:
    """The budget's ratios, until a GPU has measured the budget's commit."""
    commits = {run["machine"]["commit"] for device in devices.values() for run in device["runs"].values()}
    return "" if stack.commit(results) in commits else stack.ratios(results)


def first_block(devices: dict[str, Device], results: Path) -> str:
    """What stands between the markers of README.md: the budget's ratios, the GPUs, or without one the CPUs."""
    parts = [text for text in (ratios(devices, results),) if text]
    measured = [name for name, device in devices.items() if device["rows"]]
    order = [name for name in measured if devices[name]["machine"]["kind"] != "cpu"]
    if not order:
        order = measured
        parts.append("On a GPU: not measured yet ([what is missing](benchmarks/results/README.md)).")
    counted = newest_counts(devices)
    if counted:
        parts.append(work_table(counted, ("tnt_s", "deit_s", "tnt_b", "deit_b"), short=True))
        parts.append("MiB moved: by all kernels in float16, eager → fused.")
    for name in order:
        device = devices[name]
        parts += [text for text in (headline(device),) if text]
        parts.append(f"{device['machine']['device']}, {dates(device)}. [All rows](benchmarks/results/README.md).")
        drawn = pictures_of(device)
        first = "throughput" if "throughput" in drawn and device["machine"]["kind"] != "cpu" else "waterfall"
        if first in drawn:
            parts.append(f"![{PICTURES[first]}](benchmarks/results/pictures/{slug(name)}/{first}.svg)")
    return "\n\n".join(parts)


def full_block(devices: dict[str, Device]) -> str:
    """What stands between the markers of benchmarks/results/README.md."""
    parts = ["## Files"]
    lines = []
    for name, device in devices.items():
        for run in device["runs"].values():
            machine = run["machine"]
            note = machine.get("note") or ""
            lines.append([f"`{run['file']}`", name, run["date"], machine["commit"] or "", f"`{machine['command']}`"])
            lines[-1] += [str(run["rows"]), note]
    parts.append(table(["file", "device", "date", "commit", "made by", "rows", "note"], lines))
    for name, device in devices.items():
        parts += [f"## {name}", f"{label(device)}.", *every_row(device)]
        drawn = pictures_of(device)
        parts += [f"![{PICTURES[p]}](pictures/{slug(name)}/{p}.svg)" for p in drawn]
        if reasons := left_out(device):
            parts += ["Left out:", "\n".join(reasons)]
    counted = newest_counts(devices)
    if counted:
        every = dict.fromkeys(row["model"] for row in rows(counted, "flops"))
        parts += ["## Counted, the same on every machine", work_table(counted, every)]
        parts.append("MiB moved: by all kernels in float16, eager → fused. With LayerNorms: 5 for each of their elements.")
        if rows(counted, "static_cost"):
            parts.append(static_table(counted))
    parts += ["## Rows still missing", missing(devices)]
    return "\n\n".join(parts)


def left_out(device: Device) -> list[str]:
    """Why rows that the device still lacks have no time, the newest reason of each."""
    have = {id for _, id in device["rows"]}
    newest_reason = {id: reason for run in device["runs"].values() for id, reason in run["left_out"].items() if id not in have}
    ids: dict[str, list[str]] = {}
    for id, reason in newest_reason.items():
        line = reason.strip().splitlines()[-1 if reason.startswith("Traceback") else 0]
        ids.setdefault(line, []).append(id)
    return [
        f"- {reason}: `{found[0]}`" + (f" and {len(found) - 1} more" if len(found) > 1 else "") for reason, found in ids.items()
    ]


def put_into(readme: str, text: str) -> str:
    """The README with its block replaced."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"a README needs one {BEGIN} and one {END}")
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n\n{text}\n\n{END}", readme, flags=re.S)


# ---- pictures ----


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower()).strip("-")


def pictures_of(device: Device) -> list[str]:
    """The pictures for which there are rows."""
    return [name for name in PICTURES if FOUND[name](device)]


def _plain(axis, *, x=None, y=None) -> None:
    """A logarithmic axis with plain numbers at the given places."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for one, places in ((axis.xaxis, x), (axis.yaxis, y)):
        if places is not None:
            one.set_major_locator(FixedLocator(sorted(set(places))))
            one.set_minor_locator(NullLocator())
            one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}"))


def _ladder(values: Iterable[float]) -> list[float]:
    """Round numbers around positive values: 1, 2, 5, 10, ...; more of them where the values lie close together."""
    low, high = min(values), max(values)
    steps = [m * 10.0**e for e in range(-6, 9) for m in ((1, 2, 5) if high / low > 12 else (1, 1.5, 2, 3, 4, 5, 6, 8))]
    below = max(step for step in steps if step <= low)
    above = min(step for step in steps if step >= high)
    return [step for step in steps if below <= step <= above]


COLOURS = {"tnt_fast": "C2", "timm": "C1", "deit": "C0", "cnn": "C3"}
NAMES = {"tnt_fast": "tnt_fast", "timm": "timm TNT", "deit": "timm DeiT", "cnn": "timm CNN"}


def _style(row: Row) -> dict[str, Any]:
    path = " (reference)" if row["provider"].startswith("reference") else ""
    line = "" if who(row) == "cnn" else "-" if way(row) == "compiled" else "--"  # two CNNs are no family
    return dict(color=COLOURS[who(row)], linestyle=line, marker="o", label=f"{NAMES[who(row)]}{path}, {way(row)}")


def _throughput_rows(device: Device) -> list[Row]:
    return [row for row in plain(device) if row["mode"] == "inference" and row["model"] in TOP1]


def _throughput(figure, device: Device) -> None:
    """Of the dtype and batch with the most models: img/s against published top-1 and against multiply-adds."""
    found = _throughput_rows(device)
    weight = {k: len({row["model"] for row in found if key(row) == k}) for k in map(key, found)}
    _, dtype, batch = best = max(weight, key=lambda k: (weight[k], k[1] == "bf16", k[2]))
    chosen = [row for row in found if key(row) == best]
    left, right = figure.subplots(1, 2, sharey=True)
    for line in dict.fromkeys((who(row), row["provider"]) for row in chosen):
        points = sorted((r for r in chosen if (who(r), r["provider"]) == line), key=lambda r: r["gmacs"])
        for axis, x in ((left, [TOP1[row["model"]] for row in points]), (right, [row["gmacs"] for row in points])):
            axis.plot(x, [row["img_s"] for row in points], **_style(points[0]))
    for row in chosen:
        if way(row) == "eager" and who(row) != "timm":
            offset = dict(xytext=(-6, -10), ha="right") if who(row) == "deit" else dict(xytext=(6, 4))
            name = dict(textcoords="offset points", fontsize=8, **offset)
            left.annotate(TITLES[row["model"]], (TOP1[row["model"]], row["img_s"]), **name)
            right.annotate(TITLES[row["model"]], (row["gmacs"], row["img_s"]), **name)
    left.set(xlabel="published top-1, %", ylabel=f"img/s ({dtype}, batch {batch})", yscale="log")
    left.margins(x=0.12)
    right.set(xlabel="GMACs an image", xscale="log")
    right.margins(x=0.12)
    _plain(left, y=_ladder([row["img_s"] for row in chosen]))
    _plain(right, x=_ladder([row["gmacs"] for row in chosen]))
    right.legend(fontsize=8)


def _steps(device: Device) -> dict[tuple[str, str], list[tuple[str, float]]]:
    """By model and what is counted: (operations fused so far, cost), whole chains of one run, the first one eager."""
    found: dict[tuple[str, str, str], list[tuple[str, float]]] = {}
    for row in rows(device, "models"):
        if is_step(row):
            name = f"ms, {row['dtype']}, batch {row['batch']}"
            found.setdefault((row["model"], name, row["run"]), []).append((row["provider"], row["median"] * 1e3))
    counted = [row for row in rows(device, "flops") if row["model"] in ("tnt_s", "tnt_b")]
    longest = max((row["path"].count("+") for row in counted), default=0)
    last = "+".join(("eager", *OPERATIONS[: longest + 1]))  # "fused": one operation more
    for row in counted:
        path = last if row["path"] == "fused" else row["path"]
        name = "MiB moved an image, float16, counted"
        found.setdefault((row["model"], name, row["run"]), []).append((path, row["bytes"] / 2**20))
    chains = {}
    for (model, name, _), each in found.items():
        each = sorted(each, key=lambda step: step[0].count("+"))
        if len(each) > 1 and [path.count("+") for path, _ in each] == list(range(len(each))):
            chains[model, name] = each
    return chains


def _waterfall(figure, device: Device) -> None:
    found = _steps(device)
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for axis, ((model, what), steps) in zip(axes, found.items(), strict=True):
        costs = [cost for _, cost in steps]
        axis.bar(0, costs[0], color="C1")
        for i in range(1, len(costs)):
            axis.bar(i, costs[i - 1] - costs[i], bottom=costs[i], color="C2")
            change = costs[i] - costs[i - 1]
            text = ("+" if change > 0 else "−") + number(abs(change))
            axis.annotate(text, (i, max(costs[i - 1 : i + 1])), ha="center", va="bottom", fontsize=8)
        axis.bar(len(costs), costs[-1], color="C0")
        for x, cost in ((0, costs[0]), (len(costs), costs[-1])):
            axis.annotate(number(cost), (x, cost), ha="center", va="bottom", fontsize=8)
        names = ["eager", *("+ " + path.split("+")[-1] for path, _ in steps[1:]), "fused"]
        axis.set_xticks(range(len(names)), names, fontsize=7, rotation=30, ha="right", rotation_mode="anchor")
        axis.set(title=TITLES[model], ylabel=what)
        axis.margins(y=0.1)


def _memory_rows(device: Device) -> list[Row]:
    return [row for row in plain(device) if row.get("peak_mib", 0) > 0 and row["model"] in ("tnt_s", "deit_s")]


def _memory(figure, device: Device) -> None:
    """Peak memory over batch, of TNT-S and DeiT-S in the most common dtype."""
    found = _memory_rows(device)
    dtypes = [row["dtype"] for row in found]
    found = [row for row in found if row["dtype"] == max(dict.fromkeys(dtypes), key=dtypes.count)]
    modes = list(dict.fromkeys(row["mode"] for row in found))
    axes = figure.subplots(1, len(modes), squeeze=False)[0]
    for axis, mode in zip(axes, modes, strict=True):
        chosen = [row for row in found if row["mode"] == mode]
        for line in dict.fromkeys((who(row), row["provider"]) for row in chosen):
            points = sorted((r for r in chosen if (who(r), r["provider"]) == line), key=lambda r: r["batch"])
            axis.plot([row["batch"] for row in points], [row["peak_mib"] for row in points], **_style(points[0]))
        axis.set(xscale="log", yscale="log", xlabel="batch", title=f"{mode}, {chosen[0]['dtype']}")
        _plain(axis, x=[row["batch"] for row in chosen], y=_ladder([row["peak_mib"] for row in chosen]))
    axes[0].set_ylabel("peak MiB, size S")
    axes[-1].legend(fontsize=7)


def _scaling(figure, device: Device) -> None:
    fitted = exponents(device)
    sweeps = list(dict.fromkeys(sweep for sweep, _ in fitted))
    axes = figure.subplots(1, len(sweeps), squeeze=False)[0]
    titles = {"batch": "images a batch", "image": "pixels of the image", "pixels": "S, pixels a patch", "depth": "blocks"}
    for axis, sweep in zip(axes, sweeps, strict=True):
        every = [row for row in rows(device, "scaling") if row["sweep"] == sweep]
        for i, provider in enumerate(name for one, name in fitted if one == sweep):
            points = sorted((row for row in every if row["provider"] == provider), key=lambda row: row["size"])
            ms = [1e3 * row["median"] for row in points]
            spread = [[1e3 * abs(row["median"] - row[q]) for row in points] for q in ("q1", "q3")]
            name = f"{provider}: ~ size^{fitted[sweep, provider]}"
            axis.errorbar([row["size"] for row in points], ms, yerr=spread, fmt="o-", capsize=2, color=f"C{i + 2}", label=name)
        axis.set(xscale="log", yscale="log", xlabel=titles[sweep])
        _plain(axis, x=[row["size"] for row in every], y=_ladder([1e3 * row["median"] for row in every]))
        axis.set_xticks([row["size"] for row in every], [row["label"] for row in every], rotation=60 if sweep == "image" else 0)
        axis.tick_params(labelsize=7, which="both")
        axis.legend(fontsize=7)
    row = rows(device, "scaling")[0]
    fixed = {row["batch"] for row in rows(device, "scaling") if row["sweep"] != "batch"}
    elsewhere = f", elsewhere batch {fixed.pop()}" if fixed else ""
    axes[0].set_ylabel(f"ms, {TITLES[row['model']]}, {row['dtype']}{elsewhere}")


def _roofline_rows(device: Device) -> list[Row]:
    return [
        row for row in rows(device, "operations") if row["mode"] == "forward" and row.get("gb_s", 0) > 0 and row["tflop_s"] > 0
    ]


def _roofline(figure, device: Device) -> None:
    axis = figure.subplots()
    found = _roofline_rows(device)
    dtype, batch = found[0]["dtype"], found[0]["batch"]
    roof = device["roofs"][max(row["run"] for row in found)][dtype]
    top, ridge = roof["flop_per_s"] / 1e12, roof["flop_per_s"] / roof["bytes_per_s"]
    intensities = [row["flop_per_byte"] for row in found]
    ends = sorted([min(*intensities, ridge) / 2, ridge, max(*intensities, ridge) * 2])
    axis.plot(ends, [min(top, x * roof["bytes_per_s"] / 1e12) for x in ends], "k-", label="measured copy and product")
    names = dict.fromkeys((row["operation"], row["variant"]) for row in found)
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    markers = dict(zip(dict.fromkeys(row["provider"] for row in found), "o^sDvP", strict=False))
    for row in found:
        style = dict(color=colours[row["operation"], row["variant"]], marker=markers[row["provider"]], linestyle="")
        axis.plot(row["flop_per_byte"], row["tflop_s"], **style)
    for (operation, variant), colour in colours.items():  # for the legend: what a colour says, and what a marker says
        axis.plot([], [], "s", color=colour, label=f"{operation}, TNT-{variant.upper()}")
    for provider, marker in markers.items():
        axis.plot([], [], marker, color="0.4", label=provider)
    axis.set(
        xscale="log", yscale="log", xlabel="FLOP/byte (activations once)", ylabel=f"TFLOP/s, forward, {dtype}, batch {batch}"
    )
    _plain(axis, x=_ladder(ends), y=_ladder([*(row["tflop_s"] for row in found), top]))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", fontsize=7)


DRAW = {"throughput": _throughput, "waterfall": _waterfall, "memory": _memory, "scaling": _scaling, "roofline": _roofline}
FOUND = {
    "throughput": _throughput_rows, "waterfall": _steps, "memory": _memory_rows, "scaling": exponents,
    "roofline": _roofline_rows,
}  # fmt: skip
"""For each picture what tells whether there is anything to draw."""


def draw(devices: dict[str, Device], results: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "tnt_fast", "svg.fonttype": "none"})
    from matplotlib.figure import Figure

    written = []
    for name, device in devices.items():
        target = results / "pictures" / slug(name)
        target.mkdir(parents=True, exist_ok=True)
        for title in pictures_of(device):
            figure = Figure(figsize=(10, 4.4), layout="constrained")
            DRAW[title](figure, device)
            figure.suptitle(f"{PICTURES[title]}\n{label(device)}", fontsize=7)
            for kind in ("svg", "png"):
                written.append(target / f"{title}.{kind}")
                figure.savefig(written[-1], dpi=110, metadata={"Date": None} if kind == "svg" else None)
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: benchmarks/results/*/*.json")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of README.md, summary.json and the pictures")
    options = parser.parse_args(arguments)
    full = options.results / "README.md"
    try:
        devices = read(options.files or sorted(RESULTS.glob("*/*.json")))
        if not devices:
            raise ValueError("no result of pytest benchmarks --benchmark-json among the files")
        write(options.results / "summary.json", (json.dumps(summary(devices), indent=1) + "\n").encode())
        readme = put_into(options.readme.read_text("utf-8"), first_block(devices, options.results))
        every = put_into(full.read_text("utf-8"), full_block(devices))
        performance = options.readme.parent / "docs" / "performance.md"
        budget = stack.times(options.results) if performance.exists() else ""
        page = put_into(performance.read_text("utf-8"), budget) if budget else ""
        drawn = draw(devices, options.results) + stack.draw(options.results)
    except ImportError as error:
        print(f'benchmarks.report: {error}; the pictures need pip install "tnt_fast[bench]"', file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    if page:
        write(performance, page.encode())
    write(full, every.encode())
    write(options.readme, readme.encode())
    print(f"{options.readme}, {full}: tables of {', '.join(devices)}; {len(drawn)} pictures; summary.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
