"""attention: softmax(q kᵀ / √D) v of outer's rows of q, k and v, for heads of D = 64 channels and a row of scores at once.

    o = softmax(q kᵀ / √D) v,   logsumexp = log Σ exp(q kᵀ / √D)             the latter where gradients are recorded

A program has the keys and values of a head of an image in shared memory and goes through blocks of BLOCK queries, the next of
which are on their way meanwhile. A block's scores with all keys stay in registers, in tiles of a power of two: one maximum and
one sum, nothing is rescaled. Of 197 queries the last block would be mostly padding: they are a TAIL of 16, whose scores are
transposed, since Hopper's products have at least 64 rows. Of an image alone a program has only such a tail, of all keys in one
tile. Scores, softmax and sums are float32; exponentials are rounded for their product before they are divided by their sum.

Backward, of a gradient g of o:

    P = exp(q kᵀ / √D − logsumexp),  dP = g vᵀ,  dS = P · (dP − Σ_D g · o)
    dv = Pᵀ g,  dq = dS k / √D,  dk = dSᵀ q / √D

A program has a head here, too. It keeps q and g on the chip, in tiles of ROWS queries and a smaller one of what is left, and
goes through the keys, KEYS at once, the next of which are on their way: so every value is read once, dk and dv are whole after
a turn, dq stays in registers, and no sum is shared between programs. The gradients are written as q, k and v lie, side by side
in (B, T, 3, H, D), by no further copy. P and dS are rounded for their products, as PyTorch's kernels round them.

Products are turned so that no left operand comes from registers, which ptxas 12.8 reuses too early: oᵀ = vᵀ pᵀ, dvᵀ = gᵀ P,
dkᵀ = qᵀ dS, dqᵀ = kᵀ dSᵀ.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_fast.kernels import operation
from tnt_fast.kernels.operation import Config, Launch, derived, launch, remembered
from tnt_fast.kernels.tile import LOG2_E, dot, exp2, log2, reciprocal

HEAD = 64  # channels of a head
CAPABILITY = (9, 0)  # of GPUs where it was simulated to be faster than PyTorch's attention; there with these tokens
LEAST, MOST = 193, 208
ENOUGH = 768  # heads of all images, which fill all multiprocessors twice
FEW, ALONE = 16, 132  # queries of a program of few images; how many of those there may be, one for a multiprocessor
FORWARD = Config(64, warps=4, registers=168, capability=CAPABILITY)  # three programs fit on a multiprocessor
FORWARD_OF_FEW = Config(FEW, warps=4, capability=CAPABILITY)
BACKWARD = Config(64, warps=4, chunk=32, stages=4, capability=CAPABILITY)  # rows of a tile, keys of a turn; registers for MOST
STAYS = "disable_licm" in inspect.signature(tl.range).parameters  # from Triton 3.5 on: nothing is taken out of a loop


def _tiles_of(tokens: int, few: bool) -> tuple[int, ...]:
    """How many keys are taken together: powers of two, the largest first; of a ``few`` queries all of them."""
    if few:
        return (max(16, triton.next_power_of_2(tokens)),)
    count = -(-tokens // 16)
    return tuple(16 << bit for bit in (3, 2, 1, 0) if count >> bit & 1)


@dataclass(frozen=True, kw_only=True)
class ForwardSizes(operation.Sizes):
    """Heads of T tokens; of a program BLOCKS blocks of queries and a TAIL, of a head GROUPS programs."""

    H: int
    T: int
    BLOCK: int
    BLOCKS: int
    TAIL: int
    GROUPS: int
    TILES: tuple[int, ...] = derived(lambda Z: _tiles_of(Z.T, Z.BLOCKS == 0))
    FIRST: tuple[int, ...] = derived(lambda Z: tuple(sum(Z.TILES[:i]) for i in range(len(Z.TILES))))
    COUNT: int = derived(lambda Z: len(Z.TILES))
    PADDED: bool = derived(lambda Z: sum(Z.TILES) > Z.T)
    WIDTH: int = derived(lambda Z: Z.H * HEAD)
    D: int = HEAD
    SCALE: float = HEAD**-0.5 * LOG2_E.value


@triton.jit
def _keys_of(i: tl.constexpr, Z: tl.constexpr):
    """Tokens of a tile of keys."""
    return Z.FIRST[i] + tl.arange(0, Z.TILES[i])


@triton.jit
def _tokens(ptr, token, Z: tl.constexpr):
    """Those of q, k or v, [tokens, D], 0 where there is no such token."""
    at = token[:, None] * (3 * Z.WIDTH) + tl.arange(0, Z.D)[None, :]
    return tl.load(ptr + at, mask=(token < Z.T)[:, None], other=0.0)


@triton.jit
def _reduced(x, LARGEST: tl.constexpr, TRANSPOSED: tl.constexpr):
    if LARGEST:
        return tl.max(x, 0 if TRANSPOSED else 1)
    else:
        return tl.sum(x, 0 if TRANSPOSED else 1)


@triton.jit
def _joined(x, y, LARGEST: tl.constexpr):
    return tl.maximum(x, y) if LARGEST else x + y


@triton.jit
def _over_keys(x, LARGEST: tl.constexpr, TRANSPOSED: tl.constexpr, Z: tl.constexpr):
    """The largest of a query's values in all tiles, or their sum; of TRANSPOSED ones, of which a warp has some keys only, once
    for the tiles that all warps have together."""
    COUNT: tl.constexpr = Z.COUNT
    if TRANSPOSED and COUNT > 1 and Z.TILES[0] >= 64:
        whole = _of_64(x[0], LARGEST)
        for i in tl.static_range(1, COUNT):
            if Z.TILES[i] >= 64:
                whole = _joined(whole, _of_64(x[i], LARGEST), LARGEST)
        found = _reduced(whole, LARGEST, True)
        for i in tl.static_range(1, COUNT):
            if Z.TILES[i] < 64:
                found = _joined(found, _reduced(x[i], LARGEST, True), LARGEST)
    else:
        found = _reduced(x[0], LARGEST, TRANSPOSED)
        for i in tl.static_range(1, COUNT):
            found = _joined(found, _reduced(x[i], LARGEST, TRANSPOSED), LARGEST)
    return found


@triton.jit
def _of_64(x, LARGEST: tl.constexpr):
    """[keys, queries] as one of 64 keys: what lies 64 apart is in one thread."""
    if x.shape[0] > 64:
        return _reduced(tl.reshape(x, (x.shape[0] // 64, 64, x.shape[1])), LARGEST, True)
    else:
        return x


@triton.jit
def _attended(q, k, v, TRANSPOSED: tl.constexpr, Z: tl.constexpr):
    """oᵀ of a block of queries, [D, queries], before its division by Σ 2^(score − largest); that largest, and the sums.

    Scores are log2's, [queries, keys] or TRANSPOSED.
    """
    COUNT: tl.constexpr = Z.COUNT
    AXIS: tl.constexpr = 0 if TRANSPOSED else 1
    CHANNELS: tl.constexpr = Z.D
    scale: tl.constexpr = Z.SCALE
    scores, p = (), ()
    for i in tl.static_range(COUNT):
        s = tl.dot(k[i], tl.trans(q)) if TRANSPOSED else tl.dot(q, tl.trans(k[i]))
        if i == COUNT - 1 and Z.PADDED:
            s = tl.where(tl.expand_dims(_keys_of(i, Z) < Z.T, 1 - AXIS), s, -float("inf"))
        scores = scores + (s,)
    largest = _over_keys(scores, True, TRANSPOSED, Z) * scale
    total = tl.zeros((q.shape[0],), tl.float32)
    out = tl.zeros((CHANNELS, q.shape[0]), tl.float32)
    for i in tl.static_range(COUNT):
        pt = exp2(scores[i] * scale - tl.expand_dims(largest, AXIS), Z.FAST)
        if TRANSPOSED:
            p = p + (pt,)
        else:
            total += tl.sum(pt, 1)
        out = tl.dot(tl.trans(v[i]), pt.to(Z.DTYPE) if TRANSPOSED else tl.trans(pt.to(Z.DTYPE)), out)
    if TRANSPOSED:
        total = _over_keys(p, False, TRANSPOSED, Z)
    return out, largest, total


@triton.jit
def _finish(out, largest, total, token, out_ptr, logsumexp_ptr, Z: tl.constexpr):
    alive = token < Z.T
    if logsumexp_ptr is not None:
        tl.store(logsumexp_ptr + token, (largest + log2(total, Z.FAST)) * 0.6931471805599453, mask=alive)
    out = tl.trans((out * reciprocal(total, Z.FAST)[None, :]).to(Z.DTYPE))
    tl.store(out_ptr + token[:, None] * Z.WIDTH + tl.arange(0, Z.D)[None, :], out, mask=alive[:, None])


@triton.jit
def _attention_fwd_kernel(qkv_ptr, out_ptr, logsumexp_ptr, Z: tl.constexpr):
    COUNT: tl.constexpr = Z.COUNT
    group, at = tl.program_id(0) % Z.GROUPS, tl.program_id(0) // Z.GROUPS
    image, head = (at // Z.H).to(tl.int64), at % Z.H
    q_ptr = qkv_ptr + image * (Z.T * 3 * Z.WIDTH) + head * Z.D
    out_ptr += image * (Z.T * Z.WIDTH) + head * Z.D
    if logsumexp_ptr is not None:
        logsumexp_ptr += at.to(tl.int64) * Z.T
    token = tl.arange(0, Z.BLOCK)
    if Z.BLOCKS > 0:
        q = _tokens(q_ptr, token, Z)
    k, v = (), ()
    for i in tl.static_range(COUNT):
        k = k + (_tokens(q_ptr + Z.WIDTH, _keys_of(i, Z), Z),)
    for i in tl.static_range(COUNT):
        v = v + (_tokens(q_ptr + 2 * Z.WIDTH, _keys_of(i, Z), Z),)
    if Z.BLOCKS > 0:
        for block in tl.range(0, Z.BLOCKS, disable_licm=True):
            first = block * Z.BLOCK
            following = _tokens(q_ptr, first + Z.BLOCK + token, Z)
            out, largest, total = _attended(q, k, v, False, Z)
            _finish(out, largest, total, first + token, out_ptr, logsumexp_ptr, Z)
            q = following
    if Z.TAIL > 0:
        last = Z.BLOCKS * Z.BLOCK + group * Z.TAIL + tl.arange(0, Z.TAIL)
        out, largest, total = _attended(_tokens(q_ptr, last, Z), k, v, True, Z)
        _finish(out, largest, total, last, out_ptr, logsumexp_ptr, Z)


def _tail(Z: "BackwardSizes") -> int:
    rest = Z.T % Z.ROWS
    return 0 if rest == 0 else max(16, triton.next_power_of_2(rest))


@dataclass(frozen=True, kw_only=True)
class BackwardSizes(operation.Sizes):
    """T tokens of H heads of D channels: TILES of ROWS of them and one of TAIL, by KEYS at once."""

    T: int
    H: int
    D: int
    ROWS: int
    KEYS: int
    E: int = derived(lambda Z: Z.H * Z.D)
    TAIL: int = derived(_tail)
    TILES: int = derived(lambda Z: Z.T // Z.ROWS + (Z.TAIL > 0))


@triton.jit
def _queries(gradient_ptr, qkv_ptr, out_ptr, logsumexp_ptr, FIRST: tl.constexpr, SIZE: tl.constexpr, Z: tl.constexpr):
    """Of SIZE tokens q and the gradient, logsumexp to the base 2, Σ_D gradient · out, and zeros for the gradient of q."""
    row, col = FIRST + tl.arange(0, SIZE), tl.arange(0, Z.D)
    alive = (row < Z.T)[:, None]
    q = tl.load(qkv_ptr + row[:, None] * (3 * Z.E) + col[None, :], mask=alive, other=0.0)
    gradient = tl.load(gradient_ptr + row[:, None] * Z.E + col[None, :], mask=alive, other=0.0)
    out = tl.load(out_ptr + row[:, None] * Z.E + col[None, :], mask=alive, other=0.0)
    logsumexp = tl.load(logsumexp_ptr + row, mask=row < Z.T, other=float("inf")) * LOG2_E  # P of no token is 0
    delta = tl.sum(gradient.to(tl.float32) * out.to(tl.float32), 1)
    return q, gradient, logsumexp, delta, tl.full((Z.D, SIZE), 0.0, tl.float32)


@triton.jit
def _tile(q, gradient, logsumexp, delta, dq, k, v, dk, dv, Z: tl.constexpr):
    """dqᵀ of a tile's rows, dkᵀ and dvᵀ of a turn's keys, each with what these have to do with one another added.

    P is at most 1: so it is finite where there is no key, too, and what is multiplied by such a k, of zeros, is 0.
    """
    scores = dot(q, tl.trans(k), Z)  # [ROWS, KEYS]
    dp = dot(gradient, tl.trans(v), Z)
    power = scores * (Z.D**-0.5 * LOG2_E) - logsumexp[:, None]
    p = exp2(tl.minimum(power, 0.0, propagate_nan=tl.PropagateNan.ALL), Z.FAST)
    ds = (p * (dp - delta[:, None])).to(Z.DTYPE)
    dv = dot(tl.trans(gradient), p.to(Z.DTYPE), Z, dv)
    dk = dot(tl.trans(q), ds, Z, dk)
    return dot(tl.trans(k), tl.trans(ds), Z, dq), dk, dv


@triton.jit
def _store(ptr, x, row, Z: tl.constexpr):
    """[D, tokens] as the rows of these tokens."""
    at = row[:, None] * (3 * Z.E) + tl.arange(0, Z.D)[None, :]
    tl.store(ptr + at, tl.trans(x.to(Z.DTYPE)), mask=(row < Z.T)[:, None])


@triton.jit
def _attention_bwd_kernel(gradient_ptr, qkv_ptr, out_ptr, logsumexp_ptr, y_ptr, Z: tl.constexpr):
    TILES: tl.constexpr = Z.TILES
    head = tl.program_id(0) % Z.H
    image = (tl.program_id(0) // Z.H).to(tl.int64)
    gradient_ptr += image * (Z.T * Z.E) + head * Z.D
    out_ptr += image * (Z.T * Z.E) + head * Z.D
    qkv_ptr += image * (Z.T * 3 * Z.E) + head * Z.D
    y_ptr += image * (Z.T * 3 * Z.E) + head * Z.D
    logsumexp_ptr += (image * Z.H + head) * Z.T

    queries, gradients, logsumexps, deltas, dqs = (), (), (), (), ()
    for i in tl.static_range(TILES):
        q, gradient, logsumexp, delta, dq = _queries(
            gradient_ptr, qkv_ptr, out_ptr, logsumexp_ptr, i * Z.ROWS, Z.TAIL if i == Z.T // Z.ROWS else Z.ROWS, Z
        )
        queries, gradients, logsumexps = queries + (q,), gradients + (gradient,), logsumexps + (logsumexp,)
        deltas, dqs = deltas + (delta,), dqs + (dq,)
    # what addresses of shared memory do not depend on the turn would else take 100 registers
    for first in tl.range(0, Z.T, Z.KEYS, num_stages=Z.STAGES, disable_licm=True):
        row = first + tl.arange(0, Z.KEYS)
        at, alive = row[:, None] * (3 * Z.E) + tl.arange(0, Z.D)[None, :], (row < Z.T)[:, None]
        k = tl.load(qkv_ptr + Z.E + at, mask=alive, other=0.0)
        v = tl.load(qkv_ptr + 2 * Z.E + at, mask=alive, other=0.0)
        dk, dv = tl.full((Z.D, Z.KEYS), 0.0, tl.float32), tl.full((Z.D, Z.KEYS), 0.0, tl.float32)
        found = ()
        for i in tl.static_range(TILES):
            dq, dk, dv = _tile(queries[i], gradients[i], logsumexps[i], deltas[i], dqs[i], k, v, dk, dv, Z)
            found = found + (dq,)
        dqs = found
        _store(y_ptr + Z.E, dk * Z.D**-0.5, row, Z)
        _store(y_ptr + 2 * Z.E, dv, row, Z)
    for i in tl.static_range(TILES):
        row = i * Z.ROWS + tl.arange(0, Z.TAIL if i == Z.T // Z.ROWS else Z.ROWS)
        _store(y_ptr, dqs[i] * Z.D**-0.5, row, Z)


# ---- on the host ----


def attends(B: int, T: int, H: int, D: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether attention of B images, T tokens and H heads of D channels is faster here than PyTorch's."""
    if dtype == torch.float32 or D != HEAD or not LEAST <= T <= MOST:
        return False
    if ALONE < B * H * -(-T // FEW) and B * H < ENOUGH:
        return False
    return _is_here(device)


def attends_backward(T: int, D: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether attention's gradients of rows of T tokens and heads of D channels are faster here than PyTorch's.

    Of fewer tokens than a tile products and a softmax find gradients that are closer to 0, where values are alike.
    """
    return dtype != torch.float32 and D == HEAD and BACKWARD.rows <= T <= MOST and _is_here(device)


def _is_here(device: torch.device) -> bool:
    """Whether it is such a GPU, or Triton's interpreter, and a Triton that compiles the loops as they were meant."""
    runner, capability = operation.runner, operation.runner.capability(device)
    return STAYS and (capability == CAPABILITY or (capability is None and runner.on_cpu and not runner.nvidia))


@remembered
def specialise(dtype: torch.dtype, H: int, T: int, few: bool) -> Launch:
    """``few``: programs of FEW queries, of heads that are not enough for a GPU."""
    config, count, block = FORWARD_OF_FEW if few else FORWARD, -(-T // FEW), FORWARD.rows
    blocks, rest, groups = (0, FEW, count) if few else (*divmod(count * FEW, block), 1)
    if rest > block // 2:
        blocks, rest = blocks + 1, 0
    sizes = ForwardSizes.computed(dtype, H=H, T=T, BLOCK=block, BLOCKS=blocks, TAIL=rest, GROUPS=groups)
    return Launch(_attention_fwd_kernel, {"Z": sizes}, config, T / (H * groups), max(1, blocks))


def prepared(B: int, T: int, H: int, dtype: torch.dtype, recorded: bool) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    """Attention of contiguous (B·T, 3·H·D), rows of q, k and v, for a plan: the result (B·T, H·D) and, if ``recorded``,
    logsumexp (B, H, T) in float32."""
    few = B * H * -(-T // FEW) <= ALONE
    spec = specialise(dtype, H, T, few)
    grid = B * H * spec.constants["Z"].GROUPS
    spec = spec.again()

    def attended(qkv: Tensor) -> tuple[Tensor, Tensor | None]:
        out = torch.empty(B * T, H * HEAD, dtype=dtype, device=qkv.device)
        logsumexp = torch.empty(B, H, T, dtype=torch.float32, device=qkv.device) if recorded else None
        launch(spec, grid, qkv, out, logsumexp)
        return out, logsumexp

    return attended


@remembered
def _specialise_backward(dtype: torch.dtype, T: int, H: int, D: int) -> Launch:
    sizes = BackwardSizes.computed(dtype, T=T, H=H, D=D, ROWS=BACKWARD.rows, KEYS=BACKWARD.chunk, STAGES=BACKWARD.stages)
    return Launch(_attention_bwd_kernel, {"Z": sizes}, BACKWARD, T / H, -(-T // BACKWARD.chunk))


def backward(gradient: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor) -> Tensor:
    """The gradient of q, k and v, (B, T, 3, H, D) as they are, from that of ``out``, (B, T, H, D) both; all contiguous.

    ``logsumexp``: of the forward, (B, H, T) in float32.
    """
    B, T, _, H, D = qkv.shape
    y = torch.empty_like(qkv)
    launch(_specialise_backward(qkv.dtype, T, H, D), B * H, gradient, qkv, out, logsumexp, y)
    return y
