"""outer against the reference in float64 (``cases.check``)."""

import pytest
import torch
from cases import check, normal, outer_tensors, with_fold
from helpers import HERE, TINY, ExactSoftmax, call, launchers, paths
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

pytest.importorskip("triton")

from tnt_fast import TNT, attention, dispatch, kernels, reference, why_not_fused
from tnt_fast.kernels import product
from tnt_fast.reference import in_records

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poisoned_memory")
everywhere, wide = pytest.mark.everywhere, pytest.mark.wide


@paths()
@pytest.mark.parametrize(
    ("B", "T", "E", "H", "M", "bias"),
    [
        pytest.param(2, 5, 384, 6, 96, False, marks=everywhere),
        (1, 197, 192, 3, 64, False),
        (2, 65, 64, 2, 256, True),
        (3, 2, 640, 10, 40, False),
        (2, 1, 48, 3, 12, True),
        (2, 3, 48, 3, 600, False),  # several tiles of hidden channels
        pytest.param(1, 577, 64, 1, 32, False, marks=wide),
        pytest.param(1, 785, 64, 2, 32, False, marks=wide),
        pytest.param(2, 33, 90, 3, 50, True, marks=wide),
    ],
)
def test_outer(B, T, E, H, M, bias, path, dtype):
    # PyTorch's fused attention finds its probabilities again from a rounded logsumexp: off as if the scores had been rounded
    check(path, "outer", outer_tensors(B, T, E, M, bias), dict(num_heads=H), dtype, draws=(1, 2) if T > 500 else ())


@paths("float32", "bfloat16 float32")
def test_outer_with_drop_path(path, dtype):
    scales = {name: torch.tensor([0.0, 1.25, 2.0], dtype=torch.float64)[order] for name, order in (
        ("attn_scale", [0, 1, 2]), ("mlp_scale", [2, 0, 1]))}  # fmt: skip
    check(path, "outer", outer_tensors(3, 7, 48, 96) | scales, dict(num_heads=3), dtype)


@pytest.mark.parametrize("absent", [("proj_bias",), ("fc1_bias",), ("fc2_bias", "norm1_bias", "norm2_bias")], ids="+".join)
@paths("float32", "bfloat16 float32")
def test_outer_without_biases(absent, path, dtype):
    check(path, "outer", outer_tensors(2, 9, 64, 128) | dict.fromkeys(absent), dict(num_heads=2), dtype)


@pytest.mark.parametrize("name", ["proj_bias", "fc2_bias"])
@paths()
def test_a_large_bias_of_a_branch_is_added_where_it_belongs(name, path, dtype):
    """fc2's lies in the rest while the MLP runs, but not in what the MLP reads."""
    tensors = outer_tensors(2, 9, 64, 128)
    check(path, "outer", tensors | {name: 300 * normal(64)}, dict(num_heads=2), dtype)


@paths()
@pytest.mark.parametrize("legacy", [False, True], ids=["norms", "legacy"])
@pytest.mark.parametrize(
    ("B", "N", "S", "C", "E", "H"),
    [
        pytest.param(2, 5, 16, 24, 384, 6, marks=everywhere),
        (1, 33, 4, 10, 48, 3),
        pytest.param(3, 1, 16, 40, 640, 10, marks=wide),
        pytest.param(2, 9, 5, 6, 200, 2, marks=wide),
    ],
)
def test_outer_of_a_fold(B, N, S, C, E, H, legacy, path, dtype):
    check(path, "outer", with_fold(B, N, S, C, E, 64, legacy), dict(num_heads=H), dtype)


