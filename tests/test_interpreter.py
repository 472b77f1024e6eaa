"""What is hastened in Triton's interpreter gives what Triton's own parts give."""

import pytest
import torch

pytest.importorskip("triton")

import triton
from interpreter import CHANGES
from triton import language as tl
from triton.language import core
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are not interpreted where there is a GPU")
BLOCK = tl.block_type(tl.float32, [16, 32])


def own(module, name):
    """Triton's, of which ours is made; None where this version has none."""
    return getattr(getattr(module, name, None), "__wrapped__", None)


@pytest.mark.parametrize("type_", [tl.int1, tl.float16, tl.bfloat16, tl.int64, tl.pointer_type(tl.float16), BLOCK], ids=str)
def test_types(type_):
    for _ in range(2):  # made, then remembered
        assert interpreter._get_np_dtype(type_) == own(interpreter, "_get_np_dtype")(type_)


@pytest.mark.parametrize("shape", [[16, 32], (tl.constexpr(4), 8), tl.constexpr([2, 2]), tl.tuple([tl.constexpr(4)])], ids=str)
def test_shapes(shape):
    assert core._unwrap_shape(shape) == own(core, "_unwrap_shape")(shape)


@pytest.mark.skipif(own(core, "_type_for_tuple_values") is None, reason="this version of Triton names types elsewhere")
@pytest.mark.parametrize("values", [(4, 8), (4, 8.0), (True, 1)], ids=str)
def test_types_of_tuples(values):
    values = [tl.constexpr(x) for x in values]
    for _ in range(2):
        assert str(core._type_for_tuple_values(values)) == str(own(core, "_type_for_tuple_values")(values))


@pytest.mark.parametrize("x", [3, tl.constexpr(3), [tl.constexpr(3), 4], (tl.constexpr(3),), None, "fp32"], ids=str)
def test_constants(x):
    assert core._unwrap_if_constexpr(x) == own(core, "_unwrap_if_constexpr")(x)


@pytest.mark.parametrize("element", [tl.int1, tl.pointer_type(tl.float16), tl.pointer_type(tl.int8, const=True)], ids=str)
def test_blocks_and_tensors(element):
    def seen(x):
        return {name: str(value) for name, value in vars(x).items()}

    for shape in ([16, 32], [tl.constexpr(16), 32], [16, 64], [16, 32]):
        block, as_before = tl.block_type(element, shape), object.__new__(tl.block_type)
        own(tl.block_type, "__init__")(as_before, element, shape)
        assert block == as_before
        assert seen(block) == seen(as_before)
        for whole in (block, element):
            tensor, as_before = core.tensor("handle", whole), object.__new__(core.tensor)
            own(core.tensor, "__init__")(as_before, "handle", whole)
            assert seen(tensor) == seen(as_before)
            assert tensor.type is whole
    with pytest.raises(ValueError, match="power of 2"):
        tl.block_type(element, [3])


def test_types_are_alike_as_before():
    others = [tl.float16, tl.float32, tl.constexpr(tl.float16), tl.pointer_type(tl.float16), BLOCK, None, "fp16"]
    assert [tl.float16 == x for x in others] == [own(core.dtype, "__eq__")(tl.float16, x) for x in others]


@triton.jit
def _sums(x_ptr, y_ptr, n):
    row, col = tl.arange(0, 4), tl.arange(0, 8)
    x = tl.load(x_ptr + row[:, None] * n + col[None, :])
    y = x + tl.sum(x, 0)[None, :] * 2 + tl.sum(x, 1)[:, None] + 2147483647 * row[:, None]
    tl.store(y_ptr + row[:, None] * n + col[None, :], tl.where(row[:, None] < 3, y, row[:, None] * 0.5 + col[None, :]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.float16])
def test_what_is_computed(dtype, monkeypatch):
    """Broadcasts both ways, numbers, whole ones that overflow: as by Triton's own parts."""
    x, found = torch.arange(32).view(4, 8).to(dtype), []
    for _ in range(2):
        found.append(torch.empty_like(x))
        _sums[(1,)](x, found[-1], 8)
        for owner, name, _ in CHANGES:
            if (before := own(owner, name)) is not None:
                monkeypatch.setattr(owner, name, before)
    assert torch.equal(*found)


def test_what_is_patched_stays_so():
    from tnt_fast.kernels import tile

    interpreter._patch_lang(tile.load.fn).restore()
    once = tl.static_range
    interpreter._patch_lang(tile.load.fn).restore()
    assert tl.static_range is once
    assert tl.static_range(3) == range(3)
