"""What computes the outer attention: each backend against float64, who looks at the probabilities, and what it costs."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import HERE, TINY, perturb, relative_error
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tnt_fast import TNT, attention, dispatch, kernels, reference, why_not_fused
from tnt_fast.tnt import Attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernels = pytest.mark.skipif(not kernels.HAS_TRITON, reason="needs triton")


def tiny(**kwargs) -> TNT:
    return perturb(TNT(**{**TINY, **kwargs})).eval().to(DEVICE)


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, device=DEVICE)


@pytest.fixture
def sdpa(monkeypatch):
    """Calls of PyTorch's fused attention through ours."""
    calls, right, recorded, joined = [], attention.attend, attention.attend_recorded, attention.attend_joined

    def attend(q, k, v, backend="sdpa"):
        calls.extend([q.shape] if backend == "sdpa" else [])
        return right(q, k, v, backend)

    monkeypatch.setattr(attention, "attend", attend)
    monkeypatch.setattr(attention, "attend_recorded", lambda q, k, v: calls.append(q.shape) or recorded(q, k, v))
    monkeypatch.setattr(attention, "attend_joined", lambda qkv: calls.append(qkv[:, :, 0].shape) or joined(qkv))
    return calls


# ---- one attention ----


def attended(attn: Attention, x: torch.Tensor, fused: bool) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    out = attn(x, fused)
    gradients = torch.autograd.grad((out * out.detach()).sum(), [x, *attn.parameters()])
    return {"output": out.detach(), **dict(zip(("x", *dict(attn.named_parameters())), gradients, strict=True))}


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize(("T", "E", "H"), [(5, 24, 3), (197, 64, 1), (1, 12, 4), (33, 90, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("backend", "fused"), [("auto", False), ("auto", True), ("sdpa", False), ("eager", True)], ids=str)
def test_every_backend_keeps_the_rule(backend, fused, dtype, T, E, H, qkv_bias, sdpa):
    attn = perturb(Attention(E, E, H, qkv_bias)).to(DEVICE, dtype)
    x = torch.randn(2, T, E, device=DEVICE, dtype=dtype)
    own, exact = attended(attn, x, False), attended(copy.deepcopy(attn).double().cpu(), x.double().cpu(), False)
    assert attn.attn_backend == "eager"  # until a TNT says another
    assert sdpa == []
    attn.attn_backend = backend
    found = attended(attn, x, fused)
    takes_sdpa = backend == "sdpa" or (backend == "auto" and fused)
    assert sdpa == [(2, T, H, E // H)] * takes_sdpa
    for name, x in found.items():
        assert takes_sdpa or torch.equal(x, own[name]), name
        if T == 1 and takes_sdpa and name.startswith("qk."):
            # of one probability, by two sums of E / H products whose difference is 0 but for their rounding
            terms = max(exact[each].abs().max().item() for each in ("x", "v.weight"))
            assert not exact[name].any(), name
            assert x.abs().max() <= 2 * (E // H) * torch.finfo(dtype).eps * terms, name
        else:
            HERE.rule(f"{backend}, {name}", x, own[name], exact[name], dtype)


def test_attend_is_the_references_attention():
    q, k, v = (torch.randn(2, 5, 3, 8, dtype=torch.float64) for _ in range(3))
    qk = torch.cat((q.flatten(2), k.flatten(2)), -1)
    expected = reference.attend(reference.attention_weights(qk, 3), v.flatten(2))
    assert relative_error(attention.attend(q, k, v).flatten(2), expected) <= 1e-14


# ---- its name ----


@pytest.mark.parametrize("backend", ["flash", "", None, "SDPA"])
def test_an_unknown_backend_names_those_that_are_accepted(backend):
    message = rf"attn_backend={backend!r} is unknown; accepted: 'auto', 'sdpa', 'xformers', 'eager'"
    with pytest.raises(ValueError, match=message):
        TNT(**TINY, attn_backend=backend)
    model = tiny(attn_backend="sdpa")
    with pytest.raises(ValueError, match=message):
        model.set_attn_backend(backend)
    assert [block.attn_out.attn_backend for block in model.blocks] == ["sdpa"] * 2


@pytest.fixture
def without_xformers(monkeypatch):
    def absent(name):
        raise ImportError("No module named 'xformers'\nand more")

    monkeypatch.setattr(attention, "import_module", absent)
    attention.xformers.cache_clear()
    yield
    attention.xformers.cache_clear()


def test_xformers_that_does_not_load_is_refused_with_the_reason(without_xformers):
    message = r"attn_backend='xformers' cannot run: xformers does not load here \(No module named 'xformers'\); take 'auto'"
    with pytest.raises(ValueError, match=message):
        TNT(**TINY, attn_backend="xformers")
    with pytest.raises(ValueError, match=message):
        tiny().set_attn_backend("xformers")


def test_xformers_is_given_what_it_takes(monkeypatch):
    """(B, T, H, D) each, by its name; it is not installed here."""
    calls = []

    def memory_efficient_attention(q, k, v):
        calls.append(q.shape)
        return attention.attend(q, k, v)

    module = SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setattr(attention, "xformers", lambda: (module, None))
    model, image = tiny(attn_backend="xformers", backend="reference"), images()
    found = model(image)
    assert calls == [(2, 5, 3, 8)] * 2
    model.set_attn_backend("eager")
    torch.testing.assert_close(found, model(image), rtol=1e-5, atol=1e-6)
    assert len(calls) == 2


@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager"])
def test_a_model_on_the_reference_path_takes_the_backend_that_is_named(backend, sdpa):
    model, image = tiny(backend="reference", attn_backend=backend), images()
    plain = tiny(backend="reference")
    plain.load_state_dict(model.state_dict())
    expected, found = plain(image), model(image)
    assert len(sdpa) == (2 if backend == "sdpa" else 0)
    assert torch.equal(found, expected) or backend == "sdpa"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    model.set_attn_backend("auto")
    assert torch.equal(model(image), expected)
    assert {block.attn_in.attn_backend for block in model.blocks} == {"eager"}  # the inner one has no choice


# ---- on the reference path, inferring in float32 on a CPU ----

on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="of a CPU")
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")


@pytest.fixture
def products(monkeypatch):
    """Calls that compute q, k and v in one product of oneDNN, as where MKL is slow: how wide."""
    calls, right = [], attention.linears
    monkeypatch.setattr(attention, "mkl_is_fast", lambda: False)
    monkeypatch.setattr(attention, "linears", lambda x, *given: calls.append(x.shape[-1]) or right(x, *given))
    return calls


@on_cpu
@needs_onednn
@pytest.mark.parametrize("kwargs", [{}, dict(qkv_bias=True), dict(embed_dim=384, num_heads_outer=6)], ids=str)
def test_inference_on_a_cpu_takes_fused_attention_and_one_product(kwargs, sdpa, products):
    model, image = tiny(backend="reference", **kwargs), images()
    exact, own = copy.deepcopy(model).double()(image.double()).detach(), model(image).detach()
    assert sdpa == products == []  # while gradients are recorded, timm's bits
    with torch.no_grad():
        found = model(image)
        assert len(sdpa) == len(products) == 2
        HERE.rule("inference", found, own, exact, torch.float32)
        assert torch.equal(model(image), found)
        assert model(image[:0]).shape == (0, 5)
        with torch.backends.mkldnn.flags(enabled=False):
            products.clear()
            HERE.rule("without oneDNN", model(image), own, exact, torch.float32)
            assert products == []
        model.set_attn_backend("eager")
        assert torch.equal(model(image), own)


@on_cpu
def test_on_intel_the_products_stay_mkls(monkeypatch, sdpa, products):
    monkeypatch.setattr(attention, "mkl_is_fast", lambda: True)
    model, image = tiny(backend="reference"), images()
    exact, own = copy.deepcopy(model).double()(image.double()).detach(), model(image).detach()
    with torch.no_grad():
        HERE.rule("inference", model(image), own, exact, torch.float32)
    assert len(sdpa) == 2
    assert products == []


@pytest.mark.parametrize(
    ("text", "processor", "fast"),
    [("vendor_id\t: GenuineIntel\n", "", True), ("vendor_id\t: AuthenticAMD\n", "GenuineIntel", False),
     (None, "Intel64 Family 6 Model 85 Stepping 7, GenuineIntel", True), (None, "arm", False), (None, "", False)],
)  # fmt: skip
def test_whose_cpu_it_is(text, processor, fast, monkeypatch):
    def read(self, errors):
        if text is None:
            raise FileNotFoundError(self)
        return text

    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(attention.Path, "read_text", read)
    monkeypatch.setattr(attention.platform, "processor", lambda: processor)
    assert attention.mkl_is_fast.__wrapped__() is fast
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not attention.mkl_is_fast.__wrapped__()


@pytest.fixture
def in_place(monkeypatch):
    """Whether GELU was computed in place, of each MLP in order."""
    calls, right = [], dispatch.is_plain_mlp
    monkeypatch.setattr(dispatch, "is_plain_mlp", lambda *given: calls.append(right(*given)) or calls[-1])
    return calls


@on_cpu
def test_gelu_in_place_changes_no_bit(in_place):
    model, image = tiny(backend="reference", attn_backend="eager"), images()
    expected = model(image).detach()
    assert in_place == []  # gradients are recorded
    with torch.no_grad():
        assert torch.equal(model(image), expected)
    assert in_place == [True] * 4


@on_cpu
@pytest.mark.parametrize("where", ["mlp", "mlp_in"])
@pytest.mark.parametrize("how", ["fc1", "act", "mlp", "tanh", "dropout", "class", "forward"])
def test_a_changed_mlp_counts_on_a_cpu(how, where, in_place):
    model, image, seen = tiny(backend="reference", attn_backend="eager"), images(), []
    mlp = getattr(model.blocks[1], where)
    look = lambda module, given, out: seen.append(out)  # noqa: E731
    if how in ("fc1", "act", "mlp"):
        (mlp if how == "mlp" else getattr(mlp, how)).register_forward_hook(look)
    elif how == "tanh":
        mlp.act = nn.GELU(approximate="tanh")
    elif how == "dropout":
        mlp.drop1 = nn.Dropout(0.5)  # a new module trains
    elif how == "class":
        mlp.fc2 = Doubled(mlp.fc2.in_features, mlp.fc2.out_features)
    else:
        mlp.act.forward = lambda x: 2 * x
    torch.manual_seed(0)
    expected = model(image).detach()
    looked_at = [x.detach().clone() for x in seen]
    seen.clear()
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(model(image), expected)
    assert in_place.count(False) == 1
    assert len(seen) == (how in ("fc1", "act", "mlp"))
    assert all(torch.equal(a, b) for a, b in zip(seen, looked_at, strict=True))


@on_cpu
@needs_onednn
@pytest.mark.parametrize("width", [24, 192, 200, 384, 640])
def test_one_product_has_no_more_error_than_two(width):
    x, layers = torch.randn(64, 16, width), (nn.Linear(width, 2 * width, bias=False), nn.Linear(width, width))
    layers[0].weight = nn.Parameter(layers[0].weight.detach().t().contiguous().t())  # its columns in rows
    with torch.no_grad():
        found = attention.linears(x, [layer.weight for layer in layers], [layer.bias for layer in layers])
        for out, layer in zip(found, layers, strict=True):
            exact = copy.deepcopy(layer).double()(x.double())
            mine, theirs = ((y.double() - exact).square().mean().sqrt() for y in (out, layer(x)))
            assert mine <= 1.15 * theirs


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@on_cpu
@needs_onednn
@pytest.mark.parametrize("name", ["qk", "v"])
@pytest.mark.parametrize("how", ["hook", "class", "forward", "width", "dtype"])
def test_a_changed_linear_counts_on_a_cpu(how, name, products):
    model, image, seen = tiny(backend="reference"), images(), []
    attn = model.blocks[1].attn_out
    layer = getattr(attn, name)
    if how == "hook":
        layer.register_forward_hook(lambda *_: seen.append(1))
    elif how == "class":
        setattr(attn, name, Doubled(24, layer.out_features, bias=False))
    elif how == "forward":
        layer.forward = lambda x: seen.append(1) or nn.Linear.forward(layer, x) * 2
    elif how == "width":
        layer.weight = nn.Parameter(torch.randn(layer.out_features, 25))
    else:
        layer.double()
    with torch.no_grad():
        if how in ("width", "dtype"):
            with pytest.raises(RuntimeError, match="mat1 and mat2|have the same dtype"):
                model(image)
        else:
            found = model(image)
            model.set_attn_backend("eager")
            assert relative_error(found, model(image)) <= 1e-5
            assert len(seen) == (0 if how == "class" else 2)
    assert len(products) == 1  # the other block's


def _vmapped(model, image):
    return torch.func.vmap(lambda x: model(x[None])[0])(image)


def _dual(model, image):
    return torch.func.jvp(model, (image,), (torch.ones_like(image),))[0]


def _counted(model, image):
    with FlopCounterMode(display=False) as counter:
        found = model(image)
    assert "aten.bmm" in map(str, counter.get_flop_counts()["Global"])
    return found


def _globally_hooked(model, image):
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        return model(image)
    finally:
        handle.remove()


@on_cpu
@pytest.mark.parametrize(
    "way",
    [
        lambda model, image: torch.enable_grad()(model)(image),
        lambda model, image: model.train()(image),  # of a reentrant checkpoint, which is computed again with gradients
        lambda model, image: model.double()(image.double()),
        lambda model, image: model.bfloat16()(image.bfloat16()),
        lambda model, image: torch.autocast("cpu", torch.bfloat16)(model)(image),
        lambda model, image: torch.fx.symbolic_trace(model)(image),
        lambda model, image: torch.jit.trace(model, image, check_trace=False)(image),
        lambda model, image: torch.compile(model, fullgraph=True, backend="eager")(image),
        _vmapped,
        _dual,
        _counted,
        _globally_hooked,
    ],
    ids=["gradients", "training", "float64", "bfloat16", "autocast", "fx", "trace", "compile", "vmap", "jvp", "modes", "hooks"],
)
def test_what_is_recorded_traced_or_in_another_dtype_stays_eager(way, sdpa, products):
    model, image = tiny(backend="reference", depth=1), images()
    with torch.no_grad():
        found = way(copy.deepcopy(model), image)
    assert sdpa == products == []
    if found.dtype == torch.float32:
        assert relative_error(found.detach(), model(image).detach()) <= 1e-5


# ---- on the fused path ----


@needs_kernels
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager"])
def test_a_fused_model_takes_the_backend_that_is_named(backend, gradients, sdpa):
    model, image = tiny(backend="reference"), images()
    exact, own = copy.deepcopy(model).double()(image.double()).detach().cpu(), model(image).detach()
    model.backend = "fused"
    model.set_attn_backend(backend)
    with torch.set_grad_enabled(gradients):
        found = model(image).detach()
    assert len(sdpa) == (0 if backend == "eager" else 2)
    HERE.rule(backend, found, own, exact, torch.float32)


@needs_kernels
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
def test_a_hook_sees_the_probabilities_on_the_fused_path(gradients, sdpa):
    model, image, seen = tiny(backend="fused"), images(), []
    with torch.set_grad_enabled(gradients):
        expected = model(image)
        assert len(sdpa) == 2
        handle = model.blocks[1].attn_out.attn_drop.register_forward_hook(lambda module, given, out: seen.append(out.detach()))
        assert why_not_fused(model, image) == []
        sdpa.clear()
        torch.testing.assert_close(model(image), expected, rtol=1e-5, atol=1e-6)
        assert len(sdpa) == 1  # the other block's
        (weights,) = seen
        assert weights.shape == (2, 3, 5, 5)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        handle.remove()
        sdpa.clear()
        assert torch.equal(model(image), expected)
        assert len(sdpa) == 2


@needs_kernels
def test_a_hook_that_changes_the_probabilities_changes_the_result(sdpa):
    model, image = tiny(), images()
    for block in model.blocks:
        block.attn_out.attn_drop.register_forward_hook(lambda module, given, out: torch.zeros_like(out))
    found = []
    for backend in ("reference", "fused"):
        model.backend = backend
        with torch.no_grad():
            found.append(model(image))
    assert relative_error(found[1], found[0]) <= 1e-5
    assert sdpa == []


def with_forward(module: nn.Module, forward) -> nn.Module:
    module.forward = forward
    return module


@pytest.mark.parametrize(
    "drop",
    [nn.Dropout(0.5).train(), nn.Identity(), nn.Dropout2d(0.0), with_forward(nn.Dropout(0.0), torch.neg)],
    ids=["active", "replaced", "of another class", "with another forward"],
)
@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_active_or_replaced_dropout_makes_the_attention_eager(backend, drop, sdpa):
    attn = Attention(24, 24, 3)
    attn.attn_backend = backend
    attn.attn_drop = drop
    torch.manual_seed(3)
    found = attn(torch.ones(2, 5, 24), True)
    assert sdpa == []
    torch.manual_seed(3)
    attn.attn_backend = "eager"
    assert torch.equal(attn(torch.ones(2, 5, 24)), found)


@needs_kernels
def test_training_with_dropout_of_the_probabilities_is_fused_but_for_the_attention(sdpa):
    model, image = tiny(), images()
    model.blocks[0].attn_out.attn_drop.p = 0.5
    model.train()
    found = []
    for backend in ("reference", "fused"):
        model.backend = backend
        torch.manual_seed(3)
        found.append(model(image).detach())
    assert why_not_fused(model, image) == []
    assert relative_error(found[1], found[0]) <= 1e-5
    assert len(sdpa) == 1  # the other block's
    model.eval()
    model(image)
    assert len(sdpa) == 1 + 2  # inactive


# ---- compiled, scripted, exported, counted ----


@needs_kernels
@pytest.mark.parametrize(
    ("backend", "mode"), [("auto", "inference"), ("auto", "train"), ("sdpa", "inference"), ("eager", "inference")], ids=str
)
def test_a_fused_model_compiles_as_one_graph(backend, mode):
    model, image = tiny(backend="fused", attn_backend=backend).train(mode == "train"), images()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(mode == "train"):
        expected, found = model(image), compiled(image)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    if mode == "train":
        wanted = [torch.autograd.grad(out.square().sum(), list(model.parameters())) for out in (found, expected)]
        for a, b in zip(*wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_an_exported_model_has_the_operation_where_no_gradient_is_asked_for():
    model, image = tiny(backend="fused"), images()
    with torch.no_grad():
        program = torch.export.export(model, (image,))
        torch.testing.assert_close(program.module()(image), model(image))
    assert sum("tnt_fast.block" in str(node.target) for node in program.graph.nodes) == 2


@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager"])
def test_a_scripted_model_runs_the_references_products(backend):
    model, image = tiny(backend="reference", attn_backend=backend), images()
    scripted = torch.jit.script(copy.deepcopy(model))
    model.set_attn_backend("eager")
    torch.testing.assert_close(scripted(image), model(image), rtol=1e-5, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize(
    "gradients",
    [False, pytest.param(True, marks=pytest.mark.gpu)],  # PyTorch does not count its fused attention on the CPU
    ids=["inference", "gradients"],
)
def test_fused_attention_counts_as_many_flops_as_the_references(gradients):
    model, counts = tiny(), []
    for backend in ("reference", "fused"):
        model.backend = backend
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradients):
            model(images())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


FREE = {
    "aten::empty",
    "aten::empty_like",
    "aten::view",
    "aten::unbind",
    "aten::permute",
    "aten::transpose",
    "aten::t",
}  # launch nothing


def _called(event) -> list[str]:
    """What an operation that PyTorch's profiler has seen calls, without what launches nothing."""
    calls = [child.name for child in event.cpu_children if child.name not in FREE]
    copies = {child.name for x in event.cpu_children if x.name == "aten::reshape" for child in x.cpu_children}
    return [name for name in calls if name != "aten::reshape" or copies != {"aten::view"}]


@needs_kernels
@pytest.mark.skipif(DEVICE == "cuda", reason="what is called does not depend on the device")
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 8), (torch.float32, 9)], ids=str)  # float32's GELU is a call
@pytest.mark.parametrize("few", [False, True], ids=["many rows", "few rows"])
def test_launches_of_a_block(few, dtype, most, monkeypatch):
    from helpers import launchers

    from tnt_fast.kernels import product

    if not few:
        monkeypatch.setattr(product, "MOST", 0)
    launched = []
    for module in launchers():
        monkeypatch.setattr(module, "launch", lambda spec, *given: launched.append(spec.kernel.__name__))
    block = tiny(backend="fused").blocks[0].to(dtype)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiled:
        block.outer(torch.randn(2, 5, 24, dtype=dtype), True)
    (outer,) = (event for event in profiled.events() if event.name == "tnt_fast::outer")
    assert launched == ["_product_kernel"] * 2 if few else ["_norm_kernel"] * 2 + ["_gelu_kernel"] * (dtype == torch.float32)
    called = _called(outer)
    assert "aten::scaled_dot_product_attention" in called
    assert len(called) + len(launched) <= (5 if few else most), called
    others = {event.name for event in profiled.events() if event.cpu_parent is None} - {"tnt_fast::outer"}
    assert others <= {"aten::randn", "aten::empty"}, others


def test_pytorchs_attention_is_given_heads_before_tokens(monkeypatch):
    seen = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: seen.append((q.shape, k.shape, v.shape)) or v)
    q, k, v = (torch.randn(2, 5, 3, 8) for _ in range(3))
    assert torch.equal(attention.attend(q, k, v), v)
    assert seen == [((2, 3, 5, 8),) * 3]
