"""All operations, and whole models: what holds for every kernel, what only a GPU can show, and bad input."""

import copy
import math
import mmap
from contextlib import nullcontext

import pytest
import timm
import torch
from cases import block_tensors, case, check, embed_case, fold_tensors, inner_tensors, normal, outer_tensors
from helpers import ExactSoftmax, Tf32Products, call, paths, perturb, results
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from tnt_fast import TNT, kernels, reference, why_not_fused
from tnt_fast.kernels.operation import Gpu, precision

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
wide = pytest.mark.wide


@pytest.mark.parametrize("operation", kernels.OPERATIONS)
@paths("float32", "bfloat16 float32")
def test_any_strides_of_any_tensor(operation, path, dtype):
    """Values between those of a tensor are NaN; expanded ones are the same throughout."""
    tensors, others = case(operation)
    given = {k: None if v is None else v.to(path.device, dtype) for k, v in tensors.items()}
    function = kernels.OPERATIONS[operation]

    def gradients(given):
        given = {k: v if v is None else v.detach().requires_grad_() for k, v in given.items()}
        out = call(function, **given, **others)
        return [out, *torch.autograd.grad(out.square().sum(), [v for v in given.values() if v is not None])]

    def with_gaps(tensor):
        wider = torch.full([2 * size + 3 for size in tensor.shape], float("nan"), device=path.device, dtype=dtype)
        return wider[tuple(slice(3, None, 2) for _ in tensor.shape)].copy_(tensor)

    def turned(tensor):
        back = tuple(reversed(range(tensor.ndim)))
        return tensor.permute(back).contiguous().permute(back)

    def same(some, others):
        for found, right in zip(gradients(given | some), gradients(given | others) if others else expected, strict=True):
            assert torch.equal(found, right), list(some)
            assert found.is_contiguous(), list(some)

    expected = gradients(given)
    names = [name for name, tensor in given.items() if tensor is not None]
    for some in (names[::2], names[1::2]):  # while the others are as they are
        for layout in (with_gaps, turned):
            same({name: layout(given[name]) for name in some}, {})
        flat = {name: given[name][:1].expand_as(given[name]) for name in some if given[name].ndim == 1}
        if flat:
            same(flat, {name: tensor.contiguous() for name, tensor in flat.items()})


@pytest.mark.parametrize("spread", [0.0, 1e-4, 1e-3, 1e-1], ids=str)
@pytest.mark.parametrize("legacy", [False, True], ids=["norms", "legacy"])
@pytest.mark.parametrize(("S", "C"), [(16, 12), (16, 24), (9, 5)], ids=str)
@wide
@paths("float32", "float32")
def test_rows_that_are_nearly_constant_far_from_zero(S, C, legacy, spread, path, dtype):
    pixel = 1000 + spread * normal(6, S, C)
    # of equal pixels that are no power of two, the gradient of q and k is 0 to the bit in PyTorch, and rounding here
    gradients = spread > 0 or S == 16
    check(path, "inner", inner_tensors(6, S, C, 4 * C) | {"pixel": pixel}, dict(num_heads=1), dtype, gradients)
    check(path, "fold", fold_tensors(2, 3, S, C, 20, legacy) | {"pixel": pixel}, {}, dtype)


@paths("float16", "bfloat16 float16")
def test_of_equal_values_folds_norms_leave_nothing_in_half_precision(path, dtype):
    for S, C, value in ((1, 7, 0.873), (16, 24, 777.7), (9, 5, -1e-3)):
        pixel = torch.full((6, S, C), value, dtype=torch.float64)
        for legacy in (False, True):
            tensors = fold_tensors(2, 3, S, C, 20, legacy) | {"pixel": pixel}
            found = results(kernels.OPERATIONS["fold"], tensors, {}, dtype, dtype, path.device, gradients=["norm1_weight"])
            assert not found["gradient of norm1_weight"].any(), (S, C, legacy)


