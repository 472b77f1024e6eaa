"""What a model launches on a GPU, eager or compiled by Inductor, found without one and without computing anything.

The model runs on fake CUDA tensors, which have shapes and a device and no memory. Eager: each of PyTorch's operations is seen
by a dispatch mode. Compiled: ``torch.compile`` itself runs, Dynamo, AOTAutograd and Inductor's scheduler, for a GPU that is
described to it; instead of loading the code that it writes, its plan is kept. Our operations are run on their fake arguments
with a recorder in the place of Triton's launcher (launched.py), so that what is within them is seen in both ways. What Inductor
decides by timing (padding of products) it does not do here.

What it does not see: kernels that a library launches for one call (cuDNN's backward is three, a product that splits its sums
two), and fills of memory.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import timm
import torch
import torch._functorch.config
import torch._inductor.config
import torch.cuda.amp.common
import torch.nn.functional as F
import torch.utils._triton
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import ir
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import get_fused_kernel_name
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tnt_fast
from benchmarks.launched import Launched, Recorder
from benchmarks.simulate import Gpu
from benchmarks.static_cost import TARGETS
from benchmarks.test_models import DEITS, TNTS
from tnt_fast.kernels import operation

DEPTH, IMAGE, CLASSES = 12, 224, 1000
MODELS = {  # name: whose, which, and the DeiT it is held against
    **{f"tnt_{size}": ("ours", f"tnt_{size}", f"deit_{size}") for size in ("s", "b", "ti")},
    **{f"timm_tnt_{size}": ("timm", f"tnt_{size}", f"deit_{size}") for size in ("s", "b", "ti")},
    **{f"deit_{size}": ("deit", f"deit_{size}", "") for size in ("s", "b", "ti")},
}

# PyTorch's operations that launch nothing: views, and what only makes room
NO_LAUNCH = {
    "alias", "as_strided", "detach", "detach_", "device", "empty", "empty_like", "empty_strided", "expand", "lift_fresh",
    "new_empty", "new_empty_strided", "permute", "resolve_conj", "select", "slice", "split", "split_with_sizes", "squeeze", "t",
    "transpose", "unbind", "unsqueeze", "view", "view_as", "_reshape_alias", "_unsafe_view", "sym_size", "sym_stride",
    "is_same_size",
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A launch, or a call of a library.

    ``inside``: the operation of ours that makes it. ``by``: "ours", "inductor", or "pytorch", which calls libraries; "host": an
    operation of ours is called, before what it launches. ``shapes``: of the tensors that it reads; ``bytes``: that it reads and
    writes, each once.
    """

    name: str
    inside: str
    by: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    bytes: int
    made: tuple[int, ...] = ()  # the shape of the first result
    about: str = ""  # of ours: what else makes another kernel of it
    launched: Launched | None = field(default=None, compare=False, repr=False)


def _bytes(x: Tensor) -> int:
    """That lie under a tensor: an expanded axis has them once."""
    size = x.element_size()
    for length, stride in zip(x.shape, x.stride(), strict=True):
        size *= length if stride else 1
    return size


def _tensors(given: Any) -> list[Tensor]:
    return [x for x in tree_leaves(given) if isinstance(x, Tensor)]


def _makes(function: Any, given: Any, made: Any) -> bool:
    """Whether there is anything new: reshape, contiguous and to often give what they got."""
    memory = {x.untyped_storage()._cdata for x in _tensors(given)}
    return function._schema.is_mutable or any(x.untyped_storage()._cdata not in memory for x in _tensors(made))


def _call(function: Any, inside: str, args: Any, kwargs: Any, made: Any) -> Call:
    schema, read, written = function._schema, _tensors((args, kwargs)), _tensors(made)
    moved = sum(map(_bytes, read)) + sum(_bytes(x) for x in written if not any(x is y for y in read))
    for argument, x in zip(schema.arguments, args, strict=False):  # what is changed in place is written, too
        if argument.alias_info is not None and argument.alias_info.is_write:
            moved += sum(map(_bytes, _tensors(x)))
    shapes, shape = tuple(tuple(x.shape) for x in read[:8]), tuple(written[0].shape) if written else ()
    dtype = str((read or written)[0].dtype).removeprefix("torch.")
    return Call(schema.name.split("::")[1], inside, "pytorch", shapes, dtype, moved, shape)


