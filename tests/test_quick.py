"""The choice of make quick: no file of the project is without a test, and the nearest come first."""

import subprocess
import sys

import pytest

from tests import quick
from tests.imports import ROOT, files


@pytest.mark.parametrize("file", files())
def test_every_file_has_tests_that_exist(file):
    chosen = quick.tests_of(file)
    assert chosen
    assert [test for test in chosen if not (ROOT / test).is_file()] == []


def test_the_table_names_what_exists():
    assert [test for test in quick.HOLDS if not (ROOT / "tests" / f"{test}.py").is_file()] == []
    assert [pattern for patterns in quick.HOLDS.values() for pattern in patterns if not list(ROOT.glob(pattern))] == []


@pytest.mark.parametrize(
    ("file", "first", "later"),
    [
        ("tnt_fast/reference.py", "test_reference", ["test_kernels", "test_model", "test_dispatch"]),
        ("tnt_fast/tnt.py", "test_model", ["test_timm_parity", "test_reference", "test_checkpoints"]),
        ("tnt_fast/variants.py", "test_variants", ["test_timm_parity"]),
        ("tnt_fast/visualize.py", "test_visualize", ["test_cli"]),  # which it has through those that import it
        ("tnt_fast/bench.py", "test_benchmarks", []),
        ("kernels/inner.py", "test_inner", ["test_kernels", "test_backward"]),
        ("kernels/operation.py", "test_operation", ["test_kernels"]),
        ("benchmarks/measure.py", "test_benchmarks", []),
        ("tests/ptx/machine.py", "test_ptx_machine", ["test_mutations"]),
        ("tests/test_model.py", "test_model", []),
        ("setup.py", "test_packaging", []),
        ("docs/api.md", "test_docs", []),
    ],
)
def test_the_nearest_tests_come_first(file, first, later):
    chosen = quick.tests_of(file)
    assert chosen[0] == f"tests/{first}.py"
    assert {f"tests/{name}.py" for name in later} <= set(chosen)


def test_a_change_to_a_test_runs_that_test_alone():
    assert quick.tests_of("tests/test_model.py") == ["tests/test_model.py"]


def test_a_file_that_is_not_there_is_named(capsys):
    assert quick.main(["tnt_fast/nosuch.py"]) == 2
    assert "no file 'tnt_fast/nosuch.py'" in capsys.readouterr().out


def test_what_the_time_does_not_reach_is_skipped_and_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--until", "0", "tests/test_imports.py"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "passed" not in done.stdout
    assert "no time left; make test has it" in done.stdout
