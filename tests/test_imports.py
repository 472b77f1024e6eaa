"""Who may know whom: every import statement of the package is held to the table below."""

import graphlib
import sys
from pathlib import PurePath

import pytest
from imports import Import, file_of, files, imports

PACKAGE = files("tnt_fast", "kernels")

# file: (what it may import of ours, what of others beside the standard library). Read upwards, nothing points back.
ALLOWED = {
    "tnt_fast/reference.py": ("", "torch"),
    "tnt_fast/attention.py": ("tnt_fast/arguments.py tnt_fast/reference.py", "torch xformers"),
    "tnt_fast/arguments.py": ("tnt_fast/reference.py", "torch"),
    "kernels/*.py": ("kernels/*.py tnt_fast/arguments.py tnt_fast/reference.py", "torch triton"),
    "kernels/outer.py": ("tnt_fast/attention.py", ""),
    "tnt_fast/dispatch.py": ("kernels/__init__.py tnt_fast/reference.py", "torch timm"),
    "tnt_fast/tnt.py": ("tnt_fast/attention.py tnt_fast/dispatch.py tnt_fast/reference.py", "torch timm"),
    "tnt_fast/optimize.py": ("tnt_fast/tnt.py tnt_fast/attention.py tnt_fast/dispatch.py tnt_fast/reference.py", "torch timm"),
    "tnt_fast/reading.py": ("", "torch safetensors"),
    "tnt_fast/writing.py": ("", ""),
    "tnt_fast/terminal.py": ("", ""),
    "tnt_fast/checkpoints.py": ("tnt_fast/tnt.py tnt_fast/reading.py tnt_fast/writing.py", "torch timm"),
    "tnt_fast/variants.py": (
        "tnt_fast/tnt.py tnt_fast/attention.py tnt_fast/reference.py tnt_fast/checkpoints.py tnt_fast/reading.py "
        "tnt_fast/terminal.py",
        "torch timm huggingface_hub",
    ),
    "tnt_fast/vit.py": ("tnt_fast/tnt.py", "torch timm"),
    "tnt_fast/export.py": (
        "tnt_fast/tnt.py tnt_fast/dispatch.py tnt_fast/terminal.py tnt_fast/writing.py",
        "torch timm safetensors onnx onnxruntime onnxscript",
    ),
    "tnt_fast/__init__.py": (
        "kernels/__init__.py tnt_fast/dispatch.py tnt_fast/tnt.py tnt_fast/checkpoints.py tnt_fast/variants.py "
        "tnt_fast/optimize.py tnt_fast/vit.py tnt_fast/export.py",
        "",
    ),
    # the command: all of this knows the package, which knows none of it
    "tnt_fast/flops.py": ("", "torch"),
    "tnt_fast/visualize.py": ("tnt_fast/images.py tnt_fast/terminal.py tnt_fast/writing.py", "matplotlib numpy"),
    "tnt_fast/seeing.py": (
        "tnt_fast/dispatch.py tnt_fast/tnt.py tnt_fast/reading.py tnt_fast/checkpoints.py tnt_fast/variants.py "
        "tnt_fast/data.py tnt_fast/classify.py",
        "torch timm numpy PIL sklearn threadpoolctl",
    ),
    "tnt_fast/page.py": (
        "tnt_fast/__init__.py tnt_fast/images.py tnt_fast/seeing.py tnt_fast/terminal.py tnt_fast/visualize.py "
        "tnt_fast/writing.py",
        "numpy PIL",
    ),
    "tnt_fast/bench.py": (
        "tnt_fast/__init__.py tnt_fast/dispatch.py tnt_fast/flops.py tnt_fast/variants.py",
        "torch timm tqdm",
    ),
    "tnt_fast/images.py": ("", "numpy PIL"),
    "tnt_fast/shards.py": ("tnt_fast/images.py", "datasets pyarrow"),
    "tnt_fast/check.py": (
        "tnt_fast/__init__.py tnt_fast/images.py tnt_fast/shards.py tnt_fast/terminal.py tnt_fast/writing.py",
        "PIL tqdm",
    ),
    "tnt_fast/data.py": (
        "tnt_fast/check.py tnt_fast/images.py tnt_fast/recipe.py tnt_fast/shards.py tnt_fast/terminal.py",
        "torch timm numpy sklearn PIL",
    ),
    "tnt_fast/recipe.py": (
        "tnt_fast/dispatch.py tnt_fast/tnt.py tnt_fast/checkpoints.py tnt_fast/variants.py tnt_fast/images.py "
        "tnt_fast/terminal.py",
        "torch timm yaml",
    ),
    "tnt_fast/metrics.py": ("tnt_fast/recipe.py tnt_fast/writing.py", "torch wandb"),
    "tnt_fast/plan.py": (
        "tnt_fast/check.py tnt_fast/dispatch.py tnt_fast/flops.py tnt_fast/recipe.py tnt_fast/reference.py tnt_fast/tnt.py "
        "tnt_fast/variants.py",
        "torch",
    ),
    "tnt_fast/runs.py": ("tnt_fast/checkpoints.py tnt_fast/distributed.py tnt_fast/writing.py", "torch"),
    "tnt_fast/distributed.py": (
        "tnt_fast/__init__.py tnt_fast/checkpoints.py tnt_fast/dispatch.py tnt_fast/recipe.py tnt_fast/terminal.py",
        "torch",
    ),
    "tnt_fast/train.py": (
        "tnt_fast/__init__.py tnt_fast/dispatch.py tnt_fast/distributed.py tnt_fast/checkpoints.py tnt_fast/check.py "
        "tnt_fast/data.py tnt_fast/metrics.py tnt_fast/plan.py tnt_fast/recipe.py tnt_fast/runs.py tnt_fast/terminal.py "
        "tnt_fast/visualize.py",
        "torch timm numpy tqdm",
    ),
    "tnt_fast/classify.py": (
        "tnt_fast/optimize.py "
        "tnt_fast/dispatch.py tnt_fast/checkpoints.py tnt_fast/variants.py tnt_fast/data.py tnt_fast/images.py "
        "tnt_fast/shards.py tnt_fast/writing.py",
        "torch timm",
    ),
    "tnt_fast/validate.py": (
        "tnt_fast/check.py tnt_fast/classify.py tnt_fast/images.py tnt_fast/shards.py tnt_fast/terminal.py "
        "tnt_fast/visualize.py tnt_fast/writing.py",
        "torch timm numpy scipy tqdm",
    ),
    "tnt_fast/ablate.py": (
        "kernels/__init__.py tnt_fast/check.py tnt_fast/data.py tnt_fast/dispatch.py tnt_fast/flops.py tnt_fast/recipe.py "
        "tnt_fast/runs.py tnt_fast/terminal.py tnt_fast/tnt.py tnt_fast/train.py tnt_fast/variants.py tnt_fast/visualize.py "
        "tnt_fast/writing.py",
        "torch",
    ),
    "tnt_fast/__main__.py": ("tnt_fast/cli.py", ""),
    "tnt_fast/cli.py": (
        "kernels/__init__.py "
        "tnt_fast/__init__.py tnt_fast/dispatch.py tnt_fast/flops.py tnt_fast/variants.py tnt_fast/terminal.py "
        "tnt_fast/bench.py tnt_fast/check.py tnt_fast/recipe.py tnt_fast/train.py tnt_fast/images.py tnt_fast/classify.py "
        "tnt_fast/distributed.py tnt_fast/ablate.py tnt_fast/plan.py tnt_fast/validate.py tnt_fast/visualize.py "
        "tnt_fast/page.py tnt_fast/seeing.py tnt_fast/export.py",
        "torch timm tqdm",
    ),
}


