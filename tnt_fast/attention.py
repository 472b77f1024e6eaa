"""What computes the outer attention: PyTorch's fused attention, xformers', or plain products and a softmax.

"auto" is "sdpa" on the fused path and "eager" on the reference path, whose bits are timm's.
"""

from functools import cache
from importlib import import_module
from typing import Any

import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("auto", "sdpa", "xformers", "eager")


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


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str = "sdpa") -> Tensor:
    """softmax(q kᵀ / √D) v of ``(B, T, H, D)`` each, by "sdpa" or "xformers": ``(B, T, H, D)``.

    PyTorch chooses among its kernels: on Hopper cuDNN's, in half precision.
    """
    if backend == "xformers":
        return xformers()[0].memory_efficient_attention(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