@paths("float32", "bfloat16 float32")
def test_outer_of_a_fold_with_drop_path_and_without_biases(path, dtype):
    """Nothing is divided by 0 of class tokens, which have no pixels, nor of rows that are not there."""
    tensors = with_fold(2, 5, 16, 12, 24, 48, False) | dict.fromkeys(("proj_bias", "norm1_bias", "fold_norm1_bias"))
    check(path, "outer", tensors, dict(num_heads=3, eps=0.0), dtype)
    scales = dict(attn_scale=torch.tensor([0.0, 2.0]).double(), mlp_scale=torch.tensor([1.25, 0.0]).double())
    tensors = with_fold(2, 5, 16, 12, 24, 48, False) | {"fold_proj_bias": normal(24)}
    check(path, "outer", tensors | scales, dict(num_heads=3), dtype)


def test_two_norms_backwards_are_one_launch_where_both_are_needed(monkeypatch):
    """LN₁'s and that of the fold's end; whatever else is asked for, each gradient has the same bits."""
    launched: list = []

    def launch(spec, *given):
        launched.append(spec.kernel.__name__)
        kernels.operation.launch(spec, *given)

    monkeypatch.setattr(kernels.norm, "launch", launch)
    given = {name: x if x is None else x.float().to(DEVICE) for name, x in with_fold(2, 5, 16, 12, 24, 48, False).items()}
    upstream, gradients = torch.randn(2, 6, 24, device=DEVICE), []
    every = [name for name, x in given.items() if x is not None]
    for needed, joint in ((every, 1), (["pixel"], 1), (["fold_proj_weight"], 1), (["fold_norm2_bias"], 1), (["patch"], 0)):
        tensors = {name: x if x is None else x.clone().requires_grad_(name in needed) for name, x in given.items()}
        out = call(kernels.OPERATIONS["outer"], **tensors, num_heads=3)
        launched.clear()
        found = torch.autograd.grad(out, [tensors[name] for name in needed], upstream)
        assert [launched.count(f"_norm{s}_bwd_kernel") for s in ("", "s")] == [1 + ("pixel" in needed) + (not joint), joint]
        gradients.append(dict(zip(needed, found, strict=True)))
    for found in gradients[1:]:
        for name, x in found.items():
            assert torch.equal(x, gradients[0][name]), name


# ---- without gradients: of a few rows by product.py's launches ----


@pytest.fixture(params=["few", "many"])
def rows(request, monkeypatch):
    """Those of a few images, or as if they were too many for product.py."""
    monkeypatch.setattr(kernels.OPERATIONS["outer"], "_plans", {})
    if request.param == "many":
        monkeypatch.setattr(product, "MOST", 0)
    return request.param


@paths()
@pytest.mark.parametrize(
    ("B", "T", "E", "H", "M", "bias"),
    [
        (2, 5, 384, 6, 96, True),
        (1, 197, 192, 3, 64, False),
        pytest.param(1, 65, 64, 2, 256, True, marks=everywhere),
        (2, 1, 48, 3, 12, True),
        (3, 2, 90, 3, 300, True),  # no width is whole tiles
        pytest.param(3, 35, 384, 6, 200, False, marks=wide),
        pytest.param(1, 2, 640, 10, 40, False, marks=wide),  # too wide for product.py, but for a fold
    ],
)
def test_outer_that_infers(B, T, E, H, M, bias, rows, path, dtype):
    check(path, "outer", outer_tensors(B, T, E, M, bias), dict(num_heads=H), dtype, gradients=False)


@paths()
@pytest.mark.parametrize("legacy", [False, True], ids=["norms", "legacy"])
@pytest.mark.parametrize(
    ("B", "N", "S", "C", "E", "H"),
    [
        (2, 5, 16, 24, 384, 6),
        pytest.param(3, 33, 4, 10, 48, 3, marks=everywhere),  # class tokens at several rows of a tile
        (1, 1, 16, 12, 192, 3),
        pytest.param(2, 9, 5, 6, 200, 2, marks=wide),
        pytest.param(1, 3, 16, 40, 640, 10, marks=wide),  # only the fold's product
    ],
)
def test_outer_of_a_fold_that_infers(B, N, S, C, E, H, legacy, rows, path, dtype):
    check(path, "outer", with_fold(B, N, S, C, E, 64, legacy, bias=True), dict(num_heads=H), dtype, gradients=False)


