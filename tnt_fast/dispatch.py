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
    reasons = _machine_reasons(image)
    if backend == "fused" or not reasons:  # the model is only looked through where it can matter
        reasons = reasons + _model_reasons(model, image)
    if not reasons:
        return True
    if backend == "fused":
        raise RuntimeError(
            "backend='fused' cannot run:\n"
            + "".join([f"  - {reason}\n" for reason in reasons])
            + "Remove these reasons, or take backend='auto' (falls back with a warning) or 'reference' (--backend)."
        )
    if warn and not torch.compiler.is_compiling() and tuple(reasons) not in _warned:
        _warned.add(tuple(reasons))
        warnings.warn(
            "tnt_fast takes the reference path: " + "; ".join(reasons) + ". (model.backend = 'reference' silences this.)",
            stacklevel=4,
        )
    return False


def why_not_fused(model: nn.Module, image: Tensor | None = None) -> list[str]:
    """Every reason why ``model(image)`` would not take the fused path; an empty list if it would.

    Args:
        model: a ``tnt_fast.TNT``.
        image: ``(B, channels, height, width)``; None: only what does not depend on it is considered.
    """
    return _machine_reasons(image) + _model_reasons(model, image)


def _machine_reasons(image: Tensor | None) -> list[str]:
    """What stands against any kernel, whatever the model."""
    if isinstance(image, torch.fx.Proxy):
        return ["torch.fx traces the model symbolically; a traced graph holds the reference's operations"]
    missing = [name for name in REQUIRED if name not in kernels.OPERATIONS]
    reasons = [f"this version has no fused kernel for {', '.join(missing)}"] if missing else []
    reasons.extend(kernels.unsupported())
    if image is not None and not image.is_cuda:
        reasons.append(f"the image is on device {str(image.device)!r}; the kernels take CUDA tensors")
    return reasons


def _model_reasons(model: nn.Module, image: Tensor | None) -> list[str]:
    """What was done to the model, and the limits of the kernels for its sizes."""
    reasons = _dtype_reasons(model, image)
    for name, module in _passed_over(model):
        reasons.extend(_module_reasons(name, module))
    reasons.extend(_eps_reasons("model", model))
    for i, block in enumerate(model.blocks):
        reasons.extend(_eps_reasons(f"blocks.{i}", block))
    if not reasons:  # the sizes of a model that was changed are not to be relied on
        for name, module in kernels.OPERATIONS.items():
            reasons.extend([f"{name}: {reason}" for reason in module.unsupported(model.sizes())])
    return reasons


def _dtype_reasons(model: nn.Module, image: Tensor | None) -> list[str]:
    """Weights and image share one dtype; under autocast the operations cast by themselves."""
    found = []
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) > 1:
        found.append(
            f"the parameters have mixed dtypes ({', '.join(sorted(map(str, dtypes)))}); cast them with model.to(dtype)"
        )
    for name, p in model.named_parameters():
        if type(p) is not nn.Parameter:
            found.append(f"{name} is a {type(p).__name__}; the kernels take plain parameters")
    if isinstance(image, Tensor) and dtypes and image.dtype not in dtypes and not torch.is_autocast_enabled(image.device.type):
        found.append(f"the image is {image.dtype}, the parameters are {', '.join(sorted(map(str, dtypes)))}; cast one of them")
    return found


# The classes whose mathematics the kernels compute, by the name of the submodule that they stand in for.
_COMPUTED = {
    "norm_in": "torch.nn.modules.normalization.LayerNorm",
    "attn_in": "tnt_fast.tnt.Attention",
    "qk": "torch.nn.modules.linear.Linear",
    "v": "torch.nn.modules.linear.Linear",
    "norm_mlp_in": "torch.nn.modules.normalization.LayerNorm",
    "mlp_in": "timm.layers.mlp.Mlp",
    "fc1": "torch.nn.modules.linear.Linear",
    "act": "torch.nn.modules.activation.GELU",
    "norm": "torch.nn.modules.linear.Identity",
    "fc2": "torch.nn.modules.linear.Linear",
    "norm1_proj": "torch.nn.modules.normalization.LayerNorm",
    "proj": "torch.nn.modules.linear.Linear",
    "norm2_proj": "torch.nn.modules.normalization.LayerNorm",
    "pixel_embed.proj": "torch.nn.modules.conv.Conv2d",
    "drop_path": "timm.layers.drop.DropPath",
}


def _passed_over(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The submodules, with their names, that the fused path does not call."""
    found = []
    for name in ("norm1_proj", "proj", "norm2_proj"):
        found.append((name, getattr(model, name)))
    for name, module in model.pixel_embed.named_modules(prefix="pixel_embed"):
        if name != "pixel_embed":
            found.append((name, module))
    for i, block in enumerate(model.blocks):
        for child in ("norm_in", "attn_in", "norm_mlp_in", "mlp_in", "norm1_proj", "proj", "norm2_proj", "drop_path"):
            if isinstance(getattr(block, child, None), nn.Module):
                found.extend(getattr(block, child).named_modules(prefix=f"blocks.{i}.{child}"))
    return found


def _module_reasons(name: str, module: nn.Module) -> list[str]:
    """What was done to one submodule that the fused path would pass over."""
    found = []
    cls = f"{type(module).__module__}.{type(module).__qualname__}"
    computed = _COMPUTED.get(name) or _COMPUTED.get(name.rpartition(".")[2])
    if computed and cls != computed and not (name.endswith("drop_path") and isinstance(module, nn.Identity)):
        found.append(f"{name} is a {cls}; the kernels compute {computed}")
    elif isinstance(module, nn.LayerNorm) and (module.weight is None or module.bias is None):
        found.append(f"{name} lacks weight or bias; the kernels take LayerNorms with both")
    elif isinstance(module, nn.GELU) and module.approximate != "none":
        found.append(f"{name} approximates GELU by {module.approximate}; the kernels compute approximate='none'")
    elif isinstance(module, nn.Dropout) and module.training and module.p > 0:
        found.append(f"{name} drops with p={module.p} in training; inside the kernels there is drop-path only (set p to 0)")
    elif isinstance(module, nn.Conv2d) and (module.padding, module.dilation, module.groups) != ((3, 3), (1, 1), 1):
        found.append(f"{name} has other padding, dilation or groups than TNT's; the kernels take 3, 1 and 1")
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        found.append(f"{name} has hooks that the kernels would pass over; remove them, or hook the block")
    if "forward" in module.__dict__:
        found.append(f"{name}.forward was replaced on the instance; the kernels would pass it over")
    return found


def _eps_reasons(name: str, module: nn.Module) -> list[str]:
    """The two LayerNorms of an operation share one eps."""
    found = []
    for first, second in (("norm_in", "norm_mlp_in"), ("norm1_proj", "norm2_proj")):
        eps = [getattr(getattr(module, norm, None), "eps", None) for norm in (first, second)]
        if None not in eps and eps[0] != eps[1]:
            found.append(f"{name}.{first} and .{second} have eps {eps[0]} and {eps[1]}; the kernels take one")
    return found
