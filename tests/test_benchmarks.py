"""The benchmarks: their guard, their files, the report and the counts. What needs a GPU is only collected here."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from helpers import perturb, relative_error

pytest.importorskip("triton")
pytest.importorskip("pytest_benchmark")

import benchmarks.conftest as suites_conftest
import benchmarks.test_flops as flops_suite
import benchmarks.test_library as library_suite
import benchmarks.test_models as models_suite
import benchmarks.test_operations as operations_suite
import benchmarks.test_scaling as scaling_suite
import tnt_fast
from benchmarks import compare, measure, precompile, report, residual, stack
from benchmarks import kernels as timed
from tnt_fast import cli, dispatch, flops, kernels, reference

ROOT = Path(__file__).resolve().parents[1]


def command(options: tuple[str, ...], before: str = "") -> list[str]:
    """pytest on the suites in a process of its own, after the code ``before``."""
    run = f"import sys, pytest\n{before}\nsys.exit(pytest.main(sys.argv[1:]))"
    return [sys.executable, "-c", run, "-q", "-p", "no:cacheprovider", *options]


def environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_INTERPRET", "PYTEST"))} | more


def suites(*options: str, before: str = "", **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(options, before), cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=500
    )


def ids(path: Path) -> list[str]:
    return [row["extra_info"]["id"] for row in json.loads(path.read_text())["benchmarks"]]


# ---- the guard ----


@pytest.mark.parametrize("operation", kernels.OPERATIONS)
def test_a_right_kernel_passes_the_guard_and_a_wrong_one_does_not(operation):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given, others = timed.arguments("s", operation, 1, torch.float16, device)
    out = timed.call(kernels.OPERATIONS[operation], given, others)
    assert out.shape == timed.call(getattr(reference, operation), given, others).shape
    found = timed.error(operation, given, others, out)
    assert found.error <= found.allowed
    found = timed.error(operation, given, others, -out)
    assert found.error > found.allowed


@pytest.mark.skipif(torch.cuda.is_available(), reason="the wrong kernel is run in Triton's interpreter")
def test_a_kernel_made_wrong_gets_no_time_and_the_run_fails(tmp_path):
    wrong = (
        "from tnt_fast import kernels; right = kernels.OPERATIONS['fold']; "
        "kernels.OPERATIONS['fold'] = lambda *a, **k: -right(*a, **k)"
    )
    options = ["benchmarks/test_operations.py", "--benchmark-only", "-k", "fold and forward", "--benchmark-json"]
    done = suites(*options, str(tmp_path / "wrong.json"), before=wrong, TRITON_INTERPRET="1")
    assert done.returncode == 1, done.stdout[-3000:]
    assert "fold/s/forward/fp32/1/fused: not timed: result is off by" in done.stdout
    assert ids(tmp_path / "wrong.json") == ["fold/s/forward/fp32/1/eager"]
    assert "not timed" in json.loads((tmp_path / "wrong.json").read_text())["left_out"]["fold/s/forward/fp32/1/fused"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="rows of a machine without a GPU")
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_a_gradient_made_wrong_is_refused_and_a_right_one_timed(mode, monkeypatch):
    chosen = [case for case in operations_suite.operation_cases(False) if case.group.startswith(f"fold/s/{mode}")]
    found = measure.measure(chosen, rounds=1)
    assert [len(row["times"]) for row in found.values()] == [1, 1]

    fold, right = kernels.OPERATIONS["fold"], type(kernels.OPERATIONS["fold"]).__call__

    def wrong(self, norm1_weight, **given):  # the gradient of one weight is turned, the result is not
        return right(self, norm1_weight=2 * norm1_weight.detach() - norm1_weight, **given)

    monkeypatch.setattr(type(fold), "__call__", wrong)
    found = measure.measure(chosen, rounds=1)
    fused = found[f"fold/s/{mode}/fp32/1/fused"]
    if mode == "forward":
        assert len(fused["times"]) == 1
    else:
        assert isinstance(fused, measure.Refused)
        assert "not timed: gradient of norm1_weight is off by" in str(fused)


@pytest.mark.skipif(torch.cuda.is_available(), reason="small sizes of a machine without a GPU")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_train_step_with_any_gradient_made_wrong_is_refused(dtype, monkeypatch):
    small = dict(embed_dim=48, inner_dim=12, num_heads_inner=2, num_heads_outer=3, depth=2)
    monkeypatch.setitem(models_suite.TNTS, "tnt_small", small)
    exact, own = models_suite.expected("tnt_small", "train", dtype, 3)
    names = [name for name in exact if name != "output"]
    assert len(names) == len(list(models_suite.bare("tnt_small").parameters()))

    def guard(found: dict[str, torch.Tensor], slack: float) -> dict:
        return measure.guard(measure.Provider(print, lambda: models_suite.errors(found, exact, own, dtype), slack=slack))

    for slack in (1.0, measure.FOREIGN):
        assert guard(own, slack) == {"error_over_eager": 1.0}
        for name in names:
            for wrong in (-own[name], torch.zeros_like(own[name]), 1.65 * own[name], own[name] * torch.nan):
                with pytest.raises(measure.Refused, match=f"{name} is off by"):
                    guard(own | {name: wrong}, slack)


def test_the_guard_looks_at_the_first_and_the_last_image(monkeypatch):
    monkeypatch.setitem(
        models_suite.TNTS, "tnt_small", dict(embed_dim=48, inner_dim=12, num_heads_inner=2, num_heads_outer=3, depth=1)
    )
    case = models_suite.model_case("tnt_small", "reference-eager", "inference", "fp32", 3, "group")
    forward = tnt_fast.TNT.forward

    def last_wrong(self, x):
        out = forward(self, x)
        return torch.cat([out[:-1], out[-1:] * (-1 if len(x) == 3 else 1)])

    assert "times" in measure.measure([case], rounds=1)[case.id]
    monkeypatch.setattr(tnt_fast.TNT, "forward", last_wrong)
    assert isinstance(measure.measure([case], rounds=1)[case.id], measure.Refused)


def _case(name: str, run) -> measure.Case:
    x = torch.ones(3)
    return measure.Case(name, "group", lambda: measure.Provider(run, lambda: {"result": measure.by_rule(x, x.double(), x)}))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.00 GiB. GPU 0 has 2 GiB. More"), "allocate 5.00 GiB"),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."), "99 bytes"),
    ],
)
def test_too_little_memory_leaves_the_row_out_and_the_others_in(error, line):
    def fail(i):
        raise error

    found = measure.measure([_case("small", lambda i: None), _case("large", fail)], rounds=4)
    assert len(found["small"]["times"]) == 4
    assert isinstance(found["large"], measure.Skipped)
    assert line in str(found["large"])


def test_a_provider_that_raises_leaves_the_others_in():
    def fail(i):
        if i:
            raise RuntimeError("shapes differ")

    found = measure.measure([_case("right", lambda i: None), _case("broken", fail)], rounds=3)
    assert len(found["right"]["times"]) == 3
    assert isinstance(found["broken"], measure.Broken)
    assert "shapes differ" in str(found["broken"])
    assert "fail(i)" in str(found["broken"]) or "in fail" in str(found["broken"])  # its traceback


def test_an_error_of_the_machine_is_the_reason_of_every_row(monkeypatch):
    calls = []
    monkeypatch.setattr(measure.os, "getloadavg", lambda: calls.append(1) or 1 / 0)
    found = measure.measure([_case("one", lambda i: None), _case("two", lambda i: None)], rounds=2)
    assert [type(found[name]) for name in ("one", "two")] == [measure.Broken] * 2
    assert len(calls) == 1


def test_what_is_built_after_the_deadline_is_skipped(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow():
        now[0] = 2.0
        return _case("slow", lambda i: None).build()

    cases = [measure.Case("slow", "group", slow), _case("late", lambda i: None)]
    found = measure.measure(cases, rounds=2, deadline=1.0)
    assert found["slow"]["times"] == [0.0, 0.0]
    for late in (found["late"], *measure.measure(cases, rounds=2, deadline=1.0).values()):
        assert isinstance(late, measure.Skipped)
        assert str(late) == measure.NO_TIME


def test_xformers_without_operators_is_one_line(monkeypatch):
    def fail(*given):
        raise NotImplementedError("No operator found for this\nquery: many\nlines")

    monkeypatch.setattr(operations_suite, "_xformers", fail)
    with pytest.raises(measure.Skipped) as caught:
        operations_suite.attention_case("s", "xformers", batch=1, dtype="fp32").build()
    assert str(caught.value) == "xformers does not run this here: No operator found for this"


def test_without_a_gpu_nothing_is_called(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["kernels", "--call"])
    with pytest.raises(SystemExit, match="torch sees no GPU"):
        timed.main()


# ---- what only a GPU reaches, with a stand-in for it ----


@pytest.fixture
def stand_in(monkeypatch):
    """torch.cuda as measure uses it: what it is told, in order; a call takes 1 ms and 3 MiB, between readings pass 10 J."""
    told, joules = [], iter(range(0, 10**9, 10_000))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            told.append("record")

        def synchronize(self):
            told.append("wait")

        def elapsed_time(self, end):
            return 1.0

    monkeypatch.setattr(measure, "GPU", True)
    monkeypatch.setattr(measure, "_scratch", lambda: SimpleNamespace(zero_=lambda: told.append("empty the cache")))
    monkeypatch.setattr(measure, "_millijoules", lambda: next(joules))
    monkeypatch.setattr(measure, "_nvml", lambda: "a library")
    monkeypatch.setattr(measure, "sample", lambda: (1755, 650.0, 61, 0x4))
    monkeypatch.setattr(measure, "preheat", lambda: told.append("preheat"))
    for name, function in {
        "Event": Event,
        "_sleep": lambda cycles: told.append("sleep"),
        "synchronize": lambda: told.append("synchronize"),
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 2 << 20,
        "max_memory_allocated": lambda: 5 << 20,
        "get_device_capability": lambda: (9, 0),
        "get_device_properties": lambda index: SimpleNamespace(multi_processor_count=132),
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    return told


@pytest.mark.parametrize("ahead", [True, False])
def test_a_row_of_a_gpu_has_times_memory_and_energy(ahead, stand_in):
    x = torch.ones(3)
    provider = measure.Provider(
        lambda i: stand_in.append("call"),
        lambda: {"result": measure.by_rule(x, x.double(), x)},
        own_bytes=1 << 20,
        energy=True,
        ahead=ahead,
    )
    found = measure.measure([measure.Case("row", "group", lambda: provider)])["row"]
    assert found["times"] == [1e-3] * measure.ROUNDS[True][1]
    assert found["peak_mib"] == 4.0
    assert found["joules"] == 10 / 1000  # over a second, of calls that take 1 ms
    clock = dict(sm_mhz=[1755] * 3, watts=[650.0] * 3, celsius=61, throttled={"power cap": 1.0})
    assert found["clock"] | clock == found["clock"]
    assert found["sustained_clock"] | clock == found["sustained_clock"]
    assert (found["l2"], found["warm_p50_ms"]) == ("cold", 1.0)
    assert stand_in[0] == "preheat"
    first, before = stand_in.index("empty the cache"), "sleep" if ahead else "synchronize"
    assert stand_in[first : first + 6] == ["empty the cache", before, "record", "call", "record", "wait"]
    last = len(stand_in) - stand_in[::-1].index("wait") - 6  # then the same with a warm cache, then back to back
    assert stand_in[last : last + 6] == ["call", before, "record", "call", "record", "wait"]
    assert stand_in[last + 6 :] == ["call"] * 1000 + ["synchronize"]


def test_the_issue_bound_of_a_fused_forward(stand_in, monkeypatch):
    monkeypatch.setattr(operations_suite, "GPU", True)
    info = dict(operation="inner", variant="s", mode="forward", provider="fused", dtype="bf16", batch=256)
    cost = operations_suite.static_cost("inner", "s", "bf16")
    bound = cost * 256 * 196 / (132 * 4 * 1755e6)
    found = operations_suite.issue(info, 2 * bound, 1755)
    assert found == {"issue_bound_ms": round(bound * 1e3, 4), "percent_of_issue": 50.0}
    assert operations_suite.issue(info, 2 * bound, None) == {}  # nobody knows at which clock
    assert operations_suite.issue(info | dict(provider="eager"), 1.0, 1755) == {}


def test_what_is_sampled_while_something_runs(monkeypatch):
    """A GPU that is held down by its power in half of the samples, asked by NVML's names."""
    asked, given = [], iter([(1980, 500_000, 60, 0), (1755, 700_000, 65, 0x4)] * 100)

    class Library:
        def __getattr__(self, name):
            def answer(handle, *arguments):
                if name == "nvmlDeviceGetClockInfo":
                    asked.append(next(given))
                names = ("ClockInfo", "PowerUsage", "Temperature", "CurrentClocksThrottleReasons")
                arguments[-1]._obj.value = asked[-1][names.index(name.removeprefix("nvmlDeviceGet"))]
                return 0

            return answer

    monkeypatch.setattr(measure, "GPU", True)
    monkeypatch.setattr(measure, "_nvml", lambda: (Library(), "handle"))
    monkeypatch.setattr(measure.Watch, "EVERY", 0.001)
    with measure.Watch() as watch:
        while len(asked) < 10:
            time.sleep(0.001)
    found = watch.summary
    assert found["samples"] == len(asked) >= 10
    assert (found["sm_mhz"][0], found["sm_mhz"][2], found["watts"][2], found["celsius"]) == (1755, 1980, 700.0, 65)
    assert found["throttled"] == {"power cap": pytest.approx(0.5, abs=0.06)}
    monkeypatch.setattr(measure, "_nvml", lambda: None)
    with measure.Watch() as watch:
        pass
    assert watch.summary == {}


