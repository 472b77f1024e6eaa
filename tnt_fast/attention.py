"""What computes the outer attention: PyTorch's fused attention, xformers', or plain products and a softmax.

"auto" is "sdpa" on the fused path, which has a kernel of its own in the place of PyTorch's (kernels/attention.py) where that is
faster. On the reference path it is "eager", whose bits are timm's, but where ``only_infers``: "sdpa" there, too, with q, k and
v in one product of oneDNN's where MKL is slow.
"""

import platform
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend

from tnt_fast.arguments import is_watched

BACKENDS = ("auto", "sdpa", "xformers", "eager")
IN_A_ROW = 192  # channels that MKL adds up at once; of 384 at once oneDNN's error is 1.4 times as large


def check_backend(backend: str) -> None:
    """Raise ValueError for anything but one of ``BACKENDS``, or for xformers where it does not load."""
    if backend not in BACKENDS:
        raise ValueError(f"attn_backend={backend!r} is unknown; accepted: {', '.join(map(repr, BACKENDS))}")
    if backend == "xformers" and (reason := xformers()[1]):
        raise ValueError(f"attn_backend='xformers' cannot run: {reason}; take 'auto', 'sdpa' or 'eager'")


@cache
def xformers() -> tuple[Any, str | None]:
    """The module xformers.ops, or why there is none."""
    try:
        return import_module("xformers.ops"), None
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"xformers does not load here ({(str(error).splitlines() or ['?'])[0]})"


