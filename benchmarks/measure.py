"""What all suites share: cases and providers, the guard, interleaved times, memory, energy, the machine and its roofs.

A suite is a list of cases. Cases of one group are built together and take turns round by round, each round in another order:
a machine that slows down slows all of them down, and none is always behind the hottest. The times of a round belong together,
from which ratios get their interval (compare.py). Before that each case is checked against the reference in float64. A case
that cannot run or is wrong leaves the others of its group in. Times are fed to pytest-benchmark through ``clock``: they get
its file format.

A time is that of one call on a GPU whose L2 cache was emptied ("cold"). Beside it stand the same right behind a call of the
same inputs ("warm", of short calls; whatever takes longer goes through more than the cache holds), and the time of a call among
many back to back ("sustained"), with what clock, power and limits of clocks were sampled meanwhile. On a CPU there is one time:
calls follow one another anyway.
"""

import ctypes
import gc
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import tnt_fast
from tnt_fast.cli import installed_version

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROUNDS = {True: (50, 300), False: (5, 50)}  # on a GPU, or not: of a group as many as fit in SECONDS, at least and at most
SECONDS = 1.0
WARM, WARM_ROUNDS = 5e-3, 50  # up to so many seconds a call is timed with a warm L2 cache, too
SUSTAINED, ENERGY = 0.2, 1.0  # seconds of calls back to back, and where energy is taken, whose counter ticks every 0.1 s
PREHEAT = 10.0  # seconds before the first group: a GPU that was idle has other clocks


class Refused(Exception):
    """The result breaks the rule: no time."""


class Skipped(Exception):
    """The row cannot be taken on this machine; the message is one line."""


class Broken(Exception):
    """The provider raised; the message is its traceback."""


FOREIGN = 4.0
"""``slack`` of what others wrote or compiled. A compiler may round where eager PyTorch does not: compiled on a CPU, timm's TNT
and DeiT in float16 under autocast err 8 times as much as eager, 1.4 times what the rule allows. That is no reason to leave a
peer out, and a wrong one errs hundreds of times as much."""


class Error(NamedTuple):
    """How far a result is from float64, how far the rule allows, how far eager PyTorch is in the same dtype, and how far no
    slack may go."""

    error: float
    allowed: float
    eager: float
    cap: float = math.inf


@dataclass
class Provider:
    """One way to compute something.

    run: takes the number of the round, to rotate its inputs. check: what the guard looks at, by name. own_bytes: of weights
    and optimizer state. slack: factor on what the rule allows; 1 for what is ours, compiled or not. peak, energy: whether these
    are taken. ahead: whether the host may run ahead of the GPU, so that the time is the GPU's alone; else it is what a caller
    waits. about: more for the file.
    """

    run: Callable[[int], Any]
    check: Callable[[], dict[str, Error]]
    own_bytes: int = 0
    slack: float = 1.0
    peak: bool = True
    energy: bool = False
    ahead: bool = False
    about: dict[str, Any] = field(default_factory=dict)


@dataclass
class Case:
    """A row: ``id`` names it, ``group`` whom it takes turns with; ``build`` may raise Skipped; ``info`` goes into the file."""

    id: str
    group: str
    build: Callable[[], Provider]
    info: dict[str, Any] = field(default_factory=dict)


def settings() -> None:
    """Of PyTorch, for whatever is timed, and compiled for that."""
    torch.backends.cudnn.allow_tf32 = False  # what is called fp32 is
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # or eager code would be timed under the name of compiled


def rows(found: list[Case], gpu_rows: str) -> pytest.MarkDecorator:
    """Parametrise a test by cases; without a GPU one more row says which rows that leaves out."""
    listed = [pytest.param(case, id=case.id) for case in found]
    if not GPU:
        reason = f"torch sees no GPU; left out: {gpu_rows}"
        listed.append(pytest.param(None, id="gpu", marks=pytest.mark.skip(reason=reason)))
    return pytest.mark.parametrize("case", listed)


# ---- which rows, in which order ----

# What decides comes first, by the names of groups (models: size/mode/dtype/batch): whole models, the outer block's attention
# and products, the operations; TNT-B's train step after these, a minute and a half by itself; then the rest.
DECIDING = (
    r"[sb]/inference/bf16/(256|1)|s/train/bf16/256|[sb]/latency_graph/bf16/1",
    r"library/attention/.*",
    r"fold/.*",
    r"library/.*",
    r"(pixel_embed|inner|outer|inner_attention)/.*",
    r"s/inference/bf16/256/tuned",
    r"b/train/bf16/256",
)