def test_each_round_has_another_order_and_its_times_one_place(monkeypatch):
    told, now = [], [0.0]

    def run(name, seconds, i):
        told.append((i, name))
        now[0] += seconds * (i + 1)

    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(measure, "GPU", False)
    functions = {name: partial(run, name, seconds) for name, seconds in dict(a=1.0, b=2.0, c=4.0).items()}
    found = measure.interleaved(functions, rounds=40)
    for name, seconds in dict(a=1.0, b=2.0, c=4.0).items():
        assert found[name] == pytest.approx([seconds * (i + 1) for i in range(1, 41)])
    orders = {tuple(name for i, name in told if i == turn) for turn in range(41)}
    assert orders == set(itertools.permutations("abc"))


def test_on_a_gpu_a_group_has_fifty_rounds_at_least(stand_in):
    slow = {name: lambda i: None for name in "ab"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "once", lambda *given: 10.0)
        assert {len(times) for times in measure.interleaved(slow).values()} == {50}


def test_the_interval_of_a_ratio():
    """Rounds that are slow for both: pairs show what medians apart do not."""
    noise = np.random.default_rng(1)
    rounds = 1 + noise.random(60)  # the machine's, the same for both
    ours, others = rounds * (1 + 0.01 * noise.random(60)), 1.2 * rounds * (1 + 0.01 * noise.random(60))
    middle, low, high = compare.ratio(others, ours)
    assert low < middle < high
    assert 1.18 < low < 1.2 < high < 1.22
    apart = compare.ratio(others, ours, paired=False)
    assert apart[0] == middle
    assert apart[2] - apart[1] > 5 * (high - low)
    inside = 0
    for _ in range(100):  # 95 of 100 intervals have what is true
        a, b = 1.1 * (1 + 0.05 * noise.standard_normal(50)), 1 + 0.05 * noise.standard_normal(50)
        _, low, high = compare.ratio(a, b)
        inside += low <= 1.1 <= high
    assert 88 <= inside <= 100


