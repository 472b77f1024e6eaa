"""The one choice between the fused kernels and the reference, and the one error message.

``TNT.backend`` is "auto", "fused" or "reference". ``why_not_fused`` collects every reason against the fused path in one
list, which answers whether it can be taken (the list is empty), why not, and what the error says.

The fused path reads weights past the submodules. So whatever can be done to a submodule and is expected to matter (a
replaced Linear, a hook, active dropout, a foreign norm or activation, mixed dtypes) is a reason, never a silent difference.
Drop-path is none: its factors are drawn outside the kernels, the same numbers on both paths.
"""

import warnings
from collections.abc import Callable
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks

from tnt_fast import kernels
from tnt_fast.reference import RECOMPUTE, by_name

BACKENDS = ("auto", "fused", "reference")
OPERATIONS = ("pixel_embed", "inner", "fold", "outer")  # of the flow; "block" is the last three
OLDEST = (8, 0)  # compute capability that the kernels are compiled and checked for
MOST_LOOKS = 64  # of one model: sizes of images, modes
REQUIRED = ("pixel_embed", "inner", "fold")  # an operation outside of these runs through its modules where it has no kernel

_warned: set[str] = set()
_END = object()


def check_backend(backend: str) -> None:
    """Raise ValueError for anything but one of ``BACKENDS``."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; accepted: {', '.join(map(repr, BACKENDS))}")


def check_recompute(recompute: str) -> None:
    """Raise ValueError for anything but one of ``reference.RECOMPUTE``."""
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute={recompute!r} is unknown; accepted: {', '.join(map(repr, RECOMPUTE))}")


def find_device(name: str | None = None) -> torch.device:
    """The device of this name ("cpu", "cuda:1"); of none: a GPU if torch sees one, else the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    present = ["cpu"]
    if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        present += [accelerator.type, *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if name not in present:
        hint = "" if len(present) > 1 else "; torch sees no GPU"
        raise ValueError(f"device={name!r:.100} is not here; accepted: {', '.join(present)}{hint}")
    return torch.device(name)


def kernel(operation: str) -> Any:
    """The fused operation of this name, or None where this version has none."""
    return kernels.OPERATIONS.get(operation)


class Chosen:
    """That a forward takes the fused path, and the operations that it calls as long as its model is what it was."""

    def __init__(self) -> None:
        self._settled: dict[tuple[Any, ...], Any] = {}

    def settled(self, operation: str, owner: Any, given: Callable[[], dict[str, Any]]) -> Any:
        """An operation with what its owner, a module, gives it besides what changes from call to call."""
        found = self._settled.get((operation, owner))
        if found is None:
            self._settled[operation, owner] = found = kernel(operation).settled(given(), looked_at=True)
        return found

    def block(self, block: Any, patch: Tensor) -> tuple[Any, Any]:
        """As ``settled``, for such patches: the block as one operation, and its outer transformer; None where not."""
        key = block, patch.dtype, patch.device
        found = self._settled.get(key)
        if found is None:
            outer = outer_arguments(block, patch)
            given = outer and dict(block=block_arguments(block, patch), outer=outer)
            settled = {name: kernel(name).settled(x, looked_at=True) for name, x in (given or {}).items() if x is not None}
            self._settled[key] = found = settled.get("block"), settled.get("outer")
        return found


class Look:
    """A model as it was when it took the fused path: a forward that finds it so again need not look through it.

    It belongs to that one model: its copies, and what is loaded, begin anew.
    """

    _hooks = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    _holders = ("_modules", "_parameters", "_buffers")
    _read = attrgetter("shape", "dtype", "device")
    _dtype: Any = Tensor.dtype.__get__  # type: ignore[attr-defined]
    _unread = {  # attributes of each module that no forward without hooks reads: nearly half of them
        "_non_persistent_buffers_set", "_is_full_backward_hook", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    }  # fmt: skip

    def __init__(self, met: bool = False) -> None:
        self.met = met  # before: the first forward may be the only one, as of DataParallel's copies
        self.chosen: dict[tuple, Chosen] = {}  # by what the choice depends on besides the model
        self._own: list[dict[str, Any]] = []

    def __repr__(self) -> str:
        return "Look()"

    def __deepcopy__(self, memo: Any) -> "Look":
        return Look()

    def __reduce__(self) -> tuple:
        return Look, ()

    def belongs_to(self, model: nn.Module) -> bool:
        return not self._own or vars(model) is self._own[0]

    def take(self, model: nn.Module) -> bool:
        """Remember each module's attributes, children and parameters; False where there are hooks, which may change them."""
        self._modules = [*model.modules()]
        own = [*map(vars, self._modules)]
        hooks = [*chain.from_iterable(map(self._hooks, own))]
        if any(hooks):
            return False
        self._types, self._hooked, self._counts = [*map(type, self._modules)], hooks, [*map(len, own)]
        alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}  # of modules with the same attributes
        for each in own:
            # a dictionary of children or parameters that holds nothing now will hold nothing that is read
            names = [name for name in each if name not in self._unread and (each[name] or name not in self._holders)]
            alike.setdefault(tuple(names), []).append(each)
        values = {names: itemgetter(*names) for names in alike}
        self._attributes = [(values[names], each, [*map(values[names], each)]) for names, each in alike.items()]
        self._holding = [each[name] for each in own for name in self._holders if each[name]]
        self._children = [*chain.from_iterable(map(dict.values, self._holding)), _END]
        self._tensors = [x for x in self._children if isinstance(x, Tensor)]
        self._plain = [x for x in self._tensors if type(x) in (nn.Parameter, Tensor) and x.layout == torch.strided]
        known = {*map(id, self._plain)}
        self._others = [x for x in self._tensors if id(x) not in known]
        self._are = self._described()
        self._own = own
        return True

    def _described(self) -> tuple[list[Any], ...]:
        """What the operations rely on of parameters and buffers; an address is of one device."""
        plain = self._plain
        return (
            [*map(type, self._tensors)], [*map(self._read, self._others)], [*map(Tensor.size, plain)],
            [*map(self._dtype, plain)], [*map(Tensor.data_ptr, plain)], [*map(Tensor.is_contiguous, plain)],
        )  # fmt: skip

    def still(self, model: nn.Module) -> bool:
        """Whether each attribute, child and parameter of each module is what it was, and none has hooks.

        It is hundreds of modules and parameters, and touching their memory takes the longest: so it looks at what may matter
        only, in loops of the interpreter's own.
        """
        if not self._own or not self.belongs_to(model):
            return False
        children = chain(chain.from_iterable(map(dict.values, self._holding)), (_END,))  # so that neither goes on
        try:
            return (
                [*map(len, self._own)] == self._counts
                and all([[*map(values, each)] == were for values, each, were in self._attributes])
                and not any(self._hooked)
                and [*map(type, self._modules)] == self._types
                and all(map(is_, children, self._children))
                and self._described() == self._are
            )
        except Exception:  # of values that do not say whether they are equal, as tensors do not
            return False