def rank(case: Case | None) -> int:
    """Of a case in the order of the timing; of what is none the last."""
    return next((i for i, form in enumerate(DECIDING) if case and re.fullmatch(form, case.group)), len(DECIDING))


def in_order(cases: list[Case]) -> list[Case]:
    """As they are timed; a group stays together."""
    return sorted(cases, key=rank)


def measured_in(files: list[Path]) -> set[str]:
    """Ids of the rows that result files of this device and commit have, or have a lasting reason for not having.

    Raises:
        ValueError: it is no result, or one of another device or commit.
    """
    measured, here = set(), machine()
    for path in files:
        try:
            found = json.loads(path.read_text("utf-8"))
            about = found["machine_info"]
            measured |= {row["extra_info"]["id"] for row in found["benchmarks"]}
            measured |= {id for id, reason in found["left_out"].items() if NO_TIME not in reason}  # it would be again
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--skip-measured {path}: no result of --benchmark-json ({error!r})") from error
        for what in ("device", "commit"):
            if about.get(what) != here[what]:
                text = f"--skip-measured {path} is of {what} {about.get(what)}, this is {here[what]}"
                raise ValueError(f"{text}: their rows do not go together; leave it out, or measure that again")
    return measured


# ---- the guard ----


def _same_shape(result: Tensor, exact: Tensor) -> None:
    if result.shape != exact.shape:
        raise Refused(f"not timed: the shape is {tuple(result.shape)}, the reference's {tuple(exact.shape)}")


def by_rule(result: Tensor, exact: Tensor, own: Tensor) -> Error:
    """The rule of the house: the largest error, at most 2 × the reference's in the same dtype + 4 · eps · max|exact|."""
    _same_shape(result, exact)
    eager = (own.double() - exact).abs().max().item()
    allowed = 2 * eager + 4 * torch.finfo(own.dtype).eps * exact.abs().max().item()
    return Error((result.double() - exact).abs().max().item(), allowed, eager)


def by_norm(result: Tensor, exact: Tensor, own: Tensor, dtype: torch.dtype) -> Error:
    """For a gradient through a whole model, computed in ``dtype``: the error's norm over the gradient's, at most 2 × the
    reference's + 4 · eps, and whatever that is, a quarter: what is turned, left out or scaled is further off."""
    _same_shape(result, exact)
    size = exact.norm().item() or 1.0
    eager = (own.double() - exact).norm().item() / size
    return Error((result.double() - exact).norm().item() / size, 2 * eager + 4 * torch.finfo(dtype).eps, eager, cap=0.25)


def guard(provider: Provider) -> dict[str, float]:
    """Raise Refused unless every result keeps the rule; how much larger its error is than eager PyTorch's in the same dtype."""
    ratios = []
    for name, (error, allowed, eager, cap) in provider.check().items():
        allowed = min(allowed * provider.slack, cap)
        if not error <= allowed:
            raise Refused(f"not timed: {name} is off by {error:.3g}, allowed is {allowed:.3g}")
        if eager:
            ratios.append(error / eager)
    return {"error_over_eager": round(max(ratios, default=1.0), 3)}


# ---- time ----

_now = 0.0


def clock() -> float:
    """The time as pytest-benchmark sees it: it passes only in ``replay``."""
    return _now


def replay(seconds: Iterable[float]) -> Callable[[], None]:
    """A function whose calls take, on ``clock``, as long as was measured before."""
    left = iter(seconds)

    def call() -> None:
        global _now
        _now += next(left)

    return call


@lru_cache
def _scratch() -> Tensor:
    return torch.empty(1 << 28, dtype=torch.int8, device=DEVICE)


AHEAD = 2_000_000  # cycles, about 1 ms, in which the host queues what is timed