def test_rows_of_ours_are_compared_with_whoever_does_the_same():
    case = partial(models_suite.model_case, mode="inference", dtype="bf16", batch=256, group="group")
    names = [("tnt_s", "fused-eager"), ("tnt_s", "timm-eager"), ("deit_s", "cudnn-compiled"), ("tnt_s_legacy", "timm-eager")]
    cases = [case(*name) for name in names]
    found = {case.id: {"times": [seconds] * 50} for case, seconds in zip(cases, (1.0, 2.0, 3.0, 4.0), strict=True)}
    found["tnt_s_legacy/inference/bf16/256/timm-eager"] = measure.Skipped("no time left")
    suites_conftest.compared(cases, found)
    ours = found["tnt_s/inference/bf16/256/fused-eager"]
    assert ours["ratios"] == {
        "tnt_s/inference/bf16/256/timm-eager": [2.0, 2.0, 2.0],
        "deit_s/inference/bf16/256/cudnn-compiled": [3.0, 3.0, 3.0],
    }
    assert "ratios" not in found["deit_s/inference/bf16/256/cudnn-compiled"]


def test_what_decides_is_measured_first_and_150_rows_fit(stand_in, monkeypatch):
    """By the times of the committed runs on an H200, and what a row took there to be built and checked."""
    cases = [*library_suite.library_cases(), *models_suite.gpu_cases(), *operations_suite.operation_cases(True)]
    cases = measure.in_order([*cases, *operations_suite.attention_cases(True), *scaling_suite.scaling_cases(True)])
    groups = list(dict.fromkeys(case.group for case in cases))
    assert [case.group for case in cases] == [case.group for name in groups for case in cases if case.group == name]
    order = [
        "s/inference/bf16/256",
        "s/latency_graph/bf16/1",
        "library/attention/s/forward/bf16/256",
        "fold/s/forward/bf16/256",
    ]
    order += ["library/qkv/s/forward/bf16/256", "inner/s/forward/bf16/256"]
    assert [name for name in groups if name in order] == order

    device = report.read(sorted(report.RESULTS.glob("*/*.json")))["NVIDIA H200"]
    seconds = {id: row["median"] for (_, id), row in device["rows"].items() if "median" in row}
    now, timed = [0.0], []

    def seconds_of(case) -> float:
        others = [found for id, found in seconds.items() if id.rpartition("/")[0] == case.id.rpartition("/")[0]]
        if case.info["batch"] == 1 and case.info["mode"] != "latency_graph":
            return 5e-3  # of the host
        guess = {"train": 0.15, "inference": 0.02}.get(case.info["mode"], 2e-3)
        return seconds.get(case.id, max(others, default=guess))

    def fake(case) -> measure.Case:
        taken = seconds_of(case)

        def run(i: int) -> None:
            now[0] += taken

        def build() -> measure.Provider:
            provider = case.info["provider"]
            now[0] += 20 if provider.endswith("tuned") else 2.0 if provider.endswith(("compiled", "graphed")) else 0.8
            return measure.Provider(run, dict, energy=case.info["batch"] == 256 and case.info["suite"] == "models")

        return measure.Case(case.id, case.group, build, case.info)

    def once(function, i: int, ahead: bool = False, warm: bool = False) -> float:
        start = now[0]
        function(i)
        now[0] += 1.2e-3 + (now[0] - start if warm else 0)
        return now[0] - start

    monkeypatch.setattr(measure, "once", once)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(measure.gc, "collect", lambda: None)
    monkeypatch.setattr(torch._dynamo, "reset", lambda: None)
    monkeypatch.setattr(measure, "preheat", lru_cache(lambda: now.append(now.pop() + measure.PREHEAT)))
    for name in groups:
        found = measure.measure([fake(case) for case in cases if case.group == name], deadline=5.75 * 60)
        timed += [row for row in found.values() if not isinstance(row, Exception)]
    assert len(timed) >= 150
    assert min(len(row["times"]) for row in timed) >= 50


