"""What a fused operation is, and what all share on the host: launching, calling, registration with PyTorch.

An operation is registered as ``torch.ops.tnt_fast.NAME``, so that ``torch.compile``, ``torch.export`` and FlopCounterMode see
one node. Its backward is another one, ``NAME_backward``, which starts again from the inputs: nothing else is kept. Where an
operation ``keeps`` something, a call that records gradients is a third one, ``NAME_recorded``, with that as further results. By
hand: of a call of inner that records gradients, ``torch.library.custom_op`` takes 80 of the host's 145 µs, nearly all of them
to fill in defaults that no argument has (python -m benchmarks.host).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, partial, wraps
from operator import itemgetter
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula

from tnt_fast import reference
from tnt_fast.arguments import Arguments, is_watched
from tnt_fast.reference import by_name

TENSORS = {Tensor, Parameter}
PLAIN = {*TENSORS, type(None)}  # no subclass, which may do something else when it is called
LIBRARY = torch.library.Library("tnt_fast", "FRAGMENT")
MOST_ROWS = 2**30  # patches or tokens of a call: the kernels count them, and a tile more, in 32 bits
MOST_LAUNCHERS = 4096  # that are remembered
MOST_PLANS = 64  # that are remembered of an operation with its weights: shapes of activations
MOST_PROGRAMS = 2**20  # of a grid that stays, counted in 32 bits, too; a GPU holds some thousands


# ---- launching ----


@cache
def _properties(device: torch.device) -> Any:
    """Of a GPU with its index, as a tensor's device has it; PyTorch looks at the driver each time."""
    return torch.cuda.get_device_properties(device)


def _seen(arguments: Sequence[Any]) -> list[Any]:
    """What Triton compiles another kernel for: which tensors there are, their dtypes and alignment; numbers."""
    found: list[Any] = []
    for x in arguments:
        if x is None:
            found.append(None)
        elif type(x) in TENSORS or isinstance(x, Tensor):
            found += (x.dtype, x.data_ptr() & 15)
        elif isinstance(x, tuple):
            found += _seen(x)
        else:
            found.append(x)
    return found


class Gpu:
    """What runs the kernels: Triton's launcher, on a GPU. All that depends on the machine is asked of ``runner``."""

    on_cpu = False  # takes CPU tensors, slowly, to test the kernels: only where backend="fused" asks for it
    nvidia = torch.version.hip is None  # compiled for NVIDIA: the fast forms of tile.py, TF32, Config.mma_arch

    def __init__(self) -> None:
        self._launchers: dict[tuple[Any, ...], tuple[Launch, Any]] = {}

    def capability(self, device: torch.device | None = None) -> tuple[int, int] | None:
        """Compute capability of a device, or of the current one; None where it has none."""
        return torch.cuda.get_device_capability(device) if self.nvidia else None

    def programs(self, device: torch.device, per_sm: int) -> int:
        """How many programs run at once, at ``per_sm`` a multiprocessor."""
        return per_sm * _properties(device).multi_processor_count

    def shared_memory(self, device: torch.device) -> int | None:
        """Bytes that a program can have on the chip; None where that is not limited."""
        if device.type != "cuda":
            return None
        return getattr(_properties(device), "shared_memory_per_block_optin", 1 << 17)

    def launch(self, spec: "Launch", grid: int, arguments: Sequence[Any], options: dict) -> None:
        """Launch on the current stream of the device of the first argument, a tensor.

        Triton's own launcher finds the compiled kernel by looking at each argument anew: here that is once for all that it
        would look at, and more: whole numbers instead of what divides them.
        """
        device = arguments[0].device
        if arguments[0].is_cuda and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.launch(spec, grid, arguments, options)
        known: Any = spec.known
        if known is not None:
            key = tuple([x.data_ptr() & 15 if type(x) in TENSORS else x for x in arguments if not isinstance(x, tuple)])
        else:
            known, key = self._launchers, (id(spec), grid, device, options.get("arch"), *_seen(arguments))
        found = known.get(key)
        if found is not None:
            found[1](*arguments, *spec.constants.values())
            return None
        compiled = spec.kernel[(grid,)](*arguments, **spec.constants, **options)
        if len(known) >= MOST_LAUNCHERS:
            known.clear()
        known[key] = spec, compiled[grid, 1, 1]  # with spec, so that no other gets its id
        return None


