"""Sums over the rows of several matrices, by one launch."""

import pytest
import torch
from helpers import paths

pytest.importorskip("triton")

from tnt_fast.kernels.totals import COLUMNS, CONFIG, INTERPRETED, totals

pytestmark = pytest.mark.usefixtures("poisoned_memory")
BLOCK = CONFIG.rows
SHAPES = {
    "one": [((1, 1), 1)],
    "rows": [((rows, 5), 1) for rows in (1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7)],
    "columns": [((3, columns), 1) for columns in (1, COLUMNS - 1, COLUMNS, COLUMNS + 1, 4 * COLUMNS, INTERPRETED + 1)],
    "parts of a row": [((9, 4 * 24), 4), ((70, 2 * 40), 2), ((2, 3 * 7), 3)],
}


@pytest.mark.parametrize("which", SHAPES)
@pytest.mark.everywhere
@paths("float32 float16", "float32 bfloat16")
def test_totals(which, path, dtype):
    parts = {
        tuple([f"{at}.{part}" for part in range(count)]): torch.randn(shape, dtype=torch.float64).float()
        for at, (shape, count) in enumerate(SHAPES[which])
    }
    given = {names: x.to(path.device) for names, x in parts.items()}
    found, again = totals(given, dtype), totals(given, dtype)
    assert [*found] == [name for names in parts for name in names]
    for names, x in parts.items():
        for name, exact in zip(names, x.double().sum(0).chunk(len(names)), strict=True):
            assert found[name].dtype == dtype
            assert torch.equal(found[name], again[name])
            path.rule(name, found[name], exact.float().to(dtype), exact, dtype)


def test_a_long_sum_is_as_exact_as_one_in_pairs():
    from tnt_fast.kernels import operation

    if not operation.runner.on_cpu and not torch.cuda.is_available():
        pytest.skip("needs the interpreter or a CUDA device")
    device = "cpu" if operation.runner.on_cpu else "cuda"
    x = 1000 + torch.randn(4000, 3, dtype=torch.float64).float()
    found = totals({("sum",): x.to(device)}, torch.float32)["sum"].double().cpu()
    exact = x.double().sum(0)
    # a value is rounded once for each of BLOCK rows' turns and once for each halving of what they left
    roundings = -(-4000 // BLOCK) + 6
    assert (found - exact).abs().max() <= roundings * 2**-24 * exact.abs().max()


def test_of_nothing_is_nothing():
    assert totals({}, torch.float32) == {}
