import os
import sys
import time
import zlib
from collections import defaultdict
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import pytest
import torch
from helpers import PATHS, KernelPath, write_json

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test fetches weights
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: the kernels run on the CPU
    with suppress(ImportError):  # without Triton most tests run nevertheless
        from interpreter import hasten

        hasten()
# Workers share the cores, and so do the processes that they start. And MKL sums in one run or in pieces, as it likes for a
# layout and a number of threads, and is off by up to four times as much in one as in the other, which is no error of ours.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

PART = {("sm_90", "bfloat16")}  # of the compiled cases without --wide; the interpreter has none of bfloat16
PART_EVERYWHERE = (
    PART | {("sm_90", p) for p in ("float16", "float32", "tf32")} | {("sm_80", "bfloat16"), ("sm_100", "bfloat16")}
)

compiled_reports = []


@pytest.fixture
def poisoned_memory():
    """What a kernel does not write is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_addoption(parser):
    parser.addoption("--timm-source", type=Path, help="source tree of the installed timm, whose own tests are run on our names")
    parser.addoption("--wide", action="store_true", help="all cases: of compiled kernels every target and precision, too")
    parser.addoption("--paths", type=lambda text: text.split(","), help=f"run the kernels' tests on these: {','.join(PATHS)}")
    parser.addoption("--until", type=float, metavar="TIME", help="skip what would begin later, in seconds since 1970")
    parser.addoption("--compiled-json", type=Path, metavar="FILE", help="how far the compiled kernels are from float64")


def pytest_configure(config):
    unknown = set(config.getoption("paths") or ()) - set(PATHS)
    if unknown:
        raise pytest.UsageError(f"--paths {','.join(sorted(unknown))}: unknown; accepted: {', '.join(PATHS)}")


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    left_out = {item for item in items if not _is_chosen(item, config)}
    if not config.getoption("wide"):
        left_out |= _all_but_one([item for item in items if item not in left_out])
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
    items[:] = _long_first(items)


def _long_first(items):
    """What is marked slow, the tests of a file together, where each of two workers begins: none is left over at the end."""
    long = [item for item in items if "slow" in item.keywords]
    rest = [item for item in items if "slow" not in item.keywords]
    files = [list(found) for _, found in groupby(long, key=lambda item: item.path)]
    first, second = ([item for file in files[start::2] for item in file] for start in (0, 1))
    half = max(len(items) // 2 - len(first), 0)
    return [*first, *rest[:half], *second, *rest[half:]]


def _is_chosen(item, config) -> bool:
    """Whether a test runs at all: those on a path by --paths and, where they are compiled, by --wide and their marker."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "path" not in parameters:
        return config.getoption("wide") or item.get_closest_marker("wide") is None
    path, precision = parameters["path"]
    if config.getoption("paths") and path not in config.getoption("paths"):
        return False
    if not path.startswith("sm_") or config.getoption("wide"):
        return True
    everywhere, wide = (item.get_closest_marker(name) is not None for name in ("everywhere", "wide"))
    part = PART if everywhere == wide else PART_EVERYWHERE if everywhere else ()
    return (path, precision) in part


def _all_but_one(items) -> set:
    """Of each case that is compiled for more than ``PART``, what is more, but for one: another for another case."""
    more = defaultdict(list)
    for item in items:
        target, precision = item.callspec.params.get("path", ("", "")) if hasattr(item, "callspec") else ("", "")
        if target.startswith("sm_") and (target, precision) not in PART:
            more[item.nodeid.replace(f"{target}-{precision}", "")].append(item)
    return {item for case, found in more.items() for item in found if item is not found[zlib.crc32(case.encode()) % len(found)]}


def pytest_runtest_setup(item):
    until = item.config.getoption("until")
    if until is not None and time.time() > until:
        pytest.skip("no time left; make test has it")


@pytest.fixture(autouse=True, scope="session")
def _no_cache_at_home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tnt_fast.check._cache_folder", lambda: folder)
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _plans_are_made_anew():
    """Another test may have changed what they follow from."""
    for plans in getattr(sys.modules.get("tnt_fast.kernels.operation"), "PLANS", ()):
        plans.clear()


@pytest.fixture
def path(request):
    """Where the kernels run while the test does; ``helpers.paths`` parametrises with it."""
    name, precision = request.param
    if name == "interpreter" and torch.cuda.is_available():
        pytest.skip("the kernels are not interpreted where there is a GPU")
    path = KernelPath(name, precision)
    if path.tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with path.running():
            yield path
    finally:
        if path.tf32:
            torch.backends.cuda.matmul.allow_tf32 = False


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test of compiled kernels runs twice with --wide: with the largest errors of approximate instructions upwards, and
    downwards. Without, every other test upwards."""
    path = pyfuncitem.funcargs.get("path")
    executor = getattr(path, "executor", None)
    if executor is None:
        return None
    both = (1, -1) if pyfuncitem.config.getoption("wide") else ((1, -1)[zlib.crc32(pyfuncitem.name.encode()) % 2],)
    try:
        for executor.error in both:
            torch.manual_seed(0)
            pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames})
    finally:
        pyfuncitem.user_properties.append(("compiled", path.summary()))
    return True


def pytest_runtest_logreport(report):
    if report.when == "call":
        found = [value for name, value in report.user_properties if name == "compiled"]
        compiled_reports.extend(value | {"wrong": report.failed, "seconds": report.duration} for value in found)


def _row(key, cases):
    """What a group of compiled cases has in common, how many there are, and how far they are from float64 at most."""
    ratios = [case["worst_ratio"] for case in cases if case["worst_ratio"] is not None]
    return {
        **key,
        "cases": len(cases),
        "wrong": sum(case["wrong"] for case in cases),
        "worst_ratio": max(ratios, default=None),
        "seconds": round(sum(case["seconds"] for case in cases), 1),
    }


def pytest_terminal_summary(terminalreporter, config):
    if not compiled_reports:
        return
    total, groups, names = _row({}, compiled_reports), defaultdict(list), ("operation", "target", "precision")
    for case in compiled_reports:
        groups[tuple(case[name] for name in names)].append(case)
    rows = [_row(dict(zip(names, key, strict=True)), cases) for key, cases in sorted(groups.items())]
    if config.getoption("wide"):
        terminalreporter.write_line(f"{'operation':12} {'target':7} {'precision':9} {'cases':>6} {'wrong':>6} {'worst':>6}")
        for row in rows:
            worst = "-" if row["worst_ratio"] is None else f"{row['worst_ratio']:.2f}"
            where = f"{row['operation']:12} {row['target']:7} {row['precision']:9}"
            terminalreporter.write_line(f"{where} {row['cases']:6} {row['wrong']:6} {worst:>6}")
    terminalreporter.write_line(
        f"compiled kernels: {total['cases']} cases, {total['wrong']} wrong, {total['seconds']:.0f} s; "
        f"the largest error is {total['worst_ratio'] or 0:.2f} of the allowed"
    )
    if file := config.getoption("compiled_json"):
        write_json(file, rows)