class _Seen(TorchDispatchMode):
    """Keeps what PyTorch's operations call, and runs ours to see what they do."""

    def __init__(self, recorder: Recorder, fake: FakeTensorMode):
        super().__init__()
        self.recorder, self.fake, self.inside = recorder, fake, ""
        self.calls: list[Call] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tnt_fast":
            return self.ours(function, args)
        made = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        if function.namespace != "prim" and name not in NO_LAUNCH and _makes(function, (args, kwargs), made):
            self.calls.append(_call(function, self.inside, args, kwargs, made))
        return made

    def ours(self, function: Any, args: Any) -> Any:
        """An operation of ours, or its backward, with all it launches."""
        name = function._schema.name.split("::")[1]
        launch, before = self.recorder.launch, self.inside

        def seen(spec: Any, grid: int, arguments: Any, options: dict) -> None:
            launch(spec, grid, arguments, options)
            found = self.recorder.launched.pop()
            read = _tensors(found.arguments)
            shapes, dtype = tuple(tuple(x.shape) for x in read[:8]), str(read[0].dtype).removeprefix("torch.")
            about = f"{grid} programs, {spec.constants}, {options}, {[str(x.dtype) for x in read]}"
            self.calls.append(Call(spec.kernel.__name__, name, "ours", shapes, dtype, found.bytes, (), about, _on_meta(found)))

        self.calls.append(Call(name, "", "host", (), "", 0))
        self.inside = name
        try:
            launching = mock.patch.object(self.recorder, "launch", seen)
            with launching, mock.patch.object(operation, "_new", _new), torch.no_grad(), self:
                # what is registered to compute it, where a fake result would do
                return function._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args)
        finally:
            self.inside = before


def _on_meta(found: Launched) -> Launched:
    """With tensors that the launcher can look at after the fake ones' mode is over."""

    def moved(x: Any) -> Any:
        if isinstance(x, Tensor):
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        if isinstance(x, tuple):
            return type(x)(*map(moved, x)) if hasattr(x, "_fields") else tuple(map(moved, x))
        return x

    with torch._C._DisableTorchDispatch(), fake_tensor.unset_fake_temporarily():
        return found._replace(arguments=moved(found.arguments))


def _new(plan: Any, found: list[Tensor], likes: list[Tensor]) -> list[Tensor]:
    """As operation._new, which looks at addresses: gradients in their arguments' dtypes, no memory of two of them."""
    result, seen, copies, originals = [], set(), [], []
    for x, like in zip(found, likes, strict=True):
        place = (x.untyped_storage()._cdata, x.storage_offset())
        if x.dtype == like.dtype and x.is_contiguous() and place not in seen:
            seen.add(place)
        else:
            originals.append(x)
            copies.append(x := torch.empty(like.shape, dtype=like.dtype, device=like.device))
        result.append(x)
    if copies:
        torch._foreach_copy_(copies, originals)
    return result


# ---- gradients ----


def gradients(outputs: Any, inputs: Any, grad_outputs: Any = None, *_: Any, **__: Any) -> tuple[Tensor | None, ...]:
    """torch.autograd.grad, by a walk over the recorded nodes: PyTorch's own engine asks the driver for streams."""
    outputs, inputs = ([x] if isinstance(x, Tensor) else list(x) for x in (outputs, inputs))

    def edge(x: Tensor) -> tuple[Any, int]:
        return torch.autograd.graph.get_gradient_edge(x)[:2]

    wanted = {edge(x): i for i, x in enumerate(inputs)}
    ends = {node for node, _ in wanted}
    order, seen, stack = [], set(), [(node, False) for node, _ in map(edge, outputs)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack += [(node, True), *((after, False) for after, _ in node.next_functions if after is not None)]
    held: dict[tuple[Any, int], Tensor] = {}

    def give(to: tuple[Any, int], gradient: Tensor | None) -> None:
        if gradient is None or to[0] is None:
            return
        like = to[0]._input_metadata[to[1]]
        if tuple(gradient.shape) != tuple(like.shape):
            gradient = gradient.sum_to_size(*like.shape)
        gradient = gradient if gradient.dtype == like.dtype else gradient.to(like.dtype)
        held[to] = held[to] + gradient if to in held else gradient

    found: list[Tensor | None] = [None] * len(inputs)
    with torch.no_grad():
        given = [torch.ones_like(x) for x in outputs] if grad_outputs is None else grad_outputs
        for x, gradient in zip(outputs, given, strict=True):
            give(edge(x), gradient)
        for node in reversed(order):
            come = [held.pop((node, i), None) for i in range(len(node._input_metadata))]
            for i, gradient in enumerate(come):
                if (node, i) in wanted:
                    found[wanted[node, i]] = gradient
            if node in ends or all(gradient is None for gradient in come):
                continue
            if hasattr(node, "apply"):  # written in Python: it gets zeros where nothing comes
                likes = zip(come, node._input_metadata, strict=True)
                come = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) if g is None else g for g, x in likes]
            out = node.apply(*come) if hasattr(node, "apply") else node(*come)
            out, edges = out if isinstance(out, tuple) else (out,), node.next_functions
            if hasattr(node, "needs_input_grad"):  # written in Python: a gradient for every argument, an edge for every tensor
                out = [gradient for gradient, needed in zip(out, node.needs_input_grad, strict=True) if needed]
                edges = [after for after in edges if after[0] is not None]
            for after, gradient in zip(edges, out, strict=True):
                give(after, gradient)
    return tuple(found)


