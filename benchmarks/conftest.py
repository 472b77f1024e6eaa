"""Runs the cases of a suite: groups at once, rows with a time into pytest-benchmark, the others named with their reason."""

import json
import signal
import statistics
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from benchmarks import measure
from benchmarks.compare import is_control, ratio
from tnt_fast.writing import write

results = pytest.StashKey[dict]()
spent = pytest.StashKey[list]()
left_out = pytest.StashKey[dict]()


def pytest_addoption(parser):
    minutes = 8.0 if measure.GPU else 4.0
    text = f"time to measure in, the most telling rows first; what is left shows as skipped (default {minutes:g}; 0: no limit)"
    parser.addoption("--minutes", type=float, default=minutes, help=text)
    text = "leave out the groups of rows that this result file has whole (to go on where the minutes ended); may be repeated"
    parser.addoption("--skip-measured", type=Path, action="append", default=[], metavar="FILE", help=text)


def pytest_configure(config):
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 8):
        pytest.exit(f"the benchmarks need torch 2.8 or newer, this is {torch.__version__}", 2)
    minutes = config.getoption("minutes")
    if not minutes >= 0:
        raise pytest.UsageError(f"--minutes {minutes:g} must be 0 (no limit) or more")
    measure.settings()
    config.stash[results], config.stash[spent], config.stash[left_out] = {}, [], {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was measured is written


def _case(item) -> measure.Case | None:
    return item.callspec.params.get("case") if hasattr(item, "callspec") else None


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: measure.rank(_case(item)))
    try:
        measured = measure.measured_in(config.getoption("skip_measured"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    groups = defaultdict(set)
    for case in filter(None, map(_case, items)):
        groups[case.group].add(case.id)
    known = {group for group, ids in groups.items() if ids <= measured}
    keep, drop = [], []
    for item in items:
        (drop if (case := _case(item)) and case.group in known else keep).append(item)
    if drop:
        config.hook.pytest_deselected(items=drop)
        items[:] = keep


def _keep(config) -> None:
    """Write the file of results as it is now: even a run that is killed leaves its last whole group."""
    session = config._benchmarksession
    if not session.json or not session.benchmarks:
        return
    found = config.hook.pytest_benchmark_generate_json(
        config=config,
        benchmarks=session.benchmarks,
        include_data=True,
        machine_info=session.get_machine_info(),
        commit_info=config.hook.pytest_benchmark_generate_commit_info(config=config),
    )
    config.hook.pytest_benchmark_update_json(config=config, benchmarks=session.benchmarks, output_json=found)
    text = json.dumps(found, default=str)
    if isinstance(session.json, Path):
        write(session.json, text.encode())
    else:  # before pytest-benchmark 5.3 an open file, over which the end of the run writes more than this
        session.json.seek(0)
        session.json.truncate()
        session.json.write(text.encode())
        session.json.flush()
        session.json.seek(0)


@pytest.fixture
def take(request, benchmark):
    """Measure the group of a case unless that was done, then hand the case's times to pytest-benchmark."""
    config = request.config
    known = config.stash[results]

    def run(case: measure.Case) -> dict:
        if case.id not in known:
            minutes = config.getoption("minutes")
            start = time.perf_counter()
            deadline = start + minutes * 60 - sum(config.stash[spent]) if minutes else None
            group = [other for other in map(_case, request.session.items) if other is not None and other.group == case.group]
            found = measure.measure(group, 1 if benchmark.disabled else None, deadline)
            known.update(found)
            compared(group, found)
            config.stash[spent].append(time.perf_counter() - start)
            if not all(isinstance(row, Exception) for row in found.values()):
                _keep(config)
        found = known[case.id]
        if isinstance(found, Exception):
            config.stash[left_out][case.id] = str(found)
            if isinstance(found, measure.Skipped):
                pytest.skip(str(found))
            pytest.fail(f"{case.id}: {found}")
        times = found["times"]
        benchmark.group = case.group
        numbers = {"p50_ms": statistics.median(times) * 1e3, "p99_ms": measure.percentile(times, 99) * 1e3}
        benchmark.extra_info.update(case.info, id=case.id, **{name: round(value, 4) for name, value in numbers.items()})
        benchmark.extra_info.update({name: value for name, value in found.items() if name != "times"})
        benchmark.pedantic(measure.replay(times), rounds=len(times))
        return {"seconds": statistics.median(times), "benchmark": benchmark} | found

    return run


ALIKE = ("mode", "dtype", "batch", "label", "operation", "variant")


def compared(group: list[measure.Case], found: dict) -> None:
    """Give rows of ours "ratios": how many times faster than each of others' that does the same, with the interval of that."""
    timed = [case for case in group if not isinstance(found[case.id], Exception)]
    for ours in (case for case in timed if not is_control(case.info)):
        peers = [
            other
            for other in timed
            if is_control(other.info)
            and all(ours.info.get(name) == other.info.get(name) for name in ALIKE)
            and (ours.info.get("model") == other.info.get("model") or other.info["model"].startswith("deit"))
        ]
        times = found[ours.id]["times"]
        if peers:
            found[ours.id]["ratios"] = {other.id: ratio(found[other.id]["times"], times) for other in peers}


def pytest_benchmark_update_machine_info(config, machine_info):
    for private in ("node", "release", "cpu"):
        machine_info.pop(private, None)
    machine_info.update(measure.machine(), command=" ".join(["pytest", *map(_relative, config.invocation_params.args)]))


def _relative(argument: str) -> str:
    """An argument without the folders above this one: they say nothing to another reader."""
    name, equals, value = argument.rpartition("=")
    return f"{name}{equals}{Path(value).name if Path(value).is_absolute() else value}"


def pytest_benchmark_update_json(config, benchmarks, output_json):
    dtypes = sorted({row["extra_info"]["dtype"] for row in output_json["benchmarks"] if "percent_of_roof" in row["extra_info"]})
    output_json["roofs"] = {dtype: measure.roofs(dtype) for dtype in dtypes}
    output_json["left_out"] = config.stash[left_out]
    for row in output_json["benchmarks"]:
        row.pop("params", None)  # objects
        row["stats"]["data"] = [float(f"{value:.5g}") for value in row["stats"]["data"]]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    """What a reader wants to see at a glance, under pytest-benchmark's tables."""
    rows = [bench.extra_info for bench in config._benchmarksession.benchmarks if not bench.has_error]
    chosen = {suite: [row for row in rows if row.get("suite") == suite] for suite in ("flops", "static_cost", "models")}
    line = terminalreporter.write_line
    if any(chosen.values()):
        terminalreporter.section("work and throughput")
    for row in chosen["flops"]:
        norms = f" ({row['macs_with_norms'] / 1e9:.3f} with LayerNorms)" if "macs_with_norms" in row else ""
        text = f"{row['bytes'] / 2**20:6.0f} MiB moved  {row['flop_per_byte']:5.1f} FLOP/byte"
        line(f"{row['id']:32s} {text}  {row['macs'] / 1e9:7.3f} GMACs{norms}")
    for row in (kernel for found in chosen["static_cost"] for kernel in found["rows"]):
        text = f"{row['registers']} registers, {row['stack_bytes']} bytes of stack"
        line(f"{row['function']:32s} {text}, {row['warp_instructions_per_patch']:.0f} warp instructions a patch (sm_90)")
    for row in (row for row in chosen["models"] if "img_s" in row):
        line(f"{row['id']:56s} {row['img_s']:10.2f} img/s  p50 {row['p50_ms']:8.2f}  p99 {row['p99_ms']:8.2f} ms")
    sweeps = defaultdict(list)
    for bench in config._benchmarksession.benchmarks:
        if bench.extra_info.get("suite") == "scaling" and not bench.has_error:
            sweeps[bench.extra_info["sweep"], bench.extra_info["provider"]].append(
                (bench.extra_info["size"], bench.stats.median)
            )
    for (sweep, provider), points in sweeps.items():
        if len({size for size, _ in points}) > 1:
            line(f"time of {provider} ~ {sweep}^{measure.exponent(*zip(*points, strict=True)):.2f}")
    for name, reason in config.stash[left_out].items():
        if "not timed" in reason:
            line(f"REFUSED {name}: {reason}", red=True)
