"""What every fused operation shares on the host: what it reads, checks, registration with PyTorch, launching.

An operation is registered as ``torch.ops.tnt_fast.NAME`` by ``torch.library.custom_op``, so that ``torch.compile``,
``torch.export`` and FlopCounterMode see one node. Its backward is another one, ``NAME_backward``, which starts again from the
inputs: nothing else is kept.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from tnt_fast.kernels.tile import Launch

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
MOST_ROWS = 2**30  # patches or tokens of a call: the kernels count them, and a turn more, in 32 bits


class Gpu:
    """What runs the kernels: Triton's launcher, on a GPU. All that depends on the machine is asked of ``runner``."""

    on_cpu = False  # takes CPU tensors, slowly, to test the kernels: only where backend="fused" asks for it
    nvidia = torch.version.hip is None  # compiled for NVIDIA: the fast forms of tile.py, TF32, Launch.mma_arch

    def capability(self, device: torch.device | None = None) -> tuple[int, int] | None:
        """Compute capability of a device, or of the current one; None where it has none."""
        return torch.cuda.get_device_capability(device) if self.nvidia else None

    def programs(self, device: torch.device, per_sm: int) -> int:
        """How many programs run at once, at ``per_sm`` a multiprocessor."""
        return per_sm * torch.cuda.get_device_properties(device).multi_processor_count

    def shared_memory(self, device: torch.device) -> int | None:
        """Bytes that a program can have on the chip; None where that is not limited."""
        if device.type != "cuda":
            return None
        return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 1 << 17)

    def launch(self, kernel: Any, grid: int, arguments: Sequence[Any], constants: dict, options: dict) -> None:
        """Launch on the current stream of the device of the first argument, a tensor."""
        with torch.cuda.device_of(arguments[0]):
            kernel[(grid,)](*arguments, **constants, **options)


class Interpreter(Gpu):
    """Triton's interpreter (TRITON_INTERPRET=1)."""

    on_cpu = True
    nvidia = False

    def programs(self, device: torch.device, per_sm: int) -> int:
        return 3  # a few, so that programs do take several turns

    def shared_memory(self, device: torch.device) -> int | None:
        return None

    def launch(self, kernel: Any, grid: int, arguments: Sequence[Any], constants: dict, options: dict) -> None:
        kernel[(grid,)](*arguments, **constants)  # which knows no options


runner = Interpreter() if triton.knobs.runtime.interpret else Gpu()


class Argument(NamedTuple):
    """A tensor that an operation reads.

    ``shape`` names the size of each axis, as in "P S C", "2*C C" or "1 C 7 7"; the first tensor with a letter alone on an axis
    sets it, all others are held to it. ``optional``: None may stand for it. ``activation``: autocast casts it; one behind the
    first may have any of ``DTYPES``.
    """

    name: str
    shape: str
    optional: bool = False
    activation: bool = False