@pytest.mark.everywhere
@pytest.mark.parametrize(("S", "C"), [pytest.param(16, 24, marks=pytest.mark.wide), (9, 5)], ids=str)
@paths("float32", "float32")
def test_of_equal_values_a_norm_leaves_nothing(S, C, path, dtype):
    """To the bit, as in PyTorch on a GPU, whose own error then is 0: the gradient of a norm's weight is 0, whatever comes back.

    PyTorch on a CPU does leave something, and so the rule does not see it there.
    """
    for value in (777.7, 3e15):
        pixel = torch.full((6, S, C), value, dtype=torch.float64)
        level = dict(proj_weight=torch.zeros(20, S * C, dtype=torch.float64), proj_bias=torch.full((20,), value).double())
        for operation, tensors, others, weight in (
            ("inner", inner_tensors(6, S, C, 4 * C) | {"pixel": pixel}, dict(num_heads=1), "norm1_weight"),
            ("fold", fold_tensors(2, 3, S, C, 20, False) | {"pixel": pixel}, {}, "norm1_weight"),
            ("fold", fold_tensors(2, 3, S, C, 20, True) | {"pixel": pixel}, {}, "norm1_weight"),
            ("fold", fold_tensors(2, 3, S, C, 20, False) | level, {}, "norm2_weight"),
        ):
            found = results(kernels.OPERATIONS[operation], tensors, others, dtype, dtype, path.device, gradients=[weight])
            assert not found[f"gradient of {weight}"].any(), (operation, weight, value)
            assert found["output"].isfinite().all()


@pytest.mark.parametrize("operation", kernels.OPERATIONS)
def test_nothing_in_nothing_out(operation):
    if operation == "pixel_embed":
        tensors, others = embed_case(0, 3, 32, 32, 24, (16, 16), 4, (16, 16), False)
    elif operation == "inner":
        tensors, others = inner_tensors(0, 16, 24, 96), dict(num_heads=4)
    elif operation == "outer":
        tensors, others = outer_tensors(0, 5, 24, 96), dict(num_heads=4)
    elif operation == "block":
        tensors, others = block_tensors(0, 4, 16, 24, 48, 96, 96, False), dict(inner_heads=4, num_heads=4)
    else:
        tensors, others = fold_tensors(0, 4, 16, 24, 48, False), {}
    given = {k: None if v is None else v.float().to(DEVICE) for k, v in tensors.items()}
    out = call(kernels.OPERATIONS[operation], **given, **others)
    assert out.shape == call(getattr(reference, operation), **given, **others).shape
    assert out.numel() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("S", [4, 16])
@paths("float32", "bfloat16 float32")
def test_nan_and_infinity_stay_in_their_patch(S, bad, path, dtype):
    inner, fold = (kernels.OPERATIONS[name] for name in ("inner", "fold"))
    tensors = {k: None if v is None else v.to(path.device, dtype) for k, v in inner_tensors(9, S, 24, 96).items()}
    clean = call(inner, **tensors, num_heads=4)
    tensors["pixel"] = tensors["pixel"].clone()
    tensors["pixel"][4, 1, 2] = bad
    out = call(inner, **tensors, num_heads=4)
    others = [i for i in range(9) if i != 4]
    assert torch.equal(out[others], clean[others])
    assert torch.equal(out[4].isnan(), call(reference.inner, **tensors, num_heads=4)[4].isnan())
    tensors = {k: None if v is None else v.to(path.device, dtype) for k, v in fold_tensors(3, 3, S, 24, 48, False).items()}
    clean = fold(**tensors)
    tensors["pixel"] = tensors["pixel"].clone()
    tensors["pixel"][4, 1, 2] = bad
    out = fold(**tensors)
    assert out[1, 2].isnan().all()
    out[1, 2] = clean[1, 2]
    assert torch.equal(out, clean)


