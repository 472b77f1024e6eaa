"""The time of whole models, composed without a GPU from what they launch; measured times replace rows where there are any.

    python -m benchmarks.budget [--gpu h200] [--batch 256] [--only tnt_s/inference] [--measured FILE ...] [--json FILE]
    python -m benchmarks.budget --compare OLD NEW

TNT (ours), timm's TNT and timm's DeiT, by the same rules: what is launched comes from the graphs themselves (graphs.py),
compiled by Inductor, bf16, training under autocast with the loss and AdamW; "latency_graph" is one image in a CUDA graph,
"inference_graph" and "train_graph" are what torch.compile's mode reduce-overhead replays: what the GPU takes, and a copy of the
images. Every row says how often it is launched, the microseconds of one, and how they are known:

- simulated: our kernels' machine code on one multiprocessor (simulate.py), with the band of its checks;
- looked up: library products, attention and what Inductor writes, by operations and bytes, at rates that were measured on one
  H200 (``SOURCES``);
- measured: of a GPU's result file, of this very kernel or shape;
- assumed: with the reason; on other GPUs than the H200 and H100 the rates of libraries are, scaled by the data sheets' peaks.

The milliseconds of a model are the sum of launches × us of its rows. The band adds up all lows and all highs, as if every
row erred to the same side. What is planned and simulated is kept in .cache/ by a digest of the code.
"""

import argparse
import ast
import hashlib
import inspect
import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from benchmarks import machine_code, measure, simulate
from benchmarks.dynamic_cost import aligned
from benchmarks.graphs import IMAGE, MODELS, Call, launches_per_block, planned, saved_mb_per_image
from benchmarks.launched import Launched, Recorder
from benchmarks.static_cost import TARGETS, compile_launch, digest, occupancy, read_nvidia, write_json
from benchmarks.test_models import DEITS, TNTS

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "budget"
MODES = ("inference", "inference_graph", "train", "train_graph", "latency_graph")
REPLAYED = {"inference_graph": "inference", "train_graph": "train"}
Row = dict[str, Any]


# ---- rates ----

# TFLOP/s of half-precision products without sparsity, float32 sums: data sheets
PEAKS = {"h200": 989, "h100": 989, "a100": 312, "rtx4090": 165, "rtx5090": 209}
MEASURED_ON = ("h200", "h100")  # the same processors; what memory bounds goes by each one's own bandwidth