@pytest.mark.parametrize("value", ["equal", "far", "small", "absent"])
@paths()
def test_norms_of_a_few_rows_are_those_of_norm_py(value, path, dtype):
    tensors = with_fold(2, 5, 16, 12, 24, 48, False, mean=100.0 if value == "far" else 0.5)
    if value == "equal":
        tensors["pixel"] = (700 + 100 * normal(10, 1, 1)).expand(10, 16, 12)
    if value == "small":
        tensors |= {name: 1e-3 * tensors[name] for name in ("pixel", "patch", "fold_proj_weight")}
    if value == "absent":
        tensors |= dict.fromkeys(("norm1_bias", "norm2_bias", "fc1_bias", "fc2_bias", "proj_bias", "fold_norm1_bias"))
    check(path, "outer", tensors, dict(num_heads=3), dtype, gradients=False)


@paths("float32", "bfloat16 float32")
def test_a_few_rows_lie_as_they_will_and_have_the_same_bits(path, dtype):
    """Patches expanded or with channels apart; weights of float32 are read as they are."""
    tensors = {k: v if v is None else v.to(path.device, dtype) for k, v in with_fold(3, 5, 16, 12, 24, 48, False).items()}
    tensors["patch"] = tensors["patch"][:1].expand(3, -1, -1)
    results = []
    for patch in (tensors["patch"], tensors["patch"].contiguous(), tensors["patch"].transpose(1, 2).contiguous().mT):
        results.append(call(kernels.OPERATIONS["outer"], **tensors | {"patch": patch}, num_heads=3))
    assert all(torch.equal(results[0], x) for x in results[1:])
    wide = {k: v if v is None or k in ("patch", "pixel") else v.float() for k, v in tensors.items()}
    with torch.autocast(path.device, dtype, enabled=dtype != torch.float32):
        assert torch.equal(call(kernels.OPERATIONS["outer"], **wide, num_heads=3), results[0])


def test_what_a_few_rows_launch(monkeypatch):
    """Whatever PyTorch's operations and ours launch; a matrix that has to be cast is, in one launch of all of them."""
    tensors = {k: v if v is None else v.float().to(DEVICE) for k, v in with_fold(2, 5, 16, 12, 24, 48, False).items()}
    launched: list = []
    for module in launchers():
        monkeypatch.setattr(module, "launch", lambda spec, *given: launched.append(spec.kernel.__name__))
    for kind, more in ((torch.float32, []), (torch.bfloat16, ["_foreach_copy_"])):
        launched.clear()
        given = tensors | {name: tensors[name].to(kind) for name in ("patch", "pixel")}
        activities, casts = [torch.profiler.ProfilerActivity.CPU], torch.autocast(DEVICE, kind, enabled=kind != torch.float32)
        with torch.profiler.profile(activities=activities, acc_events=True) as profiled, casts:
            call(kernels.OPERATIONS["outer"], **given, num_heads=3)
        (ours,) = (event for event in profiled.events() if event.name == "tnt_fast::outer")
        called = [child.name.removeprefix("aten::") for child in ours.cpu_children]
        called = [name for name in called if name not in FREE | {"permute", "reshape"}]
        assert launched == ["_product_kernel"] * 3
        assert sorted(called) == sorted([*more, "scaled_dot_product_attention", "addmm_", "addmm_"])


# ---- gradients, and what they start from ----


@paths()
@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("recompute", ["mlp", "all"])
def test_outer_that_computes_again(recompute, bias, path, dtype):
    check(path, "outer", outer_tensors(2, 9, 64, 96, bias), dict(num_heads=1, recompute=recompute), dtype)