@paths(compiled="", gpu="bfloat16 float16 float32 tf32")  # the machine cannot but give the same bits: it faults at a race
@pytest.mark.parametrize(("C", "E"), [(12, 192), (24, 384), (40, 640)], ids=["ti", "s", "b"])
@pytest.mark.parametrize("operation", kernels.OPERATIONS)
def test_the_same_bits_twice(operation, C, E, path, dtype):
    tensors, others = (
        embed_case(2, 3, 32, 48, C, (16, 16), 4, (16, 16), False) if operation == "pixel_embed"
        else (inner_tensors(13, 16, C, 4 * C), dict(num_heads=2)) if operation == "inner"
        else (outer_tensors(2, 7, E, E), dict(num_heads=4)) if operation == "outer"
        else (block_tensors(1, 7, 16, C, E, 4 * C, E, False), dict(inner_heads=2, num_heads=4)) if operation == "block"
        else (fold_tensors(2, 7, 16, C, E, False), {})
    )  # fmt: skip
    given = {k: None if v is None else v.to(path.device, dtype) for k, v in tensors.items()}
    function = kernels.OPERATIONS[operation]
    assert torch.equal(call(function, **given, **others), call(function, **given, **others))


@pytest.mark.parametrize("operation", kernels.OPERATIONS)
def test_opcheck(operation):
    tensors, others = (
        embed_case(1, 3, 16, 32, 12, (16, 16), 4, (16, 16), False) if operation == "pixel_embed"
        else (inner_tensors(3, 16, 12, 48), dict(num_heads=2, eps=1e-5, a=None, m=None)) if operation == "inner"
        else (outer_tensors(2, 3, 12, 48), dict(H=2, eps=1e-5, **dict.fromkeys("amp012345"), r="none")) if operation == "outer"
        else (block_tensors(1, 3, 16, 12, 24, 48, 48, False), {}) if operation == "block"
        else (fold_tensors(1, 3, 16, 12, 24, False), dict(eps=1e-5))
    )  # fmt: skip
    given = [None if v is None else v.float().to(DEVICE).requires_grad_() for v in tensors.values()]
    others = [list(v) if isinstance(v, tuple) else v for v in others.values()]
    if operation == "block":  # whose numbers are not the last
        named = {**dict(zip(tensors, given, strict=True)), "inner_heads": 2, "num_heads": 3, "eps": 1e-5, "recompute": "mlp"}
        given, others = [named.get(name) for name in kernels.OPERATIONS[operation].kinds], []
    torch.library.opcheck(getattr(torch.ops.tnt_fast, operation).default, (*given, *others))


@paths()
@pytest.mark.parametrize("variant", ["ti", "s", "s_legacy", "b"])
def test_whole_models(variant, path, dtype):
    exact = perturb(timm.create_model(f"tnt_fast_{variant}_patch16_224", depth=2, img_size=(32, 48), num_classes=7)).eval()
    exact = exact.to(dtype)
    image = torch.randn(2, 3, 32, 48).to(dtype)
    outputs = []
    for backend in ("fused", "reference"):
        model = timm.create_model(
            f"tnt_fast_{variant}_patch16_224", depth=2, img_size=(32, 48), num_classes=7, backend=backend, dtype=dtype
        ).eval()
        model.load_state_dict(exact.state_dict())
        model.to(path.device)
        assert backend == "reference" or why_not_fused(model, image.to(path.device)) == []
        with torch.no_grad(), path.as_reference() if backend == "reference" else nullcontext():
            outputs.append(model(image.to(path.device)))
    exact.backend = "reference"
    path.rule(variant, *outputs, exact.double()(image.double()).detach(), dtype)


@paths("float16", "bfloat16 float16")
def test_autocast_with_float32_weights(path, dtype):
    model = perturb(timm.create_model("tnt_fast_ti_patch16_224", depth=2, img_size=32, num_classes=7)).to(path.device)
    image = torch.randn(2, 3, 32, 32, device=path.device)
    exact = reference_output = None
    for backend in ("reference", "fused"):
        model.backend = backend
        with torch.autocast(path.device, dtype):
            out = model(image)
            assert out.dtype == dtype
        if backend == "reference":
            reference_output = out.detach()
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    model.backend = "reference"
    exact = copy.deepcopy(model).double().cpu()(image.double().cpu()).detach()
    path.rule("autocast", out.detach(), reference_output, exact, dtype)