def _about(image: Tensor) -> tuple:
    """What the choice depends on besides the model and the machine."""
    kind = image.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    launched = kernels.HAS_TRITON and kernels.operation.surroundings()
    around = (autocast, torch.is_grad_enabled(), bool(_global_hook_reasons()), tuple(kernels.OPERATIONS.values()), launched)
    return (image.shape, image.dtype, image.device, type(image), *around)


def choose(model: Any, image: Tensor, warn: bool = True) -> Any:
    """True, or ``Chosen``: this forward takes the fused path. False: the reference; "auto" then warns, once per set of reasons.

    Raises:
        ValueError: ``model.backend`` is unknown.
        RuntimeError: it is "fused" and the fused path cannot be taken; all reasons are named.
    """
    backend = model.backend
    check_backend(backend)
    if backend == "reference":
        return False
    reasons = _machine_reasons(image, backend)
    look = about = None
    if not reasons and not torch.compiler.is_compiling():
        look, about = vars(model).get("_look"), _about(image)
        if look is not None and (found := look.chosen.get(about)) is not None and look.still(model):
            return found
    if backend == "fused" or not reasons:  # the model is only looked through where it can matter
        reasons = reasons + _model_reasons(model, image)
    kept = [] if reasons or not torch.is_grad_enabled() else _recompute_reasons(model, image)
    if not reasons and (not kept or backend == "auto"):
        if warn and torch.is_grad_enabled():
            _warn("computes gradients with PyTorch: ", _gradient_reasons(model, image))
            _warn("keeps what it was to compute again, take model.set_grad_checkpointing(): ", kept)
        if about is None or look is None or kept:
            return True
        if not look.belongs_to(model):
            model._look = look = Look()
        if not look.met:
            look.met = True
            return True
        if not look.still(model) or len(look.chosen) >= MOST_LOOKS:
            model._look = look = Look(met=True)
            if not look.take(model):
                return True
        return look.chosen.setdefault(about, Chosen())
    reasons = reasons + kept
    if backend == "fused":
        raise RuntimeError(
            "backend='fused' cannot run:\n"
            + "".join([f"  - {reason}\n" for reason in reasons])
            + "Remove these reasons, or take backend='auto' (falls back with a warning) or 'reference' (--backend)."
        )
    if warn:
        _warn("takes the reference path: ", reasons)
    return False