class Description(NamedTuple):
    """What an operation reads: its errors and the model's reasons against it are both made from this.

    ``arguments``: its tensors; the first names dtype and device of the computation. ``limits(sizes)``: reasons against sizes by
    their names. ``numbers(given)``: the sizes that its other arguments set, and reasons against those. ``together``: names of
    tensors that are given or left out together.
    """

    name: str
    arguments: tuple[Argument, ...]
    limits: Callable[[dict[str, Any]], list[str]]
    numbers: Callable[[Mapping[str, Any]], tuple[dict[str, Any], list[str]]] = lambda given: ({}, [])
    together: tuple[str, ...] = ()

    def check(self, given: Mapping[str, Any]) -> None:
        """Raise unless the kernels take these arguments, by name; the weights may be float32, as under autocast.

        Raises:
            TypeError: a dtype. ValueError: a device, a shape, a number, a tensor that is missing; each with what is accepted.
        """
        name = self.arguments[0].name
        first = given[name]
        if first is None:
            raise ValueError(f"{self.name}: {name} is None; it is needed")
        if first.dtype in DTYPES and not first.is_cuda and not runner.on_cpu:
            raise ValueError(
                f"{self.name}: {name} is on device {str(first.device)!r}; the kernel takes CUDA tensors "
                "(on the CPU only in Triton's interpreter, TRITON_INTERPRET=1)"
            )
        if found := self.wrong_types(given, first.dtype, autocast=True):
            raise TypeError(f"{self.name}: {'; '.join(found)}")
        if found := self.wrong_values(given, first.device):
            raise ValueError(f"{self.name}: {'; '.join(found)}")

    def prepare(self, *tensors: Tensor | None) -> list[Tensor | None]:
        """The tensors, in the order of ``arguments``, as the operation takes them.

        Activations in autocast's dtype where it is on; weights as they are, the kernels round them on loading.

        Raises:
            TypeError: what is no tensor; autocast is off, and the dtypes differ. ValueError: a needed one is None.
            NotImplementedError: a tensor carries a tangent of forward-mode differentiation or is a torch.func transform's.
        """
        for argument, x in zip(self.arguments, tensors, strict=True):
            if x is None and not argument.optional:
                raise ValueError(f"{self.name}: {argument.name} is None; it is needed")
            if x is not None and not isinstance(x, Tensor):
                raise TypeError(f"{self.name}: {argument.name} is a {type(x).__name__}; accepted: torch.Tensor")
        if not torch.compiler.is_compiling():
            given = [x for x in tensors if x is not None]
            dual = forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in given)
            if dual or any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in given):
                raise NotImplementedError(
                    f"{self.name}: the kernels have no forward-mode derivatives and no batching rule (dual tensors, "
                    f"torch.func); take tnt_fast.reference.{self.name}, or a model with backend='reference'"
                )
        kind = tensors[0].device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)  # autocast leaves float64 as it is
            return [
                x.to(dtype) if argument.activation and x.dtype in DTYPES else x
                for argument, x in zip(self.arguments, tensors, strict=True)
            ]
        found = self.wrong_types(dict(zip([a.name for a in self.arguments], tensors, strict=True)), tensors[0].dtype, False)
        if found:
            raise TypeError(f"{self.name}: {'; '.join(found)}")
        return list(tensors)

    def wrong_types(self, given: Mapping[str, Any], dtype: torch.dtype, autocast: bool) -> list[str]:
        """Reasons against the dtypes of those tensors that are given, for a computation in ``dtype``."""
        first = self.arguments[0].name
        if dtype not in DTYPES:
            return [f"{first} is {dtype}; accepted: {', '.join(map(str, DTYPES))}"]
        found = []
        for name, _, _, mixed in self.arguments:  # two activations of two dtypes give a result in the wider one
            tensor = given.get(name)
            if tensor is None or tensor.dtype == dtype or (autocast and tensor.dtype == torch.float32):
                continue
            if mixed and tensor.dtype in DTYPES:
                continue
            accepted = ", ".join(map(str, DTYPES)) if mixed else f"{dtype}, or torch.float32 under autocast"
            found.append(f"{name} is {tensor.dtype}, {first} is {dtype}; accepted: {accepted}")
        return found

    def wrong_values(self, given: Mapping[str, Any], device: torch.device, sizes: Mapping[str, int] | None = None) -> list[str]:
        """Reasons against all else that is given; without the activations, ``sizes`` holds their sizes."""
        first = self.arguments[0].name
        numbers, found = self.numbers(given)
        if found:
            return found
        sizes = {**(sizes or {}), **numbers}
        known = True
        for name, shape, optional, _ in self.arguments:
            if name not in given:
                continue
            tensor = given[name]
            if tensor is None:
                if not optional:
                    found.append(f"{name} is None; it is needed")
                    known = False
                continue
            if tensor.device != device:
                found.append(f"{name} is on {str(tensor.device)!r}, {first} on {str(device)!r}; move one")
            if tensor.layout != torch.strided:
                found.append(f"{name} is laid out as {tensor.layout}; accepted: torch.strided")
            axes, actual = shape.split(), tuple(tensor.shape)
            known = known and len(axes) == len(actual)
            if len(axes) == len(actual):
                for axis, size in zip(axes, actual, strict=True):
                    if axis.isalpha():
                        sizes.setdefault(axis, size)
            expected = tuple([_size(axis, sizes) for axis in axes])
            if actual != expected:
                found.append(f"{name} has shape {actual}; expected ({', '.join(map(str, expected))}{',' * (len(axes) == 1)})")
        if len({given.get(name) is None for name in self.together}) > 1:
            found.append(f"{' and '.join(self.together)} are given or left out together")
        return self.limits(sizes) + found if known else found