SMALL = dict(img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=5)


def test_a_deit_on_our_outer_kernels_is_the_same_model():
    model = perturb(timm.create_model("deit_small_patch16_224", **SMALL)).eval()
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(image)
        called, right = [], type(kernels.OPERATIONS["outer"]).__call__
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(kernels.OPERATIONS["outer"]), "__call__", lambda *a: called.append(1) or right(*a))
            found = models_suite.on_outer(model)(image)
    assert len(called) == len(model.blocks)
    assert relative_error(found, expected) < 1e-5


def test_train_rows_say_in_what_precision_the_residual_stream_is(monkeypatch):
    sizes = dict(img_size=32, embed_dim=48, inner_dim=12, num_heads_inner=2, num_heads_outer=3, depth=1)
    models = {backend: tnt_fast.TNT(**sizes, backend=backend) for backend in ("fused", "reference")}
    models["deit"] = timm.create_model("deit_small_patch16_224", **SMALL)
    image = torch.randn(1, 3, 32, 32)
    found = {name: models_suite.residual(model, image, "fp16") for name, model in models.items()}
    assert found == {"fused": "fp16", "reference": "fp32", "deit": "fp32"}
    assert all(not model.norm._forward_pre_hooks for model in models.values())
    monkeypatch.setitem(models_suite.TNTS, "tnt_small", {k: v for k, v in sizes.items() if k != "img_size"})
    case = models_suite.model_case("tnt_small", "reference-eager", "train", "fp32", 1, "group")
    assert measure.measure([case], rounds=1)[case.id]["residual"] == "fp32"


def test_deit_with_cudnn_attention_has_no_other():
    chosen = []
    models_suite.with_cudnn(lambda images: chosen.append(torch.backends.cuda.cudnn_sdp_enabled()) or chosen.append(
        torch.backends.cuda.flash_sdp_enabled()))(None)  # fmt: skip
    assert chosen == [True, False]
    assert torch.backends.cuda.flash_sdp_enabled()


def test_ours_gets_no_slack_compiled_and_tuned_peers_do():
    rows = {case.id: case for case in models_suite.gpu_cases() if case.group.startswith("s/inference/bf16/256")}
    slack = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("bare", "filled", "on_outer", "fuse"):
            patch.setattr(models_suite, name, lambda *given, **more: torch.nn.Identity())
        patch.setattr(models_suite, "random_images", lambda *given: ([], None))
        compiled = []
        patch.setattr(torch, "compile", lambda model, dynamic, mode: compiled.append(mode) or model)
        for id, case in rows.items():
            slack[id.removesuffix("/").split("/")[-1], id.split("_")[0]] = case.build().slack
    assert {name: each for name, each in slack.items() if each == 1} == dict.fromkeys(
        [
            ("fused-eager", "tnt"),
            ("fused-compiled", "tnt"),
            ("fused-tuned", "tnt"),
            ("fused-graphed", "tnt"),
            ("outer-eager", "deit"),
            ("outer-compiled", "deit"),
        ],
        1,
    )
    assert compiled.count("max-autotune-no-cudagraphs") == 4
    assert slack["timm-tuned", "deit"] == slack["cudnn-compiled", "deit"] == measure.FOREIGN


def test_what_is_timed_first_is_compiled_first(monkeypatch, tmp_path, capsys):
    started = []

    class Child:
        def __init__(self, command, env):
            started.append(command[-1])
            self.killed = len(started) > 3  # the others never end

        def poll(self):
            return None if self.killed else 0

        def kill(self):
            assert self.killed

        def wait(self):
            pass

    known = measure.machine()
    file = _written(tmp_path / "known.json", {"machine_info": known, "left_out": {}, "benchmarks": [
        {"extra_info": {"id": "tnt_s/inference/bf16/256/fused-compiled"}}]})  # fmt: skip
    monkeypatch.setattr(measure, "GPU", True)
    monkeypatch.setattr(measure, "machine", lambda: known)
    monkeypatch.setattr(precompile.subprocess, "Popen", Child)
    now = itertools.count()
    monkeypatch.setattr(precompile, "time", SimpleNamespace(perf_counter=lambda: next(now), sleep=lambda seconds: None))
    assert precompile.main(["--processes", "2", "--seconds", "10", "--skip-measured", str(file)]) == 0
    assert started[:2] == ["tnt_s/inference/bf16/256/timm-compiled", "deit_s/inference/bf16/256/timm-compiled"]
    left = len(precompile.compiled_cases()) - 1 - 3
    assert f"3 rows done, {left} are left to the timing" in capsys.readouterr().out
    assert "fold/s/forward/bf16/256/compiled" in precompile.compiled_cases()


