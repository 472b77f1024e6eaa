"""What a fused operation is, and what all share on the host: launching, calling, registration with PyTorch.

An operation is registered as ``torch.ops.tnt_fast.NAME``, so that ``torch.compile``, ``torch.export`` and FlopCounterMode see
one node. It has one result, a tensor, or several, a tuple, all of them new. Its backward is another one, ``NAME_backward``,
which starts again from the inputs: nothing else is kept. Where an operation ``keeps`` something, a call that records gradients
is a third one, ``NAME_recorded``, with that as further results. By hand: of a call of inner that records gradients,
``torch.library.custom_op`` takes 80 of the host's 145 µs, nearly all of them to fill in defaults that no argument has (python
-m benchmarks.host).
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import cache, partial, reduce, wraps
from itertools import repeat
from operator import is_, itemgetter, or_
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
DTYPE: Any = Tensor.dtype.__get__  # type: ignore[attr-defined]
DENSE = [torch._C.DispatchKeySet(key) for key in (torch._C.DispatchKey.CUDA, torch._C.DispatchKey.CPU)]
LIBRARY = torch.library.Library("tnt_fast", "FRAGMENT")
HERE = nullcontext()
MOST_ROWS = 2**30  # patches or tokens of a call: the kernels count them, and a tile more, in 32 bits
MOST_LAUNCHERS = 4096  # that are remembered
MOST_PLANS = 1024  # of an operation that are remembered
PLANS: list[dict[tuple[Any, ...], Any]] = []  # of every operation
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
        key = None if spec.known is not None else (id(spec), grid, device, options.get("arch"), *_seen(arguments))
        found = self._launchers.get(key)  # type: ignore[arg-type]
        if found is not None:
            found[1](*arguments, *spec.constants.values())
            return None
        launcher = spec.kernel[(grid,)](*arguments, **spec.constants, **options)[grid, 1, 1]
        if key is None:
            spec.known.append(launcher)  # type: ignore[union-attr]
            return None
        if len(self._launchers) >= MOST_LAUNCHERS:
            self._launchers.clear()
        self._launchers[key] = spec, launcher  # with spec, so that no other gets its id
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
    matrix instructions are taken; ``registers``: of a thread, at most, so that more programs fit on a multiprocessor;
    ``capability``: of the only GPUs that it is launched on.
    """

    rows: int
    warps: int
    per_sm: int = 0
    chunk: int = 0
    stages: int = 1
    mma_arch: str | None = None
    registers: int | None = None
    capability: tuple[int, int] | None = None


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
    ``known``: of ``again``, what runs it, once that is known. ``l1``: whether what programs load again lies in the L1 cache.
    ``loops``: how many main loops it has, one behind another, each over all patches.
    """

    kernel: Any
    constants: dict[str, Any]
    config: Config
    patches: float
    turns: int = 1
    known: list[Any] | None = None
    l1: bool = True
    loops: int = 1

    def again(self) -> "Launch":
        """For one place of a plan, which launches it with all that Triton compiles for as it was, and on the same grid."""
        return self._replace(known=[])


class Copy(NamedTuple):
    """A kernel's argument: contiguous values, and where so many of them go, in what dtype that has."""

    source: Any
    ptr: Any
    n: Any


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


def surroundings(dtype: torch.dtype = torch.float32) -> tuple[Any, str]:
    """What else launches of a computation in ``dtype`` depend on."""
    return runner, precision(dtype)


def programs(device: torch.device, tiles: int, per_sm: int) -> int:
    """Size of a grid that stays: what fits on the device at once, at most one program a tile."""
    return min(tiles, runner.programs(device, per_sm), MOST_PROGRAMS)