def wrong_eps(given: Mapping[str, Any]) -> list[str]:
    """A reason against an eps that is no number."""
    eps = given["eps"]
    return [] if isinstance(eps, (int, float)) else [f"eps={eps!r}; accepted: a number"]


def _size(axis: str, sizes: Mapping[str, int]) -> int | str:
    """The size that "C", "7" or "2*C" stands for; the text itself where a size is not known."""
    factors = [int(factor) if factor.isdigit() else sizes.get(factor) for factor in axis.split("*")]
    return axis if None in factors else prod(factors)


def zeros_for_none(bias: Tensor | None, weight: Tensor) -> Tensor:
    """The bias of a norm as a kernel reads it: contiguous, and zeros where there is none."""
    return torch.zeros_like(weight, memory_format=torch.contiguous_format) if bias is None else bias.contiguous()


def precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: as PyTorch's ``torch.backends.cuda.matmul`` says."""
    if dtype != torch.float32 or not runner.nvidia:
        return "ieee"
    matmul = torch.backends.cuda.matmul  # asked for allow_tf32 where fp32_precision was set, newer versions raise
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def is_fast(dtype: torch.dtype) -> bool:
    """Whether the approximations of tile.py are used: half precision, compiled for an NVIDIA GPU."""
    return dtype != torch.float32 and runner.nvidia


def programs(device: torch.device, turns: int, per_sm: int) -> int:
    """Size of the grid of a persistent kernel: what fits on the device at once, at most one program a turn."""
    return min(turns, runner.programs(device, per_sm))


def start(spec: Launch, grid: int, *arguments: Any) -> None:
    """Launch a specialisation; ``arguments`` are its pointers, integers and floats in order, the first a tensor."""
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    capability = runner.capability(arguments[0].device) if spec.mma_arch else None
    if capability is not None and capability[0] >= 9:
        options["arch"] = spec.mma_arch
    runner.launch(spec.kernel, grid, arguments, spec.constants, options)


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

    @functools.wraps(gradients)  # with its signature, from which torch.library makes the schema
    def without_autocast(gradient: Tensor, *arguments: Any) -> list[Tensor]:
        # autocast has chosen the dtypes in the forward; in a backward that runs under it, it must not do so again
        with torch.autocast(gradient.device.type, enabled=False):
            return gradients(gradient, *arguments)

    backward_operation = torch.library.custom_op(f"tnt_fast::{name}_backward", without_autocast, mutates_args=())

    @backward_operation.register_fake
    def _(gradient, *arguments):
        *tensors, needed = arguments
        return [torch.empty(tensors[i].shape, dtype=tensors[i].dtype, device=tensors[i].device) for i in needed]

    def setup_context(ctx, inputs, output):
        kept = [x if isinstance(x, Tensor) and i != like_gradient else None for i, x in enumerate(inputs)]
        ctx.save_for_backward(*kept)
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]

    def backward(ctx, gradient):
        batched = (torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor)
        if not torch.compiler.is_compiling() and any(is_batched(gradient) for is_batched in batched):
            raise NotImplementedError(
                f"the backward of {name} takes one gradient, not a batch (is_grads_batched, vectorize=True, torch.func.vmap); "
                "compute them one by one, or take a model with backend='reference'"
            )
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
