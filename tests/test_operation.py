"""What all operations share on the host: what they read, named errors, dtypes, autocast, and what is not differentiated."""

import contextlib
import copy
import gc
import re
import warnings
import weakref
from collections import namedtuple
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, perturb
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from cases import case, check, fold_tensors, inner_tensors, normal
from helpers import HERE, call, joined

from tnt_fast import TNT, dispatch, kernels, reference, why_not_fused
from tnt_fast.arguments import beyond
from tnt_fast.kernels import operation
from tnt_fast.kernels.operation import Config, Gpu, Launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATIONS = pytest.mark.parametrize("operation", kernels.OPERATIONS)


def given(operation: str, dtype: torch.dtype = torch.float32) -> tuple[dict, dict]:
    tensors, others = case(operation)
    return {k: None if v is None else v.to(DEVICE, dtype) for k, v in tensors.items()}, others


def run(operation: str, tensors: dict, others: dict) -> torch.Tensor:
    return call(kernels.OPERATIONS[operation], **tensors, **others)


@OPERATIONS
def test_the_description_is_of_the_references_arguments(operation):
    tensors, others = case(operation)
    described = [argument.name for argument in kernels.OPERATIONS[operation].arguments]
    assert set(described) == set(tensors) | set(kernels.OPERATIONS[operation].factors)


@OPERATIONS
def test_none_is_computed_as_the_reference_does_or_named(operation):
    for name in given(operation)[0]:
        tensors, others = given(operation)
        tensors[name] = None
        try:
            expected = call(getattr(reference, operation), **tensors, **others)
        except (TypeError, AttributeError):
            with pytest.raises(ValueError, match=rf"{operation}: .*{name} is None; it is needed"):
                run(operation, tensors, others)
            with pytest.raises(TypeError, match=rf"{operation}: {name} is a list; accepted: torch.Tensor"):
                run(operation, {**tensors, name: [1.0, 2.0]}, others)
            continue
        if name.removeprefix("inner_") in ("qk_bias", "v_bias"):
            both = " and ".join([name.replace("v_bias", "qk_bias"), name.replace("qk_bias", "v_bias")])
            with pytest.raises(ValueError, match=f"{operation}: {both} are given or left out together"):
                run(operation, tensors, others)
        else:
            torch.testing.assert_close(run(operation, tensors, others), expected, rtol=1e-4, atol=1e-5, msg=name)


@OPERATIONS
def test_shapes_that_do_not_fit_are_named(operation):
    # activations set the sizes that weights are held to
    others_of = {"pixel": "(?:fold_|inner_)?norm1_weight", "patch": "proj_weight"}
    for name in [name for name, x in given(operation)[0].items() if x is not None]:
        tensors, others = given(operation)
        for spoil in (lambda x: x.new_ones(()), lambda x: x[None], lambda x: x.repeat(*[1] * (x.ndim - 1), 2)):
            if operation == "pixel_embed" and name == "image" and spoil(tensors[name]).ndim == 4:
                continue  # a wider image is one
            with pytest.raises(ValueError, match=rf"{operation}: .*\b({name}|{others_of.get(name, name)})\b"):
                run(operation, {**tensors, name: spoil(tensors[name])}, others)


@OPERATIONS
def test_dtypes_that_differ_without_autocast_are_named_and_taken_with_it(operation):
    tensors, others = given(operation)
    activations = [a.name for a in kernels.OPERATIONS[operation].arguments if a.activation]
    first = activations[0]
    mixed = {**tensors, **{name: tensors[name].half() for name in activations}}
    with pytest.raises(
        TypeError, match=rf"{operation}: \w+ is torch\.float32, {first} is torch\.float16; accepted: torch\.float16"
    ):
        run(operation, mixed, others)
    with torch.autocast(DEVICE, torch.float16):
        assert run(operation, mixed, others).dtype == torch.float16
        assert run(operation, tensors, others).dtype == torch.float16
        with pytest.raises(TypeError, match=rf"{operation}: {first} is torch\.float64; accepted: torch\.bfloat16"):
            run(operation, {**tensors, first: tensors[first].double()}, others)
    with (
        torch.autocast(DEVICE, torch.bfloat16),
        pytest.raises(TypeError, match=rf"{operation}: \w+ is torch\.float16, {first} is torch\.bfloat16; accepted"),
    ):
        run(operation, {k: None if v is None else v.half() for k, v in tensors.items()}, others)