@pytest.mark.parametrize(("what", "value"), [("device", "another GPU"), ("commit", "fffffff")])
def test_rows_of_another_device_or_commit_are_not_gone_on_from(what, value, tmp_path):
    file = _written(
        tmp_path / "old.json", {"machine_info": measure.machine() | {what: value}, "left_out": {}, "benchmarks": []}
    )
    with pytest.raises(ValueError, match=f"is of {what} {value}, this is .*their rows do not go together"):
        measure.measured_in([file])


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_gpu_goes_on_in_the_same_folder(tmp_path):
    """With a program in the place of python that says what it is asked for; the kernels' tests pass the second time."""
    python, out, said = tmp_path / "python", tmp_path / "out", tmp_path / "said"
    python.write_text(f"""#!/bin/sh
for last; do :; done
case "$*" in
    *--junitxml*) echo tests >> {said}; if [ "$(grep -c tests {said})" = 1 ]; then echo "1 failed, 4 passed in 3s"; exit 1; fi
        echo "5 passed in 3s" ;;
    *precompile*) echo "precompile $*" >> {said} ;;
    *--benchmark-json*) echo "time $*" >> {said}; echo rows > "$last" ;;
esac
""")
    python.chmod(0o755)
    options = [f"PYTHON={python}", f"VENV={tmp_path / 'none'}", f"OUT={out}", "SKIP=old.json", "MINUTES=3"]
    done = [subprocess.run(["make", "-s", "gpu", *options], cwd=ROOT, capture_output=True, text=True) for _ in range(3)]
    assert [each.returncode != 0 for each in done] == [True, False, False]
    assert "make gpu: failed: kernel-tests" in done[0].stderr
    lines = said.read_text().splitlines()
    assert lines.count("tests") == 2
    known = ["--skip-measured old.json", f"--skip-measured {out}/benchmarks.json", f"--skip-measured {out}/benchmarks-2.json"]
    files = ["benchmarks.json", "benchmarks-2.json", "benchmarks-3.json"]
    timed = [line for line in lines if line.startswith("time")]
    assert [line.partition("--minutes 3 ")[2] for line in timed] == [
        f"{' '.join(known[: i + 1])} --benchmark-json {out}/{files[i]}" for i in range(3)
    ]
    compiled = [line for line in lines if line.startswith("precompile")]
    assert [line.partition("--seconds 245 ")[2] for line in compiled] == [" ".join(known[: i + 1]) for i in range(3)]


# ---- counts ----


def test_bytes_are_activations_read_and_written_once():
    pixel, patch = torch.zeros(196, 16, 24, dtype=torch.float16), torch.zeros(1, 197, 384, dtype=torch.float16)
    assert timed.bytes_moved("inner", dict(pixel=pixel, qk_weight=torch.zeros(5)), pixel) == 2 * 196 * 16 * 24 * 2
    given = dict(pixel=pixel, patch=patch, proj_weight=torch.zeros(5))
    assert timed.bytes_moved("fold", given, patch) == (196 * 16 * 24 + 2 * 197 * 384) * 2


@pytest.mark.parametrize(
    ("family", "gmacs", "with_norms"),
    [
        ("tnt_s", 5.217, None), ("tnt_b", 14.049, None), ("tnt_s_inner4", 4.793, None),
        ("deit_s", 4.599, 4.608), ("deit_b", 17.564, 17.583), ("cnn_resnet50", 4.089, None), ("cnn_regnety_4g", 3.973, None),
    ],
)  # fmt: skip
def test_multiply_adds_to_four_digits(family, gmacs, with_norms):
    found = flops_suite.count(family, "eager")
    assert round(found["macs"] / 1e9, 3) == gmacs
    assert found["macs"] == flops_suite.closed_form(family)
    assert with_norms in (None, round(found["macs_with_norms"] / 1e9, 3))


def test_the_steps_of_the_waterfall_move_fewer_bytes_for_the_same_work():
    found = [flops_suite.count("tnt_s", path) for path in models_suite.steps()]
    assert {step["macs"] for step in found} == {flops_suite.closed_form("tnt_s")}
    moved = [step["bytes"] for step in found]
    assert moved == sorted(moved, reverse=True)
    assert len(set(moved)) == len(moved) == 1 + len(dispatch.OPERATIONS)


def test_the_fitted_exponent():
    assert measure.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


# ---- the suites and their files ----


@pytest.mark.slow
def test_the_suites_run():
    chosen = "tnt_ti or (inner and forward) or (train and reference) or pixels"
    done = suites("benchmarks", "--benchmark-disable", "-k", f"({chosen}) and not legacy")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout
    if not torch.cuda.is_available():
        listed = suites("benchmarks", "--benchmark-only", "-k", "[gpu]")
        assert listed.stdout.count("torch sees no GPU; left out:") == 5, listed.stdout[-3000:]


def test_every_row_of_a_gpu_has_a_name_of_its_own():
    found = [*models_suite.gpu_cases(), *operations_suite.operation_cases(True), *operations_suite.attention_cases(True)]
    found += scaling_suite.scaling_cases(True)
    assert len({case.id for case in found}) == len(found)
    for mode in ("inference", "train"):
        for size in ("ti", "s", "b"):
            for batch in (1, 8, 64, 256, 1024):
                for way in ("eager", "compiled"):
                    wanted = {f"tnt_{size}/{mode}/bf16/{batch}/{path}-{way}" for path in ("fused", "timm")}
                    assert wanted | {f"deit_{size}/{mode}/bf16/{batch}/timm-{way}"} <= {case.id for case in found}