def only_infers(x: Tensor) -> bool:
    """Whether ``x`` is in float32 on a CPU, outside of autocast, and nobody records or watches what is computed of it."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or forward_ad._current_level >= 0 or is_watched():
        return False
    return type(x) is Tensor and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def has_onednn(weight: Tensor) -> bool:
    """Whether oneDNN computes a product with this weight here."""
    available = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    if not available or weight.device.type != "cpu" or weight.layout != torch.strided:
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if weight.dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return weight.dtype == torch.float32


@cache
def mkl_is_fast() -> bool:
    """Whether ``F.linear`` is MKL's, as fast as oneDNN: on Intel's CPUs; on an AMD with AVX-512 it has half the speed."""
    if not torch.backends.mkl.is_available():
        return False
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:  # not on Linux
        return "GenuineIntel" in platform.processor()


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False, plus: Tensor | None = None) -> Tensor:
    """``F.linear`` by oneDNN, with GELU, or the sum with ``plus``, behind it; without gradients.

    ``weight`` in rows: oneDNN is very slow in another layout.
    """
    product = torch.ops.mkldnn._linear_pointwise
    if plus is not None:
        return product.binary(x, plus, weight, bias, "add")
    return product.default(x, weight, bias, "gelu" if gelu else "none", [], "none")


def mkl_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False, plus: Tensor | None = None) -> Tensor:
    """As ``onednn_linear``, by MKL; GELU and the sum are in place, and ``plus`` holds what is returned.

    New pages take a CPU longer than what is written there.
    """
    if plus is not None:
        rows = plus.view(-1, len(weight))
        (rows if bias is None else rows.add_(bias)).addmm_(x.view(-1, x.shape[-1]), weight.t())
        return plus
    x = F.linear(x, weight, bias)
    return torch.ops.aten.gelu_(x) if gelu else x


def linears(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> tuple[Tensor, ...]:
    """``F.linear`` of ``x`` by each of the weights, by oneDNN in one product; without gradients, no less exact than MKL's."""
    rows = [len(weight) for weight in weights]
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat([x.new_zeros(n) if b is None else b for n, b in zip(rows, biases, strict=True)])
    parts = -(-x.shape[-1] // IN_A_ROW)
    out: Tensor | None = None
    for part, *columns in zip(x.chunk(parts, -1), *(weight.chunk(parts, 1) for weight in weights), strict=True):
        out = onednn_linear(part.contiguous(), torch.cat(columns), bias if out is None else None, plus=out)
    assert out is not None
    return out.split(rows, dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str = "sdpa") -> Tensor:
    """softmax(q kᵀ / √D) v of ``(B, T, H, D)`` each, by "sdpa" or "xformers": ``(B, T, H, D)``.

    PyTorch chooses among its kernels: on Hopper cuDNN's, in half precision.
    """
    if backend == "xformers":
        return xformers()[0].memory_efficient_attention(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attend_joined(qkv: Tensor) -> Tensor:
    """``attend`` by "sdpa", of q, k and v in one tensor ``(B, T, 3, H, D)``, in fewer steps."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _backend(q: Tensor, k: Tensor, v: Tensor) -> SDPBackend:
    """Which of PyTorch's kernels ``scaled_dot_product_attention`` takes here on a GPU; MATH: products and a softmax.

    So are kernels that would pad the heads, do not take wide ones' gradients everywhere, or are not PyTorch's own; and the one
    that PyTorch calls efficient, which it takes in float32, and in half precision only where the two others are switched off.
    On a CPU, which is for tests, all are; for one token, where only products find gradients of 0, and NaN where one came in;
    and in float32, whose gradients by PyTorch's kernels are less accurate than those of a softmax (``attend_recorded``).
    """
    if not q.is_cuda or q.shape[-2] == 1 or q.dtype == torch.float32:
        return SDPBackend.MATH
    found = SDPBackend(torch._fused_sdp_choice(q, k, v))
    known = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    return found if found in known and q.shape[-1] in range(0, 193, 8) else SDPBackend.MATH


def attend_recorded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``attend`` by "sdpa", and log Σ exp(q kᵀ / √D), ``(B, H, T)`` in float32: what ``attend_backward`` asks for.

    These two are for an operation with a backward of its own: autograd would keep the same. Which kernel computes each of them
    is PyTorch's choice, the two need not agree, and the backwards of some add in no fixed order unless
    ``torch.use_deterministic_algorithms`` is on.

    The backwards of PyTorch's kernels, autograd's too, find the probabilities again as exp(score − logsumexp): off by its
    rounding, eps·|logsumexp|, which a softmax divides out. And they take gradient·out for ΣP·dP, which does not cancel dP to
    the bit where values are alike. The former is seen in float32 only: there a score of 1,000 costs three digits of the
    gradients. Products and a softmax are as exact as the reference.
    """
    aten = torch.ops.aten
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    match _backend(q, k, v):
        case SDPBackend.FLASH_ATTENTION:
            out, logsumexp = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
        case SDPBackend.CUDNN_ATTENTION:
            out, logsumexp = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]  # (B, H, T, 1)
        case _:
            scores = _scores(q, k)
            logsumexp = scores.logsumexp(-1)
            out = scores.softmax(-1).to(v.dtype) @ v
    return out.transpose(1, 2).contiguous(), logsumexp.flatten(2).contiguous()


def attend_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from that of ``out``; all but ``logsumexp`` are ``(B, T, H, D)``."""
    aten, T = torch.ops.aten, q.shape[1]
    gradient, q, k, v, out = (x.transpose(1, 2) for x in (gradient, q, k, v, out))
    match _backend(q, k, v):
        case SDPBackend.FLASH_ATTENTION:
            state = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
            found = aten._scaled_dot_product_flash_attention_backward(
                gradient, q, k, v, out, logsumexp, None, None, T, T, 0.0, False, state, state[0]
            )
        case SDPBackend.CUDNN_ATTENTION:
            state = torch.empty((), dtype=torch.int64, device=q.device)
            found = aten._scaled_dot_product_cudnn_attention_backward(
                gradient, q, k, v, out, logsumexp[..., None], state, state, None, None, None, T, T, 0.0, False
            )
        case _:
            weights = _scores(q, k).softmax(-1)
            of_weights = (gradient @ v.transpose(-2, -1)).float()
            of_scores = aten._softmax_backward_data(of_weights, weights, -1, torch.float32)
            scores = (of_scores * q.shape[-1] ** -0.5).to(q.dtype)
            found = (scores @ k, scores.transpose(-2, -1) @ q, weights.to(q.dtype).transpose(-2, -1) @ gradient)
    d_q, d_k, d_v = (x.transpose(1, 2) for x in found[:3])
    return d_q, d_k, d_v


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q kᵀ / √D in float32."""
    return (q @ k.transpose(-2, -1)).float() * q.shape[-1] ** -0.5