@pytest.mark.parametrize(
    ("pixel", "patch"),
    [(torch.float16, torch.float32), (torch.float32, torch.float16), (torch.float16, torch.float16)],
    ids=str,
)
def test_folds_result_has_the_references_dtype(pixel, patch):
    tensors = {k: None if v is None else v.to(DEVICE, pixel) for k, v in fold_tensors(2, 5, 16, 12, 24, False).items()}
    tensors["patch"] = normal(2, 6, 24).to(DEVICE, patch)
    tensors = {k: None if v is None else v.requires_grad_() for k, v in tensors.items()}
    expected, found = reference.fold(**tensors), run("fold", tensors, {})
    assert found.dtype == expected.dtype == torch.promote_types(pixel, patch)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    wanted = [v for v in tensors.values() if v is not None]
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), wanted) for x in (found, expected)), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * b.abs().max().item())


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (dict(stride=0), "stride=0; accepted: a positive integer"),
        (dict(stride=5), r"stride 5 does not divide patch_size \(16, 16\)"),
        (dict(patch_size=16), "patch_size=16; accepted: two positive integers"),
        (dict(patch_size=(16, 0)), r"patch_size=\(16, 0\); accepted: two positive integers"),
        (dict(patch_stride=(16,)), r"patch_stride=\(16,\); accepted: two positive integers"),
        (dict(patch_size=(16, 20)), "32 pixels of the image are not covered by patches of 20 every 16"),
    ],
    ids=str,
)
def test_numbers_of_pixel_embed_that_do_not_fit_are_named(spoilt, message):
    tensors, others = given("pixel_embed")
    with pytest.raises(ValueError, match=f"pixel_embed: .*{message}"):
        run("pixel_embed", tensors | {"pixel_pos": None}, others | spoilt)


@OPERATIONS
def test_sizes_are_taken_up_to_their_limits_and_named_beyond(operation):
    for name, most in kernels.OPERATIONS[operation].limits.items():
        first, *others = name.split("*")
        sizes = dict.fromkeys(others, 1)
        assert beyond({name: most}, sizes) == []  # not known
        assert beyond({name: most}, {**sizes, first: most}) == []
        assert len(beyond({name: most}, {**sizes, first: 0})) == (not others)
        (reason,) = beyond({name: most}, {**sizes, first: most + 1})
        assert re.search(rf"\b{most + 1} .*; accepted: {'up' if others else '1'} to {most}$", reason)


@pytest.mark.parametrize("B", [2**29 + 1, 2**30])
def test_tokens_that_the_kernels_cannot_count_are_named(B):
    patch = torch.empty(1, device=DEVICE).expand(B, 2, 24)
    with pytest.raises(ValueError, match=f"outer: {2 * B} tokens; accepted: up to {2**30}"):
        run("outer", given("outer")[0] | {"patch": patch}, dict(num_heads=3))
    tensors = given("fold")[0]
    pixel = torch.empty(1, device=DEVICE).expand(B, 1, 12)  # fewer pixels than tokens
    tensors |= {"patch": patch, "pixel": pixel, "proj_weight": tensors["proj_weight"][:, :12].contiguous()}
    tensors |= {name: tensors[name][:12].contiguous() for name in ("norm1_weight", "norm1_bias")}
    with pytest.raises(ValueError, match=f"fold: {2 * B} tokens; accepted: up to {2**30}"):
        run("fold", tensors, {})


def test_more_than_the_kernels_can_count_is_named():
    pixel = torch.empty(1, device=DEVICE).expand(2**27, 16, 24)
    tensors = given("inner")[0] | {k: v.float().to(DEVICE) for k, v in inner_tensors(1, 16, 24, 96, bias=True).items()}
    with pytest.raises(ValueError, match=f"inner: {2**31} pixels of all patches; accepted: up to {2**30}"):
        run("inner", tensors | {"pixel": pixel}, dict(num_heads=4))


# ---- autocast ----


@pytest.mark.parametrize("sizes", [(64, 16, 24, 96), (5, 16, 36, 144)], ids=["kernel", "by PyTorch"])
def test_a_backward_under_autocast_is_the_same_backward(sizes):
    tensors = {k: None if v is None else v.float().to(DEVICE).requires_grad_() for k, v in inner_tensors(*sizes).items()}
    wanted = [v for v in tensors.values() if v is not None]
    out = run("inner", tensors, dict(num_heads=4))
    upstream = torch.randn_like(out) * 100
    expected = torch.autograd.grad(out, wanted, upstream, retain_graph=True)
    with torch.autocast(DEVICE, torch.float16):
        found = torch.autograd.grad(out, wanted, upstream)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