# ---- a GPU that is described ----


def _cudnn(q: Any, k: Any, v: Any, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) -> Any:
    graded = torch.is_grad_enabled() and q.requires_grad
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    return attend(q, k, v, attn_mask, graded, dropout_p, is_causal, scale=scale)[0]


def _flash(q: Any, k: Any, v: Any, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]


def _properties(gpu: Gpu) -> SimpleNamespace:
    limits = TARGETS[gpu.target]
    major, minor = divmod(int(limits.arch), 10)
    return SimpleNamespace(
        name=gpu.name, type="cuda", index=0, major=major, minor=minor, multi_processor_count=gpu.multiprocessors,
        total_memory=80 << 30, regs_per_multiprocessor=limits.registers, max_threads_per_multi_processor=32 * limits.warps,
        warp_size=32, shared_memory_per_block=48 << 10, shared_memory_per_block_optin=limits.shared - 1024,
        shared_memory_per_multiprocessor=limits.shared, L2_cache_size=50 << 20, max_threads_per_block=1024, gcnArchName="",
        uuid="", is_integrated=0,
    )  # fmt: skip


@contextmanager
def _described(gpu: Gpu) -> Iterator[None]:
    """PyTorch answers as on a machine with this GPU, as far as tensors without memory need it."""
    found = _properties(gpu)
    capability = (found.major, found.minor)

    def answer(value: Any) -> Callable:
        return lambda *args, **kwargs: value

    state = answer(torch.zeros(16, dtype=torch.uint8))
    for passes in (joint_graph, post_grad):
        passes.lazy_init(torch.device("cpu"))  # else in the middle, with tensors of the device
    with ExitStack() as stack:

        def instead(owner: Any, **values: Any) -> None:
            values = {name: staticmethod(x) if isinstance(owner, type) else x for name, x in values.items()}
            stack.enter_context(mock.patch.multiple(owner, **values))

        instead(
            torch.cuda, is_available=answer(True), is_initialized=answer(True), current_device=answer(0),
            device_count=answer(1), get_device_properties=answer(found), get_device_capability=answer(capability),
            _lazy_init=answer(None), synchronize=answer(None), get_device_name=answer(gpu.name), get_rng_state=state,
            set_rng_state=answer(None), mem_get_info=answer((80 << 30, 80 << 30)), _exchange_device=answer(0),
            _maybe_exchange_device=answer(0), set_device=answer(None), is_bf16_supported=answer(True),
        )  # fmt: skip
        random = dict(get_rng_state=state, set_rng_state=answer(None), current_device=answer(0), _lazy_init=answer(None))
        instead(torch.cuda.random, **random)
        instead(
            CudaInterface, is_available=answer(True), get_compute_capability=answer(found.major * 10 + found.minor),
            current_device=answer(0), device_count=answer(1), get_raw_stream=answer(0),
            raise_if_triton_unavailable=answer(None), is_triton_capable=answer(True), get_device_properties=answer(found),
            exchange_device=answer(0), maybe_exchange_device=answer(0), set_device=answer(None), synchronize=answer(None),
        )  # fmt: skip
        instead(CudaInterface.Worker, get_device_properties=answer(found), current_device=answer(0))
        instead(fake_tensor, init_gpu_context=answer(None))
        instead(torch.utils._triton, triton_hash_with_backend=answer("none"))
        torch.utils._triton.has_triton.cache_clear()  # it remembers whether there was a GPU
        stack.callback(torch.utils._triton.has_triton.cache_clear)
        instead(torch.cuda.amp.common, amp_definitely_not_available=answer(False))
        # in half precision PyTorch 2.11 takes cuDNN's attention on Hopper (results/2026-11-26-0640, kernels-inference.txt)
        cudnn = found.major == 9
        chosen = SDPBackend.CUDNN_ATTENTION if cudnn else SDPBackend.FLASH_ATTENTION
        instead(F, scaled_dot_product_attention=_cudnn if cudnn else _flash)
        instead(torch, _fused_sdp_choice=answer(int(chosen)))
        instead(torch.autograd, grad=gradients)
        instead(joint_graph, lazy_init=answer(None))
        instead(post_grad, lazy_init=answer(None))
        stack.enter_context(torch._functorch.config.patch(force_non_lazy_backward_lowering=True))
        stack.enter_context(
            torch._inductor.config.patch(
                compile_threads=1, fx_graph_cache=False, force_disable_caches=True, shape_padding=False,
                joint_graph_constant_folding=False,
            )
        )  # fmt: skip
        yield


