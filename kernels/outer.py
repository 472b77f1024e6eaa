"""outer: the outer transformer, an ordinary ViT block over the class token and the patches.

    patch = fold(pixel, patch)                             where pixels are given
    x = patch + attn_scale · proj(softmax(q kᵀ / √D) v),   q, k, v = linear(LN₁ patch), H heads of D channels
    y = x + mlp_scale · fc2(GELU(fc1(LN₂ x)))

Shapes: patch and result (B, T, E), T = 1 + N tokens. The products are large and the libraries', and so is the attention, but
for what attention.py takes. What is left between them is two LayerNorms, of which fold's last launch does the first. Eight
launches, ten with fold: each LayerNorm also writes what the branch behind it is added to, with the biases of that branch, so
that the product that ends it adds in place; q, k and v are one product; GELU belongs to fc1's. Of few rows, where nothing is
recorded or scaled, LayerNorms and what follows them are product.py's: five launches, six with fold.

GELU of many rows is in one with its product where that is faster (gelu.py), both ways, with tile.py's form. Elsewhere that is
cuBLAS's in bfloat16, of the tanh form: at most 4.7e-4 off the erf form, where rounding values near 1 to bfloat16 makes 3.9e-3;
in float16, in float32 and where gradients are recorded it is a kernel of its own.

Backward, of each of the two branches r + scale · last(f(first(LN r))), f the attention or GELU, with g the gradient of the sum:

    d = scale · g,  dW_last = dᵀ · f(h),  dh = f's backward of d · W_last
    dW_first = dhᵀ · LN(r),  dr = g + LN's backward of dh · W_first

The kernels of GELU and LN also make f(h) and LN(r) again, which are not kept, and sum dh, g and dr over their rows: gradients
of the biases of fc1, fc2 and proj, the latter two if there is no scale; totals.py adds up what their programs leave, a fold's,
too. Nine launches of the forward and fourteen, of a fold two and five more, for its second norm's backward lies within LN₁'s;
one less each way where gelu.py takes GELU's products, one where it takes that of the fold that is made again with its norm, one
where LN₂ is within the sum before and fc1's product, and one where attention.py takes the attention's gradients, of q, k and v
side by side. Where weights have another dtype, as under autocast, a cast of all of them before the products, whose gradients
are products in float32 (on the CPU casts, too), biases of q, k and v one each way, a scale three of its branch. What makes one
matrix of q's, k's and v's, and that cast, is no launch in a block (block.py).

This one operation keeps more than its input: the attention's q, k and v, result and logsumexp, x, and fc1's result; and its
matrices where they were cast or joined. From the input alone all products and the attention would run twice, half as much
again of three quarters of a training step. Bytes a token, in half precision: 2·(6 E + M) + 4 H, input included. ``recompute``
of "mlp" leaves out M, for the product of fc1, that of "all" also x, q, k and v, 4 E, for proj's and theirs. Behind a fold its
result is kept, not the patches that it was added to; its gradients are those of fold.py, behind these.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tnt_fast import attention, reference
from tnt_fast.arguments import FOLD_SHAPES, transformer_shapes
from tnt_fast.kernels import attention as short
from tnt_fast.kernels import gelu as ending
from tnt_fast.kernels import norm, operation, product
from tnt_fast.kernels.fold import fold
from tnt_fast.kernels.fold import product as projecting
from tnt_fast.kernels.operation import Config, Copy, Launch, Operation, contiguous, launch, of_matrix, remembered, sharing
from tnt_fast.kernels.tile import gelu, gelu_gradient, load
from tnt_fast.kernels.totals import totals

MATRICES = ("proj_weight", "fc1_weight", "fc2_weight")  # and that of q, k and v
SCALES = ("attn_scale", "mlp_scale")
# of arguments what the products read, and the copies that are to be made before: if they may be made ``later``, else none
Reading = Callable[..., tuple[list[Any], list[Copy]]]


@dataclass(frozen=True, kw_only=True)
class Sizes(operation.Sizes):
    """Rows of M hidden channels, in tiles of COLUMNS of them, GROUPS a row."""

    M: int
    BLOCK: int
    COLUMNS: int
    GROUPS: int


@triton.jit
def _gelu_kernel(h_ptr, y_ptr, n_rows, Z: tl.constexpr):
    group, member = tl.program_id(0) % Z.GROUPS, tl.program_id(0) // Z.GROUPS
    col = group * Z.COLUMNS + tl.arange(0, Z.COLUMNS)
    for tile in range(member, tl.cdiv(n_rows, Z.BLOCK), tl.num_programs(0) // Z.GROUPS):
        row = tl.cast(tile, tl.int64) * Z.BLOCK + tl.arange(0, Z.BLOCK)
        mask = (row < n_rows)[:, None] & (col < Z.M)[None, :]
        a = gelu(load(h_ptr + row[:, None] * Z.M, col[None, :], mask), Z.FAST)  # [BLOCK, COLUMNS]
        tl.store(y_ptr + row[:, None] * Z.M + col[None, :], a.to(Z.DTYPE), mask=mask)


@triton.jit
def _gelu_bwd_kernel(h_ptr, dh_ptr, a_ptr, sums_ptr, n_rows, Z: tl.constexpr):
    """GELU(h), its derivative times dh in the place of dh, and a program's sums of those over its rows."""
    group, member = tl.program_id(0) % Z.GROUPS, tl.program_id(0) // Z.GROUPS
    col = group * Z.COLUMNS + tl.arange(0, Z.COLUMNS)
    real = col < Z.M
    total = tl.full((Z.BLOCK, Z.COLUMNS), 0.0, tl.float32)
    for tile in range(member, tl.cdiv(n_rows, Z.BLOCK), tl.num_programs(0) // Z.GROUPS):
        row = tl.cast(tile, tl.int64) * Z.BLOCK + tl.arange(0, Z.BLOCK)
        mask = (row < n_rows)[:, None] & real[None, :]
        start = row[:, None] * Z.M
        dh = load(dh_ptr + start, col[None, :], mask)
        h = load(h_ptr + start, col[None, :], mask)  # [BLOCK, COLUMNS]
        a, dh = gelu_gradient(h, dh, Z.FAST, False, tl.float32, tl.float16 == Z.DTYPE)
        total += dh
        tl.store(dh_ptr + start + col[None, :], dh.to(Z.DTYPE), mask=mask)
        if a_ptr is not None:
            tl.store(a_ptr + start + col[None, :], a.to(Z.DTYPE), mask=mask)
    if sums_ptr is not None:
        tl.store(sums_ptr + tl.cast(member, tl.int64) * Z.M + col, tl.sum(total, 0), mask=real)


@remembered
def _specialise(kernel: Any, dtype: torch.dtype, M: int) -> Launch:
    columns = min(256, triton.next_power_of_2(M))
    config = Config(norm.VALUES // columns, warps=1, per_sm=16)  # 32 values a thread, as norm.py has it
    sizes = Sizes.computed(dtype, M=M, BLOCK=config.rows, COLUMNS=columns, GROUPS=-(-M // columns))
    return Launch(kernel, {"Z": sizes}, config, config.rows / sizes.GROUPS)


def _activating(rows: int, M: int, dtype: torch.dtype, device: torch.device, again: bool) -> Callable[[Tensor], Tensor]:
    """GELU of contiguous matrices; PyTorch's waits longer for the error function than for memory. ``again``: of a plan."""
    spec = _specialise(_gelu_kernel, dtype, M)
    grid = sharing(spec, rows, device) * spec.constants["Z"].GROUPS
    spec = spec.again() if again else spec

    def activated(h: Tensor) -> Tensor:
        result = torch.empty_like(h)
        launch(spec, grid, h, result, rows)
        return result

    return activated


def _gelu(h: Tensor) -> Tensor:
    return _activating(*h.shape, h.dtype, h.device, again=False)(h)


def _gelu_backward(h: Tensor, dh: Tensor, has_result: bool, has_sums: bool) -> tuple[Tensor | None, Tensor | None]:
    """``dh`` becomes the gradient of h; if asked for, GELU(h), and what ``totals`` adds up: of dh over its rows."""
    spec = _specialise(_gelu_bwd_kernel, h.dtype, h.shape[1])
    each = sharing(spec, h.shape[0], h.device)
    result = torch.empty_like(h) if has_result else None
    sums = torch.empty(each, h.shape[1], dtype=torch.float32, device=h.device) if has_sums else None
    launch(spec, each * spec.constants["Z"].GROUPS, h, dh, result, sums, h.shape[0])
    return result, sums


class Outer(Operation):
    """The outer transformer; its limits are those of a LayerNorm's row."""

    twin = staticmethod(reference.outer)
    activations = ("patch", "pixel")
    factors = ("attn_scale", "mlp_scale")
    together = (("qk_bias", "v_bias"),)
    shapes = dict(patch="B T E", attn_scale="B", mlp_scale="B", pixel="P S C") | transformer_shapes("E")
    shapes |= {f"fold_{name}": shape for name, shape in FOLD_SHAPES.items()}
    limits = {"E": norm.WIDEST, "B*T": operation.MOST_ROWS}

    def prepare(self, given: dict[str, Any]) -> dict[str, Any]:
        if given["pixel"] is None:  # the reference reads none of these, then
            given |= dict.fromkeys(reference.FoldWeights._fields)
        if given["fold_norm2_weight"] is None:
            given["fold_norm2_bias"] = None
        return super().prepare(given)

    def unsupported(self, sizes: Mapping[str, Any]) -> list[str]:
        of_fold = fold.unsupported(sizes) if "P" in sizes else []
        return super().unsupported(sizes) + [reason.replace("norm1_weight", "fold_norm1_weight") for reason in of_fold]

    def wrong_values(self, given: Mapping[str, Any], device: torch.device, sizes: Mapping[str, int] | None = None) -> list[str]:
        needed = ("fold_norm1_weight", "fold_proj_weight") if given.get("pixel") is not None else ()
        missing = [f"{name} is None; it is needed" for name in needed if given[name] is None]
        return missing or super().wrong_values(given, device, sizes)

    def multiply_adds(self, a: SimpleNamespace) -> int:
        B, T, E = a.patch
        return B * T * (4 * E * E + 2 * E * a.weights.fc1_weight[0] + 2 * T * E) + (0 if a.pixel is None else E * prod(a.pixel))

    def backward_multiply_adds(self, a: SimpleNamespace) -> int:
        """A product for each side of every product, the attention's first one again, and what ``recompute`` says."""
        (B, T, E), M = a.patch, a.weights.fc1_weight[0]
        of_fold = 0 if a.pixel is None else fold.backward_multiply_adds(_of_fold(a, a.fold_weights.fold_proj_weight))
        again = {"none": 0, "mlp": M * E, "all": (M + 4 * E) * E}[a.recompute]
        of_outer = B * T * (4 * E * E + 2 * E * M + 2 * T * E)
        return 2 * of_outer + B * T * (T * E + again) + of_fold

    def numbers(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        sizes, reasons = super().numbers(given)
        if given.get("recompute", "none") not in reference.RECOMPUTE:
            reasons.append(f"recompute={given['recompute']!r}; accepted: {', '.join(map(repr, reference.RECOMPUTE))}")
        return sizes, reasons

    def unread(self, a: Mapping[str, Any]) -> str | None:
        """Behind a fold: its result is kept in the place of what it was added to."""
        graded = any(a[name] is not None and a[name].requires_grad for name in SCALES)
        return None if graded or not _folds(a["pixel"]) else "patch"

    def keeps(self, a: SimpleNamespace) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        (B, T, E), dtype, w = a.patch.shape, a.patch.dtype, a.weights
        found = {"attended": ((B * T, E), dtype), "logsumexp": ((B, a.num_heads, T), torch.float32)}
        if a.recompute != "all":
            found |= {"x": ((B * T, E), dtype), "qkv": ((B * T, 3 * E), dtype)}
        if a.recompute == "none":
            found["hidden"] = (B * T, w.fc1_weight.shape[0]), dtype
        if _folds(a.pixel):
            found["folded"] = (B * T, E), dtype
        found["qkv_weight"] = (3 * E, E), dtype
        cast = {name: x for name, x in _matrices(a).items() if x.dtype != dtype}
        return found | {name: (tuple(x.shape), dtype) for name, x in cast.items()}

    def prepared(self, a: SimpleNamespace) -> Callable[[SimpleNamespace, Tensor], None]:
        read, launched = self.halves(a)
        return lambda a, out: launched(a, out, read(a)[0])

    def halves(self, a: SimpleNamespace, normalised: bool = False) -> tuple[Reading, Callable[..., None]]:
        """What is ``prepared``: what finds the weights that its products read, and what launches it, given those as well.

        ``normalised``: of pixels that the fold's first LayerNorm was made of, where ``takes_normed`` says so.
        """
        if self._are_few(a):
            return self._prepared_few(a)
        (B, T, E), dtype, eps, M = a.patch.shape, a.patch.dtype, a.eps, a.weights.fc1_weight.shape[0]
        recorded, folds = a.kept is not None, _folds(a.pixel)
        normed, normed_then = (norm.prepared(B * T, E, dtype, again=True) for _ in range(2))
        if folds:
            projected, cast_weight = _projecting(a, normalised)
            added = norm.adding(a.patch.shape, dtype, eps)
        read = _reading(a, dtype, recorded, folds and cast_weight)
        attended_by = _attending(a, recorded)
        activated = _activating(B * T, M, dtype, a.patch.device, again=True)
        ends = ending.takes(B * T, E, M, dtype, a.patch.device)
        multiplied = ending.prepared(B * T, E, M, dtype, a.patch.device) if ends else None
        sums = a.attn_scale is None and ending.takes_sum(B * T, E, M, dtype, a.patch.device)
        summed = ending.summed(B * T, E, M, dtype, a.patch.device, eps) if sums else None
        by_tanh = dtype == torch.bfloat16 and a.weights.fc1_bias is not None and not recorded and not ends

        def run(a: SimpleNamespace, out: Tensor, found: list[Any]) -> None:
            w, f, attn_scale, mlp_scale, kept = a.weights, a.fold_weights, a.attn_scale, a.mlp_scale, a.kept
            attn_bias = w.proj_bias if attn_scale is None else None
            qkv_weight, proj_weight, fc1_weight, fc1_bias, fc2_weight, fold_proj_weight = found
            rest = out.view(B * T, E)
            x = torch.empty_like(rest) if recorded or sums else rest  # what the MLP reads; kept
            if folds:
                folded = torch.empty_like(out) if recorded else x.view(out.shape)
                z = projected(_to(a.pixel, dtype), f, fold_proj_weight)
                second = f.fold_proj_bias, f.fold_norm2_weight, f.fold_norm2_bias
                weights = norm.Weights(*second, w.norm1_weight, w.norm1_bias, attn_bias)
                h = added(z, weights, a.patch, folded, x if recorded else None)
            else:
                h = normed(a.patch.contiguous().view(B * T, E), w.norm1_weight, w.norm1_bias, eps, x, attn_bias)
            qkv = F.linear(h, qkv_weight, _qkv_bias(w, dtype))
            attended, logsumexp = attended_by(qkv)
            if recorded:
                kept.update(x=x, attended=attended, logsumexp=logsumexp, qkv=qkv, qkv_weight=qkv_weight)
                kept.update(proj_weight=proj_weight, fc1_weight=fc1_weight, fc2_weight=fc2_weight)
                if folds:
                    kept.update(fold_proj_weight=fold_proj_weight, folded=folded.view(B * T, E))
            later, has_hidden, hidden = w.fc2_bias if mlp_scale is None else None, recorded and a.recompute == "none", None
            if summed is not None:
                weights = ending.SumWeights(proj_weight, later, w.norm2_weight, w.norm2_bias, fc1_weight, fc1_bias)
                hidden, h = summed(attended.contiguous(), x, rest, weights, has_hidden)
            else:
                _add(x, attended, proj_weight, w.proj_bias, attn_scale)
                h = normed_then(x, w.norm2_weight, w.norm2_bias, eps, rest, later)
                if by_tanh:
                    h = torch._addmm_activation(fc1_bias, h, fc1_weight.t(), use_gelu=True)
                elif multiplied is not None:
                    hidden, h = multiplied(h, fc1_weight, fc1_bias, has_hidden)
                else:
                    hidden = F.linear(h, fc1_weight, fc1_bias)
                    h = activated(hidden)
            if recorded:
                kept["hidden"] = hidden
            del hidden
            _add(rest, h, fc2_weight, w.fc2_bias, mlp_scale)

        return read, run

    def takes_normed(self, a: SimpleNamespace) -> bool:
        """Whether the forward has a launch for the fold's first LayerNorm, over all values of a patch."""
        return _folds(a.pixel) and len(a.fold_weights.fold_norm1_weight) == prod(a.pixel.shape[1:]) and not _is_one_launch(a)

    def _are_few(self, a: SimpleNamespace) -> bool:
        """Whether product.py computes what is behind a LayerNorm: nothing recorded or scaled, and the shapes that it trusts."""
        (B, T, E), w = a.patch.shape, a.weights
        if a.kept is not None or a.attn_scale is not None or a.mlp_scale is not None:
            return False
        if not product.takes(B * T, E, max(3 * E, len(w.fc1_weight)), a.patch.dtype):
            return False
        return w.fc1_weight.shape[1] == E and (w.fc1_bias is None or len(w.fc1_bias) == len(w.fc1_weight))

    def _prepared_few(self, a: SimpleNamespace) -> tuple[Reading, Callable[..., None]]:
        """Six launches with fold, five without: a LayerNorm, and what follows it, are one."""
        (B, T, E), dtype, eps, folds = a.patch.shape, a.patch.dtype, a.eps, _folds(a.pixel)
        rows = B * T

        def of_qkv(w: Any, f: Any) -> product.Weights:
            found = product.Weights(w.qk_weight, w.qk_bias, w.v_weight, w.v_bias, w.norm1_weight, w.norm1_bias, w.proj_bias)
            second = dict(shift=f.fold_proj_bias, sum_weight=f.fold_norm2_weight, sum_bias=f.fold_norm2_bias)
            return found._replace(**second) if folds else found

        def of_fc1(w: Any) -> product.Weights:
            return product.Weights(w.fc1_weight, w.fc1_bias, None, None, w.norm2_weight, w.norm2_bias, w.fc2_bias)

        projected, is_cast = _projecting(a) if folds else (None, False)
        joint = product.prepared(rows, dtype, of_qkv(a.weights, a.fold_weights), eps, tokens=T if folds else 0)
        attended_by = _attending(a, recorded=False)
        begun = product.prepared(rows, dtype, of_fc1(a.weights), eps, gelu=True)

        def read(a: SimpleNamespace, later: bool = False) -> tuple[list[Any], list[Copy]]:
            w, f, copies = a.weights, a.fold_weights, []
            found = _cast((w.proj_weight, w.fc2_weight, f.fold_proj_weight if is_cast else None), dtype, copies)
            return found, _left(copies, later)

        def run(a: SimpleNamespace, out: Tensor, found: list[Any]) -> None:
            w, f, rest = a.weights, a.fold_weights, out.view(rows, E)
            x, weights, (proj_weight, fc2_weight, fold_weight) = torch.empty_like(rest), of_qkv(w, f), found
            if projected is None:
                h = joint(weights, a.patch.contiguous(), x)
            else:
                h = joint(weights, projected(_to(a.pixel, dtype), f, fold_weight), x, a.patch)
            x.addmm_(attended_by(h)[0], proj_weight.t())
            rest.addmm_(begun(of_fc1(w), x, rest), fc2_weight.t())

        return read, run

    def backward(self, gradient: Tensor, a: SimpleNamespace, needed: set[str]) -> dict[str, Tensor]:
        """By PyTorch where the gradient of a scale is asked for."""
        if needed & {*SCALES}:
            return self.recomputed(gradient, a, needed)
        parts: dict[tuple[str, ...], Tensor] = {}
        found = self.begun(gradient, a, needed, parts)
        return totals(parts, a.weights.norm2_weight.dtype) | found

    def begun(
        self,
        gradient: Tensor,
        a: SimpleNamespace,
        needed: set[str],
        parts: dict[tuple[str, ...], Tensor],
        rest: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Nothing before the first that is needed; some of them ``totals`` finds in what is left in ``parts``.

        ``rest``: a gradient of the pixels that theirs is added to.
        """
        (B, T, E), w, kept = a.patch.shape, contiguous(a.weights), a.kept
        patch = kept["folded"] if "folded" in kept else a.patch.contiguous().view(B * T, E)
        attended, x, h1, matrix_dtype = kept["attended"], kept.get("x"), None, w.fc1_weight.dtype
        if x is None:
            x = torch.empty_like(patch)
            later = w.proj_bias if a.attn_scale is None else None
            h1 = norm.forward(patch, w.norm1_weight, w.norm1_bias, a.eps, x, later)
            _add(x, attended, _matrix(a, "proj_weight"), w.proj_bias, a.attn_scale)
        found: dict[str, Any] = {}

        def branch(gradient: Tensor, scale: Tensor | None) -> Tensor:
            return gradient if scale is None else (gradient.view(B, T, E) * _factors(scale, gradient)).view(B * T, E)

        def begun(
            dh: Tensor, name: str, h: Any, r: Tensor, layer: str, out: Tensor | None, weight: bool, rest: Any, *biases: str,
            added: norm.Added | None = None,
        ) -> Any:  # fmt: skip
            """Of a product with LN(r): into ``out``, if it is there, the gradient of r; returned, if asked for, the matrix's.

            ``h``: LN(r), if it is there. ``biases``: whose gradients the sums behind those of LN are.
            """
            names = f"{layer}_weight", f"{layer}_bias", *biases
            scale, shift = (getattr(w, each) for each in names[:2])
            if out is not None:
                y = torch.empty_like(r) if weight and h is None else None
                sums = parts[names] = norm.partial_sums(r, len(names), added is not None)
                g = (dh @ _matrix(a, name)).view(1, B * T, E)
                norm.backward(g, r, scale, a.eps, out, sums, rest=rest, y=y, bias=shift, added=added)
                h = y if h is None else h
            elif weight and h is None:
                h = norm.forward(r, scale, shift, a.eps)
            return of_matrix(dh, h, matrix_dtype) if weight else None  # type: ignore[arg-type]

        dy = _to(gradient, x.dtype).contiguous().view(B * T, E)
        d, dx = branch(dy, a.mlp_scale), None
        if before := needed - {"fc2_bias"}:
            hidden, h2 = kept.get("hidden"), None
            if hidden is None:
                h2 = norm.forward(x, w.norm2_weight, w.norm2_bias, a.eps)
                hidden = F.linear(h2, _matrix(a, "fc1_weight"), _to(w.fc1_bias, x.dtype))
            if before == {"fc2_weight"}:
                found["fc2_weight"] = of_matrix(d, _gelu(hidden), matrix_dtype)
        if before := before - {"fc2_weight"}:
            fc2_weight, asked = _matrix(a, "fc2_weight"), ("fc2_weight" in needed, "fc1_bias" in needed)
            if ending.takes(B * T, *fc2_weight.shape, d.dtype, d.device):
                dh, activated, sums = ending.backward(d, fc2_weight, hidden, *asked)
            else:
                dh = d @ fc2_weight
                activated, sums = _gelu_backward(hidden, dh, *asked)
            if sums is not None:
                parts["fc1_bias",] = sums
            del hidden
            if activated is not None:
                found["fc2_weight"] = of_matrix(d, activated, matrix_dtype)
                del activated
            before -= {"fc1_weight", "fc1_bias"}
            dx = torch.empty_like(x) if before else None
            found["fc1_weight"] = begun(
                dh, "fc1_weight", h2, x, "norm2", dx, "fc1_weight" in needed, dy, "proj_bias", "fc2_bias"
            )  # fmt: skip
            del dh, h2
        if "fc2_bias" in needed and (dx is None or a.mlp_scale is not None):
            found["fc2_bias"] = d.sum(0, dtype=w.fc2_bias.dtype)

        if before := before - {"norm2_weight", "norm2_bias"}:
            d = branch(dx, a.attn_scale)  # type: ignore[arg-type]
            if "proj_weight" in needed:
                found["proj_weight"] = of_matrix(d, attended, matrix_dtype)
            if "proj_bias" in needed and a.attn_scale is not None:
                found["proj_bias"] = d.sum(0, dtype=w.proj_bias.dtype)
        if before := before - {"proj_weight", "proj_bias"}:
            qkv = kept["qkv"] if h1 is None else F.linear(h1, _matrix(a, "qkv_weight"), _qkv_bias(w, x.dtype))
            shape = B, T, a.num_heads, E // a.num_heads
            dh, heads = (d @ _matrix(a, "proj_weight")).view(shape), qkv.view(B, T, 3, *shape[2:])
            if short.attends_backward(T, shape[3], x.dtype, x.device):
                dh = short.backward(dh, heads, attended.view(shape), kept["logsumexp"])
            else:
                given = attended.view(shape), kept["logsumexp"]
                dh = torch.stack(attention.attend_backward(dh, *heads.unbind(2), *given), 2)
            dh = dh.view(B * T, 3 * E)
            del heads, qkv
            if before & {"qk_bias", "v_bias"}:
                found["qk_bias"], found["v_bias"] = dh.sum(0, dtype=w.qk_bias.dtype).split((2 * E, E))
            before -= {"qk_bias", "v_bias"}
            deeper = before - {"qk_weight", "v_weight"}
            found["patch"], of_qkv = dx.view(B, T, E), None
            of_fold = {name.removeprefix("fold_"): name for name in deeper if name == "pixel" or name.startswith("fold_")}

            def first(added: norm.Added | None = None, summed: tuple[str, ...] = ()) -> None:
                nonlocal of_qkv
                given = dh, "qkv_weight", h1, patch, "norm1", dx if deeper else None, before > deeper, dx
                of_qkv = begun(*given, *[f"fold_{name}" for name in summed], added=added)

            # LN₁'s backward and that of the fold's second norm, row by row of the same tokens, in one launch
            joint = of_fold and a.fold_weights.fold_norm2_weight is not None and _folds(a.pixel) and a.pixel.dtype == x.dtype
            if not joint:
                first()
            if of_fold:
                matrix = _matrix(a, "fold_proj_weight") if _folds(a.pixel) else a.fold_weights.fold_proj_weight
                summed: dict[tuple[str, ...], Tensor] = {}
                given = found["patch"], _of_fold(a, matrix), {*of_fold}, matrix_dtype, summed, rest
                behind = fold.begun(*given, first if joint else None)
                found |= {of_fold[name]: x for name, x in behind.items() if name in of_fold}
                parts |= {tuple([f"fold_{name}" for name in names]): x for names, x in summed.items()}
            if of_qkv is not None:
                found["qk_weight"], found["v_weight"] = of_qkv.split((2 * E, E))
        return found


def _folds(pixel: Tensor | None) -> bool:
    return pixel is not None and pixel.shape[0] > 0


def _is_one_launch(a: SimpleNamespace) -> bool:
    """Whether product.py has the product of the fold within, and its first LayerNorm."""
    f, (P, S, C) = a.fold_weights, a.pixel.shape
    whole = a.kept is None and len(f.fold_norm1_weight) == S * C
    return whole and product.takes(P, S * C, len(f.fold_proj_weight), a.patch.dtype)


def _projecting(a: SimpleNamespace, normalised: bool = False) -> tuple[Callable[[Tensor, Any, Any], Tensor], bool]:
    """What makes W · LN(pixel) of the fold within, and whether in that it is given the matrix; product.py has one.

    ``normalised``: of LN(pixel).
    """
    f, dtype, P = a.fold_weights, a.patch.dtype, a.pixel.shape[0]
    width = f.fold_norm1_weight.shape[0]
    if normalised:
        return lambda pixel, f, weight: torch.mm(pixel.view(P, -1), weight.t()), True
    if not _is_one_launch(a):
        projected = projecting(a.pixel.shape, width, dtype, a.eps)
        return lambda pixel, f, weight: projected(pixel, f.fold_norm1_weight, f.fold_norm1_bias, weight), True

    def weights(f: Any) -> product.Weights:
        return product.Weights(f.fold_proj_weight, None, None, None, f.fold_norm1_weight, f.fold_norm1_bias)

    multiplied = product.prepared(P, dtype, weights(f), a.eps)
    return lambda pixel, f, _: multiplied(weights(f), pixel.contiguous()), False


def _attending(a: SimpleNamespace, recorded: bool) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    """Attention of rows of q, k and v, (B·T, 3 E), and if ``recorded`` its logsumexp: a kernel of ours, or PyTorch's."""
    (B, T, E), H = a.patch.shape, a.num_heads
    if short.attends(B, T, H, E // H, a.patch.dtype, a.patch.device):
        return short.prepared(B, T, H, a.patch.dtype, recorded)

    def attended(qkv: Tensor) -> tuple[Tensor, Tensor | None]:
        heads = qkv.view(B, T, 3, H, E // H)
        if recorded:
            found, logsumexp = attention.attend_recorded(*heads.unbind(2))
        else:
            found, logsumexp = attention.attend_joined(heads), None
        return found.reshape(B * T, E), logsumexp

    return attended


def _reading(a: SimpleNamespace, dtype: torch.dtype, whole: bool, folds: bool) -> Reading:
    """Of matrices, that of q, k and v first, a fold's last, and fc1's bias, in a dtype. ``whole``: of q, k and v no view, which
    cannot be kept."""
    joins = not whole and a.weights.qk_weight.dtype == a.weights.v_weight.dtype == dtype
    E = a.patch.shape[2]

    def read(a: SimpleNamespace, later: bool = False) -> tuple[list[Any], list[Copy]]:
        w, f, copies = a.weights, a.fold_weights, []
        pair = w.qk_weight, w.v_weight
        if joins and not (later and _apart(*pair)):
            qkv_weight = joined(*pair)
        else:
            qkv_weight = w.v_weight.new_empty((3 * E, E), dtype=dtype)
            copies += map(_copy, pair, qkv_weight.split_with_sizes((2 * E, E)))
        found = w.proj_weight, w.fc1_weight, w.fc1_bias, w.fc2_weight, f.fold_proj_weight if folds else None
        return [qkv_weight, *_cast(found, dtype, copies)], _left(copies, later)

    return read


def _copy(source: Tensor, ptr: Tensor) -> Copy:
    return Copy(source, ptr, source.numel())


def _cast(found: tuple[Any, ...], dtype: torch.dtype, copies: list[Copy]) -> list[Any]:
    """Weights, or None, in a dtype: those that have another one as ``copies``, which are to be made."""
    result = [x if x is None or x.dtype == dtype else torch.empty_like(x, dtype=dtype) for x in found]
    copies += [_copy(x, y) for x, y in zip(found, result, strict=True) if y is not x]
    return result


def _left(copies: list[Copy], later: bool) -> list[Copy]:
    """Of copies those that are made ``later``, if they are of one dtype; all others now, in one launch."""
    if not copies or (later and len({copy.source.dtype for copy in copies}) == 1):
        return copies
    torch._foreach_copy_([copy.ptr for copy in copies], [copy.source for copy in copies])
    return []


def _matrices(a: SimpleNamespace) -> dict[str, Tensor]:
    """But that of q, k and v."""
    found = {name: getattr(a.weights, name) for name in MATRICES}
    return found if not _folds(a.pixel) else found | {"fold_proj_weight": a.fold_weights.fold_proj_weight}


def _matrix(a: SimpleNamespace, name: str) -> Tensor:
    """Of what the forward read: what it kept, or a weight as it is."""
    return a.kept[name] if name in a.kept else contiguous(_matrices(a)[name])


def _of_fold(a: SimpleNamespace, proj_weight: Any) -> SimpleNamespace:
    """The arguments of the fold within, with its matrix as the forward read it."""
    weights = {name.removeprefix("fold_"): x for name, x in a.fold_weights._asdict().items()}
    return SimpleNamespace(pixel=a.pixel, patch=a.patch, eps=a.eps, **weights | {"proj_weight": proj_weight})


def _apart(first: Tensor, second: Tensor) -> bool:
    """Whether two contiguous tensors do not lie one behind the other in one memory."""
    behind = second.data_ptr() == first.data_ptr() + first.nbytes and first.dtype == second.dtype
    return not behind or first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()


def joined(first: Tensor, second: Tensor) -> Tensor:
    """What has the rows of both, contiguous tensors; a copy where they lie apart."""
    if _apart(first, second):
        return torch.cat((first, second))
    return first.as_strided((first.shape[0] + second.shape[0], *first.shape[1:]), first.stride())


def _add(onto: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> None:
    """The end of a branch; where it is not scaled, its bias is there already."""
    if scale is None:
        onto.addmm_(h, weight.t())
    else:
        images = scale.shape[0], -1, onto.shape[1]
        onto.view(images).addcmul_(F.linear(h, weight, _to(bias, h.dtype)).view(images), _factors(scale, h))


def _qkv_bias(w: Any, dtype: torch.dtype) -> Tensor | None:
    return None if w.qk_bias is None else _to(joined(w.qk_bias, w.v_bias), dtype)


def _to(x: Tensor | None, dtype: torch.dtype) -> Any:
    return x if x is None or x.dtype == dtype else x.to(dtype)


def _factors(scale: Tensor, like: Tensor) -> Tensor:
    return _to(scale, like.dtype).view(-1, 1, 1)


outer = Outer()
"""``reference.outer``, fused; called like that."""