def sharing(spec: "Launch", rows: int, device: torch.device) -> int:
    """How many programs of a grid that stays share the rows of each of its GROUPS of columns."""
    groups = spec.constants["Z"].GROUPS
    return max(1, programs(device, -(-rows // spec.config.rows) * groups, spec.config.per_sm) // groups)


def piece(W: int) -> int:
    """How many of a row's W columns are a piece, as tile.py takes rows: 128, or 64 where that leaves less padding."""
    columns = 128 if -W % 128 < 64 else 64
    return min(columns, max(16, triton.next_power_of_2(W)))


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

    def forget() -> None:
        """And the plans, which hold such launches: for another table of configurations."""
        known.clear()
        for plans in PLANS:
            plans.clear()

    specialised.forget = forget
    return specialised


def launch(spec: Launch, grid: int, *arguments: Any) -> None:
    """Launch a specialisation; ``arguments`` in the kernel's order, the first a tensor."""
    if spec.known:
        spec.known[0](*arguments, *spec.constants.values())
        return
    config = spec.config
    options = {"num_warps": config.warps, "num_stages": config.stages}
    capability = runner.capability(arguments[0].device) if config.mma_arch or config.registers else None
    if capability is not None and config.mma_arch and capability[0] >= 9:
        options["arch"] = config.mma_arch
    if capability is not None and config.registers:  # an option of NVIDIA's compiler
        options["maxnreg"] = config.registers
    runner.launch(spec, grid, arguments, options)


# ---- what an operation is ----


@dataclass
class Plan:
    """What is found once for all calls of an operation, or of its backward, whose arguments are alike; it holds no tensors.

    ``run``: what ``prepared`` or ``graded`` made; None of a result without values. ``keeps``: shapes and dtypes of what is
    kept. ``copied``: which gradients are, as the first call finds.
    """

    run: Callable[..., Any] | None
    keeps: dict[str, tuple[tuple[int, ...], torch.dtype]]
    copied: list[int] | None = None


def described(x: Tensor | None) -> tuple[Any, ...] | None:
    """What launches depend on of a tensor."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() & 15, x.device)


class Operation(Arguments):
    """A fused operation: what a file of this folder defines a subclass of, and calls with the arguments of its twin.

    Errors, the model's reasons against the kernels, warnings and fallbacks are all made from what it says here.
    """

    factors: tuple[str, ...] = ()  # drop-path's, which with the activations are what changes from call to call
    passes: str | None = None  # a tensor that the result is added to: its gradient is the result's
    results = 1
    reread: tuple[str, ...] = ()  # what ``a.kept`` calls the first of several results, which the backward reads

    def prepared(self, a: SimpleNamespace) -> Callable[[SimpleNamespace, Any], None]:
        """What launches the forward of arguments that are alike: called with such, and the result as ``empty`` made it.

        It holds none of the tensors that it is made for. Arguments have been checked, and their weights are contiguous.
        ``a.kept``: where gradients are recorded and ``keeps`` names something a dictionary, which is filled. Else None.
        """
        raise NotImplementedError

    def empty(self, a: SimpleNamespace) -> Any:
        """A tensor like the result, a tuple of such like several; by itself like the first activation."""
        return torch.empty_like(getattr(a, self.activations[0]), memory_format=torch.contiguous_format)

    keeps: Callable[[SimpleNamespace], dict[str, tuple[tuple[int, ...], torch.dtype]]] | None = None
    """Shapes and dtypes, by name, of the new tensors that the forward leaves for ``backward`` of such arguments."""

    def unread(self, a: Mapping[str, Any]) -> str | None:
        """A tensor of the last result's shape that ``backward`` does not read: nobody keeps it, the gradient stands in its
        place."""
        return self.passes

    def backward(self, gradient: Any, a: SimpleNamespace, needed: set[str]) -> dict[str, Tensor]:
        """Gradients of the tensors that ``needed`` names, in any dtype, none of them an input; more of them do no harm.

        ``gradient``: of at least one value, of several results a list; ``a.kept``: what the forward left. By itself: once what
        ``graded`` finds.
        """
        return self.graded(gradient, a, needed)(gradient, a)

    def graded(
        self, gradient: Any, a: SimpleNamespace, needed: set[str]
    ) -> Callable[[Any, SimpleNamespace], dict[str, Tensor]]:
        """What computes ``backward`` of gradients and arguments that are alike, as ``prepared`` has it."""
        return lambda gradient, a: self.backward(gradient, a, needed)

    # ---- calling it ----

    def __init__(self) -> None:
        super().__init__()
        self.changing = (*self.activations, *self.factors)
        names = [*self.kinds]
        self.at = [names.index(name) for name in self.changing]
        self._weights = [i for i, name in enumerate(names) if name in self.shapes and i not in self.at]
        self._numbers = [i for i, name in enumerate(names) if name not in self.shapes]
        self._sizing, known = [], {axis for name in self.changing for axis in self.shapes[name].split()}
        for i in self._weights:  # whose sizes do not follow from those before
            if {*filter(str.isalpha, self.shapes[names[i]].split())} - known:
                self._sizing.append(i)
                known |= {*self.shapes[names[i]].split()}
        self._accepted: set[tuple[Any, ...]] = set()
        self._plans: dict[tuple[Any, ...], Plan] = {}
        PLANS.append(self._plans)
        self._register()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The twin, fused: float32, float16 or bfloat16, the weights in the same dtype (or float32 under autocast).

        Raises:
            TypeError, ValueError: a tensor of another dtype, device or shape; named, with what is accepted.
        """
        return self._operation(*self.prepare(self.named(args, kwargs)).values())

    def trusted(self, **given: Any) -> Any:
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

    def planned(
        self, flat: Sequence[Any], way: Any, more: Sequence[Tensor], find: Callable[..., Plan]
    ) -> tuple[Plan, Sequence[Any]]:
        """Of a call's arguments, as the dispatcher takes them, which have been checked; and they, their weights contiguous.

        ``way``: what else distinguishes calls; ``more``: tensors that the arguments say the shapes of.
        """
        weights = [flat[i] for i in self._weights if flat[i] is not None]
        if not all(map(Tensor.is_contiguous, weights)):
            rows = {i: contiguous(flat[i]) for i in self._weights}
            flat = [rows.get(i, x) for i, x in enumerate(flat)]
            weights = [x for x in rows.values() if x is not None]
        key = way, *self._alike(flat, [*weights, *more])
        plan = self._plans.get(key)
        if plan is None:
            plan = find(self.packed(flat))
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan, flat

    def _alike(self, flat: Sequence[Any], others: Sequence[Tensor]) -> tuple[Any, ...]:
        """All that launches depend on of a call's arguments, weights and others; what follows from that is left out."""
        addresses = [*map(Tensor.data_ptr, others)]
        aligned = None if not reduce(or_, addresses, 0) & 15 else tuple([address & 15 for address in addresses])
        return (
            tuple([described(flat[i]) for i in self.at]), tuple(map(is_, flat, repeat(None))), tuple(map(DTYPE, others)),
            aligned, tuple([None if flat[i] is None else flat[i].shape for i in self._sizing]),
            tuple([tuple(x) if isinstance(x := flat[i], list) else x for i in self._numbers]),
            surroundings(flat[self.at[0]].dtype),
        )  # fmt: skip

    def forward_planned(self, flat: Sequence[Any], recorded: bool) -> tuple[Plan, Sequence[Any]]:
        """As ``planned``, of a forward."""

        def find(a: SimpleNamespace) -> Plan:
            a.kept = {} if recorded else None
            keeps = self.keeps(a) if recorded else {}  # type: ignore[misc]
            return Plan(self.prepared(a) if any([x.numel() for x in _several(self.empty(a))]) else None, keeps)

        return self.planned(flat, recorded, (), find)

    def launched(self, plan: Plan, a: SimpleNamespace, recorded: bool) -> list[Tensor]:
        """The results of a call like those that a plan is of, and where gradients are ``recorded`` what is kept."""
        like = getattr(a, self.activations[0])
        a.kept = {} if recorded else None
        if like.is_cuda and like.device.index != torch.cuda.current_device():
            with torch.cuda.device(like.device):
                return self.launched(plan, a, recorded)
        out = self.empty(a)
        if plan.run is not None:
            plan.run(a, out)
        else:
            a.kept = {name: like.new_empty(shape, dtype=dtype) for name, (shape, dtype) in plan.keeps.items()}
        return [*_several(out), *[a.kept[name] for name in plan.keeps]]

    def returned(self, found: Sequence[Tensor]) -> Any:
        """What ``launched`` gives, as a call gives it."""
        return found[0] if self.results == 1 else tuple(found[: self.results])

    def elsewhere(self, device: torch.device) -> list[str]:
        if device.type == "cuda" or runner.on_cpu:
            return []
        return [
            f"{self.activations[0]} is on device {str(device)!r}; the kernel takes CUDA tensors "
            "(on the CPU only in Triton's interpreter, TRITON_INTERPRET=1)"
        ]

    # ---- with PyTorch ----

    def _register(self) -> None:
        """As ``torch.ops.tnt_fast.NAME``, and its gradients as ``NAME_backward``."""
        names = list(self.kinds)
        # of the arguments what a backward reads: tensors and others; and where in these two, one behind the other, each is
        saved = [i for i, name in enumerate(names) if name in self.shapes]
        others = [i for i, name in enumerate(names) if name not in self.shapes]
        at = {index: at for at, index in enumerate(saved + others)}
        in_order = itemgetter(*[at[i] for i in range(len(names))])

        functions: dict[Any, Callable[..., Any]] = {}

        def define(name: str, schema: str, function: Any, fake: Any) -> Any:
            LIBRARY.define(name + schema, tags=[torch.Tag.pt2_compliant_tag])
            LIBRARY.impl(name, function, "CompositeExplicitAutograd")
            found = getattr(torch.ops.tnt_fast, name).default

            def traced(*flat: Any) -> Any:
                _lowered(found)
                return fake(*flat)

            torch.library.register_fake(f"tnt_fast::{name}", traced, lib=LIBRARY)
            functions[found] = function
            return found

        def run(flat: Sequence[Any], recorded: bool) -> list[Tensor]:
            if len(flat) == len(names) or not flat[-1]:  # PyTorch passes no argument that is its default
                self.check(dict(zip(names, flat, strict=False)))
            plan, flat = self.forward_planned(flat[: len(names)], recorded)
            return self.launched(plan, self.packed(flat), recorded)

        def gradients(gradient: Any, *flat: Any) -> list[Tensor]:
            flat, needed, kept = flat[: len(names)], flat[len(names)], [*flat[len(names) + 1 :]]
            kept, first = kept[0] if kept else [], flat[self.at[0]]
            if not any([x.numel() for x in _several(gradient)]):
                return [torch.zeros_like(flat[i], memory_format=torch.contiguous_format) for i in needed]
            wanted = {names[i] for i in needed}

            def find(a: SimpleNamespace) -> Plan:
                return Plan(self.graded(gradient, a, wanted), self.keeps(a) if kept else {})  # type: ignore[misc]

            about = [described(x) for x in _several(gradient)]

            plan = None
            if type(self).graded is not Operation.graded:  # else it takes longer to look than what is found saves
                plan, flat = self.planned(flat, (*needed, *about), kept, find)
            a = self.packed(flat)
            plan = plan or find(a)
            a.kept = dict(zip((*self.reread, *plan.keeps), kept, strict=True)) if kept else None
            with _there(first):
                if torch.is_autocast_enabled(kind := first.device.type):
                    with torch.autocast(kind, enabled=False):  # it has chosen the dtypes in the forward, and must not again
                        found = plan.run(gradient, a)
                else:
                    found = plan.run(gradient, a)
                return _new(plan, [found[names[i]] for i in needed], [flat[i] for i in needed])

        def empty_gradients(gradient: Any, *flat: Any) -> list[Tensor]:
            needed = [flat[i] for i in flat[len(names)]]
            return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in needed]

        # ``checked``: whether the caller has done so
        schema, made = f"({self.schema}, bool checked=False) -> ", ", ".join(["Tensor"] * self.results)
        operation = define(
            self.name, schema + (made if self.results == 1 else f"({made})"), lambda *flat: self.returned(run(flat, False)),
            lambda *flat: self.empty(self.packed(flat)),
        )  # fmt: skip
        recorded_operation = operation
        if self.keeps is not None:

            def empty_recorded(*flat: Any) -> list[Tensor]:
                a = self.packed(flat)
                out = _several(self.empty(a))
                return [*out, *[out[0].new_empty(shape, dtype=dtype) for shape, dtype in self.keeps(a).values()]]

            of_recorded = f"{schema}Tensor[]", lambda *flat: run(flat, True), empty_recorded
            recorded_operation = define(f"{self.name}_recorded", *of_recorded)
        more = "" if self.keeps is None else ", Tensor[] kept"
        kind = "Tensor" if self.results == 1 else "Tensor[]"
        schema = f"({kind} gradient, {self.schema}, SymInt[] needed{more}) -> Tensor[]"
        backward_operation = define(f"{self.name}_backward", schema, gradients, empty_gradients)

        for leaf in {backward_operation, recorded_operation} - {operation}:
            LIBRARY.impl(leaf._schema.name, torch.library.fallthrough_kernel, "Autograd")

        def twice(ctx, *gradients):
            raise RuntimeError(
                f"the gradients of {self.name} were to be differentiated, which the kernels do not do; take a model with "
                "backend='reference'"
            )

        methods = {"forward": staticmethod(lambda ctx, computed, *read: computed()), "backward": staticmethod(twice)}
        once = type(f"{self.name}_backward", (torch.autograd.Function,), methods)

        def below(operation, keys, *flat):
            if keys & torch._C._after_ADInplaceOrView_keyset in DENSE:  # nobody comes between
                return functions[operation](*flat)
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
                found = [found] if self.keeps is None else found
            tensors = [flat[i] for i in saved]
            ctx.unread = self.unread(dict(zip(names, flat, strict=False)))
            if ctx.unread is not None:
                tensors[at[names.index(ctx.unread)]] = None
            ctx.save_for_backward(*tensors, *found[: len(self.reread)], *found[self.results :])
            ctx.others = [flat[i] for i in others]
            return self.returned(found)

        def backward(ctx, *several):
            batched = (torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor)
            if not torch.compiler.is_compiling() and any(is_batched(x) for x in several for is_batched in batched):
                raise NotImplementedError(
                    f"the backward of {self.name} takes one gradient, not a batch (is_grads_batched, vectorize=True, "
                    "torch.func.vmap); compute them one by one, or take a model with backend='reference'"
                )
            gradient = several[0] if self.results == 1 else [*several]
            needed = [i for i, wanted in enumerate(ctx.needs_input_grad[1:]) if wanted]
            tensors = ctx.saved_tensors
            kept = [] if self.keeps is None else [list(tensors[len(saved) :])]
            flat = [*in_order((*tensors[: len(saved)], *ctx.others))]
            if ctx.unread is not None:
                flat[names.index(ctx.unread)] = several[-1]
            found: dict[int, Tensor] = {}
            if self.passes is not None and (passed := names.index(self.passes)) in needed:
                found[passed] = several[-1]  # autograd casts it
                needed.remove(passed)

            def computed() -> tuple[Tensor, ...]:
                if not ctx.past or {*map(type, several)} != {Tensor} or _watched():
                    return tuple(backward_operation(gradient, *flat, needed, *kept))
                with torch._C._AutoDispatchBelowAutograd():
                    return tuple(gradients(gradient, *flat, needed, *kept))

            if needed:
                graded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
                found |= zip(needed, once.apply(computed, *several, *tensors) if graded else computed(), strict=True)
            return None, *[found.get(i) for i in range(len(ctx.needs_input_grad) - 1)]

        methods = {"forward": staticmethod(recorded), "backward": staticmethod(backward)}
        function = type(self.name, (torch.autograd.Function,), methods)

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


def _new(plan: Plan, found: list[Tensor], likes: list[Tensor]) -> list[Tensor]:
    """Gradients as autograd wants them: contiguous, in their arguments' dtypes, no memory twice; copies in one launch."""
    if plan.copied is None:
        copied, seen = [], set()
        for i, (x, like) in enumerate(zip(found, likes, strict=True)):
            if x.dtype == like.dtype and x.is_contiguous() and x.data_ptr() not in seen:  # rows of one sum do not overlap
                seen.add(x.data_ptr())
            else:
                copied.append(i)
        plan.copied = copied
    if plan.copied:
        originals = [found[i] for i in plan.copied]
        for i in plan.copied:
            found[i] = torch.empty(likes[i].shape, dtype=likes[i].dtype, device=likes[i].device)
        torch._foreach_copy_([found[i] for i in plan.copied], originals)
    return found


class Settled:
    """An operation with weights and numbers that ``dispatch.choose`` has accepted: called with what changes, in order.

    Whoever keeps this knows that the weights have the same types, shapes and dtypes, and where ``looked_at`` that they lie
    where they lay and the ``surroundings`` are the same; else each call sees for itself. Where nobody looks on, it goes past
    PyTorch's dispatcher, which takes longer than a launch.
    """

    def __init__(self, operation: Operation, given: dict[str, Any], looked_at: bool) -> None:
        self.operation, self.given = operation, operation.defaults | given
        if "eps" in given:
            self.given["eps"] = float(given["eps"])  # as the dispatcher does
        self._flat = [*by_name(self.given).values()]
        self._weights = [x for x in self._flat if isinstance(x, Tensor)]
        self._looked_at = looked_at and all(map(Tensor.is_contiguous, self._weights))
        self._seen: set[tuple[Any, ...]] = set()
        self._plans: dict[tuple[Any, ...], Plan] = {}

    def __reduce__(self) -> tuple:
        return type(None), ()  # a copy, which has other weights, begins anew

    def __call__(self, *changing: Tensor | None) -> Any:
        operation, first = self.operation, changing[0]
        device = "cuda" if first.is_cuda else first.device.type  # type: ignore[union-attr] # which is a new string each time
        if torch.is_autocast_enabled(device):
            dtype, count = torch.get_autocast_dtype(device), len(operation.activations)
            changing = (*[x if x is None else x.to(dtype) for x in changing[:count]], *changing[count:])
        seen = None if _watched() or not {*map(type, changing)} <= PLAIN else tuple(map(described, changing))
        if seen is None or seen not in self._seen:
            return self._looked(seen, changing, device)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*(flat := self._all(changing))):
            return operation._recorded(partial(self._computed, seen, changing, operation.keeps is not None), *flat)
        return operation.returned(self._computed(seen, changing))

    def _computed(self, seen: tuple[Any, ...], changing: tuple[Tensor | None, ...], recorded: bool = False) -> list[Tensor]:
        operation = self.operation
        plan = self._plans.get((recorded, seen)) if self._looked_at else None
        if plan is None:
            plan, flat = operation.forward_planned(self._all(changing), recorded)
            if self._looked_at:
                self._plans[recorded, seen] = plan
            return operation.launched(plan, operation.packed(flat), recorded)
        a = SimpleNamespace(**self.given | dict(zip(operation.changing, changing, strict=False)))
        return operation.launched(plan, a, recorded)

    def _all(self, changing: tuple[Tensor | None, ...]) -> list[Any]:
        """As the dispatcher takes them."""
        flat = self._flat.copy()
        for i, x in zip(self.operation.at, changing, strict=False):
            flat[i] = x
        return flat

    def _looked(self, seen: tuple[Any, ...] | None, changing: tuple[Tensor | None, ...], device: str) -> Any:
        """A call of what has not been seen, or where somebody looks on."""
        operation, flat, like = self.operation, self._all(changing), self._weights[0]
        accepted = tuple([None if x is None else (x.shape, x.dtype, x.device, type(x)) for x in (*changing, like)])
        if accepted not in operation._accepted and device != "meta":  # where only shapes are asked for
            operation.check(operation.prepare(dict(zip(operation.kinds, flat, strict=True))))
            operation._accepted.add(accepted)
        if device == "meta" or seen is None or not {*map(type, self._weights)} <= PLAIN:
            return operation._operation(*flat, True)
        if len(self._seen) >= MOST_PLANS:
            self._plans.clear()
            self._seen.clear()
        self._seen.add(seen)
        return self(*changing)


def _lowered(operation: Any) -> None:
    """Have Inductor, where it is loaded, call an operation, as it does with what it does not know: that it would find out in
    the middle of a graph, and write down, for a log, what all arguments were made of, of gradients twice as much a block."""
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is None or operation in lowering.lowerings:
        return
    try:
        from torch._inductor.lowering import make_fallback, tag_to_layout_constraint
        from torch._library.utils import get_layout_constraint_tag
    except ImportError:  # an older one, which finds out by itself
        return
    constraint = tag_to_layout_constraint(get_layout_constraint_tag(operation, with_default=True))
    make_fallback(operation, layout_constraint=constraint)


def _several(x: Any) -> Sequence[Tensor]:
    """A result, a gradient, or some of them."""
    return (x,) if isinstance(x, Tensor) else x


def _there(x: Tensor) -> Any:
    """Where the current device is that of a tensor; PyTorch looks for itself, a launch that is known does not."""
    return torch.cuda.device(x.device) if x.is_cuda and x.device.index != torch.cuda.current_device() else HERE


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