class Interpreter(Gpu):
    """Triton's interpreter (TRITON_INTERPRET=1)."""

    on_cpu = True
    nvidia = False

    def programs(self, device: torch.device, per_sm: int) -> int:
        return 3  # a few, so that programs do take several tiles

    def shared_memory(self, device: torch.device) -> int | None:
        return None

    def launch(self, spec: "Launch", grid: int, arguments: Sequence[Any], options: dict) -> None:
        spec.kernel[(grid,)](*arguments, **spec.constants)  # which knows no options


runner = Interpreter() if triton.knobs.runtime.interpret else Gpu()


class Config(NamedTuple):
    """How a kernel is launched: an entry of its file's table.

    ``rows``: of a tile; ``chunk``: how much of what a kernel goes through by pieces is one; ``per_sm``: programs on a
    multiprocessor of a grid that stays, and takes tile after tile; ``mma_arch``: from sm_90 on, the older architecture whose
    matrix instructions are taken.
    """

    rows: int
    warps: int
    per_sm: int = 0
    chunk: int = 0
    stages: int = 1
    mma_arch: str | None = None


def derived(of: Callable[[Any], Any]) -> Any:
    """A field that follows from those before it. No property: Triton tells kernels apart by their constants' fields alone."""
    return field(init=False, metadata={"of": of})


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a kernel is compiled for, its last argument Z. No tuple, of which some versions of Triton keep the values only."""

    DTYPE: Any
    PRECISION: str = "ieee"
    FAST: bool = False  # the approximations of tile.py: in half precision, compiled for an NVIDIA GPU
    STAGES: int = 1  # tiles of a grid that stays that are on their way at once
    EXACT: bool = derived(lambda Z: tl.float32 == Z.DTYPE)

    def __post_init__(self) -> None:
        for each in fields(self):
            if "of" in each.metadata:
                object.__setattr__(self, each.name, each.metadata["of"](self))

    @classmethod
    def computed(cls, dtype: torch.dtype, **sizes: Any) -> "Sizes":
        """For a computation in ``dtype``, in the precision that PyTorch asks for now."""
        fast = dtype != torch.float32 and runner.nvidia
        return cls(DTYPE=getattr(tl, str(dtype).removeprefix("torch.")), PRECISION=precision(dtype), FAST=fast, **sizes)


class Launch(NamedTuple):
    """One specialisation of a kernel.

    ``constants``: the constexprs by name; of our kernels Z alone. ``patches``: how many one turn of a program's main loop
    completes; where that loop walks over parts of patches instead, how many the program completes in ``turns`` of it.
    ``known``: of ``again``, what runs it.
    """

    kernel: Any
    constants: dict[str, Any]
    config: Config
    patches: float
    turns: int = 1
    known: dict[tuple[Any, ...], Any] | None = None

    def again(self) -> "Launch":
        """For one place that launches it over and over on one grid and device, with the same dtypes, and tuples of the same
        tensors: of the rest it is seen which tensors there are, their alignment, and numbers."""
        return self._replace(known={})


def precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: as PyTorch's ``torch.backends.cuda.matmul`` says."""
    if dtype != torch.float32 or not runner.nvidia:
        return "ieee"
    matmul = torch.backends.cuda.matmul  # asked for allow_tf32 where fp32_precision was set, newer versions raise
    try:
        allowed = matmul.fp32_precision == "tf32"
    except AttributeError:  # of older ones
        allowed = matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def surroundings() -> tuple[Any, str]:
    """What else launches depend on."""
    return runner, precision(torch.float32)


def programs(device: torch.device, tiles: int, per_sm: int) -> int:
    """Size of a grid that stays: what fits on the device at once, at most one program a tile."""
    return min(tiles, runner.programs(device, per_sm), MOST_PROGRAMS)


