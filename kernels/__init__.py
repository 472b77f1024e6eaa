"""Fused Triton operations of TNT, imported as ``tnt_fast.kernels`` only.

One file an operation: forward, backward, registration, and beside them ``unsupported(...)``, the limits of that
operation. ``OPERATIONS`` maps an operation's name (``pixel_embed``, ``inner``, ``fold``, ``outer``) to its module, which
has the function of that name, with the signature of its twin in ``tnt_fast.reference``, ``DESCRIPTION``, what it reads and
what stands against it, ``unsupported(sizes)``, the part of that which depends on sizes as ``TNT.sizes()`` gives them, and
``gradients_unsupported(sizes, dtype, device)``, the reasons why PyTorch computes their gradients. Nothing here knows the model.
"""

from importlib.util import find_spec
from types import ModuleType

import torch

if __name__ != "tnt_fast.kernels":
    raise ImportError(f"the folder kernels/ of tnt_fast was imported as {__name__!r}; import it as 'tnt_fast.kernels'")

HAS_TRITON = find_spec("triton") is not None
OPERATIONS: dict[str, ModuleType] = {}


def on_cpu() -> bool:
    """Whether the kernels run on the CPU here, slowly, to test them: in Triton's interpreter (TRITON_INTERPRET=1)."""
    return HAS_TRITON and operation.runner.on_cpu


def unsupported() -> list[str]:
    """Why no kernel at all can run on this machine; empty if some can."""
    if on_cpu():
        return []
    reasons = []
    if not HAS_TRITON:
        reasons.append("Triton is not installed; the kernels need it (Linux: pip install triton)")
    if not torch.cuda.is_available():
        reasons.append("torch sees no GPU (torch.cuda.is_available() is False); the kernels run on a CUDA or ROCm device")
    elif HAS_TRITON and not torch.compiler.is_compiling():  # which cannot trace the question
        capability = operation.runner.capability()
        if capability is not None and capability < (8, 0):
            major, minor = capability
            reasons.append(f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}; the kernels need 8.0")
    return reasons


if HAS_TRITON:
    from tnt_fast.kernels import fold, inner, operation, pixel_embed

    OPERATIONS.update(pixel_embed=pixel_embed, inner=inner, fold=fold)
