"""What every fused operation shares on the host: checks, registration with PyTorch, launching.

An operation is registered as ``torch.ops.tnt_fast.NAME`` by ``torch.library.custom_op``, so that ``torch.compile``,
``torch.export`` and FlopCounterMode see one node. Its backward recomputes through the operation's reference: correct, not fast.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tnt_fast.kernels.tile import Launch

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
INTERPRETED = triton.knobs.runtime.interpret


def check_tensors(operation: str, **tensors: Tensor | None) -> None:
    """Raise unless all tensors lie on one device that the kernels run on and have dtypes that they take.

    The first tensor is the activation that names the dtype of the computation; the others have it, too, or, under autocast,
    float32.
    """
    (first, activation), *others = tensors.items()
    if activation.dtype not in DTYPES:
        raise TypeError(f"{operation}: {first} is {activation.dtype}; accepted: {', '.join(map(str, DTYPES))}")
    if not activation.is_cuda and not INTERPRETED:
        raise ValueError(
            f"{operation}: {first} is on device {str(activation.device)!r}; the kernel takes CUDA tensors "
            "(on the CPU only in Triton's interpreter, TRITON_INTERPRET=1)"
        )
    for name, tensor in others:
        if tensor is None:
            continue
        if tensor.device != activation.device:
            raise ValueError(
                f"{operation}: {name} is on {str(tensor.device)!r}, {first} on {str(activation.device)!r}; move one"
            )
        if tensor.dtype not in (activation.dtype, torch.float32):
            raise TypeError(
                f"{operation}: {name} is {tensor.dtype}, {first} is {activation.dtype}; "
                f"accepted: {activation.dtype}, or torch.float32 under autocast"
            )


def check_shape(operation: str, name: str, tensor: Tensor | None, *shape: int) -> None:
    """Raise ValueError unless ``tensor`` is None or has this shape."""
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{operation}: {name} has shape {tuple(tensor.shape)}; expected {shape}")


def under_autocast(*activations: Tensor) -> tuple[Tensor, ...]:
    """The activations in autocast's dtype where it is on; weights stay as they are, the kernels round them on loading."""
    kind = activations[0].device.type
    if not torch.is_autocast_enabled(kind):
        return activations
    return tuple(x.to(torch.get_autocast_dtype(kind)) if x.is_floating_point() else x for x in activations)


def precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: as PyTorch's ``torch.backends.cuda.matmul`` says."""
    if dtype != torch.float32 or INTERPRETED:
        return "ieee"
    matmul = torch.backends.cuda.matmul  # asked for allow_tf32 where fp32_precision was set, newer versions raise
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def is_fast(dtype: torch.dtype) -> bool:
    """Whether the approximations of tile.py are used: half precision, compiled for an NVIDIA GPU."""
    return dtype != torch.float32 and not INTERPRETED and torch.version.hip is None


def programs(device: torch.device, turns: int, per_sm: int) -> int:
    """Size of the grid of a persistent kernel: what fits on the device at once, at most one program a turn."""
    if device.type != "cuda":
        return min(turns, 3)  # the interpreter: a few, so that programs do take several turns
    return min(turns, per_sm * torch.cuda.get_device_properties(device).multi_processor_count)


def start(spec: Launch, grid: int, *arguments: Any) -> None:
    """Launch a specialisation on the current device's stream; ``arguments`` are its pointers, integers and floats in order."""
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    names = {name: value for name, value in spec.constants.items()}
    options = {} if INTERPRETED else {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    if device.type == "cuda":
        if spec.mma_arch and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9:
            options["arch"] = spec.mma_arch
        with torch.cuda.device(device):
            spec.kernel[(grid,)](*arguments, **names, **options)
    else:
        spec.kernel[(grid,)](*arguments, **names, **options)


def register(
    name: str,
    function: Callable[..., Tensor],
    empty: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    count: Callable[..., int],
) -> Callable[..., Tensor]:
    """Register ``function`` as ``torch.ops.tnt_fast.NAME``.

    Args:
        function: checks, allocates and launches; annotated with the types that torch.library understands; tensors first.
        empty: same arguments; a tensor like the result, for tracing.
        reference: same arguments, plain PyTorch; recomputed, it gives the gradients.
        count: multiply-adds from the shapes of the tensors and the values of the other arguments.
    """
    operation = torch.library.custom_op(f"tnt_fast::{name}", function, mutates_args=())

    operation.register_fake(empty)

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]

    def backward(ctx, gradient):
        tensors = ctx.saved_tensors
        needed = [i for i, wanted in enumerate(ctx.needs_input_grad) if wanted]
        dtypes = {x.dtype for x in tensors if x is not None}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # mixed under autocast
        with torch.enable_grad(), torch.autocast(gradient.device.type, enabled=False):
            inputs = [None if x is None else x.detach().to(dtype).requires_grad_(i in needed) for i, x in enumerate(tensors)]
            result = reference(*(other if x is None else x for x, other in zip(inputs, ctx.others, strict=True)))
            found = torch.autograd.grad(result, [inputs[i] for i in needed], gradient.to(dtype))
        gradients: list[Tensor | None] = [None] * len(tensors)
        for i, g in zip(needed, found, strict=True):
            gradients[i] = g.to(tensors[i].dtype)
        return tuple(gradients)

    operation.register_autograd(backward, setup_context=setup_context)
    packet = getattr(torch.ops.tnt_fast, name)

    @register_flop_formula(packet)
    def _(*args, out_shape=None, **kwargs):
        return 2 * count(*args)

    return operation