RESULTS = "results/2026-11-26-"
SOURCES = {
    "product": f"{RESULTS}0600 library rows, {RESULTS}0640 profiles: 5.2 us, and TFLOP/s by the length of the sums",
    "attention": f"{RESULTS}0600 library/attention forward cudnn; backward: the three kernels of cuDNN in {RESULTS}0640",
    "memory": f"{RESULTS}0640 kernels-train.txt: the part of the copy rate that kernels of such a name reach",
    "convolution": f"{RESULTS}0640 kernels-train.txt (of DeiT's patches), {RESULTS}0725 operations/pixel_embed (TNT's pixels)",
    "small": f"{RESULTS}0640 profiles, and DeiT-S in a graph at batch 1 ({RESULTS}0725: 0.48 ms): what a small kernel takes",
    "optimizer": f"{RESULTS}0640 kernels-train.txt: AdamW's kernels",
    "host": f"{RESULTS}1900 kernels.txt, graphs.txt: compiled TNT-S, DeiT-S; between operations as {RESULTS}cpu/host-step.txt",
    "start": f"DeiT-S compiled takes 9.40 ms as a call ({RESULTS}0725), 9.03 in a graph ({RESULTS}0640)",
    "gap": "between two kernels that are queued; an estimate, never measured alone",
    "peak": "the part of its peak that an H200 reaches",
}
START, START_SMALL = 5.2, 2.8  # us of a product beside its operations; of one that leaves multiprocessors idle
RATES = {
    "": {384: 640, 640: 700, 1536: 680, 2560: 758, 50000: 790},
    "gelu": {384: 462, 640: 608},
}  # TFLOP/s by length of the sums
ATTENTION = {"forward": 170, "backward": 126}  # TFLOP/s of 4·B·H·T²·D operations, and of 10·B·H·T²·D
SHORTEST = {"product": 3.8, "attention": 5.5, "sum": 9.1, "memory": 2.4}  # us
REACHED = {"gelu": 0.68, "sum": 0.57, "norm": 0.85, "softmax": 0.85, "adamw": 0.415, "": 1.0}  # of the copy rate
CONVOLUTION = {"patches": 17.8, "pixels": 2.0, "backward": 35}  # TFLOP/s
GAP, CALL = (0.6, 1.0, 1.5), 370.0  # us: low, nominal, high; of a call's start
BANDS = {"product": 0.1, "attention": 0.1, "memory": 0.2, "convolution": 0.3, "small": 0.3, "optimizer": 0.2}
# us of the host: of an operation of ours as counted with stand-ins for the kernels, times what an H200's host took longer, so
# much that the compiled calls come out that were measured there: a forward of TNT-S 10.5 ms, of its step the rest of 56.6 ms
# (50.8 and 62.4); of any other launch of compiled code what DeiT-S's 601 took, 17.0 ms
COUNTED = {
    4.7: {"pixel_embed": 20, "inner": 18, "fold": 40, "outer": 160, "outer_recorded": 188, "block": 134, "block_recorded": 169},
    6.4: {
        "pixel_embed_backward": 35,
        "inner_backward": 55,
        "fold_backward": 110,
        "outer_backward": 412,
        "block_backward": 444,
    },
}
HOST = {name: times * us for times, counted in COUNTED.items() for name, us in counted.items()} | dict(inductor=28, pytorch=28)


class Cost(NamedTuple):
    kind: str
    source: str
    us: float
    low: float
    high: float


def product(call: Call) -> tuple[int, int, int, int, str] | None:
    """(products, M, N, K, what follows) of a call that is one."""
    shapes = call.shapes
    if call.name == "linear":
        *rows, K = shapes[0]
        return 1, math.prod(rows), shapes[1][0], K, ""
    if call.name in ("mm", "matmul", "addmm", "addmm_", "_addmm_activation") and len(shapes[-1]) == 2:
        (M, K), (_, N) = shapes[-2:]
        after = "gelu" if call.name == "_addmm_activation" else "add" if len(shapes) == 3 and len(shapes[0]) == 2 else ""
        return 1, M, N, K, after
    if call.name in ("bmm", "baddbmm"):
        (B, M, K), (_, _, N) = shapes[-2:]
        return B, M, N, K, ""
    return None


def attention(call: Call) -> tuple[str, int, int, int, int] | None:
    """(way, images, heads, tokens, channels a head) of a call that is one."""
    if not re.fullmatch(r"_scaled_dot_product_(cudnn|flash)_attention(_backward)?", call.name):
        return None
    way = "backward" if call.name.endswith("backward") else "forward"
    return way, *call.shapes[-1 if way == "forward" else 0]