def settle(model: Any) -> list[str]:
    """Choose once, for images of the model's own size; returns why not the fused path, for whoever shows what runs.

    A model that takes the reference is set to it, and so warns no more.

    Raises:
        ValueError, RuntimeError: as ``choose``.
    """
    image = torch.empty(1, model.in_chans, *model.pixel_embed.img_size, device=model.cls_token.device)
    reasons = [] if model.backend == "reference" else why_not_fused(model, image)
    if not choose(model, image, warn=False):
        model.backend = "reference"
    return reasons


def _warn(what: str, reasons: list[str]) -> None:
    """Warn once per set of reasons; while torch.compile traces the model, too, which traces no warnings."""
    if reasons:
        _warn_once(f"tnt_fast {what}" + "; ".join(reasons) + ". (model.backend = 'reference' silences this.)")


@torch.compiler.assume_constant_result  # called as it is, once a trace
def _warn_once(text: str) -> bool:
    new = text not in _warned
    if new:
        _warned.add(text)
        warnings.warn(text, stacklevel=6)
    return new


def outer_arguments(block: Any, patch: Tensor) -> dict[str, Any] | None:
    """What a block on the fused path gives the operation ``outer``; None where its submodules run, with PyTorch's attention.

    They do where anything was done to one of them.
    """
    if "outer" not in kernels.OPERATIONS:
        return None
    given, reasons = _of_outer("", block, patch)
    return given if not reasons and all([x is None or _is_plain(x) for x in given["weights"]]) else None


def block_arguments(block: Any, patch: Tensor) -> dict[str, Any] | None:
    """What a block on the fused path gives the operation ``block``; None where it is several, or its submodules."""
    outer = outer_arguments(block, patch) if "block" in kernels.OPERATIONS else None
    return None if outer is None else block.block_arguments(outer)


def _recompute_reasons(model: Any, image: Tensor) -> list[str]:
    """Why a block keeps for gradients what ``recompute`` says it should compute again: its submodules run."""
    asked = [(f"blocks.{i}.", block) for i, block in enumerate(model.blocks) if getattr(block, "recompute", "none") != "none"]
    if not asked:
        return []
    if "outer" not in kernels.OPERATIONS:
        return ["this version has no fused kernel for outer"]
    found = [reason for prefix, block in asked for reason in _of_outer(prefix, block, image)[1]]
    return [f"recompute={asked[0][1].recompute!r} is of the fused outer transformer: {reason}" for reason in found]