def remembered(specialise: Callable[..., Launch]) -> Callable[..., Launch]:
    """A function's launches, made once for the same arguments and the same way to compute products."""
    known: dict[tuple[Any, ...], Launch] = {}

    @wraps(specialise)
    def specialised(first: Any, *others: Any) -> Launch:
        dtype = first if type(first) is torch.dtype else others[0]
        key = (id(first), runner.nvidia, precision(dtype), *others)  # a kernel, whose own hash is slow, or a dtype
        found = known.get(key)
        if found is None:
            known[key] = found = specialise(first, *others)
        return found

    specialised.forget = known.clear
    return specialised


def launch(spec: Launch, grid: int, *arguments: Any) -> None:
    """Launch a specialisation; ``arguments`` in the kernel's order, the first a tensor."""
    config = spec.config
    options = {"num_warps": config.warps, "num_stages": config.stages}
    capability = runner.capability(arguments[0].device) if config.mma_arch else None
    if capability is not None and capability[0] >= 9:
        options["arch"] = config.mma_arch
    runner.launch(spec, grid, arguments, options)


# ---- what an operation is ----


class Operation(Arguments):
    """A fused operation: what a file of this folder defines a subclass of, and calls with the arguments of its twin.

    Errors, the model's reasons against the kernels, warnings and fallbacks are all made from what it says here.
    """

    factors: tuple[str, ...] = ()  # drop-path's, which with the activations are what changes from call to call
    passes: str | None = None  # a tensor that the result is added to: its gradient is the result's

    def prepared(self, a: SimpleNamespace, again: bool = False) -> Callable[..., None]:
        """What launches the forward, called with the result, as ``empty`` made it, and with what ``changing`` names.

        ``again``: it will be called with other tensors of such shapes, dtypes and devices, too. Of the weights it has no
        views, which would keep them alive after they were moved, and no copies but of those that are not contiguous.

        ``a``: the arguments by name, checked; the result has at least one value. ``a.kept``: where gradients are recorded and
        ``keeps`` names something, a dictionary; then each call is given one last, which takes it. Else None.
        """
        raise NotImplementedError

    def forward(self, a: SimpleNamespace, out: Tensor) -> None:
        """Launch once."""
        kept = () if self.keeps is None or a.kept is None else (a.kept,)
        self.prepared(a)(out, *[getattr(a, name) for name in self.changing], *kept)

    def empty(self, a: SimpleNamespace) -> Tensor:
        """A tensor like the result; by itself like the first activation."""
        return torch.empty_like(getattr(a, self.activations[0]), memory_format=torch.contiguous_format)

    keeps: Callable[[SimpleNamespace], dict[str, tuple[tuple[int, ...], torch.dtype]]] | None = None
    """Shapes and dtypes, by name, of the new tensors that ``forward`` leaves for ``backward`` of such arguments."""

    def unread(self, a: Mapping[str, Any]) -> str | None:
        """A tensor of the result's shape that ``backward`` does not read: nobody keeps it, the gradient stands in its place."""
        return self.passes

    def backward(self, gradient: Tensor, a: SimpleNamespace, needed: set[str]) -> dict[str, Tensor]:
        """Gradients of the tensors that ``needed`` names, in any dtype, none of them an input; more of them do no harm.

        ``gradient``: of at least one value; ``a.kept``: what ``forward`` left. By itself: by PyTorch.
        """
        return self.recomputed(gradient, a, needed)

    # ---- calling it ----

    def __init__(self) -> None:
        super().__init__()
        self.changing = (*self.activations, *self.factors)
        self._accepted: set[tuple[Any, ...]] = set()
        self._register()

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The twin, fused: float32, float16 or bfloat16, the weights in the same dtype (or float32 under autocast).

        Raises:
            TypeError, ValueError: a tensor of another dtype, device or shape; named, with what is accepted.
        """
        return self._operation(*self.prepare(self.named(args, kwargs)).values())

    def trusted(self, **given: Any) -> Tensor:
        """As a call with weights and numbers that ``dispatch.choose`` has accepted: only the activations are looked at."""
        if torch.compiler.is_compiling():
            given = self.prepare(by_name(self.defaults | given))
            self.check(given)  # what is traced is guarded by Dynamo
            return self._operation(*given.values(), True)
        changing = [given.pop(name, None) for name in self.changing]
        return self.settled(given)(*changing)

    def settled(self, given: dict[str, Any], looked_at: bool = False) -> "Settled":
        """``trusted`` with such weights and numbers, again and again."""
        return Settled(self, given, looked_at)

    def _computed(self, a: SimpleNamespace) -> Tensor:
        out = self.empty(a)
        if out.numel():
            self.forward(a, out)
        return out

    def elsewhere(self, device: torch.device) -> list[str]:
        if device.type == "cuda" or runner.on_cpu:
            return []
        return [
            f"{self.activations[0]} is on device {str(device)!r}; the kernel takes CUDA tensors "
            "(on the CPU only in Triton's interpreter, TRITON_INTERPRET=1)"
        ]

    # ---- with PyTorch ----

    def _empty_kept(self, a: SimpleNamespace) -> dict[str, Tensor]:
        like = getattr(a, self.activations[0])
        return {name: like.new_empty(shape, dtype=dtype) for name, (shape, dtype) in self.keeps(a).items()}  # type: ignore[misc]

    def _register(self) -> None:
        """As ``torch.ops.tnt_fast.NAME``, and its gradients as ``NAME_backward``."""
        names = list(self.kinds)
        # of the arguments what a backward reads: tensors and others; and where in these two, one behind the other, each is
        saved = [i for i, name in enumerate(names) if name in self.shapes]
        others = [i for i, name in enumerate(names) if name not in self.shapes]
        at = {index: at for at, index in enumerate(saved + others)}
        in_order = itemgetter(*[at[i] for i in range(len(names))])

        def define(name: str, schema: str, function: Any, fake: Any) -> Any:
            LIBRARY.define(name + schema, tags=[torch.Tag.pt2_compliant_tag])
            LIBRARY.impl(name, function, "CompositeExplicitAutograd")
            torch.library.register_fake(f"tnt_fast::{name}", fake, lib=LIBRARY)
            return getattr(torch.ops.tnt_fast, name).default

        def run(flat: Sequence[Any], kept: dict[str, Tensor] | None) -> tuple[Tensor, SimpleNamespace]:
            if len(flat) == len(names) or not flat[-1]:  # PyTorch passes no argument that is its default
                self.check(dict(zip(names, flat, strict=False)))
            a = self.packed(flat)
            a.kept = kept
            return self._computed(a), a

        def forward_recorded(*flat: Any) -> list[Tensor]:
            out, a = run(flat, {})
            kept = a.kept or self._empty_kept(a)
            return [out, *[kept[name] for name in self.keeps(a)]]  # type: ignore[misc]

        def gradients(gradient: Tensor, *flat: Any) -> list[Tensor]:
            flat, (needed, *kept) = flat[: len(names)], flat[len(names) :]
            if gradient.numel() == 0:
                return [torch.zeros_like(flat[i], memory_format=torch.contiguous_format) for i in needed]
            a = self.packed(flat)
            a.kept = dict(zip(self.keeps(a), *kept, strict=True)) if kept else None  # type: ignore[misc]
            wanted = {names[i] for i in needed}
            if torch.is_autocast_enabled(kind := gradient.device.type):
                with torch.autocast(kind, enabled=False):  # it has chosen the dtypes in the forward, and must not again
                    found = self.backward(gradient, a, wanted)
            else:
                found = self.backward(gradient, a, wanted)
            return _new([found[names[i]] for i in needed], [flat[i] for i in needed])

        def empty_gradients(gradient: Tensor, *flat: Any) -> list[Tensor]:
            needed = [flat[i] for i in flat[len(names)]]
            return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in needed]

        # ``checked``: whether the caller has done so
        schema = f"({self.schema}, bool checked=False) -> Tensor"
        operation = define(self.name, schema, lambda *flat: run(flat, None)[0], lambda *flat: self.empty(self.packed(flat)))
        recorded_operation = operation
        if self.keeps is not None:

            def empty_recorded(*flat: Any) -> list[Tensor]:
                a = self.packed(flat)
                return [self.empty(a), *self._empty_kept(a).values()]

            recorded_operation = define(f"{self.name}_recorded", f"{schema}[]", forward_recorded, empty_recorded)
        more = "" if self.keeps is None else ", Tensor[] kept"
        schema = f"(Tensor gradient, {self.schema}, SymInt[] needed{more}) -> Tensor[]"
        backward_operation = define(f"{self.name}_backward", schema, gradients, empty_gradients)

        for leaf in {backward_operation, recorded_operation} - {operation}:
            LIBRARY.impl(leaf._schema.name, torch.library.fallthrough_kernel, "Autograd")

        def twice(ctx, *gradients):
            raise RuntimeError(
                f"the gradients of {self.name} were to be differentiated, which the kernels do not do; take a model with "
                "backend='reference'"
            )

        functions = {"forward": staticmethod(lambda ctx, computed, *read: computed()), "backward": staticmethod(twice)}
        once = type(f"{self.name}_backward", (torch.autograd.Function,), functions)

        def below(operation, keys, *flat):
            with torch._C._AutoDispatchBelowAutograd():
                return operation.redispatch(keys & torch._C._after_autograd_keyset, *flat)

        def recorded(ctx, keys, *flat):
            """``keys``: of the dispatcher; past it what computes the result and what is kept."""
            ctx.past = callable(keys)
            if ctx.past:
                with torch._C._AutoDispatchBelowAutograd():
                    found = keys()
            else:
                found = below(recorded_operation, keys, *flat)
            out, *kept = [found] if self.keeps is None else found
            tensors = [flat[i] for i in saved]
            ctx.unread = self.unread(dict(zip(names, flat, strict=False)))
            if ctx.unread is not None:
                tensors[at[names.index(ctx.unread)]] = None
            ctx.save_for_backward(*tensors, *kept)
            ctx.others = [flat[i] for i in others]
            return out

        def backward(ctx, gradient):
            batched = (torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor)
            if not torch.compiler.is_compiling() and any(is_batched(gradient) for is_batched in batched):
                raise NotImplementedError(
                    f"the backward of {self.name} takes one gradient, not a batch (is_grads_batched, vectorize=True, "
                    "torch.func.vmap); compute them one by one, or take a model with backend='reference'"
                )
            needed = [i for i, wanted in enumerate(ctx.needs_input_grad[1:]) if wanted]
            tensors = ctx.saved_tensors
            kept = [] if self.keeps is None else [list(tensors[len(saved) :])]
            flat = [*in_order((*tensors[: len(saved)], *ctx.others))]
            if ctx.unread is not None:
                flat[names.index(ctx.unread)] = gradient
            found: dict[int, Tensor] = {}
            if self.passes is not None and (passed := names.index(self.passes)) in needed:
                found[passed] = gradient  # autograd casts it
                needed.remove(passed)

            def computed() -> tuple[Tensor, ...]:
                if not ctx.past or type(gradient) is not Tensor or _watched():
                    return tuple(backward_operation(gradient, *flat, needed, *kept))
                with torch._C._AutoDispatchBelowAutograd():
                    return tuple(gradients(gradient, *flat, needed, *kept))

            if needed:
                graded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
                found |= zip(needed, once.apply(computed, gradient, *tensors) if graded else computed(), strict=True)
            return None, *[found.get(i) for i in range(len(ctx.needs_input_grad) - 1)]

        functions = {"forward": staticmethod(recorded), "backward": staticmethod(backward)}
        function = type(self.name, (torch.autograd.Function,), functions)

        def differentiable(keys, *flat):
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*flat):
                return function.apply(keys, *flat)
            return below(operation, keys, *flat)

        LIBRARY.impl(self.name, differentiable, "Autograd", with_keyset=True)

        @register_flop_formula([x.overloadpacket for x in {operation, recorded_operation}])
        def _(*flat, out_shape=None, **kwargs):
            return 2 * self.multiply_adds(self.packed(flat))

        @register_flop_formula(getattr(torch.ops.tnt_fast, f"{self.name}_backward"))
        def _(gradient, *flat, out_shape=None, **kwargs):
            return 2 * self.backward_multiply_adds(self.packed(flat))

        self._operation, self._recorded = operation, function.apply

    def recomputed(self, gradient: Tensor, a: SimpleNamespace, needed: set[str]) -> dict[str, Tensor]:
        """Gradients by PyTorch, through the reference: for what a kernel does not take.

        Raises:
            RuntimeError: inside of a TorchDispatchMode, where torch.func records nothing.
        """
        if torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode):
            raise RuntimeError(
                f"the kernels do not take these gradients of {self.name} (tnt_fast.why_not_fused(model, image, "
                "gradients=True) says why), and PyTorch cannot compute them inside of a TorchDispatchMode such as "
                "FlopCounterMode; there, set model.backend = 'reference'"
            )
        flat = by_name({name: getattr(a, name) for name in self.defaults})
        dtypes = {x.dtype for x in flat.values() if isinstance(x, Tensor)}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # mixed under autocast
        # in one layout, as the kernels read them: for another the library may take another product, with other bits
        flat = {name: x.to(dtype).contiguous() if isinstance(x, Tensor) else x for name, x in flat.items()}
        return reference.gradients(self.twin, flat, [name for name in flat if name in needed], gradient.to(dtype))


def _new(found: list[Tensor], likes: list[Tensor]) -> list[Tensor]:
    """Gradients as autograd wants them: contiguous, in their arguments' dtypes, no memory twice; copies in one launch."""
    result, seen = [], set()
    copies: list[Tensor] = []
    originals: list[Tensor] = []
    for x, like in zip(found, likes, strict=True):
        if x.dtype == like.dtype and x.is_contiguous() and x.data_ptr() not in seen:  # rows of one sum do not overlap
            seen.add(x.data_ptr())
        else:
            originals.append(x)
            copies.append(x := torch.empty(like.shape, dtype=like.dtype, device=like.device))
        result.append(x)
    if copies:
        torch._foreach_copy_(copies, originals)
    return result


