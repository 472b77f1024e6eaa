"""What every fused operation shares on the host: checks, registration with PyTorch, launching.

An operation is registered as ``torch.ops.tnt_fast.NAME`` by ``torch.library.custom_op``, so that ``torch.compile``,
``torch.export`` and FlopCounterMode see one node. Its backward is another one, ``NAME_backward``, which starts again from the
inputs: nothing else is kept.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
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
    options = {} if INTERPRETED else {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    nvidia = device.type == "cuda" and torch.version.hip is None
    if spec.mma_arch and nvidia and torch.cuda.get_device_capability(device)[0] >= 9:
        options["arch"] = spec.mma_arch
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        spec.kernel[(grid,)](*arguments, **spec.constants, **options)


def register(
    name: str,
    function: Callable[..., Tensor],
    empty: Callable[..., Tensor],
    count: Callable[..., int],
    gradients: Callable[..., list[Tensor]],
    like_gradient: int | None = None,
) -> Callable[..., Tensor]:
    """Register ``function`` as ``torch.ops.tnt_fast.NAME``, and its gradients as ``NAME_backward``.

    Args:
        function: checks, allocates and launches; annotated with the types that torch.library understands; tensors first.
        empty: same arguments; a tensor like the result, for tracing.
        count: multiply-adds from the shapes of the tensors and the values of the other arguments.
        gradients: ``gradients(gradient, *arguments of function, needed)``, annotated alike: the gradients of the arguments
            whose positions ``needed: list[int]`` names, in that order, each new, contiguous, in its argument's dtype.
        like_gradient: position of an argument whose values ``gradients`` does not read, of the gradient's shape: it is not
            kept for the backward, the gradient stands in for it.
    """
    operation = torch.library.custom_op(f"tnt_fast::{name}", function, mutates_args=())
    operation.register_fake(empty)
    backward_operation = torch.library.custom_op(f"tnt_fast::{name}_backward", gradients, mutates_args=())

    @backward_operation.register_fake
    def _(gradient, *arguments):
        *tensors, needed = arguments
        return [torch.empty(tensors[i].shape, dtype=tensors[i].dtype, device=tensors[i].device) for i in needed]

    def setup_context(ctx, inputs, output):
        kept = [x if isinstance(x, Tensor) and i != like_gradient else None for i, x in enumerate(inputs)]
        ctx.save_for_backward(*kept)
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]

    def backward(ctx, gradient):
        needed = [i for i, wanted in enumerate(ctx.needs_input_grad) if wanted]
        arguments = [other if x is None else x for x, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
        if like_gradient is not None:
            arguments[like_gradient] = gradient
        found = backward_operation(gradient, *arguments, needed)
        result: list[Tensor | None] = [None] * len(arguments)
        for i, g in zip(needed, found, strict=True):
            result[i] = g
        return tuple(result)

    operation.register_autograd(backward, setup_context=setup_context)

    @register_flop_formula(getattr(torch.ops.tnt_fast, name))
    def _(*args, out_shape=None, **kwargs):
        return 2 * count(*args)

    @register_flop_formula(getattr(torch.ops.tnt_fast, f"{name}_backward"))
    def _(gradient, *args, out_shape=None, **kwargs):
        return 6 * count(*args[:-1])  # the forward again, and a product for each side of every product

    return operation


def recomputed(reference: Callable[..., Tensor], gradient: Tensor, arguments: Sequence[Any], needed: list[int]) -> list[Tensor]:
    """Gradients by PyTorch, through the reference: for what a kernel does not take.

    Raises:
        RuntimeError: inside of a TorchDispatchMode, where torch.func records nothing.
    """
    if torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode):
        raise RuntimeError(
            f"the kernels do not take these gradients of {reference.__name__} (tnt_fast.why_not_fused(model, image, "
            "gradients=True) says why), and PyTorch cannot compute them inside of a TorchDispatchMode such as FlopCounterMode; "
            "there, set model.backend = 'reference'"
        )
    tensors = [x if isinstance(x, Tensor) else None for x in arguments]
    dtypes = {x.dtype for x in tensors if x is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # mixed under autocast
    inputs = [None if x is None else x.to(dtype) for x in tensors]

    def of_needed(*given: Tensor) -> Tensor:
        full = list(inputs)
        for i, x in zip(needed, given, strict=True):
            full[i] = x
        return reference(*(other if x is None else x for x, other in zip(full, arguments, strict=True)))

    _, pull = torch.func.vjp(of_needed, *(inputs[i] for i in needed))
    return [g.to(tensors[i].dtype, copy=True).contiguous() for i, g in zip(needed, pull(gradient.to(dtype)), strict=True)]