def of_float32(*sizes, **more):
    tensors = {k: None if v is None else v.float().to(DEVICE) for k, v in outer_tensors(*sizes, **more).items()}
    return tensors | dict(attn_scale=torch.tensor([0.0, 2.0], device=DEVICE), mlp_scale=torch.tensor([2.0, 1.0], device=DEVICE))


@pytest.mark.parametrize("recompute", ["none", "mlp", "all"])
@pytest.mark.parametrize("scales", [False, True], ids=["", "scales"])
def test_a_gradient_alone_is_what_it_is_among_all(scales, recompute):
    """Frozen weights: what nobody asks for is not computed, and changes nothing; the same bits twice."""
    given = of_float32(2, 5, 24, 40, bias=True)
    if not scales:
        given |= dict(attn_scale=None, mlp_scale=None)
    names = [name for name in given if given[name] is not None and not name.endswith("_scale")]

    def gradients(*wanted):
        leaves = {name: given[name].clone().requires_grad_() for name in wanted}
        out = call(kernels.OPERATIONS["outer"], **(given | leaves), num_heads=3, recompute=recompute)
        return dict(zip(wanted, torch.autograd.grad(out.sin().sum(), list(leaves.values())), strict=True))

    everything, again = gradients(*names), gradients(*names)
    for name in names:
        assert torch.equal(again[name], everything[name]), name
        torch.testing.assert_close(
            gradients(name)[name], everything[name], rtol=1e-5, atol=1e-5
        )  # a sum may be another launch's


@pytest.mark.parametrize("named", ["", "ALL", None, "attention"])
def test_an_unknown_recompute_names_those_that_are_accepted(named):
    message = rf"recompute={named!r}.*; accepted: 'none', 'mlp', 'all'"
    with pytest.raises(ValueError, match=message):
        TNT(**TINY, recompute=named)
    model = TNT(**TINY, recompute="mlp")
    with pytest.raises(ValueError, match=message):
        model.set_recompute(named)
    assert [block.recompute for block in model.blocks] == ["mlp"] * 2
    with pytest.raises(ValueError, match="outer: " + message):
        call(kernels.OPERATIONS["outer"], **of_float32(2, 5, 24, 40), num_heads=3, recompute=named)


def test_recompute_that_cannot_be_is_named_before_anything_is_computed(monkeypatch):
    model, image = TNT(**TINY, recompute="all", backend="fused").to(DEVICE), torch.randn(2, 3, 32, 32, device=DEVICE)
    model(image)
    handle = model.blocks[1].mlp.fc1.register_forward_hook(lambda module, given, out: None)
    monkeypatch.setattr(model.pixel_embed, "forward", lambda *given, **more: pytest.fail("something was computed"))
    with pytest.raises(RuntimeError, match=r"recompute='all' is of the fused outer .*: blocks\.1\.mlp\.fc1 has hooks"):
        model(image)
    assert why_not_fused(model, image) == []
    monkeypatch.undo()
    with torch.no_grad():
        model(image)  # nothing is kept
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "_machine_reasons", lambda image, backend: [])
    model.backend = "auto"
    with pytest.warns(UserWarning, match=r"keeps what it was to .*: blocks\.1\.mlp\.fc1 has hooks"):
        model(image)
    handle.remove()
    model.backend = "fused"
    model(image)


FREE = {
    "empty", "empty_like", "new_empty", "view", "t", "slice", "select", "transpose", "unbind", "split", "split_with_sizes",
}  # fmt: skip