def looked_up(call: Call, gpu: simulate.Gpu) -> Cost:
    """Of what libraries and Inductor launch."""
    scale, known = PEAKS[gpu.name] / PEAKS["h200"], gpu.name in MEASURED_ON

    def cost(rule: str, us: float, shortest: float, flop: bool = True) -> Cost:
        rule = rule if us > shortest else "small"
        us, band = max(us, shortest), BANDS[rule]
        if known or not flop:
            return Cost("looked up", SOURCES[rule], us, us * (1 - band), us * (1 + band))
        return Cost("assumed", f"{SOURCES['peak']}; {SOURCES[rule]}", us, us * (1 - 2 * band), us * (1 + 2 * band))

    moved = call.bytes / gpu.dram / 1e3
    library = call.by == "pytorch"
    if library and (found := product(call)):
        count, M, N, K, after = found
        table = RATES["gelu" if after == "gelu" else ""]
        rate = table[max((length for length in table if length <= K), default=min(table))] * min(1.0, K / min(table)) * scale
        tiles = count * math.ceil(M / 128) * math.ceil(N / 128) * math.ceil(K / 512)  # long sums are split
        busy = min(1.0, tiles / gpu.multiprocessors)
        start = START if busy == 1 else START_SMALL
        return cost("product", start + max(2 * count * M * N * K / (rate * busy) / 1e6, moved), SHORTEST["product"])
    if library and (found := attention(call)):
        way, B, H, T, D = found
        work = (4 if way == "forward" else 10) * B * H * T * T * D
        return cost("attention", work / ATTENTION[way] / scale / 1e6, SHORTEST["attention"])
    if library and call.name in ("convolution", "convolution_backward"):
        backward = call.name.endswith("backward")
        N, *window = call.shapes[2 if backward else 1]
        out = call.shapes[0] if backward else call.made
        kind = "backward" if backward else "patches" if math.prod(window) > 256 else "pixels"
        work = 2 * math.prod(out) * math.prod(window)
        return cost("convolution", START + max(work / CONVOLUTION[kind] / scale / 1e6, moved), SHORTEST["product"])
    what = next(name for name in REACHED if name in call.name)
    rule, shortest = "optimizer" if what == "adamw" else "memory", SHORTEST["sum" if call.name == "sum" else "memory"]
    return cost(rule, moved / REACHED[what], shortest, flop=False)


# ---- our kernels ----


def _digest(*about: Any) -> str:
    return hashlib.sha256(repr(about).encode()).hexdigest()


def _sources(*names: str) -> str:
    return _digest([(ROOT / name).read_bytes() for name in names])


@lru_cache(None)
def _readers() -> str:
    """Of what tells a time from machine code."""
    parts = [inspect.getsource(each) for each in (occupancy, compile_launch, read_nvidia)]
    return _digest(digest(simulate, machine_code), parts, TARGETS)


def _kept(name: str, key: str, make: Callable[[], Any]) -> Any:
    """What is in the cache of that name and key, or is made now."""
    file = CACHE / f"{name}-{key}.json"
    if not file.exists():
        found = make()
        CACHE.mkdir(parents=True, exist_ok=True)
        write_json(file, found)
    return json.loads(file.read_text("utf-8"))


def _turns(found: Launched, patches: int) -> tuple[int, int]:
    """Turns of the main loop: in all programs together, or 0 and those of each."""
    names, Z = found.kernel.arg_names, next(iter(found.constants.values()))
    if "n_rows" in names and hasattr(Z, "BLOCK"):
        return math.ceil(found.arguments[names.index("n_rows")] / Z.BLOCK) * getattr(Z, "GROUPS", 1), 0
    return (0, found.spec.turns) if found.spec.turns > 1 else (math.ceil(patches / found.spec.patches), 0)


