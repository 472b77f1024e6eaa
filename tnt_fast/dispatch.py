"""The one choice between the fused kernels and the reference, and the one error message.

``TNT.backend`` is "auto", "fused" or "reference". ``why_not_fused`` collects every reason against the fused path in one
list, which answers whether it can be taken (the list is empty), why not, and what the error says.

The fused path reads weights past the submodules. So whatever can be done to a submodule and is expected to matter (a
replaced Linear, a hook, active dropout, a foreign norm or activation, mixed dtypes) is a reason, never a silent difference.
Drop-path is none: its factors are drawn outside the kernels, the same numbers on both paths.
"""

import warnings
from types import ModuleType

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from tnt_fast import kernels

BACKENDS = ("auto", "fused", "reference")
OPERATIONS = ("pixel_embed", "inner", "fold", "outer")
REQUIRED = ("pixel_embed", "inner", "fold")  # an operation outside of these runs through its modules where it has no kernel

_warned: set[tuple[str, ...]] = set()


def check_backend(backend: str) -> None:
    """Raise ValueError for anything but one of ``BACKENDS``."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; accepted: {', '.join(map(repr, BACKENDS))}")


def kernel(operation: str) -> ModuleType | None:
    """The kernel module of an operation, or None where this version has none."""
    return kernels.OPERATIONS.get(operation)


def choose(model: nn.Module, image: Tensor, warn: bool = True) -> bool:
    """True: this forward takes the fused path. False: the reference; "auto" then warns, once per set of reasons.

    Raises:
        ValueError: ``model.backend`` is unknown.
        RuntimeError: it is "fused" and the fused path cannot be taken; all reasons are named.
    """
    backend = model.backend
    check_backend(backend)
    if backend == "reference":
        return False
    reasons = _machine_reasons(image, backend)
    if backend == "fused" or not reasons:  # the model is only looked through where it can matter
        reasons = reasons + _model_reasons(model, image)
    if not reasons:
        if warn and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _warn("computes gradients with PyTorch: ", _gradient_reasons(model, image))
        return True
    if backend == "fused":
        raise RuntimeError(
            "backend='fused' cannot run:\n"
            + "".join([f"  - {reason}\n" for reason in reasons])
            + "Remove these reasons, or take backend='auto' (falls back with a warning) or 'reference' (--backend)."
        )
    if warn and not torch.compiler.is_compiling():
        _warn("takes the reference path: ", reasons)
    return False


def _warn(what: str, reasons: list[str]) -> None:
    """Warn once per set of reasons."""
    if reasons and tuple(reasons) not in _warned:
        _warned.add(tuple(reasons))
        text = f"tnt_fast {what}" + "; ".join(reasons) + ". (model.backend = 'reference' silences this.)"
        warnings.warn(text, stacklevel=5)


def why_not_fused(model: nn.Module, image: Tensor | None = None, gradients: bool = False) -> list[str]:
    """Every reason why ``model(image)`` would not take the fused path; an empty list if it would.

    Args:
        model: a ``tnt_fast.TNT``.
        image: ``(B, channels, height, width)``; None: only what does not depend on it is considered.
        gradients: also why the gradients of an operation would come from PyTorch although its forward is fused: the backward
            kernels take fewer sizes.
    """
    reasons = _machine_reasons(image, model.backend) + _model_reasons(model, image)
    return reasons + _gradient_reasons(model, image) if gradients else reasons


def _gradient_reasons(model: nn.Module, image: Tensor | None) -> list[str]:
    """Why PyTorch computes the gradients of an operation that is fused."""
    like = model.cls_token if image is None else image
    dtype, kind = like.dtype, like.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    sizes = model.sizes()
    return [
        f"{name}: {reason}"
        for name, module in kernels.OPERATIONS.items()
        for reason in module.gradients_unsupported(sizes, dtype, like.device)
    ]


def _machine_reasons(image: Tensor | None, backend: str) -> list[str]:
    """What stands against any kernel, whatever the model."""
    if isinstance(image, torch.fx.Proxy):
        return ["torch.fx traces the model symbolically; a traced graph holds the reference's operations"]
    missing = [name for name in REQUIRED if name not in kernels.OPERATIONS]
    reasons = [f"this version has no fused kernel for {', '.join(missing)}"] if missing else []
    reasons.extend(kernels.unsupported())
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        reasons.append("a torch.func transform is active, and the kernels' gradients are torch.autograd's; use 'reference'")
    if kernels.INTERPRETED and backend == "auto":
        reasons.append("Triton interprets the kernels here (TRITON_INTERPRET=1), slowly; only backend='fused' does that")
    if image is not None and not image.is_cuda and not kernels.INTERPRETED:
        reasons.append(f"the image is on device {str(image.device)!r}; the kernels take CUDA tensors")
    return reasons


def _model_reasons(model: nn.Module, image: Tensor | None) -> list[str]:
    """What was done to the model, and the limits of the kernels for its sizes."""
    reasons: list[str] = []
    dtypes: set[torch.dtype] = set()
    _check_modules("", model, _STEM, reasons, dtypes)
    for i, block in enumerate(model.blocks):
        if block.has_inner:
            _check_modules(f"blocks.{i}.", block, _BLOCK, reasons, dtypes)
    reasons.extend(_dtype_reasons(dtypes, image))
    conv = model.pixel_embed.proj
    if not reasons and (conv.padding, conv.dilation, conv.groups) != ((3, 3), (1, 1), 1):
        reasons.append("pixel_embed.proj has other padding, dilation or groups than TNT's; the kernels take 3, 1 and 1")
    if not reasons:  # the sizes of a model that was changed are not to be relied on
        for name, module in kernels.OPERATIONS.items():
            reasons.extend([f"{name}: {reason}" for reason in module.unsupported(model.sizes())])
    return reasons


def _dtype_reasons(dtypes: set[torch.dtype], image: Tensor | None) -> list[str]:
    """The weights that the kernels read share one dtype with the image; under autocast the operations cast by themselves."""
    names = ", ".join(sorted([str(dtype) for dtype in dtypes]))
    if len(dtypes) > 1:
        return [f"the parameters have mixed dtypes ({names}); cast them with model.to(dtype)"]
    if isinstance(image, Tensor) and dtypes and image.dtype not in dtypes and not torch.is_autocast_enabled(image.device.type):
        return [f"the image is {image.dtype}, the parameters are {names}; cast one of them"]
    return []


def _split(*expected: tuple[str, type | str]) -> tuple[tuple[str, str, str, type | str], ...]:
    """With each path its parent's name, or "", and its own."""
    return tuple((path, *path.rpartition(".")[::2], cls) for path, cls in expected)