def once(function: Callable[[int], Any], i: int, ahead: bool = False, warm: bool = False) -> float:
    """Seconds of one call. On a GPU by events, behind a write that empties the L2 cache, or (``warm``) the same call;
    ``ahead``: the GPU then waits."""
    if not GPU:
        start = time.perf_counter()
        function(i)
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if warm:
        function(i)
    else:
        _scratch().zero_()
    if ahead:
        torch.cuda._sleep(AHEAD)
    else:
        torch.cuda.synchronize()
    start.record()
    function(i)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interleaved(
    functions: dict[str, Callable[[int], Any]],
    rounds: int | None = None,
    failed: dict[str, Exception] | None = None,
    ahead: bool = False,
    warm: bool = False,
) -> dict[str, list[float]]:
    """Seconds of each function, in turns, after a warm-up; those of a round have the same place in every list.

    Args:
        rounds: None: as many as fit. failed: takes the error of a function that raises, whose turns end; None: it is raised.
        ahead: whether the host may run ahead of the GPU. warm: whether the L2 cache has what the call before left there.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    order = random.Random(0)

    def turns(count: int, first: int = 0) -> None:
        for i in range(first, first + count):
            for name in order.sample(list(times), len(times)):
                try:
                    times[name].append(once(functions[name], i, ahead, warm))
                except Exception as error:
                    if failed is None:
                        raise
                    failed[name] = reason(error)
                    del times[name]

    before = 3 if GPU else 1
    turns(before)
    if rounds is None:
        spent = sum(found[-1] for found in times.values())
        rounds = min(max(round(SECONDS / max(spent, 1e-9)), ROUNDS[GPU][0]), ROUNDS[GPU][1])
    turns(rounds, before)
    return {name: found[before:] for name, found in times.items()}


def sustained(function: Callable[[int], Any], each: float, seconds: float, energy: bool = False) -> dict[str, Any]:
    """Of calls back to back, nobody waiting between them, for about so many seconds at ``each``: milliseconds of one, its
    joules from the board's counter, and what was sampled."""
    calls = max(2, round(seconds / max(each, 1e-9)))
    with Watch() as watch:
        used, start = _millijoules() if energy else None, time.perf_counter()
        for i in range(calls):
            function(i)
        torch.cuda.synchronize()
        taken = (time.perf_counter() - start) / calls
        used = _millijoules() - used if used is not None else 0
    found = {"sustained_ms": round(taken * 1e3, 4)} | ({"joules": round(used / 1e3 / calls, 4)} if used else {})
    return found | ({"sustained_clock": watch.summary} if watch.summary else {})