def _of_outer(prefix: str, block: Any, like: Tensor) -> tuple[dict[str, Any], list[str]]:
    """What a block gives the operation ``outer``, of a dtype and a device like these, and why its submodules run instead."""
    if block.has_se:
        return {}, [f"{prefix}se_layer squeezes and excites, which the kernels do not compute"]
    if (backend := getattr(block.attn_out, "attn_backend", "")) not in ("auto", "sdpa"):
        return {}, [f"{prefix}attn_out has attn_backend={backend!r}; the kernels take 'auto' and 'sdpa'"]
    reasons: list[str] = []
    _check_modules(prefix, block, _OUTER, reasons)
    if reasons:
        return {}, reasons
    given = block.outer_arguments()
    record = given["weights"]
    if (record.qk_bias is None) != (record.v_bias is None):
        return {}, [f"{prefix}attn_out has one of the biases of qk and v; the kernels take both or none"]
    # what the LayerNorm kernels read, and what is joined; the library looks at the other shapes, as for the submodules
    read = (record.norm1_weight, record.norm1_bias, record.proj_bias, record.norm2_weight, record.norm2_bias, record.fc2_bias)
    E = record.norm1_weight.numel()
    if any([x is not None and x.shape != (E,) for x in read]):
        return {}, [f"{prefix}outer: a LayerNorm or a bias has not the {E} values of the patches"]
    joined = ((record.qk_weight, (2 * E, E)), (record.v_weight, (E, E)), (record.qk_bias, (2 * E,)), (record.v_bias, (E,)))
    if any([x is not None and x.shape != shape for x, shape in joined]):
        return {}, [f"{prefix}attn_out: qk or v has another shape; the kernels take {(2 * E, E)} and {(E, E)}"]
    weights = [x for x in record if x is not None and not _is_sharded(x)]
    autocast = like.device.type != "meta" and torch.is_autocast_enabled(like.device.type)
    taken = (_computed(like), torch.float32) if autocast else (like.dtype,)
    if any([x.dtype not in taken or not _is_plain(x) for x in weights]):
        return {}, [f"{prefix}outer: its weights are not all plain parameters of {taken[0]}"]
    return given, []


def is_looked_at(drop: nn.Module) -> bool:
    """Whether a module that hands on attention's probabilities is active, hooked or replaced."""
    plain = type(drop) is nn.Dropout and (drop.p == 0 or not drop.training)
    return not plain or bool(_global_hook_reasons()) or is_hooked(drop) or "forward" in drop.__dict__


