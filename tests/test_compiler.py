"""The process that compiles kernels for the tests: it specialises as Triton's launcher does, and its errors come back."""

import shutil

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from ptx.compiler import TARGETS, TESTS, Compiler, compiler

from tnt_fast.kernels import tile


@triton.jit
def _copy(x_ptr, y_ptr, n, scale, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tile.gelu(tl.load(x_ptr + at, mask=at < n), True) * scale, mask=at < n)


@triton.jit
def _broken(x_ptr):
    x_ptr.nosuch()


@triton.jit
def _sum(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK))))


def copy(x, n, target="sm_90", by=None, **options):
    return (by or compiler()).compile(_copy, (x, torch.empty(512), n, 0.5), {"BLOCK": 512}, options, target)


@pytest.mark.parametrize("target", TARGETS)
def test_a_kernel_is_compiled_for_its_target(target):
    found = copy(torch.empty(512), 512, target, num_warps=2)
    assert f".target {target}" in found.ptx
    assert f".visible .entry {found.name}(" in found.ptx
    assert (found.name, found.num_warps, found.target) == ("_copy", 2, target)


def test_arguments_are_specialised_as_the_launcher_does():
    x = torch.empty(520)
    aligned, shifted = copy(x, 512), copy(x[1:], 512)
    assert "ld.global.v4.b32" in aligned.ptx
    assert "ld.global.v4.b32" not in shifted.ptx
    assert copy(x, 496).key == aligned.key != copy(x, 511).key
    assert copy(x, 512).parameters == (0, 1, 2, 3)
    assert copy(x, 1).parameters == (0, 1, 3)
    assert copy(x, 2**31).key != copy(x, 2**31 - 16).key == aligned.key
    assert ".param .u64 _copy_param_2" in copy(x, 2**31).ptx
    assert copy(x.half(), 512).key != aligned.key
    assert copy(x, 512, num_warps=8).num_warps == 8


def test_errors_come_back_with_their_text():
    with pytest.raises(
        ValueError, match="target='sm_75' cannot be compiled for here; accepted: sm_80, sm_89, sm_90, sm_100, sm_120"
    ):
        copy(torch.empty(512), 512, "sm_75")
    with pytest.raises(RuntimeError, match=r"(?s)test_compiler\._broken does not compile for sm_80:.*nosuch"):
        compiler().compile(_broken, (torch.empty(1),), {}, {}, "sm_80")
    assert copy(torch.empty(512), 512).name == "_copy"  # it goes on


def test_a_process_that_dies_is_an_error_and_is_replaced():
    own = Compiler()
    try:
        copy(torch.empty(512), 512, by=own)
        own.process.kill()
        with pytest.raises(RuntimeError, match="the process that compiles kernels ended, status -9"):
            copy(torch.empty(512), 511, by=own)
        assert copy(torch.empty(512), 511, by=own).name == "_copy"
    finally:
        own.close()


def test_kernels_of_another_source_tree(tmp_path):
    for folder in ("tnt_fast", "kernels"):
        shutil.copytree(TESTS.parent / folder, tmp_path / folder)
    source = tmp_path / "kernels" / "tile.py"
    source.write_text(source.read_text().replace("half = 0.5 * x", "half = 0.25 * x"))
    other = compiler(tmp_path)
    try:
        changed = copy(torch.empty(512), 512, by=other)
    finally:
        other.close()
    assert "0f3E800000" in changed.ptx  # 0.25
    assert "0f3E800000" not in copy(torch.empty(512), 512).ptx


def test_shared_memory_is_known_without_code():
    sizes = Compiler(only_sizes=True)
    try:
        x = torch.empty(512)
        whole, early = (by.compile(_sum, (x, x), {"BLOCK": 512}, {}, "sm_90") for by in (compiler(), sizes))
    finally:
        sizes.close()
    assert early.shared == whole.shared > 0
    assert (bool(early.ptx), bool(whole.ptx)) == (False, True)