# ---- derivatives that there are none of ----


@OPERATIONS
def test_forward_mode_and_batched_gradients_are_named_errors(operation):
    tensors, others = given(operation)
    first = next(iter(tensors))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[first], torch.ones_like(tensors[first]))
        with pytest.raises(NotImplementedError, match=f"{operation}: the kernels have no forward-mode derivatives"):
            run(operation, {**tensors, first: dual}, others)
        run(operation, tensors, others)  # without a tangent there is nothing to lose

    def of_first(x):
        return run(operation, {**tensors, first: x}, others).sum()

    with pytest.raises(NotImplementedError, match=f"{operation}: the kernels have no forward-mode derivatives"):
        torch.func.jvp(of_first, (tensors[first],), (torch.ones_like(tensors[first]),))
    with pytest.raises(NotImplementedError, match=f"{operation}: the kernels have no forward-mode derivatives"):
        torch.func.vmap(of_first)(tensors[first][None])
    x = tensors[first].clone().requires_grad_()
    out = run(operation, {**tensors, first: x}, others)
    with pytest.raises(NotImplementedError, match=f"the backward of {operation} takes one gradient, not a batch"):
        torch.autograd.grad(out, x, torch.ones(2, *out.shape, device=DEVICE), is_grads_batched=True)
    with pytest.raises(NotImplementedError, match="one gradient, not a batch|no forward-mode derivatives"):
        torch.autograd.functional.jacobian(lambda x: of_first(x).expand(2), x, vectorize=True)


def test_forward_mode_is_a_reason_against_the_fused_model():
    model, image = TNT(**TINY, backend="fused").to(DEVICE), torch.randn(1, 3, 32, 32, device=DEVICE)
    with torch.autograd.forward_ad.dual_level():
        assert any("forward-mode differentiation is active" in reason for reason in why_not_fused(model, image))
        with pytest.raises(RuntimeError, match="forward-mode differentiation is active"):
            model(torch.autograd.forward_ad.make_dual(image, torch.ones_like(image)))


# ---- real and fake ----


@OPERATIONS
def test_fake_and_real_agree_on_transposed_weights(operation):
    tensors, others = given(operation)
    tensors = {k: v if v is None or v.ndim != 2 else v.t().contiguous().t() for k, v in tensors.items()}
    known = {"eps": 1e-5, "recompute": "none"} | {k: list(v) if isinstance(v, tuple) else v for k, v in others.items()}
    known |= {k: None if v is None else v.requires_grad_() for k, v in tensors.items()}
    function = getattr(torch.ops.tnt_fast, operation).default
    torch.library.opcheck(function, tuple(known.get(a.name) for a in function._schema.arguments if a.name != "checked"))