def simulated(found: Launched, gpu: simulate.Gpu, patches: int) -> Cost:
    """Of a launch of ours; ``patches``: of all images.

    Raises:
        ValueError: an instruction that simulate.py does not know.
    """
    target = TARGETS[gpu.target]
    tiles, loops = _turns(found, patches)

    def make() -> dict[str, Any]:
        if not hasattr(found.kernel, "cache_key"):
            raise ValueError("a kernel made for Triton's interpreter is not compiled: unset TRITON_INTERPRET")
        compiled = compile_launch(found, target)
        about = read_nvidia(compiled, target.arch)
        code = machine_code.parts(machine_code.decode(machine_code.disassembly(compiled.asm["cubin"])), loops=found.spec.loops)
        warps = found.options["num_warps"]
        resident, _ = occupancy(gpu.target, warps, about["registers"], compiled.metadata.shared)
        time = simulate.simulate(
            code,
            gpu,
            warps=warps,
            resident=resident,
            grid=found.grid,
            bytes=found.bytes,
            tiles=tiles,
            loops=loops,
            l1=found.spec.l1,
        )
        return time._asdict()

    def written(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return str(x.dtype)
        return tuple(map(written, x)) if isinstance(x, tuple) else x

    key = _digest(
        _readers(), triton.__version__, gpu, getattr(found.kernel, "cache_key", ""), found.grid, found.bytes,
        written(found.arguments), found.constants, found.options, tiles, loops,
    )  # fmt: skip
    try:
        time = _kept("kernel", key, make)
    except ValueError as error:
        raise ValueError(f"{found.kernel.__name__}: {error}") from error
    source = f"benchmarks/simulate.py; {time['binds']} binds"
    return Cost("simulated", source, time["us"], time["low"], time["high"])


# ---- the budget ----


def plan(name: str, mode: str, batch: int, gpu: simulate.Gpu) -> dict[str, Any]:
    """What a model launches, "calls" how often each and what was simulated of it, and what is counted; kept."""
    files, sizes = ["benchmarks/graphs.py"], (TNTS | DEITS)[MODELS[name][1]]
    if MODELS[name][0] == "ours":
        files += [f"tnt_fast/{name}.py" for name in ("reference", "attention", "dispatch", "tnt")]
        files += [f"kernels/{path.name}" for path in sorted((ROOT / "kernels").glob("*.py"))]
    versions = [version(package) for package in ("torch", "triton", "timm")]

    def make() -> dict[str, Any]:
        calls, operations = planned(name, mode, batch, gpu)
        patches = batch * (IMAGE // 16) ** 2
        times = [simulated(call.launched, gpu, patches) if call.launched else None for call in calls]
        listed = [[*_fields(call), count, time] for (call, count), time in zip(calls.items(), times, strict=True)]
        block = launches_per_block(name, mode, batch, gpu, sum(calls.values()))
        found = {"calls": listed, "operations": operations, "launches_per_block": block}
        return found | ({"saved_mb_per_image": saved_mb_per_image(name, gpu)} if mode == "train" else {})

    return _kept(
        "plan",
        _digest(name, mode, batch, gpu, versions, sizes, _sources(*files), inspect.getsource(Recorder), _readers()),
        make,
    )


def _fields(call: Call) -> list[Any]:
    return [call.name, call.inside, call.by, call.shapes, call.dtype, call.bytes, call.made]


def costed(calls: list[list[Any]], gpu: simulate.Gpu) -> list[Row]:
    """A row for what is launched alike."""
    rows = []
    for name, inside, by, shapes, dtype, moved, made, count, time in calls:
        call = Call(name, inside, by, tuple(map(tuple, shapes)), dtype, moved, tuple(made))
        found = looked_up(call, gpu) if time is None else Cost(*time)
        rows.append({
            "name": name, "inside": inside, "by": by, "shapes": shapes[:4], "made": made, "dtype": dtype,
            "mb": round(moved / 1e6, 2), "launches": count, "kind": found.kind, "us": round(found.us, 2),
            "low": round(found.low, 2), "high": round(found.high, 2), "source": found.source,
        })  # fmt: skip
    return rows


def _own(name: str, kind: str, source: str, us: tuple[float, float, float], launches: int = 1) -> Row:
    low, nominal, high = (round(x, 2) for x in us)
    cost = {"kind": kind, "us": nominal, "low": low, "high": high, "source": source}
    return {"name": name, "inside": "", "by": "gpu", "launches": launches, **cost}


def summed(rows: list[Row], batch: int) -> dict[str, Any]:
    """The sum of the rows."""
    ms, low, high = (sum(row["launches"] * row[what] for row in rows) / 1e3 for what in ("us", "low", "high"))
    return {"ms": round(ms, 3), "low": round(low, 3), "high": round(high, 3), "img_per_s": round(batch / ms * 1e3, 1)}


def host_us(rows: list[Row], operations: dict[str, int]) -> float:
    """Of the host in a call: our operations, and what Inductor's code launches one by one."""
    outside = sum(row["launches"] * HOST[row["by"]] for row in rows if not row["inside"])
    return outside + sum(count * HOST[name] for name, count in operations.items())


def composed(name: str, mode: str, batch: int, gpu: simulate.Gpu, results: "Iterable[Measured]" = ()) -> dict[str, Any]:
    """The budget of a model in a mode, by rows; of several results that have a row the last one counts.

    Raises:
        ValueError: what has no time.
    """
    batch = 1 if mode == "latency_graph" else batch
    found = plan(name, REPLAYED.get(mode, mode), batch, gpu)
    rows = costed(found["calls"], gpu)
    launches = sum(row["launches"] for row in rows)
    for each in results:
        rows = [each.instead(row, batch) for row in rows]
    host = host_us(rows, found["operations"])
    rows.append(_own("between launches", "assumed", SOURCES["gap"], GAP, launches))
    if mode in REPLAYED:
        us = 2 * (4 if mode == "train_graph" else 2) * batch * 3 * IMAGE**2 / gpu.dram / 1e3  # read and written
        rows.append(_own("images copied into the graph", "looked up", SOURCES["memory"], (us, us, us)))
    if not mode.endswith("_graph"):
        rows.append(_own("start of the call", "assumed", SOURCES["start"], (0.7 * CALL, CALL, 1.3 * CALL)))
        gpu_us = sum(row["launches"] * row["us"] for row in rows)
        late = max(0.0, host - gpu_us)
        rows.append(_own("host, beyond the GPU", "assumed", SOURCES["host"], (0.0, late, 1.5 * late)))
    rows.sort(key=lambda row: -row["launches"] * row["us"])
    rest = {what: found[what] for what in ("launches_per_block", "saved_mb_per_image") if what in found}
    alone = summed([row for row in rows if not row["name"].startswith("host")], batch)["ms"]
    return summed(rows, batch) | {"gpu_ms": alone, "batch": batch, "launches": launches, **rest, "rows": rows}


# ---- measured ----


class Measured:
    """Times of a GPU's result file (``--benchmark-json``), for rows of this very kernel or shape.

    Raises:
        ValueError: it is no such file, of another GPU, or of a commit that is not known here.
    """

    def __init__(self, path: Path, gpu: simulate.Gpu):
        self.path, self.refused = path, dict[str, str]()
        try:
            found = json.loads(path.read_text("utf-8"))
            machine, benchmarks = found["machine_info"], found["benchmarks"]
            rows = [row["extra_info"] | {"us": 1e6 * row["stats"]["median"]} for row in benchmarks]
            device, self.commit, versions = machine["device"], machine["commit"], machine["versions"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path} is no result of pytest benchmarks --benchmark-json ({error!r})") from error
        if gpu.name.upper() not in device.upper().replace(" ", ""):
            raise ValueError(f"{path} was measured on {device}, the budget is of {gpu.name}: no row is taken")
        if versions["torch"] != version("torch").split("+")[0]:
            raise ValueError(f"{path} has torch {versions['torch']}, here is {version('torch')}: no row is taken")
        self.sources = sources_at(self.commit, path)
        self.rows = {row["id"]: row for row in rows if "id" in row and "us" in row}

    def instead(self, row: Row, batch: int) -> Row:
        """A budget's row with the measured time, where there is one; ``was``: what it said, and by how much it was off."""
        id = self._id(row, batch)
        if id not in self.rows:
            return row
        if row["by"] == "ours" and row["name"] in changed(self.sources):
            self.refused[id] = f"{row['name']} has changed since {self.commit}"
            return row
        us = round(self.rows[id]["us"], 2)
        said = row.get("was", row)  # another file may have had it, too
        was = {"kind": said["kind"], "us": said["us"], "error_percent": round(100 * (said["us"] / us - 1), 1)}
        source = f"{self.path.parent.name}/{self.path.name}, {id}"
        return row | {"kind": "measured", "us": us, "low": us, "high": us, "source": source, "was": was}

    def _id(self, row: Row, batch: int) -> str | None:
        """The id of the measured row of the same kernel or shape."""
        if row["by"] not in ("ours", "pytorch"):
            return None
        call = Call(
            row["name"], row["inside"], row["by"], tuple(map(tuple, row["shapes"])), row["dtype"], 0, tuple(row["made"])
        )
        if row["by"] == "ours":
            size = {24: "s", 40: "b", 12: "ti"}.get(call.shapes[0][-1])
            alone = {"_pixel_embed_fwd_kernel": "pixel_embed", "_inner_fwd_kernel": "inner"}
            found = alone.get(row["name"]) if row["inside"] in alone.values() else None
            return f"{found}/{size}/forward/bf16/{batch}/fused" if found else None
        if (found := product(call)) and found[0] == 1:
            for id, about in self.rows.items():
                asked = tuple(about.get(what) for what in ("m", "n", "k", "after"))
                way = {"": "linear", "gelu": "addmm", "add": "addmm_"}[found[4]]
                if asked == found[1:] and about.get("provider") == way and about["dtype"] == "bf16":
                    return id
        if (found := attention(call)) and found[0] == "forward":
            size = {6: "s", 10: "b"}.get(found[2]) if (found[1], found[3], found[4]) == (batch, 197, 64) else None
            return f"library/attention/{size}/forward/bf16/{batch}/{'cudnn' if 'cudnn' in row['name'] else 'flash'}"
        return None

    def whole(self, name: str, mode: str, batch: int) -> float | None:
        """The measured ms of a whole model; of ours only where no kernel has changed since."""
        whose, which, _ = MODELS[name]
        path, way = "fused" if whose == "ours" else "timm", "graphed" if mode in REPLAYED else "compiled"
        id = f"{which}/{REPLAYED.get(mode, mode)}/bf16/{batch}/{path}-{way}"
        if id not in self.rows:
            return None
        if whose == "ours" and (since := changed(self.sources)):
            self.refused[id] = f"{', '.join(sorted(since))} have changed since {self.commit}"
            return None
        return self.rows[id]["us"] / 1e3


def sources_at(commit: str | None, path: Path) -> dict[str, str]:
    """The kernels' files at a commit.

    Raises:
        ValueError: git does not know it, or it was not committed.
    """

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    if not commit or not re.fullmatch("[0-9a-f]{7,40}", commit):
        raise ValueError(f"{path} is of commit {commit!r}, whose kernels are in no commit: no row is taken")
    try:
        names = [name for name in git("ls-tree", "--name-only", commit, "kernels/").split() if name.endswith(".py")]
        return {name: git("show", f"{commit}:{name}") for name in names}
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"{path} is of commit {commit}, which git does not know here: no row is taken") from error


def functions(sources: dict[str, str]) -> dict[str, str]:
    """Of each kernel in these files a digest: of its code, of all that it names, and of its launch table; no comments."""
    code: dict[str, ast.AST] = {}
    tables: dict[str, list[ast.AST]] = {}
    for text in sources.values():
        body = ast.parse(text).body
        defined = {node.name: node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for node in defined.values():
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        code |= defined
        constants = [node for node in body if isinstance(node, (ast.Assign, ast.AnnAssign))]
        tables |= {name: constants for name in defined if name.endswith("_kernel")}

    def entry(node: Any, kernel: str) -> str:
        """A constant; of a table by kernels this one's entry."""
        if isinstance(node.value, ast.Dict) and kernel in (keys := [getattr(key, "value", None) for key in node.value.keys]):
            return ast.dump(node.value.values[keys.index(kernel)])
        return ast.dump(node)

    def reached(name: str, seen: set[str]) -> set[str]:
        if name not in seen and name in code:
            seen.add(name)
            for node in ast.walk(code[name]):
                if isinstance(node, (ast.Name, ast.Attribute)):
                    reached(node.id if isinstance(node, ast.Name) else node.attr, seen)
        return seen

    return {
        name: _digest(
            [ast.dump(code[each]) for each in sorted(reached(name, set()))], [entry(node, name) for node in constants]
        )
        for name, constants in tables.items()
    }


@lru_cache(None)
def _functions_now() -> dict[str, str]:
    return functions({path.name: path.read_text("utf-8") for path in (ROOT / "kernels").glob("*.py")})


def changed(sources: dict[str, str]) -> set[str]:
    """The kernels whose code was another one in these files, or was not there."""
    before = functions(sources)
    return {name for name, digest in _functions_now().items() if before.get(name) != digest}


# ---- all of it ----


def budget(
    gpu: simulate.Gpu, batch: int, only: Iterable[str] = (), files: Iterable[Path] = (), say: Callable[[str], None] = print
) -> dict[str, Any]:
    """By model and mode, with "about"; ``only``: of these alone, "tnt_s" or "tnt_s/train", and what they are held against.

    Raises:
        ValueError: a name, a file or a kernel that has no time.
    """
    pairs = [f"{name}/{mode}" for name in MODELS for mode in MODES]
    for asked in only:
        if asked not in pairs and asked not in MODELS:
            raise ValueError(
                f"unknown model {asked!r}: accepted are {', '.join(MODELS)}, each alone or with /{', /'.join(MODES)}"
            )
    chosen = [pair for pair in pairs if not only or pair in only or pair.split("/")[0] in only]
    peers = {f"{MODELS[name][2]}/{mode}" for name, mode in (pair.split("/") for pair in chosen)}
    chosen = [pair for pair in pairs if pair in chosen or pair in peers]
    results = [Measured(path, gpu) for path in files]
    found: dict[str, Any] = {}
    for pair in chosen:
        name, mode = pair.split("/")
        found.setdefault(name, {})[mode] = composed(name, mode, batch, gpu, results)
        say(pair)
    for name, modes in found.items():
        for mode, one in modes.items():
            peer = found.get(MODELS[name][2], {}).get(mode)
            if peer:
                one["vs_deit_compiled"] = round(peer["ms"] / one["ms"], 3)
            whole = [ms for each in results if (ms := each.whole(name, mode, one["batch"])) is not None]
            if whole:
                one["measured_ms"], one["error_percent"] = round(whole[-1], 3), round(100 * (one["ms"] / whole[-1] - 1), 1)
    about = {
        "gpu": gpu.name, "batch": batch, "commit": measure._commit(), "dtype": "bf16",
        "versions": {package: version(package) for package in ("torch", "triton", "timm")},
        "measured": [f"{each.path.parent.name}/{each.path.name}, commit {each.commit}" for each in results],
        "refused": {id: why for each in results for id, why in each.refused.items()},
        "not_modelled": simulate.NOT_MODELLED,
    }  # fmt: skip
    return {"about": about} | found


def _lines(found: dict[str, Any]) -> str:
    kinds = ["simulated", "looked up", "measured", "assumed"]
    head = ["model", "mode", "ms", "low", "high", "img/s", "vs DeiT", "launches", "a block", "MB saved"]
    head += [*kinds, "whole, measured", "error"]
    lines = [head]
    for name, modes in found.items():
        for mode, one in modes.items() if name != "about" else ():
            parts = Counter[str]()
            for row in one["rows"]:
                parts[row["kind"]] += row["launches"] * row["us"] / 1e3 / one["ms"]
            cells = [name, mode, f"{one['ms']:.2f}", f"{one['low']:.2f}", f"{one['high']:.2f}", f"{one['img_per_s']:,.0f}"]
            cells += [str(one.get("vs_deit_compiled", "")), str(one["launches"]), f"{one['launches_per_block']:g}"]
            cells += [str(one.get("saved_mb_per_image", "")), *(f"{parts[kind]:.0%}" for kind in kinds)]
            error = f"{one['error_percent']:+.0f}%" if "error_percent" in one else ""
            lines.append([*cells, str(one.get("measured_ms", "")), error])
    return aligned(lines, 2)


def replaced(found: dict[str, Any]) -> str:
    """How wrong each row had been that a measured time took the place of."""
    seen = {}
    for name, modes in found.items():
        for one in modes.values() if name != "about" else ():
            for row in one["rows"]:
                if "was" in row:
                    was = row["was"]
                    seen[row["source"]] = [row["source"], row["name"], f"{row['us']:.1f}", f"{was['us']:.1f}", was["kind"],
                                           f"{was['error_percent']:+.1f}%"]  # fmt: skip
    refused = [f"not taken: {id}: {why}" for id, why in found["about"]["refused"].items()]
    table = [aligned([["measured row", "launch", "us", "budget's", "was", "error"], *seen.values()], 2)] if seen else []
    return "\n".join(table + refused)


def comparison(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What changed from one budget to another: of each model, and of its rows the largest."""
    a, b = old["about"], new["about"]
    lines = [f"{a['gpu']}, batch {a['batch']}, commit {a['commit']} -> {b['gpu']}, batch {b['batch']}, commit {b['commit']}"]
    for name, mode in dict.fromkeys((n, m) for each in (old, new) for n in each if n != "about" for m in each[n]):
        before, after = (each.get(name, {}).get(mode) for each in (old, new))
        if before is None or after is None:
            lines.append(f"{name}/{mode}: {'new' if before is None else 'gone'}")
            continue
        change = after["ms"] - before["ms"]
        lines.append(f"{name}/{mode}: {before['ms']:.3f} -> {after['ms']:.3f} ms ({100 * change / before['ms']:+.1f}%)")
        sums: list[Counter[str]] = []
        for one in (before, after):
            sums.append(Counter())
            for row in one["rows"]:
                sums[-1][f"{row['inside'] or row['by']}: {row['name']}"] += row["launches"] * row["us"] / 1e3
        changes = {row: sums[1][row] - sums[0][row] for row in sums[0] | sums[1]}
        largest = sorted(changes, key=lambda row: -abs(changes[row]))[:8]
        lines += [f"  {changes[row]:+8.3f} ms  {row}" for row in largest if abs(changes[row]) >= 0.001]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.budget", description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", default="h200", help=f"of {', '.join(simulate.GPUS)} (default h200)")
    parser.add_argument("--batch", type=int, default=256, help="images (default 256); a latency graph takes one")
    parser.add_argument("--only", action="append", default=[], metavar="MODEL[/MODE]", help="and its DeiT; repeatable")
    parser.add_argument(
        "--measured", action="append", default=[], type=Path, metavar="FILE", help="benchmarks.json of that GPU"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the budget")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="only say what changed between two")
    options = parser.parse_args(arguments)
    try:
        if options.compare:
            try:
                print(comparison(*(json.loads(path.read_text("utf-8")) for path in options.compare)))
            except (OSError, LookupError, TypeError, ValueError) as error:
                raise ValueError(f"--compare {' '.join(map(str, options.compare))}: not two budgets ({error!r})") from error
            return 0
        if options.batch < 1:
            raise ValueError(f"batch is {options.batch}; at least 1 is needed")
        if options.json and not options.json.absolute().parent.is_dir():
            raise ValueError(f"--json {options.json}: the folder {options.json.parent} does not exist; make it first")
        gpu = simulate.gpu(options.gpu)
        say = partial(print, file=sys.stderr, flush=True)
        found = budget(gpu, options.batch, options.only, options.measured, say)
    except ValueError as error:
        parser.error(str(error))
    print(_lines(found))
    print(f"\n{gpu.name}, batch {options.batch}, commit {found['about']['commit']}; not modelled: {simulate.NOT_MODELLED}.")
    if text := replaced(found):
        print(text)
    if options.json:
        write_json(options.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