def test_an_interrupt_leaves_a_valid_file_and_the_next_run_goes_on(tmp_path):
    before = """
import os, signal
from benchmarks import measure
right = measure.measure
def measured(chosen, *given):
    if chosen[0].group.startswith("outer"):
        os.kill(os.getpid(), signal.SIGTERM)
    return right(chosen, *given)
measure.measure = measured
"""
    file, rest = tmp_path / "found.json", tmp_path / "rest.json"
    options = ["benchmarks/test_operations.py", "--benchmark-only", "-k", "(fold or outer) and forward and eager"]
    done = suites(*options, "--benchmark-json", str(file), before=before)
    assert done.returncode == 2, done.stdout[-3000:]
    assert ids(file) == ["fold/s/forward/fp32/1/eager"]
    assert list(report.read([file])) == [measure.device_name()]
    done = suites(*options, "--benchmark-json", str(rest), "--skip-measured", str(file))
    assert done.returncode == 0, done.stdout[-3000:]
    assert ids(rest) == ["outer/s/forward/fp32/1/eager"]
    both = report.read([file, rest])[measure.device_name()]
    assert {row["id"] for row in report.rows(both, "operations")} == {*ids(file), *ids(rest)}


def test_a_killed_run_leaves_its_groups(tmp_path):
    file = tmp_path / "found.json"
    options = ("benchmarks/test_operations.py", "--benchmark-only", "-k", "forward and eager", "--benchmark-json", str(file))
    running = subprocess.Popen(command(options), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    while not (file.exists() and file.stat().st_size) and running.poll() is None:
        time.sleep(0.05)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    assert ids(file)
    assert list(report.read([file])) == [measure.device_name()]


def test_an_old_torch_and_a_wrong_file_are_one_line(tmp_path):
    done = suites("benchmarks", "--co", before="import torch; torch.__version__ = '2.7.1'")
    assert done.returncode == 2
    assert "the benchmarks need torch 2.8 or newer, this is 2.7.1" in done.stdout + done.stderr
    done = suites("benchmarks/test_flops.py", "--skip-measured", str(tmp_path / "none.json"))
    assert done.returncode == 4
    assert "no result of --benchmark-json" in done.stdout + done.stderr


def test_the_report_of_the_committed_results_is_what_the_readmes_hold():
    devices = report.read(sorted(report.RESULTS.glob("*/*.json")))
    pages = {
        ROOT / "README.md": report.first_block(devices, report.RESULTS),
        report.RESULTS / "README.md": report.full_block(devices),
        ROOT / "docs" / "performance.md": stack.times(report.RESULTS),
    }
    for path, block in pages.items():
        text = path.read_text("utf-8")
        assert report.put_into(text, block) == text, f"{path.name} is not of these results: python -m benchmarks.report"
    assert json.loads((report.RESULTS / "summary.json").read_text("utf-8")) == report.summary(devices)
    for name, device in devices.items():
        for picture in report.pictures_of(device):
            for kind in ("svg", "png"):
                assert (report.RESULTS / "pictures" / report.slug(name) / f"{picture}.{kind}").is_file()
    assert len((ROOT / "README.md").read_bytes()) <= 8192


def _gpu_result(factor: float = 1.0, drift: float = 1.0) -> dict:
    """A result as a GPU would leave it, with made-up numbers; ``factor`` on the times of ours, ``drift`` on all."""

    def row(suite: str, name: str, seconds: float, **info) -> dict:
        seconds *= drift * (factor if info["provider"].startswith("fused") else 1)
        stats = {"median": seconds, "q1": seconds * 0.99, "q3": seconds * 1.01, "data": [seconds]}
        group = name.rpartition("/")[0] if suite == "models" and not info["provider"].startswith("eager") else suite
        group = group.replace("deit", "tnt")
        return {"fullname": name, "group": group, "extra_info": {"suite": suite, "id": name, **info}, "stats": stats}

    def model(family: str, provider: str, seconds: float) -> dict:
        parts = dict(model=family, mode="inference", dtype="bf16", batch=256, provider=provider, gmacs=5.2)
        parts |= dict(img_s=256 / seconds, peak_mib=100.0, percent_of_roof=40.0, p99_ms=1.0)
        return row("models", f"{family}/inference/bf16/256/{provider}", seconds, **parts)

    steps = [("eager", 8e-3), ("eager+pixel_embed", 7e-3), ("eager+pixel_embed+inner", 5e-3)]
    operation = dict(operation="inner", variant="s", mode="forward", provider="fused", dtype="bf16", batch=256)
    operation |= dict(flop_per_byte=80.0, tflop_s=100.0, gb_s=900.0, percent_of_roof=50.0)
    benches = [model("tnt_s", "fused-eager", 5e-3), model("tnt_s", "fused-compiled", 4e-3), model("tnt_s", "timm-eager", 8e-3)]
    benches += [model("tnt_s", "timm-compiled", 6e-3), model("deit_s", "timm-compiled", 5e-3)]
    benches.append(model("cnn_resnet50", "timm-compiled", 2e-3))
    benches += [model("tnt_s", provider, seconds) for provider, seconds in steps]
    benches.append(row("operations", "inner", 1e-3, **operation))
    for provider, size in (("fused", 1), ("fused", 2), ("timm", 1), ("timm", 2)):
        sweep = dict(sweep="batch", size=size, label=str(size), model="tnt_s", dtype="bf16", batch=size, provider=provider)
        benches.append(row("scaling", f"batch/{size}/{provider}", size * 1e-3, gmacs=5.2, p50_ms=size, **sweep))
    machine = {"device": "Some GPU", "kind": "cuda", "threads": 8, "versions": {"torch": "2.11"}, "commit": "abc", "note": None}
    machine["command"] = "pytest benchmarks"
    roofs = {"bf16": {"bytes_per_s": 4e12, "flop_per_s": 8e14}}
    return {"datetime": "2026-01-01T00:00", "machine_info": machine, "roofs": roofs, "left_out": {}, "benchmarks": benches}


def test_the_report_of_a_gpu(tmp_path):
    (tmp_path / "gpu.json").write_text(json.dumps(_gpu_result()))
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    for path in (readme, results / "README.md"):
        path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    options = [str(tmp_path / "gpu.json"), "--readme", str(readme), "--results", str(results)]
    assert report.main(options) == 0
    entry = json.loads((results / "summary.json").read_text())["Some GPU"]["tnt_s/inference/bf16/256"]
    assert entry["provider"] == "fused-compiled"
    assert (entry["vs_timm_eager"], entry["vs_timm_compiled"], entry["vs_deit_compiled"]) == (2.0, 1.5, 1.25)
    assert "cnn" not in " ".join(entry)
    assert json.loads((results / "summary.json").read_text())["Some GPU"]["cnn_resnet50/inference/bf16/256"]["img_s"] == 128_000
    text, every = readme.read_text(), (results / "README.md").read_text()
    for found in (text, every):
        assert found.startswith("before\n")
        assert found.endswith("\nafter\n")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert lines[0][1:] == [
        "tnt_fast, eager", "tnt_fast, compiled", "timm TNT, eager", "timm TNT, compiled", "DeiT, compiled",
    ]  # fmt: skip
    assert lines[2] == [
        "S, inference, bf16, batch 256", "51,200", "64,000", "32,000", "42,667", "51,200",
    ]  # fmt: skip
    assert "not measured yet" not in text
    assert "| `tnt_s/inference/bf16/256/eager+pixel_embed` |" in every
    assert [line for line in every.splitlines() if "waterfall |" in line] == ["| models, inference, bf16, waterfall | 7 | 10 |"]
    drawn = {path.stem for path in (results / "pictures" / "some-gpu").glob("*.svg")}
    assert drawn == {"throughput", "waterfall", "memory", "scaling", "roofline"}


@pytest.mark.parametrize(
    "keep",
    [
        lambda row: row.get("model") == "tnt_b" or row["suite"] != "models",
        lambda row: row.get("model") == "tnt_s" and row["provider"] == "eager+pixel_embed",
        lambda row: row["suite"] == "operations",
        lambda row: row["suite"] == "scaling" and (row["provider"], row["size"]) != ("timm", 2),
        lambda row: False,
    ],
    ids=["no TNT-S", "half a waterfall", "operations", "one size of timm", "nothing"],
)
def test_the_report_of_gaps(keep, tmp_path):
    result = _gpu_result()
    result["benchmarks"] = [row for row in result["benchmarks"] if keep(row["extra_info"])]
    devices = report.read([_written(tmp_path / "gpu.json", result)])
    drawn = report.draw(devices, tmp_path)
    assert len(drawn) == 2 * sum(len(report.pictures_of(device)) for device in devices.values())
    assert "waterfall" not in {path.stem for path in drawn}
    assert report.first_block(devices, tmp_path)
    assert report.full_block(devices)
    assert list(report.summary(devices)) == ["Some GPU"]


def _written(path: Path, found: dict) -> Path:
    path.write_text(json.dumps(found))
    return path


def test_the_budgets_ratios_come_first_until_a_gpu_has_measured_its_commit(tmp_path):
    def mode(ms, host, batch, **more):
        return {"ms": ms + host, "gpu_ms": ms, "batch": batch, **more}

    deit = {"inference": mode(6.0, 0, 256), "train": mode(20.0, 0, 256), "latency_graph": mode(0.3, 0, 1)}
    tnt = {"inference": mode(5.0, 0, 256, vs_deit_compiled=1.2), "train": mode(25.0, 15.0, 256, vs_deit_compiled=0.5)}
    for name in ("inference", "train"):
        deit[f"{name}_graph"] = deit[name]
        tnt[f"{name}_graph"] = mode(tnt[name]["gpu_ms"], 0, 256, vs_deit_compiled=deit[name]["ms"] / tnt[name]["gpu_ms"])
    budget = {"about": {"gpu": "some gpu", "commit": "1234567"}, "tnt_s": tnt, "deit_s": deit, "tnt_b": tnt, "deit_b": deit}
    errors = {"published": (-12.0, 3.0), "measured": (-20.0, 1.0)}
    checks = [{"kind": kind, "error_percent": error} for kind, both in errors.items() for error in both]
    summary = {"Some GPU": {"deit_s/inference/bf16/256": {"ms": 5.0, "provider": "timm-compiled"}}}
    for name, found in {"budget": budget, "simulation": {"rows": checks}, "summary": summary}.items():
        _written(tmp_path / f"{name}.json", found)
    devices = report.read([_written(tmp_path / "gpu.json", _gpu_result())])
    head, _, row, _, told = report.first_block(devices, tmp_path).splitlines()[:5]
    columns = "S, inference | S, inference, graph | S, train | S, train, graphs | B, inference"
    assert head == f"| img/s over compiled DeiT's | {columns} |"
    assert row == "| simulated, commit 1234567 | 1.20 | 1.20 | 0.50 | 0.80 | 1.20 |"
    assert told.endswith("published times of kernels within 12%, measured ones -20 to +1%, whole DeiTs within 20%.")
    budget["about"]["commit"] = "abc"  # the GPU's
    _written(tmp_path / "budget.json", budget)
    assert "simulated" not in report.first_block(devices, tmp_path)


def test_runs_are_not_mixed_in_one_group(tmp_path):
    whole, ours, rest = _gpu_result(), _gpu_result(factor=0.5), _gpu_result()
    ours["datetime"], ours["machine_info"]["commit"] = "2026-01-02T00:00", "bbb"
    ours["benchmarks"] = [row for row in ours["benchmarks"] if "fused-" in row["extra_info"]["provider"]]
    rest["datetime"], rest["machine_info"]["commit"] = "2026-01-03T00:00", "ccc"
    rest["benchmarks"] = [row for row in rest["benchmarks"] if row["extra_info"]["suite"] == "scaling"]
    whole["left_out"] = {"inner": "not timed: it was wrong", "tnt_s/none": "no time left"}
    files = [_written(tmp_path / f"{i}.json", found) for i, found in enumerate((whole, ours, rest))]
    (device,) = report.read(files).values()
    entry = report.summary({"gpu": device})["gpu"]["tnt_s/inference/bf16/256"]
    assert (entry["ms"], entry["vs_timm_compiled"]) == (4.0, 1.5)  # of the run that has both
    assert "2026-01-01, commit abc and 2026-01-03, commit ccc" in report.label(device)
    assert "bbb" not in report.label(device)
    assert report.left_out(device) == ["- no time left: `tnt_s/none`"]


def test_the_report_refuses_what_is_no_result(tmp_path, capsys):
    (tmp_path / "empty.json").write_text("")
    assert report.main([str(tmp_path / "empty.json")]) == 2
    assert "is no JSON" in capsys.readouterr().err
    (tmp_path / "empty.json").write_text("[]")
    assert report.main([str(tmp_path / "empty.json")]) == 2
    assert "no result" in capsys.readouterr().err


def test_compare_says_what_became_slower(tmp_path, capsys):
    files = {"old": {}, "same": dict(factor=1.01), "slow": dict(factor=1.2), "drift": dict(drift=1.3)}
    for name, given in files.items():
        (tmp_path / name).write_text(json.dumps(_gpu_result(**given)))
    old, same, slow, drift = (str(tmp_path / name) for name in files)
    assert compare.main([old, same]) == 0
    assert "slower: 0" in capsys.readouterr().out
    assert compare.main([old, slow]) == 1
    out = capsys.readouterr().out
    assert "slower: 5" in out
    assert "+20.0% (+20.0% to +20.0%)  tnt_s/inference/bf16/256/fused-eager" in out
    assert compare.main([slow, old]) == 0
    assert "faster: 5" in capsys.readouterr().out
    assert compare.main([old, drift]) == 0
    assert "drift of the machine +30.0%, noise 3.0% (7 rows of others)" in capsys.readouterr().out
    assert compare.main([old, str(tmp_path / "none.json")]) == 2
    for name, changes in (("nothing", {"benchmarks": []}), ("no machine", {"machine_info": {}})):
        assert compare.main([old, str(_written(tmp_path / name, _gpu_result() | changes))]) == 2
    wrong = _gpu_result() | {"left_out": {"tnt_s/inference/bf16/256/fused-eager": "not timed: output is off by 3"}}
    assert compare.main([old, str(_written(tmp_path / "wrong", wrong))]) == 1
    assert "wrong now: tnt_s/inference/bf16/256/fused-eager" in capsys.readouterr().out


def test_the_noise_is_what_the_rows_of_others_show():
    def pair(change: float, provider: str = "timm-eager") -> tuple[dict, dict]:
        return tuple({"median": x, "q1": x, "q3": x, "provider": provider} for x in (1.0, 1 + change))

    control = [pair(change) for change in (-0.1, -0.02, 0.0, 0.02, 0.1)]
    drift, noise = compare.drift_and_noise([*control, pair(5.0, "fused-eager")])
    assert (drift, round(noise, 6)) == (1.0, 0.1)
    assert compare.verdict(0.09, 0.08, 0.1, noise) == "same"
    assert compare.verdict(0.11, 0.09, 0.13, noise) == "slower"
    assert compare.verdict(0.11, -0.01, 0.23, noise) == "same"  # its interval has zero
    assert compare.verdict(-0.11, -0.13, -0.09, noise) == "faster"
    assert compare.drift_and_noise([]) == (1.0, compare.LEAST)


# ---- tnt-fast bench ----


def test_the_command_prints_a_table(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **more: create(name, **{"depth": 1, **more}))
    assert cli.main(["bench", "--device", "cpu", "--batch-size", "1", "--seconds", "0.01"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["model", "img/s"]
    names = ["TNT, tnt_fast (reference)", "TNT, optimized", "TNT, timm", "ViT, timm"]
    assert [line.split("  ")[0] for line in lines[2:6]] == names
    assert lines[6].startswith("medians of 3 rounds")
    assert lines[7].startswith("not fused: ")
    folded, inner, outer = 196 * 16 * 24 * 384, 196 * flops.standard_block(16, 24), flops.standard_block(197, 384)
    macs = 196 * 16 * 24 * 147 + 2 * folded + inner + outer + 384 * 1000
    assert {line.split()[-1] for line in lines[2:5]} == {f"{macs / 1e9:.3f}"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "q"], "accepted: ti, s, b"),
        (["--dtype", "int8"], "accepted: float32"),
        (["--batch-size", "0"], "--batch-size 0 must be in [1, 100000]"),
        (["--batch-size", "1000000000000"], "[1, 100000]"),
        (["--seconds", "nan"], "--seconds nan in (0, 1e6)"),
        (["--device", "cuda:77"], "device='cuda:77' is not here; accepted: cpu"),
    ],
    ids=lambda value: value[1].upper() if isinstance(value, list) else "",  # capitals: "cuda" in a name asks for a GPU
)
def test_the_command_names_bad_input(options, message, capsys):
    pytest.importorskip("tqdm")
    assert cli.main(["bench", "--device", "cpu", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_stream_of_patches_carries_the_error_of_rounding():
    torch.manual_seed(0)
    model = tnt_fast.TNT(
        img_size=32, embed_dim=96, inner_dim=12, depth=3, num_heads_outer=3, num_classes=50, backend="reference"
    )
    residual.perturbed(model.eval())
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(residual.forward(model, image, ()), model(image))
    found = residual.errors(model, image)
    assert found["patches alone"] > 3 * found["pixels alone"] > 0
    assert found["pixels"] < 1.2 * found["none"] < 1.2 * found["both"]
