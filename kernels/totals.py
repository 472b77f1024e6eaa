"""totals: sums over the rows of several matrices in one launch; what is left of a backward whose programs summed by themselves.

    y[part, j] = Σᵢ x[part][i, j]

A program of a backward keeps its sums of the gradients of weights and biases over all its tiles and writes them once, as a row
in float32; these rows are some hundreds, of matrices that differ in rows and width. A program here takes COLUMNS columns of
one of them, BLOCK rows at once: each adds up its own, and only then they are summed among one another. So the same input gives
the same bits, and a long sum is no less accurate than one in pairs. By PyTorch it is a launch for each matrix, and one more
where another dtype is asked for: six of 9.8 µs a block of TNT-S that trains, on an H200 (results/2026-11-26-2039/kernels.txt).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_fast.kernels import operation
from tnt_fast.kernels.operation import Config, Launch, launch, remembered

COLUMNS = 32  # 128 bytes of a row
INTERPRETED = 1024  # in Triton's interpreter, where a program takes as long for few
CONFIG = Config(64, warps=4, stages=3)  # among the best of 13 by simulation for an H200


class Part(NamedTuple):
    """A kernel's argument: one of the matrices, contiguous."""

    ptr: Any
    n_rows: Any
    n_columns: Any


@dataclass(frozen=True, kw_only=True)
class Sizes(operation.Sizes):
    """Rows and columns of a tile."""

    BLOCK: int
    COLUMNS: int


@triton.jit
def added_up(ptr, n_rows, stride, col, real, Z: tl.constexpr):
    """Of rows that lie ``stride`` apart the sums of columns ``col``, a matrix, 0 of those that are not ``real``."""
    total = tl.full((Z.BLOCK, col.shape[0], col.shape[1]), 0.0, tl.float32)
    for first in tl.range(0, n_rows, Z.BLOCK, num_stages=Z.STAGES):
        row = first + tl.arange(0, Z.BLOCK)
        start = row.to(tl.int64)[:, None, None] * stride
        total += tl.load(ptr + start + col[None], mask=(row < n_rows)[:, None, None] & real[None], other=0.0)
    return tl.sum(total, 0)


@triton.jit
def totalled(program, y_ptr, parts, Z: tl.constexpr):
    """Each part begins with a program of its own, and y has whole ones: zeros behind the last column of a part."""
    block, ptr, n_rows, n_columns = program, parts[0].ptr, parts[0].n_rows, parts[0].n_columns
    for i in tl.static_range(1, len(parts)):
        left = block - tl.cdiv(n_columns, Z.COLUMNS)  # below 0, too, for what comes behind the part that is sought
        there, part = left >= 0, parts[i]
        block, ptr = tl.where(there, left, block), tl.where(there, part.ptr, ptr)
        n_rows, n_columns = tl.where(there, part.n_rows, n_rows), tl.where(there, part.n_columns, n_columns)
    lane = tl.arange(0, Z.COLUMNS)[None, :]
    col = block * Z.COLUMNS + lane
    total = added_up(ptr, n_rows, n_columns, col, col < n_columns, Z)
    tl.store(y_ptr + program * Z.COLUMNS + lane, total.to(y_ptr.dtype.element_ty))


@triton.jit
def _totals_kernel(y_ptr, parts, Z: tl.constexpr):
    totalled(tl.program_id(0).to(tl.int64), y_ptr, parts, Z)


# ---- on the host ----


@remembered
def _specialise(dtype: torch.dtype, columns: int, turns: int) -> Launch:
    Z = Sizes.computed(dtype, BLOCK=CONFIG.rows, COLUMNS=columns, STAGES=CONFIG.stages)
    # as inner's kernel of the weights it stands for a call of batch 256 with 196 patches an image
    return Launch(_totals_kernel, {"Z": Z}, CONFIG, 256 * 196, turns)


def columns() -> int:
    """Of a program."""
    return INTERPRETED if isinstance(operation.runner, operation.Interpreter) else COLUMNS


class Sums:
    """What ``totalled`` takes and gives: ``result`` and ``parts``, both None where there are none, of so many ``programs``.

    ``parts``: matrices that are contiguous in float32, by the names of equal parts of a row.
    """

    def __init__(self, parts: Mapping[tuple[str, ...], Tensor], dtype: torch.dtype):
        given = tuple(Part(x, *x.shape) for x in parts.values())
        self._names, self._widths = [*parts], [-(-x.n_columns // columns()) * columns() for x in given]
        self.programs, self.parts, self.result = sum(self._widths) // columns(), given or None, None
        if given:
            self.result = torch.empty(sum(self._widths), dtype=dtype, device=given[0].ptr.device)

    def by_name(self) -> dict[str, Tensor]:
        """They are vectors that lie in one memory."""
        if self.parts is None or self.result is None:
            return {}
        found: dict[str, Tensor] = {}
        for names, part, total in zip(self._names, self.parts, self.result.split(self._widths), strict=True):
            found |= zip(names, total[: part.n_columns].split(part.n_columns // len(names)), strict=True)
        return found


def totals(parts: Mapping[tuple[str, ...], Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Sums over the rows of matrices, in a ``dtype``, by name."""
    sums = Sums(parts, dtype)
    if sums.parts is not None:
        spec = _specialise(torch.float32, columns(), -(-max(x.n_rows for x in sums.parts) // CONFIG.rows))
        launch(spec, sums.programs, sums.result, sums.parts)
    return sums.by_name()