class Settled:
    """An operation with weights and numbers that ``dispatch.choose`` has accepted: called with what changes, in order.

    What follows from all of them is found in the first call with such shapes. Whoever keeps this knows that the weights have
    the same types, shapes and dtypes, and where ``looked_at`` that they lie where they lay and the ``surroundings`` are the
    same; else each call sees for itself. Where nobody looks on, it goes past PyTorch's dispatcher, which takes longer than a
    launch.
    """

    def __init__(self, operation: Operation, given: dict[str, Any], looked_at: bool) -> None:
        self.operation, self.given = operation, operation.defaults | given
        if "eps" in given:
            self.given["eps"] = float(given["eps"])  # as the dispatcher does
        self._at = [[*operation.kinds].index(name) for name in operation.changing]
        self._flat = [*by_name(self.given).values()]
        self._weights = [x for x in self._flat if isinstance(x, Tensor)]
        self._looked_at = looked_at
        self._seen: set[tuple[Any, ...]] = set()
        self._plans: dict[tuple[Any, ...], list[Any]] = {}

    def __reduce__(self) -> tuple:
        return type(None), ()  # a copy, which has other weights, begins anew

    def __call__(self, *changing: Tensor | None) -> Tensor:
        operation, first = self.operation, changing[0]
        device = "cuda" if first.is_cuda else first.device.type  # type: ignore[union-attr] # which is a new string each time
        if torch.is_autocast_enabled(device):
            dtype, count = torch.get_autocast_dtype(device), len(operation.activations)
            changing = (*[x if x is None else x.to(dtype) for x in changing[:count]], *changing[count:])
        seen = tuple([None if x is None else (x.shape, x.dtype, x.device, type(x)) for x in changing])
        if _watched() or seen not in self._seen:
            return self._looked(seen, changing, device)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*(flat := self._all(changing))):
            recorded = operation.keeps is not None
            return operation._recorded(partial(self._computed, seen, changing, recorded), *flat)
        return self._computed(seen, changing)

    def _computed(self, seen: tuple[Any, ...], changing: tuple[Tensor | None, ...], recorded: bool = False) -> Any:
        """The result; where gradients are ``recorded`` a list of it and of what is kept."""
        plan = self._plans.get((recorded, seen)) or self._planned(seen, changing, recorded)
        if plan[4:] != self._about(plan[2]):
            plan = self._planned(seen, changing, recorded)
        compute, shape, dtype, keeps, *_ = plan
        out = torch.empty(shape, dtype=dtype, device=changing[0].device)  # type: ignore[union-attr]
        if not recorded:
            if compute is not None:
                compute(out, *changing)
            return out
        kept: dict[str, Tensor] = {}
        if compute is not None:
            compute(out, *changing, kept)
        else:
            kept = {name: torch.empty(shape, dtype=dtype, device=out.device) for name, (shape, dtype) in keeps.items()}
        return [out, *map(kept.__getitem__, keeps)]

    def _all(self, changing: tuple[Tensor | None, ...]) -> list[Any]:
        """As the dispatcher takes them."""
        flat = self._flat.copy()
        for i, x in zip(self._at, changing, strict=False):
            flat[i] = x
        return flat

    def _about(self, dtype: torch.dtype) -> list[Any]:
        """What a plan depends on besides shapes and dtypes, and that whoever keeps this does not know."""
        if self._looked_at:
            return []
        weights = self._weights
        return [runner, precision(dtype), [*map(Tensor.data_ptr, weights)], all(map(Tensor.is_contiguous, weights))]

    def _planned(self, seen: tuple[Any, ...], changing: tuple[Tensor | None, ...], recorded: bool) -> list[Any]:
        operation = self.operation
        kept: dict[str, Tensor] | None = {} if recorded else None
        a = SimpleNamespace(**self.given | dict(zip(operation.changing, changing, strict=False)), kept=kept)
        out, keeps = operation.empty(a), operation.keeps(a) if recorded else {}  # type: ignore[misc]
        compute = operation.prepared(a, again=True) if out.numel() else None
        plan = [compute, out.shape, out.dtype, keeps, *self._about(out.dtype)]
        if all(map(Tensor.is_contiguous, self._weights)):  # what was copied would be another copy next time
            self._plans[recorded, seen] = plan
        return plan

    def _looked(self, seen: tuple[Any, ...], changing: tuple[Tensor | None, ...], device: str) -> Tensor:
        """A call of what has not been seen, or where somebody looks on."""
        operation, flat, like = self.operation, self._all(changing), self._weights[0]
        accepted = (*seen, like.shape, like.dtype, like.device, type(like))
        if accepted not in operation._accepted and device != "meta":  # where only shapes are asked for
            operation.check(operation.prepare(dict(zip(operation.kinds, flat, strict=True))))
            operation._accepted.add(accepted)
        if device == "meta" or _watched() or not {*map(type, changing), *map(type, self._weights)} <= PLAIN:
            return operation._operation(*flat, True)
        if len(self._seen) >= MOST_PLANS:
            self._plans.clear()
            self._seen.clear()
        self._seen.add(seen)
        return self(*changing)


def _watched() -> bool:
    """Whether somebody looks at what is called: a mode, a trace, a transform, a profiler."""
    return is_watched() or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]


def of_matrix(d: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
    """dᵀ · h: the gradient of a matrix that is multiplied by h, in its own ``dtype`` where the library's product can."""
    if dtype == torch.float32 != h.dtype and h.is_cuda and runner.nvidia:
        return torch.mm(d.t(), h, out_dtype=dtype)  # neither rounded nor cast
    return torch.mm(d.t(), h)


def contiguous(x: Any) -> Any:
    """A tensor, those of a tuple, or None, as kernels read them."""
    if not isinstance(x, tuple):
        return None if x is None else x.contiguous()
    if all([each is None or each.is_contiguous() for each in x]):
        return x
    return type(x)(*[each if each is None else each.contiguous() for each in x])