@pytest.mark.skipif(DEVICE == "cuda", reason="what is called does not depend on the device")
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
    ids=["fp32", "bf16", "autocast"],
)
def test_launches_of_a_block_that_trains(dtype, autocast, monkeypatch):
    """Each call of PyTorch's that computes something, and each launch of ours, of the graph that a block records.

    A CPU's flash attention stands in for a GPU's.
    """
    monkeypatch.setattr(attention, "_backend", lambda *heads: SDPBackend.FLASH_ATTENTION)
    aten, name = torch.ops.aten, "_scaled_dot_product_flash_attention"
    backward = getattr(aten, f"{name}_for_cpu_backward")
    monkeypatch.setattr(aten, name, getattr(aten, f"{name}_for_cpu"))
    monkeypatch.setattr(aten, f"{name}_backward", lambda *given: backward(*given[:6], dropout_p=0.0, is_causal=False))
    launched: list = []
    for module in launchers():
        monkeypatch.setattr(module, "launch", lambda spec, *given: launched.append(spec.kernel.__name__))
    block = TNT(**TINY, backend="fused").to(dtype).blocks[0]
    x = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True)
    activities, casts = [torch.profiler.ProfilerActivity.CPU], torch.autocast(DEVICE, torch.bfloat16, enabled=autocast)
    with torch.profiler.profile(activities=activities, acc_events=True) as profiled, casts:
        torch.autograd.backward(block.outer(x, True), torch.ones_like(x))
    ours = [event for event in profiled.events() if event.name in ("tnt_fast::outer", "tnt_fast::outer_backward")]
    called = [child.name.removeprefix("aten::") for event in ours for child in event.cpu_children]
    called = [name for name in called if name not in FREE]
    assert len(ours) == 2
    assert len(called) + len(launched) <= 24 + autocast, (called, launched)  # casts of the gradients, in one launch
    forward, backward = ["_norm_kernel"] * 2 + ["_gelu_kernel"], ["_gelu_bwd_kernel"] + ["_norm_bwd_kernel"] * 2
    assert launched == [*forward, *backward, "_totals_kernel"]


@pytest.mark.parametrize(("recompute", "most"), [("none", 20.8e6), ("mlp", 13.6e6), ("all", 6.3e6)])
def test_the_bytes_that_a_training_step_of_tnt_s_keeps(recompute, most):
    """An image, under autocast in bfloat16: what one more adds, which weights and their casts do not. Without values."""
    totals = []
    model = TNT(embed_dim=384, inner_dim=24, num_heads_outer=6, backend="fused", recompute=recompute, device="meta")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(DEVICE):
        model = model.to_empty(device=DEVICE)
        for images in (1, 2):
            kept: dict = {}

            def pack(x, kept=kept):
                storage = x.untyped_storage()
                kept[storage._cdata] = (storage.nbytes(), x)  # held, so that no address is used twice
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast(DEVICE, torch.bfloat16):
                model(torch.randn(images, 3, 224, 224))
            totals.append(sum(size for size, _ in kept.values()))
    assert 0.98 * most < totals[1] - totals[0] <= most


KERNELS = {
    SDPBackend.FLASH_ATTENTION: torch.bfloat16, SDPBackend.CUDNN_ATTENTION: torch.float16, SDPBackend.MATH: torch.bfloat16,
}  # fmt: skip


@pytest.mark.parametrize("backend", KERNELS, ids=lambda backend: backend.name)
def test_attention_of_a_gpu_is_called_as_pytorch_declares_it(backend, monkeypatch):
    """By shapes alone, as autograd would: PyTorch's own derivatives name the same arguments."""
    monkeypatch.setattr(attention, "_backend", lambda *heads: backend)
    with FakeTensorMode():
        q, k, v = torch.empty(2, 197, 3, 6, 64, device="cuda", dtype=KERNELS[backend]).unbind(2)
        out, logsumexp = attention.attend_recorded(q, k, v)
        assert (out.shape, out.dtype, out.is_contiguous()) == (q.shape, q.dtype, True)
        assert (logsumexp.shape, logsumexp.dtype) == ((2, 6, 197), torch.float32)
        for x in attention.attend_backward(torch.empty_like(out), q, k, v, out, logsumexp):
            assert (x.shape, x.dtype) == (q.shape, q.dtype)