def test_a_model_of_transposed_weights_compiles_with_its_gradients():
    model = perturb(TNT(**{**TINY, "depth": 1}, backend="fused")).to(DEVICE)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(module.weight.detach().t().contiguous().t())
    image = torch.randn(2, 3, 32, 32, device=DEVICE)
    expected = torch.autograd.grad(model(image).square().sum(), list(model.parameters()))
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager_decomp_partition")
    found = torch.autograd.grad(compiled(image).square().sum(), list(compiled.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_compiled_model_tells_once_that_it_falls_back(monkeypatch):
    monkeypatch.setattr(dispatch, "_warned", set())
    model, image = TNT(**TINY).to(DEVICE), torch.randn(1, 3, 32, 32, device=DEVICE)
    model.blocks[0].attn_in.qk = torch.nn.Sequential(model.blocks[0].attn_in.qk)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.warns(UserWarning, match=re.escape("takes the reference path: ")):
        expected = compiled(image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(compiled(image), expected)
    check(HERE, "inner", inner_tensors(2, 4, 6, 24), dict(num_heads=2), torch.float32)  # and the kernels are still there


# ---- the short ways, where nobody looks on ----


@OPERATIONS
def test_past_the_dispatcher_the_bits_are_the_same(operation, monkeypatch):
    function, (tensors, others) = kernels.OPERATIONS[operation], given(operation)
    arguments, calls = reference.in_records({**tensors, **others}), []
    real = function._operation
    monkeypatch.setattr(function, "_operation", lambda *flat: calls.append(1) or real(*flat))

    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, called, types, args=(), kwargs=None):
            return called(*args, **(kwargs or {}))

    def run(*contexts):
        before = len(calls)
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            return joined(function.trusted(**arguments)), len(calls) - before

    for context in (contextlib.nullcontext, lambda: torch.autocast(DEVICE, torch.float16)):
        expected, through = run(context(), torch.no_grad(), Seen())
        assert through == 1
        for inference in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
            found, through = run(context(), inference)
            assert (through, found.dtype) == (0, expected.dtype)
            assert torch.equal(found, expected)
        counter = FlopCounterMode(display=False)
        profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        for mode in (counter, profile, Seen()):
            found, through = run(context(), torch.no_grad(), mode)
            assert through == 1
            assert torch.equal(found, expected)
        assert counter.get_total_flops() == 2 * function.multiply_adds(_shapes(function, arguments))
        assert f"tnt_fast::{operation}" in {event.name for event in profile.events()}


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@OPERATIONS
def test_past_the_dispatcher_the_gradients_are_the_same(operation, autocast, monkeypatch):
    function, (tensors, others) = kernels.OPERATIONS[operation], given(operation)
    leaves = [x.requires_grad_() for x in tensors.values() if x is not None]
    arguments, nodes = reference.in_records({**tensors, **others}), []

    class Looked(TorchDispatchMode):
        def __torch_dispatch__(self, called, types, args=(), kwargs=None):
            if called.namespace == "tnt_fast":
                nodes.append(called._schema.name)
            return called(*args, **(kwargs or {}))

    def run(forwards, backwards):
        with forwards, torch.autocast(DEVICE, torch.float16, enabled=autocast):
            out = joined(function.trusted(**arguments))
        with backwards, torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):  # which a backward does not heed
            return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True), *torch.autograd.grad(
                out, leaves, torch.ones_like(out))]  # fmt: skip

    found = [run(*(mode() for mode in modes)) for modes in product((contextlib.nullcontext, Looked), repeat=2)]
    assert len(nodes) == 2 * 1 + 2 * 2  # of four runs with one forward and two backwards each
    for others in found[1:]:
        assert [x.dtype for x in others] == [x.dtype for x in found[0]]
        assert all(map(torch.equal, others, found[0]))
    first = torch.autograd.grad(joined(function.trusted(**arguments)).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=f"the gradients of {operation} were to be differentiated"):
        torch.autograd.grad(sum(x.sum() for x in first), leaves)


def _shapes(function, arguments: dict) -> SimpleNamespace:
    """As a formula of FLOPs gets them."""
    flat = reference.by_name(function.defaults | arguments).values()
    return function.packed([x.shape if isinstance(x, torch.Tensor) else x for x in flat])


@OPERATIONS
def test_what_is_found_once_holds_for_all_that_is_alike_and_keeps_no_weights(operation, monkeypatch):
    function, (tensors, others) = kernels.OPERATIONS[operation], given(operation)
    tensors = {name: x if x is None or name in function.changing else torch.nn.Parameter(x) for name, x in tensors.items()}
    prepared, plans = function.prepared, []
    monkeypatch.setattr(function, "_plans", {})
    monkeypatch.setattr(function, "prepared", lambda a: plans.append(1) or prepared(a))
    weight = next(x for name, x in tensors.items() if name not in function.changing and x is not None and x.ndim >= 2)
    first, *_ = function.changing

    def settled(of, **more):
        return function.settled({name: x for name, x in of.items() if name not in function.changing}, **more)

    looked = [settled(reference.in_records({**tensors, **others}))]

    def new() -> int:
        """Plans that are made for calls, past the dispatcher and through it, whose results are right."""
        before, of = len(plans), reference.in_records({**tensors, **others})
        changing = [tensors.get(name) for name in function.changing]
        flat = reference.by_name(function.defaults | of).values()
        found = [
            looked[0](*changing),
            settled(of)(*changing),
            settled(of, looked_at=True)(*changing),
            function._operation(*flat, True),
        ]
        made, a = len(plans) - before, SimpleNamespace(**function.defaults | of, kept=None)
        for name in function.records:
            setattr(a, name, kernels.operation.contiguous(getattr(a, name)))
        for name, x in vars(a).items():
            if isinstance(x, torch.Tensor) and name not in function.changing:
                setattr(a, name, x.contiguous())
        expected = function.empty(a)
        prepared(a)(a, expected)
        assert all(torch.equal(joined(x), joined(expected)) for x in found)
        return made

    with torch.no_grad():
        assert [new(), new()] == [1, 0]
        weight.mul_(2)
        assert new() == 0
        weight.data = weight.data.clone()
        assert new() == 0  # where it lies does not matter
        weight.data = weight.data.repeat_interleave(2, -1)[..., ::2]  # which is copied each time
        assert new() == 0
        weight.mul_(2)
        assert new() == 0
        weight.data = weight.new_empty(weight.numel() + 1)[1:].view(weight.shape).copy_(weight)
        assert new() == 1  # loads of less than 16 bytes
        tensors[first] = tensors[first].transpose(-1, -2).contiguous().transpose(-1, -2)
        assert new() == 1
        tensors[first] = torch.cat([tensors[first].flatten()[:1], tensors[first].flatten()])[1:].view(tensors[first].shape)
        assert new() == 1
        monkeypatch.setattr(kernels.operation, "MOST_PLANS", 2)
        weight.data = weight.data.clone()
        assert (new(), len(function._plans)) == (1, 1)
    assert copy.deepcopy(looked) == [None]  # other weights begin anew
    held, weight = weakref.ref(weight), None
    looked.clear()
    tensors.clear()
    gc.collect()  # the interpreter's own
    assert held() is None