def test_fused_operations_count_as_many_flops_as_the_reference():
    model = timm.create_model("tnt_fast_ti_patch16_224", depth=2, img_size=32).eval().to(DEVICE)
    counts = []
    for backend in ("reference", "fused"):
        model.backend = backend
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.randn(2, 3, 32, 32, device=DEVICE))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    counted = {str(operation) for operation in counter.get_flop_counts()["Global"]}
    assert counted >= {f"tnt_fast.{name}" for name in ("pixel_embed", "fold", "block")}


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
def test_fused_is_fused(gradients, monkeypatch):
    """The reference's pieces raise; the fused path still answers."""
    answer = torch.enable_grad() if gradients else torch.no_grad()
    model = timm.create_model("tnt_fast_ti_patch16_224", depth=2, img_size=32, backend="fused").eval().to(DEVICE)
    image = torch.randn(1, 3, 32, 32, device=DEVICE)
    with answer:
        expected = model(image)
    cat = torch.cat

    def forbidden(*args, **kwargs):
        raise AssertionError("the reference was called")

    monkeypatch.setattr(reference, "cut_patches", forbidden)
    monkeypatch.setattr(reference, "as_pixels", forbidden)
    monkeypatch.setattr(reference, "attention_weights", forbidden)
    monkeypatch.setattr(torch, "cat", lambda tensors, *a, **k: forbidden() if tensors[0].ndim == 3 else cat(tensors, *a, **k))
    with answer:
        assert torch.equal(model(image), expected)
    model.backend = "reference"
    with pytest.raises(AssertionError, match="the reference was called"):
        model(image)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_fused_model_takes_other_sizes(legacy):
    kwargs = dict(img_size=32, embed_dim=24, inner_dim=12, depth=1, num_heads_inner=2, num_heads_outer=3, num_classes=5)
    model = perturb(TNT(**kwargs, legacy=legacy, dynamic_img_size=True, backend="fused")).eval().to(DEVICE)
    image = torch.randn(1, 3, 48, 32, device=DEVICE)
    outputs = []
    for size in (None, (48, 32)):  # in the forward, then set
        if size:
            model.set_input_size(size)
        for backend in ("fused", "reference"):
            model.backend = backend
            with torch.no_grad():
                outputs.append(model(image))
    for out in outputs:
        torch.testing.assert_close(out, outputs[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_fused_model_trains_compiles_and_exports(legacy):
    kwargs = dict(img_size=32, embed_dim=24, inner_dim=12, depth=2, num_heads_inner=2, num_heads_outer=3, num_classes=5)

    fused = perturb(TNT(**kwargs, legacy=legacy, backend="fused")).to(DEVICE)
    image = torch.randn(2, 3, 32, 32, device=DEVICE, requires_grad=True)
    gradients = []
    for backend in ("fused", "reference"):
        fused.backend = backend
        gradients.append(torch.autograd.grad(fused(image).square().sum(), [image, *fused.parameters()]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    fused.backend = "fused"
    expected = fused(image)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    out = compiled(image)
    torch.testing.assert_close(out, expected)
    found = torch.autograd.grad(out.square().sum(), [image, *fused.parameters()])
    for a, b in zip(found, gradients[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    program = torch.export.export(fused.eval(), (image.detach(),))
    assert any("tnt_fast.block" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(image.detach()), expected)


def test_float32_products_follow_pytorchs_settings(monkeypatch):
    monkeypatch.setattr("tnt_fast.kernels.operation.runner", Gpu())
    assert precision(torch.float32) == "ieee"
    matmul = torch.backends.cuda.matmul
    try:
        matmul.allow_tf32 = True
        assert precision(torch.float32) == "tf32"
        assert precision(torch.float16) == "ieee"
        matmul.allow_tf32 = False
        if hasattr(matmul, "fp32_precision"):
            matmul.fp32_precision = "tf32"
            assert precision(torch.float32) == "tf32"
    finally:
        if hasattr(matmul, "fp32_precision"):
            matmul.fp32_precision = "none"
        matmul.allow_tf32 = False
    assert precision(torch.float32) == "ieee"


@paths("", "", "bfloat16 float16 float32")
@pytest.mark.parametrize(("C", "E", "legacy"), [(12, 192, False), (24, 384, False), (24, 384, True), (40, 640, False)])
def test_fold_and_pixel_embed_at_full_size_over_many_seeds(C, E, legacy, path, dtype):
    for seed in range(10):
        torch.manual_seed(seed)
        check(path, "fold", fold_tensors(3, 196, 16, C, E, legacy), {}, dtype, gradients=False)
        check(path, "pixel_embed", *embed_case(3, 3, 224, 224, C, (16, 16), 4, (16, 16), legacy), dtype, gradients=False)


@wide
@paths("", "bfloat16 float16", "bfloat16")
def test_addresses_past_two_to_the_31(path, dtype, monkeypatch):
    """Compiled, the last programs run; of the pixels only theirs take memory."""
    S, C, P = 16, 40, 2**31 // 640 + 37
    if path.device == "cuda" and torch.cuda.get_device_properties(0).total_memory < 16 * 2**30:
        pytest.skip("needs 16 GiB of GPU memory")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", path.device == "cuda")
    weights = {k: None if v is None else v.to(path.device, dtype) for k, v in inner_tensors(1, S, C, 160).items()}
    del weights["pixel"]
    inner, tail = kernels.OPERATIONS["inner"], torch.randn(50, S, C).to(path.device, dtype)
    expected = call(inner, pixel=tail, **weights, num_heads=4)
    if path.executor:
        pixel = torch.frombuffer(mmap.mmap(-1, 2 * P * S * C), dtype=dtype).view(P, S, C)
        monkeypatch.setattr(path.executor, "multiprocessors", 2**31)  # a turn for each program
        monkeypatch.setattr(path.executor, "chosen", slice(-4, None))
    else:
        pixel = torch.zeros(P, S, C, device=path.device, dtype=dtype)
    pixel[-50:] = tail
    last = 12 if path.executor else 48
    assert torch.equal(call(inner, pixel=pixel, **weights, num_heads=4)[-last:], expected[-last:])
    monkeypatch.undo()


def test_the_references_tf32_rounds_the_factors_of_products():
    x = torch.tensor([[1 + 2**-11], [-1 - 2**-11], [1 + 2**-12], [float("inf")]])
    rounded = torch.tensor([[1 + 2**-10], [-1 - 2**-10], [1.0], [float("inf")]])  # to nearest, ties away from 0
    bias, one = torch.tensor([2.0**-20]), torch.ones(1, 1, requires_grad=True)
    with Tf32Products():
        out = torch.nn.functional.linear(x, one, bias)
        (gradient,) = torch.autograd.grad(torch.nn.functional.linear(x[:3], one).sum(), one)
    assert torch.equal(out, rounded + bias)
    assert gradient.item() == 1
    with Tf32Products():
        assert torch.equal(torch.nn.functional.conv1d(x[:3, None], one[None]), rounded[:3, None])
        assert torch.equal(x[None, :3] @ one, rounded[None, :3])
        assert torch.equal(x.double() @ one.double(), x.double())


def test_the_references_float64_has_the_digits_of_a_saturated_softmaxs_gradient():
    """Of two scores x apart: P·(1 − P) of what their gradients differ by, one up, one down."""
    for apart in (0.0, 3.0, 30.0, 300.0):
        scores = torch.tensor([[0.0, -apart], [-apart, 0.0]], dtype=torch.float64, requires_grad=True)
        upstream = torch.tensor([[0.3, -0.7]], dtype=torch.float64).expand(2, 2)
        with ExactSoftmax():
            (found,) = torch.autograd.grad(scores.softmax(-1), scores, upstream)
        tiny = math.exp(-apart) / (1 + math.exp(-apart)) ** 2  # of float64's normal values, where 1 − P is 0
        torch.testing.assert_close(found, torch.tensor([[tiny, -tiny]] * 2, dtype=torch.float64), rtol=1e-14, atol=0)
    (plain,) = torch.autograd.grad(scores.softmax(-1), scores, upstream)
    assert plain[0, 0] == 0  # as it is without
    half = torch.tensor([[0.5, 1.0]], requires_grad=True)
    with ExactSoftmax():
        (found,) = torch.autograd.grad(half.softmax(-1), half, torch.tensor([[1.0, 2.0]]))
    assert torch.equal(found, torch.autograd.grad(half.softmax(-1), half, torch.tensor([[1.0, 2.0]]))[0])


@pytest.mark.parametrize("operation", kernels.OPERATIONS)
def test_a_tensor_on_the_cpu_is_refused_outside_the_interpreter(operation, monkeypatch):
    monkeypatch.setattr("tnt_fast.kernels.operation.runner", Gpu())
    tensors, others = (
        embed_case(1, 3, 16, 16, 24, (16, 16), 4, (16, 16), False) if operation == "pixel_embed"
        else (inner_tensors(1, 16, 24, 96), dict(num_heads=4)) if operation == "inner"
        else (outer_tensors(1, 2, 24, 96), dict(num_heads=4)) if operation == "outer"
        else (block_tensors(1, 2, 16, 12, 24, 48, 48, False), dict(inner_heads=4, num_heads=4)) if operation == "block"
        else (fold_tensors(1, 1, 16, 24, 48, False), {})
    )  # fmt: skip
    given = {k: None if v is None else v.float() for k, v in tensors.items()}
    with pytest.raises(
        ValueError, match=rf"{operation}: \w+ is on device 'cpu'; the kernel takes CUDA tensors .*TRITON_INTERPRET=1"
    ):
        call(kernels.OPERATIONS[operation], **given, **others)


def test_what_an_operation_does_not_take_is_named():
    inner, fold, embed = (kernels.OPERATIONS[name] for name in ("inner", "fold", "pixel_embed"))
    good = {k: None if v is None else v.float().to(DEVICE) for k, v in inner_tensors(3, 16, 24, 96).items()}
    with pytest.raises(TypeError, match=r"inner: pixel is torch\.float64; accepted: torch\.bfloat16"):
        call(inner, **{**good, "pixel": good["pixel"].double()}, num_heads=4)
    with pytest.raises(TypeError, match=r"inner: v_weight is torch\.float16, pixel is torch\.float32"):
        call(inner, **{**good, "v_weight": good["v_weight"].half()}, num_heads=4)
    with pytest.raises(ValueError, match=r"inner: fc1_weight has shape \(96, 20\); expected \(96, 24\)"):
        call(inner, **{**good, "fc1_weight": good["fc1_weight"][:, :20]}, num_heads=4)
    with pytest.raises(ValueError, match=r"inner: 5 heads do not divide C=24"):
        call(inner, **good, num_heads=5)
    good = {k: None if v is None else v.float().to(DEVICE) for k, v in fold_tensors(2, 3, 16, 12, 24, False).items()}
    with pytest.raises(ValueError, match="fold: pixel has 6 patches, patch has 2 images with 2 each"):
        fold(**{**good, "patch": good["patch"][:, 1:]})
    with pytest.raises(ValueError, match=r"fold: norm1_weight has 20 values; accepted: S·C=192, or C=12"):
        fold(**{**good, "norm1_weight": good["norm1_weight"][:20]})
    with pytest.raises(ValueError, match=r"pixel_embed: weight has shape \(24, 3, 5, 5\); expected \(24, 3, 7, 7\)"):
        embed(
            torch.zeros(1, 3, 16, 16, device=DEVICE), torch.zeros(24, 3, 5, 5, device=DEVICE), None, None, (16, 16), 4, (16, 16)
        )
    if DEVICE == "cuda":
        good = {k: v if v is None else v.float() for k, v in inner_tensors(3, 16, 24, 96).items()}
        good["pixel"] = good["pixel"].cuda()
        with pytest.raises(ValueError, match="inner: norm1_weight is on 'cpu', pixel on 'cuda:0'"):
            call(inner, **good, num_heads=4)