def check_attention(q, k, v, dtype):
    """Its result and gradients, by the rule; of float64 on the CPU."""
    heads = [x.to(dtype).to(DEVICE) for x in (q, k, v)]
    upstream = torch.randn(q.shape, dtype=torch.float64).to(dtype).to(DEVICE)

    def by_autograd(kind):
        q, k, v = leaves = [x.to(kind).requires_grad_() for x in heads]
        weights = (q.transpose(1, 2) @ k.transpose(1, 2).transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        out = (weights @ v.transpose(1, 2)).transpose(1, 2)
        return out.detach(), *torch.autograd.grad(out, leaves, upstream.to(kind))

    out, logsumexp = attention.attend_recorded(*heads)
    found = out, *attention.attend_backward(upstream, *heads, out, logsumexp)
    with ExactSoftmax():
        exact = by_autograd(torch.float64)
    for name, x, own, e in zip(("out", "q", "k", "v"), found, by_autograd(dtype), exact, strict=True):
        HERE.rule(name, x, own, e.cpu(), dtype)


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.mark.parametrize("backend", [pytest.param(None, id="chosen", marks=pytest.mark.gpu), SDPBackend.MATH], ids=str)
@dtypes
@pytest.mark.parametrize(("T", "H", "D"), [(1, 3, 8), (65, 2, 32), (197, 1, 64), (33, 3, 10)], ids=str)
def test_attention_with_a_backward_of_its_own(T, H, D, dtype, backend, monkeypatch):
    if backend is not None:
        monkeypatch.setattr(attention, "_backend", lambda *heads: backend)
    check_attention(*torch.randn(3, 2, T, H, D, dtype=torch.float64), dtype)


@pytest.mark.parametrize("values", ["saturated", "alike"])
@dtypes
def test_products_and_a_softmax_cancel_where_pytorchs_do(values, dtype, monkeypatch):
    """Probabilities of 1, whatever the scores; of values that are alike, gradients of q and k of 0: both but for rounding."""
    monkeypatch.setattr(attention, "_backend", lambda *heads: SDPBackend.MATH)
    q, k, v = torch.randn(3, 2, 33, 3, 10, dtype=torch.float64)
    if values == "saturated":
        check_attention(20 * q, 20 * k, v, dtype)
    else:
        check_attention(q, k, v[:, :1].expand(v.shape), dtype)


@pytest.mark.parametrize("T", [1, 2])
def test_gradients_are_not_finite_where_the_references_are_not(T):
    given = {name: x if x is None else x.clone().requires_grad_() for name, x in of_float32(2, T, 24, 40, bias=True).items()}
    given |= dict(attn_scale=None, mlp_scale=None)
    given["patch"].data[0, 0, 3] = torch.nan
    wanted = {name: x for name, x in given.items() if x is not None}

    def gradients(function):
        return torch.autograd.grad(call(function, **given, num_heads=3).sum(), list(wanted.values()))

    for name, x, y in zip(wanted, gradients(kernels.OPERATIONS["outer"]), gradients(reference.outer), strict=True):
        assert torch.equal(x.isfinite(), y.isfinite()), name


def test_what_is_computed_again_compiles_as_one_graph():
    given = {name: x if x is None else x.requires_grad_() for name, x in of_float32(2, 5, 24, 40, bias=True).items()}
    given |= dict(attn_scale=None, mlp_scale=given["mlp_scale"].detach())
    wanted = [x for x in given.values() if x is not None and x.requires_grad]
    packed = in_records(given)

    def loss():
        return kernels.OPERATIONS["outer"](**packed, num_heads=3, recompute="all").sin().sum()

    torch._dynamo.reset()
    with torch.autocast(DEVICE, torch.float16):
        eager, compiled = loss(), torch.compile(loss, fullgraph=True, backend="aot_eager")()
    for a, b in zip(torch.autograd.grad(eager, wanted), torch.autograd.grad(compiled, wanted), strict=True):
        torch.testing.assert_close(a, b)