def test_a_model_that_was_looked_at_computes_products_as_it_is_told(monkeypatch):
    model, seen = perturb(TNT(**TINY | dict(depth=1), backend="fused")).to(DEVICE).eval(), set()
    image, launch = torch.randn(1, 3, 32, 32, device=DEVICE), kernels.norm.launch

    def looked(spec, *given):
        seen.add(spec.constants["Z"].PRECISION)
        launch(spec, *given)

    monkeypatch.setattr(kernels.norm, "launch", looked)
    monkeypatch.setattr(type(operation.runner), "nvidia", True)
    with torch.no_grad():
        for _ in range(3):
            model(image)
        assert seen == {"ieee"}
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            model(image)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
    assert seen == {"ieee", "tf32"}


def test_a_launch_is_looked_up_by_all_that_triton_compiles_for():
    runner, looked, launched = Gpu(), [], []

    class Kernel:
        def __getitem__(self, grid):
            def run(*arguments, Z, num_warps, arch=None):
                looked.append((grid, arguments))
                return self.Compiled()

            return run

        class Compiled:
            def __getitem__(self, grid):
                return lambda *arguments: launched.append((grid, arguments))

    Weights = namedtuple("Weights", "a b")
    spec, memory, w = Launch(Kernel(), {"Z": 7}, Config(16, warps=1), 1), torch.zeros(64), torch.zeros(16)
    one = Weights(w, None)

    def launch(x, n=5, eps=1e-5, weights=one, grid=2, spec=spec, **options):
        before = len(looked), len(launched)
        runner.launch(spec, grid, (x, weights, n, eps), {"num_warps": 1, **options})
        new, known = len(looked) - before[0], len(launched) - before[1]
        assert new + known == 1
        if known:
            assert launched[-1] == ((grid, 1, 1), (x, weights, n, eps, 7))
        return bool(known)

    changes = [
        {}, {"x": memory[1:]}, {"n": 6}, {"n": 1}, {"eps": 0.0}, {"weights": Weights(None, w)}, {"weights": Weights(w, w)},
        {"weights": Weights(w.half(), None)}, {"weights": Weights(w[1:], None)}, {"x": memory.double()}, {"grid": 3},
        {"arch": "sm80"}, {"spec": spec._replace(constants={"Z": 8})},
    ]  # fmt: skip
    assert [launch(**{"x": memory, **change}) for change in changes] == [False] * len(changes)
    assert [launch(**{"x": memory, **change}) for change in changes[:-1]] == [True] * (len(changes) - 1)
    assert launch(torch.ones(64)[4:])  # other memory, as well aligned
    again = spec.again()  # of a plan, where all is as it was
    assert [launch(memory, spec=again), bool(again.known)] == [False, True]
    operation.launch(again, 2, torch.ones(64), one, 5, 1e-5)
    assert len(launched[-1][1]) == 5
    assert spec.known is None
    for n in range(operation.MOST_LAUNCHERS):
        launch(memory, n=n + 100)
    assert len(runner._launchers) <= operation.MOST_LAUNCHERS
    assert not launch(memory)  # forgotten