@contextmanager
def on(gpu: Gpu) -> Iterator[_Seen]:
    """Inside, tensors of the device "cuda" are fake ones of this GPU, and our operations take them."""
    major, minor = divmod(int(TARGETS[gpu.target].arch), 10)
    recorder = Recorder(gpu.multiprocessors, (major, minor))
    with warnings.catch_warnings(), _described(gpu), recorder.running(), FakeTensorMode() as mode:
        warnings.simplefilter("ignore")
        yield _Seen(recorder, mode)


def placed(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A model of the meta device with fake weights on the GPU."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, device="cuda", dtype=dtype))
        for name, x in module._buffers.items():
            if x is not None:
                module._buffers[name] = torch.empty(x.shape, device="cuda", dtype=x.dtype)
    return model


# ---- eager and compiled ----


def eager(gpu: Gpu, run: Callable[[], Any]) -> list[Call]:
    """What ``run`` calls, which makes its tensors itself."""
    with on(gpu) as seen, seen:
        run()
    return seen.calls


def compiled(gpu: Gpu, prepare: Callable[[], tuple[Callable, tuple]]) -> list[Call]:
    """What the code calls that Inductor writes for a function, and for its gradients where they are asked for.

    ``prepare``: makes the function and its arguments, of fake tensors.
    """
    calls: list[Call] = []
    with on(gpu) as seen:

        def planned(graph: GraphLowering) -> Any:
            graph.codegen()
            with seen.fake:
                for node in graph.scheduler.nodes:
                    calls.extend(_node(node, seen))
            return SimpleNamespace(call=_stop, __file__="", runner=None)

        function, arguments = prepare()
        torch._dynamo.reset()
        with mock.patch.object(GraphLowering, "compile_to_module", planned), suppress(_Planned):
            torch.compile(function, dynamic=False, fullgraph=True)(*arguments)
        torch._dynamo.reset()
    return calls


class _Planned(Exception):
    """Instead of running what was planned."""


def _stop(*_: Any) -> None:
    raise _Planned


def _node(node: Any, seen: _Seen) -> list[Call]:
    """The calls of a node of Inductor's schedule."""
    kind = type(node).__name__
    if kind.startswith("Nop"):
        return []
    if not kind.startswith("Extern"):
        name = get_fused_kernel_name(node.get_nodes(), "original_aten").removeprefix("fused_")
        return [Call(name, "", "inductor", (), "", node.get_read_write_buffers_sizes())]
    made = node.node
    if isinstance(made, ir.MultiOutput):
        return []
    read = [_fake(x) for x in made.inputs if isinstance(x, ir.IRNode) and not isinstance(x.get_output_spec(), ir.NoneLayout)]
    if made.op_overload is not None and made.op_overload.namespace == "tnt_fast":
        args, _ = made.unflatten_args([_fake(x) for x in made.inputs], made.constant_args)
        seen.calls.clear()
        seen.ours(made.op_overload, args)
        return list(seen.calls)
    name = made.op_overload._schema.name.split("::")[1]
    shapes = tuple(tuple(x.shape) for x in read)
    dtype = str(read[0].dtype).removeprefix("torch.")
    spec = made.get_output_spec()
    shape = tuple(int(n) for n in spec.size) if isinstance(spec, ir.Layout) else ()
    return [Call(name, "", "pytorch", shapes, dtype, node.get_read_write_buffers_sizes(), shape)]


def _fake(x: Any) -> Tensor:
    layout = x.get_layout()
    sizes, strides = ([int(n) for n in each] for each in (layout.size, layout.stride))
    return torch.empty_strided(sizes, strides, dtype=layout.dtype, device=layout.device)


def saved_bytes(run: Callable[[], Any], parameters: list[Tensor]) -> int:
    """What autograd keeps of ``run``, besides the parameters: each memory once. Within ``on``."""
    kept: dict[int, Any] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return x

    own = {p.untyped_storage()._cdata for p in parameters}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run()
    return sum(storage.nbytes() for storage in kept.values())


# ---- whole models ----


def bare(name: str, depth: int = DEPTH) -> nn.Module:
    """A model of the table without values."""
    whose, which, _ = MODELS[name]
    with torch.device("meta"):
        if whose == "deit":
            return timm.create_model(DEITS[which], depth=depth)
        if whose == "timm":
            return timm.models.tnt.TNT(**TNTS[which], depth=depth)
        return tnt_fast.TNT(**TNTS[which], depth=depth, backend="fused")


def _prepared(name: str, mode: str, batch: int, depth: int) -> Callable[[], tuple[Callable, tuple]]:
    model, train = bare(name, depth), mode == "train"

    def prepare() -> tuple[Callable, tuple]:
        dtype = torch.float32 if train else torch.bfloat16
        placed(model, dtype).train(train)

        def run(images: torch.Tensor) -> torch.Tensor:
            with torch.set_grad_enabled(train), torch.autocast("cuda", torch.bfloat16, enabled=train):
                return model(images)

        return run, (torch.empty(batch, 3, IMAGE, IMAGE, device="cuda", dtype=dtype),)

    return prepare


def _rest_of_a_step(model: nn.Module, batch: int) -> None:
    """The loss, its gradient and AdamW, which run eager."""
    logits = torch.empty(batch, CLASSES, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.empty(batch, device="cuda", dtype=torch.int64)
    weight = torch.empty(batch, device="cuda")
    loss = (F.cross_entropy(logits.float(), labels, reduction="none") * weight).sum()
    gradients(loss, logits)
    own = [p.detach() for p in model.parameters()]
    given, first, second = ([torch.empty_like(p) for p in own] for _ in range(3))
    steps = [torch.empty((), device="cuda") for _ in own]
    rate = dict(lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8, amsgrad=False, maximize=False)
    torch._fused_adamw_(own, given, first, second, [], steps, **rate)


def planned(name: str, mode: str, batch: int, gpu: Gpu, depth: int = DEPTH) -> tuple[Counter[Call], Counter[str]]:
    """What a compiled model launches in a call or a step, with how often; and which operations of ours the host calls."""
    calls = compiled(gpu, _prepared(name, mode, batch, depth))
    if mode == "train":
        model = bare(name, depth)
        calls += eager(gpu, lambda: _rest_of_a_step(placed(model, torch.float32), batch))
    launched = Counter(call for call in calls if call.by != "host")
    return launched, Counter(call.name for call in calls if call.by == "host")


def launches_per_block(name: str, mode: str, batch: int, gpu: Gpu, total: int) -> float:
    """Of a block in the middle: of a model's launches those that two blocks do not have, over the others."""
    two = sum(planned(name, mode, batch, gpu, 2)[0].values())
    return round((total - two) / (DEPTH - 2), 1)


def saved_mb_per_image(name: str, gpu: Gpu, depth: int = DEPTH) -> float:
    """What autograd keeps of an image, eager, under autocast: the difference of two batches."""

    def kept(batch: int) -> int:
        prepare = _prepared(name, "train", batch, depth)
        with on(gpu):
            run, given = prepare()
            model = next(cell.cell_contents for cell in run.__closure__ if isinstance(cell.cell_contents, nn.Module))
            return saved_bytes(lambda: run(*given), list(model.parameters()))

    return round((kept(6) - kept(2)) / 4 / 1e6, 2)
