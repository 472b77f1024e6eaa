"""What is hastened in Triton's interpreter gives what Triton's own parts give."""

import pytest
import torch

pytest.importorskip("triton")

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


def test_what_is_patched_stays_so():
    from tnt_fast.kernels import tile

    interpreter._patch_lang(tile.load.fn).restore()
    once = tl.static_range
    interpreter._patch_lang(tile.load.fn).restore()
    assert tl.static_range is once
    assert tl.static_range(3) == range(3)