@lru_cache
def preheat() -> None:
    """Large products until the GPU is as warm as under load; once."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    end = time.perf_counter() + PREHEAT
    while time.perf_counter() < end:
        for _ in range(20):
            a @ b
        torch.cuda.synchronize()


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def exponent(sizes: Iterable[float], costs: Iterable[float]) -> float:
    """p of the best fit cost ~ size^p, by least squares of the logarithms."""
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(c) for c in costs]).slope


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def out_of_memory(error: BaseException) -> str | None:
    """The one line of an error that says how many bytes were wanted; None if it is another error."""
    text = str(error)
    if not isinstance(error, torch.OutOfMemoryError | RuntimeError) or not any(part in text for part in OUT_OF_MEMORY):
        return None
    if isinstance(error, torch.OutOfMemoryError):  # PyTorch names the bytes, what is free, and then advice
        text = ". ".join(text.split(". ")[:3])
    return "too little memory: " + text.splitlines()[0]


def reason(error: Exception) -> Exception:
    """Why a row has no time: Refused, Skipped or Broken, without the frames that keep its tensors alive."""
    if isinstance(error, Refused | Skipped):
        return type(error)(*error.args)
    line = out_of_memory(error)
    return Skipped(line) if line else Broken("".join(traceback.format_exception(error)))


def measure(chosen: list[Case], rounds: int | None = None, deadline: float | None = None) -> dict[str, dict | Exception]:
    """Build, check and time the cases of one group. By id: {"times": seconds, more numbers}, or why there is no time.

    Args:
        rounds: None: as many as fit. deadline: of time.perf_counter(); what would be built after it is skipped.
    """
    if deadline is not None and time.perf_counter() > deadline:
        return {case.id: Skipped(NO_TIME) for case in chosen}
    found: dict[str, dict | Exception] = {}
    try:
        _measure(chosen, rounds, deadline, found)
    except Exception as error:  # of the machine, not of a provider
        found |= {case.id: reason(error) for case in chosen if case.id not in found}
    return found


def _measure(chosen: list[Case], rounds: int | None, deadline: float | None, found: dict[str, dict | Exception]) -> None:
    torch._dynamo.reset()  # or the code that earlier groups compiled counts towards the limit of this one
    gc.collect()  # models lie in cycles
    ready: dict[str, Provider] = {}
    extra: dict[str, dict[str, Any]] = {}
    if GPU and rounds is None:
        preheat()
    for case in chosen:
        if deadline is not None and time.perf_counter() > deadline:
            found[case.id] = Skipped(NO_TIME)
            continue
        if GPU:
            torch.cuda.empty_cache()
        try:
            provider = case.build()
            extra[case.id] = guard(provider) | peak(provider) | provider.about
            ready[case.id] = provider
        except Exception as error:
            found[case.id] = reason(error)
        provider = None
    ahead = any(provider.ahead for provider in ready.values())
    functions = {name: provider.run for name, provider in ready.items()}
    with Watch() as watch:
        times = interleaved(functions, rounds, found, ahead)
    state: dict[str, Any] = {"l2": "cold" if GPU else "as it was", "load": [round(x, 2) for x in os.getloadavg()]}
    if watch.summary:
        state["clock"] = watch.summary
    for name in times:
        extra[name] |= state
    short = {
        name: functions[name] for name, taken in times.items() if GPU and rounds is None and statistics.median(taken) <= WARM
    }
    for name, taken in interleaved(short, WARM_ROUNDS, found, ahead, warm=True).items():
        extra[name]["warm_p50_ms"] = round(statistics.median(taken) * 1e3, 4)
    for name in random.Random(0).sample(list(times), len(times)):
        if GPU and rounds is None and name not in found and (deadline is None or time.perf_counter() < deadline):
            energy, each = ready[name].energy, statistics.median(times[name])
            try:
                extra[name] |= sustained(functions[name], each, ENERGY if energy else SUSTAINED, energy)
            except Exception as error:
                found[name] = reason(error)
    found |= {name: {"times": taken, **extra[name]} for name, taken in times.items() if name not in found}


NO_TIME = "no time left"


# ---- memory and energy ----


def peak(provider: Provider) -> dict[str, float]:
    """MiB of a call above what was allocated before it, and of the provider's own weights; nothing without a GPU."""
    provider.run(0)
    if not GPU or not provider.peak:
        return {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    provider.run(1)
    torch.cuda.synchronize()
    return {"peak_mib": round((torch.cuda.max_memory_allocated() - before + provider.own_bytes) / 2**20, 1)}


@lru_cache
def _nvml() -> tuple[Any, Any] | None:
    """NVIDIA's management library and the handle of the current device, or None where that is not to be had."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        handle = ctypes.c_void_p()
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}".encode()
        ok = library.nvmlInit_v2() == 0 and library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)) == 0
    except (OSError, AttributeError, RuntimeError):
        return None
    return (library, handle) if ok else None


def _millijoules() -> int | None:
    value = ctypes.c_ulonglong()
    if not GPU or _nvml() is None:
        return None
    library, handle = _nvml()
    return value.value if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(value)) == 0 else None


SM_CLOCK, GPU_TEMPERATURE = 1, 0  # of nvml.h, as the names below
THROTTLED = {
    0x1: "idle", 0x2: "clocks set", 0x4: "power cap", 0x8: "hardware slowdown", 0x10: "sync boost", 0x20: "software thermal",
    0x40: "hardware thermal", 0x80: "power brake", 0x100: "display clocks",
}  # fmt: skip


def sample() -> tuple[int, float, int, int] | None:
    """MHz of the multiprocessors, W, °C, and the bits of what holds the clocks down, now; None where that is not to be had."""
    if not GPU or _nvml() is None:
        return None
    (library, handle), found = _nvml(), []
    asked = (
        ("nvmlDeviceGetClockInfo", (SM_CLOCK,), ctypes.c_uint),
        ("nvmlDeviceGetPowerUsage", (), ctypes.c_uint),
        ("nvmlDeviceGetTemperature", (GPU_TEMPERATURE,), ctypes.c_uint),
        ("nvmlDeviceGetCurrentClocksThrottleReasons", (), ctypes.c_ulonglong),
    )
    for name, given, kind in asked:
        value = kind()
        if getattr(library, name)(handle, *given, ctypes.byref(value)) != 0:
            return None
        found.append(value.value)
    return found[0], found[1] / 1e3, found[2], found[3]


class Watch:
    """What the GPU does while something runs, sampled by a thread, 20 times a second, and at least once, at the end.

    ``summary``, behind it: least, middle and most of "sm_mhz" and "watts", the most of "celsius", and of "throttled" what part
    of the samples had each reason; empty where nothing can be sampled.
    """

    EVERY = 0.05

    def __enter__(self) -> "Watch":
        self.summary: dict[str, Any] = {}
        self._found: list[tuple[int, float, int, int]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True) if GPU and _nvml() is not None else None
        if self._thread:
            self._thread.start()
        return self

    def _run(self) -> None:
        while not self._end.wait(self.EVERY):
            self._take()

    def _take(self) -> None:
        if (found := sample()) is not None:
            self._found.append(found)

    def __exit__(self, *error: Any) -> None:
        if self._thread is None:
            return
        if not self._found:
            self._take()
        self._end.set()
        self._thread.join()
        if not self._found:
            return
        megahertz, watts, celsius, bits = zip(*self._found, strict=True)
        part = {name: round(sum(bool(b & bit) for b in bits) / len(bits), 2) for bit, name in THROTTLED.items()}
        self.summary = {"samples": len(bits), "sm_mhz": _spread(megahertz), "watts": _spread(watts), "celsius": max(celsius)}
        self.summary["throttled"] = {name: share for name, share in part.items() if share}


def _spread(values: Iterable[float]) -> list[float]:
    values = list(values)
    return [round(x, 1) for x in (min(values), statistics.median(values), max(values))]


# ---- the machine ----


def device_name() -> str:
    if GPU:
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """What BENCHMARK_COMMIT says; else the commit of the checkout, with "-dirty" where files differ from it."""
    if named := os.environ.get("BENCHMARK_COMMIT"):
        return named
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip() or None
    except OSError:
        return None


def machine() -> dict[str, Any]:
    """What a row depends on: device, versions, commit."""
    versions = {package: installed_version(package) for package in ("torch", "triton", "timm", "xformers")}
    return {
        "device": device_name(),
        "kind": DEVICE,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "tnt_fast": tnt_fast.__version__, **versions},
        "commit": _commit(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "note": os.environ.get("BENCHMARK_NOTE"),
    }


@lru_cache
def roofs(dtype: str) -> dict[str, Any]:
    """Bytes per second of a large copy (read and written), FLOP per second of a large matrix product: medians, as of rows."""
    kind, size = DTYPES[dtype], 8192 if GPU else 1536
    source = torch.randn(1 << (29 if GPU else 25), device=DEVICE, dtype=kind)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=DEVICE, dtype=kind) for _ in range(2))
    times = interleaved({"copy": lambda i: target.copy_(source), "product": lambda i: a @ b}, 50 if GPU else 8)
    return {
        "bytes_per_s": 2 * source.numel() * source.element_size() / statistics.median(times["copy"]),
        "flop_per_s": 2 * size**3 / statistics.median(times["product"]),
        "statistic": "median",
    }


def rates(seconds: float, dtype: str, flop: float, moved: float | None = None) -> dict[str, Any]:
    """TFLOP/s and GB/s of a call, and the percent of the nearer roof. ``flop``: of the model, whatever is computed again."""
    roof = roofs(dtype)
    parts = {"product": flop / seconds / roof["flop_per_s"]}
    found: dict[str, Any] = {"tflop_s": round(flop / seconds / 1e12, 3)}
    if moved is not None:
        parts["copy"] = moved / seconds / roof["bytes_per_s"]
        found |= {"gb_s": round(moved / seconds / 1e9, 2), "flop_per_byte": round(flop / moved, 2)}
    bound = max(parts, key=parts.get)
    return found | {"percent_of_roof": round(100 * parts[bound], 1), "roof": bound}


def issue_seconds(instructions: float, megahertz: float) -> float:
    """Seconds in which the GPU issues so many warp instructions, if each of its 4 × SMs slots issues one a clock."""
    return instructions / (4 * torch.cuda.get_device_properties(0).multi_processor_count * megahertz * 1e6)