def forbidden(found: list[Import]) -> list[Import]:
    """Those that the table does not allow."""
    return [i for i in found if not any(PurePath(i.target).match(allowed) for allowed in _allowed(i.file))]


def _allowed(file: str) -> set[str]:
    rows = [row for pattern, row in ALLOWED.items() if PurePath(file).match(pattern)]
    return {name for row in rows for names in row for name in names.split()} | sys.stdlib_module_names


def cycle(found: list[Import]) -> list[Import]:
    """The imports of one circle among our files, or none."""
    graph: dict[str, dict[str, Import]] = {}
    for i in found:
        if i.target.endswith(".py"):
            graph.setdefault(i.file, {}).setdefault(i.target, i)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        path = error.args[1]
        return [graph[file][target] for target, file in zip(path, path[1:], strict=False)]
    return []


def lines(found: list[Import]) -> str:
    return "".join(f"\n  {i}" for i in found)


@pytest.mark.parametrize("file", PACKAGE)
def test_a_file_imports_only_what_the_table_allows(file):
    wrong = forbidden(imports(file))
    assert not wrong, f"not in the table ALLOWED of tests/test_imports.py:{lines(wrong)}"


def test_no_imports_go_in_a_circle():
    circle = cycle([i for file in PACKAGE for i in imports(file)])
    assert not circle, f"these imports go in a circle:{lines(circle)}"