# The submodules that the fused path does not call, and the classes whose mathematics the kernels compute instead.
_STEM = _split(
    ("pixel_embed.proj", nn.Conv2d), ("norm1_proj", nn.LayerNorm), ("proj", nn.Linear), ("norm2_proj", nn.LayerNorm),
)  # fmt: skip
_BLOCK = _split(
    ("norm_in", nn.LayerNorm), ("attn_in", "Attention"), ("attn_in.qk", nn.Linear), ("attn_in.v", nn.Linear),
    ("attn_in.attn_drop", nn.Dropout), ("attn_in.proj", nn.Linear), ("attn_in.proj_drop", nn.Dropout),
    ("norm_mlp_in", nn.LayerNorm), ("mlp_in", Mlp), ("mlp_in.fc1", nn.Linear), ("mlp_in.act", nn.GELU),
    ("mlp_in.drop1", nn.Dropout), ("mlp_in.norm", nn.Identity), ("mlp_in.fc2", nn.Linear), ("mlp_in.drop2", nn.Dropout),
    ("norm1_proj", nn.LayerNorm), ("proj", nn.Linear), ("norm2_proj", nn.LayerNorm), ("drop_path", DropPath),
)  # fmt: skip


def _check_modules(prefix: str, owner: nn.Module, expected: tuple, reasons: list[str], dtypes: set[torch.dtype]) -> None:
    """Add what was done to the submodules of ``owner`` that the fused path would pass over, and their weights' dtypes.

    It runs at every forward, so it touches each submodule once, past ``Module.__getattr__``, which is slow, and puts names
    together only where there is a reason.
    """
    replaced = "none"  # a container that is not what it was: its children are not looked at
    eps = {}
    children = owner._modules
    for path, parent, name, cls in expected:
        if parent and parent == replaced:
            continue
        module = (children[parent]._modules if parent else children).get(name)
        kind = type(module)
        if kind is not cls and not (
            (path == "norm2_proj" and module is None)  # legacy
            or (path == "drop_path" and kind is nn.Identity)
            or (cls == "Attention" and kind.__name__ == cls and kind.__module__ == "tnt_fast.tnt")
        ):
            wanted = cls if isinstance(cls, str) else cls.__name__
            reasons.append(f"{prefix}{path} is a {kind.__module__}.{kind.__qualname__}; the kernels compute {wanted}")
            replaced = path
            continue
        if module is None:
            continue
        if kind is nn.LayerNorm:
            if module.weight is None or module.bias is None:
                reasons.append(f"{prefix}{path} lacks weight or bias; the kernels take LayerNorms with both")
            eps[path] = module.eps
        elif kind is nn.GELU and module.approximate != "none":
            reasons.append(f"{prefix}{path} approximates GELU by {module.approximate}; the kernels compute approximate='none'")
        elif kind is nn.Dropout and module.p > 0 and module.training:
            reasons.append(
                f"{prefix}{path} drops with p={module.p} in training; inside the kernels there is drop-path only (set p to 0)"
            )
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            reasons.append(f"{prefix}{path} has hooks that the kernels would pass over; remove them, or hook the block")
        if "forward" in module.__dict__:
            reasons.append(f"{prefix}{path}.forward was replaced on the instance; the kernels would pass it over")
        for name, weight in module._parameters.items():
            kind = type(weight).__name__
            if weight is not None and kind != "DTensor":  # FSDP's, which is a plain parameter by the time its block runs
                dtypes.add(weight.dtype)
                if type(weight) not in (nn.Parameter, Tensor) and kind != "FakeTensor":  # torch.export's stand-in
                    reasons.append(f"{prefix}{path}.{name} is a {type(weight).__name__}; the kernels take plain parameters")
    for first, second in (("norm_in", "norm_mlp_in"), ("norm1_proj", "norm2_proj")):
        if first in eps and second in eps and eps[first] != eps[second]:
            reasons.append(f"{prefix}{first} and .{second} have eps {eps[first]} and {eps[second]}; the kernels take one")
