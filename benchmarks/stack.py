"""A budget, shown: ratios and times in tables; where each millisecond goes, beside what a profile says, as stacked bars."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

# part of a bar: the names of kernels and operations that belong to it; the first that fits
PARTS = {
    "inner": r"^_inner_",
    "LayerNorm kernels of ours": r"^_norm_",
    "pixel_embed": r"^_pixel_embed",
    "attention": r"attention|sdpa|cudnn::fusion",
    "convolution of images": r"convolution|convolve|nchw|nhwc",
    "products": r"nvjet|cublas|mm_?$|matmul$|linear$|_addmm_activation",
    "optimizer": r"adamw|multi_tensor",
    "GPU waits: launches, the host": r"between launches|start of the call|host, beyond",
    "elementwise, sums, LayerNorms of others": r"",
}
COLOURS = ("C2", "C8", "C5", "C3", "C4", "C0", "C6", "0.85", "C1")
MODELS = ("tnt_s", "deit_s", "tnt_b", "deit_b")
TITLES = {"inference": "a forward", "train": "a training step"}
MODES = {
    "inference": "inference",
    "inference_graph": "inference in a CUDA graph",
    "train": "train",
    "train_graph": "train in CUDA graphs",
    "latency_graph": "an image in a CUDA graph",
}
PROFILED = {"tnt_s/inference": "fused-eager", "tnt_s/train": "fused-compiled", "deit_s/train": "timm-compiled"}


def part(name: str) -> str:
    return next(title for title, form in PARTS.items() if re.search(form, name))


def of_rows(rows: list[dict[str, Any]]) -> Counter[str]:
    """Milliseconds of a budget by part; names of Inductor's kernels say all that is in them, and are no library's."""
    found = Counter[str]()
    for row in rows:
        title = list(PARTS)[-1] if row["by"] == "inductor" else part(row["name"])
        found[title] += row["launches"] * row["us"] / 1e3
    return found


def of_profile(text: str, model: str) -> Counter[str]:
    """Milliseconds of a profile (kernels-*.txt) by part: torch.profiler's table, or the largest kernels of the named model."""
    found = Counter[str]()
    if sections := re.split(r"^(\S+/\S+/bf16/256/\S+) GPU ms a call ([\d.]+).*$", text, flags=re.M)[1:]:
        for name, total, lines in zip(*(iter(sections),) * 3, strict=True):
            if name == model:
                for us, kernel in re.findall(r"^ +([\d.]+) us +[\d.]+ x +[\d.]+  (.+)$", lines, flags=re.M):
                    title = list(PARTS)[-1] if kernel.startswith("triton_") else part(kernel)
                    found[title] += float(us) / 1e3
                found["not listed"] = float(total) - sum(found.values())
        return found
    for line in text.splitlines():  # a kernel takes no time of the CPU, and is not what called it
        cells = re.split(r"\s{2,}", line.strip())
        if len(cells) == 11 and cells[1:4] == ["0.00%", "0.000us", "0.00%"]:
            value, unit = re.fullmatch(r"([\d.]+)(us|ms)", cells[6]).groups()
            found[part(cells[0])] += float(value) / (1e3 if unit == "us" else 1)
    return found


def bars(results: Path, mode: str) -> dict[str, Counter[str]]:
    """By label: what the budget says, what a profile says, and what a whole call took, of each model."""
    budget = json.loads((results / "budget.json").read_text("utf-8"))
    summary = json.loads((results / "summary.json").read_text("utf-8"))
    gpu = next((rows for device, rows in summary.items() if budget["about"]["gpu"] in device.lower()), {})
    found: dict[str, Counter[str]] = {}
    for model in MODELS:
        if mode not in budget.get(model, {}):
            continue
        title = model.replace("tnt", "TNT").replace("deit", "DeiT").replace("_", "-").upper().replace("DEIT", "DeiT")
        found[f"{title}\nbudget"] = of_rows(budget[model][mode]["rows"])
        file = results / "2026-11-26-0640" / f"kernels-{mode}.txt"
        if (provider := PROFILED.get(f"{model}/{mode}")) and file.exists():
            found[f"{title}\nprofile"] = of_profile(file.read_text("utf-8"), f"{model}/{mode}/bf16/256/{provider}")
        if (row := gpu.get(f"{model}/{mode}/bf16/256")) and row["provider"].endswith("compiled"):  # as the budget is
            found[f"{title}\nmeasured"] = Counter({"a whole call": row["ms"]})
    return found


def _table(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:]))


def _read(results: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]] | None:
    """The budget, the summary's rows of its GPU, the checks of the simulation; None without a budget."""
    if not (results / "budget.json").exists():
        return None
    budget, summary, checks = (
        json.loads((results / f"{n}.json").read_text("utf-8")) for n in ("budget", "summary", "simulation")
    )
    gpu = next((rows for device, rows in summary.items() if budget["about"]["gpu"] in device.lower()), {})
    return budget, gpu, checks["rows"]


def commit(results: Path) -> str | None:
    """Of the budget, where there is one."""
    found = _read(results)
    return found[0]["about"]["commit"] if found else None


def _named(model: str, mode: str) -> str:
    size = model.rpartition("_")[2].capitalize()
    kind = "DeiT" if model.startswith("deit") else "timm's TNT" if model.startswith("timm") else "TNT"
    return f"{kind}-{size}, {MODES[mode]}"