def test_the_table_names_files_that_exist_and_all_of_them():
    named = {*ALLOWED, *(name for ours, _ in ALLOWED.values() for name in ours.split())}
    assert [name for name in named if not any(PurePath(file).match(name) for file in PACKAGE)] == []
    assert [file for file in PACKAGE if not any(PurePath(file).match(pattern) for pattern in ALLOWED)] == []


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        (
            "tnt_fast/reference.py",
            "def f():\n    from tnt_fast.tnt import TNT",
            "tnt_fast/reference.py:2: imports tnt_fast/tnt.py",
        ),
        ("kernels/fold.py", "import torch\nfrom tnt_fast import tnt", "kernels/fold.py:2: imports tnt_fast/tnt.py"),
        ("kernels/fold.py", "from tnt_fast import TNT", "kernels/fold.py:1: imports tnt_fast/__init__.py"),
        ("kernels/fold.py", "from ..dispatch import choose", "kernels/fold.py:1: imports tnt_fast/dispatch.py"),
        ("kernels/fold.py", "from .. import dispatch", "kernels/fold.py:1: imports tnt_fast/dispatch.py"),
        ("kernels/fold.py", "import kernels.tile", "kernels/fold.py:1: imports kernels"),
        ("kernels/fold.py", "import timm.layers", "kernels/fold.py:1: imports timm"),
        ("kernels/fold.py", "import importlib\nimportlib.import_module('timm')", "kernels/fold.py:2: imports timm"),
        ("tnt_fast/train.py", "import tnt_fast.cli", "tnt_fast/train.py:1: imports tnt_fast/cli.py"),
        ("tnt_fast/cli.py", "from benchmarks import measure", "tnt_fast/cli.py:1: imports benchmarks/measure.py"),
        ("tnt_fast/cli.py", "from tests.ptx.machine import Kernel", "tnt_fast/cli.py:1: imports tests/ptx/machine.py"),
        ("tnt_fast/cli.py", "import helpers", "tnt_fast/cli.py:1: imports tests/helpers.py"),
        ("tnt_fast/cli.py", "__import__('t' + 'imm')", "tnt_fast/cli.py:1: imports a module whose name is computed"),
    ],
)
def test_what_is_not_allowed_is_named_with_file_and_line(file, source, expected):
    assert [str(i) for i in forbidden(imports(file, source))] == [expected]


def test_a_circle_is_named_with_file_and_line():
    found = imports("tnt_fast/tnt.py", "def f():\n    from tnt_fast import checkpoints") + imports("tnt_fast/checkpoints.py")
    expected = {"tnt_fast/tnt.py:2: imports tnt_fast/checkpoints.py"}
    assert {str(i) for i in cycle(found)} > expected


def test_what_is_allowed_is_found_in_all_its_forms():
    source = "import math, torch.nn as nn\nfrom .tile import dot\nfrom . import operation\nfrom tnt_fast import reference as r"
    found = imports("kernels/fold.py", source)
    assert {i.target for i in found} == {
        "math", "torch", "kernels/tile.py", "kernels/operation.py", "tnt_fast/reference.py"
    }  # fmt: skip
    assert forbidden(found) == []
    found = imports("kernels/__init__.py", "from importlib import import_module\nimport_module(f'{__name__}.{name}')")
    beside = {file for file in files("kernels") if file != "kernels/__init__.py"}
    assert {i.target for i in found} == beside | {"importlib"}
    assert file_of("tnt_fast.kernels") == "kernels/__init__.py"
    assert file_of("ptx.machine") == "tests/ptx/machine.py"