def is_plain_linear(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer is a product of ``x`` with a weight, and a bias or none, and nobody looks at what goes in or out."""
    if type(layer) is not nn.Linear or is_hooked(layer) or "forward" in layer.__dict__:
        return False
    weight, bias = layer.weight, layer.bias
    parts = [(weight, (len(weight), x.shape[-1]))] + ([] if bias is None else [(bias, (len(weight),))])
    return all([_is_plain(p) and p.shape == s and p.dtype == x.dtype and p.device == x.device for p, s in parts])


def is_plain_mlp(block: nn.Module, name: str, x: Tensor) -> bool:
    """Whether ``block.name`` is fc2(GELU(fc1(x))), and nobody looks at what is between."""
    reasons: list[str] = []
    _check_modules("", block, _MLPS[name], reasons)
    return not (reasons or _global_hook_reasons()) and is_plain_linear(getattr(block, name).fc1, x)


def why_not_fused(model: Any, image: Tensor | None = None, gradients: bool = False) -> list[str]:
    """Every reason why ``model(image)`` would not take the fused path; an empty list if it would.

    Args:
        model: a ``tnt_fast.TNT``.
        image: ``(B, channels, height, width)``; None: only what does not depend on it is considered.
        gradients: also, where there are no such reasons, why the gradients of an operation would come from PyTorch although
            its forward is fused: the backward kernels take fewer sizes.
    """
    reasons = _machine_reasons(image, model.backend) + _model_reasons(model, image)
    return reasons + _gradient_reasons(model, image) if gradients and not reasons else reasons


def why_not_fused_on(model: Any, image: Tensor, gpu: str, capability: tuple[int, int]) -> list[str]:
    """``why_not_fused`` on a GPU that need not be here, of such a name and compute capability.

    Args:
        model, image: of the meta device, in one dtype.
    """
    return too_old(gpu, capability) + _model_reasons(model, image)


def why_not_fused_outer(block: Any, image: Tensor) -> list[str]:
    """Why the submodules of a block compute its outer transformer where the rest is fused."""
    return _of_outer("", block, image)[1]


def changes(model: Any) -> list[str]:
    """Everything done to a model's parts that a forward past all of its modules leaves out: replaced, hooked, dropping, …"""
    found, looked_at = _global_hook_reasons(), set()
    for i, block in (("", model), *enumerate(model.blocks)):
        prefix = "" if block is model else f"blocks.{i}."
        expected = _STEM + _REST if block is model else (_BLOCK if block.has_inner else ()) + _OUTER
        _check_modules(prefix, block, expected, found)
        looked_at |= {prefix + path for path, *_ in expected}
    for name, module in model.named_modules():
        if name in looked_at:
            continue
        if is_hooked(module):
            found.append(f"{name or 'the model'} has hooks; remove them")
        replaced = [key for key, x in vars(module).items() if callable(x) and callable(getattr(type(module), key, None))]
        found += [f"{f'{name}.{key}'.lstrip('.')} was replaced on the instance" for key in replaced]
    if not found:
        _check_embed(model, found)
    odd = {f"{name} is a {type(x).__name__}; accepted: a parameter" for name, x in model.named_parameters() if not _is_plain(x)}
    return [*dict.fromkeys(found), *sorted(odd)]


def _gradient_reasons(model: Any, image: Tensor | None) -> list[str]:
    """Why PyTorch computes the gradients of an operation that is fused."""
    like = model.cls_token if image is None else image
    sizes, dtype = model.sizes(image), _computed(like)
    return [
        f"{name}: {reason}"
        for name, operation in kernels.OPERATIONS.items()
        for reason in operation.gradients_unsupported(sizes, dtype, like.device)
    ]


def too_old(gpu: str, capability: tuple[int, int]) -> list[str]:
    """Why no kernel runs on a GPU of this name and compute capability; empty if they do."""
    if capability >= OLDEST:
        return []
    return [f"{gpu} has compute capability {capability[0]}.{capability[1]}; the kernels need {OLDEST[0]}.{OLDEST[1]}"]


def unsupported_machine() -> list[str]:
    """Why no kernel at all can run on this machine; empty if some can."""
    if kernels.on_cpu():
        return []
    reasons = [kernels.WITHOUT_TRITON] if kernels.WITHOUT_TRITON else []
    if not torch.cuda.is_available():
        reasons.append("torch sees no GPU (torch.cuda.is_available() is False); the kernels run on a CUDA or ROCm device")
    elif kernels.HAS_TRITON and not torch.compiler.is_compiling():  # which cannot trace the question
        capability = kernels.operation.runner.capability()
        if capability is not None:
            reasons += too_old(torch.cuda.get_device_name(), capability)
    return reasons


def _machine_reasons(image: Tensor | None, backend: str) -> list[str]:
    """What stands against any kernel, whatever the model."""
    if isinstance(image, torch.fx.Proxy):
        return ["torch.fx traces the model symbolically; a traced graph holds the reference's operations"]
    missing = [name for name in REQUIRED if name not in kernels.OPERATIONS]
    reasons = [f"this version has no fused kernel for {', '.join(missing)}"] if missing else []
    reasons.extend(unsupported_machine())
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        reasons.append("a torch.func transform is active, and the kernels' gradients are torch.autograd's; use 'reference'")
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        reasons.append("forward-mode differentiation is active, which the kernels do not take part in; use 'reference'")
    if kernels.on_cpu() and backend == "auto":
        reasons.append("Triton interprets the kernels here (TRITON_INTERPRET=1), slowly; only backend='fused' does that")
    if image is not None and not image.is_cuda and not kernels.on_cpu():
        reasons.append(f"the image is on device {str(image.device)!r}; the kernels take CUDA tensors")
    return reasons


def _model_reasons(model: Any, image: Tensor | None) -> list[str]:
    """What was done to the model, and the limits of the kernels for what it hands them."""
    reasons: list[str] = []
    if isinstance(image, torch.fx.Proxy):  # all of the model's parameters are proxies, too
        return reasons
    if not isinstance(model.blocks, (nn.ModuleList, nn.Sequential)):
        return [f"blocks is a {type(model.blocks).__name__}; the kernels compute a ModuleList of TNT blocks"]
    blocks = [(f"blocks.{i}.", block) for i, block in enumerate(model.blocks) if getattr(block, "has_inner", False)]
    owners = [("", model), *blocks]
    for prefix, owner in owners:
        _check_modules(prefix, owner, _BLOCK if prefix else _STEM, reasons)
    _check_recompute(model.blocks, reasons)
    reasons.extend(_global_hook_reasons())
    if not reasons:  # else what a model that was changed hands over is not to be relied on
        _check_embed(model, reasons)
        handed = _handed(owners)
        _check_sizes(model, handed, reasons)
        _check_dtypes(model, handed, image, reasons)
        if not reasons and all(name in kernels.OPERATIONS for name in REQUIRED):
            _check_arguments(model, handed, image, reasons)
    return reasons


def _global_hook_reasons() -> list[str]:
    """Hooks on all modules; those of PyTorch's own tools (FlopCounterMode) only look where they are."""
    kinds = ("forward_pre", "forward", "backward_pre", "backward")
    hooks = [hook for kind in kinds for hook in getattr(module_hooks, f"_global_{kind}_hooks").values()]
    foreign = [hook for hook in hooks if not (getattr(hook, "__module__", None) or "").startswith("torch.")]
    if not foreign:
        return []
    return ["hooks on all modules are registered (torch.nn.modules.module), which the kernels would pass over; remove them"]


def _check_recompute(blocks: Any, reasons: list[str]) -> None:
    """Each block has a ``recompute`` of its own, which the reference does not read."""
    for i, block in enumerate(blocks):
        if (value := getattr(block, "recompute", "none")) not in RECOMPUTE:
            accepted = ", ".join(map(repr, RECOMPUTE))
            reasons.append(f"blocks.{i}.recompute={value!r}; accepted: {accepted} (model.set_recompute sets all blocks)")


def _check_embed(model: Any, reasons: list[str]) -> None:
    """The stem's convolution has a module of its own, whose attributes the reference reads, and the kernel does not."""
    embed = model.pixel_embed
    conv, stride = embed.proj, embed.stride
    if conv.weight is None:
        reasons.append("pixel_embed.proj.weight is None; the kernels compute a convolution with one")
        return
    if not isinstance(stride, int) or stride < 1:
        reasons.append(f"pixel_embed.stride={stride!r}; the kernels take a positive integer")
        return
    expected = dict(padding=(3, 3), stride=(stride, stride), dilation=(1, 1), groups=1, padding_mode="zeros")
    if wrong := [f"{name}={getattr(conv, name)!r}" for name, value in expected.items() if getattr(conv, name) != value]:
        reasons.append(f"pixel_embed.proj has other {', '.join(wrong)} than TNT's; the kernels compute {expected}")
        return
    for name in ("img_size", "patch_size", "patch_stride"):
        if not isinstance(pair := getattr(embed, name), tuple) or len(pair) != 2:
            reasons.append(f"pixel_embed.{name}={pair!r}; the kernels take a height and a width")
            return
    size, step = (tuple([side // stride for side in pair]) for pair in (embed.patch_size, embed.patch_stride))
    cut = dict(new_patch_size=size, pixel_step=step)
    if wrong := [f"{name}={getattr(embed, name)!r}" for name, value in cut.items() if getattr(embed, name) != value]:
        reasons.append(f"pixel_embed has {', '.join(wrong)}; its sizes and strides make {cut}")


def _handed(owners: list[tuple[str, Any]]) -> list[tuple[str, Any, str, dict[str, Any]]]:
    """What the fused operations are given: (prefix, owner, operation, arguments), once for blocks that hand over the same."""
    found, seen = [], []
    for prefix, owner in owners:
        for operation, given in owner.fused_arguments().items():
            given = by_name(given)
            same = [operation, *[(type(x), x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in given.values()]]
            if same not in seen:
                seen.append(same)
                found.append((prefix, owner, operation, given))
    return found


def _check_sizes(model: Any, handed: list[tuple], reasons: list[str]) -> None:
    """The weights that ``TNT.sizes`` reads have any."""
    for prefix, _, operation, given in [("", model, "fold", {"cls_token": model.cls_token}), *handed]:
        for name in given.keys() & {"cls_token", "weight", "fc1_weight"}:
            if getattr(given[name], "ndim", 0) == 0:
                what = "None" if given[name] is None else "a scalar"
                reasons.append(f"{prefix}{operation}: {name} is {what}; the kernels take a tensor of the model's sizes")


def _is_plain(weight: Any) -> bool:
    return type(weight) in (nn.Parameter, Tensor) or type(weight).__name__ == "FakeTensor"  # torch.export's stand-in


def _is_sharded(weight: Any) -> bool:
    """Whether it is FSDP's, which is a plain parameter by the time its block runs, perhaps of another dtype."""
    return type(weight).__name__ == "DTensor"


def _check_dtypes(model: nn.Module, handed: list[tuple], image: Tensor | None, reasons: list[str]) -> None:
    """The weights that the kernels read share one dtype with the image; under autocast the operations cast by themselves."""
    weights = [(prefix, operation, *item) for prefix, _, operation, given in handed for item in given.items()]
    weights += [("", "fold", "cls_token", model.cls_token), ("", "fold", "patch_pos", model.patch_pos)]
    weights = [weight for weight in weights if isinstance(weight[-1], Tensor) and not _is_sharded(weight[-1])]
    for prefix, operation, name, weight in weights:
        if not _is_plain(weight):
            reasons.append(f"{prefix}{operation}: {name} is a {type(weight).__name__}; the kernels take plain parameters")
    dtypes = {weight[-1].dtype for weight in weights}
    names = ", ".join(sorted([str(dtype) for dtype in dtypes]))
    if len(dtypes) > 1:
        reasons.append(f"the parameters have mixed dtypes ({names}); cast them with model.to(dtype)")
    elif image is not None and dtypes and image.dtype not in dtypes and not torch.is_autocast_enabled(image.device.type):
        reasons.append(f"the image is {image.dtype}, the parameters are {names}; cast one of them")


def _computed(image: Tensor) -> torch.dtype:
    """The dtype that the operations compute in."""
    kind, dtype = image.device.type, image.dtype
    if kind == "meta" or dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return dtype
    return torch.get_autocast_dtype(kind)


def _check_arguments(model: Any, handed: list[tuple], image: Tensor | None, reasons: list[str]) -> None:
    """Hold what the operations will be given to their own descriptions, once for blocks that hand over the same."""
    like = model.cls_token if image is None else image
    dtype, autocast = _computed(like), like.device.type != "meta" and torch.is_autocast_enabled(like.device.type)
    sizes = model.sizes(image)
    known = {letter: sizes[letter] for letter in ("channels", "S", "C", "E")}
    known |= dict(zip(("height", "width"), model.image_size(image), strict=True))
    for prefix, owner, name, given in handed:
        operation = kernels.OPERATIONS[name]
        # without a second norm (legacy) the first is over each pixel, else over all of a patch
        known["W"] = sizes["C"] if owner.norm2_proj is None else sizes["S"] * sizes["C"]
        wrong = operation.wrong_types({k: None if _is_sharded(x) else x for k, x in given.items()}, dtype, autocast)
        wrong += operation.wrong_values(given, like.device, known)
        reasons.extend([f"{name}: {reason}" + (f" ({prefix[:-1]})" if prefix else "") for reason in wrong])


def _split(*expected: tuple[str, type | str]) -> tuple[tuple[str, str, str, type | str], ...]:
    """With each path its parent's name, or "", and its own."""
    return tuple((path, *path.rpartition(".")[::2], cls) for path, cls in expected)


def _of_mlp(name: str) -> tuple[tuple[str, type | str], ...]:
    parts = (("fc1", nn.Linear), ("act", nn.GELU), ("drop1", nn.Dropout), ("norm", nn.Identity), ("fc2", nn.Linear))
    return ((name, Mlp), *((f"{name}.{part}", cls) for part, cls in parts), (f"{name}.drop2", nn.Dropout))


# The submodules that the fused path does not call, and the classes whose mathematics the kernels compute instead.
_STEM = _split(
    ("pixel_embed.proj", nn.Conv2d), ("norm1_proj", nn.LayerNorm), ("proj", nn.Linear), ("norm2_proj", nn.LayerNorm),
)  # fmt: skip
_BLOCK = _split(
    ("norm_in", nn.LayerNorm), ("attn_in", "Attention"), ("attn_in.qk", nn.Linear), ("attn_in.v", nn.Linear),
    ("attn_in.attn_drop", nn.Dropout), ("attn_in.proj", nn.Linear), ("attn_in.proj_drop", nn.Dropout),
    ("norm_mlp_in", nn.LayerNorm), *_of_mlp("mlp_in"),
    ("norm1_proj", nn.LayerNorm), ("proj", nn.Linear), ("norm2_proj", nn.LayerNorm), ("drop_path", DropPath),
)  # fmt: skip
_REST = _split(("pos_drop", nn.Dropout), ("head_drop", nn.Dropout))
_OUTER = _split(
    ("norm_out", nn.LayerNorm), ("attn_out", "Attention"), ("attn_out.qk", nn.Linear), ("attn_out.v", nn.Linear),
    ("attn_out.attn_drop", nn.Dropout), ("attn_out.proj", nn.Linear), ("attn_out.proj_drop", nn.Dropout),
    ("norm_mlp", nn.LayerNorm), *_of_mlp("mlp"), ("drop_path", DropPath),
)  # fmt: skip
_MLPS = {name: _split(*_of_mlp(name)) for name in ("mlp_in", "mlp")}


def is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def _check_modules(prefix: str, owner: Any, expected: tuple, reasons: list[str]) -> None:
    """Add what was done to the submodules of ``owner`` that the fused path would pass over.

    What a module's forward reads is either handed to the operations (weights, eps, heads, drop-path's rate), or held here to
    what the kernels compute; a test finds what it reads by running it.

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
            (path == "norm2_proj" and module is None and prefix)  # a legacy block; the stem has both norms
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
            weight = module.weight
            if weight is None or module.normalized_shape != weight.shape:
                reasons.append(
                    f"{prefix}{path} lacks a weight of its normalized_shape {module.normalized_shape}; the kernels take "
                    "LayerNorms with one"
                )
            eps[path] = module.eps
        elif kind is nn.GELU and module.approximate != "none":
            reasons.append(f"{prefix}{path} approximates GELU by {module.approximate}; the kernels compute approximate='none'")
        elif kind is nn.Dropout and module.p != 0 and (module.training or not 0 < (module.p or -1) <= 1):
            reasons.append(
                f"{prefix}{path} drops with p={module.p} in training; inside the kernels there is drop-path only (set p to 0)"
            )
        if is_hooked(module):
            reasons.append(f"{prefix}{path} has hooks that the kernels would pass over; remove them, or hook the block")
        if "forward" in module.__dict__:
            reasons.append(f"{prefix}{path}.forward was replaced on the instance; the kernels would pass it over")
    for first, second in (("norm_in", "norm_mlp_in"), ("norm1_proj", "norm2_proj"), ("norm_out", "norm_mlp")):
        if first in eps and second in eps and eps[first] != eps[second]:
            reasons.append(f"{prefix}{first} and .{second} have eps {eps[first]} and {eps[second]}; the kernels take one")
