"""What computes the outer attention: PyTorch's fused attention, xformers', or plain products and a softmax.

"auto" is "sdpa" on the fused path and "eager" on the reference path, whose bits are timm's.
"""

from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tnt_fast import reference

BACKENDS = ("auto", "sdpa", "xformers", "eager")
# cuDNN's is 1.4 times as fast as FlashAttention 2 at 197 tokens and heads of 64 channels on an H200, forward and backward
# (benchmarks/results, library/attention); PyTorch by itself tries it last
_FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
]  # fmt: skip
_takes_cudnn: dict[tuple, bool] = {}


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


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """softmax(q kᵀ / √D) v of ``(B, T, H, D)`` each, by one of ``BACKENDS`` but "auto": ``(B, T, H, D)``."""
    if backend == "xformers":
        return xformers()[0].memory_efficient_attention(q, k, v)
    if backend == "sdpa":
        return sdpa(q, k, v)
    B, T, H, D = q.shape
    weights = reference.attention_weights(torch.stack((q, k), 2).reshape(B, T, 2 * H * D), H)
    return reference.attend(weights, v.reshape(B, T, H * D)).reshape(B, T, H, D)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As ``attend``, by PyTorch's ``scaled_dot_product_attention``, the fastest kernel of it that takes these."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if not q.is_cuda or q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    if torch.compiler.is_compiling():
        with sdpa_kernel(_FASTEST_FIRST, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    known = (q.shape, q.stride(), q.dtype, q.device)
    if known not in _takes_cudnn:
        given = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
        hopper = torch.version.hip is None and torch.cuda.get_device_capability(q.device) >= (9, 0)
        _takes_cudnn[known] = hopper and torch.backends.cuda.can_use_cudnn_attention(given)
    if _takes_cudnn[known]:  # by its name: to set the priority costs the host more than the call
        needed = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, needed)[0].transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