def errors(results: Path) -> str:
    """How wrong simulated times are, of others' code and of ours, and the budget of whole DeiTs."""
    budget, gpu, checks = _read(results)
    of = {kind: [row["error_percent"] for row in checks if row["kind"] == kind] for kind in ("published", "measured")}
    whole = [
        100 * (one["ms"] / row["ms"] - 1)
        for model, modes in budget.items()
        for mode, one in modes.items()
        if model.startswith("deit")
        and (row := gpu.get(f"{model}/{mode}/bf16/{one.get('batch')}"))
        and row["provider"] == "timm-compiled"
    ]
    text = f"published times of kernels within {max(map(abs, of['published'])):.0f}%, measured ones {min(of['measured']):+.0f} "
    text += f"to {max(of['measured']):+.0f}%"
    return text + (f", whole DeiTs within {max(map(abs, whole)):.0f}%" if whole else "")


def ratios(results: Path) -> str:
    """img/s of TNT over those of a compiled DeiT, by the budget; "" without one."""
    if (found := _read(results)) is None:
        return ""
    budget, *_ = found
    lines = [["img/s over compiled DeiT's"], [f"simulated, commit {budget['about']['commit']}"]]
    every = ("inference", "inference_graph", "train", "train_graph")
    for model, modes in (("tnt_s", every), ("tnt_b", every[:1])):
        for mode in modes:
            lines[0].append(
                _named(model, mode)
                .replace("TNT-", "")
                .replace(" in a CUDA graph", ", graph")
                .replace(" in CUDA graphs", ", graphs")
            )
            lines[1].append(f"{budget[model][mode]['vs_deit_compiled']:.2f}")
    return f"{_table(lines)}\n\n[How](docs/performance.md), and errors: {errors(results)}."


def times(results: Path) -> str:
    """For docs/performance.md: every model and mode of the budget, a line each; then all rows of a forward of TNT-S."""
    if (found := _read(results)) is None:
        return ""
    budget, gpu, _ = found
    lines = [[
        f"{budget['about']['gpu']}, commit {budget['about']['commit']}", "ms (low to high)", "on the GPU alone",
        "img/s over compiled DeiT's", "on the GPU alone", "measured before", "launches a block", "MB kept of an image",
    ]]  # fmt: skip
    for model, modes in budget.items():
        for mode, one in modes.items() if model != "about" else ():
            peer = budget.get(f"deit_{model.rpartition('_')[2]}", {}).get(mode, one)
            row = gpu.get(f"{model}/{mode}/bf16/{one['batch']}", {})
            ours = not model.startswith("deit")
            lines.append([
                _named(model, mode), f"{one['ms']:#.3g} ({one['low']:#.3g} to {one['high']:#.3g})", f"{one['gpu_ms']:#.3g}",
                f"{one['vs_deit_compiled']:.2f}" if ours else "", f"{peer['gpu_ms'] / one['gpu_ms']:.2f}" if ours else "",
                f"{row['vs_deit_compiled']:.2f}" if "vs_deit_compiled" in row else "", f"{one['launches_per_block']:g}",
                f"{one['saved_mb_per_image']:.1f}" if "saved_mb_per_image" in one else "",
            ])  # fmt: skip
    forward = budget["tnt_s"]["inference"]
    rows = [["a forward of TNT-S", "within", "launches", "µs of one", "known how", "ms"]]
    for row in forward["rows"]:
        ms = f"{row['launches'] * row['us'] / 1e3:.3f}"
        rows.append([f"`{row['name']}`", row["inside"], str(row["launches"]), f"{row['us']:.2f}", row["kind"], ms])
    rows.append(["sum", "", "", "", "", f"{forward['ms']:.3f}"])
    return f"{_table(lines)}\n\nHow wrong: {errors(results)}.\n\n{_table(rows)}"


def draw(results: Path) -> list[Path]:
    """Pictures of ``budget.json``, beside the others; none without that file."""
    if not (results / "budget.json").exists():
        return []
    from matplotlib.figure import Figure

    about = json.loads((results / "budget.json").read_text("utf-8"))["about"]
    colours = dict(zip(PARTS, COLOURS, strict=True)) | {"not listed": "0.7", "a whole call": "1.0"}
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axis, (mode, title) in zip(figure.subplots(1, len(TITLES)), TITLES.items(), strict=True):
        found = bars(results, mode)
        bottom = [0.0] * len(found)
        for name, colour in colours.items():
            heights = [one[name] for one in found.values()]
            if any(heights):
                axis.bar(range(len(found)), heights, bottom=bottom, color=colour, edgecolor="0.3", linewidth=0.5, label=name)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        for x, ms in enumerate(bottom):
            axis.annotate(f"{ms:.1f}", (x, ms), ha="center", va="bottom", fontsize=7)
        axis.set_xticks(range(len(found)), list(found), fontsize=7)
        axis.margins(y=0.08)
        axis.set(ylabel=f"ms, {title} of {about['batch']} images")
    handles = {label: one for axis in figure.axes for one, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=7)
    figure.suptitle(
        f"budget: {about['gpu']}, commit {about['commit']}; profile and measured: an H200, earlier commits", fontsize=8
    )
    target = results / "pictures"
    target.mkdir(exist_ok=True)
    written = []
    for kind in ("svg", "png"):
        written.append(target / f"budget.{kind}")
        figure.savefig(written[-1], dpi=110, metadata={"Date": None} if kind == "svg" else None)
    return written
